"""Rows of a dataset on a hub, Hugging Face's or ModelScope's, through the hub's own client.

A client reads its settings from the environment when it is first imported. `datasets`: `HF_ENDPOINT` (another hub), `HF_HOME`
(where downloads go), `HF_TOKEN`, `HF_HUB_OFFLINE`. `modelscope`: `MODELSCOPE_ENDPOINT`, `MODELSCOPE_CACHE`,
`MODELSCOPE_API_TOKEN`; it downloads every split of a dataset and asks the hub at each load, so it fails without the hub even
where all files are cached. A copy read as `dataset=local` needs no hub. No code of a dataset is run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentft.data.config import HubConfig, HuggingFaceConfig
from agentft.data.conversation import Origin
from agentft.data.files import block_digest, without_nulls
from agentft.data.records import Rejection
from agentft.data.sources import RawRow
from agentft.errors import DataError

_DATASET_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def read_hub(config: HubConfig, split: str) -> Iterator[RawRow | Rejection]:
    """Rows of one split; `conversations` may be a list or, as in MSAgent-Bench, the text of one.

    Raises:
        DataError: the id is no `owner/name`, or the client cannot load the split; the message says what it said.
    """
    _require_hub_id(config)
    return _read(config, split)


def digest_hub(config: HubConfig, split: str) -> list[str] | None:
    """Digests of the tables that the client keeps of a split; None where it keeps none on the disk.

    Raises:
        DataError: as `read_hub`.
    """
    _require_hub_id(config)
    tables = getattr(_load(config, split), "cache_files", None)
    if not tables:
        return None
    return [block_digest(Path(table["filename"])) for table in tables]


def _require_hub_id(config: HubConfig) -> None:
    if not _DATASET_ID.fullmatch(config.id):
        raise DataError(f"{config.id!r} is no dataset id; expected owner/name, such as damo/MSAgent-Bench")
    if Path(config.id).exists():
        raise DataError(f"{config.id}: a local path of this name would be read in place of the hub; use dataset=local")


def _read(config: HubConfig, split: str) -> Iterator[RawRow]:
    number = 0
    for number, row in enumerate(_load(config, split), 1):
        yield RawRow(Origin(config.id, number), without_nulls(row))
    if number == 0:
        raise DataError(f"{config.id}: split {split!r} holds no record")


def _load(config: HubConfig, split: str) -> Any:
    hub = "Hugging Face" if isinstance(config, HuggingFaceConfig) else "ModelScope"
    chosen = {} if config.cache_dir is None else {"cache_dir": config.cache_dir}
    try:
        if isinstance(config, HuggingFaceConfig):
            from datasets import load_dataset

            return load_dataset(config.id, config.subset, split=split, revision=config.revision, **chosen)
        from modelscope.msdatasets import MsDataset

        return MsDataset.load(config.id, split=split, version=config.revision, trust_remote_code=False, **chosen)
    except ImportError as error:
        wanted = "datasets" if isinstance(config, HuggingFaceConfig) else "'modelscope[datasets]'"
        raise DataError(f"the client of {hub} is not installed: pip install {wanted} ({error})") from error
    except Exception as error:  # the client, the hub and the reader of the files each raise types of their own
        cause = error.__cause__ or error  # `datasets` wraps what went wrong in "an error occurred"
        said = f"{type(cause).__name__}: {cause}".split("\n")[0][:300]
        offline = [
            name for name in _OFFLINE_VARIABLES if os.environ.get(name, "0").upper() in ("1", "ON", "YES", "TRUE")
        ]
        hint = f" {' and '.join(offline)} switched this client off too." if offline else ""
        raise DataError(
            f"{config.id}: split {split!r} at revision {config.revision!r} cannot be loaded from the {hub} hub ({said}).{hint} "
            "Check the id and split; if the hub is out of reach, read a downloaded copy with dataset=local"
        ) from error
