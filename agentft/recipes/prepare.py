"""Dataset settings -> tokenised training examples and held-out conversations, with every row accounted for."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agentft.data.config import DatasetConfig
from agentft.data.fit import Outcome
from agentft.data.stored_conversations import StoredConversations
from agentft.data.stored_examples import StoredExamples
from agentft.data.template_choice import Layout
from agentft.data.tokens import SegmentEncoder
from agentft.recipes.account import Account, read_account
from agentft.recipes.build_data import ABOUT, ACCOUNT, HELDOUT, ORDER, build_data
from agentft.recipes.data_cache import open_cache
from agentft.recipes.data_key import code_is_as_loaded, key_ingredients, key_of
from agentft.runs import RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedData:
    """What a run trains on and what it is measured by."""

    train: StoredExamples
    heldout: StoredConversations
    heldout_examples: StoredExamples
    train_tools: frozenset[str]
    """Names of the tools that training conversations call."""
    fingerprint: str
    """Digest of the training ids, labels and weights in their order, and of the held-out ones."""
    heldout_content_hashes: list[str]
    account: Account


def prepare_data(config: DatasetConfig, template: Layout, encoder: SegmentEncoder) -> PreparedData:
    """Read, divide, sample and tokenise a dataset, or find it done before with the same settings.

    Raises:
        DataError: a source cannot be read, a part is empty, or more rows were set aside than `dataset.max_rejected`.
        ConfigError: the settings contradict each other.
    """
    started = time.perf_counter()
    prepared = _cached(config, template, encoder) if config.cache else None
    if prepared is None:
        with tempfile.TemporaryDirectory(prefix="agentft-data-") as folder:
            build_data(config, template, encoder, Path(folder))
            prepared = _open(Path(folder), config)
    prepared.account.check_losses(config)
    _report(prepared, time.perf_counter() - started)
    return prepared


def _cached(config: DatasetConfig, template: Layout, encoder: SegmentEncoder) -> PreparedData | None:
    """The data from the cache, made there if need be; None where it cannot be kept."""
    cache = open_cache(config.cache_limit_gb)
    ingredients = None if cache is None else key_ingredients(config, template, encoder)
    if cache is None or ingredients is None:
        return None
    if not code_is_as_loaded():
        log.warning("data: not cached, the code in %s changed after this process began", Path(__file__).parent.parent)
        return None

    def about() -> dict[str, Any] | None:
        """What the key is made of, if that is still what it was."""
        return ingredients if ingredients == key_ingredients(config, template, encoder) else None

    return cache.fetch(
        key_of(ingredients),
        build=lambda folder: build_data(config, template, encoder, folder),
        open_=lambda folder: _open(folder, config),
        about=about,
    )


def _open(folder: Path, config: DatasetConfig) -> PreparedData:
    """Map the files of a prepared dataset; they may lose their names afterwards."""
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    examples = StoredExamples(folder)
    with np.load(folder / ORDER) as order:
        train, heldout, talks = (order[part] for part in ("train", "heldout", "talks"))
    return PreparedData(
        train=examples.chosen(train, config.span_weights),
        heldout=StoredConversations(folder / HELDOUT, talks),
        heldout_examples=examples.chosen(heldout),
        train_tools=frozenset(about["train_tools"]),
        fingerprint=about["fingerprint"],
        heldout_content_hashes=about["heldout_content_hashes"],
        account=read_account(folder / ACCOUNT),
    )


def _report(prepared: PreparedData, seconds: float) -> None:
    account = prepared.account
    tokens = int(prepared.train.lengths.sum())
    log.info(
        "data: %d rows%s -> %d training and %d held-out conversations; %s tokens, %.0f %% of them labelled (%.1f s)",
        account.read.rows,
        _of_files(account.read.files),
        account.used("train"),
        account.used("heldout"),
        f"{tokens:,}",
        100 * prepared.train.trained_tokens / tokens,
        seconds,
    )
    if account.rejections:
        log.warning("data: %d rows set aside: %s", len(account.rejections), account.reasons())
    for part, outcomes in account.fitted.items():
        if set(outcomes) - {str(Outcome.whole)}:
            steps = sum(len(change["steps_left_out"]) for change in account.changed if change["part"] == part)
            log.warning("data: fitting to dataset.max_length, %s: %s; %d steps left out", part, dict(outcomes), steps)
    if account.layout:
        log.info("data: written otherwise by model.template: %s", dict(account.layout.most_common()))
    if account.left_out:
        log.info("data: in neither part: %s", dict(account.left_out))
    if account.read.notices:
        log.info("data: kept, and noted: %s", dict(account.read.notices.most_common()))


def _of_files(files: list[str]) -> str:
    return f" of {files[0]}" + f" and {len(files) - 1} more files" * (len(files) > 1) if files else ""


def _sources(account: Account) -> list[dict[str, Any]]:
    """What each source gave and how much of it is used; `train` counts a conversation as often as an epoch shows it."""
    return [
        {"source": name, "weight": source.weight, "rows": source.rows, "kept": source.kept}
        | {part: used[name] for part, used in account.by_source.items()}
        for name, source in account.read.sources.items()
    ]


def write_manifest(prepared: PreparedData, run: RunFolder) -> None:
    """Write what the run trains on and is measured by, and every row that was set aside, into the run folder."""
    account = prepared.account
    run.write_json(
        run.data_manifest,
        {
            "fingerprint": prepared.fingerprint,
            "rows": account.read.rows,
            "files": account.read.files,
            "sources": _sources(account),
            "skipped_files": account.read.skipped_files,
            "blank_lines": account.read.blank_lines,
            "set_aside": account.reasons(),
            "in_neither_part": dict(account.left_out),
            "notices": dict(account.read.notices),
            "layout": dict(account.layout),
            "fitting": {"outcomes": account.fitted, "changed": account.changed},
            "train": {
                "examples": len(prepared.train),
                "conversations": account.used("train"),
                "tokens": int(prepared.train.lengths.sum()),
                "labelled_tokens": prepared.train.trained_tokens,
                "steps": prepared.train.steps,
                "tools_called": len(prepared.train_tools),
                "ids": prepared.train.ids,
            },
            "heldout": {
                "examples": len(prepared.heldout),
                "conversations": account.used("heldout"),
                "steps": prepared.heldout_examples.steps,
                "ids": prepared.heldout_examples.ids,
                "content_hashes": prepared.heldout_content_hashes,
            },
        },
    )
    lines = (
        {"source": r.origin.source, "line": r.origin.line, "id": r.id, "reason": r.reason, "detail": r.detail}
        for r in account.rejections
    )
    run.write_text(run.rejected_file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
