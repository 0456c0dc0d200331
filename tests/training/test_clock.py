"""What a person sees of a training adds up."""

from __future__ import annotations

import pytest

from agentft.training.clock import Clock, Meter, describe_seconds


def test_the_words_beside_the_bar_are_of_this_process_alone():
    clock, meter = Clock(), Meter()
    clock.seconds = {"data": 1.0, "forward": 2.0, "backward": 4.0, "optimiser": 1.0, "evaluation": 90.0, "saving": 5.0}
    meter.add(tokens=600, targets=120, positions=800)
    meter.add(tokens=200, targets=80, positions=200)
    assert meter.words(clock, 1.23456, 2_500_000_000) == {
        "loss": "loss 1.235",
        "speed": "100 tokens/s",
        "labelled": "25% labelled",
        "padding": "20% padding",
        "memory": "2.5 GB",
    }


def test_nothing_done_is_no_division_by_zero():
    assert Meter().words(Clock(), 0.0, 0)["speed"] == "0 tokens/s"


def test_every_phase_is_charged_even_when_it_fails():
    clock = Clock()
    with pytest.raises(ValueError, match="on purpose"), clock.phase("data"):
        raise ValueError("on purpose")
    with clock.phase("data"), clock.phase("forward"):
        pass
    assert set(clock.seconds) == {"data", "forward"}
    clock.seconds = {"forward": 1.0, "backward": 3.0}
    assert describe_seconds(clock.seconds) == "backward 3.0 s (75%), forward 1.0 s (25%)"
