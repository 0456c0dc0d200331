"""Uploads by the hubs' own clients to servers on this machine: what arrives, as what, and what is said when it does not."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from agentft.errors import ConfigError, ModelError
from agentft.model.hub import parse_target, push_folder
from tests.model.loopback_uploads import Store, take_uploads

ENDPOINTS = {"modelscope": "MODELSCOPE_ENDPOINT", "huggingface": "HF_ENDPOINT"}
TOKENS = {"modelscope": "MODELSCOPE_API_TOKEN", "huggingface": "HF_TOKEN"}


@pytest.fixture(params=ENDPOINTS)
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    name = str(request.param)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("modelscope_hub._legacy_api.time.sleep", lambda _: None)
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELSCOPE_API_MAX_RETRIES", "1")
    monkeypatch.setenv(TOKENS[name], "token-of-owner")
    monkeypatch.setenv(ENDPOINTS[name], "http://127.0.0.1:9")
    return name


@pytest.fixture
def store(hub: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    found = Store("token-of-owner")
    with take_uploads(hub, found) as url:
        monkeypatch.setenv(ENDPOINTS[hub], url)
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "export"
    made.mkdir()
    save_file({"weight": torch.arange(5000.0)}, made / "model.safetensors")
    (made / "config.json").write_text('{"model_type": "llama"}')
    (made / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A model\n")
    return made


@pytest.mark.parametrize("private", [True, False])
def test_every_file_arrives_as_it_is_and_the_repository_is_made(hub: str, store: Store, folder: Path, private: bool):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    address = push_folder(folder, f"{hub}:owner/mine", private=private, message="agentft run a, step 3")
    assert address.endswith("owner/mine")
    assert {name: content for name, content in store.files.items() if name != ".gitattributes"} == before
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert store.messages
    assert all("agentft run a, step 3" in message for message in store.messages)
    (made,) = store.created
    if hub == "huggingface":
        assert made["visibility"] == ("private" if private else "public")
    else:
        assert (made["Path"], made["Name"]) == ("owner", "mine")
        assert made["Visibility"] == (1 if private else 5)


def test_without_a_token_it_says_how_to_log_in(hub: str, store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(TOKENS[hub], "another")
    with pytest.raises(ModelError, match=TOKENS[hub]) as caught:
        push_folder(folder, f"{hub}:owner/mine", private=True, message="m")
    assert "another" not in str(caught.value)
    assert not store.files


def test_without_a_network_it_is_one_line(hub: str, folder: Path):
    with pytest.raises(ModelError, match=r"push: .*: ") as caught:
        push_folder(folder, f"{hub}:owner/mine", private=True, message="m")
    assert "\n" not in str(caught.value)
    assert "upload" in str(caught.value)
    assert "cached" not in str(caught.value)


@pytest.mark.parametrize("odd", ["owner/mine", "modelscope:mine", "huggingface:../mine", "ftp:owner/mine", ""])
def test_a_target_that_is_none_is_refused(odd: str):
    with pytest.raises(ConfigError, match="expected modelscope:owner/name or huggingface:owner/name"):
        parse_target(odd)
