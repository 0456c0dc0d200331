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

For comparison only, what the old script's `evaluate()` would have printed (`demo/tool_agent_finetune` of ModelScope-Agent,
with the package `rouge` 1.0.1) is computed too, rewritten from its behaviour. Known to be wrong, and kept wrong:

* greedy marks and braces: two calls in a step cannot be read, and in the *reference* they make the step a text;
* only the first `{` to the last `}` counts, line feeds are deleted, values compare as in Python (True == 1);
* a call without `parameters` enters twice, once right and once wrong, so the two rates have different denominators;
* a call where none was due costs nothing; a wrong tool with equal parameters scores input_em 1;
* ROUGE-L splits at blanks and full stops and counts *sets* of words, so one Chinese sentence is one word.

Where it raised, a value is null here and the exception's name is kept.
"""

from __future__ import annotations

import json
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

import numpy as np

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


# --- The old script ---

_DEEPEST_RECURSION = 990
"""Frames that CPython's default limit of 1,000 left to the recursion inside `rouge`, called from the old script."""

_F_EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class LegacyStep:
    """What one step adds to the lists of the old script."""

    actions: tuple[int, ...] = ()
    """0 or 1 each; (1, 0) where the double count strikes."""
    inputs: tuple[int, ...] = ()
    is_text: bool = False
    """The reference could not be read as a call, so the step goes to ROUGE."""
    rouge_l: float | None = None
    raised: str | None = None
    """The exception that ROUGE would have raised on this step."""


@dataclass(frozen=True, slots=True)
class LegacyMetric:
    """One value of the old script, or the reason why it had none."""

    value: float | None
    numerator: float
    denominator: int
    raised: str | None


def legacy_step(reference: str, prediction: str) -> LegacyStep:
    """Score one step of raw texts as the old script did."""
    try:
        expected = _first_call(reference)
    except Exception:  # the original's own `except Exception`: the bug that makes a broken reference a text
        return _legacy_text(reference, prediction)
    actions: list[int] = []
    try:
        found = _first_call(prediction)
        actions.append(int(found["api_name"] == expected["api_name"]))
        inputs = int(_same_parameters(expected["parameters"], found["parameters"]))
    except Exception:  # the same, and the double count: an entry made above is not taken back
        actions.append(0)
        inputs = 0
    return LegacyStep(actions=tuple(actions), inputs=(inputs,))


def legacy_metrics(steps: Sequence[LegacyStep]) -> dict[str, LegacyMetric]:
    """Return the three values over all steps, in the order in which the old script computed them.

    Its exceptions lost all three at once; here each value carries only its own.
    """
    texts = [step for step in steps if step.is_text]
    raised = next((step.raised for step in texts if step.raised), None if texts else "ZeroDivisionError")
    rouge_sum = sum(step.rouge_l for step in texts if step.rouge_l is not None)
    actions = [entry for step in steps for entry in step.actions]
    inputs = [entry for step in steps for entry in step.inputs]
    return {
        "legacy_rouge_l": LegacyMetric(None if raised else rouge_sum / len(texts), rouge_sum, len(texts), raised),
        "legacy_action_em": _mean(actions),
        "legacy_input_em": _mean(inputs),
    }


def _mean(entries: list[int]) -> LegacyMetric:
    if not entries:
        return LegacyMetric(None, 0, 0, "ZeroDivisionError")
    return LegacyMetric(sum(entries) / len(entries), sum(entries), len(entries), None)


def _first_call(text: str) -> Any:
    inside = _widest(_widest(text, "<|startofthink|>", "<|endofthink|>"), "{", "}")
    return json.loads("{" + inside.replace("\n", "") + "}")


def _widest(text: str, opening: str, closing: str) -> str:
    """Return what a greedy `opening([\\s\\S]+)closing` finds: from the first opening to the last closing mark."""
    start = text.find(opening)
    end = text.rfind(closing)
    if start < 0 or end <= start + len(opening):
        raise ValueError(f"no text between {opening} and {closing}")
    return text[start + len(opening) : end]


def _same_parameters(expected: Any, found: Any) -> bool:
    for key, value in expected.items():
        if key not in found.keys() or not found[key] == value:  # noqa: SIM118, SIM201 - a list must fail here, as it did
            return False
    return all(key in expected for key in found.keys())  # noqa: SIM118


def _legacy_text(reference: str, prediction: str) -> LegacyStep:
    try:
        score = _set_rouge_l(_sentences(prediction or " "), _sentences(reference))
    except (ValueError, RecursionError) as error:
        return LegacyStep(is_text=True, raised=type(error).__name__)
    return LegacyStep(is_text=True, rouge_l=score)


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _set_rouge_l(hypothesis: list[list[str]], reference: list[list[str]]) -> float:
    """ROUGE-L of `rouge` 1.0.1: union over sentences of the *set* of words on one LCS path, over sets of words."""
    if not hypothesis:
        raise ValueError("Hypothesis is empty.")
    if not reference:
        raise ValueError("Reference is empty.")
    union: set[str] = set()
    for reference_words in reference:
        for words in hypothesis:
            union |= _lcs_words(reference_words, words)
    recall = len(union) / len({word for words in reference for word in words})
    precision = len(union) / len({word for words in hypothesis for word in words})
    return 2.0 * ((precision * recall) / (precision + recall + _F_EPSILON))


def _lcs_words(left: list[str], right: list[str]) -> set[str]:
    """Return the words on the LCS path that `rouge` walks back (ties: leave a word of `right` first).

    Raises:
        RecursionError: the path is longer than the original's recursion could go.
    """
    if min(len(left), len(right)) >= _DEEPEST_RECURSION:
        raise RecursionError
    table = _lcs_table(left, right)
    i, j, frames = len(left), len(right), 1
    words: set[str] = set()
    while i and j:
        if left[i - 1] == right[j - 1]:
            words.add(left[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1, j] > table[i, j - 1]:
            i -= 1
        else:
            j -= 1
        frames += 1
    if frames > _DEEPEST_RECURSION:
        raise RecursionError
    return words


def _lcs_table(left: list[str], right: list[str]) -> np.ndarray[Any, np.dtype[np.int16]]:
    """Return LCS lengths of all prefixes, [len(left) + 1, len(right) + 1]; both fit int16 by the caller's check."""
    numbers = {word: number for number, word in enumerate(dict.fromkeys((*left, *right)))}
    row_words = [numbers[word] for word in left]
    column_words = np.array([numbers[word] for word in right])
    table = np.zeros((len(left) + 1, len(right) + 1), dtype=np.int16)
    for i, word in enumerate(row_words):
        grown = np.maximum(table[i, 1:], table[i, :-1] + (column_words == word))
        np.maximum.accumulate(grown, out=table[i + 1, 1:])
    return table
