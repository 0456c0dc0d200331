"""Score a predictions file alone, without a model and without torch: `python -m agentft.score FILE.jsonl --json`.

One JSON object a line and step: `conversation_id` (a string, or an integer that stands for its digits), `step`
(0, 1, ...), `reference` (raw assistant text of the step), `prediction` (raw model text), each in MSAgent's marks or in those
of a family in `agentft/data/responses`; optionally `offered` (tool
names, or objects with `name` and `parameters`), `after_call`, `language`, `rounds`, `seen_tool`, `piece_of` (id of the
whole, where a long conversation was asked in pieces: they are drawn together for the intervals). `-` reads standard
input. Ends with status 1 and one line `file:line: ...` where the file cannot be scored.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentft.data.calls import Said, parameter_types
from agentft.data.conversation import THINK_OPEN
from agentft.data.response import ResponseTemplate, our_templates, read_by_marks
from agentft.errors import EvaluationError
from agentft.evaluation.metrics import (
    METRICS_BY_NAME,
    aggregate,
    score_records,
)
from agentft.evaluation.parse import parse_reply, with_msagent_calls, without_end
from agentft.evaluation.steps import StepRecord, by_name, read_offered_tool
from agentft.progress import outlive_console

_NEEDED: dict[str, tuple[type, str]] = {
    "conversation_id": (str, "a string or an integer"),
    "step": (int, "an integer from 0"),
    "reference": (str, "a string"),
    "prediction": (str, "a string"),
}
_OPTIONAL: dict[str, tuple[type, str]] = {
    "piece_of": (str, "a string"),
    "language": (str, "a string"),
    "rounds": (int, "an integer"),
    "seen_tool": (bool, "true or false"),
    "after_call": (bool, "true or false"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    outlive_console()
    options = _parse_options(arguments)
    try:
        records = read_records(options.file)
        if holes := _holes(records):
            sys.stderr.write(f"{options.file}: {holes}; what is missing is not scored\n")
        scores = score_records(records)
        report = aggregate(
            scores,
            bootstrap_samples=options.bootstrap_samples,
            seed=options.seed,
            allow_bad_references=options.allow_bad_references,
        )
        as_json = json.dumps(report, ensure_ascii=False, allow_nan=False, indent=2)
        if options.output is not None:
            _write_file(options.output, as_json + "\n")
        if options.steps is not None:
            lines = [json.dumps(score.to_json(), ensure_ascii=False, allow_nan=False) + "\n" for score in scores]
            _write_file(options.steps, "".join(lines))
    except EvaluationError as error:
        file, message = str(options.file), str(error)
        sys.stderr.write(f"{message}\n" if message.startswith(file) else f"{file}: {message}\n")
        return 1
    encoding = sys.stdout.encoding or "utf-8"
    shown = as_json if options.json else format_report(report)
    sys.stdout.write(shown.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    return 0


def read_records(path: Path) -> list[StepRecord]:
    """Read a predictions file, `-` for standard input; lines end with a line feed, blank ones are passed over.

    Raises:
        EvaluationError: `file:line: ...` for a broken line, a missing field, a wrong type or a step that stands twice;
            the file is empty or cannot be read.
    """
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise EvaluationError(f"{path}: {error.strerror or error}") from None
    records: list[StepRecord] = []
    first_lines: dict[tuple[str, int], int] = {}
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = _read_record(line)
        except EvaluationError as error:
            raise EvaluationError(f"{path}:{number}: {error}") from None
        key = (record.conversation_id, record.step)
        if key in first_lines:
            raise EvaluationError(
                f"{path}:{number}: conversation {key[0]!r} step {key[1]} stands in line {first_lines[key]} already; "
                "every step is scored once"
            )
        first_lines[key] = number
        records.append(record)
    if not records:
        raise EvaluationError(f"{path}:1: the file holds no step; expected one JSON object a line")
    return _read_in_other_marks(records)


def _holes(records: Iterable[StepRecord]) -> str:
    """Name steps that are missing between two of a conversation; empty where there are none."""
    steps: dict[str, set[int]] = {}
    for record in records:
        steps.setdefault(record.conversation_id, set()).add(record.step)
    missing = {name: min(set(range(min(own), max(own))) - own, default=None) for name, own in steps.items()}
    holes = [f"{name!r} has no step {step}" for name, step in missing.items() if step is not None]
    return f"{len(holes)} conversations with holes: {', '.join(holes[:3])}" if holes else ""


def _read_in_other_marks(records: list[StepRecord]) -> list[StepRecord]:
    """Read each text that calls in the marks of another family than MSAgent's.

    The family of most references reads the texts without a call too, as it does where nothing marks its calls (Llama 3).
    """
    expected = [None if THINK_OPEN in r.reference else read_by_marks(without_end(r.reference)) for r in records]
    names = Counter(read[0].name for read in expected if read is not None and read[0] is not None).most_common(1)
    if not names and not any(THINK_OPEN in record.reference for record in records):
        texts = [without_end(record.reference) for record in records]
        names = [(each.name, 1) for each in our_templates() if any(each.read(text).calls for text in texts)][:1]
    family = next((each for each in our_templates() if names and each.name == names[0][0]), None)
    return [_in_family(record, read and read[1], family) for record, read in zip(records, expected, strict=True)]


def _in_family(record: StepRecord, expected: Said | None, family: ResponseTemplate | None) -> StepRecord:
    """Return a record with what is read of its texts; what is MSAgent text is left to `parse_reply`.

    Args:
        expected: The reference, where a call begins in it.
    """
    if expected is None and family is not None and THINK_OPEN not in record.reference:
        expected = family.read(without_end(record.reference))
    said = None if THINK_OPEN in record.prediction else _read_prediction(record, expected, family)
    return replace(
        record,
        reference_reply=None if expected is None else with_msagent_calls(expected),
        prediction_reply=None if said is None else with_msagent_calls(said),
    )


def _read_prediction(record: StepRecord, expected: Said | None, family: ResponseTemplate | None) -> Said | None:
    text = without_end(record.prediction)
    template, said = family, family.read(text) if family is not None else None
    if said is None or not said.attempts:
        template, said = read_by_marks(text) or (template, said)
    if template is None:
        return said
    # What is written without quotes has the types that the reference has.
    calls = expected.calls if expected is not None else parse_reply(record.reference).calls
    return template.read(text, types=parameter_types((), calls))


def format_report(report: Mapping[str, Any]) -> str:
    """Return a report as a table to read in a terminal."""
    found = report["metrics"]
    lines = [report["signature"], "", f"{'metric':<24}{'value':>8}   {'95 % interval':<18}{'count':>16}"]
    for name, definition in METRICS_BY_NAME.items():
        if name in found and not definition.quarantined_too:
            lines.append(_metric_line(name, found[name]) + f"   {definition.meaning}")
    paper = "   ".join(f"{name} {_percent(value)}" for name, value in report["paper"].items())
    lines += ["", f"names of arXiv 2309.00986, in percent: {paper}"]
    lines += ["", "the old script, bugs and all:"]
    for name, old in report["legacy"].items():
        lines.append(_metric_line(name, found[name]) + (f"   raised {old['raised']}" if old["raised"] else ""))
    lines += ["", "reference -> prediction   call   no call"]
    for row, cells in report["plan_table"].items():
        lines.append(f"{row:<24}{cells['call']:>6}{cells['no_call']:>10}")
    for kind, groups in report["breakdowns"].items():
        for group, metrics in groups.items():
            shown = "   ".join(f"{n} {_percent(metrics[n]['value'])}" for n in ("tool_acc", "arg_f1", "rouge_l"))
            lines.append(f"{kind} {group}: {shown}   {metrics['plan_acc']['conversations']} conversations")
    lines += ["", "tools taken for others (reference -> prediction):"] if report["confusion"] else []
    for pair in report["confusion"][:10]:
        lines.append(f"{pair['calls']:>6}  {pair['reference'] or '-'} -> {pair['predicted'] or '-'}")
    lines += ["", *(f"{name}: {count}" for name, count in report["counts"].items())]
    lines += [f"left out: {e['conversation_id']!r} step {e['step']}: {e['reason']}" for e in report["quarantined"]]
    if any(metric["indicative"] for metric in found.values()):
        lines += ["", "~ fewer than 100 conversations: the interval is indicative"]
    return "\n".join(lines)


def _metric_line(name: str, metric: Mapping[str, Any]) -> str:
    interval = "-" if metric["low"] is None else f"{metric['low']:.4f} to {metric['high']:.4f}"
    value = "null" if metric["value"] is None else f"{metric['value']:.4f}"
    mark = "~" if metric["indicative"] and metric["value"] is not None else " "
    count = f"{metric['numerator']:g} / {metric['denominator']:g}"
    return f"{name:<24}{value:>8} {mark} {interval:<18}{count:>16}"


def _percent(value: float | None) -> str:
    return "null" if value is None else f"{100 * value:.2f}"


def _read_record(line: bytes) -> StepRecord:
    value = _read_object(line)
    if type(value.get("conversation_id")) is int:
        value["conversation_id"] = str(value["conversation_id"])
    fields: dict[str, Any] = {}
    for name, (kind, words) in {**_NEEDED, **_OPTIONAL}.items():
        fields[name] = found = value.get(name)
        if name in _OPTIONAL and found is None:
            continue
        if name not in value:
            raise EvaluationError(f"field {name!r} is missing")
        if (
            not isinstance(found, kind)
            or (kind is int and isinstance(found, bool))
            or (name == "step" and value[name] < 0)
        ):
            raise EvaluationError(f"field {name!r} is {_shown(found)}; expected {words}")
    offered = value.get("offered")
    if offered is not None and not isinstance(offered, list):
        raise EvaluationError(f"field 'offered' is {_shown(offered)}; expected a list of tool names or objects")
    return StepRecord(**fields, offered=None if offered is None else by_name(map(_read_tool, offered)))


def _read_tool(item: object) -> tuple[str, tuple[str, ...] | None]:
    tool = read_offered_tool(item)
    if tool is None:
        raise EvaluationError(f"field 'offered' holds {_shown(item)}; expected a tool name or an object with 'name'")
    return tool


def _read_object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise EvaluationError(f"not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise EvaluationError(f"found {_shown(value)}; expected a JSON object")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def _write_file(path: Path, text: str) -> None:
    try:
        # A lone surrogate cannot be encoded; backslashreplace writes it as the JSON escape that it came from.
        path.write_bytes(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise EvaluationError(f"{path}: {error.strerror or error}") from None


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m agentft.score", description="Score a file of agent predictions.")
    parser.add_argument(
        "file",
        type=Path,
        help="JSON lines: conversation_id, step, reference, prediction[, offered]; - reads standard input",
    )
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON instead of a table")
    parser.add_argument("--output", type=Path, help="also write the report as JSON to this file")
    parser.add_argument("--steps", type=Path, help="also write the counts of every step, one JSON object a line")
    parser.add_argument(
        "--bootstrap-samples", "--draws", type=_positive, default=10_000, help="bootstrap draws (default: 10000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: 0)")
    parser.add_argument(
        "--allow-bad-references", action="store_true", help="leave out and count steps whose reference cannot be read"
    )
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
