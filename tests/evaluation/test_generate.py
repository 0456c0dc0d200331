"""Answers from shared prefixes and batch equal answers from plain greedy generation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from agentft.data.conversation import Origin
from agentft.data.records import read_record
from agentft.errors import EvaluationError
from agentft.evaluation.generate import GreedyGenerator
from agentft.evaluation.steps import all_steps, conversation_steps, score_step
from agentft.model import attention
from tests.examples import tokenize


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


def _answers(model, byte_tokenizer, steps, batch, new=12, speculation=16):
    stop = byte_tokenizer.eos_token_id
    generator = GreedyGenerator(
        model, byte_tokenizer, stop_ids=[stop], batch=batch, max_new_tokens=new, speculation=speculation
    )
    return generator.generate(steps)


def _assert_plain(model, byte_tokenizer, steps, answers, new):
    for step, answer in zip(steps, answers, strict=True):
        prompt = torch.from_numpy(step.input_ids[: step.start].astype("int64"))[None]
        plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new)
        new_ids = plain[0, step.start :].tolist()
        if new_ids[-1] == byte_tokenizer.eos_token_id:
            new_ids = new_ids[:-1]
        assert answer.text == byte_tokenizer.decode(new_ids)


@pytest.mark.parametrize("speculation", [0, 16])
def test_each_answer_equals_plain_greedy_generation(model, byte_tokenizer, steps, speculation):
    answers = _answers(model, byte_tokenizer, steps, batch=4, speculation=speculation)
    assert len(steps) > 15
    _assert_plain(model, byte_tokenizer, steps, answers, 12)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Mistral"])
def test_other_families_are_answered_as_by_plain_generation(family, byte_tokenizer, steps):
    """Biases, normed queries, a sliding window shorter than the context."""
    import transformers

    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(byte_tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        initializer_range=0.4,
        eos_token_id=byte_tokenizer.eos_token_id,
        **({"sliding_window": 100} if family == "Mistral" else {}),
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    few = steps[:6]
    _assert_plain(model, byte_tokenizer, few, _answers(model, byte_tokenizer, few, batch=3, new=24), 24)


def test_answers_depend_neither_on_the_number_of_slots_nor_on_guesses(model, byte_tokenizer, steps):
    """Batch 1 equals batch 8 token for token in fp32, with guesses and without."""
    ways = [(1, 0), (8, 0), (1, 16), (8, 16), (8, 3)]
    first, *others = (
        [answer.text for answer in _answers(model, byte_tokenizer, steps, batch, new=40, speculation=speculation)]
        for batch, speculation in ways
    )
    for way, texts in zip(ways[1:], others, strict=True):
        assert texts == first, way


def test_guesses_are_checked_and_save_passes(model, byte_tokenizer, steps):
    work = {}
    for speculation in (0, 16):
        stop = byte_tokenizer.eos_token_id
        generator = GreedyGenerator(
            model, byte_tokenizer, stop_ids=[stop], batch=4, max_new_tokens=40, speculation=speculation
        )
        generator.generate(steps)
        work[speculation] = generator.counts
    assert work[0]["drafted"] == 0
    assert 0 < work[16]["accepted"] < work[16]["drafted"], "some guesses are wrong, and it does not matter"
    assert work[16]["passes"] < work[0]["passes"]


def test_what_a_conversation_shares_is_computed_once(model, byte_tokenizer, steps):
    generator = GreedyGenerator(
        model, byte_tokenizer, stop_ids=[byte_tokenizer.eos_token_id], batch=2, max_new_tokens=1
    )
    generator.generate(steps)
    contexts = {}
    for step in steps:
        contexts[step.conversation.id] = max(contexts.get(step.conversation.id, 0), step.start)
    assert generator.counts["prompt_tokens"] < sum(contexts.values()), "and so is what conversations share"


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("position", "length"), [(0, 1), (0, 300), (5, 1), (130, 9), (250, 50)])
def test_both_attention_kernels_equal_the_definition(position, length, window):
    torch.manual_seed(0)
    query = torch.randn(6, length, 16)
    keys, values = torch.randn(2, 2, 320, 16)
    seen = [[max(0, p - window + 1) if window else 0, p + 1] for p in range(position, position + length)]
    expected = torch.empty_like(query)
    for head in range(6):
        for row, (first, last) in enumerate(seen):
            weights = torch.softmax(0.3 * keys[head // 3, first:last].double() @ query[head, row].double(), 0)
            expected[head, row] = weights @ values[head // 3, first:last].double()
    for kernel in (attention._attend_by_products, attention._attend_fused):
        found = kernel(query, keys, values, position, 0.3, window)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_a_model_with_attention_of_its_own_is_refused_and_no_model_is_left_changed(model, byte_tokenizer, steps):
    before = model.config._attn_implementation

    class Foreign(torch.nn.Module):
        config = model.config

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, **_):
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 5))

    with pytest.raises(EvaluationError, match=r"attention in a way of its own in 2 of 2 layers.*engine=openai"):
        _answers(Foreign(), byte_tokenizer, steps[:1], batch=1)
    assert model.config._attn_implementation == before
    _answers(model, byte_tokenizer, steps[:1], batch=1)
    assert model.config._attn_implementation == before


def test_answers_come_in_the_order_of_the_steps_and_each_is_reported_once(model, byte_tokenizer, steps):
    heard = []
    generator = GreedyGenerator(
        model, byte_tokenizer, stop_ids=[byte_tokenizer.eos_token_id], batch=3, max_new_tokens=4
    )
    answers = generator.generate(steps, heard.append)
    assert [a.step for a in answers] == list(steps)
    assert sorted(id(a) for a in heard) == sorted(id(a) for a in answers)


def test_references_are_what_is_trained(steps, byte_tokenizer):
    """One mask law: the reference text of a step is the labelled text without its stop."""
    for step in steps:
        ids = step.input_ids[step.start : step.stop - 1]
        assert byte_tokenizer.decode(ids) == step.reference


def test_an_argument_may_name_the_end_of_a_sequence(template, encoder, byte_tokenizer):
    call = '<|startofthink|>```JSON\n{"api_name": "explain", "parameters": {"token": "<|im_end|>"}}\n```<|endofthink|>'
    turns = [("user", "What is <|im_end|>?"), ("assistant", f"{call}\n\n<|startofexec|>{{}}<|endofexec|>\nA stop.")]
    rows = {"id": "c", "conversations": [{"from": who, "value": said} for who, said in turns]}
    conversation = read_record(rows, Origin("x", 1))[0]
    (example,) = tokenize([conversation], template, encoder)
    steps = conversation_steps(conversation, example, template)
    said = byte_tokenizer.decode(steps[0].input_ids[steps[0].start : steps[0].stop - 1].tolist())
    score = score_step(steps[0].record(said))
    assert (score.reference_failure, score.attempts, score.exact) == (None, 1, 1)


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

    @property
    def config(self):
        return self.model.config

    def forward(self, *, input_ids, logits_to_keep, **kwargs):
        output = self.model(input_ids=input_ids, logits_to_keep=logits_to_keep, **kwargs)
        following = {**dict(zip(self.ids, self.ids[1:], strict=False)), self.ids[-1]: self.ids[-1]}
        asked = input_ids[0, logits_to_keep].tolist()
        wanted = torch.tensor([[following.get(token, self.ids[0]) for token in asked]])
        output.logits = torch.nn.functional.one_hot(wanted, output.logits.shape[-1]).float()
        return output


def test_an_invented_tool_result_ends_the_answer(model, byte_tokenizer, steps):
    text = "abc<|startofexec|>"
    ids = byte_tokenizer(text).input_ids
    assert len(set(ids)) < len(ids)
    letters = byte_tokenizer("qz").input_ids
    answers = _answers(_Scripted(model, letters), byte_tokenizer, steps[:2], batch=2, new=5)
    assert {a.finish for a in answers} == {"length"}
    assert {a.text for a in answers} == {"qzzzz"}
    stop = byte_tokenizer.eos_token_id
    answers = _answers(_Scripted(model, [*letters, stop]), byte_tokenizer, steps[:2], batch=2, new=5)
    assert {(a.finish, a.text) for a in answers} == {("stop", "qz")}
