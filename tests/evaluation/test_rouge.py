"""ROUGE-L with tokens that exist in Chinese."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from agentft.evaluation import matching
from agentft.evaluation.matching import cjk_tokens, detect_language, rouge_l


def f1(prediction: str, reference: str) -> float | None:
    return rouge_l(reference, prediction)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("明天北京晴，最高二十度。", "明天北京晴，最高二十度。", 1.0),  # identical
        (
            "明天上海多云转晴，气温还有点低。",
            "明天上海多云转晴，气温有点低。",
            2 * 13 / (14 + 13),
        ),  # one character inserted
        ("北京明天是晴天", "明天北京天气晴", 2 * 4 / 14),  # paraphrase: 明天晴 and one of 天 ... = 4 of 7
        ("苹果香蕉", "火车飞机", 0.0),  # unrelated
        ("今天 天气 很 好", "今天天气很好", 1.0),  # blanks only
        ("好的！马上。", "好的，马上…", 1.0),  # punctuation only
        ("共ＡＢＣ１２３次", "共abc123次", 1.0),  # full-width
        ("the cat sat on a mat", "the cat sat on the mat", 5 / 6),  # five of six words
        ("The Cat", "the cat", 1.0),  # case only
        ("调用API成功", "请求API失败", 2 * 1 / 10),  # only "API" shared
        ("共3人", "第3章", 2 * 1 / 6),  # only the digit shared
        ("天气天气天气天气天气", "天气晴", 2 * 2 / 13),  # repetition
        ("", "天气晴", 0.0),
        (".", "天气晴", 0.0),
        ("...", "天气晴", 0.0),
        ("", "", None),
        ("天气晴", "...", None),
    ],
)
def test_table_of_properties(prediction: str, reference: str, expected: float | None) -> None:
    assert f1(prediction, reference) == pytest.approx(expected, abs=1e-12)


def test_tokens() -> None:
    assert cjk_tokens("ＧＰＴ-4 说：天气API_v2好！カタﾅ한글 naïve_x") == [
        "gpt", "4", "说", "天", "气", "api", "v2", "好", "カ", "タ", "ナ", "한", "글", "naïve", "x",
    ]  # fmt: skip
    assert f1("氣", "气") == 0.0  # no script conversion


def _random_text(rng: random.Random, kind: str) -> str:
    pools = {
        "zh": "天气晴朗北京上海酒店推荐调用返回结果，。！？、",
        "en": ["weather ", "API ", "call, ", "the ", "Result: ", "don't ", "x_1 ", "3.14 ", "\n"],
        "mixed": [*"天气调用酒店，。", " API ", "GPT-4", "３", " ok ", "ﾊﾝ", "é", "½"],
    }
    return "".join(rng.choices(pools[kind], k=rng.randint(0, 60)))


def _lcs_by_table(left: list[str], right: list[str]) -> int:
    row = [0] * (len(right) + 1)
    for one in left:
        diagonal = 0
        for j, other in enumerate(right, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if one == other else max(row[j], row[j - 1])
    return row[-1]


def test_values_equal_the_definition_on_every_pair() -> None:
    rng = random.Random(20230900986)
    for number in range(2_400):
        kind = ("zh", "en", "mixed")[number % 3]
        target = _random_text(rng, kind)
        near_copy = "".join(character for character in target if rng.random() > 0.15)
        prediction = near_copy if number % 2 else _random_text(rng, kind)
        left, right = cjk_tokens(target), cjk_tokens(prediction)
        common = _lcs_by_table(left, right)
        recall, precision = common / max(len(left), 1), common / max(len(right), 1)
        expected = 2 * precision * recall / (precision + recall) if common else 0.0
        assert f1(prediction, target) == (expected if left else None)


def test_tokens_equal_rouge_score_on_ascii() -> None:
    tokenizer = DefaultTokenizer(use_stemmer=False)
    rng = random.Random(7)
    for _ in range(5_000):
        text = "".join(chr(rng.randrange(128)) for _ in range(rng.randint(0, 40)))
        assert cjk_tokens(text) == tokenizer.tokenize(text)


@given(st.text(alphabet="天气晴 a"), st.text(alphabet="天气晴 a"))
def test_the_score_is_symmetric_and_bounded(left: str, right: str) -> None:
    if cjk_tokens(left) and cjk_tokens(right):
        assert f1(left, right) == f1(right, left)
        assert 0 <= (f1(left, right) or 0.0) <= f1(left, left) == 1


class _Scored:
    """Our tokens, as `rouge_score` asks for them."""

    def tokenize(self, text: str) -> list[str]:
        return cjk_tokens(text)


def test_long_texts_get_the_values_of_the_package_rouge_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "LARGEST_TABLE", 0)
    scorer = RougeScorer(["rougeL"], tokenizer=_Scored())
    rng = random.Random(3)
    for _ in range(300):
        reference, prediction = (_random_text(rng, "mixed") for _ in range(2))
        if cjk_tokens(reference):
            assert f1(prediction, reference) == scorer.score(reference, prediction)["rougeL"].fmeasure


@pytest.mark.parametrize(
    "characters",
    [
        8,
        # Every token is rare, so that few of them find their places as they were left.
        pytest.param(20_000, marks=pytest.mark.slow),
    ],
)
def test_texts_of_100_000_characters_take_memory_of_their_lengths_and_not_of_the_product(characters: int) -> None:
    rng = random.Random(1)
    reference = "".join(chr(0x4E00 + rng.randrange(characters)) for _ in range(100_000))
    prediction = "".join(character for place, character in enumerate(reference) if place % 10)
    tracemalloc.start()
    try:
        found = f1(prediction, reference)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == 2 * 0.9 / 1.9
    assert peak < 64 * 2**20, "a table would hold 9 * 10**9 numbers"


def test_language_by_script() -> None:
    assert [detect_language(text) for text in ("hello", "你好 hi", "ひらがな漢字", "한글")] == ["en", "zh", "ja", "ko"]


@pytest.mark.parametrize(
    ("one", "other"),
    [("किताब", "कुताब"), ("กิน", "กัน"), ("كَتَبَ", "كُتِبَ"), ("שָׁלוֹם", "שֶׁלֶם")],
    ids=["hindi", "thai", "arabic", "hebrew"],
)
def test_words_that_differ_in_their_marks_differ(one: str, other: str) -> None:
    assert f1(one, other) == 0.0
    assert cjk_tokens(f"{one} {one}") == [one, one]
    assert cjk_tokens("क\u094d\u200dष caf\u0065\u0301 ♥\ufe0f") == ["क\u094dष", "café"]
