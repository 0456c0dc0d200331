"""Fetch a model from a hub and push one to it: names checked before anything is written, contents before anything is loaded.

What was fetched is recorded below agentft's cache, so that it is checked once, and `model.offline` finds it.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from agentft.cache import cache_root
from agentft.errors import ConfigError, ModelError
from agentft.model.config import ModelConfig
from agentft.model.shards import check_file_names, pickle_refusal, read_json

log = logging.getLogger(__name__)

SETTINGS = "config.json"

BESIDE_WEIGHTS = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja")
"""Files that are fetched besides weights. Only those at the top: folders hold other formats of the same weights."""

MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the hub lists it."""

    size: int | None
    sha256: str | None = None
    git_sha1: str | None = None
    """Git's name of the file's content; counts where the hub gives no sha256."""

    def fits(self, path: Path) -> bool:
        """Return whether the file at `path` has this size and content, as far as the hub has said."""
        size, wanted = path.stat().st_size, self.sha256 or self.git_sha1
        if self.size not in (None, size):
            return False
        if wanted is None:
            return True
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % size)
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: digest).hexdigest() == wanted.lower()


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a repository at one moment."""

    commit: str
    """What was found under the asked revision: a commit, or a digest of names and contents where the hub names none."""
    files: Mapping[str, RemoteFile]


class ModelScope:
    """ModelScope. `MODELSCOPE_ENDPOINT` names another server."""

    name = "ModelScope"
    login = "put a token into MODELSCOPE_API_TOKEN or run `modelscope login`"

    def list_files(self, model_id: str, revision: str | None) -> Listing:
        files = {
            entry.path: RemoteFile(entry.size, entry.sha256 or None)
            for entry in self._api().list_repo_files(model_id, "model", revision=revision)
            if not entry.is_dir
        }
        # The listing names the last commit of each file, never the repository's: contents identify it instead.
        lines = [f"{path}:{file.size}:{file.sha256}" for path, file in sorted(files.items())]
        digest = hashlib.sha256("\n".join(lines).encode(errors="surrogatepass")).hexdigest()
        return Listing(f"{revision or 'master'}, files {digest[:16]}", files)

    def download(
        self, model_id: str, revision: str | None, listing: Listing, names: list[str], cache_dir: str | None
    ) -> Path:
        # The checked list is handed over, so the client does not ask the server for names again.
        chosen = [{"Path": n, "Size": listing.files[n].size, "Sha256": listing.files[n].sha256} for n in names]
        api = self._api()
        return Path(api.download_repo(model_id, "model", revision=revision, cache_dir=cache_dir, file_list=chosen))

    def cached(self, model_id: str, revision: str | None, cache_dir: str | None) -> Path:
        """Return the folder of an earlier download, without the network."""
        api = self._api()
        return Path(api.download_repo(model_id, "model", revision=revision, cache_dir=cache_dir, local_files_only=True))

    def push(self, folder: Path, model_id: str, *, private: bool, message: str) -> str:
        api = self._api(token=os.environ.get("MODELSCOPE_API_TOKEN"))
        if not api.repo_exists(model_id, "model"):
            api.create_repo(model_id, "model", visibility="private" if private else "public")
        api.upload_folder(model_id, "model", folder, commit_message=message, disable_tqdm=True, use_cache=False)
        return f"{os.environ.get('MODELSCOPE_ENDPOINT') or 'https://www.modelscope.cn'}/models/{model_id}"

    def _api(self, **arguments: Any) -> Any:
        from modelscope_hub import HubApi

        return HubApi(endpoint=os.environ.get("MODELSCOPE_ENDPOINT"), **arguments)


class HuggingFace:
    """Hugging Face. `HF_ENDPOINT` names another server, such as a mirror."""

    name = "Hugging Face"
    login = "put a token into HF_TOKEN or run `hf auth login`"

    def list_files(self, model_id: str, revision: str | None) -> Listing:
        info = self._api().model_info(model_id, revision=revision, files_metadata=True)
        files = {
            entry.rfilename: RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
            for entry in info.siblings or []
        }
        if not info.sha:
            raise ModelError(f"Hugging Face: {model_id}: the server names no commit for {revision or 'main'}")
        return Listing(info.sha, files)

    def download(
        self, model_id: str, revision: str | None, listing: Listing, names: list[str], cache_dir: str | None
    ) -> Path:
        where = {"revision": listing.commit, "cache_dir": cache_dir}
        return Path(self._api().snapshot_download(model_id, allow_patterns=[glob.escape(n) for n in names], **where))

    def cached(self, model_id: str, revision: str | None, cache_dir: str | None) -> Path:
        """Return the folder of an earlier download, without the network."""
        # The client calls a snapshot incomplete that lacks any file which matches.
        where = {"revision": revision, "cache_dir": cache_dir, "local_files_only": True}
        patterns = [SETTINGS, "tokenizer*", "model*.safetensors*"]
        return Path(self._api().snapshot_download(model_id, allow_patterns=patterns, **where))

    def push(self, folder: Path, model_id: str, *, private: bool, message: str) -> str:
        address = self._api().create_repo(model_id, private=private, exist_ok=True)
        self._api().upload_folder(repo_id=model_id, folder_path=folder, commit_message=message)
        return str(address)

    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


Hub = ModelScope | HuggingFace
HUBS: dict[str, type[Hub]] = {"modelscope": ModelScope, "huggingface": HuggingFace}


@dataclass(frozen=True, slots=True)
class FetchedModel:
    """A model of a hub on the local disk."""

    folder: Path
    commit: str
    """What the asked revision stood for."""


def fetch(config: ModelConfig, model_id: str, *, settings_alone: bool = False) -> FetchedModel:
    """Fetch settings, tokenizer and weights of a model on the hub `config.source`, or find them in the cache.

    Pickled weights are taken only with `allow_pickle` and where there are no others, Python files only with
    `trust_remote_code`; with `settings_alone` nothing but config.json.

    Raises:
        ModelError: the hub has no such model or refuses, its files are not safe or not as listed, or the disk is full.
    """
    hub, revision, cache_dir = HUBS[config.source](), config.revision, config.cache_dir
    if not MODEL_ID.fullmatch(model_id) or ".." in model_id:
        raise ModelError(f"{hub.name}: {model_id!r} is no model id; expected owner/name (a folder: model.source=local)")
    key = hashlib.sha256(json.dumps([hub.name, model_id, revision, cache_dir]).encode()).hexdigest()[:16]
    record = cache_root(cache_dir) / "hubs" / f"{model_id.replace('/', '--')}-{key}.json"
    if config.offline:
        return _from_cache(hub, model_id, revision, cache_dir, record)
    origin = f"{hub.name}: {model_id}"
    try:
        listing = hub.list_files(model_id, revision)
        check_file_names(listing.files, origin)
        names = wanted_files(listing.files, origin, config.allow_pickle, config.trust_remote_code)
        names = [SETTINGS] if settings_alone else names
        if (known := _recorded(record, listing.commit, names)) is not None:
            return known
        log.info("%s at %s, %d files", origin, listing.commit, len(names))
        folder = hub.download(model_id, revision, listing, names, cache_dir)
    except ModelError:
        raise
    except Exception as error:  # the clients raise some thirty unrelated types
        raise ModelError(explain(hub, model_id, revision, error)) from error
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{origin}: {name} did not arrive in {folder}; run again")
        if not listing.files[name].fits(path):
            content = path.resolve()
            path.unlink()
            content.unlink(missing_ok=True)
            raise ModelError(_wrong_content(origin, name))
    if not settings_alone:
        _write_record(record, folder, listing.commit, names)
    return FetchedModel(folder, listing.commit)


def wanted_files(names: Iterable[str], origin: str, allow_pickle: bool, trust_remote_code: bool) -> list[str]:
    """Choose what is fetched of a repository's files.

    Raises:
        ModelError: no config.json, no weights, or pickled weights only and no `allow_pickle`.
    """
    top = sorted(name for name in names if "/" not in name)
    if SETTINGS not in top:
        raise ModelError(f"{origin}: the repository has no {SETTINGS}; is it a transformers model?")
    safe = [name for name in top if fnmatch(name, "*.safetensors")]
    pickles = [name for name in top if fnmatch(name, "pytorch_model*.bin")]
    weights = [name for name in safe if fnmatch(name, "model*")] or safe or pickles
    if not weights:
        raise ModelError(f"{origin}: the repository has no weights as safetensors or pytorch_model*.bin")
    if weights == pickles and not allow_pickle:
        raise pickle_refusal(origin)
    others = [*BESIDE_WEIGHTS, *(["*.py"] if trust_remote_code else [])]
    return [*(name for name in top if any(fnmatch(name, pattern) for pattern in others)), *weights]


def _write_record(record: Path, folder: Path, commit: str, names: list[str]) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    content = {"commit": commit, "folder": str(folder), "files": {name: _state(folder / name) for name in names}}
    temporary = record.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    temporary.replace(record)


def _state(path: Path) -> list[int]:
    """Return size and time of a file whose content has been checked once."""
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _recorded(record: Path, commit: str | None = None, names: Iterable[str] = ()) -> FetchedModel | None:
    """Return what the record says, if every file is as it was, and it has these names at this commit."""
    if not record.is_file():
        return None
    content = read_json(record)
    folder, files = Path(str(content["folder"])), content["files"]
    if commit not in (None, content["commit"]) or not set(names) <= files.keys():
        return None
    if any(not (folder / name).is_file() or _state(folder / name) != state for name, state in files.items()):
        return None
    return FetchedModel(folder, str(content["commit"]))


def _from_cache(hub: Hub, model_id: str, revision: str | None, cache_dir: str | None, record: Path) -> FetchedModel:
    if (known := _recorded(record)) is not None:
        return known
    missing = ModelError(
        f"model.offline=true: {_asked(model_id, revision)} of {hub.name} is not in the cache, or not complete; "
        "run once with model.offline=false, or take files at hand with model.source=local model.path=<folder>"
    )
    if record.is_file():
        raise missing
    try:
        folder = hub.cached(model_id, revision, cache_dir)
    except Exception as error:
        raise missing from error
    if not (folder / SETTINGS).is_file():
        raise missing
    log.warning("%s was downloaded by another program: its contents are taken as they are", folder)
    return FetchedModel(folder, folder.name)


def _wrong_content(origin: str, name: str) -> str:
    return (
        f"{origin}: {name} arrived with another content than the hub lists (size or hash); it was "
        "deleted. Run again; if it stays so, the repository or a proxy on the way is damaged"
    )


def _asked(model_id: str, revision: str | None) -> str:
    return f"{model_id} at revision {revision}" if revision else model_id


def explain(hub: Hub, model_id: str, revision: str | None, error: BaseException, *, uploads: bool = False) -> str:
    """Say in one line what a client's error means and what to do."""
    asked = f"{hub.name}: {_asked(model_id, revision)}"
    causes = list(_causes(error))
    names = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    status = next((s for cause in causes if (s := _status(cause)) is not None), None)
    if any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
        return f"{asked}: the disk is full; make room or set model.cache_dir to a folder on another disk, and run again"
    if names & {"FileIntegrityError", "FileSizeMismatchError"}:
        failed = [str(name) for cause in causes for name in getattr(cause, "failed_files", None) or {}]
        return _wrong_content(f"{hub.name}: {model_id}", next(iter(failed), "a file"))
    if "GatedRepoError" in names or (status == 403 and "RepositoryNotFoundError" not in names):
        return f"{asked}: access is restricted; accept the model's terms on its page, then {hub.login}"
    if "RevisionNotFoundError" in names:
        return f"{asked}: no such revision; model.revision=null takes the hub's default"
    if "RepositoryNotFoundError" in names:
        return f"{asked}: no such model, or a private one; check the id, or {hub.login}"
    if status == 401:
        return f"{asked}: not allowed; {hub.login}"
    if status == 404 or "NotExistError" in names:
        return f"{asked}: no such model, revision or file; check model.id and model.revision"
    if names & {"ConnectionError", "TransportError", "TimeoutError", "NetworkError", "IncompleteBody"}:
        if uploads:
            what = "nothing or not all was uploaded; what was exported is kept, upload it with the hub's own client"
            return f"{asked}: no connection to the hub ({type(causes[-1]).__name__}); {what}"
        return (
            f"{asked}: no connection to the hub ({type(causes[-1]).__name__}). What has arrived is kept: run again to "
            "go on, or model.offline=true to use what is cached"
        )
    first = " ".join(str(error).split())[:200]
    if uploads:
        return f"{asked}: not uploaded: {type(error).__name__}: {first}"
    return (
        f"{asked}: {type(error).__name__}: {first}; with the files at hand use model.source=local model.path=<folder>"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, what it came from, and what happened to each single file."""
    waiting, seen = [error], set[int]()
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        inner: list[Any] = [current.__cause__, current.__context__, getattr(current, "reason", None)]
        failed = getattr(current, "failed_files", None)
        inner += failed.values() if isinstance(failed, dict) else []
        waiting += [one for one in inner if isinstance(one, BaseException)]


def _status(error: BaseException) -> int | None:
    status = getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def parse_target(push: str) -> tuple[str, str]:
    """Read `modelscope:owner/name` as hub and id; raise ConfigError for another form."""
    hub, _, model_id = push.partition(":")
    if hub not in HUBS or "/" not in model_id or not MODEL_ID.fullmatch(model_id) or ".." in model_id:
        raise ConfigError(f"push={push}: expected modelscope:owner/name or huggingface:owner/name")
    return hub, model_id


def push_folder(folder: Path, push: str, *, private: bool, message: str) -> str:
    """Create the repository if it is not there, upload every file of `folder`, and return its address.

    Raises:
        ConfigError: `push` names no hub.
        ModelError: not allowed, no connection, or the hub refused.
    """
    name, model_id = parse_target(push)
    hub = HUBS[name]()
    try:
        return hub.push(folder, model_id, private=private, message=message)
    except Exception as error:  # the clients raise some thirty unrelated types
        raise ModelError(f"push: {explain(hub, model_id, None, error, uploads=True)}") from error
