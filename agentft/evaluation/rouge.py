"""Score answers by ROUGE-L, with the package `rouge-score` and tokens that exist in Chinese."""

from __future__ import annotations

import importlib
import re
import tempfile
import unicodedata
from typing import Protocol

from agentft.errors import EvaluationError

TOKENIZER_NAME = "cjk-char-v2"
"""Stands in the signature; changes whenever the tokens of any text change."""

_HAN = "\u2e80-\u2fdf\u3005\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_KANA = "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\U0001aff0-\U0001b16f"
_HANGUL = "\u1100-\u11ff\u3131-\u318e\ua960-\ua97f\uac00-\ud7af\ud7b0-\ud7ff"
_CJK = re.compile(f"[{_HAN}{_KANA}{_HANGUL}]")
_KANA_ONLY = re.compile(f"[{_KANA}]")
_HANGUL_ONLY = re.compile(f"[{_HANGUL}]")
_MARKS = "".join(
    chr(code)
    for code in range(0x300, 0x20000)
    if unicodedata.category(chr(code))[0] == "M" and not 0xFE00 <= code <= 0xFE0F  # which choose a glyph
)
_LETTER = f"[^\\W_{_HAN}{_KANA}{_HANGUL}]"
_TOKEN = re.compile(f"[{_HAN}{_KANA}{_HANGUL}]|{_LETTER}(?:{_LETTER}|[{_MARKS}])*")
_JOINERS = str.maketrans("", "", "\u200c\u200d")


class Tokenizer(Protocol):
    """What `rouge_score` asks of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of `text`."""
        ...


class CjkTokenizer:
    """`cjk-char-v2`: NFKC, lower case; a token is one Han, kana or hangul character or another run of letters, digits.

    Combining marks belong to the letter before them: vowel signs of Indic scripts tell words apart. Joiners inside a word
    and everything else are dropped. On ASCII text the tokens are those of `rouge_score`'s own tokenizer without stemming.
    """

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of `text`."""
        return _TOKEN.findall(unicodedata.normalize("NFKC", text).lower().translate(_JOINERS))


class JiebaTokenizer:
    """Chinese words by jieba's dictionary, for comparison with other stacks; punctuation dropped.

    Raises:
        EvaluationError: jieba is not installed.
    """

    def __init__(self) -> None:
        try:
            jieba = importlib.import_module("jieba")
        except ModuleNotFoundError:
            raise EvaluationError("rouge_l_jieba needs the package jieba: pip install jieba") from None
        jieba.setLogLevel("WARNING")
        self._jieba = jieba.Tokenizer()
        # jieba would read its dictionary from a file in the machine's shared temporary folder, whoever wrote that.
        with tempfile.TemporaryDirectory() as folder:
            self._jieba.tmp_dir = folder
            self._jieba.initialize()

    def tokenize(self, text: str) -> list[str]:
        """Return the words of `text`."""
        words = self._jieba.lcut(unicodedata.normalize("NFKC", text).lower())
        return [word for word in words if _TOKEN.search(word)]


def rouge_l(reference: str, prediction: str, tokenizer: Tokenizer) -> float | None:
    """Return the F1 of ROUGE-L, between 0 and 1; None where the reference has no token."""
    if not tokenizer.tokenize(reference):
        return None
    # Imports nltk and scipy, a second and a half: only where an answer is scored.
    from rouge_score.rouge_scorer import RougeScorer

    f1: float = RougeScorer(["rougeL"], tokenizer=tokenizer).score(reference, prediction)["rougeL"].fmeasure
    return f1


def detect_language(text: str) -> str:
    """Return "ja" for a text with kana, "ko" with hangul, "zh" with Han characters, else "en"."""
    if not _CJK.search(text):
        return "en"
    if _KANA_ONLY.search(text):
        return "ja"
    return "ko" if _HANGUL_ONLY.search(text) else "zh"
