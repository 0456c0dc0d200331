"""Compare runs: `python -m agentft.compare runs/<sweep>` prints what differs, what it scored, and what is best.

Any number of run folders, sweep folders or folders of these; finished or not. `--csv`, `--markdown` and `--html` write
the comparison into files. Two runs, or two files of predictions, are compared step by step and in words.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agentft.comparison.pairs import compare_pair, pair_table
from agentft.comparison.ranking import Ranking, csv_text, markdown, rank, rich_table
from agentft.comparison.runs import AFTER, predictions_file, read_runs
from agentft.errors import AgentftError, RunError
from agentft.progress import outlive_console
from agentft.runs import RunFolder, write_out

if TYPE_CHECKING:
    from rich.console import Console


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    outlive_console()
    options = _parse_options(arguments)
    try:
        paths = [Path(path) for path in options.paths]
        files = options.csv or options.markdown or options.html
        if len(paths) == 2 and all(map(_has_predictions, paths)) and not files:
            _show_pair(paths[0], paths[1], options.answers, as_json=options.json)
            return 0
        if options.json:
            raise RunError("--json is for two runs or two files of predictions")
        ranking = rank(read_runs(paths), options.sort)
        title = " ".join(Path(path).absolute().name for path in options.paths)
        if options.csv:
            write_out(Path(options.csv), csv_text(ranking))
        if options.markdown:
            write_out(Path(options.markdown), markdown(ranking, title))
        if options.html:
            from agentft.comparison.page import html_page

            write_out(Path(options.html), html_page(ranking, title))
        from rich.console import Console

        _show(ranking, Console())
    except AgentftError as error:
        sys.stderr.write(f"compare: {error}\n")
        return 1
    return 0


def write_sweep_tables(sweep: Path, console: Console | None = None, metric: str = "arg_f1") -> None:
    """Write `sweep.csv` and `sweep.md` into a sweep folder, and print the table if there is a console for it."""
    try:
        ranking = rank(read_runs([sweep]), metric)
    except RunError:
        return  # no job has left a trace
    folder = RunFolder(sweep)
    folder.write_text(Path("sweep.csv"), csv_text(ranking))
    folder.write_text(Path("sweep.md"), markdown(ranking, sweep.name))
    if console is not None:
        _show(ranking, console)


def _show(ranking: Ranking, console: Console) -> None:
    console = _wide(console)
    console.print(rich_table(ranking, console.width))


def _show_pair(a: Path, b: Path, name: str, *, as_json: bool) -> None:
    found = compare_pair(a, b, name)
    files = [str(predictions_file(path, name)) for path in (a, b)]
    if as_json:
        values = dict(zip("ab", files, strict=True)) | found.to_json()
        sys.stdout.write(json.dumps(values, ensure_ascii=False, allow_nan=False, indent=2) + "\n")
        return
    from rich.console import Console
    from rich.text import Text

    console = _wide(Console())
    console.print(Text("A  {}\nB  {}".format(*files)))
    console.print(pair_table(found))
    for sentence in found.words:
        console.print(Text(f"- {sentence}"))


def _has_predictions(path: Path) -> bool:
    """Return whether `path` is a file of predictions or a run folder that holds one."""
    return path.is_file() or (path / "predictions").is_dir()


def _wide(console: Console) -> Console:
    """Return a console of 160 columns where the output is no terminal that a table must fit into."""
    from rich.console import Console

    return console if console.is_terminal else Console(file=console.file, width=160)


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m agentft.compare", description="Compare runs: what differs, what it scored, what is best."
    )
    kinds = "run folder, sweep folder, or a folder of these; or two files of predictions"
    parser.add_argument("paths", nargs="+", metavar="PATH", help=kinds)
    parser.add_argument(
        "--answers", default=AFTER, metavar="NAME", help="of two runs: which answers, predictions/NAME.jsonl"
    )
    parser.add_argument("--json", action="store_true", help="of two runs: everything as JSON")
    parser.add_argument("--sort", default="arg_f1", metavar="METRIC", help="what decides (default: arg_f1)")
    parser.add_argument("--csv", metavar="FILE", help="write every number in full")
    parser.add_argument("--markdown", metavar="FILE", help="write the table as Markdown")
    parser.add_argument("--html", metavar="FILE", help="write a page with charts; it needs no network")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
