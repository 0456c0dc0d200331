"""A process that has imported everything and forks one training a time, so that a trial costs no imports.

Reads one JSON object a line: `settings` (overrides, composed on top of `BASE`), `run_dir`, `log`, `sabotage`. Answers with
the child's process id, and with its exit status when it has ended. Nothing here computes a gradient before the fork, and
torch has one thread: a forked child then computes what a fresh process computes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import sys
import traceback
from pathlib import Path

# Libraries print when they are imported; what is said to the harness goes through a pipe of its own.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))
torch.set_num_threads(1)

import sabotage  # noqa: E402
from zygote_settings import BASE  # noqa: E402

from agentft.config import compose, to_train_config  # noqa: E402
from agentft.errors import AgentftError  # noqa: E402
from agentft.recipes.config import TrainConfig  # noqa: E402
from agentft.recipes.train import load_for_training, train  # noqa: E402
from agentft.runtime import ALONE  # noqa: E402


@functools.cache
def composed(settings: tuple[str, ...]) -> TrainConfig:
    """Compose `BASE` and `settings`; Hydra takes longer than a small training step."""
    given = {setting.partition("=")[0] for setting in settings}
    kept = [setting for setting in BASE if setting.partition("=")[0] not in given]
    if any(setting == "sft_type=full" for setting in settings):
        kept.remove("sft_type.dropout=0.1")
    return to_train_config(compose("train", [*kept, *settings]))


def run_child(request: dict) -> int:
    """Train as the entry point does and return the exit code that it would give."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    if request.get("cwd"):
        os.chdir(request["cwd"])
    os.environ.update(request.get("environment", {}))
    sabotage.apply(request.get("sabotage", []))
    try:
        train(dataclasses.replace(composed(tuple(request.get("settings", []))), run_dir=request["run_dir"]))
    except AgentftError as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    except KeyboardInterrupt as error:
        print(error)
        return getattr(error, "exit_code", 130)
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def main() -> None:
    # A shell's background job is born deaf to these.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    warm = composed(())
    load_for_training(warm, ALONE)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        composed(tuple(request.get("settings", [])))
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = run_child(request)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(json.dumps({"pid": pid}), file=answers, flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
