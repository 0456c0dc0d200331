"""One probe before training: what a model does not say as transformers' own code says it is left to that code, or refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from agentft.data.batches import collate, collate_packed
from agentft.errors import ModelError
from agentft.evaluation.generate import StockGenerator, greedy_ids
from agentft.evaluation.likelihood import measure_likelihood
from agentft.evaluation.steps import all_steps
from agentft.model import attention as tiled
from agentft.model.attention import take_attention
from agentft.model.labelled_loss import LabelledLoss
from agentft.recipes.probe import Probe, ask_stock
from benchmarks import architectures
from tests.examples import tokenize


@pytest.fixture(scope="module", autouse=True)
def _tiled_attention():
    tiled.register()


@pytest.fixture(scope="module")
def examples(golden_conversations, template, encoder):
    return list(tokenize(list(golden_conversations.values())[:3], template, encoder))


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("kind", "dtype", "left"),
    [
        ("llama", BF16, {}),
        ("qwen2", BF16, {}),
        ("qwen3", FP32, {}),
        ("granite", BF16, {"stock_logits": True}),
        ("cohere", FP32, {"stock_logits": True}),
        ("gemma2", FP32, {"attention": "eager", "stock_logits": True, "stock_answers": True}),
        ("bloom", BF16, {"attention": "eager", "leak": True, "stock_answers": True}),
        ("gptj", BF16, {"attention": "eager", "stock_answers": True}),
        ("lfm2", FP32, {"leak": True, "stock_answers": True}),
        ("opt", FP32, {"leak": True}),
        ("gpt_oss", BF16, {"attention": "eager", "leak": True, "stock_answers": True}),
        ("falcon_h1", FP32, {"stock_logits": True, "leak": True, "stock_answers": True}),
    ],
)
def test_what_differs_is_left_to_transformers(kind, dtype, left):
    ways = architectures.try_one(kind, dtype)
    asked = tiled.TILED if dtype is BF16 else "sdpa"
    found = (ways.attention, ways.stock_logits, ways.leak is not None, ways.stock_answers)
    wanted = {"attention": asked, "stock_logits": False, "leak": False, "stock_answers": False} | left
    assert found == tuple(wanted.values()), ways.left
    assert bool(ways.left) == bool(left)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_architecture_of_transformers_trains_on_another_loss_than_its_own():
    """Of each that is not refused, the loss by the ways taken is the cross-entropy of the stock logits."""
    found = {kind: architectures.row(kind)[0] for kind in architectures.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    assert {found[kind] for kind in ("llama", "qwen2", "qwen3", "mistral", "smollm3")} == {"held"}
    assert sum(verdict in ("held", "fell back") for verdict in found.values()) > 100, found


def test_the_loss_of_a_model_that_scales_its_logits_is_that_of_its_own_logits(examples):
    model = architectures.small_model("granite", FP32)
    examples = [replace(each, input_ids=each.input_ids % 128) for each in examples]
    wanted = 0.0
    for example in examples:
        batch = collate([example], 0)
        logits = model(input_ids=batch.input_ids_BT).logits[0, :-1]
        wanted += functional.cross_entropy(logits, batch.labels_BT[0, 1:], reduction="sum")
    objective = LabelledLoss(model, stock_logits=True)
    for batch in (collate(examples, 0), collate_packed(examples)):
        torch.testing.assert_close(objective(batch), wanted, rtol=1e-4, atol=1e-3)
        assert abs(LabelledLoss(model)(batch) - wanted) > 0.1 * wanted, "granite no longer scales: say so in the docs"
    targets = sum(each.trained_tokens for each in examples)
    measured = measure_likelihood(model, examples, batch=2, pad_id=0, stock=True)
    assert measured.loss * targets == pytest.approx(float(wanted.detach()), rel=1e-4)
    objective(collate(examples, 0)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_an_attention_that_was_asked_for_is_not_replaced_in_silence():
    model = architectures.small_model("gpt_oss", BF16)
    with pytest.raises(
        ModelError, match=r"model.attention: with agentft_tiled GptOssForCausalLM .* model.attention=auto"
    ):
        Probe(ask_stock(model, pad_id=0), LabelledLoss(model), 0).run(tiled.TILED, asked=True)
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        take_attention(model, tiled.TILED)


def test_a_model_that_sees_the_future_is_refused():
    """BERT as its checkpoints come is no decoder: each position sees all of them."""
    assert "changing the last token moves" in architectures.try_one("bert", FP32)


def test_a_faulty_kernel_of_ours_is_found_and_refused(monkeypatch):
    """Attention falls back to torch's; a loss that is off in our own code is not trained on."""
    model = architectures.small_model("llama", BF16)
    stock = ask_stock(model, pad_id=0)
    monkeypatch.setattr(torch.Tensor, "masked_fill_", lambda self, *_: self)
    ways = Probe(stock, LabelledLoss(model), 0).run(tiled.TILED, asked=False)
    assert ways.attention == "sdpa"
    assert "changing the last token moves earlier logits" in ways.left[0]
    monkeypatch.undo()
    monkeypatch.setattr("agentft.model.labelled_loss._summed", lambda logits, targets, weights: logits.float().sum())
    with pytest.raises(ModelError, match="the loss is not that of transformers' own logits"):
        Probe(stock, LabelledLoss(model), 0).run(tiled.TILED, asked=False)


def test_the_probe_leaves_model_and_random_streams_as_they_were():
    model = architectures.small_model("llama", FP32).train()
    take_attention(model, "sdpa")
    weights = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    Probe(ask_stock(model, pad_id=0), LabelledLoss(model), 0).run("sdpa", asked=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in model.named_parameters())


def test_answers_by_generate_end_where_ours_end(golden_conversations, template, encoder, byte_tokenizer):
    """A step at a time, at our stop token, whatever the model's own settings of generation say."""
    conversations = list(golden_conversations.values())[:2]
    steps = all_steps(conversations, list(tokenize(conversations, template, encoder)), template)
    model = architectures.small_model("lfm2", FP32)
    model.resize_token_embeddings(len(byte_tokenizer))
    model.generation_config.update(repetition_penalty=1.7, do_sample=True, eos_token_id=list(range(300)))
    before, heard = model.generation_config, []
    short = [replace(step, start=min(step.start, 60)) for step in steps]
    plain = [greedy_ids(model, step.input_ids[: step.start].tolist(), 6) for step in short]
    assert all(len(ids) == 6 for ids in plain)
    generator = StockGenerator(model, byte_tokenizer, stop_ids=[plain[0][2]], max_new_tokens=6)
    answers = generator.generate(short, heard.append)
    assert model.generation_config is before
    assert (answers[0].finish, answers[0].tokens) == ("stop", plain[0].index(plain[0][2]) + 1)
    assert heard == answers
    with torch.no_grad():
        ids = short[0].input_ids[: short[0].start].tolist()
        for token in plain[0]:
            assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_logits_of_the_forward_pass_are_taken_where_it_cannot_be_told_which():
    from agentft.model.labelled_loss import stock_logits

    model = architectures.small_model("llama", FP32)

    def forward(input_ids, use_cache):
        return SimpleNamespace(logits=type(model).forward(model, input_ids=input_ids, use_cache=use_cache).logits)

    ids, at = torch.arange(24).view(2, 12), torch.tensor([3, 4, 15, 20])
    kept = stock_logits(model, ids, at)
    model.forward = forward
    torch.testing.assert_close(kept, stock_logits(model, ids, at))
