"""Intervals and tests: formulae on small numbers, agreement with enumeration, refusals."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random

import numpy as np
import pytest

from agentft.comparison.pairs import compare_runs, holm, mcnemar_exact, needed_conversations, sign_flip_test
from agentft.errors import EvaluationError
from agentft.evaluation.metrics import Floats, aggregate, difference_intervals, ratio_intervals, score_records
from agentft.evaluation.steps import StepRecord, StepScore

RIGHT = '<|startofthink|>{"api_name": "a", "parameters": {"x": 1}}<|endofthink|>'
WRONG = RIGHT.replace("1", "2")


def column(*values: float) -> Floats:
    return np.array(values, dtype=np.float64)[:, None]


def run(pattern: str, calls_each: int = 1) -> list[StepScore]:
    """One conversation per character: 1 all calls exact, 0 none."""
    records = [
        StepRecord(conversation_id=f"c{i:03}", step=step, reference=RIGHT, prediction=RIGHT if mark == "1" else WRONG)
        for i, mark in enumerate(pattern)
        for step in range(calls_each)
    ]
    return score_records(records)


def test_standard_errors_by_hand() -> None:
    # ratio 3/4; residuals 1 - .75, 0 - .75, 2 - 1.5 = .25, -.75, .5
    found = ratio_intervals(column(1, 0, 2), column(1, 1, 2), bootstrap_samples=200, seed=0)
    cr0 = math.sqrt(0.25**2 + 0.75**2 + 0.5**2) / 4
    assert found.values[0] == 0.75
    assert found.se_cr0[0] == pytest.approx(cr0)
    assert found.se_cr1[0] == pytest.approx(cr0 * math.sqrt(3 / 2))


def test_interval_is_the_percentile_of_all_resamples() -> None:
    numerators, denominators = [3, 0, 2, 4], [4, 1, 2, 5]
    drawn = [
        sum(numerators[i] for i in pick) / sum(denominators[i] for i in pick)
        for pick in itertools.product(range(4), repeat=4)
    ]
    found = ratio_intervals(column(*numerators), column(*denominators), bootstrap_samples=40_000, seed=1)
    assert found.low[0] == pytest.approx(np.percentile(drawn, 2.5), abs=0.02)
    assert found.high[0] == pytest.approx(np.percentile(drawn, 97.5), abs=0.02)


def test_draws_without_denominator_are_left_out() -> None:
    found = ratio_intervals(column(1, 0, 0, 0), column(1, 0, 0, 0), bootstrap_samples=500, seed=0)
    assert (found.values[0], found.low[0], found.high[0]) == (1.0, 1.0, 1.0)
    nothing = ratio_intervals(column(0, 0), column(0, 0), bootstrap_samples=50, seed=0)
    assert all(np.isnan(part[0]) for part in (nothing.values, nothing.low, nothing.high, nothing.se_cr1))


def test_same_seed_same_interval_other_seed_nearly() -> None:
    scores = run("1101011101" * 12)
    first, again, other = (
        aggregate(scores, bootstrap_samples=2_000, seed=seed)["metrics"]["param_em"] for seed in (0, 0, 1)
    )
    assert first == again
    assert first["low"] is not None
    assert other["low"] is not None
    assert first["low"] != other["low"] or first["high"] != other["high"]
    assert first["low"] == pytest.approx(other["low"], abs=0.03)


def test_resampling_conversations_is_wider_than_steps_would_be() -> None:
    clustered = aggregate(run("10" * 60, calls_each=5), bootstrap_samples=2_000)["metrics"]["param_em"]
    assert clustered["se"] is not None
    assert clustered["se"] == pytest.approx(math.sqrt(0.25 / 119), rel=1e-6)  # 120 conversations, not 600 steps


def _flips_by_enumeration(a: Floats, b: Floats) -> float:
    def statistic(flips: tuple[int, ...]) -> float:
        top_a, top_b = (np.where(np.array(flips)[:, None] == side, b, a).sum(axis=0) for side in (1, 0))
        return float(abs(top_b[0] / top_b[1] - top_a[0] / top_a[1]))

    observed = statistic((0,) * len(a))
    found = [statistic(flips) for flips in itertools.product((0, 1), repeat=len(a))]
    return sum(value >= observed - 1e-12 for value in found) / len(found)


def test_sign_flip_is_exact_for_few_conversations() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        bottom = rng.integers(1, 4, size=8)
        a, b = (
            np.column_stack([rng.binomial(bottom, 0.6), bottom + rng.integers(0, 2, 8)]).astype(float) for _ in "ab"
        )
        p, exact = sign_flip_test(a, b, samples=10, seed=0)
        assert exact
        assert p == pytest.approx(_flips_by_enumeration(a, b))


def test_sign_flip_of_a_clean_sweep() -> None:
    a, b = (np.column_stack([np.full(6, top), np.ones(6)]) for top in (0.0, 1.0))
    assert sign_flip_test(a, b, samples=10, seed=0) == (2 / 2**6, True)
    assert sign_flip_test(a, a, samples=10, seed=0)[0] == 1.0


def test_drawn_sign_flips_agree_with_the_normal_law() -> None:
    rng = np.random.default_rng(0)
    a, b = (np.column_stack([rng.binomial(1, p, 200), np.ones(200)]).astype(float) for p in (0.6, 0.7))
    p, exact = sign_flip_test(a, b, samples=10_000, seed=0)
    difference = b[:, 0] - a[:, 0]
    z = abs(difference.sum()) / math.sqrt((difference**2).sum())
    assert not exact
    assert p == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.03)


@pytest.mark.parametrize(("only_a", "only_b", "p"), [(0, 0, 1.0), (5, 5, 1.0), (0, 6, 2 / 64), (1, 7, 2 * 9 / 256)])
def test_mcnemar_exact(only_a: int, only_b: int, p: float) -> None:
    assert mcnemar_exact(only_a, only_b) == pytest.approx(p)
    assert mcnemar_exact(only_b, only_a) == pytest.approx(p)


def test_mcnemar_takes_large_counts() -> None:
    assert 0 < mcnemar_exact(900, 1_100) < 1e-4
    assert mcnemar_exact(0, 5_000) == 0.0


def test_holm_by_hand() -> None:
    assert holm({"x": 0.04, "y": 0.01, "z": 0.03}) == pytest.approx({"x": 0.06, "y": 0.03, "z": 0.06})
    assert holm({"x": 0.9, "y": 0.8}) == {"x": 1.0, "y": 1.0}


def test_needed_conversations_by_hand() -> None:
    # spread per conversation 0.05 * sqrt(100) = 0.5; (1.95996 + 0.84162)^2 * 0.25 / 0.1^2 = 196.2
    assert needed_conversations(0.1, 0.05, 100) == 197
    assert needed_conversations(-0.1, 0.05, 100) == 197
    assert needed_conversations(0.0, 0.05, 100) is None
    # at 5 % over six metrics: (2.63826 + 0.84162)^2 * 0.25 / 0.1^2 = 302.7
    assert needed_conversations(0.1, 0.05, 100, level=0.05 / 6) == 303


def test_what_would_pass_alone_and_does_not_among_the_headline_metrics_is_said_so() -> None:
    found = compare_runs(run("0" * 40), run("1" * 6 + "0" * 34), bootstrap_samples=2_000)
    clear = found.metrics["param_em"]
    near = dataclasses.replace(clear, p=0.02, p_holm=0.12, needed_conversations=60)
    assert near.real is False
    assert "alone it would pass (p 0.020), among all headline metrics it does not (p 0.120 by Holm)" in near.words
    assert near.words.endswith("about 60 conversations would show a difference of this size, here are 40")
    far = dataclasses.replace(clear, p=0.2, p_holm=0.6, needed_conversations=30)
    assert "alone" not in far.words
    assert far.words.endswith("40 conversations show a difference of this size about four times in five")


def test_the_verdict_names_what_is_higher_and_what_is_lower() -> None:
    found = compare_runs(run("01" * 20), run("10" * 20), bootstrap_samples=200)
    assert found.verdict == "no difference between A and B can be claimed on these 40 conversations"
    better = dataclasses.replace(found.metrics["param_em"], difference=0.1, p_holm=0.01)
    worse = dataclasses.replace(found.metrics["plan_acc"], difference=-0.1, p_holm=0.01)
    here = "on these 40 conversations"
    for metrics, verdict in (
        ({"param_em": better}, f"B is better than A {here}, in param_em; in the others no difference can be claimed"),
        ({"plan_acc": worse}, f"B is worse than A {here}, in plan_acc; in the others no difference can be claimed"),
        (
            {"param_em": better, "plan_acc": worse},
            f"A and B differ {here}: B is higher in param_em, and lower in plan_acc",
        ),
    ):
        assert dataclasses.replace(found, metrics=found.metrics | metrics).verdict == verdict


def test_paired_interval_is_narrow_where_runs_agree() -> None:
    rng = np.random.default_rng(3)
    bottom = np.ones((300, 1))
    a = rng.binomial(1, 0.5, (300, 1)).astype(float)
    b = a.copy()
    b[:10] = 1.0
    found = difference_intervals((a, bottom), (b, bottom), bootstrap_samples=2_000, seed=0)
    assert found.values[0] == pytest.approx((b - a).mean())
    assert found.high[0] - found.low[0] < 0.04  # unpaired, it would be about 0.16
    assert found.se_cr1[0] == pytest.approx((b - a).std(ddof=1) / math.sqrt(300))


def test_comparison_says_a_clear_difference_is_real() -> None:
    rng = random.Random(0)
    baseline = "".join(rng.choice("0011") for _ in range(150))
    better = "".join("1" if rng.random() < 0.5 else mark for mark in baseline)
    found = compare_runs(run(baseline), run(better), bootstrap_samples=2_000)
    metric = found.metrics["param_em"]
    assert metric.difference is not None
    assert metric.low is not None
    assert metric.difference > metric.low > 0
    assert metric.real
    assert "B is higher" in metric.words
    assert found.mcnemar_only_a == 0
    assert found.mcnemar_p < 0.001
    json.dumps(found.to_json(), allow_nan=False)


def test_comparison_of_a_run_with_itself_finds_nothing() -> None:
    found = compare_runs(run("1011"), run("1011"), bootstrap_samples=200)
    metric = found.metrics["param_em"]
    assert (metric.difference, metric.p, metric.p_holm, metric.real) == (0.0, 1.0, 1.0, False)
    assert found.metrics["rouge_l"].difference is None
    assert found.metrics["rouge_l"].words == "rouge_l: not defined in both runs"


def test_small_difference_asks_for_more_conversations() -> None:
    metric = compare_runs(run("10" * 20), run("10" * 19 + "11"), bootstrap_samples=500).metrics["param_em"]
    assert metric.real is False
    assert metric.p == 1.0  # one conversation differs: both of its signs are as extreme
    assert metric.needed_conversations is not None
    assert metric.needed_conversations > 40
    assert f"{metric.needed_conversations:,} conversations would show" in metric.words


def test_comparison_does_not_depend_on_the_order_of_steps() -> None:
    a, b = run("1011001", calls_each=3), run("1110011", calls_each=3)
    shuffled = random.Random(0).sample(b, len(b))
    assert (
        compare_runs(a, b, bootstrap_samples=100).to_json()
        == compare_runs(a, shuffled, bootstrap_samples=100).to_json()
    )


def test_runs_on_different_exams_are_refused() -> None:
    a = run("1011")
    with pytest.raises(EvaluationError, match=r"only in A.*'c003' step 0"):
        compare_runs(a, a[:3])
    changed = [dataclasses.replace(a[0], reference_hash="0" * 16), *a[1:]]
    with pytest.raises(EvaluationError, match=r"1 reference\(s\) differ"):
        compare_runs(a, changed)
    with pytest.raises(EvaluationError, match="more than once"):
        compare_runs([*a, a[0]], a)
    with pytest.raises(EvaluationError, match="without scored steps"):
        compare_runs(a, [])


def pieces_and_wholes(seed: int) -> tuple[list[StepScore], list[StepScore]]:
    """60 conversations of 4 alike steps: each asked in two pieces, and the same steps each as one conversation."""
    rng = random.Random(seed)
    pieces, wholes = [], []
    for i in range(60):
        chance = rng.random()
        for step in range(4):
            words = {"reference": RIGHT, "prediction": RIGHT if rng.random() < chance else WRONG}
            name, part = f"c{i:03}", f"c{i:03}/{step // 2 + 1}"
            wholes.append(StepRecord(conversation_id=name, step=step, **words))
            pieces.append(StepRecord(conversation_id=part, piece_of=name, step=step % 2, **words))
    return score_records(pieces), score_records(wholes)


def test_pieces_of_one_conversation_are_one_in_every_interval() -> None:
    pieces, wholes = pieces_and_wholes(1)
    joined, whole = (aggregate(scores, bootstrap_samples=500, seed=0) for scores in (pieces, wholes))
    for name in ("tool_acc", "param_em", "arg_f1", "conv_em", "plan_acc"):
        assert joined["metrics"][name] == whole["metrics"][name]
    assert joined["counts"] == whole["counts"]
    assert joined["signature"] == whole["signature"]
    apart = aggregate([dataclasses.replace(s, piece_of=None) for s in pieces], bootstrap_samples=500, seed=0)
    narrow, wide = (found["metrics"]["param_em"] for found in (apart, whole))
    assert apart["counts"]["conversations"] == 2 * whole["counts"]["conversations"]
    assert narrow["high"] - narrow["low"] < 0.9 * (wide["high"] - wide["low"]), "taken apart, they claim too much"


def test_pieces_are_one_in_paired_tests_even_where_one_run_does_not_know_them() -> None:
    (a, a_whole), (b, b_whole) = pieces_and_wholes(1), pieces_and_wholes(2)
    expected = compare_runs(a_whole, b_whole, bootstrap_samples=500, seed=0)
    unaware = [dataclasses.replace(score, piece_of=None) for score in a]
    for left, right in ((a, b), (unaware, b)):
        found = compare_runs(left, right, bootstrap_samples=500, seed=0)
        assert found.metrics == expected.metrics
        assert found.conversations == 60
