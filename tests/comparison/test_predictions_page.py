"""Predictions to read: wrong ones first, found by kind of error, whatever the texts hold."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from agentft.comparison.predictions_page import call_differences
from agentft.read import main

REPOSITORY = Path(__file__).parent.parent.parent


def call(name: str, **parameters: object) -> str:
    body = json.dumps({"api_name": name, "parameters": parameters})
    return f"<|startofthink|>```JSON\n{body}\n```<|endofthink|>"


STEPS = {
    "right": (call("weather", city="Rome"), call("weather", city="Rome")),
    "wrong_tool": (call("weather", city="Rome"), call("news", city="Rome")),
    "missing_argument": (call("weather", city="Rome", day=1), call("weather", city="Rome")),
    "extra_argument": (call("weather", city="Rome"), call("weather", city="Rome", day=1)),
    "wrong_value": (call("weather", city="Rome"), call("weather", city="Oslo")),
    "malformed": (call("weather", city="Rome"), '<|startofthink|>{"api_name": "weather"<|endofthink|>'),
    "spurious_call": ("It is sunny.", call("weather", city="Rome")),
    "missed_call": (call("weather", city="Rome"), "It is sunny."),
    "hallucinated_tool": (call("weather", city="Rome"), call("wether", city="Rome")),
    "words": ("It is sunny in Rome.", "It is <b>cloudy</b> & \u2028 cold \x00 </script><script>alert(1)</script>"),
}


@pytest.fixture
def page(tmp_path, capsys) -> str:
    file = tmp_path / "run" / "predictions" / "after.jsonl"
    file.parent.mkdir(parents=True)
    rows = [
        {
            "conversation_id": name,
            "step": 0,
            "reference": reference,
            "prediction": prediction,
            "offered": [{"name": "weather", "parameters": ["city", "day"]}, "news"],
            "user": f"A question about {name} <i>",
            "observations": ["<|startofexec|>{}<|endofexec|>"],
            "finish": "length" if name == "words" else "stop",
        }
        for name, (reference, prediction) in STEPS.items()
    ]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert main([str(tmp_path / "run")]) == 0
    assert Path(capsys.readouterr().out.strip()) == file.with_suffix(".html")
    return file.with_suffix(".html").read_text(encoding="utf-8")


class _Cards(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.cards: dict[str, set[str]] = {}
        self.scripts = 0
        self.buttons: dict[str, str] = {}
        self._button: str | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "article":
            self.cards[attributes["id"]] = set(attributes["data-kinds"].split())
        self.scripts += tag == "script"
        self._button = attributes["data-kind"] if tag == "button" else None

    def handle_data(self, data):
        if self._button:
            self.buttons[self._button] = data
            self._button = None


def test_every_kind_of_error_has_its_filter_and_wrong_answers_come_first(page):
    found = _Cards(page)
    for kind in STEPS:
        if kind not in ("right", "words"):
            assert kind in found.cards[f"{kind}/0"], kind
            assert kind in found.buttons
    wrong = ["wrong" in kinds for kinds in found.cards.values()]
    assert wrong == sorted(wrong, reverse=True)
    assert wrong.count(True) == 8
    assert found.buttons["wrong"] == "wrong 8"
    assert next(reversed(found.cards)) == "right/0", "worst words before what is right"


def test_user_reference_answer_and_what_differs_stand_side_by_side(page):
    assert "weather: city is &#34;Oslo&#34; instead of &#34;Rome&#34;" in page
    assert "calls news instead of weather" in page
    assert "A question about wrong_tool &lt;i&gt;" in page
    assert "tools offered: 2</summary><pre>weather(city, day)\nnews</pre>" in page
    assert "cut at the longest length" in page
    assert "argument F1 0.50" in page
    assert "ROUGE-L" in page


def test_what_texts_hold_does_nothing_on_the_page(page):
    assert _Cards(page).scripts == 1
    assert "<b>cloudy" not in page
    assert "\x00" not in page
    assert not re.search(r"https?://|src=|@import|url\(", page)


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to read the script with")
def test_the_script_is_valid(page, tmp_path):
    script = tmp_path / "page.js"
    script.write_text(re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[0], encoding="utf-8")
    subprocess.run(["node", "--check", str(script)], check=True)


def test_differences_are_said_in_words():
    reference = call("a", x=1) + call("b", y=[1, 2])
    assert call_differences(reference, reference) == []
    assert call_differences(reference, call("b", y=[1, 2]) + call("a", x=True, z=0)) == [
        "a: x is true instead of 1",
        "a: z is extra, 0",
    ]
    assert call_differences(reference, call("a", x=1)) == ["does not call b with y [1, 2]"]
    assert call_differences(call("a"), "hello") == ["does not call a"]
    assert call_differences("hello", call("a")) == ["calls a, which the reference does not"]


def test_a_broken_file_is_refused_in_one_line(tmp_path, capsys):
    broken = tmp_path / "x.jsonl"
    broken.write_text("{}\n", encoding="utf-8")
    assert main([str(broken)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main([str(tmp_path)]) == 1
    assert "no predictions" in capsys.readouterr().err


def test_reading_needs_no_torch():
    code = "import agentft.read, sys; sys.exit(' '.join({'torch', 'transformers', 'hydra'} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert (done.returncode, done.stderr) == (0, "")
