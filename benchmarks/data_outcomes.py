"""What becomes of genuine, of malformed and of mutated records, as tables in Markdown.

    python benchmarks/data_outcomes.py --formats                      # what becomes of the fields of every format
    python benchmarks/data_outcomes.py FOLDER --mutated 20000

FOLDER holds `train.jsonl` and `dev.jsonl` (genuine), `malformed.jsonl` (records with `group`, `defect` and `suggest`: load,
care or skip) and `malformed_files/` with its `manifest.json`. `care` means: loads, with a notice that a metric can heed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "data")]  # the latter for the records that the tests use

from agentft.data.conversation import Origin  # noqa: E402
from agentft.data.records import Rejection, read_record  # noqa: E402
from agentft.data.sources import (  # noqa: E402
    PreparationStats,
    read_conversations,
    read_local,
)
from agentft.errors import DataError  # noqa: E402

REPAIRS = {"missing_system", "empty_system", "id_missing", "id_number", "tool_entry_flawed"}
"""Notices about a harmless repair, which leaves a record as good as any."""


def outcome_of(record: dict[str, object]) -> tuple[str, str]:
    """`load`, `care` or `skip`, and the code that says why."""
    outcome = read_record(record, Origin("malformed.jsonl", 1))
    if isinstance(outcome, Rejection):
        return "skip", outcome.reason
    notices: list[str] = outcome[1]
    codes = sorted({code for code in notices if not code.startswith("column_not_used:")} - REPAIRS)
    return ("care", ", ".join(codes)) if codes else ("load", "")


def formats() -> None:
    """Print a row for each format: what becomes of its values, and of an unknown field in each of its objects."""
    from tests.data import format_records as of

    kinds = ("carried", "counted", "refused", "lost")
    rows = []
    for name, record in of.RECORDS.items():
        form = of.NAMED.get(name, of.Format.auto)
        cells = [str(name)]
        for outcomes in (of.outcomes_of_fields(record, form), of.outcomes_of_unknown_fields(record, form)):
            counts = Counter(outcomes.values())
            cells += [f"{counts[kind] / len(outcomes):.0%}" for kind in kinds]
        rows.append(tuple(cells))
    print_table(("format", *kinds, *(f"unknown: {kind}" for kind in kinds)), rows)


def malformed_records(path: Path) -> None:
    """Print a row for each group of defects."""
    groups: dict[str, Counter[str]] = {}
    differ: list[str] = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        record = json.loads(line)
        found, why = outcome_of(record)
        counts = groups.setdefault(record["group"], Counter())
        counts[found] += 1
        counts["records"] += 1
        counts["as suggested"] += found == record["suggest"]
        if found != record["suggest"]:
            differ.append(f"{record['defect']}: suggested {record['suggest']}, found {found} ({why})")
    columns = ("records", "load", "care", "skip", "as suggested")
    print_table(("group", *columns), [(name, *(str(counts[c]) for c in columns)) for name, counts in groups.items()])
    whole = sum(groups.values(), Counter())
    print_total("all", columns, whole)
    print("\n".join(f"- {line}" for line in differ))


def malformed_files(folder: Path) -> None:
    """Print a row for each file."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    rows = []
    for name, said in manifest.items():
        report = PreparationStats()
        try:
            list(read_conversations(read_local(folder / name, stats=report), stats=report))
        except DataError as error:
            words = str(error).removeprefix(f"{folder / name}: ")
            rows.append((name, str(said["readable_records"]), "0", f"refused: {words}"))
            continue
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(report.rejected.items()))
        rows.append((name, str(said["readable_records"]), str(report.kept), reasons))
    print_table(("file", "readable records", "conversations", "set aside"), rows)


def genuine(folder: Path) -> None:
    """Print how many genuine records become conversations."""
    rows = []
    for name in ("train.jsonl", "dev.jsonl"):
        report = PreparationStats()
        list(read_conversations(read_local(folder / name, stats=report), stats=report))
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(report.rejected.items()))
        rows.append((name, f"{report.rows:,}", f"{report.kept:,}", f"{report.kept / report.rows:.2%}", reasons or "–"))
    print_table(("genuine", "records", "conversations", "share", "set aside"), rows)


def mutated(count: int) -> None:
    """Mutate records and files as `tests/data/test_fuzz_records.py` does, from another seed; an exception ends this."""
    import tempfile

    import test_fuzz_records as fuzzing

    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        of_records = fuzzing.fuzz(count - count // 5, seed=101)
        of_lines = fuzzing.fuzz_bytes(count // 5, 102, Path(folder) / "mutated.jsonl")
    rows = [
        (name, f"{kept + dropped:,}", f"{kept:,}", f"{dropped:,}", "0")
        for name, (kept, dropped) in (("records", of_records), ("lines of files", of_lines))
    ]
    print_table(("mutated", "read", "conversations", "set aside", "exceptions"), rows)
    print(f"\n{time.process_time() - started:.0f} s of CPU")


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table in Markdown."""
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def print_total(name: str, columns: tuple[str, ...], counts: Counter[str]) -> None:
    """Print a last row."""
    print(f"| {name} | {' | '.join(str(counts[column]) for column in columns)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--formats", action="store_true", help="the table of formats")
    parser.add_argument("--mutated", type=int, default=0, help="mutated records to read as well")
    options = parser.parse_args()
    if options.formats:
        formats()
    if options.folder is None:
        return
    genuine(options.folder)
    malformed_records(options.folder / "malformed.jsonl")
    malformed_files(options.folder / "malformed_files")
    if options.mutated:
        mutated(options.mutated)


if __name__ == "__main__":
    main()
