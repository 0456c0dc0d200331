"""What a person sees of a training adds up."""

from __future__ import annotations

import pytest

from agentft.training.loop import Clock, Totals, _bar_words, describe_seconds


def test_the_words_beside_the_bar_are_of_this_process_alone():
    seconds = {"data": 1.0, "forward": 2.0, "backward": 4.0, "optimiser": 1.0, "evaluation": 90.0, "saving": 5.0}
    of_process, step = Totals(), Totals(loss=2.46912, weight=2.0, tokens=600, targets=120, positions=800)
    of_process.add(step)
    of_process.add(Totals(tokens=200, targets=80, positions=200))
    assert _bar_words(of_process, seconds, step, 2_500_000_000) == {
        "loss": "loss 1.235",
        "speed": "100 tokens/s",
        "labelled": "25% labelled",
        "padding": "20% padding",
        "memory": "2.5 GB",
    }


def test_nothing_done_is_no_division_by_zero():
    assert _bar_words(Totals(), {}, Totals(), 0)["speed"] == "0 tokens/s"


def test_every_phase_is_charged_even_when_it_fails():
    clock = Clock()
    with pytest.raises(ValueError, match="on purpose"), clock.phase("data"):
        raise ValueError("on purpose")
    with clock.phase("data"), clock.phase("forward"):
        pass
    assert set(clock.seconds) == {"data", "forward"}
    clock.seconds = {"forward": 1.0, "backward": 3.0}
    assert describe_seconds(clock.seconds) == "backward 3.0 s (75%), forward 1.0 s (25%)"
