"""Liger's own kernels on a CPU in Triton's interpreter, whole models against float64: run by test_liger.py."""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from agentft.model.fused import load_liger


def _scalars_as_on_a_gpu() -> None:
    """A GPU has numbers given to a kernel as fp32 scalars; the interpreter leaves Python's as they are."""
    stock = interpreter._implicit_cvt

    def convert(argument):
        if isinstance(argument, float):
            held = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(held, tl.float32)
        return stock(argument)

    interpreter._implicit_cvt = convert


def kernels():
    _scalars_as_on_a_gpu()
    found = load_liger()
    assert found is not None
    # CUDA's own library of functions is not there for the interpreter.
    sys.modules["liger_kernel.ops.rms_norm"].rsqrt = lambda x: 1.0 / tl.sqrt(x)
    return found


if __name__ == "__main__":
    from test_liger import FAMILIES, check_model

    torch.set_num_threads(1)
    real = kernels()
    for family in FAMILIES:
        for trained in (False, True):
            check_model(family, real, trained=trained)
    print("checked", len(FAMILIES))
