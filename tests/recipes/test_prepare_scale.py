"""Memory does not grow with the data: what stays of a conversation is less than what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, resource, sys
from agentft.data.config import SyntheticConfig
from agentft.data.render import MsagentTemplate
from agentft.data.tokens import SegmentEncoder
from agentft.model.sources import byte_tokenizer
from agentft.data.prepare import prepare_data

config = SyntheticConfig(name="synthetic", conversations=int(sys.argv[1]), max_samples=int(sys.argv[2]), cache=False)
tokenizer = byte_tokenizer()
prepared = prepare_data(config, MsagentTemplate(tokenizer.eos_token), SegmentEncoder(tokenizer))
peak, largest_worker = (
    resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
)
print(json.dumps([peak, largest_worker, len(prepared.train), prepared.train.lengths.sum().item()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("sample", [-1, 1000])
def test_a_conversation_more_costs_less_than_two_kilobytes_and_a_worker_nothing(sample, root):
    (small, small_worker, few, _), (large, large_worker, many, tokens) = (
        prepare(root, count, sample) for count in (4_000, 14_000)
    )
    assert sample > 0 or many - few > 8_000
    assert tokens > 500 * many
    assert (large - small) / 10_000 < 2_000
    assert 0 < small_worker < 1.05 * small
    # Where a sample is taken, workers are forked anew when all has been read, and show what the parent holds by then.
    assert (large_worker - small_worker) / 10_000 < (500 if sample < 0 else 2_000)


def prepare(root: Path, conversations: int, sample: int) -> list[int]:
    """Peak memory in bytes, of the largest worker too, examples and tokens of a preparation in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(conversations), str(sample)],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures: list[int] = json.loads(done.stdout.splitlines()[-1])
    return figures
