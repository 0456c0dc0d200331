"""Two tokenizers, one law: `fastokens` gives the ids of `tokenizers`, or is not used."""

from __future__ import annotations

import json
import logging
import random
import unicodedata
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from agentft.data import synthetic, tokens
from agentft.data.render import Rendering, Segment, SpanKind
from agentft.data.tokens import (
    CHECKED,
    KnownIds,
    SegmentEncoder,
    TextIds,
    TokenizersDisagree,
    byte_level_alphabet,
    encode_fast,
    keeps_every_byte,
)

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


SPLITTERS = {
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm2": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": lambda: _split(GPT4 % ""),
    "llama3": lambda: _split(GPT4 % "{1,3}"),
    "o200k": lambda: _split(O200K),
}
"""How the families that are trained most cut a text before they encode it; their vocabularies are learned here."""

LACKING = b"\x04\x10\xfb"
"""Bytes that one vocabulary has no token for, as SmolLM2's has none for some."""


@cache
def _corpus() -> list[str]:
    texts = [turn["value"] for r in synthetic.generate(150, seed=9) for turn in r["conversations"]]
    return [*texts, "Ｆｕｌｌ　ｗｉｄｔｈ Grüße, naïve café 你好世界。天气怎么样？ こんにちは 안녕 مرحبا 🙂👩‍👩‍👧"]


@cache
def tokenizer_of(family: str):
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(ignore_merges=family == "llama3"))
    backend.pre_tokenizer = SPLITTERS[family]()
    if family == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    if family == "smollm2":
        alphabet -= {letter for letter, byte in byte_level_alphabet().items() if byte in LACKING}
        assert len(alphabet) == 253
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=sorted(alphabet), special_tokens=["<|im_end|>"], show_progress=False
    )
    backend.train_from_iterator(_corpus(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    if family == "qwen2":
        tokenizer.add_tokens(["<tool_call>", "</tool_call>", "\u2028\u2028"])
    return tokenizer


def said(*texts: str) -> Rendering:
    """What users say, each text by itself."""
    stop = Segment("<|im_end|>", SpanKind.header, special=True)
    return Rendering(tuple(each for text in texts for each in (Segment(text, SpanKind.user), stop)), by_chunks=True)


@cache
def both(family: str):
    """The encoder of a family before and after it has come to be faster."""
    slow = SegmentEncoder(tokenizer_of(family))
    fast = slow.for_much_text(much=True)
    fast.encode([("", said(text)) for text in _corpus()])
    assert fast.settle()
    ids = fast._text_ids["marks"]
    assert ids._fast is not None, "fastokens does not take this family"
    return TextIds(slow._copy("marks")), ids


PIECES = st.one_of(
    st.text(max_size=12),
    st.text("aA1 \n\t'.,{}\"你好é", max_size=20),
    st.sampled_from(
        [
            *(
                "<|im_end|>",
                "<tool_call>",
                "</tool_call>",
                "<|startofthink|>",
                "<|im_",
                "\u2028",
                "\r\n",
                "   \n  \n",
                "\x04",
            ),
            *(
                "don't",
                "I'LL",
                "’s",
                "3.14159",
                "２０２６",
                "e\u0301",
                "\u212b",
                "ﬁ",
                "\ufeff",
                "👩‍👩‍👧",
                "\u00ad",
                "a" * 70,
            ),
            *('{"api_name": "get_tide", "parameters": {"港口": "胡苏姆"}}', "\U0001f9ff" * 3, "\u0f0b", "ـ", "\x00"),
        ]
    ),
)
TEXTS = st.lists(PIECES, max_size=8).map("".join)


@pytest.mark.parametrize("family", SPLITTERS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(TEXTS, min_size=1, max_size=6))
def test_both_give_every_text_the_same_ids(family: str, texts: list[str]):
    reference, fast = both(family)
    for text, ours, theirs in zip(texts, fast.encode(texts), reference.encode(texts), strict=True):
        assert ours.tolist() == theirs.tolist(), text
        assert ours.dtype == theirs.dtype == np.int32


@pytest.mark.parametrize("family", SPLITTERS)
def test_both_give_ten_thousand_cut_and_joined_texts_the_same_ids(family: str):
    """Words of the corpus cut anywhere and joined anyhow, with odd characters among them."""
    reference, fast = both(family)
    source = "\n".join(_corpus())
    dice = random.Random(f"cut-{family}")
    odd = [
        *"\x00\x04\x7f\x85\xa0\u3000\u200b\u200d\ufe0f\u0301",
        "\U0001f600",
        "½",
        "٣",
        "Ⅷ",
        "ǅ",
        "<|im_end|>",
        "<tool_call>",
    ]
    texts = []
    for _ in range(10_000):
        parts = []
        for _ in range(dice.randrange(1, 5)):
            start = dice.randrange(len(source))
            parts += [source[start : start + dice.randrange(1, 30)], dice.choice(odd) if dice.random() < 0.4 else ""]
        texts.append("".join(parts))
    different = [
        text
        for text, ours, theirs in zip(texts, fast.encode(texts), reference.encode(texts), strict=True)
        if ours.tolist() != theirs.tolist()
    ]
    assert different == []


def test_both_put_combining_marks_in_the_same_order():
    """NFC sorts the marks on a letter by a table of its Unicode version, and the two packages have one each."""
    marks = [chr(code) for code in range(0x110000) if unicodedata.combining(chr(code))]
    dice = random.Random("marks")
    reference, fast = both("qwen2")
    texts = [dice.choice("aeo你") + "".join(dice.sample(marks, 3)) for _ in range(10_000)]
    assert len({text for text in texts if not unicodedata.is_normalized("NFC", text)}) > 3000
    for text, ours, theirs in zip(texts, fast.encode(texts), reference.encode(texts), strict=True):
        assert ours.tolist() == theirs.tolist(), ascii(text)


@pytest.mark.parametrize("family", SPLITTERS)
def test_both_give_a_text_of_one_endless_word_the_same_ids(family: str):
    reference, fast = both(family)
    texts = [
        unit * (70_000 // len(unit)) for unit in ("a", " ", "\n", "7", "ab", "你", "好的", "=", "e\u0301", "🙂", "{[")
    ]
    for text, ours, theirs in zip(texts, fast.encode(texts), reference.encode(texts), strict=True):
        assert np.array_equal(ours, theirs), text[:4]


@pytest.fixture
def few_texts():
    reference = TextIds(SegmentEncoder(tokenizer_of("gpt2"))._copy("marks"))
    texts = [f"harbour {n}, tide {n % 7}" for n in range(20)]
    return reference, texts


def same(found, expected) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_it_is_not_loaded_before_it_is_repaid_nor_without_a_proof(few_texts):
    reference, texts = few_texts
    modest, much = TextIds(reference.tokenizer, much=False), TextIds(reference.tokenizer, much=True)
    assert not much.settle(), "nothing to compare on"
    for ids in (modest, much):
        assert same(ids.encode(texts), reference.encode(texts))
    assert not modest.settle()
    assert much.settle()
    assert much._fast is not None
    modest.encode(["x " * (tokens._LEAST_MUCH // 2)])
    assert modest.settle()
    assert modest._fast is not None


def spoil(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    """Let the faster one give other ids to texts that hold a word."""
    encode = tokens._Fastokens.encode

    def spoiled(self, texts):
        return [ids[::-1] if word in text else ids for text, ids in zip(texts, encode(self, texts), strict=True)]

    monkeypatch.setattr(tokens._Fastokens, "encode", spoiled)


def test_one_that_differs_at_the_start_is_never_used(few_texts, monkeypatch, caplog):
    reference, texts = few_texts
    spoil(monkeypatch, "harbour 13")
    ids = TextIds(reference.tokenizer, much=True)
    ids.encode(texts)
    with caplog.at_level(logging.WARNING, "agentft"):
        assert ids.settle()
    assert ids._fast is None
    assert "encoded by tokenizers alone" in caplog.text
    assert "harbour 13" in caplog.text
    assert same(ids.encode(texts), reference.encode(texts))


def test_one_that_differs_later_is_caught_and_all_is_done_again(few_texts, monkeypatch, caplog):
    _, texts = few_texts
    spoil(monkeypatch, "moon")
    encoder = SegmentEncoder(tokenizer_of("gpt2"))
    runs = []

    def ids(encoder: SegmentEncoder, texts: list[str]) -> list[list[int]]:
        return [made.example.input_ids.tolist() for (made,) in encoder.encode([("", said(text)) for text in texts])]

    def moons(encoder: SegmentEncoder) -> list[list[list[int]]]:
        return [ids(encoder, [f"moon {n} {k}" for k in range(10)]) for n in range(2 * CHECKED // 10)]

    def work(encoder: SegmentEncoder) -> list[list[list[int]]]:
        runs.append(encoder)
        ids(encoder, texts)
        encoder.settle()
        return moons(encoder)

    with caplog.at_level(logging.WARNING, "agentft"):
        found = encode_fast(encoder, work, much=True)
    assert len(runs) == 2
    assert "begun again with tokenizers alone" in caplog.text
    assert "moon" in caplog.text
    assert found == moons(encoder)


def test_every_so_many_texts_one_is_encoded_by_both(few_texts, monkeypatch):
    reference, texts = few_texts
    ids = TextIds(reference.tokenizer, much=True)
    ids.encode(texts)
    ids.settle()
    asked: list[str] = []
    encode = TextIds.by_tokenizers
    monkeypatch.setattr(TextIds, "by_tokenizers", lambda self, given: (asked.extend(given), encode(self, given))[1])
    numbered = [f"text {n}" for n in range(5 * CHECKED + 1)]
    for start in range(0, len(numbered), 37):
        ids.encode(numbered[start : start + 37])
    assert asked == numbered[::CHECKED]


def test_a_disagreement_survives_the_way_between_processes():
    import pickle

    error = pickle.loads(pickle.dumps(TokenizersDisagree("a text")))
    assert str(error) == str(TokenizersDisagree("a text")) == "fastokens and tokenizers encode 'a text' differently"


def test_a_tokenizer_that_it_does_not_know_is_left_to_the_other(caplog):
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ids = TextIds(backend, much=True)
    ids.encode(["a b"])
    with caplog.at_level(logging.WARNING, "agentft"):
        assert ids.settle()
    assert "Whitespace" in caplog.text
    assert [each.tolist() for each in ids.encode(["a b"])] == [[0, 1]]


def test_a_text_that_comes_again_is_encoded_once(monkeypatch):
    encoder = SegmentEncoder(tokenizer_of("gpt2"))
    asked: list[str] = []
    encode = TextIds.by_tokenizers
    monkeypatch.setattr(TextIds, "by_tokenizers", lambda self, texts: (asked.extend(texts), encode(self, texts))[1])
    renderings = [(name, said("Hello", name)) for name in ("a", "b")]
    known: KnownIds = {}
    first, again = encoder.encode(renderings, known), encoder.encode(renderings, known)
    assert asked == ["Hello", "a", "b"]
    alone = [encoder.encode([each])[0] for each in renderings]
    for found in (first, again):
        assert [[each.example.input_ids.tolist() for each in made] for made in found] == [
            [each.example.input_ids.tolist() for each in made] for made in alone
        ]


@pytest.mark.parametrize("family", SPLITTERS)
def test_families_keep_every_byte_and_copies_differ_in_what_is_special_alone(family: str):
    encoder, backend = SegmentEncoder(tokenizer_of(family)), tokenizer_of(family).backend_tokenizer
    assert keeps_every_byte(backend)
    given = json.loads(backend.to_str())
    for letters in ("none", "marks", "all"):
        made = json.loads(encoder._copy(letters).to_str())
        special = {token["content"] for token in made["added_tokens"] if token["special"]}
        expected = {"<|im_end|>"}
        if family == "qwen2" and letters != "none":
            expected |= {"<tool_call>", "</tool_call>"} | ({"\u2028\u2028"} if letters == "all" else set())
        assert special == expected
        for token in (*made["added_tokens"], *given["added_tokens"]):
            token["special"] = None
        assert made == given


@pytest.mark.parametrize(
    ("name", "splitter", "normalizer"),
    [
        ("a space in front", pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        ("no bytes", pre_tokenizers.Metaspace(), None),
        ("other letters", pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFKC()),
    ],
)
def test_a_tokenizer_that_writes_a_text_otherwise_does_not_keep_every_byte(name, splitter, normalizer):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = splitter
    if normalizer is not None:
        backend.normalizer = normalizer
    assert not keeps_every_byte(backend), name
