"""Make a page of predictions to read: `python -m agentft.read FILE.jsonl`, or a run folder.

Wrong answers come first, with filters by kind of error. The page lies beside the file and needs no network.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentft.comparison.predictions_page import predictions_page
from agentft.comparison.runs import AFTER, predictions_file
from agentft.errors import AgentftError
from agentft.evaluation.metrics import score_records
from agentft.progress import outlive_console
from agentft.runs import RunFolder
from agentft.score import read_records


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    outlive_console()
    options = _parse_options(arguments)
    try:
        file = predictions_file(options.path, options.answers)
        page = options.output or file.with_suffix(".html")
        RunFolder(page.absolute().parent).write_text(page.absolute(), predictions_page(scored_rows(file), _title(file)))
    except AgentftError as error:
        sys.stderr.write(f"read: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"read: {error.filename}: {error.strerror}\n")
        return 1
    sys.stdout.write(f"{page}\n")
    return 0


def scored_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of predictions, scored by this version of agentft whatever scores they hold.

    Raises:
        EvaluationError: the file cannot be scored.
    """
    scores = score_records(read_records(file))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    return [row | {"scores": score.to_json()} for row, score in zip(rows, scores, strict=True)]


def _title(file: Path) -> str:
    folder = file.absolute().parent
    return f"{folder.parent.name}: {file.stem}" if folder.name == "predictions" else file.stem


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m agentft.read", description="Make a page of predictions to read.")
    parser.add_argument("path", type=Path, help="a file of predictions (see agentft.score), or a run folder")
    parser.add_argument("--answers", default=AFTER, metavar="NAME", help="of a run: predictions/NAME.jsonl")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page (default: beside the file, .html)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
