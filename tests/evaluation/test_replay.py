"""A replay follows the record exactly as long as the calls match, with the model's own words in its history."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from agentft.data.conversation import Origin
from agentft.data.records import read_record
from agentft.data.template_choice import choose_template
from agentft.data.tokens import SegmentEncoder
from agentft.data.truncation import make_examples
from agentft.evaluation.generate import Completion
from agentft.evaluation.replay import is_replayable, own_words, replay, replay_report, with_replies
from agentft.evaluation.steps import all_steps, conversation_steps
from agentft.model.sources import byte_tokenizer
from tests.data.test_chat_template_layout import layout_of
from tests.examples import tokenize


class Scripted:
    """Answers the reference, or what `said` has for a step, and remembers what was asked."""

    def __init__(self, said=None):
        self.said = said or {}
        self.asked = []

    def generate(self, steps, on_completion=None):
        self.asked += steps
        names = [step.conversation.piece_of or step.conversation.id for step in steps]
        return [
            Completion(step, self.said.get((name, step.index), step.reference), 1, "stop")
            for name, step in zip(names, steps, strict=True)
        ]


def call(name, **parameters):
    body = json.dumps({"api_name": name, "parameters": parameters})
    return f"<|startofthink|>```JSON\n{body}\n```<|endofthink|>"


def conversation(name="c"):
    result = '<|startofexec|>```JSON\n{"ok": 1}\n```<|endofexec|>'
    turns = [
        ("system", "You may call tools."),
        ("user", "Weather in Rome, then Oslo?"),
        (
            "assistant",
            f"{call('weather', city='Rome')}\n\n{result}\nNow Oslo.\n{call('weather', city='Oslo')}\n{result}\nSunny.",
        ),
        ("user", "Thanks. And the news?"),
        ("assistant", f"{call('news')}{result}\n Nothing new. "),
    ]
    record = {"id": name, "conversations": [{"from": role, "value": value} for role, value in turns]}
    found = read_record(record, Origin("x", 1))
    assert isinstance(found, tuple), found
    return found[0]


@pytest.fixture(scope="module")
def replayable(golden_conversations):
    return [each for each in golden_conversations.values() if is_replayable(each)]


def test_a_perfect_model_sees_the_contexts_of_teacher_forcing_and_succeeds(replayable, template, encoder):
    assert len(replayable) > 5
    model = Scripted()
    steps = all_steps(replayable, list(tokenize(replayable, template, encoder)), template)
    episodes = replay(steps, template, encoder, model)
    key = {(step.conversation.id, step.index): step.context_hash for step in steps}
    assert {(step.conversation.id, step.index): step.context_hash for step in model.asked} == key
    assert all(episode.diverged is None for episode in episodes)
    report = replay_report(episodes, len(replayable), bootstrap_samples=50, seed=0)
    assert report["metrics"]["conv_replay_success"]["value"] == 1
    assert report["metrics"]["steps_until_divergence"]["numerator"] == len(steps) == report["counts"]["steps_asked"]


def steps_of(conversations, template, encoder):
    """All their steps, as teacher forcing asks them."""
    pieces = (piece for made in make_examples(conversations, template, encoder) for piece in made.pieces)
    return [step for each in pieces for step in conversation_steps(each.conversation, each.example, template)]


def test_a_step_knows_its_message(golden_conversations, template, encoder):
    conversations = list(golden_conversations.values())
    steps = all_steps(conversations, list(tokenize(conversations, template, encoder)), template)
    for step in steps:
        assert step.message is step.conversation.messages[step.at]
        assert step.message.source_text.strip() == step.reference


def test_replacing_every_step_by_itself_changes_nothing(golden_conversations, template):
    for each in golden_conversations.values():
        own = [each.messages[at].source_text.strip() for at in each.steps]
        again = with_replies(each, each.steps, own)
        assert again.turns == each.turns
        assert template.render(again) == template.render(each)


def test_own_words_stay_in_the_history_and_recorded_results_follow(template, encoder, byte_tokenizer):
    said = {
        ("c", 0): 'I look.<|startofthink|>{"parameters": {"city": "Rome"}, "api_name": "weather"}<|endofthink|>'
        "<|startofexec|>an invented result",
        ("c", 2): "It rains, I made that up.",
    }
    model = Scripted(said)
    (episode,) = replay(steps_of([conversation()], template, encoder), template, encoder, model)
    assert episode.diverged is None
    assert episode.steps_until_divergence == 5
    last = model.asked[-1]
    text = byte_tokenizer.decode(last.input_ids[: last.start])
    assert 'I look.<|startofthink|>{"parameters"' in text
    assert "invented result" not in text
    assert "It rains, I made that up." in text
    assert "Sunny." not in text
    assert text.count("<|startofexec|>") == 3


@pytest.mark.parametrize(
    ("step", "text", "why"),
    [
        (0, call("weather", city="Oslo"), "wrong_value"),
        (0, call("weather", city="Rome") + call("news"), "extra_call"),
        (1, "I give up.", "missed_call"),
        (2, call("weather", city="Rome"), "spurious_call"),
        (2, " ", "nothing_said"),
        (3, '<|startofthink|>{"api_name": "news"', "malformed"),
    ],
)
def test_an_episode_ends_where_the_record_cannot_answer(step, text, why, template, encoder):
    model = Scripted({("c", step): text})
    (episode,) = replay(steps_of([conversation()], template, encoder), template, encoder, model)
    assert why in episode.diverged.split()
    assert episode.steps_until_divergence == step
    assert len(model.asked) == step + 1
    report = replay_report([episode], 1, bootstrap_samples=20, seed=0)
    assert report["metrics"]["conv_replay_success"]["value"] == 0
    assert report["diverged_at_step"] == {str(step): 1}


def test_conversations_are_independent_and_the_means_are_over_conversations(template, encoder):
    conversations = [conversation(name) for name in "abcd"]
    model = Scripted({("b", 1): "no", ("c", 3): "no"})
    episodes = replay(steps_of(conversations, template, encoder), template, encoder, model)
    report = replay_report(episodes, 6, bootstrap_samples=200, seed=0)
    metric = report["metrics"]["steps_until_divergence"]
    assert (metric["numerator"], metric["denominator"]) == (5 + 1 + 3 + 5, 4)
    success = report["metrics"]["conv_replay_success"]
    assert (success["numerator"], success["denominator"]) == (2, 4)
    assert success["low"] < 0.5 < success["high"]
    assert report["counts"]["conversations_without_readable_calls"] == 2
    assert "|replay|" in report["signature"]


def test_rounds_that_are_only_shown_are_not_asked(template, encoder):
    each = conversation()
    model = Scripted()
    (piece,) = tokenize([each], template, encoder, context_rounds=1)
    (episode,) = replay(conversation_steps(each, piece, template), template, encoder, model)
    assert episode.diverged is None
    assert [(step.index, step.reference) for step in model.asked] == [(0, call("news")), (1, "Nothing new.")]
    (example,) = tokenize([each], template, encoder)
    contexts = [step.context_hash for step in conversation_steps(each, example, template)]
    assert [step.context_hash for step in model.asked] == contexts[3:]


def test_a_native_layout_is_replayed_in_its_own_form(encoder, byte_tokenizer):
    template = choose_template("chatml", byte_tokenizer)
    said = {
        ("c", 0): '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>',
        ("c", 2): "Models write <think> and <tool_call",
    }
    (episode,) = replay(steps_of([conversation()], template, encoder), template, encoder, Scripted(said))
    assert episode.diverged is None, "letters that look like a mark are letters in the history"
    assert episode.words[0] == call("weather", city="Rome")
    assert episode.words[2] == "Models write <think> and <tool_call"


@pytest.mark.parametrize("name", ["msagent", "qwen3"])
def test_what_the_model_thought_stays_in_the_history_as_its_layout_writes_it(name: str):
    """Qwen3's own keeps the thoughts since the last question."""
    template = layout_of("qwen3", "bytes") if name == "qwen3" else choose_template("msagent", byte_tokenizer())
    tokenizer = template.template.tokenizer if name == "qwen3" else byte_tokenizer()
    talk = conversation()
    messages = tuple(
        replace(m, reasoning_content="As recorded.") if m.role == "assistant" else m for m in talk.messages
    )
    weather = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    said = weather if name == "qwen3" else call("weather", city="Rome")
    model = Scripted({("c", 0): f"<think>\nRome first.\n</think>\n\n{said}"})
    encoder = SegmentEncoder(tokenizer)
    episode, *_ = replay(steps_of([replace(talk, messages=messages)], template, encoder), template, encoder, model)
    assert episode.thoughts[0] == "Rome first."
    second = next(step for step in model.asked if step.index == 1)
    prompt = tokenizer.decode(second.input_ids[: second.start])
    assert "<think>\nRome first.\n</think>" in prompt
    assert "As recorded." not in prompt


def test_without_any_call_there_is_nothing_to_replay():
    report = replay_report([], 3, bootstrap_samples=20, seed=0)
    assert report["metrics"]["conv_replay_success"]["value"] is None


def test_words_for_others_are_cut():
    assert own_words("a b <|startofexec|>x") == "a b"
    assert own_words("a</s>") == "a"
    assert own_words("a</s>b") == "a</s>b"
    assert own_words("a<|user|>:b") == "a"
