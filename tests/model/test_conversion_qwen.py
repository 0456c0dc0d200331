"""Old checkpoints, converted, compute what the original did.

The reference forward pass below is written from the description of the first-generation Qwen architecture.
Axes: B batch, T positions, H heads, D head width, C width.
"""

import json
import math
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

from agentft.errors import ModelError
from agentft.model import conversion, shards
from agentft.model.config import ModelConfig, ModelSource
from agentft.model.load import load_tokenizer
from agentft.model.sources import locate_model
from tests.model.test_conversion_qwen_tokenizer import small_ranks, write_ranks

State = dict[str, torch.Tensor]


def old_settings(**changes: Any) -> dict[str, Any]:
    """A config.json as the 2023 releases spelt it, small."""
    return {
        "model_type": "qwen",
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "kv_channels": 16,
        "ffn_hidden_size": 192,
        "padded_vocab_size": 1024,
        "vocab_size": 1024,
        "seq_length": 64,
        "n_positions": 6144,
        "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "no_bias": True,
        "pos_emb": "rotary",
        "tie_word_embeddings": False,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "fp32": True,
        **changes,
    }


def random_state(settings: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> State:
    """Random weights in the old layout, norms and biases included."""
    generator = torch.Generator().manual_seed(seed)
    width = settings.get("n_embd") or settings["hidden_size"]
    layers = settings.get("n_layer") or settings["num_hidden_layers"]
    inner = (settings.get("ffn_hidden_size") or settings["intermediate_size"]) // 2
    rows = settings.get("padded_vocab_size") or settings["vocab_size"]

    def random(*shape: int, around: float = 0.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.08 + around).to(dtype)

    state = {"transformer.wte.weight": random(rows, width)}
    for number in range(layers):
        layer = f"transformer.h.{number}."
        state |= {
            f"{layer}ln_1.weight": random(width, around=1.0),
            f"{layer}attn.c_attn.weight": random(3 * width, width),
            f"{layer}attn.c_attn.bias": random(3 * width),
            f"{layer}attn.c_proj.weight": random(width, width),
            f"{layer}ln_2.weight": random(width, around=1.0),
            f"{layer}mlp.w1.weight": random(inner, width),
            f"{layer}mlp.w2.weight": random(inner, width),
            f"{layer}mlp.c_proj.weight": random(width, inner),
        }
    return state | {"transformer.ln_f.weight": random(width, around=1.0), "lm_head.weight": random(rows, width)}


def reference_logits(
    state: State, input_ids_BT: torch.Tensor, *, heads: int, base: float, eps: float, divide: bool = True
) -> torch.Tensor:
    """The old forward pass, up to `seq_length` positions; scores are divided by the root of the head width."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x_fp32 = x.float()
        return (x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight

    def rotate(x_BTHD: torch.Tensor) -> torch.Tensor:
        width = x_BTHD.shape[-1]
        inverse = 1.0 / (base ** (torch.arange(0, width, 2).float() / width))
        angles_TD = torch.outer(torch.arange(x_BTHD.shape[1]).float(), inverse).repeat(1, 2)[:, None]
        first, second = x_BTHD.float().chunk(2, -1)
        rotated = torch.cat((-second, first), -1)
        return (x_BTHD.float() * angles_TD.cos() + rotated * angles_TD.sin()).to(x_BTHD.dtype)

    hidden = state["transformer.wte.weight"][input_ids_BT]
    batch, length, width = hidden.shape
    future_TT = torch.ones(length, length, dtype=torch.bool).triu(1)
    for number in range(sum(name.endswith("attn.c_attn.weight") for name in state)):
        layer = {name.split(".", 3)[3]: t for name, t in state.items() if name.startswith(f"transformer.h.{number}.")}
        x = norm(hidden, layer["ln_1.weight"])
        packed = torch.nn.functional.linear(x, layer["attn.c_attn.weight"], layer["attn.c_attn.bias"])
        q, k, v = (part.view(batch, length, heads, -1) for part in packed.split(width, -1))
        q, k, v = (part.transpose(1, 2) for part in (rotate(q), rotate(k), v))
        root = math.sqrt(width // heads)
        scores = q @ k.transpose(-1, -2)
        scores = scores / root if divide else scores * (1 / root)
        weights = scores.masked_fill(future_TT, torch.finfo(scores.dtype).min).float().softmax(-1).to(q.dtype)
        mixed = (weights @ v).transpose(1, 2).reshape(batch, length, width)
        hidden = hidden + mixed @ layer["attn.c_proj.weight"].T
        x = norm(hidden, layer["ln_2.weight"])
        inner = (x @ layer["mlp.w1.weight"].T) * silu(x @ layer["mlp.w2.weight"].T)
        hidden = hidden + inner @ layer["mlp.c_proj.weight"].T
    return norm(hidden, state["transformer.ln_f.weight"]) @ state["lm_head.weight"].T


def old_folder(folder: Path, settings: dict[str, Any], state: State, *, form: str = "safetensors") -> Path:
    """A checkpoint as it lies on the hub: one file, shards, or pickles."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "modeling_qwen.py").write_text("raise SystemExit('remote code ran')")
    write_ranks(folder / "qwen.tiktoken", small_ranks())
    names = sorted(state)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    if form == "safetensors":
        save_file(state, folder / "model.safetensors")
    elif form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif form == "legacy bin":
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        stem, suffix = ("model", "safetensors") if form == "safetensors shards" else ("pytorch_model", "bin")
        weight_map = {}
        for number, part in enumerate(halves, 1):
            file = f"{stem}-0000{number}-of-00002.{suffix}"
            weight_map.update(dict.fromkeys(part, file))
            save = save_file if suffix == "safetensors" else torch.save
            save({name: state[name] for name in part}, folder / file)
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def converted(folder: Path, cache: Path, *, context: int = 64, allow_pickle: bool = False) -> Path:
    return conversion.converted_folder(
        folder, fingerprint="0", context=context, cache_dir=str(cache), allow_pickle=allow_pickle
    )


def logits_of(folder: Path, input_ids_BT: torch.Tensor, dtype: torch.dtype, attention: str = "eager") -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
    with torch.no_grad():
        return model(input_ids_BT, use_cache=False).logits


SHAPES: list[dict[str, Any]] = [
    {},
    {"n_layer": 3, "n_embd": 128, "n_head": 2, "kv_channels": 64, "ffn_hidden_size": 352},
    {"n_head": 1, "kv_channels": 64, "rotary_emb_base": 1_000_000.0, "layer_norm_epsilon": 1e-5},
]


@pytest.mark.parametrize("changes", SHAPES)
def test_converted_logits_are_the_originals_to_the_last_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    settings = old_settings(**changes)
    state = random_state(settings)
    folder = converted(old_folder(tmp_path / "old", settings, state), tmp_path / "cache")
    input_ids_BT = torch.randint(0, 1024, (3, 64), generator=torch.Generator().manual_seed(1))
    expected = reference_logits(
        state,
        input_ids_BT,
        heads=settings["n_head"],
        base=settings["rotary_emb_base"],
        eps=settings["layer_norm_epsilon"],
    )
    assert expected.std() > 0.05
    assert (logits_of(folder, input_ids_BT, torch.float32) - expected).abs().max() == 0


def test_a_head_width_whose_root_is_no_power_of_two_differs_by_one_rounding_only(tmp_path: Path) -> None:
    """At D = 128 transformers multiplies by 1/sqrt(D) where the original divides by sqrt(D); nothing else differs."""
    torch.set_num_threads(1)
    settings = old_settings(n_embd=256, n_head=2, kv_channels=128)
    state = random_state(settings)
    folder = converted(old_folder(tmp_path / "old", settings, state), tmp_path / "cache")
    input_ids_BT = torch.randint(0, 1024, (2, 64), generator=torch.Generator().manual_seed(1))
    ours = logits_of(folder, input_ids_BT, torch.float32)
    divided, multiplied = (
        reference_logits(state, input_ids_BT, heads=2, base=10000.0, eps=1e-6, divide=divide)
        for divide in (True, False)
    )
    assert (ours - multiplied).abs().max() == 0
    assert (ours - divided).abs().max() < 2e-5 < divided.std() / 1000


def test_bf16_weights_keep_their_bits_and_logits_their_size(tmp_path: Path) -> None:
    """The original rotates in fp32 and rounds after it, Qwen2 rounds the angles first: bf16's own error, no more."""
    torch.set_num_threads(1)
    settings = old_settings(fp32=False, bf16=True)
    state = random_state(settings, torch.bfloat16)
    folder = converted(old_folder(tmp_path / "old", settings, state), tmp_path / "cache")
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(
        torch.cat([tensors[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]),
        state["transformer.h.0.attn.c_attn.weight"],
    )
    input_ids_BT = torch.randint(0, 1024, (2, 64), generator=torch.Generator().manual_seed(1))
    exact = reference_logits(
        {name: tensor.float() for name, tensor in state.items()}, input_ids_BT, heads=4, base=10000.0, eps=1e-6
    )
    original = reference_logits(state, input_ids_BT, heads=4, base=10000.0, eps=1e-6)
    ours = logits_of(folder, input_ids_BT, torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().mean() <= 1.1 * (original - exact).abs().mean()


FORMS = ["safetensors", "safetensors shards", "bin", "bin shards", "legacy bin"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_weights_gives_the_same_tensors(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = old_settings()
    state = random_state(settings)
    source = old_folder(tmp_path / "old", settings, state, form=form)
    whole = converted(source, tmp_path / "whole", allow_pickle="bin" in form)
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    cut = converted(source, tmp_path / "cut", allow_pickle="bin" in form)
    assert (whole / "model.safetensors").is_file()
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    one = load_file(whole / "model.safetensors")
    several = {name: t for file in cut.glob("*.safetensors") for name, t in load_file(file).items()}
    assert one.keys() == several.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], several[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in one.values())
    ids = torch.randint(0, 1024, (1, 16), generator=torch.Generator().manual_seed(1))
    assert torch.equal(logits_of(whole, ids, torch.float32), logits_of(cut, ids, torch.float32))


def test_the_later_spellings_of_the_settings_mean_the_same(tmp_path: Path) -> None:
    old = old_settings()
    new = {name: value for name, value in old.items() if name not in ("n_embd", "n_layer", "n_head", "ffn_hidden_size")}
    del new["padded_vocab_size"]
    new |= {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192}
    state = random_state(old)
    folders = [
        converted(old_folder(tmp_path / name, settings, state), tmp_path / "cache" / name)
        for name, settings in (("old", old), ("new", new))
    ]
    first, second = (json.loads((folder / "config.json").read_text()) for folder in folders)
    assert first == second
    assert first["model_type"] == "qwen2"
    assert first["intermediate_size"] == 96
    assert first["max_position_embeddings"] == 64


def test_it_is_converted_once_and_again_when_the_weights_change(tmp_path: Path) -> None:
    settings = old_settings()
    source = old_folder(tmp_path / "old", settings, random_state(settings))
    first = converted(source, tmp_path / "cache")
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert converted(source, tmp_path / "cache") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    old_folder(source, settings, random_state(settings, seed=1))  # same names and shapes, other values
    assert converted(source, tmp_path / "cache") != first


def test_locate_model_gives_a_folder_that_loads_without_remote_code(tmp_path: Path) -> None:
    settings = old_settings()
    source = old_folder(tmp_path / "old", settings, random_state(settings))
    config = ModelConfig(
        name="old", source=ModelSource.local, path=str(source), cache_dir=str(tmp_path / "cache"), context=64
    )
    files = locate_model(config)
    tokenizer = load_tokenizer(files, config)
    assert json.loads((files.folder / "config.json").read_text())["model_type"] == "qwen2"
    assert not list(files.folder.glob("*.py"))
    assert tokenizer.eos_token_id == len(small_ranks())
    shutil.rmtree(source)
    assert logits_of(files.folder, torch.tensor([[1, 2]]), torch.float32).shape == (1, 2, 1024)


# --- What is refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_bias": False}, "no_bias is False"),
        ({"rotary_pct": 0.5}, "rotary_pct"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"kv_channels": 8}, "kv_channels"),
        ({"n_layer": "2"}, "num_hidden_layers or n_layer"),
        ({"n_layer": 3}, "lacks 12 tensors"),
        ({"n_layer": 1}, "has no place"),
        ({"ffn_hidden_size": 256}, "of shape"),
        ({"padded_vocab_size": 300, "vocab_size": 300}, "300"),
    ],
)
def test_what_qwen2_cannot_express_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = old_folder(tmp_path / "old", old_settings(**changes), random_state(old_settings()))
    with pytest.raises(ModelError, match=message):
        converted(source, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_context_beyond_the_originals_is_refused(tmp_path: Path) -> None:
    settings = old_settings()
    source = old_folder(tmp_path / "old", settings, random_state(settings))
    with pytest.raises(ModelError, match="use_logn_attn, use_dynamic_ntk.*set model.context=64"):
        converted(source, tmp_path / "cache", context=65)


def test_pickles_need_the_flag(tmp_path: Path) -> None:
    settings = old_settings()
    source = old_folder(tmp_path / "old", settings, random_state(settings), form="bin")
    with pytest.raises(ModelError, match="model.allow_pickle=true"):
        converted(source, tmp_path / "cache")


class _Marker:
    """Unpickled, it writes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.path),))


def test_a_pickle_with_code_is_refused_even_with_the_flag(tmp_path: Path) -> None:
    settings = old_settings()
    source = old_folder(tmp_path / "old", settings, random_state(settings))
    (source / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": _Marker(str(tmp_path / "ran"))}, source / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"not a pickle of tensors alone"):
        converted(source, tmp_path / "cache", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    settings = old_settings()
    source = old_folder(tmp_path / "old", settings, random_state(settings), form="safetensors shards")
    shard = source / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match="model-00002-of-00002.safetensors: damaged"):
        converted(source, tmp_path / "cache")


def test_a_file_that_the_system_refuses_to_write_ends_in_a_line_and_leaves_nothing(tmp_path: Path) -> None:
    settings = old_settings()
    source = old_folder(tmp_path / "old", settings, random_state(settings))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        with pytest.raises(
            ModelError, match=r"the weights cannot be written \(.*too large.*\).*model\.cache_dir"
        ) as caught:
            converted(source, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size]
