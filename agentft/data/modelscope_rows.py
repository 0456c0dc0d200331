"""Rows of a dataset on the ModelScope hub, through the hub's own client.

The client reads its settings from the environment when it is first imported: `MODELSCOPE_ENDPOINT` (another hub),
`MODELSCOPE_CACHE` (where downloads go), `MODELSCOPE_API_TOKEN`. It downloads every split of a dataset and asks the hub at each
load, so it fails without the hub even where all files are cached; a copy read as `dataset=local` needs no hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentft.data.block_digest import block_digest
from agentft.data.conversation import Origin
from agentft.data.records import Rejection
from agentft.data.sources import RawRow
from agentft.errors import DataError

_DATASET_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def read_modelscope(
    dataset_id: str,
    split: str = "train",
    *,
    revision: str = "master",
    cache_dir: str | None = None,
    weight: float = 1.0,
) -> Iterator[RawRow | Rejection]:
    """Rows of one split; `conversations` may be a list or, as in MSAgent-Bench, the text of one.

    Raises:
        DataError: the id is no `owner/name`, or the client cannot load the split; the message says what it said.
    """
    _require_hub_id(dataset_id)
    return _read(dataset_id, split, revision, cache_dir, weight)


def _require_hub_id(dataset_id: str) -> None:
    if not _DATASET_ID.fullmatch(dataset_id):
        raise DataError(f"{dataset_id!r} is no dataset id; expected owner/name, such as damo/MSAgent-Bench")
    if Path(dataset_id).exists():
        raise DataError(f"{dataset_id}: a local path of this name would be read in place of the hub; use dataset=local")


def digest_modelscope(
    dataset_id: str, split: str, *, revision: str = "master", cache_dir: str | None = None
) -> list[str] | None:
    """Digests of the tables that the client keeps of a split; None where it keeps none on the disk.

    Raises:
        DataError: as `read_modelscope`.
    """
    _require_hub_id(dataset_id)
    tables = getattr(_load(dataset_id, split, revision, cache_dir), "cache_files", None)
    if not tables:
        return None
    return [block_digest(Path(table["filename"])) for table in tables]


def _read(dataset_id: str, split: str, revision: str, cache_dir: str | None, weight: float) -> Iterator[RawRow]:
    number = 0
    for number, row in enumerate(_load(dataset_id, split, revision, cache_dir), 1):
        yield RawRow(Origin(dataset_id, number), row, weight)
    if number == 0:
        raise DataError(f"{dataset_id}: split {split!r} holds no record")


def _load(dataset_id: str, split: str, revision: str, cache_dir: str | None) -> Any:
    try:
        from modelscope.msdatasets import MsDataset
    except ImportError as error:
        raise DataError(
            f"the ModelScope client is not installed: pip install 'modelscope[datasets]' ({error})"
        ) from error
    chosen = {} if cache_dir is None else {"cache_dir": cache_dir}
    try:
        return MsDataset.load(dataset_id, split=split, version=revision, trust_remote_code=False, **chosen)
    except Exception as error:  # the client, the hub and the reader of the files each raise types of their own
        said = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        offline = [
            name for name in _OFFLINE_VARIABLES if os.environ.get(name, "0").upper() in ("1", "ON", "YES", "TRUE")
        ]
        hint = f" {' and '.join(offline)} switched this client off too." if offline else ""
        raise DataError(
            f"{dataset_id}: split {split!r} at revision {revision!r} cannot be loaded from the ModelScope hub ({said}).{hint} "
            "Check the id and split; if the hub is out of reach, read a downloaded copy with dataset=local"
        ) from error
