"""The compiled functions compute what torch computes, in bf16 to within its rounding, whatever the number of threads."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.nn import functional

from agentft.model.cpu import native
from agentft.model.cpu.native import load_kernels


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    built = load_kernels(str(tmp_path_factory.mktemp("cache")))
    if built is None:
        pytest.skip("no C compiler here: the compiled functions are not used either")
    return built


def _bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


def _close(actual: torch.Tensor, wanted: torch.Tensor, steps: float = 1.0) -> None:
    """Equal within `steps` of bf16's rounding (2^-8 of the number), against a reference in float64."""
    error = (actual.double() - wanted.double()).abs()
    assert (error <= steps * 2**-8 * wanted.double().abs() + 1e-6 * wanted.abs().max() + 1e-30).all(), error.max()


@pytest.mark.parametrize("width", [1, 7, 64, 576])
def test_rms_norm_and_its_gradient(kernels, width):
    torch.manual_seed(width)
    x, grad, weight = _bf16(11, width), _bf16(11, width), _bf16(width)
    wide = x.double().requires_grad_()
    rate = (wide.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    y, rates = kernels.rms_norm(x, weight, 1e-5)
    _close(y, wide * rate * weight.double(), 2)
    torch.testing.assert_close(rates.double(), rate.squeeze(-1), rtol=1e-5, atol=0)
    (wide * rate * weight.double()).backward(grad.double())
    error = (kernels.rms_norm_back(grad, x, weight, rates).double() - wide.grad).abs()
    assert error.max() <= 0.006 * wide.grad.abs().max() + 1e-4


def test_gated_silu_and_its_gradients_over_the_whole_range(kernels):
    gate = torch.cat([torch.linspace(-100, 100, 2001), torch.tensor([0.0, -0.0, 1e-30, 3e38, -3e38])]).bfloat16()[None]
    up, grad = _bf16(*gate.shape), _bf16(*gate.shape)
    wide, wide_up = gate.double().requires_grad_(), up.double().requires_grad_()
    y = functional.silu(wide) * wide_up
    y.backward(grad.double())
    _close(kernels.gated_silu(gate, up)[:, :-2], y[:, :-2], 1.1)
    grad_gate, grad_up = kernels.gated_silu_back(grad, gate, up)
    assert (grad_gate.double() - wide.grad)[:, :-2].abs().max() < 0.02
    _close(grad_up[:, :-2], wide_up.grad[:, :-2], 1.1)


@pytest.mark.parametrize(("batch", "groups", "heads", "angles"), [(1, 3, 3, 1), (2, 2, 1, 1), (2, 1, 4, 2)])
def test_rotation_equals_the_formula_and_its_transpose_is_its_gradient(kernels, batch, groups, heads, angles):
    torch.manual_seed(1)
    x = _bf16(batch, 5, groups, heads, 16)
    turn = torch.rand(angles, 5, 8) * 6
    cos, sin = (torch.cat([f(turn)] * 2, -1).bfloat16() for f in (torch.cos, torch.sin))
    wide = x.double().requires_grad_()
    half = torch.cat([-wide[..., 8:], wide[..., :8]], -1)
    wanted = 0.3 * (wide * cos.double()[:, :, None, None] + half * sin.double()[:, :, None, None])
    assert (kernels.rotate_in(x, cos, sin, 0.3).double() - wanted.transpose(1, 2)).abs().max() < 0.01
    grad = _bf16(batch, groups, 5, heads, 16)
    wanted.backward(grad.transpose(1, 2).double())
    assert (kernels.rotate_out(grad, cos, sin, 0.3).double() - wide.grad).abs().max() < 0.01


@pytest.mark.parametrize(("queries", "heads", "keys"), [(4, 1, 4), (3, 2, 10), (16, 3, 40)])
def test_causal_softmax_sees_no_key_after_its_query(kernels, queries, heads, keys):
    torch.manual_seed(keys)
    scores = 4 * _bf16(2, queries * heads, keys)
    last_seen = keys - queries + torch.arange(queries * heads) // heads
    hidden = torch.arange(keys)[None] > last_seen[:, None]
    wanted = scores.double().masked_fill(hidden, -torch.inf).softmax(-1)
    weights = kernels.causal_softmax_(scores.clone(), heads)
    assert not weights[hidden.expand_as(weights)].any()
    _close(weights, wanted, 1.1)
    grad = _bf16(2, queries * heads, keys)
    shared = (weights.double() * grad.double()).sum(-1, keepdim=True)
    wanted = weights.double() * (grad.double() - shared)
    assert (kernels.softmax_back_(grad, weights).double() - wanted).abs().max() < 0.01


@pytest.mark.parametrize("weighted", [True, False])
def test_cross_entropy_and_its_gradient(kernels, weighted):
    torch.manual_seed(2)
    logits, targets = 5 * _bf16(9, 301), torch.randint(0, 301, (9,))
    weights = torch.rand(9) if weighted else None
    wide = logits.double().requires_grad_()
    wanted = functional.cross_entropy(wide, targets, reduction="none") * (1 if weights is None else weights.double())
    wanted.sum().backward()
    losses = kernels.cross_entropy_(logits, targets, weights)
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    _close(logits, wide.grad, 1.1)


def test_accumulation_is_exact_and_stays_in_its_place(kernels):
    total, x = torch.zeros(3, 20, 4), _bf16(3, 6, 4)
    kernels.accumulate_(total, 5, x)
    kernels.accumulate_(total, 5, x)
    assert torch.equal(total[:, 5:11], 2 * x.float())
    assert not total[:, :5].any()
    assert not total[:, 11:].any()


def test_dropout_drops_its_share_anew_for_each_seed_and_alike_for_the_same(kernels):
    x = torch.ones(400, 300).bfloat16()
    first = kernels.dropout(x, 0.1, (1, 2))
    assert torch.equal(first, kernels.dropout(x, 0.1, (1, 2)))
    kept = [kernels.dropout(x, 0.1, seed).bool() for seed in ((1, 2), (2, 2), (1, 3), (2**32 - 1, 0))]
    for number, mask in enumerate(kept):
        assert mask.float().mean() == pytest.approx(0.9, abs=0.005)
        for rows_or_columns in (0, 1):
            spread = mask.float().mean(rows_or_columns).std() / (0.09 / mask.shape[rows_or_columns]) ** 0.5
            assert spread == pytest.approx(1.0, abs=0.2), "no stripes"
        for other in kept[:number]:
            assert (mask == other).float().mean() == pytest.approx(0.82, abs=0.01), "independent"
    assert torch.equal(kernels.dropout(x, 0.0, (1, 2)), x)


def test_what_is_not_finite_stays_so(kernels):
    """A fault must reach the check before the optimiser, never be clamped away."""
    bad = torch.tensor([[1.0, float("nan"), 2.0, 3.0]]).bfloat16()
    ones = torch.ones_like(bad)
    assert kernels.rms_norm(bad, ones[0], 1e-5)[0].isnan().all()
    assert kernels.gated_silu(bad, ones)[0, 1].isnan()
    assert kernels.causal_softmax_(bad.clone()[None], 1).isnan().any()
    assert kernels.cross_entropy_(bad.clone(), torch.tensor([0]), None).isnan().all()
    endless = torch.tensor([[1.0, float("inf")]]).bfloat16()
    assert not kernels.cross_entropy_(endless.clone(), torch.tensor([0]), None).isfinite().any()
    assert kernels.dropout(bad, 0.0, (1, 1))[0, 1].isnan()


def test_threads_change_no_bit(kernels):
    torch.manual_seed(3)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(4)
        x, y, w = _bf16(640, 96), _bf16(640, 96), _bf16(96)
        results.append([kernels.rms_norm(x, w, 1e-5)[0], kernels.gated_silu(x, y), kernels.dropout(x, 0.2, (1, 2))])
    torch.set_num_threads(before)
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


def test_without_a_compiler_torch_computes_and_the_log_says_so(monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    assert load_kernels(str(tmp_path)) is None
    assert "no C compiler" in caplog.text
    for compiler in ("/bin/false", str(tmp_path / "gone"), "gcc 'unclosed"):
        caplog.clear()
        monkeypatch.setenv("CC", compiler)
        assert load_kernels(str(tmp_path)) is None
        assert f"cannot be built with {compiler}" in caplog.text
    assert not list(tmp_path.rglob("*.so")), "half a build would be taken for a whole one"


def test_a_build_is_made_once(kernels, tmp_path, monkeypatch):
    assert load_kernels(str(tmp_path)) is not None
    monkeypatch.setattr(native, "_build", lambda *_: pytest.fail("built again"))
    assert load_kernels(str(tmp_path)) is not None


def test_the_compiler_may_be_named_with_a_wrapper_and_flags(kernels, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", f"env {shutil.which('cc') or shutil.which('gcc') or shutil.which('clang')} -O2")
    assert load_kernels(str(tmp_path)) is not None
