"""Fitting to `max_length`: what survives, what gives way, and that every outcome is accounted for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentft.data.config import LocalConfig, TooLong
from agentft.data.conversation import Conversation, Origin
from agentft.data.prepare import prepare_data
from agentft.data.prepared import write_manifest
from agentft.data.records import read_record
from agentft.data.template_choice import choose_template
from agentft.data.truncation import (
    MIN_OBSERVATION_CHARACTERS,
    Rendered,
    Rounds,
    TruncationKind,
    Truncator,
    shorten_observations,
)
from agentft.errors import DataError
from agentft.evaluation.steps import all_steps
from tests.examples import tokenize

SYSTEM = 'Tools:\n1. {"name": "look", "description": "d", "parameters": [{"name": "q", "required": true}]}'


def record(name: str, *rounds: tuple[str, list[int], str]) -> dict:
    """Rounds as (question, characters of each tool result, answer)."""
    turns = [{"from": "system", "value": SYSTEM}]
    for question, results, answer in rounds:
        value = ""
        for number, characters in enumerate(results):
            body = json.dumps({"api_name": "look", "parameters": {"q": f"{question} {number}"}})
            result = json.dumps({"r": "x" * characters})
            value += f"<|startofthink|>```JSON\n{body}\n```<|endofthink|>\n\n"
            value += f"<|startofexec|>```JSON\n{result}\n```<|endofexec|>\n"
        turns += [{"from": "user", "value": question}, {"from": "assistant", "value": value + answer}]
    return {"id": name, "conversations": turns}


def made(*rounds: tuple[str, list[int], str]) -> Conversation:
    outcome = read_record(record("c", *rounds), Origin("test", 1))
    assert isinstance(outcome, tuple)
    return outcome[0]


def fit(conversation, template, encoder, max_length, mode) -> Rendered:
    (fitted,) = Truncator(template, encoder, max_length).fit([(conversation, mode)])
    return fitted


def length(conversation, template, encoder) -> int:
    (example,) = tokenize([conversation], template, encoder)
    return len(example)


def texts(conversation: Conversation) -> list[str]:
    """Each step of the agent, as it was written."""
    return [conversation.messages[at].source_text.strip() for at in conversation.steps]


def labelled_steps(piece, tokenizer, template) -> list[str]:
    ids = piece.example.input_ids
    return [tokenizer.decode(ids[start : stop - 1], skip_special_tokens=False) for start, stop in piece.example.steps()]


def check_laws(fitted: Rendered, tokenizer, template, max_length: int, mode: TooLong) -> None:
    """Whatever was done to fit: these hold."""
    original = texts(fitted.conversation)
    kept: list[str] = []
    for piece in fitted.pieces:
        assert len(piece.example) <= max_length
        assert piece.example.spans, "a sample without a label never reaches training"
        assert piece.conversation.system == fitted.conversation.system
        kept += labelled_steps(piece, tokenizer, template)
        for message in piece.conversation.messages:
            assert message.role == "tool" or message in fitted.conversation.messages, "only results are ever cut"
    expected = [text for at, text in enumerate(original) if at not in fitted.steps_left_out]
    assert kept == expected, "every step is trained once and whole, or is listed as left out"
    if fitted.pieces and mode is TooLong.fit:
        questions = [
            [m for m in c.messages if m.role == "user"] for c in (fitted.pieces[-1].conversation, fitted.conversation)
        ]
        assert questions[0][-1] == questions[1][-1], "the current question survives"


def test_a_conversation_that_fits_is_left_alone(template, encoder):
    conversation = made(("a", [500], "b"))
    for mode in TooLong:
        fitted = fit(conversation, template, encoder, 2000, mode)
        assert (fitted.outcome, fitted.pieces[0].conversation) == (TruncationKind.whole, conversation)


def test_tool_results_are_shortened_first_and_visibly(template, encoder, byte_tokenizer):
    conversation = made(("first", [300], "one"), ("second", [3000, 150], "two"))
    fitted = fit(conversation, template, encoder, 2000, TooLong.fit)
    assert (fitted.outcome, fitted.shortened_observations, fitted.steps_left_out) == (TruncationKind.shortened, 1, ())
    observations = [
        message.source_text.strip() for message in fitted.pieces[0].conversation.messages if message.role == "tool"
    ]
    assert [source.count("characters left out") for source in observations] == [0, 1, 0]
    assert observations[1].startswith('<|startofexec|>```JSON\n{"r": "xxx')
    assert observations[1].endswith(" characters left out]\n```<|endofexec|>")
    shown, _, missing = observations[1].removeprefix("<|startofexec|>```JSON\n").partition("... [")
    assert len(shown) + int(missing.split()[0]) == len(json.dumps({"r": "x" * 3000}))
    assert 1950 < len(fitted.pieces[0].example) <= 2000, "no more is cut than has to be"
    check_laws(fitted, byte_tokenizer, template, 2000, TooLong.fit)


def test_then_the_oldest_rounds_go(template, encoder, byte_tokenizer):
    conversation = made(*((f"question {n} " + "w" * 300, [200], f"answer {n}") for n in range(6)))
    fitted = fit(conversation, template, encoder, 2000, TooLong.fit)
    assert fitted.outcome is TruncationKind.rounds_left_out
    (piece,) = fitted.pieces
    assert piece.conversation.id == "c"
    first = 6 - piece.conversation.rounds
    assert 0 < first < 6
    assert fitted.steps_left_out == tuple(range(2 * first))
    longer = shorten_observations(conversation, MIN_OBSERVATION_CHARACTERS)
    one_more = Rounds(longer).part("c", first - 1, 6)
    assert length(one_more, template, encoder) > 2000, "one more round would not fit"
    check_laws(fitted, byte_tokenizer, template, 2000, TooLong.fit)


def test_a_conversation_is_split_at_its_rounds_with_what_context_fits(template, encoder, byte_tokenizer):
    conversation = made(*((f"question {n} " + "w" * 300, [200], f"answer {n}") for n in range(5)))
    fitted = fit(conversation, template, encoder, 2500, TooLong.split)
    assert (fitted.outcome, fitted.steps_left_out, fitted.shortened_observations) == (TruncationKind.spread, (), 0)
    assert [piece.conversation.id for piece in fitted.pieces] == [f"c/part-{n + 1}" for n in range(len(fitted.pieces))]
    assert len(fitted.pieces) > 1
    assert fitted.pieces[-1].example.context_rounds > 0
    assert sum(p.conversation.rounds - p.example.context_rounds for p in fitted.pieces) == 5
    check_laws(fitted, byte_tokenizer, template, 2500, TooLong.split)


def test_pieces_say_whose_they_are(template, encoder):
    conversation = made(*((f"question {n} " + "w" * 300, [200], f"answer {n}") for n in range(6)))
    for mode, wholes in ((TooLong.split, {"c"}), (TooLong.fit, {None})):
        pieces = fit(conversation, template, encoder, 2000, mode).pieces
        assert {piece.conversation.piece_of for piece in pieces} == wholes
        steps = all_steps([p.conversation for p in pieces], [p.example for p in pieces], template)
        assert {(s.record("").conversation_id, s.record("").piece_of) for s in steps} == {
            (piece.conversation.id, *wholes) for piece in pieces
        }


def test_a_round_that_fits_nowhere_is_left_out_and_the_others_are_not(template, encoder, byte_tokenizer):
    conversation = made(("a", [], "b"), ("huge " * 500, [], "c"), ("d", [], "e"))
    fitted = fit(conversation, template, encoder, 500, TooLong.split)
    assert (fitted.outcome, fitted.steps_left_out) == (TruncationKind.spread, (1,))
    check_laws(fitted, byte_tokenizer, template, 500, TooLong.split)


def test_what_cannot_fit_is_set_aside_with_its_reason(template, encoder):
    conversation = made(("a", [], "b" * 600))
    for mode in TooLong:
        fitted = fit(conversation, template, encoder, 500, mode)
        assert (fitted.outcome, fitted.pieces, fitted.steps_left_out) == (TruncationKind.set_aside, (), (0,))
        assert fitted.problem is not None
        assert fitted.problem[0] == "too_long"


def test_a_short_result_is_never_shortened(template, encoder):
    conversation = made(("a" * 300, [MIN_OBSERVATION_CHARACTERS - 20], "b"))
    assert fit(conversation, template, encoder, 300, TooLong.fit).outcome is TruncationKind.set_aside
    assert shorten_observations(conversation, MIN_OBSERVATION_CHARACTERS) == conversation


ROUND = st.tuples(
    st.integers(1, 150).map("q".__mul__), st.lists(st.integers(0, 700), max_size=3), st.sampled_from(["yes", "n" * 120])
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(rounds=st.lists(ROUND, min_size=1, max_size=5), max_length=st.integers(200, 1500), mode=st.sampled_from(TooLong))
def test_laws_of_fitting(rounds, max_length, mode, template, encoder, byte_tokenizer):
    rounds = [(f"{number}{question}", *rest) for number, (question, *rest) in enumerate(rounds)]
    check_laws(fit(made(*rounds), template, encoder, max_length, mode), byte_tokenizer, template, max_length, mode)


@pytest.mark.parametrize("mode", list(TooLong))
def test_laws_hold_for_long_real_conversations(mode, shared_data: Path, template, encoder, byte_tokenizer):
    from agentft.data.sources import read_conversations, read_local

    talks = [c for c in read_conversations(read_local(shared_data / "dev.jsonl")) if isinstance(c, Conversation)]
    talks = sorted(talks, key=lambda talk: -sum(len(turn.text) for turn in talk.turns))[5:50]
    outcomes = []
    for fitted in Truncator(template, encoder, 6000).fit([(each, mode) for each in talks]):
        check_laws(fitted, byte_tokenizer, template, 6000, mode)
        outcomes.append(fitted.outcome)
    assert len(outcomes) == len(talks)
    assert len(set(outcomes)) > 1 or mode is TooLong.drop


def test_native_layouts_fit_by_the_same_structure(encoder, byte_tokenizer):
    native = choose_template("chatml", byte_tokenizer)
    conversation = made(*((f"question {n} " + "w" * 300, [900], f"answer {n}") for n in range(4)))
    for mode in (TooLong.fit, TooLong.split):
        fitted = fit(conversation, native, encoder, 2400, mode)
        assert fitted.pieces
        for piece in fitted.pieces:
            assert len(piece.example) <= 2400
            assert '"look"' in byte_tokenizer.decode(piece.example.input_ids)


# --- In a run ---


@pytest.fixture
def long_file(tmp_path: Path) -> Path:
    lines = [
        record(f"r{n}", *((f"question {n} {k} " + "w" * 200, [200], f"answer {k}") for k in range(5)))
        for n in range(12)
    ]
    lines += [record(f"s{n}", (f"short {n}", [20], "ok")) for n in range(12)]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def prepared(path: Path, template, encoder, **settings):
    config = LocalConfig(name="local", path=str(path), test_ratio=0.3, max_length=1500, max_rejected=1.0, **settings)
    return prepare_data(config, template, encoder)


def test_held_out_questions_are_asked_whatever_training_leaves_out(long_file, template, encoder):
    data = prepared(long_file, template, encoder, too_long=TooLong.fit)
    steps = all_steps(data.heldout, data.heldout_examples, template)
    left_out = sum(len(c["steps_left_out"]) for c in data.stats.changed if c["part"] == "heldout")
    assert left_out == 0
    long, short = (
        sum(c.id.startswith(x) and (c.id.endswith("/part-1") or x == "s") for c in data.heldout) for x in "rs"
    )
    assert long > 0
    assert len(steps) == 10 * long + 2 * short
    assert len({(step.conversation.id, step.index) for step in steps}) == len(steps)


def test_the_manifest_counts_and_lists_every_outcome(long_file, template, encoder, tmp_path):
    from agentft.runs import RunFolder, read_json

    for mode in TooLong:
        data = prepared(long_file, template, encoder, too_long=mode)
        with RunFolder.create(tmp_path / mode.name) as run:
            write_manifest(data, run)
            manifest = read_json(run.data_manifest)
        outcomes = manifest["fitting"]["outcomes"]
        assert sum(sum(part.values()) for part in outcomes.values()) == 24
        changed = manifest["fitting"]["changed"]
        assert len(changed) == sum(n for part in outcomes.values() for name, n in part.items() if name != "whole") == 12
        assert manifest["train"]["examples"] == len(data.train)
        if mode is TooLong.drop:
            assert manifest["set_aside"] == {"too_long": 12}
            assert all(len(change["steps_left_out"]) == 10 for change in changed)


def test_too_many_losses_stop_the_run(long_file, template, encoder):
    config = LocalConfig(name="local", path=str(long_file), test_ratio=0.3, max_length=1500, too_long=TooLong.drop)
    with pytest.raises(DataError, match="too_long"):
        prepare_data(config, template, encoder)
