"""Prints the table of the fault matrix from a ledger of `make faults`: `python tests/faults/table.py faults.jsonl`."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path


def main() -> int:
    """Print the table and say by the exit code whether everything passed."""
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    rows = defaultdict(list)
    for line in lines:
        rows[line["row"]].append(line)
    print("| row | trials | passed | kills (in a save) | s per trial | seeds |")
    print("|---|---|---|---|---|---|")
    for row, found in sorted(rows.items()):
        kills, inside = _sum(found, "kills"), _sum(found, "in_save")
        seeds = _ranges(sorted({line["seed"] for line in found if "seed" in line}))
        shown = f"{kills} ({inside})" if kills else ""
        seconds = sum(line["seconds"] for line in found) / len(found)
        passed = sum(line["passed"] for line in found)
        print(f"| {row} | {len(found)} | {passed} | {shown} | {seconds:.1f} | {seeds} |")
    print(f"\nKill points: {_sum(lines, 'kills')}, of them inside a save: {_sum(lines, 'in_save')}.")
    damage = [line for line in lines if "injected" in line]
    injected, detected, silent = (_sum(damage, name) for name in ("injected", "detected", "silent"))
    print(f"Corruption: {injected} injected, {detected} detected, {silent} silent.")
    saved = sorted(line["saved_after_seconds"] for line in lines if "saved_after_seconds" in line)
    if saved:
        middle, late = (saved[min(len(saved) - 1, int(share * len(saved)))] for share in (0.5, 0.95))
        print(f"Signal to saved: p50 {middle * 1000:.0f} ms, p95 {late * 1000:.0f} ms, {len(saved)} signals.")
    hostile = [line for line in lines if "executions" in line]
    print(f"Hostile inputs: {_sum(hostile, 'inputs')}, executions {_sum(hostile, 'executions')}:", end=" ")
    print(", ".join(f"{row} {_sum(found, 'inputs')}" for row, found in sorted(rows.items()) if row.startswith("X")))
    failed = [line["test"] for line in lines if not line["passed"]]
    print(f"Failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def _sum(lines: list[dict], name: str) -> int:
    return sum(int(line.get(name, 0)) for line in lines)


def _ranges(numbers: list[int]) -> str:
    """`0-24, 1000-1007`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in parts)


if __name__ == "__main__":
    sys.exit(main())
