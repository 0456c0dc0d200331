"""Random streams come back as they were captured, also where the machine has other GPUs."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from agentft.training.random_state import capture, restore


def draws() -> list[float]:
    return [random.random(), float(np.random.normal()), float(torch.rand(())), float(np.random.normal())]


def test_what_is_drawn_after_a_restore_is_what_was_drawn_before() -> None:
    np.random.normal()  # one of a pair: the other waits in the state
    tensors, plain = capture()
    first = draws()
    assert draws() != first
    restore(tensors, plain)
    assert draws() == first


def test_a_checkpoint_of_more_gpus_than_are_here_is_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, plain = capture()
    states = {f"cuda.{index}": torch.full((16,), index, dtype=torch.uint8) for index in range(3)}
    set_to: dict[int, torch.Tensor] = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, index: set_to.__setitem__(index, state))
    restore(tensors | states, plain)
    assert set_to == {0: states["cuda.0"], 1: states["cuda.1"]}
