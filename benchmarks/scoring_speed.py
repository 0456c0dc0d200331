"""How long scoring takes: seconds per 1,000 steps, ROUGE-L among them, and of the intervals.

    python benchmarks/scoring_speed.py [PREDICTIONS.jsonl]

Without a file, steps are made from a fixed seed: 45 % calls, Chinese and English answers of about 170 characters.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from agentft.evaluation.metrics import aggregate, score_records
from agentft.evaluation.steps import StepRecord
from agentft.score import read_records

Result = TypeVar("Result")

_PHRASES = (
    "调用API返回结果，今天北京的天气晴朗，最高气温25度。",
    "根据查询，推荐您入住Hilton酒店，距离地铁站500米。",
    "模型训练参数learning_rate设置为1e-4，batch_size为16。",
    "The restaurant opens at 9 am and offers a set lunch.",
)


def main() -> None:
    """Print both figures."""
    records = read_records(Path(sys.argv[1])) if len(sys.argv) > 1 else make_records(2_000)
    seconds, scores = _timed(lambda: score_records(records))
    print(f"scoring {len(records):,} steps: {1_000 * seconds / len(records):.3f} s per 1,000 steps")
    seconds, report = _timed(lambda: aggregate(scores, allow_bad_references=True))
    conversations = report["counts"]["conversations"]
    print(f"10,000 draws over {conversations:,} conversations, with breakdowns: {seconds:.2f} s")


def make_records(steps: int) -> list[StepRecord]:
    """Make steps of five a conversation, predictions near their references."""
    rng = random.Random(0)
    records = []
    for number in range(steps):
        reference = _call(rng) if rng.random() < 0.45 else "".join(rng.choices(_PHRASES, k=rng.randint(2, 8)))
        prediction = "".join(character for character in reference if rng.random() > 0.005)
        records.append(
            StepRecord(conversation_id=f"c{number // 5}", step=number % 5, reference=reference, prediction=prediction)
        )
    return records


def _call(rng: random.Random) -> str:
    names = ("city", "date", "price", "stars", "name", "area")
    parameters = {key: str(rng.randint(0, 99)) for key in rng.sample(names, rng.randint(0, 4))}
    body = json.dumps({"api_name": rng.choice(("hotel_search", "weather", "train")), "parameters": parameters})
    return f"<|startofthink|>```JSON\n{body}\n```<|endofthink|>"


def _timed(work: Callable[[], Result]) -> tuple[float, Result]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


if __name__ == "__main__":
    main()
