"""Baichuan-7B checkpoints, converted, compute what a Llama with packed q, k, v does; its tokenizer keeps its ids."""

import itertools
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from agentft.errors import ModelError
from agentft.model import conversion
from agentft.model.conversion import baichuan_tokenizer, read_sentencepiece

PIECES = ["▁", "a", "b", "c", "天", "气", "▁a", "ab", "▁ab", "abc", "天气", "bc", "▁天气", "aa", "▁▁"]


def proto_field(number: int, value: Any) -> bytes:
    """One field of a protocol buffer."""

    def whole(count: int) -> bytes:
        low, rest = count & 0x7F, count >> 7
        return bytes([low | 0x80]) + whole(rest) if rest else bytes([low])

    match value:
        case bool() | int():
            return whole(number << 3) + whole(int(value))
        case float():
            return whole(number << 3 | 5) + struct.pack("<f", value)
        case str():
            return proto_field(number, value.encode())
    return whole(number << 3 | 2) + whole(len(value)) + bytes(value)


def sentencepiece_file(path: Path, *, dummy_prefix: bool = False, kind: int = 2) -> Path:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(piece, -float(rank), 1) for rank, piece in enumerate(p for p in PIECES if len(p) > 1)]
    pieces += [(piece, -1000.0 - rank, 1) for rank, piece in enumerate(p for p in PIECES if len(p) == 1)]
    data = b"".join(
        proto_field(1, proto_field(1, text) + proto_field(2, score) + proto_field(3, type_))
        for text, score, type_ in pieces
    )
    data += proto_field(2, proto_field(3, kind) + proto_field(35, True) + proto_field(4, len(pieces)))
    data += proto_field(3, proto_field(1, "identity") + proto_field(3, dummy_prefix) + proto_field(4, False))
    path.write_bytes(data)
    return path


def reference_ids(path: Path, text: str) -> list[int]:
    """SentencePiece's rule, word for word: join the neighbours whose concatenation has the best score, leftmost first."""
    model = read_sentencepiece(path)
    ids = {piece.piece: number for number, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == 1}
    symbols = list(("▁" if model.normalizer_spec.add_dummy_prefix and text else "") + text.replace(" ", "▁"))
    while True:
        pairs = [(scores[a + b], -at) for at, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in scores]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_ids_are_sentencepieces(dummy_prefix: bool, tmp_path: Path) -> None:
    path = sentencepiece_file(tmp_path / "tokenizer.model", dummy_prefix=dummy_prefix)
    tokenizer = baichuan_tokenizer(tmp_path)
    rng = random.Random(3)
    for _ in range(2000):
        text = "".join(rng.choice("aabbcc  天气é👩\n") for _ in range(rng.randint(1, 12)))
        assert tokenizer.encode(text) == reference_ids(path, text), ascii(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a</s>b").count(2) == 1
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("</s>", "<s>")


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff", b"no protocol buffer", None])
def test_what_is_no_byte_pair_model_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    if content is None:
        sentencepiece_file(path, kind=1)
    else:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer.model: "):
        baichuan_tokenizer(tmp_path)


def packed_checkpoint(folder: Path, **changes: Any) -> tuple[Path, LlamaForCausalLM]:
    """A small Baichuan-7B, made of a Llama by packing its q, k and v."""
    settings = {
        "model_type": "baichuan",
        "architectures": ["BaiChuanForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaiChuanForCausalLM"},
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    shape = {name: value for name, value in settings.items() if name not in ("model_type", "architectures", "auto_map")}
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    state = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    for layer in range(2):
        stem = f"model.layers.{layer}.self_attn."
        state[f"{stem}W_pack.weight"] = torch.cat([state.pop(f"{stem}{part}_proj.weight") for part in "qkv"])
        state[f"{stem}rotary_emb.inv_freq"] = torch.ones(8)
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings | changes))
    sentencepiece_file(folder / "tokenizer.model")
    return folder, llama


def test_a_packed_checkpoint_computes_what_the_llama_it_was_made_of_does(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    source, llama = packed_checkpoint(tmp_path / "old")
    folder = conversion.converted_folder(source, fingerprint="0", context=128, cache_dir=str(tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    input_ids_BT = torch.randint(0, 300, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (model(input_ids_BT).logits - llama(input_ids_BT).logits).abs().max() == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("abc 天气") == reference_ids(source / "tokenizer.model", "abc 天气")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_position_embeddings": None, "model_max_length": 4096}, "ALiBi"),
        ({"z_loss_weight": 0}, "Baichuan2"),
        ({"vocab_size": 125_696}, "Baichuan2"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_other_members_of_the_family_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    source, _ = packed_checkpoint(tmp_path / "old", **changes)
    with pytest.raises(ModelError, match=message):
        conversion.converted_folder(source, fingerprint="0", context=128, cache_dir=str(tmp_path / "cache"))
