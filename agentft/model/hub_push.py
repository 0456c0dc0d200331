"""A folder to a hub, by the hub's own client and with its login."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from agentft.errors import ConfigError, ModelError
from agentft.model.hub import MODEL_ID, explain
from agentft.model.hub_clients import HuggingFace, ModelScope

HUBS: dict[str, type[ModelScope] | type[HuggingFace]] = {"modelscope": ModelScope, "huggingface": HuggingFace}


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
