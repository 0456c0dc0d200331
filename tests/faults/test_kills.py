"""SIGKILL anywhere, and the resumed run equals the undisturbed one bit for bit (rows F01 to F04, F14, F18 of the matrix)."""

from __future__ import annotations

import ast
import random
import signal
import time
from collections import Counter
from itertools import chain

import pytest

from agentft.training.checkpoint import find_damage, list_checkpoints
from tests.faults.harness import (
    SAVE_STEPS,
    STEPS,
    assert_equal,
    diverges,
    finish,
    kill,
    kill_at_random,
    log_of,
    seeds,
    steps_logged,
    unfinished_saves,
    wait_until,
    whole_checkpoints,
)

FULL = ["sft_type=full"]
CALLS_IN_A_SAVE = 14
"""Syncs, renames, files and deletions of one save, at least; a kill before each is one trial."""


def _settings(seed: int) -> list[str]:
    return FULL if seed % 4 == 3 else []


@pytest.mark.parametrize("seed", seeds(sample=1, full=25))
def test_f01_f03_kills_at_random_moments_of_one_run_change_nothing(zygote, golden, ledger, tmp_path, seed):
    """Six in a run: in a step, in a save, in an evaluation, while the run before is being taken up."""
    draw = random.Random(f"F01-{seed}")
    run, settings, kills, inside = tmp_path / "run", _settings(seed), 0, 0
    for _ in range(6):
        killed = kill_at_random(zygote, run, draw, settings=settings)
        kills, inside = kills + killed, inside + (killed and bool(unfinished_saves(run)))
    ledger("F01, F03", seed=seed, kills=kills, in_save=inside)
    assert_equal(finish(zygote, run, settings=settings), golden(*settings))
    assert not unfinished_saves(run)


@pytest.mark.parametrize("seed", seeds(sample=1, full=14))
def test_f02_kills_before_each_call_of_a_save_change_nothing(zygote, golden, ledger, tmp_path, seed):
    """Before each sync, file, rename and deletion in turn; five in a run, in the first or second save of each process."""
    draw = random.Random(f"F02-{seed}")
    run, settings, kills = tmp_path / "run", _settings(seed), 0
    for i in range(5):
        call = (5 * seed + i) % CALLS_IN_A_SAVE + CALLS_IN_A_SAVE * draw.randrange(2)
        code = zygote.run(run, settings=settings, sabotage=[f"die_in_save:{call}"])
        assert code in (0, -signal.SIGKILL)  # 0: there were not so many saves left
        kills += code != 0
        assert whole_checkpoints(run) or steps_logged(run) <= SAVE_STEPS, "one is whole once the first was saved"
    whole = whole_checkpoints(run)
    ledger("F02", seed=seed, kills=kills, in_save=kills)
    assert_equal(finish(zygote, run, settings=settings), golden(*settings))
    assert f"resuming from {run}/checkpoints/step-{max(whole, default=0):06d}" in log_of(run).read_text() or not whole


@pytest.mark.parametrize("seed", seeds(sample=0, full=8, start=1000))
def test_f02_kills_at_random_moments_of_slowed_saves_change_nothing(zygote, golden, ledger, tmp_path, seed):
    draw = random.Random(f"F02-{seed}")
    run, kills, inside = tmp_path / "run", 0, 0
    for _ in range(4):
        pid = zygote.start(run, sabotage=["slow_save:0.03"])
        if wait_until(lambda: bool(unfinished_saves(run)), pid):
            time.sleep(draw.uniform(0, 0.35))
            caught = bool(unfinished_saves(run))
            kill(pid)
            kills, inside = kills + 1, inside + caught
        zygote.wait()
    ledger("F02", seed=seed, kills=kills, in_save=inside)
    assert_equal(finish(zygote, run), golden())


def test_f03_a_kill_during_evaluation_changes_nothing(zygote, golden, ledger, tmp_path):
    run = tmp_path / "run"
    assert zygote.run(run, sabotage=["die_in_evaluation"]) == -signal.SIGKILL
    assert zygote.run(run, sabotage=["die_in_evaluation"]) == -signal.SIGKILL
    ledger("F03", kills=2, in_save=0)
    assert_equal(finish(zygote, run), golden())


CASES = {"epoch boundary": 4, "middle of an accumulation": 8, "last step": STEPS, "before the first save": 2}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c == "before the first save" else pytest.mark.faults) for c in CASES]
)
def test_f04_a_kill_at_an_awkward_step_changes_nothing(zygote, golden, ledger, tmp_path, case):
    run = tmp_path / "run"
    assert zygote.run(run, sabotage=[f"die_at_step:{CASES[case]}"]) == -signal.SIGKILL
    ledger("F04", kills=1, in_save=0)
    assert_equal(finish(zygote, run), golden())
    from_zero = "the training starts at step 0 again" in log_of(run).read_text()
    assert from_zero == (case == "before the first save")


@pytest.mark.parametrize("seed", seeds(sample=0, full=4))
def test_f14_every_conversation_once_per_epoch_in_the_order_of_the_undisturbed_run(zygote, ledger, tmp_path, seed):
    draw = random.Random(f"F14-{seed}")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert zygote.run(whole, sabotage=[f"note_ids:{tmp_path}/whole.ids"]) == 0
    kills = sum(kill_at_random(zygote, run, draw, sabotage=[f"note_ids:{tmp_path}/run.ids"]) for _ in range(5))
    finish(zygote, run, sabotage=[f"note_ids:{tmp_path}/run.ids"])
    expected = dict(map(ast.literal_eval, (tmp_path / "whole.ids").read_text().splitlines()))
    # A step that was made twice, before the kill and after it, must have been the same step.
    found = list(map(ast.literal_eval, (tmp_path / "run.ids").read_text().splitlines()))
    assert all(expected[number] == ids for number, ids in found)
    assert {number for number, _ in found} == set(range(STEPS))
    # Inside a step conversations stand by length, so epochs are told apart by counts: none is ever two showings ahead.
    shown = Counter(dict.fromkeys(chain.from_iterable(expected.values()), 0))
    for number in range(STEPS):
        shown.update(expected[number])
        assert max(shown.values()) - min(shown.values()) <= 1
    ledger("F14", seed=seed, kills=kills, in_save=0)


@pytest.mark.parametrize("ablation", ["forget_optimizer", "forget_cursor"])
@pytest.mark.parametrize("seed", seeds(sample=1, full=6))
def test_without_optimiser_or_data_position_the_comparison_fails(zygote, golden, ledger, tmp_path, ablation, seed):
    """The experiment bites: what a resume restores is needed, and its absence is seen."""
    draw = random.Random(f"ablation-{seed}")
    run = tmp_path / "run"
    step = draw.randrange(SAVE_STEPS + 1, STEPS)
    assert zygote.run(run, sabotage=[f"die_at_step:{step}"]) == -signal.SIGKILL
    found = finish(zygote, run, sabotage=[ablation])
    ledger(f"ablation {ablation}", seed=seed, kills=1, in_save=0)
    assert diverges(found, golden())


@pytest.mark.parametrize("call", range(CALLS_IN_A_SAVE))
@pytest.mark.faults
def test_f18_retention_leaves_a_whole_checkpoint_wherever_it_is_cut_off(zygote, golden, ledger, tmp_path, call):
    """`save_total_limit=1` and the best step is not the last: killed around every deletion and rename."""
    run, settings = tmp_path / "run", ["training.save_total_limit=1"]
    number = 3 * CALLS_IN_A_SAVE + call
    assert zygote.run(run, settings=settings, sabotage=[f"die_in_save:{number}"]) == -signal.SIGKILL
    assert whole_checkpoints(run)
    assert find_damage(list_checkpoints(run / "checkpoints")[-1]) is None, "the newest is whole: nothing half is listed"
    ledger("F18", seed=call, kills=1, in_save=1)
    assert_equal(finish(zygote, run, settings=settings), golden(*settings))
