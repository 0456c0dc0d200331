"""What a first step imports."""

from __future__ import annotations

import os
import subprocess
import sys

FIRST_STEP = """
import runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
def look(*_):
    unwanted = ("modelscope", "wandb", "datasets", "pyarrow", "pandas", "kernels")
    assert not set(unwanted) & sys.modules.keys(), [name for name in unwanted if name in sys.modules]
    raise SystemExit(0)
register_optimizer_step_post_hook(look)
sys.path.insert(0, "")
runpy.run_path("train.py", run_name="__main__")
sys.exit("no step was made")
"""


def test_a_first_step_imports_no_tracker_no_hub_client_and_no_code_from_a_hub(root, tmp_path):
    (tmp_path / "kernels.py").write_text("raise SystemExit('code from a hub was asked for')")
    settings = (
        "model=tiny",
        "dataset.conversations=24",
        "evaluation.before=false",
        "evaluation.eval_steps=0",
        "threads=1",
    )
    done = subprocess.run(
        [sys.executable, "-c", FIRST_STEP, *settings, "tracking=disabled", f"run_dir={tmp_path}/run"],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert "pip install kernels" not in done.stderr  # advice of bitsandbytes
