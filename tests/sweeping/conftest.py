"""A sweep folder with a small program: the launcher starts whatever program it was started from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]

PROGRAM = """
import json, os, resource, signal, subprocess, sys, time
from pathlib import Path
import hydra
from hydra.core.hydra_config import HydraConfig

sys.path.append(os.environ["PLUGINS"])


@hydra.main(version_base="1.3", config_path=None, config_name="stub")
def main(config):
    folder = Path(HydraConfig.get().runtime.output_dir)
    began = time.time()
    act = "ok" if config.act != "sleep" and Path("mended").exists() else config.act
    if act == "raise":
        raise ValueError("a broken thing")
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "exit":
        sys.exit(3)
    if act == "quiet_exit":
        (folder / "status.json").write_text(json.dumps({"state": "failed", "error": "SystemExit: 0"}))
        sys.exit(0)
    if act == "memory":
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
        bytearray(2**31)
    if act == "flaky" and not (folder / "tried").exists():
        (folder / "tried").touch()
        raise RuntimeError("the first time goes wrong")
    if act in ("sleep", "stubborn", "slow_save"):
        if act == "stubborn":
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "321"], start_new_session=act == "stubborn")
        (folder / "pids").write_text(f"{os.getpid()} {child.pid}")
        try:
            time.sleep(120)
        except KeyboardInterrupt:
            (folder / "asked").touch()
            while act == "slow_save" and not Path("go").exists():
                time.sleep(0.05)
            (folder / "saved").touch()
            raise
    print("node", os.environ.get("AGENTFT_NODE"), "of", os.environ.get("AGENTFT_NODES"), flush=True)
    time.sleep(config.seconds)
    seen = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "AGENTFT_SWEEP_DIR")}
    (folder / "seen.json").write_text(json.dumps({"text": config.text, "began": began, "ended": time.time(), **seen}))
    (folder / "status.json").write_text(json.dumps({"state": "finished", "objective": 0.25}))


main()
"""

STUB = """
defaults: [_self_, override hydra/launcher: agentft]
act: ok
text: ""
seconds: 0.0
threads: null
hydra:
  output_subdir: null
  job_logging: {root: null}
"""


class Sweep:
    """A folder with the small program, and what its launches leave there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "job.py").write_text(PROGRAM)
        (folder / "stub.yaml").write_text(STUB)
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"},
            "PLUGINS": str(REPOSITORY / "agentft" / "plugins"),
            "PYTHONPATH": str(REPOSITORY),
        }

    def command(self, *overrides: str, out: str = "out") -> list[str]:
        where = f"hydra.sweep.dir={out}"
        return [sys.executable, "job.py", "--config-dir", ".", "-m", where, *overrides]

    def launch(self, *overrides: str, out: str = "out", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*overrides, out=out),
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*overrides),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def jobs(self, out: str = "out") -> dict[int, dict[str, Any]]:
        records = [json.loads(path.read_text()) for path in (self.folder / out).glob("*/job.json")]
        return {record["number"]: record for record in records}

    def seen(self, out: str = "out") -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted((self.folder / out).glob("*/seen.json"))]


@pytest.fixture(autouse=True)
def _programs_hear_ctrl_c() -> Iterator[None]:
    """Programs would inherit that SIGINT is ignored, as it is where pytest was started in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)
