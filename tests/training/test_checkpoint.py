"""A checkpoint is whole or refused."""

from __future__ import annotations

import random

import pytest
import torch

from agentft.errors import CheckpointError
from agentft.training.checkpoint import (
    find_damage,
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    prune_checkpoints,
    save_checkpoint,
    stream_of,
)


def _save(root, step):
    tensors = {"trained": {"w": torch.arange(12.0) + step}, "random": {"cpu": torch.get_rng_state()}}
    streams = {name: stream_of(group) for name, group in tensors.items()}
    return save_checkpoint(root, step, streams, {"counters": {"step": step}})


def test_what_is_saved_comes_back(tmp_path):
    checkpoint = load_checkpoint(_save(tmp_path, 3))
    assert checkpoint.step == 3
    assert torch.equal(checkpoint.tensors["trained"]["w"], torch.arange(12.0) + 3)
    assert checkpoint.state["counters"] == {"step": 3}


def test_every_flipped_bit_is_found(tmp_path):
    path = _save(tmp_path, 1)
    rng = random.Random(0)
    files = sorted(path.iterdir())
    for _ in range(60):
        file = rng.choice(files)
        content = file.read_bytes()
        position = rng.randrange(len(content))
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        file.write_bytes(bytes(damaged))
        assert find_damage(path) is not None, f"{file.name} byte {position}"
        file.write_bytes(content)
    assert find_damage(path) is None


@pytest.mark.parametrize("damage", ["truncate", "zero_tail", "delete", "extra", "swap"])
def test_damage_is_refused_by_name(tmp_path, damage):
    path = _save(tmp_path, 1)
    file = path / "trained.safetensors"
    content = file.read_bytes()
    match damage:
        case "truncate":
            file.write_bytes(content[:-1])
        case "zero_tail":
            file.write_bytes(content[:-8] + bytes(8))
        case "delete":
            file.unlink()
        case "extra":
            (path / "odd.txt").write_text("x")
        case "swap":
            other = path / "random.safetensors"
            file.write_bytes(other.read_bytes())
            other.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-000001"):
        load_checkpoint(path)


def test_a_damaged_newest_falls_back_by_one_and_says_so(tmp_path, caplog):
    _save(tmp_path, 1)
    newest = _save(tmp_path, 2)
    (newest / "state.json").write_text("{}")
    assert newest_whole(tmp_path) == tmp_path / "step-000001"
    assert "damaged" in caplog.text


def test_all_damaged_never_starts_from_scratch(tmp_path):
    (_save(tmp_path, 1) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
        newest_whole(tmp_path)


def test_newest_is_by_number_not_by_name_or_time(tmp_path):
    for step in (100, 9, 10):
        _save(tmp_path, step)
    assert [int(p.name.removeprefix("step-")) for p in list_checkpoints(tmp_path)] == [9, 10, 100]


def test_an_unfinished_save_is_no_checkpoint(tmp_path):
    _save(tmp_path, 1)
    (tmp_path / ".step-000002.123").mkdir()
    assert len(list_checkpoints(tmp_path)) == 1


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 6):
        _save(tmp_path, step)
    prune_checkpoints(tmp_path, keep=2, best_step=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000001", "step-000004", "step-000005"]


def test_a_full_disk_leaves_earlier_checkpoints_intact(tmp_path, monkeypatch):
    import agentft.training.checkpoint as module

    _save(tmp_path, 1)

    def refuse(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_sync", refuse)
    with pytest.raises(CheckpointError, match="No space left"):
        _save(tmp_path, 2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000001"]
    assert find_damage(tmp_path / "step-000001") is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001"]
