"""What a first step needs is imported, and nothing else; what was put off is there afterwards."""

from __future__ import annotations

import subprocess
import sys


def test_the_model_libraries_come_without_scipy_and_torchs_compiler(root):
    code = """
import sys, torch.compiler
stock = torch.compiler.disable
from agentft.model.light_imports import import_model_libraries
import_model_libraries()
unwanted = ("scipy", "torch._inductor.compile_fx", "modelscope", "wandb", "datasets", "pyarrow")
heavy = [name for name in unwanted if name in sys.modules]
if "bitsandbytes" in sys.modules:  # brings the compiler along where it is installed
    heavy = [name for name in heavy if not name.startswith("torch.")]
assert not heavy, heavy
assert torch.compiler.disable is stock
from transformers.utils import is_scipy_available
import transformers.modeling_utils, peft
import_model_libraries()
import scipy
assert is_scipy_available()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-1500:]
