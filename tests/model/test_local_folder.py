"""A model from a folder: what `model=auto` finds, and what it refuses before anything is loaded."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agentft.errors import ModelError
from agentft.model.config import ModelConfig, ModelSource, RandomShape
from agentft.model.load import load_model, load_tokenizer
from agentft.model.sources import locate_model, random_folder
from agentft.runtime import Device
from tests.data.chat_families import mistral_file
from tests.model.test_conversion_baichuan import sentencepiece_file

CPU = Device("cpu", "CPU", 1)


def auto(folder: Path, **changes: bool) -> ModelConfig:
    return ModelConfig(name="auto", source=ModelSource.local, id=str(folder), **changes)


def loaded(config: ModelConfig) -> torch.Tensor:
    model = load_model(locate_model(config), config, device=CPU, dtype=torch.float32, attention="sdpa")
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([[1, 2, 3]])).logits
    return logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    random_folder(RandomShape(), 128, tmp_path / "model")
    return tmp_path / "model"


def test_any_folder_loads_by_its_path(folder: Path) -> None:
    assert load_tokenizer(locate_model(auto(folder)), auto(folder)).eos_token == "<|im_end|>"
    assert loaded(auto(folder)).shape[:2] == (1, 3)


def test_pickles_load_with_the_flag_and_give_the_same(folder: Path) -> None:
    expected = loaded(auto(folder))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="model.allow_pickle=true"):
        locate_model(auto(folder))
    assert torch.equal(loaded(auto(folder, allow_pickle=True)), expected)


def test_a_folder_without_weights_or_settings_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights; expected model.safetensors"):
        locate_model(auto(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"expected a folder with config.json"):
        locate_model(auto(folder))


@pytest.mark.parametrize("source", [ModelSource.modelscope, ModelSource.huggingface])
def test_an_id_that_is_missing_is_asked_for(source: ModelSource) -> None:
    with pytest.raises(ModelError, match=r"needs model.id or model.\w+_id"):
        locate_model(ModelConfig(name="auto", source=source))


@pytest.mark.parametrize("own", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["any", "mistrals_own"])
def test_a_repository_with_tekken_alone_is_refused_in_a_line(own: bool, folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tekken.json")
    if own:
        shutil.copy(mistral_file("mistral_tekken"), folder / "tekken.json")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=r"tekken\.json is the only tokenizer there.*has a tokenizer\.json") as caught:
        load_tokenizer(locate_model(auto(folder)), auto(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="with sentencepiece the file is read")
def test_a_tokenizer_that_needs_sentencepiece_says_what_to_install(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    sentencepiece_file(folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}', encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokenizer\.model needs a package.*: pip install sentencepiece$"):
        load_tokenizer(locate_model(auto(folder)), auto(folder))
