"""The two hubs behind one small face: list a repository's files, download chosen ones, find what is cached.

Both use the hub's own client, with its cache, its login and its resumption of broken downloads.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agentft.errors import ModelError


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """What the hub says of one file."""

    size: int | None
    sha256: str | None = None
    git_sha1: str | None = None
    """Git's name of the file's content, where the hub gives no sha256."""

    def fits(self, path: Path) -> bool:
        """Whether the file at `path` has this size and content, as far as the hub has said."""
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
        """How to give this hub a token."""

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
