"""Twenty losses of a tiny model, LoRA and full, bit for bit as they were when the golden file was written.

A change here is a change of the mathematics, of the data or of the order of operations; the commit that updates the file
says which.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PORTABLE = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
}
"""Kernels that every x86-64 has, so that the last bits do not depend on the machine."""


def test_losses_equal_the_golden_file_bit_for_bit(root: Path, update_golden: bool):
    import torch

    version = torch.__version__.split("+")[0]
    golden = root / "tests" / "golden" / "losses" / f"torch-{version}_1-thread.json"
    if not golden.exists() and not update_golden:
        pytest.skip(f"no golden losses for torch {version}: write them with pytest --update-golden")
    script = root / "tests" / "training" / "golden_run.py"
    environment = os.environ | PORTABLE | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False, cwd=root
    )
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    if update_golden:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(json.dumps(measured, indent=1) + "\n")
    expected = json.loads(golden.read_text())
    for sft_type, losses in expected.items():
        assert len(losses) == 20
        pairs = enumerate(zip(measured[sft_type], losses, strict=True), start=1)
        different = [(step, float.fromhex(a), float.fromhex(b)) for step, (a, b) in pairs if a != b]
        assert not different, f"{sft_type}: first difference (step, now, golden): {different[0]}"
