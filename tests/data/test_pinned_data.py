"""Prepared MSAgent data in the layout `msagent`, held to the bit against one golden file.

A change of `examples` is a change of the data. A change of `fingerprint` alone means that it is computed otherwise, which
ends every run that would go on from a checkpoint. To renew: `pytest tests/data/test_pinned_data.py --update-golden`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from agentft.data.config import DatasetConfig, LocalConfig, SyntheticConfig, TooLong
from agentft.data.render import MsagentTemplate
from agentft.data.tokens import Example, SegmentEncoder
from agentft.recipes.prepare import prepare_data

COUNT = 200
MAX_LENGTH = {"real": 1536, "synthetic": 448}
"""At which some conversations are whole, some shortened, some lose rounds or are split, and some fit nowhere."""

SETTINGS = {"seed": 42, "cache": False, "workers": 1, "max_rejected": 1.0}


@pytest.fixture(scope="module")
def real_file(tmp_path_factory, shared_data: Path) -> Path:
    path = tmp_path_factory.mktemp("pinned") / "real.jsonl"
    with (shared_data / "train.jsonl").open(encoding="utf-8") as lines:
        path.write_text("".join(islice(lines, COUNT)), encoding="utf-8")
    return path


@pytest.mark.parametrize("too_long", TooLong, ids=lambda too_long: too_long.name)
@pytest.mark.parametrize("source", MAX_LENGTH)
def test_prepared_data_is_what_it_was(source, too_long, smollm2_tokenizer, golden_folder: Path, update_golden, request):
    settings = SETTINGS | {"name": source, "max_length": MAX_LENGTH[source], "too_long": too_long}
    config: DatasetConfig
    if source == "real":
        config = LocalConfig(path=str(request.getfixturevalue("real_file")), test_ratio=0.1, **settings)
    else:
        config = SyntheticConfig(conversations=170, heldout=30, **settings)
    template = MsagentTemplate(smollm2_tokenizer.eos_token)
    prepared = prepare_data(config, template, SegmentEncoder(smollm2_tokenizer))
    found = {
        "examples": {part: _digest(getattr(prepared, part)) for part in ("train", "heldout_examples")},
        "fingerprint": prepared.fingerprint,
    }
    golden, name = golden_folder / "data.json", f"{source} {too_long.name}"
    pinned = json.loads(golden.read_text()) if golden.exists() else {}
    if update_golden:
        pinned[name] = found
        golden.write_text(json.dumps(pinned, indent=1) + "\n")
    assert found["examples"] == pinned[name]["examples"], "other ids or labels: the data has changed"
    assert found["fingerprint"] == pinned[name]["fingerprint"], "the same data, whose fingerprint is computed otherwise"


def test_what_is_too_long_is_treated_in_three_ways(golden_folder: Path):
    """Else the pins above would hold less than they say."""
    pinned = json.loads((golden_folder / "data.json").read_text())
    for source in MAX_LENGTH:
        digests = {pinned[f"{source} {too_long.name}"]["examples"]["train"]["sha256"] for too_long in TooLong}
        assert len(digests) == len(TooLong), source


def _digest(examples: Iterable[Example]) -> dict[str, int | str]:
    """SHA-256 over (id, length, ids, labels) of each example in order, and what they add up to."""
    digest = hashlib.sha256()
    count = tokens = labelled = 0
    for example in examples:
        ids, labels = (np.asarray(row, dtype="<i8") for row in (example.input_ids, example.labels))
        digest.update(f"{example.id}\0{len(ids)}\0".encode())
        digest.update(ids.tobytes() + labels.tobytes())
        count, tokens, labelled = count + 1, tokens + len(ids), labelled + int((labels >= 0).sum())
    return {"count": count, "tokens": tokens, "labelled": labelled, "sha256": digest.hexdigest()}
