"""What two ranks of every engine do here, and how far their numbers are from one process; how fast a job dies.

    python benchmarks/distributed.py [--engines ddp,fsdp,...]

Per engine and method (LoRA, full), a tiny Llama in fp32 over gloo on the CPU, 4 steps of 5 conversations (an odd number, so
that one rank has an empty micro-batch): the largest relative difference from one process of the losses in training, of the
losses after going on from step 2 of a checkpoint of one process, of each held-out loss, the share of equal answers, and of
the tensors that are exported. Then, from ranks that fail on purpose, seconds from a rank's death to the end of the job.
Last, Wall seconds of a run of one step on two ranks and on one process, in turn, twice each: launch overhead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LAWS = ROOT / "tests" / "distributed" / "laws.py"
FAILING = ROOT / "tests" / "distributed" / "failing.py"
ENGINES = (
    *("ddp", "fsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"),
    *("deepspeed_zero2_offload", "deepspeed_zero3_offload"),
)
METHODS = ("lora", "full")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

ONE = """
import json, sys
sys.path.insert(0, {folder!r})
import laws, torch
from agentft.runtime import ALONE
torch.set_num_threads(1)
print(json.dumps([laws.run(task, ALONE) for task in json.load(open({tasks!r}))]))
"""


def compare(engines: list[str], folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Train everything and return the cells of the table."""
    alone = [
        {"option": "single", "method": method, "folder": str(folder / f"single-{method}"), "examine": True}
        for method in METHODS
    ]
    (folder / "alone.json").write_text(json.dumps(alone))
    code = ONE.format(folder=str(LAWS.parent), tasks=str(folder / "alone.json"))
    one = dict(zip(METHODS, json.loads(_run([sys.executable, "-c", code]).splitlines()[-1]), strict=True))
    tasks = []
    for engine in engines:
        for method in METHODS:
            here = {"option": engine, "method": method}
            tasks.append(here | {"folder": str(folder / f"{engine}-{method}"), "examine": True})
            start = str(folder / f"single-{method}" / "step-000002")
            tasks.append(here | {"folder": str(folder / f"{engine}-{method}-resumed"), "start": start})
    (folder / "tasks.json").write_text(json.dumps(tasks))
    _run([sys.executable, str(LAWS), str(folder / "tasks.json"), str(folder / "results.json")])
    found = json.loads((folder / "results.json").read_text())
    cells = {}
    for number, task in enumerate(tasks[::2]):
        trained, resumed = found[2 * number], found[2 * number + 1]
        expected = one[task["method"]]
        answers = zip(trained["before"]["answers"], expected["before"]["answers"], strict=True)
        cells[task["option"], task["method"]] = {
            "train": _largest(_losses(trained), _losses(expected)),
            "resume": _largest(_losses(resumed), _losses(expected)[2:]),
            "evaluate": _largest(trained["after"]["nats"], expected["after"]["nats"]),
            "generate": f"{sum(a == b for a, b in answers)} of {len(expected['before']['answers'])} equal",
            "export": _largest_tensor(
                folder / f"{task['option']}-{task['method']}", folder / f"single-{task['method']}"
            ),
        }
    return cells


def _losses(result: dict[str, Any]) -> list[float]:
    return [loss for _, loss, _ in result["losses"]]


def _largest(found: list[float], expected: list[float]) -> str:
    return f"{max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)):.0e}"


def _largest_tensor(found: Path, expected: Path) -> str:
    """Largest difference of the trained tensors after the last step, over the largest value of each."""
    from safetensors.torch import load_file

    here, there = (load_file(path / "step-000004" / "trained.safetensors") for path in (found, expected))
    assert here.keys() == there.keys()
    return f"{max(float((here[n] - there[n]).abs().max() / there[n].abs().max()) for n in there):.0e}"


def deaths(folder: Path) -> dict[str, Any]:
    """Return for each way of failing the seconds from the death of a rank to the error in the program."""
    return json.loads(_run([sys.executable, str(FAILING), str(folder)]).splitlines()[-1])


def overhead() -> dict[str, list[float]]:
    """Wall seconds of a run of one step, alone and on two ranks, in turn."""
    found: dict[str, list[float]] = {"single": [], "ddp": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(2):
            for name, more in (("single", []), ("ddp", ["distributed.nproc=2"])):
                command = [sys.executable, "train.py", "model=tiny", "dataset.conversations=8", "dataset.heldout=2"]
                command += ["training.max_steps=1", "evaluation.before=false", "evaluation.after=false", "threads=1"]
                command += [
                    "evaluation.eval_steps=0",
                    "tracking=disabled",
                    f"distributed={name}",
                    f"run_dir={folder}/{name}{turn}",
                ]
                started = time.perf_counter()
                _run(command + more)
                found[name].append(round(time.perf_counter() - started, 1))
    return found


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=ENVIRONMENT)
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stderr[-3000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--skip-overhead", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cells = compare(given.engines.split(","), folder)
        columns = ("train", "resume", "evaluate", "generate", "export")
        print("| engine | method |", " | ".join(columns), "|")
        print("|---" * (len(columns) + 2) + "|")
        for (engine, method), row in cells.items():
            print(f"| {engine} | {method} |", " | ".join(row[column] for column in columns), "|", flush=True)
        for case, found in deaths(folder).items():
            print(f"{case}: {found.get('kind', found.get('result'))}, {found.get('seconds', 0):.1f} s", flush=True)
    if not given.skip_overhead:
        print("Wall seconds of a run of one step, twice each:", overhead())


if __name__ == "__main__":
    main()
