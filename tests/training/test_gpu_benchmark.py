"""The benchmark of `make gpu` runs from end to end at a tiny shape, on any device."""

from __future__ import annotations

import importlib.util

import pytest
import torch


@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_measures_both_loops_at_a_tiny_shape(root, method, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_benchmark", root / "benchmarks" / "gpu.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(benchmark, "MAX_LENGTH", 128)
    device = torch.device("cpu")
    plain, ours = (benchmark.measure("tiny", method, variant, device, steps=1) for variant in ("plain", "agentft"))
    for found in (plain, ours):
        assert found["labelled"] < found["tokens"]
        assert found["flops"] > 0
        assert 5 < found["loss"] < 8, "random weights know nothing: about log 512 = 6.2"
    assert benchmark.matrix_rate(device) > 1e8
