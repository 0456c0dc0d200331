"""Count the files of agentft/ that a reader opens to follow one way through it, and the moves between them.

    python benchmarks/ways.py [--list]

Each way runs on the tiny model in a process of its own, with nothing cached. A file counts if a function that is written in it
is entered between two named calls; a move is an entry into another file than the entry before. Left out are import time,
templates of pages, and the methods that `dataclass` and `NamedTuple` generate. Files are comparable between machines and data;
moves grow with the conversations and, for the launcher, which looks after its jobs every so often, with their time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "agentft"

TINY = [
    *("model=tiny", "dataset.conversations=4", "dataset.heldout=1", "training.max_steps=1"),
    *("evaluation.eval_steps=0", "evaluation.before=false", "evaluation.max_new_tokens=8"),
    *("tracking=disabled", "threads=1"),
]


class Way(NamedTuple):
    """What is run, and the two calls between which it is followed; functions are named `file:name`."""

    run: Callable[[Path], object]
    start: str
    """Followed from its call on."""
    ends: str
    """Followed until this returns."""
    on_entry: bool = False
    """Until it is called, instead."""


def command_line(*overrides: str) -> None:
    from agentft.entry import train

    sys.argv = [str(ROOT / "train.py"), *overrides]
    train()


def train_in(folder: Path) -> None:
    command_line(*TINY, f"run_dir={folder}/run")


def labels_of_one_conversation(folder: Path) -> None:
    from agentft.data.config import LocalConfig
    from agentft.data.prepare import prepare_data
    from agentft.data.render import MsagentTemplate
    from agentft.data.tokens import SegmentEncoder
    from agentft.model.sources import byte_tokenizer

    train, heldout, *_ = (ROOT / "tests/golden/conversations.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "train.jsonl").write_text(train, encoding="utf-8")
    (folder / "heldout.jsonl").write_text(heldout, encoding="utf-8")
    config = LocalConfig(name="one", path=f"{folder}/train.jsonl", test_path=f"{folder}/heldout.jsonl")
    tokenizer = byte_tokenizer()
    data = prepare_data(config, MsagentTemplate(tokenizer.eos_token), SegmentEncoder(tokenizer))
    assert (data.train[0].labels >= 0).any()


def sweep_in(folder: Path) -> None:
    swept = ("sft_type.rank=2,4", "evaluation.after=false", f"hydra.sweep.dir={folder}/sweep", "hydra.launcher.slots=1")
    command_line("-m", *TINY, *swept)


RUN, LOOP = "recipes/train.py", "training/loop.py"
DATA = "data/prepare.py:prepare_data"
WAYS = {
    "command line -> `train(config)`": Way(train_in, "entry.py:train", f"{RUN}:train", on_entry=True),
    "one conversation, file -> labels": Way(labels_of_one_conversation, DATA, "data/tokens.py:Example.labels"),
    "one training step": Way(train_in, f"{LOOP}:_accumulate", f"{LOOP}:_count", on_entry=True),
    "one evaluation": Way(train_in, f"{RUN}:_evaluate", f"{RUN}:_evaluate"),
    "a sweep, the launcher alone": Way(sweep_in, "entry.py:train", "entry.py:train"),
}


def entries(way: Way, folder: Path) -> list[str]:
    """Return the file of every written function that is entered on a way, in order."""
    found: list[str] = []
    started = over = False
    importing: Counter[int] = Counter()

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal started, over
        code, thread = frame.f_code, threading.get_ident()
        if over or event not in ("call", "return"):
            return
        if code.co_name == "<module>":
            importing[thread] += 1 if event == "call" else -1
        elif code.co_filename.startswith(f"{PACKAGE}/") and code.co_filename.endswith(".py") and not importing[thread]:
            file = code.co_filename.removeprefix(f"{PACKAGE}/")
            name = f"{file}:{code.co_qualname}"
            started = started or name == way.start
            over = started and name == way.ends and (event == "call") == way.on_entry
            if started and not over and event == "call":
                found.append(file)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        way.run(folder)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert over, f"{way.start} -> {way.ends}: not called"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the files of each way")
    parser.add_argument("--way", choices=WAYS, help="follow one way here and print what is entered, as JSON")
    arguments = parser.parse_args()
    if arguments.way:
        sys.path.insert(0, str(ROOT))
        with tempfile.TemporaryDirectory() as folder:
            found = entries(WAYS[arguments.way], Path(folder))
        sys.__stdout__.write("\n" + json.dumps(found) + "\n")
        return
    print("| way | files | lines | moves |\n|---|---|---|---|")
    for title in WAYS:
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"AGENTFT_CACHE": cache, "AGENTFT_DATA_CACHE": f"{cache}/data"}
            command = [sys.executable, __file__, "--way", title]
            done = subprocess.run(command, env=environment, cwd=cache, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        files = list(dict.fromkeys(found))
        lines = sum(_lines(PACKAGE / file) for file in files)
        print(f"| {title} | {len(files)} | {lines:,} | {sum(a != b for a, b in pairwise(found)):,} |")
        if arguments.list:
            print(*files, sep="\n", end="\n\n")
    modules = list(PACKAGE.rglob("*.py"))
    written = [path for path in modules if path.name != "__init__.py"]
    print(f"\nagentft/: {len(written)} modules without `__init__`, {sum(map(_lines, modules)):,} lines of Python.")


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


if __name__ == "__main__":
    main()
