"""Compare predictions with references: calls by alignment, parameter values, texts by ROUGE-L.

| | strict | lenient |
|---|---|---|
| objects, arrays | keys in any order, items in order | the same, with lenient values |
| strings | by code point | NFKC, trimmed, blanks collapsed; no case folding, no punctuation removed |
| numbers | one type: 1 = 1.0; integers never pass through float | decimal arithmetic, also for "1" = 1 = "1.0" |
| booleans | are not numbers | "true" = true |
| JSON inside a string | a string | compared as JSON; a JSON string in a string stays text, its quotes are punctuation |
| null | a value | "null" = null; null or "" as a parameter = the parameter is absent |

One-to-one and free of order: parallel calls have no natural one. The choice maximises, first to last, the number of
equal names, of strictly equal parameters, of full matches (right key, right value), of half matches (right key, wrong
value), of leniently equal parameters, and the likeness of the order. The optimum is exact.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache, reduce
from itertools import repeat
from typing import Any

from agentft.data.calls import Json, JsonRefused, ToolCall, read_json

_BLANKS = re.compile(r"\s+")
# The exponent is bounded so that Decimal can hold every number that matches.
_JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,6})?")

_DEEPEST_OPENED_STRING = 32
"""JSON inside strings inside JSON ...: below this level a string stays text, which bounds the recursion."""


def strictly_equal(left: Json, right: Json) -> bool:
    """Return whether two JSON values are equal under the strict column above."""
    return _form(left, None) == _form(right, None)


def lenient_parameters(parameters: dict[str, Json]) -> dict[str, Any]:
    """Return parameters in a form that compares with `==` exactly as the lenient column says."""
    forms = {key: _form(value, 0) for key, value in parameters.items()}
    return {key: form for key, form in forms.items() if form not in (_NULL, _EMPTY_TEXT)}


_NULL = ("null", None)
_EMPTY_TEXT = ("text", "")


def _form(value: Json, depth: int | None) -> tuple[str, Any]:
    """Return a tagged value, so that `==` never mixes kinds (in Python True == 1).

    Strings are read leniently, `depth` levels down, or kept as they are if it is None.
    """
    if isinstance(value, str):
        return ("text", value) if depth is None else _lenient_text(value, depth)
    if isinstance(value, bool):
        return ("boolean", value)
    if isinstance(value, int | float):
        # repr of a float is the shortest decimal that reads back as it: the number as written, not its binary tail.
        return ("number", Decimal(repr(value)) if isinstance(value, float) else Decimal(value))
    deeper = repeat(None if depth is None else depth + 1)
    if isinstance(value, dict):
        return ("object", dict(zip(value, map(_form, value.values(), deeper), strict=True)))
    if isinstance(value, list):
        return ("array", list(map(_form, value, deeper)))  # a comprehension is one frame more
    return _NULL


def _lenient_text(text: str, depth: int) -> tuple[str, Any]:
    trimmed = text.strip()
    if trimmed[:1] in ("{", "[") and depth < _DEEPEST_OPENED_STRING:
        try:
            return _form(read_json(trimmed), depth + 1)
        except JsonRefused:
            pass
    plain = _BLANKS.sub(" ", unicodedata.normalize("NFKC", trimmed)).strip()
    if plain in ("true", "false"):
        return ("boolean", plain == "true")
    if plain == "null":
        return _NULL
    if _JSON_NUMBER.fullmatch(plain):
        return ("number", Decimal(plain))
    return ("text", plain)


@dataclass(frozen=True, slots=True)
class CallPair:
    """A reference call and the predicted call of the same name that was laid beside it."""

    reference: int
    """Index among the reference calls of the step."""
    prediction: int
    """Index among the well-formed predicted calls of the step."""
    full_matches: int
    """Arguments with right key and right value (strict equality): FM of the paper."""
    half_matches: int
    """Arguments with right key and wrong value: HM of the paper."""
    exact: bool
    """All parameters strictly equal."""
    lenient: bool
    """All parameters leniently equal."""
    argument_f1: Fraction
    """2RP/(R+P), R = (0.5 HM + FM)/|A|, P = (0.5 HM + FM)/|A*| (arXiv 2309.00986, section 4.1); 1 when both are {}."""


def align_calls(references: Sequence[ToolCall], predictions: Sequence[ToolCall]) -> tuple[CallPair, ...]:
    """Return the pairs of equal name of the best alignment, ordered by reference.

    A pair of different names counts nothing in any metric, so the problem falls apart into one assignment per name.
    """
    pairs: list[CallPair] = []
    for name in dict.fromkeys(request.name for request in references):
        rows = [i for i, request in enumerate(references) if request.name == name]
        columns = [j for j, request in enumerate(predictions) if request.name == name]
        if columns:
            pairs += _align_same_tool(references, predictions, rows, columns)
    return tuple(sorted(pairs, key=lambda pair: pair.reference))


def compare_calls(references: Sequence[ToolCall], predictions: Sequence[ToolCall], i: int, j: int) -> CallPair:
    """Lay reference call `i` beside predicted call `j` of the same name and count what agrees."""
    reference, prediction = references[i].arguments, predictions[j].arguments
    shared = reference.keys() & prediction.keys()
    full = sum(strictly_equal(reference[key], prediction[key]) for key in shared)
    half = len(shared) - full
    arguments = len(reference) + len(prediction)
    exact = full == len(reference) == len(prediction)
    return CallPair(
        reference=i,
        prediction=j,
        full_matches=full,
        half_matches=half,
        exact=exact,
        lenient=exact or lenient_parameters(reference) == lenient_parameters(prediction),
        argument_f1=Fraction(half + 2 * full, arguments) if arguments else Fraction(1),
    )


def _align_same_tool(
    references: Sequence[ToolCall], predictions: Sequence[ToolCall], rows: list[int], columns: list[int]
) -> list[CallPair]:
    if len(rows) == len(columns):
        in_order = [compare_calls(references, predictions, i, j) for i, j in zip(rows, columns, strict=True)]
        if len(rows) == 1 or all(pair.exact for pair in in_order):
            return in_order
    table = [[compare_calls(references, predictions, i, j) for j in columns] for i in rows]
    chosen = _assign(
        [[_worth(pair, row, column) for column, pair in enumerate(line)] for row, line in enumerate(table)]
    )
    return [table[row][column] for row, column in chosen]


_Worth = tuple[int, int, int, int, int]


def _worth(pair: CallPair, row: int, column: int) -> _Worth:
    # Squared distance is strictly convex: among otherwise equal choices only the order-preserving one is best.
    return (int(pair.exact), pair.full_matches, pair.half_matches, int(pair.lenient), -((row - column) ** 2))


def _assign(worth: list[list[_Worth]]) -> list[tuple[int, int]]:
    """Return the (row, column) pairs that maximise the sum of `worth` lexicographically, as many pairs as fit.

    The tuples become single integers in a base that no sum can overflow, so that the ordinary assignment is the
    lexicographic one.
    """
    turned = len(worth) > len(worth[0])
    if turned:
        worth = [list(line) for line in zip(*worth, strict=True)]
    base = 1 + 2 * len(worth) * max(abs(part) for line in worth for parts in line for part in parts)
    cost = [[-reduce(lambda number, part: number * base + part, parts) for parts in line] for line in worth]
    pairs = _cheapest_assignment(cost)
    return [(column, row) for row, column in pairs] if turned else pairs


def _cheapest_assignment(cost: list[list[int]]) -> list[tuple[int, int]]:
    """Assign every row a column of its own at least total cost: shortest augmenting paths, O(rows^2 columns).

    Hungarian method with potentials in exact integers; needs rows <= columns. Index 0 is the virtual start of a path.
    """
    rows, columns = len(cost), len(cost[0])
    row_potential: list[float] = [0] * (rows + 1)
    column_potential: list[float] = [0] * (columns + 1)
    row_of = [0] * (columns + 1)
    for row in range(1, rows + 1):
        row_of[0], column = row, 0
        slack = [math.inf] * (columns + 1)
        came_from = [0] * (columns + 1)
        free = list(range(1, columns + 1))
        reached = [0]
        while row_of[column]:
            for other in free:
                start = row_of[column]
                reduced = cost[start - 1][other - 1] - row_potential[start] - column_potential[other]
                if reduced < slack[other]:
                    slack[other], came_from[other] = reduced, column
            nearest = min(free, key=slack.__getitem__)
            step = slack[nearest]
            for other in reached:
                row_potential[row_of[other]] += step
                column_potential[other] -= step
            for other in free:
                slack[other] -= step
            column = nearest
            free.remove(column)
            reached.append(column)
        while column:
            row_of[column], column = row_of[came_from[column]], came_from[column]
    return [(row_of[column] - 1, column - 1) for column in range(1, columns + 1) if row_of[column]]


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

LARGEST_TABLE = 4_000_000
"""Cells of the table that the package `rouge-score` makes of two texts, 8 bytes each. Longer texts take `lcs_length`."""

_MASKS = 1024
"""Tokens whose places are kept as integers at once: 13 MB for a text of 100,000 tokens."""


def cjk_tokens(text: str) -> list[str]:
    """Return the tokens of `cjk-char-v2`: one Han, kana or hangul character or another run of letters and digits each.

    NFKC, lower case; combining marks belong to the letter before them, everything else is dropped. On ASCII text the
    tokens are those of `rouge_score`'s own tokenizer without stemming.
    """
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).lower().translate(_JOINERS))


class _Tokenizer:
    """Our tokens, as `rouge_score` asks for them."""

    tokenize = staticmethod(cjk_tokens)


def rouge_l(reference: str, prediction: str) -> float | None:
    """Return the F1 of ROUGE-L by the package `rouge-score`, between 0 and 1; None where the reference has no token."""
    expected, predicted = cjk_tokens(reference), cjk_tokens(prediction)
    if not expected:
        return None
    if len(expected) * len(predicted) <= LARGEST_TABLE:
        # Imports nltk, a second: only where a text is scored.
        from rouge_score.rouge_scorer import RougeScorer

        scores = RougeScorer(["rougeL"], tokenizer=_Tokenizer()).score(reference, prediction)
        return float(scores["rougeL"].fmeasure)
    common = lcs_length(expected, predicted)
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def lcs_length(left: Sequence[str], right: Sequence[str]) -> int:
    """Return the length of the longest common subsequence (bit-parallel: Hyyro, 2004).

    A row of the usual table is one integer with a bit for each token of `left`, so memory grows with the lengths and not
    with their product.
    """
    places: dict[str, list[int]] = {}
    for place, token in enumerate(left):
        places.setdefault(token, []).append(place)

    @lru_cache(_MASKS)
    def mask(token: str) -> int:
        bits = bytearray(len(left) // 8 + 1)
        for place in places[token]:
            bits[place >> 3] |= 1 << (place & 7)
        return int.from_bytes(bits, "little")

    row = full = (1 << len(left)) - 1
    for token in right:
        if token in places:
            found = row & mask(token)
            row = (row + found | row - found) & full
    return len(left) - row.bit_count()


def detect_language(text: str) -> str:
    """Return "ja" for a text with kana, "ko" with hangul, "zh" with Han characters, else "en"."""
    if not _CJK.search(text):
        return "en"
    if _KANA_ONLY.search(text):
        return "ja"
    return "ko" if _HANGUL_ONLY.search(text) else "zh"
