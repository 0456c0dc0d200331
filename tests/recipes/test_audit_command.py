"""The audit as a command: exit codes that guard a pipeline, files that say why, a page and a view to look at."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from agentft import audit as command
from agentft.audits.audit import audit
from agentft.audits.checks import CODES
from agentft.audits.report import length_bars
from agentft.config import AuditConfig, compose, register_schemas, settings, to_config
from agentft.errors import ConfigError
from agentft.recipes.config import SCHEMAS

CALL = '<|startofthink|>```JSON\n{"api_name": "tide", "parameters": {"harbour": "Husum"}}\n```<|endofthink|>'
RESULT = '<|startofexec|>```JSON\n{"high": "14:20"}\n```<|endofexec|>'
SYSTEM = '1. {"name": "tide", "parameters": [{"name": "harbour", "required": true}]}'


def line(name: str, user: str, assistant: str = f"{CALL}\n\n{RESULT}\nAt 14:20.") -> str:
    turns = (("system", SYSTEM), ("user", user), ("assistant", assistant))
    return json.dumps({"id": name, "conversations": [{"from": r, "value": v} for r, v in turns]}) + "\n"


def config(*overrides: str) -> AuditConfig:
    register_schemas()
    return to_config(compose("audit", ["model=tiny", *overrides]), AuditConfig)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("audit") / "data.jsonl"
    lines = [line(f"good-{n}", f"question {n} about the tides") for n in range(20)]
    lines.append(line("bad-1", "and the moon?", CALL.replace("tide", "[red]moon\x1b[31m")[:-14] + "<|endofthink|>"))
    lines.append('{"id": "broken-1"}\n')
    lines.append(line("markup <b>&", "a <script>alert(1)</script> in the text"))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["agentft/audit.py", "model=tiny", *arguments])
    try:
        return command.main()
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def report(data: Path) -> tuple[Path, str]:
    """The folder of an audit that passed, and what it printed."""
    output, printed = data.parent / "report", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        given = ("dataset=local", f"dataset.path={data}", "dataset.test_ratio=0.3", f"output={output}")
        assert run(patch, *given) == 0
    return output, printed.getvalue()


def test_a_sound_dataset_passes_and_the_report_is_written(data: Path, report: tuple[Path, str]):
    output, said = report
    assert "passed" in said
    assert f"{data}:21 bad-1" in said
    assert sorted(path.name for path in output.iterdir()) == [
        "audit.html",
        "audit.json",
        "rejected.jsonl",
        "report.txt",
    ]
    numbers = json.loads((output / "audit.json").read_text(encoding="utf-8"))
    assert numbers["passed"] is True
    assert numbers["rows"] == 23
    assert numbers["whole"]["conversations"] == 22
    assert sum(part["conversations"] for part in numbers["parts"].values()) == 22
    (rejected,) = (output / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(rejected) == {
        "source": str(data),
        "line": 22,
        "id": "broken-1",
        "reason": "conversations_missing",
        "detail": "no field 'messages' and no field 'conversations', found 'id'",
    }
    assert (output / "report.txt").read_text(encoding="utf-8").count("unknown_tool") == 1


@pytest.mark.parametrize(
    "setting", ["audit.fail_on=[unknown_tool]", "dataset.max_rejected=0.01", "dataset.max_length=300"]
)
def test_the_exit_code_is_3_where_the_data_should_not_be_used(setting: str, data: Path, tmp_path: Path, monkeypatch):
    given = ["dataset=local", f"dataset.path={data}", "dataset.test_ratio=0.3", "audit.page=false", setting]
    assert run(monkeypatch, *given, f"output={tmp_path / 'out'}") == 3
    assert json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))["passed"] is False
    assert not (tmp_path / "out" / "audit.html").exists()


def test_a_label_in_the_wrong_place_fails_the_command(data: Path, tmp_path: Path, monkeypatch):
    """As if the mask law were broken: the audit must not believe `render.py`."""
    from agentft.data import render

    leaky = frozenset({*render.TRAINED_KINDS, render.SpanKind.observation})
    monkeypatch.setattr(render, "TRAINED_KINDS", leaky)
    given = ["dataset=local", f"dataset.path={data}", "dataset.test_ratio=0.3", f"output={tmp_path / 'out'}"]
    assert run(monkeypatch, *given) == 3
    findings = json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))["findings"]
    assert (findings[0]["code"], findings[0]["level"], findings[0]["count"]) == ("label_in_context", "broken", 21)


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["audit.fail_on=[unknown_tol]"], 2, "audit.fail_on=unknown_tol: no such finding"),
        (["audit.fail_onn=[]"], 2, "audit.fail_onn: no such setting; did you mean audit.fail_on?"),
        (["dataset=local"], 2, "dataset.path: missing"),
        (["dataset=local", "dataset.path=nowhere.jsonl"], 1, "nowhere.jsonl: no such file"),
        (["view=nobody"], 1, "view=nobody: none of"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_report(
    arguments: list[str], code: int, expected: str, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    given = arguments if "dataset=local" in arguments else ["dataset.conversations=3", "dataset.heldout=2", *arguments]
    assert run(monkeypatch, *given) == code
    said = capsys.readouterr().err
    assert said.startswith(f"audit.py: {expected}")
    assert said.count("\n") == 1
    assert not list(tmp_path.rglob("audit.*"))


def test_composing_needs_no_heavy_library(tmp_path: Path, root: Path):
    code = (
        "import sys; sys.argv = ['agentft/audit.py', '--help']; from agentft.audit import main; main();"
        "sys.exit(' '.join(m for m in ('torch', 'transformers', 'numpy', 'jsonschema') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m agentft.audit ")


def test_the_view_shows_what_is_trained_without_colours_too(data: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "dataset=local", f"dataset.path={data}", "view=good-3") == 0
    said = capsys.readouterr().out
    order = re.findall(r"^ *([+-]\w+) \d+", said, flags=re.MULTILINE)
    assert [name for name in order if name != "-header"] == [
        *(
            "-system",
            "-user",
            "+call_syntax",
            "+call",
            "+call_syntax",
            "+call",
            "+call_syntax",
            "+stop",
            "-observation",
            "+text",
            "+stop",
        )
    ]
    assert "[red]" not in said
    assert list(tmp_path.glob("runs")) == []


def test_the_words_of_a_dataset_cannot_command_the_terminal(data: Path, report: tuple[Path, str], monkeypatch, capsys):
    run(monkeypatch, "dataset=local", f"dataset.path={data}", "view=bad-1")
    for said in (report[1], capsys.readouterr().out):
        assert "\x1b" not in said
        assert "[red]moon" in said


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert "src" not in values
        assert tag != "link"
        self.scripts += tag == "script"
        self.ids.add(values.get("id") or "")
        if tag == "a":
            self.links.append(values["href"] or "")
        if tag not in ("meta", "input", "path", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "rect"):
            assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_runs_no_script_of_the_dataset(report: tuple[Path, str]):
    page = (report[0] / "audit.html").read_text(encoding="utf-8")
    reader = _Reader()
    reader.feed(page)
    assert reader.open == []
    assert reader.scripts == 1
    assert "http" not in page
    assert {link.removeprefix("#") for link in reader.links} <= reader.ids
    assert reader.links, "a finding leads to its conversation"
    assert "&lt;script&gt;alert(1)" in page
    assert 'class="run k-call on"' in page
    assert 'class="run k-observation"' in page
    assert 'class="run k-observation on"' not in page


def prepared_by(composed: AuditConfig):
    from agentft.data.prepare import prepare_data
    from agentft.data.template_choice import choose_template
    from agentft.data.tokens import SegmentEncoder
    from agentft.model.load import load_tokenizer
    from agentft.model.sources import locate_model

    tokenizer = load_tokenizer(locate_model(composed.model), composed.model)
    template = choose_template(composed.model.template, tokenizer, composed.model.stop_token)
    return prepare_data(composed.dataset, template, SegmentEncoder(tokenizer))


def numbers_of(composed: AuditConfig) -> dict:
    audit(composed)
    return json.loads((Path(composed.output) / "audit.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("too_long", ["fit", "split", "drop"])
def test_the_audit_says_what_a_training_run_will_make_of_every_part(too_long: str, tmp_path: Path):
    """Weights, split and fitting as `prepare_data` does them: the same conversations, examples, tokens and labels."""
    for name, count in (("a", 30), ("b", 20)):
        rounds = [(f"{name} {n}: " + "tide? " * 30, f"{CALL}\n\n{RESULT}\nAt 14:20.") for n in range(count)]
        turns = [[("user", q), ("assistant", a)] * (1 + n % 6) for n, (q, a) in enumerate(rounds)]
        lines = [
            json.dumps(
                {"id": f"{name}-{n}", "conversations": [{"from": r, "value": v} for r, v in [("system", SYSTEM), *t]]}
            )
            for n, t in enumerate(turns)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    sources = f"[{{path: '{tmp_path}/a.jsonl', weight: 1.5}}, {{path: '{tmp_path}/b.jsonl', weight: 0.5}}]"
    composed = config(
        *("dataset=local", f"dataset.sources={sources}", f"output={tmp_path / 'out'}", "dataset.max_rejected=1"),
        *("dataset.test_ratio=0.3", "dataset.max_length=1000", f"dataset.too_long={too_long}"),
    )
    numbers, prepared = numbers_of(composed), prepared_by(composed)
    stats = prepared.stats
    for part, examples in (("train", prepared.train), ("heldout", prepared.heldout_examples)):
        fitting = numbers["fitting"][part]
        assert fitting["outcomes"] == dict(stats.fitted[part])
        assert fitting["examples"] == len(examples)
        assert fitting["tokens"] == sum(map(len, examples))
        assert fitting["trained"] == sum(example.trained_tokens for example in examples)
        left_out = sum(len(change["steps_left_out"]) for change in stats.changed if change["part"] == part)
        assert fitting["steps_left_out"] == left_out
        sources_given = {name: count[part] for name, count in numbers["sources_read"].items()}
        assert sources_given == {name: stats.sources[name][part] for name in sources_given}
    assert numbers["in_neither_part"] == dict(stats.left_out)
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert sorted(each["id"] for each in rejected) == sorted(each.id for each in stats.rejections)
    assert numbers["set_aside_in_fitting"] == stats.reasons()
    assert numbers["parts"]["train"]["too_long"] > 3


FORGETS = """\
{%- set last = namespace(user=0) -%}
{%- for m in messages if m.role == 'user' -%}{%- set last.user = messages.index(m) -%}{%- endfor -%}
{%- for t in tools or [] -%}{{ t | tojson }}{%- endfor -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.reasoning_content and loop.index0 > last.user -%}<think>{{ m.reasoning_content }}</think>{%- endif -%}
{{- m.content or '' -}}{%- for c in m.tool_calls or [] -%}{{ c.function | tojson }}{%- endfor -%}{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


def test_what_rewritten_history_costs_is_said(tmp_path: Path, capsys):
    """Past thoughts are dropped, so each round of a conversation that thinks is an example of its own."""
    said = {"role": "assistant", "content": "Yes.", "reasoning_content": "It asks again."}
    for name, thinks in (("thinking", True), ("plain", False)):
        answer = said if thinks else {**said, "reasoning_content": None}
        rows = [[{"role": "user", "content": f"{n} {k}?"} if at == 0 else answer for k in range(3) for at in (0, 1)]
                for n in range(20)]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    (tmp_path / "forgets.jinja").write_text(FORGETS)
    found = {}
    for name in ("thinking", "plain"):
        output = tmp_path / name
        layout = f"model.template={tmp_path}/forgets.jinja"
        audit(config("dataset=local", f"dataset.path={tmp_path}/{name}.jsonl", layout, f"output={output}"))
        found[name] = json.loads((output / "audit.json").read_text())["rewritten_history"]
        assert ("The chat template rewrites history" in (output / "report.txt").read_text()) == (name == "thinking")
    assert found["plain"]["conversations"] == 0
    cost = found["thinking"]
    assert (cost["conversations"], cost["examples"]) == (20, 60)
    assert cost["tokens"] > 1.5 * cost["tokens_of_the_longest"]


def test_bars_meet_the_limit_and_lose_nobody():
    lengths = [1, 10, 99, 100, 101, 199, 200, 201, 5000]
    bars = length_bars(lengths, 100)
    assert sum(count for _, _, count in bars) == len(lengths)
    assert sum(count for start, _, count in bars if start > 100) == 5
    assert any(stop == 100 for _, stop, _ in bars)
    assert bars[-1][1] == 5000
    assert length_bars([], 100) == []


def test_every_malformed_record_leaves_the_audit_standing(shared_data: Path, tmp_path: Path):
    composed = config("dataset=local", f"dataset.path={shared_data / 'malformed.jsonl'}", f"output={tmp_path}")
    assert audit(composed)
    numbers = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    assert numbers["rows"] == 110
    assert {f["code"] for f in numbers["findings"] if f["level"] == "broken"} <= {"empty_part", "too_many_set_aside"}
    (tmp_path / "audit.html").read_text(encoding="utf-8").encode()


def test_limits_are_those_of_a_training_run():
    with pytest.raises(ConfigError, match=r"dataset\.max_length=9999 exceeds model\.context"):
        config("dataset.max_length=9999")


def test_every_code_and_setting_is_in_the_docs(root: Path):
    words = (root / "docs" / "audit.md").read_text(encoding="utf-8")
    own = [key for key in settings(AuditConfig) if key.split(".")[0] not in SCHEMAS and key != "audit"]
    for name in [*CODES, *own]:
        assert f"`{name}`" in words, f"docs/audit.md does not name {name}"
    for code, (_, meaning) in CODES.items():
        assert meaning in words, code
