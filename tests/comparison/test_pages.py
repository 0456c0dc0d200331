"""The pages as a reader sees them: every element, attribute and word, and no text of a run or dataset as markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from agentft.audit import main as audit
from agentft.compare import main as compare
from agentft.read import main as read
from tests.test_compare import make_run, write

HOSTILE = "<b>&\"'</script><script>alert(1)</script>{{ 7 * 7 }}{% raw %}"
INLINE = {"a", "b", "small", "span", "i", "u", "code", "mark", "input", "button"}
EMPTY = {"meta", "input", "path", "rect"}


class Outline(HTMLParser):
    """A page as lines: each tag with its attributes in order of their names, each text.

    White space counts as a browser shows it: between blocks not at all, within a line as one blank, in `pre` and in the
    tokens of an audit as it is.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self._text = ""
        self._exact = 0
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._end_of_text(tag)
        shown = "".join(f" {name}={' '.join((value or '').split())!r}" for name, value in sorted(attrs))
        self.lines.append(f"<{tag}{shown}>")
        if tag not in EMPTY:
            self._open.append(tag)
        if self._exact or tag == "pre" or (tag == "div" and (dict(attrs).get("class") or "").startswith("run ")):
            self._exact += tag not in EMPTY

    def handle_endtag(self, tag: str) -> None:
        self._end_of_text(tag)
        if tag not in EMPTY:
            assert self._open.pop() == tag
            self.lines.append(f"</{tag}>")
            self._exact = max(self._exact - 1, 0)

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("script", "style"):
            self.scripts.append(data)
        else:
            self._text += data

    def _end_of_text(self, tag: str) -> None:
        text, self._text = self._text, ""
        if not self._exact:
            text = re.sub(r"[ \t\n]+", " ", text)
            after_block = not self.lines or re.match(r"</?(\w+)", self.lines[-1])[1] not in INLINE
            text = text.lstrip(" ") if after_block else text
            text = text.rstrip(" ") if tag not in INLINE else text
        if text:
            self.lines.append(repr(text))


def comparison_page(folder: Path) -> str:
    """A sweep with every kind of chart: several sizes and ranks, curves, costs, errors, a run without scores."""
    for i, size in enumerate((60, 120, 240)):
        for j, rank in enumerate((4, 64)):
            run = folder / "sweep" / f"{2 * i + j}_rank-{rank}"
            changes = {"sft_type.rank": rank, "dataset.max_samples": size, "model.name": HOSTILE if j else "tiny"}
            make_run(run, changes, right=lambda k, n=size: k % 60 < 60 - 200 / n**0.5, loss=2 / (i + 1))
            write(run / "data" / "manifest.json", {"train": {"conversations": size}})
            write(run / "job.json", {"state": "finished", "seconds": 60.0 + size + rank})
            rows = [{"step": k, "train/loss": 2 - k / 10, "eval/loss": 3 - k / 10} for k in range(1, 4)]
            write(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            scores = json.loads((run / "metrics" / "after.json").read_text())
            write(run / "metrics" / "after.json", scores | {"errors": {"wrong_tool": i + j, "malformed": 2}})
    make_run(folder / "sweep" / "8_<b>&\"'", {"sft_type.rank": 8}, state="failed")
    assert compare([str(folder / "sweep"), "--html", str(folder / "page.html")]) == 0
    return (folder / "page.html").read_text(encoding="utf-8")


def _call(name: str, **parameters: object) -> str:
    return f"<|startofthink|>{json.dumps({'api_name': name, 'parameters': parameters})}<|endofthink|>"


def predictions_page(folder: Path) -> str:
    """Answers of every kind, with and without what stands around them."""
    answers = {
        "right": (_call("weather", city="Rome"), _call("weather", city="Rome")),
        "wrong": (_call("weather", city="Rome", day=1), f"First.\n{_call('weather', city=HOSTILE)}\n\n{_call('news')}"),
        "malformed": (_call("weather", city="Rome"), '<|startofthink|>{"api_name": "weather"'),
        "words": ("It is sunny\n\n  in Rome.", f"  It is {HOSTILE} \u2028 cold \x00\x1b[31m \ud800 "),
        HOSTILE: ("Yes.", "No." * 5000),
    }
    rows = [
        {"conversation_id": name, "step": 0, "reference": reference, "prediction": prediction}
        | (
            {
                "offered": [{"name": "weather", "parameters": ["city", HOSTILE]}, "news"],
                "user": f"About\n {name}",
                "observations": [HOSTILE],
                "finish": "length",
            }
            if name != "right"
            else {}
        )
        for name, (reference, prediction) in answers.items()
    ]
    write(folder / "answers.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert read([str(folder / "answers.jsonl"), "--output", str(folder / "page.html")]) == 0
    return (folder / "page.html").read_text(encoding="utf-8")


def audit_page(folder: Path) -> str:
    """A small dataset with findings of several levels, rows set aside, and hostile words everywhere."""
    result = '<|startofexec|>```JSON\n{"high": "14:20"}\n```<|endofexec|>'
    call = '<|startofthink|>```JSON\n{"api_name": "tide", "parameters": {"harbour": "Husum"}}\n```<|endofthink|>'
    system = '1. {"name": "tide", "parameters": [{"name": "harbour", "required": true}]}'

    def line(name: str, user: str, assistant: str = f"{call}\n\n{result}\nAt 14:20.") -> str:
        turns = (("system", system), ("user", user), ("assistant", assistant))
        return json.dumps({"id": name, "conversations": [{"from": r, "value": v} for r, v in turns]}) + "\n"

    lines = [line(f"good-{n}", f"question {n} about the tides") for n in range(4)]
    lines.append(line("bad-1", "and the moon?", call.replace("tide", "[red]moon\x1b[31m")[:-14] + "<|endofthink|>"))
    lines.append(line("long", "tell me  more\n\n  " + "tides and " * 240))
    lines.append('{"id": "broken-1"}\n')
    lines.append(line(HOSTILE, f"a {HOSTILE} in the text \u202e turned", f"{HOSTILE} 你好"))
    write(folder / "data.jsonl", "".join(lines))
    given = ["model=tiny", "dataset=local", f"dataset.path={folder / 'data.jsonl'}", "dataset.test_ratio=0.3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["audit.py", *given, f"output={folder / 'out'}"])
        audit()
    return (folder / "out" / "audit.html").read_text(encoding="utf-8")


PAGES = {"comparison": comparison_page, "predictions": predictions_page, "audit": audit_page}


@pytest.fixture(scope="module", params=PAGES)
def page(request, tmp_path_factory) -> tuple[str, str]:
    """Name and text of a page, without what differs from run to run."""
    folder = tmp_path_factory.mktemp("pages")
    text = PAGES[request.param](folder)
    return request.param, re.sub(r"\b[\d.]+ s\b", "N s", text.replace(str(folder), "FOLDER"))


def test_pages_say_what_they_said(page, golden_folder, update_golden):
    name, text = page
    lines = Outline(text).lines
    golden = golden_folder / "pages" / f"{name}.txt"
    if update_golden:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert lines == golden.read_text(encoding="utf-8").splitlines()


def test_no_text_becomes_markup_and_a_page_needs_nothing_else(page):
    _, text = page
    outline = Outline(text)
    assert len(outline.scripts) == 2, "the style sheet and the page's own script"
    assert not any("alert(1)" in script for script in outline.scripts)
    assert any("alert(1)" in line for line in outline.lines), "the words are there as words"
    assert "{{ 7 * 7 }}" in "".join(outline.lines), "and are no template"
    assert not re.search(r"<script>alert|https?://|\bsrc=|@import|url\(", text)
    text.encode()
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", text)


def test_no_template_and_no_module_but_one_can_put_markup_on_a_page(root):
    """A text becomes markup only where somebody says so: nobody does, but for our own style sheets and scripts."""
    for template in (root / "agentft" / "comparison" / "templates").glob("*.j2"):
        assert not re.search(r"\|\s*safe\b|autoescape", template.read_text(encoding="utf-8")), template
    marking = {
        path.name
        for path in (root / "agentft").rglob("*.py")
        if re.search(r"Markup\(|</(html|p|div|span|section|table|td|svg)>", path.read_text(encoding="utf-8"))
    }
    assert marking == {"render.py"}
