"""Downloads by the hubs' own clients from servers on this machine: what arrives, what is refused, in which words."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from modelscope_hub.errors import FileDownloadError, FileIntegrityError
from safetensors.torch import save

from agentft.errors import ModelError
from agentft.model import hub
from agentft.model.config import ModelConfig, ModelSource
from agentft.model.hub import HuggingFace, ModelScope
from agentft.model.shards import check_file_names, shard_files, weight_files
from agentft.model.sources import check_remote_code, locate_model
from tests.model.loopback_hubs import COMMIT, Repository, serve

HUBS = ["modelscope", "huggingface"]
ENDPOINTS = {"modelscope": "MODELSCOPE_ENDPOINT", "huggingface": "HF_ENDPOINT"}
NOWHERE = "http://127.0.0.1:9"
"""A port that nothing listens on."""


def repository(**extra: bytes) -> Repository:
    files = {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "model.safetensors": save({"weight": torch.arange(6000.0)}),
        "README.md": b"read me",
        "modeling.py": b"raise SystemExit",
        "original/model.safetensors": b"the same in another form",
    }
    return Repository(files | {name.replace("__", "."): content for name, content in extra.items()})


@pytest.fixture(autouse=True)
def clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between tries, no network but this machine's."""
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0.0)
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_HASH_RETRY_TIMES", 1)
    monkeypatch.setattr("modelscope_hub._legacy_api.time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None, raising=False)
    for name in ENDPOINTS.values():
        monkeypatch.setenv(name, NOWHERE)


@pytest.fixture(params=HUBS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def served(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    stand_in = repository()
    with serve(name, stand_in) as url:
        monkeypatch.setenv(ENDPOINTS[name], url)
        yield stand_in


def download(
    name: str,
    cache: Path,
    model_id: str = "owner/small",
    revision: str | None = None,
    settings_alone: bool = False,
    **more: bool,
) -> Any:
    config = ModelConfig(name="small", source=ModelSource(name), revision=revision, cache_dir=str(cache), **more)
    return hub.fetch(config, model_id, settings_alone=settings_alone)


def refused(name: str, cache: Path, *args: Any, **more: bool) -> str:
    """The message of the refusal, which is one line and no more than three hundred characters."""
    with pytest.raises(ModelError) as caught:
        download(name, cache, *args, **more)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 360
    return message


def everything(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# --- What arrives ---


def test_weights_settings_and_tokenizer_arrive_and_nothing_else(name: str, served: Repository, tmp_path: Path) -> None:
    fetched = download(name, tmp_path)
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (fetched.folder / file).read_bytes() == served.files[file]
    assert not any(tmp_path.rglob("*.py"))
    assert {file for _, file, _ in served.log if not file.startswith("/api")} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    }


def test_the_revision_is_resolved_and_the_second_time_only_asked_for(
    name: str, served: Repository, tmp_path: Path
) -> None:
    first = download(name, tmp_path)
    assert first.commit == COMMIT if name == "huggingface" else first.commit.startswith("master, files ")
    served.log.clear()
    assert download(name, tmp_path) == first
    assert [path.split()[0] for _, path, _ in served.log] == ["/api-list"]
    served.files["tokenizer.json"] = b'{"changed": true}'
    changed = download(name, tmp_path)
    if name == "modelscope":  # names no commit, so what it lists decides
        assert changed.commit != first.commit
        assert (changed.folder / "tokenizer.json").read_bytes() == b'{"changed": true}'


def test_settings_come_without_weights_and_are_not_fetched_twice(name: str, served: Repository, tmp_path: Path) -> None:
    def settings(**more: bool) -> Any:
        fetched = download(name, tmp_path, settings_alone=True, **more)
        return json.loads((fetched.folder / "config.json").read_text())

    assert settings() == {"model_type": "llama"}
    assert {
        what for command, what, _ in served.log if command == "GET" and what.endswith((".json", ".safetensors"))
    } == {"config.json"}
    folder = download(name, tmp_path).folder
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(everything(folder))
    assert [what for command, what, _ in served.log if command == "GET"].count("config.json") == 1
    assert settings(offline=True) == {"model_type": "llama"}


def test_offline_finds_what_was_downloaded_without_a_request(name: str, served: Repository, tmp_path: Path) -> None:
    first = download(name, tmp_path)
    served.log.clear()
    assert download(name, tmp_path, offline=True) == first
    assert served.log == []


@pytest.mark.parametrize("damage", ["nothing there", "a file missing", "a file shortened", "another revision"])
def test_offline_refuses_what_is_not_complete(damage: str, name: str, served: Repository, tmp_path: Path) -> None:
    if damage != "nothing there":
        weights = download(name, tmp_path).folder / "model.safetensors"
        if damage == "a file missing":
            weights.unlink()
        elif damage == "a file shortened":
            os.truncate(weights, 100)
    served.log.clear()
    revision = "v1" if damage == "another revision" else None
    assert "model.offline=true: owner/small" in refused(name, tmp_path, "owner/small", revision, offline=True)
    assert served.log == []


def test_a_broken_download_goes_on_where_it_stopped(name: str, served: Repository, tmp_path: Path) -> None:
    served.cut_once["model.safetensors"] = 7000
    fetched = download(name, tmp_path)
    assert (fetched.folder / "model.safetensors").read_bytes() == served.files["model.safetensors"]
    ranges = [asked for method, path, asked in served.log if path == "model.safetensors" and method == "GET"]
    assert ranges == ["", "bytes=7000-"]


def test_after_a_run_without_success_the_next_one_fetches_the_rest(
    name: str, served: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ModelScope goes on inside the file; Hugging Face's client keeps whole files and starts a broken one again."""
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_RETRY_TIMES", 0)
    served.cut_always["model.safetensors"] = 700
    assert "no connection" in refused(name, tmp_path)
    served.cut_always.clear()
    served.log.clear()
    fetched = download(name, tmp_path)
    assert (fetched.folder / "model.safetensors").read_bytes() == served.files["model.safetensors"]
    gets = [(path, asked) for method, path, asked in served.log if method == "GET" and not path.startswith("/api")]
    assert gets == [("model.safetensors", "bytes=700-" if name == "modelscope" else "")]


def test_python_files_come_only_with_trust(name: str, served: Repository, tmp_path: Path) -> None:
    fetched = download(name, tmp_path, trust_remote_code=True)
    assert (fetched.folder / "modeling.py").is_file()


def test_pickles_come_only_with_the_flag_and_never_beside_safetensors(
    name: str, served: Repository, tmp_path: Path
) -> None:
    served.files["pytorch_model.bin"] = b"a pickle"
    assert not (download(name, tmp_path / "both", allow_pickle=True).folder / "pytorch_model.bin").exists()
    del served.files["model.safetensors"]
    assert "model.allow_pickle=true" in refused(name, tmp_path / "refused")
    assert everything(tmp_path / "refused") == []
    assert (download(name, tmp_path / "allowed", allow_pickle=True).folder / "pytorch_model.bin").is_file()


def test_locate_model_takes_any_id_and_keeps_the_commit(name: str, served: Repository, tmp_path: Path) -> None:
    config = ModelConfig(
        name="auto", source=ModelSource(name), id="owner/small", revision="main", cache_dir=str(tmp_path)
    )
    if name == "modelscope":
        config.revision = None
    files = locate_model(config)
    assert files.commit == download(name, tmp_path, revision=config.revision).commit
    assert (files.folder / "model.safetensors").is_file()


def test_offline_takes_what_another_program_has_downloaded(name: str, served: Repository, tmp_path: Path) -> None:
    first = download(name, tmp_path)
    shutil.rmtree(tmp_path / "hubs")
    served.log.clear()
    revision = COMMIT if name == "huggingface" else None
    assert download(name, tmp_path, revision=revision, offline=True).folder == first.folder
    assert served.log == []


# --- What goes wrong ---


def test_an_unknown_id_is_named(name: str, served: Repository, tmp_path: Path) -> None:
    assert "owner/none: no such model" in refused(name, tmp_path, "owner/none")


@pytest.mark.parametrize("odd", ["", "../up", "owner/../up", "owner/name/more", "/etc/passwd", "owner/na me", "a\\b"])
def test_what_is_no_id_never_reaches_the_client(odd: str, name: str, served: Repository, tmp_path: Path) -> None:
    assert "expected owner/name" in refused(name, tmp_path, odd)
    assert served.log == []


def test_an_unknown_revision_is_named(served: Repository, name: str, tmp_path: Path) -> None:
    if name == "modelscope":
        served.refuse = (404, {})
    assert "owner/small at revision v9: no such" in refused(name, tmp_path, "owner/small", "v9")


@pytest.mark.parametrize(("status", "words"), [(403, "access is restricted"), (401, "no|not")])
def test_a_model_behind_a_gate_says_how_to_get_in(
    status: int, words: str, name: str, served: Repository, tmp_path: Path
) -> None:
    served.refuse = (status, {"X-Error-Code": "GatedRepo"} if status == 403 else {})
    message = refused(name, tmp_path)
    assert any(word in message for word in words.split("|"))
    assert ("MODELSCOPE_API_TOKEN" if name == "modelscope" else "HF_TOKEN") in message


def test_no_network_points_to_the_cache(name: str, tmp_path: Path) -> None:
    message = refused(name, tmp_path)
    assert "no connection to the hub" in message
    assert "model.offline=true" in message


def test_a_content_that_is_not_the_listed_one_is_thrown_away(name: str, served: Repository, tmp_path: Path) -> None:
    good = served.files["model.safetensors"]
    served.served["model.safetensors"] = good[:-1] + b"!"
    message = refused(name, tmp_path)
    assert "model.safetensors arrived with another content" in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size == len(good)]
    served.served.clear()
    assert (download(name, tmp_path).folder / "model.safetensors").read_bytes() == good


def test_small_files_are_checked_by_gits_hash_too(served: Repository, name: str, tmp_path: Path) -> None:
    served.served["config.json"] = b'{"model_type": "other"}'
    assert "config.json arrived with another content" in refused(name, tmp_path)


@pytest.mark.parametrize("client", [ModelScope(), HuggingFace()])
def test_a_disk_that_fills_up_is_said(client: Any) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    nested = FileDownloadError("1 of 2", failed_files={"model.safetensors": full}, total=2, output_dir=None)
    outer = RuntimeError("while copying")
    outer.__cause__ = full
    for error in (full, nested, outer):
        assert "the disk is full" in hub.explain(client, "owner/small", None, error)


def test_an_error_nobody_foresaw_is_one_line() -> None:
    message = hub.explain(ModelScope(), "owner/small", None, RuntimeError("first\nsecond " * 200))
    assert "RuntimeError: first second" in message
    assert "\n" not in message
    wrong = FileDownloadError("x", failed_files={"a.bin": FileIntegrityError("h")}, total=1, output_dir=None)
    assert "a.bin arrived" in hub.explain(ModelScope(), "owner/small", None, wrong)


# --- Names ---

HOSTILE = [
    "../evil.json",
    "../../.bashrc",
    "a/../../evil.json",
    "/etc/evil.json",
    "//server/share/evil.json",
    "\\\\server\\share\\evil.json",
    "..\\evil.json",
    "C:/evil.json",
    "c:evil.json",
    "a/D:evil.json",
    "C:\\evil.json",
    "~/evil.json",
    "~root/.ssh/evil.json",
    "evil\0.json",
    "evil\n.json",
    "evil\x9b.json",
    "evil\ud800.json",
    "./../evil.json",
    "a//evil.json",
    ".",
    "..",
    "",
    "... /evil.json",
    "a/.. /evil.json",
    "x" * 300 + ".json",
    "a/" * 600 + "evil.json",
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda text: ascii(text)[:30])
def test_a_hostile_name_is_refused(hostile: str) -> None:
    with pytest.raises(ModelError, match="refused the file name"):
        check_file_names(["config.json", hostile], "a listing")


@pytest.mark.parametrize("odd", [None, 3, ["config.json"], b"config.json"])
def test_a_name_that_is_no_text_is_refused(odd: Any) -> None:
    with pytest.raises(ModelError, match="not text"):
        check_file_names([odd], "a listing")


def test_plain_names_pass() -> None:
    names = ["config.json", "model-00001-of-00002.safetensors", "sub/a b.txt", ".gitattributes", "模型.json", "a..b"]
    assert check_file_names(names, "a listing") == names


@pytest.mark.parametrize("hostile", [h for h in HOSTILE if h and "\ud800" not in h], ids=lambda text: ascii(text)[:30])
def test_a_hostile_listing_writes_nothing(hostile: str, name: str, served: Repository, tmp_path: Path) -> None:
    cache = tmp_path / "a" / "b" / "cache"
    cache.mkdir(parents=True)
    served.files[hostile] = b"evil"
    assert "file name" in refused(name, cache)
    assert everything(tmp_path) == []


@pytest.mark.parametrize("hostile", ["../secret.safetensors", "/etc/passwd", "sub/../../x", 3, "missing.safetensors"])
def test_a_hostile_shard_index_reads_nothing_outside(hostile: Any, tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(save({"a": torch.zeros(1)}))
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": hostile}}))
    for reader in (lambda: shard_files(index), lambda: weight_files(folder, allow_pickle=False)):
        with pytest.raises(ModelError, match="model.safetensors.index.json"):
            reader()


def test_a_link_that_leaves_the_folder_is_refused_and_the_hubs_own_links_are_not(tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(save({"a": torch.zeros(1)}))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(secret)
    with pytest.raises(ModelError, match="symbolic link that leaves"):
        weight_files(folder, allow_pickle=False)

    snapshot = tmp_path / "models--owner--small" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    blob = tmp_path / "models--owner--small" / "blobs" / "f00"
    blob.parent.mkdir()
    shutil.copy(secret, blob)
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00")
    assert weight_files(snapshot, allow_pickle=False) == [snapshot / "model.safetensors"]


# --- Code that comes with weights ---

CODE = [
    ("config.json", {"model_type": "novel", "auto_map": {"AutoModelForCausalLM": "modeling.Novel"}}),
    ("config.json", {"model_type": "llama", "model_file": "modeling.py"}),
    ("config.json", {"model_type": "llama", "attn_implementation": "someone/evil-kernel"}),
    ("config.json", {"model_type": "llama", "_attn_implementation": "someone/evil-kernel"}),
    ("config.json", {"model_type": "llama", "text_config": {"x": [{"_attn_implementation": "kernels/evil:f"}]}}),
    ("generation_config.json", {"custom_generate": "someone/evil"}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tok.Evil", None]}}),
]


@pytest.mark.parametrize(("file", "fields"), CODE)
def test_code_that_comes_with_weights_is_refused(file: str, fields: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "novel"}))
    (tmp_path / file).write_text(json.dumps(fields))
    (tmp_path / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "model.safetensors").write_bytes(save({"a": torch.zeros(1)}))
    config = ModelConfig(name="novel", source=ModelSource.local, path=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=rf"{file}: \w+ is .*model.trust_remote_code=true"):
        locate_model(config)
    check_remote_code(tmp_path, trusted=True)
    assert not (tmp_path / "ran").exists()


def test_an_auto_map_beside_a_known_architecture_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": {"AutoConfig": "x.Y"}}))
    check_remote_code(tmp_path, trusted=False)


def test_settings_of_any_depth_are_searched(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a":' * 900 + '{"model_file": "x.py"}' + "}" * 900)
    with pytest.raises(ModelError, match="model_file"):
        check_remote_code(tmp_path, trusted=False)
    (tmp_path / "config.json").write_text('{"a":' * 200_000 + "1" + "}" * 200_000)
    with pytest.raises(ModelError, match="not readable as JSON"):
        check_remote_code(tmp_path, trusted=False)
