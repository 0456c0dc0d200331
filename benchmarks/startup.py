"""How long composing takes before anything is loaded: `python train.py --cfg job`, against an empty `import hydra`.

    python benchmarks/startup.py

Both are timed in turn; the median of each and their ratio are printed.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "train.py --cfg job": [sys.executable, "train.py", "--cfg", "job"],
    "train.py --help": [sys.executable, "train.py", "--help"],
    "train.py sft_type.rnak=4 (refused)": [sys.executable, "train.py", "sft_type.rnak=4"],
    "import hydra": [sys.executable, "-c", "import hydra"],
}


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    return time.perf_counter() - started


def main(rounds: int = 7) -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            times[name].append(_seconds(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:<36} {median:.2f} s   {median / medians['import hydra']:.1f} x import hydra")


if __name__ == "__main__":
    main()
