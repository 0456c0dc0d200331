"""Weights from a model hub, by the hub's own client, into the client's cache."""

from __future__ import annotations

from pathlib import Path

from agentft.errors import ModelError

WANTED = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja")
"""Files that are fetched: weights as safetensors, tokenizer and settings. No code, no pickled weights."""


def download_modelscope(model_id: str, revision: str | None, cache_dir: str | None) -> Path:
    """Fetch a model with the ModelScope client and return its folder.

    Raises:
        ModelError: unknown id, no network, or nothing usable in the repository.
    """
    from modelscope import snapshot_download

    try:
        folder = snapshot_download(model_id, revision=revision, cache_dir=cache_dir, allow_patterns=list(WANTED))
    except Exception as error:  # the client raises a dozen unrelated types
        raise _refusal("ModelScope", model_id, revision, error) from error
    return _checked(Path(folder), model_id)


def download_huggingface(model_id: str, revision: str | None, cache_dir: str | None) -> Path:
    """Fetch a model with the Hugging Face client and return its folder.

    Raises:
        ModelError: unknown id, no network, or nothing usable in the repository.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(model_id, revision=revision, cache_dir=cache_dir, allow_patterns=list(WANTED))
    except Exception as error:  # the client raises a dozen unrelated types
        raise _refusal("Hugging Face", model_id, revision, error) from error
    return _checked(Path(folder), model_id)


def _refusal(hub: str, model_id: str, revision: str | None, error: Exception) -> ModelError:
    where = f"{model_id} at revision {revision}" if revision else model_id
    return ModelError(
        f"{hub} gave no {where}: {type(error).__name__}: {error}. Check the id, the revision and the network; "
        "with the files at hand use model.source=local model.path=<folder>"
    )


def _checked(folder: Path, model_id: str) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{model_id}: the repository has no config.json; is it a transformers model?")
    return folder
