"""Answers from shared prefixes and slots equal answers from plain greedy generation."""

from __future__ import annotations

import pytest
import torch

from agentft.data.tokens import tokenize
from agentft.evaluation.generate import GreedyGenerator
from agentft.evaluation.steps import all_steps


@pytest.fixture(scope="module")
def steps(golden_conversations, template, encoder):
    conversations = list(golden_conversations.values())
    return all_steps(conversations, list(tokenize(conversations, template, encoder)), template)


@pytest.fixture(scope="module")
def model(byte_tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.4,  # spread logits: a flat model ties everywhere
        eos_token_id=byte_tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


def _answers(model, byte_tokenizer, steps, slots, new=12):
    stop = byte_tokenizer.eos_token_id
    return GreedyGenerator(model, byte_tokenizer, stop_id=stop, slots=slots, max_new_tokens=new).answer(steps)


def test_each_answer_equals_plain_greedy_generation(model, byte_tokenizer, steps):
    answers = _answers(model, byte_tokenizer, steps, slots=4)
    assert len(steps) > 15
    for step, answer in zip(steps, answers, strict=True):
        prompt = torch.from_numpy(step.input_ids[: step.start].astype("int64"))[None]
        plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12)
        new_ids = plain[0, step.start :].tolist()
        if new_ids[-1] == byte_tokenizer.eos_token_id:
            new_ids = new_ids[:-1]
        assert answer.text == byte_tokenizer.decode(new_ids)


def test_answers_do_not_depend_on_the_number_of_slots(model, byte_tokenizer, steps):
    one, eight = (_answers(model, byte_tokenizer, steps, slots) for slots in (1, 8))
    assert [a.text for a in one] == [a.text for a in eight]


def test_answers_come_in_the_order_of_the_steps_and_each_is_reported_once(model, byte_tokenizer, steps):
    heard = []
    generator = GreedyGenerator(model, byte_tokenizer, stop_id=byte_tokenizer.eos_token_id, slots=3, max_new_tokens=4)
    answers = generator.answer(steps, heard.append)
    assert [a.step for a in answers] == list(steps)
    assert sorted(id(a) for a in heard) == sorted(id(a) for a in answers)


def test_references_are_what_is_trained(steps, byte_tokenizer):
    """One mask law: the reference text of a step is the labelled text without its stop."""
    for step in steps:
        ids = step.input_ids[step.start : step.stop - 1]
        assert byte_tokenizer.decode(ids) == step.reference


def test_a_context_never_holds_its_own_target(steps, byte_tokenizer):
    for step in steps:
        context = byte_tokenizer.decode(step.input_ids[: step.start], skip_special_tokens=False)
        assert not context.endswith(step.reference)
        earlier = [s for s in steps if s.conversation is step.conversation and s.index < step.index]
        for other in earlier:
            assert other.reference in context, "a context holds all earlier references"


class _Scripted(torch.nn.Module):
    """Stands where a model would and always says the same text: what the stopping rules see is then exact."""

    def __init__(self, model, ids):
        super().__init__()
        self.model = model
        self.ids = ids

    def forward(self, *, input_ids, position_ids=None, **kwargs):
        output = self.model(input_ids=input_ids, position_ids=position_ids, **kwargs)
        if position_ids is None:
            wanted = torch.full(output.logits.shape[:2], self.ids[0])
        else:
            following = dict(zip(self.ids, self.ids[1:], strict=False))
            wanted = torch.tensor([[following.get(int(row[-1]), self.ids[-1])] for row in input_ids])
        output.logits = torch.nn.functional.one_hot(wanted, output.logits.shape[-1]).float()
        return output


def test_an_invented_tool_result_ends_the_answer(model, byte_tokenizer, steps):
    text = "abc<|startofexec|>"
    ids = byte_tokenizer(text).input_ids
    assert len(set(ids)) < len(ids)
    letters = byte_tokenizer("qz").input_ids
    answers = _answers(_Scripted(model, letters), byte_tokenizer, steps[:2], slots=2, new=5)
    assert {a.finish for a in answers} == {"length"}
    assert {a.text for a in answers} == {"qzzzz"}
    stop = byte_tokenizer.eos_token_id
    answers = _answers(_Scripted(model, [*letters, stop]), byte_tokenizer, steps[:2], slots=2, new=5)
    assert {(a.finish, a.text) for a in answers} == {("stop", "qz")}
