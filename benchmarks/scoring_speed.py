"""How long scoring takes: seconds per 1,000 steps, and ROUGE-L per 1,000 pairs against rouge_score, timed in turn.

    python benchmarks/scoring_speed.py [PREDICTIONS.jsonl]

Without a file, steps are made from a fixed seed: 45 % calls, Chinese and English answers of about 170 characters.
Takes about 20 seconds. ROUGE-L is timed alternately, five times each, and the medians are compared.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rouge_score.rouge_scorer import RougeScorer

from agentft.evaluation.metrics import StepRecord, aggregate, score_records
from agentft.evaluation.rouge import CjkTokenizer, RougeLScorer
from agentft.score import read_records

Result = TypeVar("Result")

_PHRASES = (
    "调用API返回结果，今天北京的天气晴朗，最高气温25度。",
    "根据查询，推荐您入住Hilton酒店，距离地铁站500米。",
    "模型训练参数learning_rate设置为1e-4，batch_size为16。",
    "The restaurant opens at 9 am and offers a set lunch.",
)


def main() -> None:
    """Print both tables."""
    records = read_records(Path(sys.argv[1])) if len(sys.argv) > 1 else make_records(2_000)
    seconds, scores = _timed(lambda: score_records(records))
    print(f"scoring {len(records):,} steps: {1_000 * seconds / len(records):.3f} s per 1,000 steps")
    seconds, report = _timed(lambda: aggregate(scores, allow_bad_references=True))
    conversations = report.counts["conversations"]
    print(f"10,000 draws over {conversations:,} conversations, with breakdowns: {seconds:.2f} s")

    texts = [record for record in make_records(4_000) if "<|" not in record.reference][:1_000]
    pairs = [(record.reference, record.prediction) for record in texts]
    characters = statistics.mean(len(text) for pair in pairs for text in pair)
    scorers = {"agentft": RougeLScorer(), "rouge_score": RougeScorer(["rougeL"], tokenizer=CjkTokenizer())}
    times: dict[str, list[float]] = {name: [] for name in scorers}
    for _ in range(5):
        values = {}
        for name, scorer in scorers.items():
            taken, values[name] = _timed(partial(_all_rouge_l, scorer, pairs))
            times[name].append(taken)
        if values["agentft"] != values["rouge_score"]:
            raise SystemExit("ROUGE-L values differ from rouge_score")
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    print(f"ROUGE-L, {len(pairs):,} pairs of {characters:.0f} characters on average, equal values:")
    for name, median in medians.items():
        print(f"  {name:<12} {1_000 * median / len(pairs):.3f} s per 1,000 pairs (median of 5)")
    print(f"  ratio        {medians['rouge_score'] / medians['agentft']:.1f}")


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


def _all_rouge_l(scorer: Any, pairs: list[tuple[str, str]]) -> list[float]:
    return [scorer.score(*pair)["rougeL"].fmeasure for pair in pairs]


def _timed(work: Callable[[], Result]) -> tuple[float, Result]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


if __name__ == "__main__":
    main()
