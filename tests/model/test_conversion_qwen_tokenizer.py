"""The fast tokenizer made of a ranks file gives the ids of tiktoken."""

import base64
import functools
import itertools
import random
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from agentft.errors import ModelError
from agentft.model.conversion import QWEN_PATTERN, QWEN_SPECIAL_TOKENS, qwen_tokenizer, read_ranks

TEXT = [
    "I'll say it's 2023, and they've paid $1,234.50; we'd pay more, I'm told. ",
    "今天天气怎么样？请帮我查询北京明天的天气，谢谢你。天气天气！",
    '<|startofthink|>```JSON\n{"api_name": "get_weather", "parameters": {"city": "北京", "day": "2"}}\n```<|endofthink|>',
    "def f(x):\n    return  x ** 2\r\n\t\n\n",
    "The weather in Paris, Rome and Oslo tomorrow is fine; 上海和广州的温度是二十三度，空气质量良好。",
    "Ünïcödé naïve café Ωmega привет мир こんにちは 안녕하세요 👩‍👩‍👧 🇨🇳 ---===--- ",
]


@functools.cache
def small_ranks() -> dict[bytes, int]:
    """A ranks file of some 500 tokens: byte-pair encoding trained on the lines above, in the plainest way."""
    cut = pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated")
    pieces = [piece.encode() for line in TEXT for piece, _ in cut.pre_tokenize_str(line)]
    words = [[bytes([byte]) for byte in piece] for piece in pieces]
    ranks = {bytes([byte]): 255 - byte for byte in range(256)}
    while len(ranks) < 500:
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[left + right] = len(ranks)
        for word in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == (left, right):
                    word[at : at + 2] = [left + right]
                at += 1
    return ranks


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


def reference(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    special = {token: len(ranks) + number for number, token in enumerate(QWEN_SPECIAL_TOKENS)}
    return tiktoken.Encoding("qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def reference_ids(encoding: tiktoken.Encoding, text: str) -> list[int]:
    return encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all", disallowed_special=())


def is_young_mark(character: str) -> bool:
    """Whether it is a combining mark that the tokenizers package does not reorder in NFC: its tables are of Unicode 9.

    The original normalised by Python, whose tables grow with its version, so for these marks it had no fixed answer.
    """
    if not unicodedata.combining(character):
        return False
    texts = [
        f"a{before}{character}{after}" for before in ("", "\u0323", "\u0301") for after in ("", "\u0323", "\u0334")
    ]
    return any(NFC.normalize_str(text) != unicodedata.normalize("NFC", text) for text in texts)


NFC = normalizers.NFC()
EVERY = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
YOUNG_MARKS = [character for character in EVERY if is_young_mark(character)]
ASSIGNED = sorted({*EVERY} - {*YOUNG_MARKS})
ALPHABETS = [
    ASSIGNED,
    [chr(code) for code in range(0x20, 0x7F)],
    [chr(code) for code in range(0x4E00, 0x9FA6)],
    list(" \t\r\n\u3000\xa0\u2028\u200b\x85\x0b\x0c\x1c"),
    list("'sStTrReEvVmMlLdDſK ’"),
    list("aeiouAEIOU\u0300\u0301\u0308\u0323각가がか\u3099"),
    list("0123456789.,-+①²½٣७৩"),
    [
        "weather ",
        "天气",
        "北京",
        " it's",
        "\n\n",
        "  ",
        '{"a": 1}',
        "👩‍👩‍👧",
        "🇨🇳",
        *QWEN_SPECIAL_TOKENS[:5],
        "<|im_start",
        "|>",
    ],
]
"""What random strings are drawn from: everything, and the places where implementations differ."""


def random_text(rng: random.Random, longest: int = 24) -> str:
    pieces = []
    for _ in range(rng.randint(1, 4)):
        alphabet = rng.choice(ALPHABETS)
        pieces += [rng.choice(alphabet) for _ in range(rng.randint(0, longest // 3))]
    return "".join(pieces)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, tiktoken.Encoding]:
    path = write_ranks(tmp_path_factory.mktemp("ranks") / "qwen.tiktoken", small_ranks())
    return qwen_tokenizer(path.parent), reference(small_ranks())


def test_ids_are_tiktokens_on_random_unicode(both: tuple[Any, tiktoken.Encoding]) -> None:
    tokenizer, encoding = both
    rng = random.Random(20260101)
    for _ in range(3000):
        text = random_text(rng)
        assert tokenizer.encode(text) == reference_ids(encoding, text), ascii(text)


def test_ids_are_tiktokens_on_every_character(both: tuple[Any, tiktoken.Encoding]) -> None:
    """Each assigned character stands between a letter, a blank and a line break, where pieces are cut by its class."""
    tokenizer, encoding = both
    rows = [ASSIGNED[i : i + 200] for i in range(0, len(ASSIGNED), 200)]
    rows = [row for row in rows if not all(unicodedata.category(character) == "Co" for character in row)]
    for row in rows[::8]:
        text = "".join(f"a{character} {character}\n" for character in row)
        assert tokenizer.encode(text) == reference_ids(encoding, text), ascii(row[0])


def test_young_marks_are_few_and_differ_in_their_order_only(both: tuple[Any, tiktoken.Encoding]) -> None:
    tokenizer, encoding = both
    assert len(YOUNG_MARKS) < 150
    for mark in YOUNG_MARKS:
        assert tokenizer.encode(f"a{mark} b") == reference_ids(encoding, f"a{mark} b")
        texts = (
            tokenizer.decode(tokenizer.encode(f"a{mark}\u0323")),
            encoding.decode(reference_ids(encoding, f"a{mark}\u0323")),
        )
        assert len({unicodedata.normalize("NFD", text) for text in texts}) == 1


def test_text_comes_back(both: tuple[Any, tiktoken.Encoding]) -> None:
    tokenizer, _ = both
    for text in TEXT:
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_special_tokens_follow_the_ranks(both: tuple[Any, tiktoken.Encoding]) -> None:
    tokenizer, _ = both
    ranks = len(small_ranks())
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == ranks == tokenizer.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") == ranks + 1
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == ranks + 2
    assert tokenizer.convert_tokens_to_ids("<|extra_0|>") == ranks + 3
    assert tokenizer.convert_tokens_to_ids("<|extra_204|>") == ranks + 207
    assert len(tokenizer) == ranks + 208


def test_a_saved_tokenizer_loads_as_it_was_even_beside_a_qwen2_model(
    both: tuple[Any, tiktoken.Encoding], tmp_path: Path
) -> None:
    tokenizer, encoding = both
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.is_fast
    assert (loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    rng = random.Random(7)
    for _ in range(500):
        text = random_text(rng)
        assert loaded.encode(text) == reference_ids(encoding, text), ascii(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"QQ== 0\nnot base64 at all\n", ":2: expected base64"),
        (b"QQ== 0\nQg== 2\n", "ranks are not 0 to 1"),
        (b"QQ== 0\nQg== 1\n", "not every single byte"),
    ],
)
def test_a_damaged_ranks_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_ranks(tmp_path / "qwen.tiktoken")


def test_a_token_that_no_pair_gives_is_met_as_a_whole_piece_only(tmp_path: Path) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256}
    tokenizer = qwen_tokenizer(write_ranks(tmp_path / "qwen.tiktoken", ranks).parent)
    for text, tokens in (("abc", 1), ("abcd", 4), ("abc-abc", 5)):
        assert tokenizer.encode(text) == reference_ids(reference(ranks), text)
        assert len(tokenizer.encode(text)) == tokens
