"""What a first step needs is imported, and nothing else; what was put off is there afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from agentft.training.optim import AdamW


def _succeeds(root, code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-1500:]


def test_the_model_libraries_come_without_scipy_bitsandbytes_and_torchs_compiler(root):
    _succeeds(
        root,
        """
import sys, torch.compiler
stock = torch.compiler.disable
from agentft.model import light_imports
from agentft.model.light_imports import import_model_libraries, tell_the_compiler
import_model_libraries()
unwanted = ("scipy", "torch._dynamo", "torch._inductor", "bitsandbytes", "modelscope", "wandb", "datasets", "pyarrow")
heavy = [name for name in unwanted if name in sys.modules]
assert not heavy, heavy
assert torch.compiler.disable is stock
from transformers.utils import is_scipy_available
import transformers.modeling_utils, peft
import_model_libraries()
import scipy
assert is_scipy_available()

from torch._dynamo.trace_rules import is_callable_allowed
marked = [fn for name, fn in light_imports._TOLD if name == "allow_in_graph"]
assert marked and not any(is_callable_allowed(fn) for fn in marked)
tell_the_compiler()
assert all(is_callable_allowed(fn) for fn in marked)
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
import transformers.masking_utils
assert transformers.masking_utils.TransformGetItemToIndex is TransformGetItemToIndex
""",
    )


def test_a_first_step_loads_no_compiler(root, tmp_path):
    _succeeds(
        root,
        f"""
import sys
from torch.optim.optimizer import register_optimizer_step_post_hook
def look(*_):
    heavy = [name for name in ("torch._dynamo", "torch._inductor", "bitsandbytes", "scipy", "pandas") if name in sys.modules]
    assert not heavy, heavy
    raise SystemExit(0)
register_optimizer_step_post_hook(look)
sys.argv = ["train.py", "model=tiny", "dataset.conversations=24", "evaluation.before=false", "evaluation.steps=0",
            "tracking=disabled", "threads=1", "run_dir={tmp_path}/run"]
import runpy
sys.path.insert(0, "")
runpy.run_path("train.py", run_name="__main__")
sys.exit("no step was made")
""",
    )


def test_the_compiler_is_there_for_whoever_asks_while_it_is_put_off(root):
    _succeeds(
        root,
        """
import inspect, sys, torch
from agentft.model.light_imports import compiler_put_off
with compiler_put_off():
    with torch.device("meta"):
        torch.nn.Embedding(3, 4)
    assert not hasattr(sys.modules["torch._dynamo"], "__file__")
    torch.compiler.disable(lambda: 1)
    assert type(sys.modules["torch._dynamo"]).__name__ == "_PutOff"
    import torch._dynamo.config
    assert type(sys.modules["torch._dynamo"]).__name__ != "_PutOff" and torch._dynamo.config.recompile_limit > 0
assert torch._dynamo is sys.modules["torch._dynamo"]
with compiler_put_off():
    assert torch._dynamo is sys.modules["torch._dynamo"] and hasattr(torch._dynamo, "__file__")
""",
    )


def test_peft_knows_bitsandbytes_once_it_is_loaded(root):
    pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")
    _succeeds(
        root,
        """
from agentft.model.light_imports import import_model_libraries
import_model_libraries()
import peft.import_utils, peft.tuners.lora.model as lora
assert not peft.import_utils.is_bnb_available() and not lora.is_bnb_4bit_available()
from agentft.model.quantization import import_bitsandbytes
import_bitsandbytes()
assert peft.import_utils.is_bnb_available() and lora.is_bnb_available() and lora.is_bnb_4bit_available()
from peft.tuners.lora import Linear4bit
""",
    )


def test_our_adamw_steps_as_torchs_does():
    def trained(kind):
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 3)
        optimizer = kind(layer.parameters(), lr=0.1, weight_decay=0.1, fused=True)
        for _ in range(3):
            layer(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        again = kind(layer.parameters(), lr=0.5)
        again.load_state_dict(optimizer.state_dict())
        assert layer.weight.grad is None
        assert layer.weight.requires_grad
        return layer.state_dict(), again.state_dict()

    ours, torchs = trained(AdamW), trained(torch.optim.AdamW)
    torch.testing.assert_close(ours, torchs, rtol=0, atol=0)
