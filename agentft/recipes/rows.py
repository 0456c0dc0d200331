"""The raw rows of a dataset, whatever kind it is: the one place that matches the settings of `dataset` to a source."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agentft.data import synthetic
from agentft.data.config import DatasetConfig, Format, HubConfig, LocalConfig, Reasoning, Split, SyntheticConfig
from agentft.data.conversation import Conversation, Origin
from agentft.data.records import Rejection
from agentft.data.sources import (
    LocalSource,
    RawRow,
    ReadReport,
    digest_local,
    heldout_files,
    read_conversations,
    read_local,
)
from agentft.errors import ConfigError

log = logging.getLogger(__name__)

Rows = Iterable[RawRow | Rejection]

_LARGE_BYTES = 3_000_000
_SYNTHETIC_BYTES = 1_300
"""Of a conversation, about."""


@dataclass(frozen=True, slots=True)
class DatasetRows:
    """Rows of the training source and, where the dataset has one of its own for it, of the held-out source."""

    train: Rows
    heldout: Rows | None
    form: Format
    reasoning: Reasoning

    def conversations(self, report: ReadReport) -> Iterator[tuple[Conversation | Rejection, bool]]:
        """Everything that the rows hold, and whether it comes from the held-out source."""
        for rows, heldout in ((self.train, False), (self.heldout, True)):
            if rows is not None:
                for item in read_conversations(rows, form=self.form, reasoning=self.reasoning, report=report):
                    yield item, heldout


def open_rows(config: DatasetConfig, report: ReadReport) -> DatasetRows:
    """Open the source or sources of a dataset.

    Raises:
        DataError: a path is missing or holds nothing.
        ConfigError: no source reads this kind of dataset.
    """
    match config:
        case SyntheticConfig():
            train: Rows = _synthetic(config, "train", config.conversations)
            return DatasetRows(train, _synthetic(config, "heldout", config.heldout), Format.msagent, config.reasoning)
        case LocalConfig():
            sources = _local_sources(config)
            own = any(heldout_files(Path(source.path)) for source in sources)
            if own and config.test_path is None:
                log.info("data: test and validation files beside training files are held out, and not trained on")
            test: Any = config.test_path or [replace(source, part="heldout") for source in sources]
            heldout = read_local(test, report=report) if own or config.test_path is not None else None
            train = read_local([replace(source, part="train") for source in sources], report=report)
            return DatasetRows(train, heldout, config.format, config.reasoning)
        case HubConfig():
            from agentft.data.hub_rows import read_hub

            heldout = None if config.test_split is None else read_hub(config, config.test_split)
            return DatasetRows(read_hub(config, config.train_split), heldout, config.format, config.reasoning)
        case _:
            raise ConfigError(f"dataset={config.name}: no source reads {type(config).__name__}")


def is_large(config: DatasetConfig) -> bool:
    """Whether a dataset is known, before it is read, to have much text tokenised: megabytes of it."""
    match config:
        case SyntheticConfig():
            return config.conversations * _SYNTHETIC_BYTES > _LARGE_BYTES
        case LocalConfig() if config.sample < 0:
            files = (file for source in _local_sources(config) for file in _files(Path(source.path)))
            return sum(file.stat().st_size for file in files) > _LARGE_BYTES
        case _:
            return False


def _files(path: Path) -> Iterator[Path]:
    return (file for file in (path.rglob("*") if path.is_dir() else (path,)) if file.is_file())


def source_digests(config: DatasetConfig) -> Any:
    """The bytes of the sources by name and digest, as JSON: equal ones give equal rows. None where a source shows no bytes.

    Raises:
        DataError: a hub cannot be asked.
    """
    match config:
        case LocalConfig():
            test = None if config.test_path is None else digest_local(config.test_path)
            return [digest_local(_local_sources(config)), test]
        case HubConfig():
            from agentft.data.hub_rows import digest_hub

            splits = [config.train_split] if config.test_split is None else [config.train_split, config.test_split]
            digests = [digest_hub(config, split) for split in splits]
            return None if None in digests else digests
        case _:
            return []  # made from the settings alone


def _local_sources(config: LocalConfig) -> list[LocalSource]:
    if config.path is not None:
        return [LocalSource(config.path)]
    return [LocalSource(source.path, source.weight) for source in config.sources]


def _synthetic(config: SyntheticConfig, part: Any, count: int) -> Iterator[RawRow]:
    records = synthetic.generate(
        count,
        seed=config.seed,
        languages={"en": 1 - config.chinese, "zh": config.chinese},
        part=part,
        unseen_tools=config.split is Split.unseen_tools,
        max_rounds=config.max_rounds,
    )
    for number, record in enumerate(records, start=1):
        yield RawRow(Origin(f"synthetic-{part}", number), record)
