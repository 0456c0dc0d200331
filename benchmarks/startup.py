"""How long a command takes before it works: composing, and from the command to the first update of the weights.

    python benchmarks/startup.py                 # composing: `python train.py --cfg job`, against an empty `import hydra`
    python benchmarks/startup.py --first-step    # CPU seconds until the optimiser's first step has ended; half a minute of CPU

Composing is timed in turn with its reference; medians and their ratios are printed. The first step is that of a model of
two small blocks with random weights on synthetic conversations, so that it shows what comes before a step; the process
ends there. CPU seconds count user and system time of the process and of those it waited for, since wall time depends on
what else the machine does; packages are listed by the seconds that Python itself reports for their modules, which are wall
time. Both are with a warm file cache: the first round is not counted.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "train.py --cfg job": [sys.executable, "train.py", "--cfg", "job"],
    "train.py --help": [sys.executable, "train.py", "--help"],
    "train.py sft_type.rnak=4 (refused)": [sys.executable, "train.py", "sft_type.rnak=4"],
    "import hydra": [sys.executable, "-c", "import hydra"],
}
JOB = (
    "model=tiny", "dataset.conversations=40", "evaluation.before=false", "evaluation.after=false",
    "evaluation.eval_steps=0", "tracking=disabled", "threads=1",
)  # fmt: skip
REFERENCES = {
    "import torch": "import torch",
    "import torch, transformers' Llama, peft": (
        "import torch; from transformers import LlamaForCausalLM, AutoTokenizer; from peft import get_peft_model"
    ),
}

_SPENT = """
def spent(*_):
    import os, resource
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(sum(u.ru_utime + u.ru_stime for u in used), flush=True)
    os._exit(0)
"""
_FIRST_STEP = """
import runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(spent)
sys.argv = ["train.py", *sys.argv[1:]]
sys.path.insert(0, "")
runpy.run_path("train.py", run_name="__main__")
"""


_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""With compiled modules kept: without them every round would compile the project's own again."""
_IMPORTED = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, capture_output=True, check=False, env=_ENVIRONMENT)
    return time.perf_counter() - started


def _run(code: str, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", _SPENT + code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=_ENVIRONMENT)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return done


def _cpu_seconds(code: str, *arguments: str) -> float:
    return float(_run(code, *arguments).stdout.split()[-1])


def composing(rounds: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            times[name].append(_seconds(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:<42} {median:.2f} s   {median / medians['import hydra']:.1f} x import hydra")


def first_step(rounds: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in ("command to first step", *REFERENCES)}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            spent = [_cpu_seconds(_FIRST_STEP, *JOB, f"run_dir={folder}/run{number}")]
            if number:
                spent += [_cpu_seconds(f"{code}\nspent()") for code in REFERENCES.values()]
                for values, seconds in zip(times.values(), spent, strict=True):
                    values.append(seconds)
        for name, values in times.items():
            print(f"{name:<42} {statistics.median(values):.2f} CPU-s   (lowest {min(values):.2f})", flush=True)
        done = _run(_FIRST_STEP, *JOB, f"run_dir={folder}/imports", options=("-X", "importtime"))
    print_imports(done.stderr)


def print_imports(said: str, shown: int = 12) -> None:
    """Print the packages that take longest to import, with their modules' own time, of what `-X importtime` said."""
    seconds: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    for microseconds, module in _IMPORTED.findall(said):
        package = ".".join(module.split(".")[:2])
        seconds[package] += int(microseconds) / 1e6
        modules[package] += 1
    print(f"imports: {sum(seconds.values()):.2f} s of wall time for {sum(modules.values())} modules")
    for package, spent in seconds.most_common(shown):
        print(f"  {package:<40} {spent:.2f} s   {modules[package]} modules")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first-step", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    (first_step if arguments.first_step else composing)(arguments.rounds)


if __name__ == "__main__":
    main()
