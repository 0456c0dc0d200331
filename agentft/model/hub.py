"""Fetch a model from a hub and push one to it: names checked before anything is written, contents before anything is loaded.

Each hub's own client is used, with its cache and its login; it resumes broken downloads by itself. What was fetched is
recorded below agentft's cache, so that `model.offline` finds it again without the network and without a client.
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
from typing import Any, Protocol

from agentft.cache import cache_root
from agentft.errors import ConfigError, ModelError
from agentft.model.shards import check_file_names, check_free_disk, pickle_refusal, read_json

log = logging.getLogger(__name__)

SETTINGS_AND_TOKENIZER = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja")
"""Files that are fetched besides weights. Only those at the top: folders hold other formats of the same weights."""

SETTINGS = "config.json"

MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """What the hub says of one file."""

    size: int | None
    sha256: str | None = None
    git_sha1: str | None = None
    """Git's name of the file's content, where the hub gives no sha256."""

    def fits(self, path: Path) -> bool:
        """Return whether the file at `path` has this size and content, as far as the hub has said."""
        if self.size is not None and path.stat().st_size != self.size:
            return False
        if self.sha256:
            return _digest(path, hashlib.sha256()) == self.sha256.lower()
        if self.git_sha1:
            return _digest(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size)) == self.git_sha1.lower()
        return True


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a repository at one moment."""

    commit: str
    """What was found under the asked revision: a commit, or a digest of names and contents where the hub names none."""
    files: Mapping[str, RemoteFile]


class Hub(Protocol):
    """What fetching a model needs of a hub's client."""

    @property
    def name(self) -> str: ...

    @property
    def login(self) -> str:
        """Return how to give this hub a token."""

    def list_files(self, model_id: str, revision: str | None) -> Listing: ...

    def download(
        self, model_id: str, revision: str | None, listing: Listing, names: list[str], cache_dir: str | None
    ) -> Path: ...

    def cached(self, model_id: str, revision: str | None, cache_dir: str | None) -> Path:
        """Folder of an earlier download, without the network."""

    def store(self, model_id: str, cache_dir: str | None) -> Path:
        """Folder that the client keeps this repository in."""


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
        return Path(
            self._api().download_repo(model_id, "model", revision=revision, cache_dir=cache_dir, file_list=chosen)
        )

    def cached(self, model_id: str, revision: str | None, cache_dir: str | None) -> Path:
        return Path(
            self._api().download_repo(model_id, "model", revision=revision, cache_dir=cache_dir, local_files_only=True)
        )

    def store(self, model_id: str, cache_dir: str | None) -> Path:
        from modelscope_hub.config import get_default_config

        root = Path(cache_dir or get_default_config().cache_dir).expanduser()
        return root / "models" / model_id.replace("/", "--")

    def _api(self) -> Any:
        from modelscope_hub import HubApi

        return HubApi(endpoint=os.environ.get("MODELSCOPE_ENDPOINT"))


class HuggingFace:
    """Hugging Face. `HF_ENDPOINT` names another server, such as a mirror."""

    name = "Hugging Face"
    login = "put a token into HF_TOKEN or run `hf auth login`"

    def list_files(self, model_id: str, revision: str | None) -> Listing:
        from huggingface_hub import HfApi

        info = HfApi(endpoint=_hf_endpoint()).model_info(model_id, revision=revision, files_metadata=True)
        files = {
            entry.rfilename: RemoteFile(
                entry.size, entry.lfs.sha256 if entry.lfs else None, None if entry.lfs else entry.blob_id
            )
            for entry in info.siblings or []
        }
        if not info.sha:
            raise ModelError(f"Hugging Face: {model_id}: the server names no commit for {revision or 'main'}")
        return Listing(info.sha, files)

    def download(
        self, model_id: str, revision: str | None, listing: Listing, names: list[str], cache_dir: str | None
    ) -> Path:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                model_id,
                revision=listing.commit,
                cache_dir=cache_dir,
                allow_patterns=[glob.escape(name) for name in names],
                endpoint=_hf_endpoint(),
            )
        )

    def cached(self, model_id: str, revision: str | None, cache_dir: str | None) -> Path:
        from huggingface_hub import snapshot_download

        # The client calls a snapshot incomplete that lacks any file which matches.
        patterns = ["config.json", "tokenizer*", "model*.safetensors*"]
        return Path(
            snapshot_download(
                model_id, revision=revision, cache_dir=cache_dir, local_files_only=True, allow_patterns=patterns
            )
        )

    def store(self, model_id: str, cache_dir: str | None) -> Path:
        from huggingface_hub import constants

        root = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        return root / f"models--{model_id.replace('/', '--')}"


def _hf_endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return str(digest.hexdigest())


HUBS: dict[str, type[ModelScope] | type[HuggingFace]] = {"modelscope": ModelScope, "huggingface": HuggingFace}


@dataclass(frozen=True, slots=True)
class FetchedModel:
    """A model of a hub on the local disk."""

    folder: Path
    commit: str
    """What the asked revision stood for."""


def fetch(
    hub: Hub,
    model_id: str,
    revision: str | None,
    cache_dir: str | None,
    *,
    offline: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> FetchedModel:
    """Fetch settings, tokenizer and weights of a model, or find them in the cache.

    Pickled weights are taken only with `allow_pickle` and where there are no others, Python files only with
    `trust_remote_code`.

    Raises:
        ModelError: unknown id or revision, no access, no network, a file name that leads out of the folder, contents
            that are not what the hub lists, a full disk, or nothing usable in the repository; one line each.
    """
    _check_id(hub, model_id)
    record = _record_path(hub, model_id, revision, cache_dir)
    if offline:
        return _from_cache(hub, model_id, revision, cache_dir, record)
    try:
        listing = hub.list_files(model_id, revision)
        check_file_names(listing.files, f"{hub.name}: {model_id}")
        names = wanted_files(listing.files, f"{hub.name}: {model_id}", allow_pickle, trust_remote_code)
        if (known := _recorded(record, listing.commit, names)) is not None:
            return known
        log.info("%s: %s at %s, %d files", hub.name, model_id, listing.commit, len(names))
        store = hub.store(model_id, cache_dir)
        check_free_disk(store, sum(listing.files[name].size or 0 for name in names) - _stored_bytes(store), model_id)
        folder = hub.download(model_id, revision, listing, names, cache_dir)
    except ModelError:
        raise
    except Exception as error:  # the clients raise some thirty unrelated types
        raise ModelError(explain(hub, model_id, revision, error)) from error
    _verify(hub, model_id, folder, listing, names)
    _write_record(record, folder, listing.commit, names)
    return FetchedModel(folder, listing.commit)


def fetch_settings(
    hub: Hub, model_id: str, revision: str | None, cache_dir: str | None, offline: bool = False
) -> dict[str, Any]:
    """Fetch a model's config.json alone, so that its size is known before its weights are asked for.

    Raises:
        ModelError: see `fetch`.
    """
    _check_id(hub, model_id)
    if offline:
        folder = _from_cache(
            hub, model_id, revision, cache_dir, _record_path(hub, model_id, revision, cache_dir)
        ).folder
        return read_json(folder / SETTINGS)
    try:
        listing = hub.list_files(model_id, revision)
        check_file_names(listing.files, f"{hub.name}: {model_id}")
        if SETTINGS not in listing.files:
            raise _no_settings(f"{hub.name}: {model_id}")
        folder = hub.download(model_id, revision, listing, [SETTINGS], cache_dir)
    except ModelError:
        raise
    except Exception as error:  # the clients raise some thirty unrelated types
        raise ModelError(explain(hub, model_id, revision, error)) from error
    _verify(hub, model_id, folder, listing, [SETTINGS])
    return read_json(folder / SETTINGS)


def wanted_files(names: Iterable[str], origin: str, allow_pickle: bool, trust_remote_code: bool) -> list[str]:
    """Choose what is fetched of a repository's files.

    Raises:
        ModelError: no config.json, no weights, or pickled weights only and no `allow_pickle`.
    """
    top = sorted(name for name in names if "/" not in name)
    if SETTINGS not in top:
        raise _no_settings(origin)
    safe = [name for name in top if fnmatch(name, "*.safetensors")]
    weights = [name for name in safe if fnmatch(name, "model*")] or safe
    if not weights:
        weights = [name for name in top if fnmatch(name, "pytorch_model*.bin")]
        if weights and not allow_pickle:
            raise pickle_refusal(origin)
    if not weights:
        raise ModelError(f"{origin}: the repository has no weights as safetensors or pytorch_model*.bin")
    others = [*SETTINGS_AND_TOKENIZER, *(["*.py"] if trust_remote_code else [])]
    return [*(name for name in top if any(fnmatch(name, pattern) for pattern in others)), *weights]


# --- What was fetched before -----------------------------------------------------------------------------------------


def _record_path(hub: Hub, model_id: str, revision: str | None, cache_dir: str | None) -> Path:
    key = hashlib.sha256(json.dumps([hub.name, model_id, revision, cache_dir]).encode()).hexdigest()[:16]
    return cache_root(cache_dir) / "hubs" / f"{model_id.replace('/', '--')}-{key}.json"


def _write_record(record: Path, folder: Path, commit: str, names: list[str]) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    content = {"commit": commit, "folder": str(folder), "files": {name: _state(folder / name) for name in names}}
    temporary = record.with_suffix(f".{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]}")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    temporary.replace(record)


def _state(path: Path) -> list[int]:
    """Size and time of a file whose content has been checked once."""
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _recorded(record: Path, commit: str | None, names: list[str] | None) -> FetchedModel | None:
    """Return what the record says, if every file is as it was, at that commit; None as any commit or any files."""
    if not record.is_file():
        return None
    content = read_json(record)
    folder, files = Path(str(content["folder"])), content["files"]
    if commit not in (None, content["commit"]) or not set(names or []) <= files.keys():
        return None
    if any(not (folder / name).is_file() or _state(folder / name) != state for name, state in files.items()):
        return None
    return FetchedModel(folder, str(content["commit"]))


def _from_cache(hub: Hub, model_id: str, revision: str | None, cache_dir: str | None, record: Path) -> FetchedModel:
    if (known := _recorded(record, None, None)) is not None:
        return known
    if record.is_file():
        raise _not_cached(hub, model_id, revision)
    try:
        folder = hub.cached(model_id, revision, cache_dir)
    except Exception as error:
        raise _not_cached(hub, model_id, revision) from error
    if not (folder / "config.json").is_file():
        raise _not_cached(hub, model_id, revision)
    log.warning("%s was downloaded by another program: its contents are taken as they are", folder)
    return FetchedModel(folder, folder.name)


def _not_cached(hub: Hub, model_id: str, revision: str | None) -> ModelError:
    return ModelError(
        f"model.offline=true: {_where_asked(model_id, revision)} of {hub.name} is not in the cache, or not complete; "
        "run once with model.offline=false, or take files at hand with model.source=local model.path=<folder>"
    )


# --- Checks ----------------------------------------------------------------------------------------------------------


def _check_id(hub: Hub, model_id: str) -> None:
    if not MODEL_ID.fullmatch(model_id) or ".." in model_id:
        raise ModelError(f"{hub.name}: {model_id!r} is no model id; expected owner/name (a folder: model.source=local)")


def _no_settings(origin: str) -> ModelError:
    return ModelError(f"{origin}: the repository has no {SETTINGS}; is it a transformers model?")


def _stored_bytes(store: Path) -> int:
    """Bytes that lie there already, of broken downloads too."""
    files = (path for path in store.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files)


def _verify(hub: Hub, model_id: str, folder: Path, listing: Listing, names: list[str]) -> None:
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{hub.name}: {model_id}: {name} did not arrive in {folder}; run again")
        if not listing.files[name].fits(path):
            content = path.resolve()
            path.unlink()
            content.unlink(missing_ok=True)
            raise ModelError(_wrong_content(hub, model_id, name))


def _wrong_content(hub: Hub, model_id: str, name: str) -> str:
    return (
        f"{hub.name}: {model_id}: {name} arrived with another content than the hub lists (size or hash); it was "
        "deleted. Run again; if it stays so, the repository or a proxy on the way is damaged"
    )


# --- What went wrong -------------------------------------------------------------------------------------------------


def explain(hub: Hub, model_id: str, revision: str | None, error: BaseException) -> str:
    """Say in one line what a client's error means and what to do."""
    asked = f"{hub.name}: {_where_asked(model_id, revision)}"
    causes = list(_causes(error))
    names = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    status = next((s for cause in causes if (s := _status(cause)) is not None), None)
    if any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
        return f"{asked}: the disk is full; make room or set model.cache_dir to a folder on another disk, and run again"
    if names & {"FileIntegrityError", "FileSizeMismatchError"}:
        return _wrong_content(hub, model_id, next(iter(_failed_files(causes)), "a file"))
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
    if "OfflineModeIsEnabled" in names:
        return f"{asked}: HF_HUB_OFFLINE is set; with model.offline=true the cache is used"
    if names & {"ConnectionError", "TransportError", "TimeoutError", "NetworkError", "IncompleteBody"}:
        return (
            f"{asked}: no connection to the hub ({type(causes[-1]).__name__}). What has arrived is kept: run again to "
            "go on, or model.offline=true to use what is cached"
        )
    first = " ".join(str(error).split())[:200]
    return (
        f"{asked}: {type(error).__name__}: {first}; with the files at hand use model.source=local model.path=<folder>"
    )


def _where_asked(model_id: str, revision: str | None) -> str:
    return f"{model_id} at revision {revision}" if revision else model_id


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it came from, and what happened to each single file."""
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


def _failed_files(causes: list[BaseException]) -> list[str]:
    return [str(name) for cause in causes for name in (getattr(cause, "failed_files", None) or {})]


def _status(error: BaseException) -> int | None:
    status = getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def parse_target(push: str) -> tuple[str, str]:
    """Read `modelscope:owner/name` as hub and id.

    Raises:
        ConfigError: another form.
    """
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
        send = _to_modelscope if name == "modelscope" else _to_huggingface
        return send(folder, model_id, private, message)
    except Exception as error:  # the clients raise some thirty unrelated types
        raise ModelError(f"push: {explain(hub, model_id, None, error)}") from error


def _to_modelscope(folder: Path, model_id: str, private: bool, message: str) -> str:
    from modelscope_hub import HubApi

    endpoint = os.environ.get("MODELSCOPE_ENDPOINT")
    api: Any = HubApi(endpoint=endpoint, token=os.environ.get("MODELSCOPE_API_TOKEN"))
    if not api.repo_exists(model_id, "model"):
        api.create_repo(model_id, "model", visibility="private" if private else "public")
    api.upload_folder(model_id, "model", folder, commit_message=message, disable_tqdm=True, use_cache=False)
    return f"{endpoint or 'https://www.modelscope.cn'}/models/{model_id}"


def _to_huggingface(folder: Path, model_id: str, private: bool, message: str) -> str:
    from huggingface_hub import HfApi

    endpoint = os.environ.get("HF_ENDPOINT") or None
    api: Any = HfApi(endpoint=endpoint)
    address = api.create_repo(model_id, private=private, exist_ok=True)
    api.upload_folder(repo_id=model_id, folder_path=folder, commit_message=message)
    return str(address)
