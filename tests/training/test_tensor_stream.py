"""A stream of tensors becomes an ordinary safetensors file, one tensor at a time."""

from __future__ import annotations

import weakref

import pytest
import torch
from safetensors.torch import load_file

from agentft.training.checkpoint import TensorSpec, TensorStream, stream_of, write_stream


def test_any_reader_of_safetensors_reads_it(tmp_path):
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(5, 7).bfloat16(),
        "sliced": torch.randn(8, 6)[::2, 1:4],
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        "wide": torch.randn(2, 3, dtype=torch.float64),
        "名": torch.tensor([True, False]),
    }
    write_stream(stream_of(tensors), tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_only_one_tensor_is_alive_at_a_time(tmp_path):
    made: list[weakref.ref] = []

    def make(name):
        # By reference counts alone, without the collector: at most the one before, still named by the loop.
        assert sum(each() is not None for each in made) <= 1
        tensor = torch.full((100,), float(name))
        made.append(weakref.ref(tensor))
        return tensor

    kinds = {str(n): TensorSpec(torch.float32, (100,)) for n in range(10)}
    write_stream(TensorStream(kinds, make), tmp_path / "x.safetensors")
    assert len(made) == 10


def test_a_tensor_other_than_announced_is_refused(tmp_path):
    stream = TensorStream({"w": TensorSpec(torch.float32, (4,))}, lambda _: torch.zeros(5))
    with pytest.raises(ValueError, match="announced"):
        write_stream(stream, tmp_path / "x.safetensors")
