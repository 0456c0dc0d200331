"""Laws of the built-in dataset."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import yaml

from agentft.data import synthetic
from agentft.data.msagent import read_call_body
from agentft.data.synthetic import generate
from agentft.data.synthetic.catalogue import (
    BRACKETS,
    base_pool,
    chains,
    heldout_families,
    read_yaml,
    shelf,
    slots_of,
    tools,
    value_pools,
)
from agentft.data.synthetic.dialogues import KINDS, draft

FOLDER = Path(synthetic.__file__).parent
SETS = list(itertools.product(("en", "zh"), ("train", "heldout"), (False, True)))
CALL = r"<\|startofthink\|>```JSON\n(?:(?!<\|).)*\n```<\|endofthink\|>"
EXECUTION = r"<\|startofexec\|>```JSON\n(?:(?!<\|).)*\n```<\|endofexec\|>"
TURN_WITH_CALLS = re.compile(
    rf"(?:[^<]+\n)?{CALL}(?:\n\n{CALL})*\Z|(?:[^<]+\n)?{CALL}\n\n{EXECUTION}(?:\n{CALL}\n\n{EXECUTION})*(?:\n[^<]+)?\Z",
    re.DOTALL,
)
BODIES = re.compile(r"<\|startof(think|exec)\|>(.*?)<\|endof(?:think|exec)\|>", re.DOTALL)


@cache
def records_of(language: str, part: str, unseen_tools: bool, count: int = 700) -> list[dict]:
    return list(generate(count, languages={language: 1.0}, part=part, unseen_tools=unseen_tools))


def turns(record: dict, role: str) -> list[str]:
    return [turn["value"] for turn in record["conversations"] if turn["from"] == role]


def listed_tools(record: dict) -> dict[str, dict]:
    lines = turns(record, "system")[0].split("\n\n")[1:]
    tools = []
    for number, line in enumerate(lines, 1):
        head, _, entry = line.partition(". ")
        assert head == str(number)
        tools.append(json.loads(entry))
    names = [tool["name"] for tool in tools]
    assert len(set(names)) == len(names)
    return {tool["name"]: tool for tool in tools}


def schema_of(tool: dict) -> dict:
    properties = {p["name"]: {k: p[k] for k in ("type", "enum") if k in p} for p in tool["parameters"]}
    assert len(properties) == len(tool["parameters"])
    return {
        "type": "object",
        "properties": properties,
        "required": [p["name"] for p in tool["parameters"] if p["required"]],
        "additionalProperties": False,
    }


def calls_of(record: dict):
    for text in turns(record, "assistant"):
        for kind, body in BODIES.findall(text):
            if kind == "think":
                requests = read_call_body(body)
                assert isinstance(requests, tuple), requests
                yield from requests


@pytest.mark.parametrize(("language", "part", "unseen_tools"), SETS)
class TestEveryRecord:
    def test_alternates_roles_and_ends_with_the_assistant(self, language, part, unseen_tools):
        for number, record in enumerate(records_of(language, part, unseen_tools)):
            assert record["id"] == f"synthetic-{part}-0-{number:06d}"
            roles = [turn["from"] for turn in record["conversations"]]
            assert roles == ["system"] + ["user", "assistant"] * (len(roles) // 2)
            assert len(roles) <= 1 + 2 * 3
            assert all(turn["value"] and turn["value"] == turn["value"].strip() for turn in record["conversations"])

    def test_has_the_marks_and_line_breaks_of_the_form(self, language, part, unseen_tools):
        for record in records_of(language, part, unseen_tools):
            assert all("<|" not in text for text in turns(record, "user"))
            for text in turns(record, "assistant"):
                assert "<|" not in text or TURN_WITH_CALLS.match(text), text
            system = turns(record, "system")[0]
            assert system.count("<|startofthink|>") == system.count("<|endofthink|>") == 1

    def test_calls_listed_tools_as_their_schema_says(self, language, part, unseen_tools):
        for record in records_of(language, part, unseen_tools):
            listed = listed_tools(record)
            assert 2 <= len(listed) <= 4
            for request in calls_of(record):
                assert not request.extras
                jsonschema.Draft202012Validator(schema_of(listed[request.name])).validate(request.arguments)

    def test_takes_every_value_from_the_user_or_an_earlier_result(self, language, part, unseen_tools):
        for record in records_of(language, part, unseen_tools):
            heard = ""
            for turn in record["conversations"][1:]:
                if turn["from"] == "user":
                    heard += turn["value"].lower()
                    continue
                for kind, body in BODIES.findall(turn["value"]):
                    if kind == "exec":
                        heard += body.lower()
                        continue
                    for request in read_call_body(body):
                        for value in request.arguments.values():
                            assert isinstance(value, bool) or str(value).lower() in heard, (record["id"], value)

    def test_sums_up_with_values_of_the_last_observation(self, language, part, unseen_tools):
        for record in records_of(language, part, unseen_tools):
            for text in turns(record, "assistant"):
                last = BODIES.findall(text)[-1:]
                summary = text.rpartition("<|endofexec|>")[2].strip()
                if not last or last[0][0] == "think" or not summary:
                    continue
                observation = json.loads(last[0][1].removeprefix("```JSON").removesuffix("```"))
                values = [v for value in observation.values() for v in (value if isinstance(value, list) else [value])]
                assert any(str(v).lower() in summary.lower() for v in values), text


def fingerprint_of(records) -> str:
    return hashlib.sha256(json.dumps(list(records), ensure_ascii=False).encode()).hexdigest()


def test_same_bytes_twice_and_in_a_process_with_another_hash_seed():
    arguments = {"seed": 5, "languages": {"zh": 0.5, "en": 0.5}, "part": "heldout"}
    program = (
        "import sys; sys.path[:0] = ['tests/data', '.']\n"
        "from test_synthetic import fingerprint_of, generate\n"
        f"print(fingerprint_of(generate(60, **{arguments!r})))"
    )
    expected = fingerprint_of(generate(60, **arguments))
    assert expected == fingerprint_of(generate(60, **arguments))
    root = Path(__file__).parents[2]
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        process = subprocess.run(
            [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, check=True
        )
        assert process.stdout.strip() == expected


@pytest.mark.parametrize(
    ("count", "arguments", "expected"),
    [
        (400, {}, "5710f86ad7051a18"),
        (300, {"seed": 7, "part": "heldout"}, "1739b31ba0f44316"),
        (300, {"seed": 42, "languages": {"en": 1.0}, "unseen_tools": True}, "49ff09f5fbaaf618"),
        (
            300,
            {"seed": 42, "languages": {"en": 1.0}, "part": "heldout", "unseen_tools": True, "max_rounds": 5},
            "3f0bd27fd4a18f3e",
        ),
        (400, {"seed": 1, "languages": {"zh": 1.0}, "max_rounds": 1}, "cba80cc5887d5ec4"),
        (400, {"seed": 3, "languages": {"zh": 1.0}, "part": "heldout"}, "78370f1555cbd889"),
        (300, {"seed": 3, "languages": {"zh": 1.0}, "unseen_tools": True}, "e0f57d30ef6035a5"),
        (
            300,
            {"seed": 11, "languages": {"en": 1, "zh": 2}, "part": "heldout", "unseen_tools": True},
            "e00bc85ff2c889e6",
        ),
    ],
)
def test_the_records_of_a_seed_stay_what_they_were(count, arguments, expected):
    """A run of another version of agentft can be compared only while the same seed gives the same bytes."""
    assert fingerprint_of(generate(count, **arguments))[:16] == expected


def test_a_longer_run_begins_with_a_shorter_one():
    assert list(generate(10, seed=3)) == list(generate(100, seed=3))[:10]
    assert list(generate(10, seed=3)) != list(generate(10, seed=4))


def test_the_order_of_the_languages_does_not_matter():
    assert list(generate(20, languages={"en": 0.5, "zh": 0.5})) == list(generate(20, languages={"zh": 0.5, "en": 0.5}))


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("unseen_tools", [False, True])
def test_train_and_heldout_share_no_first_user_turn(language, unseen_tools):
    firsts = [
        {turns(record, "user")[0] for record in records_of(language, part, unseen_tools)}
        for part in ("train", "heldout")
    ]
    assert not firsts[0] & firsts[1]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_train_and_heldout_draw_from_other_values(language):
    for pool in ("city", "person", "order", "date", "email", "product", "symbol", "place", "meeting"):
        if language == "zh" and pool == "email":
            continue
        drawn = []
        for part in ("train", "heldout"):
            rng = random.Random("values")
            drawn.append({value_pools(language, part).draw(pool, rng)[1] for _ in range(300)})
        assert not drawn[0] & drawn[1], pool


@pytest.mark.parametrize("language", ["en", "zh"])
def test_unseen_tools_are_disjoint_and_cover_the_catalogue(language):
    train, heldout = (set(shelf(language, part, True).by_key) for part in ("train", "heldout"))
    assert not train & heldout
    assert train | heldout == set(shelf(language, "train", False).by_key)
    assert len(heldout) >= 8
    assert shelf(language, "heldout", True).chains


def test_listed_descriptions_of_unseen_tools_are_disjoint():
    described = [
        {tool["description"] for record in records_of("en", part, True) for tool in listed_tools(record).values()}
        for part in ("train", "heldout")
    ]
    assert not described[0] & described[1]


@pytest.mark.parametrize(("language", "part", "unseen_tools"), SETS)
def test_every_kind_and_every_tool_occurs(language, part, unseen_tools):
    chosen = {"seed": 1, "languages": {language: 1.0}, "part": part, "unseen_tools": unseen_tools, "max_rounds": 3}
    kinds: Counter[str] = Counter()
    descriptions: set[str] = set()
    for kind, conversation in (draft(number, **chosen) for number in range(900)):
        kinds[kind] += 1
        descriptions |= {tool["description"] for tool in listed_tools({"conversations": conversation}).values()}
    assert set(kinds) == set(KINDS)
    assert 0.28 < kinds["single_call"] / 900 < 0.44
    for tool in shelf(language, part, unseen_tools).tools:
        assert descriptions & set(tool.descriptions), tool.key


def test_shares_of_the_kinds_sum_to_one():
    assert sum(kind.share for kind in KINDS.values()) == pytest.approx(1.0)


def test_conversations_are_short():
    lengths = {
        language: sorted(sum(len(t["value"]) for t in r["conversations"]) for r in records_of(language, "train", False))
        for language in ("en", "zh")
    }
    assert 750 <= statistics.median(lengths["en"]) <= 1050
    assert statistics.median(lengths["zh"]) <= 900
    assert max(lengths["en"]) < 3000
    single = sum(len(r["conversations"]) == 3 for r in records_of("en", "train", False))
    assert single / 700 > 0.7


def test_first_user_turns_are_distinct():
    firsts = [turns(record, "user")[0] for record in generate(2000)]
    assert len(set(firsts)) >= 0.95 * 2000


def test_languages_are_mixed_as_asked():
    records = list(generate(1000, seed=8, languages={"en": 3, "zh": 1}))
    chinese = sum(bool(re.search(r"[一-鿿]", turns(record, "user")[0])) for record in records)
    assert 200 <= chinese <= 300


def test_one_round_is_all_where_one_is_allowed():
    assert all(len(record["conversations"]) == 3 for record in generate(300, max_rounds=1))


def test_tool_names_vary():
    names = {name for record in records_of("en", "train", False) for name in listed_tools(record)}
    assert len(names) > 700
    assert any("." in name for name in names)
    assert any(re.fullmatch(r"[a-z]+[A-Z]\w*", name) for name in names)


def test_a_minority_of_calls_is_indented():
    records = list(generate(2000))
    indented = sum('```JSON\n{\n   "' in text for record in records for text in turns(record, "assistant"))
    calling = sum("```JSON" in text for record in records for text in turns(record, "assistant"))
    assert 0.05 < indented / calling < 0.16


class TestCatalogue:
    @pytest.mark.parametrize("name", ["tools", "chains", "numbers", "en", "zh"])
    def test_no_key_of_a_file_stands_twice(self, name):
        """YAML keeps the last of two equal keys, so a second tool of one name would hide the first."""
        waiting = [yaml.compose((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))]
        while waiting:
            node = waiting.pop()
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            keys = [key.value for key, _ in pairs]
            assert len(set(keys)) == len(keys), keys
            children = [value for _, value in pairs] or (node.value if isinstance(node, yaml.SequenceNode) else [])
            waiting += children

    def test_every_word_of_a_file_is_text_and_every_list_has_one_of_each_part(self):
        """`on`, `no` and numbers stay words; the third entry of a list is the first of the held-out part."""
        for language in ("en", "zh"):
            words = read_yaml(f"{language}.yaml")
            for part in ("split", "shared", "enumerations", "booleans"):
                for pool, each in words[part].items():
                    assert all(isinstance(word, str) and word for word in each), pool
                    assert len(set(each)) == len(each), pool
                    assert len(each) >= (3 if part == "split" else 2), pool
        assert read_yaml("en.yaml")["booleans"]["on_off"] == ["on", "off"]

    def test_is_as_large_as_promised(self):
        assert len(tools("en")) >= 40
        assert len(tools("zh")) >= 20
        assert {tool.key for tool in tools("en")} >= {tool.key for tool in tools("zh")}
        assert len({tool.key for tool in tools("en")}) == len(tools("en"))
        assert {tool.family for tool in tools("en")} >= heldout_families()

    @pytest.mark.parametrize("language", ["en", "zh"])
    def test_every_phrasing_mentions_every_parameter_and_brackets_the_optional_ones(self, language):
        for tool in shelf(language, "train", False).tools:
            optional = {p.key for p in tool.parameters if not p.required}
            slots = {p.key for p in tool.parameters}
            for ask in tool.asks:
                assert slots_of(ask) == slots, (tool.key, ask)
                bare = slots_of(BRACKETS.sub("", ask))
                assert not bare & optional, (tool.key, ask)
            for both in tool.both:
                required = {p.key for p in tool.parameters if p.required}
                assert slots_of(both) == required | {f"{tool.again}2"}, both
            for summary in tool.summaries:
                mentioned = slots_of(summary)
                assert mentioned <= (slots - optional) | set(tool.result), (tool.key, summary)
            assert len(tool.asks) >= 2
            assert 2 <= len(tool.summaries) <= 4

    @pytest.mark.parametrize("language", ["en", "zh"])
    def test_every_pool_exists_in_both_parts(self, language):
        for part in ("train", "heldout"):
            pools = value_pools(language, part).pools()
            for tool in shelf(language, part, False).tools:
                assert all(base_pool(p.pool) in pools for p in tool.parameters), tool.key
                named = [source for source in tool.result.values() if isinstance(source, str)]
                assert all(source.removesuffix("*2") in pools for source in named), tool.key
                assert not tool.again or tool.again in {p.key for p in tool.parameters}
                assert all(p.description for p in tool.parameters), tool.key

    def test_parameter_names_of_a_tool_never_clash(self):
        for tool in tools("en"):
            names = [{name.replace("_", "") for name in parameter.names} for parameter in tool.parameters]
            assert sum(map(len, names)) == len(set().union(*names)), tool.key

    @pytest.mark.parametrize("language", ["en", "zh"])
    def test_chains_link_fields_that_exist(self, language):
        by_key = {tool.key: tool for tool in tools(language)}
        for chain in chains(language):
            first, second = (by_key[key] for key in chain.tools)
            assert set(chain.links.values()) <= set(first.result)
            needed = {p.key for p in second.parameters if p.required} - set(chain.links)
            wanted = {p.key for p in first.parameters if p.required} | needed
            assert chain.at_once
            for phrasing in chain.at_once:
                assert slots_of(phrasing) == wanted, phrasing
            for phrasing in chain.then:
                assert slots_of(phrasing) == needed, phrasing
