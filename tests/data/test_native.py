"""The laws of the native layouts: prompts are prefixes, what is rendered reads back, nothing but the agent is trained."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from agentft.data.turn_builder import FormError, TurnBuilder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentft.data.calls import ToolCall
from agentft.data.conversation import Conversation, Origin
from agentft.data.grammar import Call, Observation, Text
from agentft.data.native_system import SystemReading, read_system
from agentft.data.records import read_record
from agentft.data.render import CallForm, Kind
from agentft.data.template_choice import NAMES, choose_template, detect_family
from agentft.data.tokens import IGNORE_INDEX, SegmentEncoder, tokenize
from agentft.errors import ConfigError
from agentft.evaluation.parse import END_OF_SEQUENCE_TEXTS, USER_TAGS, parse_reply, to_msagent
from agentft.evaluation.steps import conversation_steps
from agentft.model.random_weights import byte_tokenizer

FAMILIES = ("chatml", "qwen2.5", "qwen3", "llama3")
QWEN_MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>")


@cache
def family_tokenizer(family: str):
    """The byte-level tokenizer with the added tokens of a family; Qwen's marks are not special there, as in Qwen's own."""
    tokenizer = byte_tokenizer()
    if family == "llama3":
        tokenizer.add_special_tokens({"additional_special_tokens": list(LLAMA_TOKENS)})
    if family in ("qwen2.5", "qwen3"):
        tokenizer.add_tokens(list(QWEN_MARKS))
    if family == "qwen3":
        tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


@cache
def family(name: str):
    tokenizer = family_tokenizer(name)
    return tokenizer, SegmentEncoder(tokenizer), choose_template(name, tokenizer)


def read(record: dict) -> Conversation:
    outcome = read_record(record, Origin("test", 1))
    assert isinstance(outcome, tuple), outcome
    return outcome[0]


def conversation(*turns: tuple[str, str]) -> Conversation:
    return read({"id": "c", "conversations": [{"from": role, "value": value} for role, value in turns]})


def call(name: str, **parameters: object) -> str:
    return f"<|startofthink|>```JSON\n{json.dumps({'api_name': name, 'parameters': parameters})}\n```<|endofthink|>"


def executed(text: str) -> str:
    return f"\n\n<|startofexec|>```JSON\n{text}\n```<|endofexec|>\n"


SYSTEM = (
    "You help. If a plugin is needed, give its call as JSON with api_name and parameters between <|startofthink|> and "
    "<|endofthink|>. Be short:\n\n"
    '1. {"name": "tide", "description": "Tides", "parameters": '
    '[{"name": "harbour", "description": "Where", "required": true, "type": "string"}]}'
)
TIDE_DECLARATION = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": "Tides",
        "parameters": {
            "type": "object",
            "properties": {"harbour": {"description": "Where", "type": "string"}},
            "required": ["harbour"],
        },
    },
}

HUSUM, KIEL = '{"high": "14:20"}', '{"high": "15"}'


def tide() -> Conversation:
    return conversation(
        ("system", SYSTEM),
        ("user", "High tide in Husum and Kiel?"),
        (
            "assistant",
            f"I look.\n{call('tide', harbour='Husum')}{call('tide', harbour='Kiel')}"
            f"{executed(HUSUM)}{executed(KIEL)}At 14:20 and 15.",
        ),
        ("user", "Thanks"),
        ("assistant", "Welcome."),
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_arguments_are_told_from_the_frame_of_a_call(name: str):
    tokenizer, encoder, template = family(name)
    (example,) = tokenize([tide()], template, encoder)
    said = {
        kind: [tokenizer.decode(example.input_ids[s.start : s.stop]) for s in example.spans if s.kind is kind]
        for kind in (Kind.call, Kind.frame)
    }
    assert said[Kind.call] == ["tide", '{"harbour": "Husum"}', "tide", '{"harbour": "Kiel"}']
    frame = "".join(said[Kind.frame])
    assert frame.count('{"name": "') == 2
    assert "Husum" not in frame


# --- The layouts, letter by letter ---


QWEN_TIDE = (
    "<|im_start|>system\nYou help. Be short:\n\n# Tools\n\nYou may call one or more functions to assist with the user "
    "query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    + json.dumps(TIDE_DECLARATION)
    + "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call><|im_end|>\n"
    "<|im_start|>user\nHigh tide in Husum and Kiel?<|im_end|>\n"
    "<|im_start|>assistant\n{think}I look.\n"
    '<tool_call>\n{{"name": "tide", "arguments": {{"harbour": "Husum"}}}}\n</tool_call>\n'
    '<tool_call>\n{{"name": "tide", "arguments": {{"harbour": "Kiel"}}}}\n</tool_call><|im_end|>\n'
    '<|im_start|>user\n<tool_response>\n{{"high": "14:20"}}\n</tool_response>\n'
    '<tool_response>\n{{"high": "15"}}\n</tool_response><|im_end|>\n'
    "<|im_start|>assistant\n{think}At 14:20 and 15.<|im_end|>\n"
    "<|im_start|>user\nThanks<|im_end|>\n"
    "<|im_start|>assistant\n{think}Welcome.<|im_end|>\n"
)
LLAMA_TIDE = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou have access to the "
    "following functions. To call a function, please respond with JSON for a function call.Respond in the format "
    '{"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.\n\n'
    + json.dumps(TIDE_DECLARATION, indent=4)
    + "\n\nYou help. Be short:<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHigh tide in Husum and Kiel?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nI look.<|python_tag|>"
    '{"name": "tide", "parameters": {"harbour": "Husum"}}; {"name": "tide", "parameters": {"harbour": "Kiel"}}<|eot_id|>'
    '<|start_header_id|>ipython<|end_header_id|>\n\n{"high": "14:20"}<|eot_id|>'
    '<|start_header_id|>ipython<|end_header_id|>\n\n{"high": "15"}<|eot_id|>'
    "<|start_header_id|>assistant<|end_header_id|>\n\nAt 14:20 and 15.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nThanks<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nWelcome.<|eot_id|>"
)


def _expected(name: str) -> str:
    if name == "llama3":
        return LLAMA_TIDE
    head, user, rest = QWEN_TIDE.partition("<|im_start|>user")
    think = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    return head + user + rest.replace("{{", "{").replace("}}", "}").replace("{think}", think)


@pytest.mark.parametrize("name", FAMILIES)
def test_layout_of_a_conversation_with_parallel_calls(name):
    _, _, template = family(name)
    assert "".join(segment.text for segment in template.render(tide())) == _expected(name)


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_the_whole_text_with_its_special_tokens(name):
    """With no mark in the conversation itself, a plain call of the tokenizer gives the same ids."""
    tokenizer, encoder, template = family(name)
    (example,) = tokenize([tide()], template, encoder)
    assert example.input_ids.tolist() == tokenizer(_expected(name), add_special_tokens=False).input_ids


def test_smollm2_layout_equals_its_own_chat_template(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    template = choose_template("native", tokenizer)
    encoder = SegmentEncoder(tokenizer)
    talks = [
        [("system", "Be kind."), ("user", "Hello 123,\n\n you?"), ("assistant", "Fine. 45% sure\n- yes")],
        [("user", "早上好"), ("assistant", "你好！"), ("user", "  2 + 2?  "), ("assistant", "It is 4.")],
    ]
    for turns in talks:
        messages = [{"role": role, "content": content} for role, content in turns]
        (example,) = tokenize([conversation(*turns)], template, encoder)
        text = "".join(segment.text for segment in template.render(conversation(*turns)))
        assert text == tokenizer.apply_chat_template(messages, tokenize=False)
        assert example.input_ids.tolist() == list(
            tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        )
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert example.input_ids[: example.steps()[-1][0]].tolist() == list(prompt)


@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen3-0.6B"])
def test_qwen_layout_equals_its_own_chat_template(model):
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError):
        pytest.skip(f"the tokenizer of {model} is not on this machine")
    talk = conversation(
        ("system", SYSTEM),
        ("user", "High tide in Husum?"),
        ("assistant", f"{call('tide', harbour='Husum')}{executed(HUSUM)}At 14:20."),
    )
    messages = [
        {"role": "system", "content": "You help. Be short:"},
        {"role": "user", "content": "High tide in Husum?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "tide", "arguments": {"harbour": "Husum"}}}],
        },
        {"role": "tool", "content": '{"high": "14:20"}'},
        {"role": "assistant", "content": "At 14:20."},
    ]
    (example,) = tokenize([talk], choose_template("native", tokenizer), SegmentEncoder(tokenizer))
    options = {
        "tools": [TIDE_DECLARATION],
        "add_generation_prompt": True,
        "enable_thinking": False,
        "return_dict": True,
    }
    # The first prompt: of later ones Qwen3's own layout differs by the empty thoughts of earlier steps.
    prompt = tokenizer.apply_chat_template(messages[:2], **options)["input_ids"]
    assert example.input_ids[: example.steps()[0][0]].tolist() == list(prompt)
    if "2.5" in model:
        whole = tokenizer.apply_chat_template(messages, tools=[TIDE_DECLARATION], return_dict=True)["input_ids"]
        assert example.input_ids.tolist() == list(whole)


# --- The laws ---


WORDS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(str.strip)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.sampled_from(["</tool_call>", "<|im_end|>"]) | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)
CALLS = st.tuples(st.just("call"), WORDS, st.dictionaries(WORDS, VALUES, max_size=3))
STEPS = st.tuples(st.none() | WORDS, st.lists(CALLS, max_size=3)).filter(lambda step: step[0] is not None or step[1])
TURNS = st.tuples(WORDS, st.lists(STEPS, min_size=1, max_size=3))


@st.composite
def conversations(draw) -> Conversation | None:
    """None where the words that were drawn are marks, which no conversation can say."""
    builder = TurnBuilder()
    builder.system(draw(st.none() | WORDS) or "", [])
    try:
        for question, steps in draw(st.lists(TURNS, min_size=1, max_size=3)):
            builder.user(question)
            _draw_turn(draw, builder, steps)
            builder.end_assistant()
    except FormError as error:
        if error.reason not in ("marks_in_text", "not_representable", "mark_misspelt"):
            raise
        return None
    outcome = read_record({"id": "c", "conversations": builder.turns}, Origin("test", 1))
    return outcome[0] if isinstance(outcome, tuple) else None


def _draw_turn(draw, builder: TurnBuilder, steps) -> None:
    for text, calls in steps:
        if text is not None:
            builder.say(text)
        for _, name, parameters in calls:
            builder.call(name, parameters)
        if not calls:
            break
        for _ in calls:
            builder.observe(draw(WORDS))


def _said(parts) -> tuple[list[tuple[str, dict]], str]:
    requests = [r for part in parts if isinstance(part, Call) for r in part.requests]
    text = "\n".join(part.source.strip() for part in parts if isinstance(part, Text) and part.source.strip())
    return [(r.name, r.arguments) for r in requests], text


def _steps(talk: Conversation):
    return [talk.messages[at].source for at in talk.steps]


def _check_laws(name: str, talk: Conversation) -> None:
    tokenizer, encoder, template = family(name)
    (example,) = tokenize([talk], template, encoder)
    stop_id = encoder.special_id(template.stop_token)
    expected = _steps(talk)
    steps = conversation_steps(talk, example, template)
    assert len(steps) == len(expected)
    for step, parts in zip(steps, expected, strict=True):
        ids = example.input_ids[step.start : step.stop].tolist()
        assert ids[-1] == stop_id
        assert ids.count(stop_id) == 1
        said = tokenizer.decode(ids[:-1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        reply = parse_reply(step.record(said).prediction)
        assert ([(r.name, r.arguments) for r in reply.requests], reply.text) == _said(parts)
        assert reply.malformed == 0
    for start, _ in example.steps():
        (alone,) = encoder.encode([("prompt", _context(template.render(talk), example, start, encoder))])
        assert alone.input_ids.tolist() == example.input_ids[:start].tolist()


def _context(segments, example, start, encoder):
    """The segments before position `start`, found by encoding ever more of them."""
    for count in range(len(segments) + 1):
        if count < len(segments) and segments[count].trained and (count == 0 or not segments[count - 1].trained):
            (alone,) = encoder.encode([("prompt", segments[:count])])
            if len(alone) == start:
                return segments[:count]
    raise AssertionError("no such prompt")


FOREIGN = "\ue000"
"""Marks every foreign text of `twins`; the agent never says it."""
HOSTILE = st.lists(
    st.sampled_from([*QWEN_MARKS, *LLAMA_TOKENS, "<|im_start|>", "<|im_end|>", "<think>", '{"name": "f"', "\n", "谢"])
    | st.text(max_size=4),
    max_size=5,
).map("".join)


@st.composite
def twins(draw) -> tuple[Conversation, Conversation] | None:
    """One talk twice: with hostile texts of users and tools, and with harmless ones in their places."""
    rounds = draw(st.lists(st.tuples(HOSTILE, st.lists(HOSTILE, max_size=2)), min_size=1, max_size=3))
    made = []
    for hostile in (True, False):
        turns = [{"from": "system", "value": FOREIGN + "".join(q for q, _ in rounds) if hostile else "x"}]
        for question, results in rounds:
            said = "".join(
                f"{call('f', n=n)}{executed(json.dumps(FOREIGN + result if hostile else 'x'))}"
                for n, result in enumerate(results)
            )
            turns.append({"from": "user", "value": FOREIGN + question if hostile else "x"})
            turns.append({"from": "assistant", "value": f"{said}Done."})
        outcome = read_record({"id": "c", "conversations": turns}, Origin("test", 1))
        if not isinstance(outcome, tuple):
            return None
        made.append(outcome[0])
    return made[0], made[1]


@pytest.mark.parametrize("name", [*FAMILIES, "msagent"])
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(pair=twins())
def test_foreign_text_is_never_a_label_and_never_a_control_token(name, pair):
    if pair is None:
        return
    tokenizer, encoder, template = family(name)
    hostile, harmless = tokenize(pair, template, encoder)
    added = set(tokenizer.get_added_vocab().values())
    controls = [[i for i in example.input_ids.tolist() if i in added] for example in (hostile, harmless)]
    assert controls[0] == controls[1]
    labelled = [example.input_ids[example.labels != IGNORE_INDEX].tolist() for example in (hostile, harmless)]
    assert labelled[0] == labelled[1], "what is trained does not depend on what others say"
    assert FOREIGN not in tokenizer.decode(labelled[0])
    assert FOREIGN in tokenizer.decode(hostile.input_ids.tolist())


@pytest.mark.parametrize("name", [*FAMILIES, "msagent"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(talk=conversations())
def test_a_rendered_step_reads_back_and_its_prompt_is_a_prefix(name, talk):
    if talk is None or family(name)[2].problem(talk) is not None:
        return
    said = [p.source for m in talk.messages for p in m.source or () if name == "msagent" or isinstance(p, Text)]
    if any(end in source for end in (*END_OF_SEQUENCE_TEXTS, *USER_TAGS) for source in said):
        return  # an answer ends where its text names the end of a sequence; calls in the native forms escape it
    _check_laws(name, talk)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_laws_hold_for_the_golden_conversations(name, golden_conversations):
    for talk in golden_conversations.values():
        assert family(name)[2].problem(talk) is None
        _check_laws(name, talk)


@pytest.mark.parametrize("name", FAMILIES)
def test_observations_users_and_systems_are_never_trained(name, golden_conversations):
    _, _, template = family(name)
    for talk in golden_conversations.values():
        for segment in template.render(talk):
            assert segment.trained == (segment.kind in (Kind.text, Kind.call, Kind.frame, Kind.stop))
        trained = "".join(segment.text for segment in template.render(talk) if segment.trained)
        for message in talk.messages:
            assert message.role in ("assistant", "tool") or message.text not in trained
            for part in message.source or ():
                assert not isinstance(part, Observation) or part.body.strip("`JSON\n") not in trained


@pytest.mark.parametrize("name", FAMILIES)
def test_marks_that_a_conversation_quotes_are_letters(name):
    """No text reaches a special token, nor the marks that Qwen's tokenizer does not call special."""
    tokenizer, encoder, template = family(name)
    quoted = "".join((*QWEN_MARKS, *LLAMA_TOKENS, "<|im_start|>", "<|im_end|>", "<think>"))
    plain = conversation(("user", "u"), ("assistant", "Yes."))
    hostile = conversation(("system", quoted), ("user", quoted), ("assistant", "Yes."))
    added = set(tokenizer.get_added_vocab().values())

    def control_tokens(talk):
        (example,) = tokenize([talk], template, encoder)
        return [i for i in example.input_ids.tolist() if i in added]

    with_system = conversation(("system", "s"), ("user", "u"), ("assistant", "Yes."))
    assert control_tokens(hostile) == control_tokens(with_system)
    assert set(control_tokens(plain)) <= added


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_marks_of_the_layout_are_the_models_own_tokens(name):
    tokenizer, encoder, template = family(name)
    (example,) = tokenize([tide()], template, encoder)
    ids = example.input_ids.tolist()
    # Twice in the wording of the block of tools, twice as calls.
    assert ids.count(tokenizer.convert_tokens_to_ids("<tool_call>")) == 4
    assert ids.count(tokenizer.convert_tokens_to_ids("<tool_response>")) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_earlier_rounds_can_be_shown_without_being_trained_and_give_the_same_ids(name, golden_conversations):
    _, encoder, template = family(name)
    talk = tide()
    (whole,) = encoder.encode([("c", template.render(talk))])
    (shown,) = encoder.encode([("c", template.render(talk, context_rounds=1))], context_rounds=1)
    assert shown.input_ids.tolist() == whole.input_ids.tolist()
    assert shown.steps() == whole.steps()[2:]
    (step,) = conversation_steps(talk, shown, template)
    assert step.reference == "Welcome."


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("Now <tool_call> is a mark.", "text_reads_as_call"),
        ("<|startofthink|>{oops<|endofthink|>", "call_without_native_form"),
    ],
)
def test_what_would_read_back_otherwise_is_refused(source, reason):
    found = family("qwen2.5")[2].problem(conversation(("user", "u"), ("assistant", source)))
    assert found is not None
    assert found[0] == reason


def test_a_llama_text_that_reads_as_a_call_is_refused():
    talk = conversation(("user", "u"), ("assistant", '{"name": "x", "parameters": {}}'))
    assert family("llama3")[2].problem(talk)[0] == "text_reads_as_call"
    assert family("qwen2.5")[2].problem(talk) is None


# --- The system text ---


def test_tools_and_words_about_marks_move_into_the_layouts_own_block():
    system = read_system(SYSTEM)
    assert system.reading is SystemReading.tools_native
    assert system.text == "You help. Be short:"
    assert [json.loads(tool) for tool in system.tools] == [TIDE_DECLARATION]


@pytest.mark.parametrize(
    ("system", "reading"),
    [
        ("", SystemReading.none),
        ("Use <|startofthink|> and <|endofthink|> for JSON.", SystemReading.no_tools),
        (SYSTEM.replace("JSON with api_name", "something"), SystemReading.tools_native_marks_kept),
        (SYSTEM.replace('"type": "string"}]', '"type": "string"}'), SystemReading.tools_unreadable),
        (SYSTEM.replace('"description": "Tides"', '"paths": {}'), SystemReading.tools_unreadable),
    ],
)
def test_a_system_text_that_is_not_understood_is_kept(system, reading):
    found = read_system(system)
    assert found.reading is reading
    if reading is not SystemReading.tools_native_marks_kept:
        assert (found.text, found.tools) == (system, ())
    else:
        assert "<|startofthink|>" in found.text
        assert '"tide"' not in found.text


def test_every_synthetic_and_introduced_instruction_is_recognised():
    from agentft.data.turn_builder import TOOLS_INTRODUCTION

    from agentft.data import synthetic

    records = synthetic.generate(60, seed=3, languages={"en": 0.5, "zh": 0.5}, part="train")
    texts = {record["conversations"][0]["value"] for record in records}
    texts.add(TOOLS_INTRODUCTION + "\n\n" + SYSTEM[SYSTEM.index("1. {") :])
    assert {read_system(text).reading for text in texts} == {SystemReading.tools_native}


def test_nested_and_optional_parameters_survive_as_a_schema():
    entry = {
        "name": "t",
        "description": "d",
        "parameters": [
            {
                "name": "p",
                "description": "",
                "required": False,
                "type": "object",
                "properties": {"q": {"type": "integer"}},
                "required_fields": ["q"],
            }
        ],
    }
    (tool,) = read_system(f"Tools:\n1. {json.dumps(entry)}\nNow answer.").tools
    assert json.loads(tool)["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "p": {"description": "", "type": "object", "properties": {"q": {"type": "integer"}}, "required": ["q"]}
        },
        "required": [],
    }
    assert read_system(f"Tools:\n1. {json.dumps(entry)}\nNow answer.").text == "Tools:\n\nNow answer."


# --- Native text of a model, read for scoring ---


GOOD = ToolCall("f", {"a": 1})
SHREDS = ["<tool_call>", "</tool_call>", '{"name"', ': "f"}', ";", "<|python_tag|>", " a", "<think>", "</think>"]


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (CallForm.hermes, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'),
        (
            CallForm.hermes,
            '<think>\nhm <tool_call>\n</think>\n\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>',
        ),
        (
            CallForm.hermes,
            '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call><|im_end|>\n<tool_call>x</tool_call>',
        ),
        (
            CallForm.hermes,
            '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n<tool_response>\n<tool_call>no</tool_call>',
        ),
        (CallForm.llama, '{"name": "f", "parameters": {"a": 1}}'),
        (CallForm.llama, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}<|eom_id|>'),
        (CallForm.llama, '{"name": "f", "parameters": {"a": 1}}<|eot_id|><|start_header_id|>ipython'),
    ],
)
def test_a_native_call_is_the_same_call_in_msagent_form(form, text):
    reply = parse_reply(to_msagent(text, form))
    assert (reply.requests, reply.malformed, reply.text) == ((GOOD,), 0, "")


@pytest.mark.parametrize(
    ("form", "text", "reason"),
    [
        (CallForm.hermes, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}', "unclosed"),
        (CallForm.hermes, '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', "not_json"),
        (CallForm.hermes, '<tool_call>```json\n{"api_name": "f", "parameters": {}}\n```</tool_call>', "not_json"),
        (CallForm.hermes, '<tool_call>{"api_name": "f", "parameters": {"a": 1}}</tool_call>', "no_name"),
        (CallForm.hermes, '<tool_call>{"name": "f", "arguments": "a"}</tool_call>', "parameters_not_an_object"),
        (CallForm.hermes, '<tool_call>"f"</tool_call>', "not_an_object"),
        (CallForm.hermes, "<tool_call></tool_call>", "empty"),
        (CallForm.llama, '{"name": "f", "parameters": {"a": 1}', "not_json"),
        (CallForm.llama, '<|python_tag|>f.call(a="1")', "not_json"),
        (CallForm.llama, '{"name": 1, "parameters": {"a": 1}}', "no_name"),
        (CallForm.llama, "<|python_tag|>", "empty"),
    ],
)
def test_a_malformed_native_call_is_malformed_in_msagent_form(form, text, reason):
    reply = parse_reply(to_msagent(text, form))
    assert reply.requests == ()
    assert [attempt.failure.reason for attempt in reply.attempts if attempt.failure] == [reason]


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(["<tool_call>", "</tool_call>", '{"name"', ': "f"}', ";", "<|python_tag|>", " a"])
    ).map("".join)
)
def test_no_text_of_a_model_makes_the_reader_raise(text):
    for form in CallForm:
        parse_reply(to_msagent(text, form))


def test_words_around_llama_calls_stay_words():
    reply = parse_reply(to_msagent('Wait.<|python_tag|>{"name": "f", "parameters": {"a": 1}}\nDone.', CallForm.llama))
    assert (reply.requests, reply.text, reply.malformed) == ((GOOD,), "Wait.\nDone.", 0)
    assert parse_reply(to_msagent('{"answer": 1}', CallForm.llama)).text == '{"answer": 1}'


# --- The choice ---


@pytest.mark.parametrize("name", FAMILIES)
def test_native_means_the_layout_of_the_tokenizers_family(name):
    tokenizer = family_tokenizer(name)
    assert detect_family(tokenizer) == name
    assert type(choose_template("native", tokenizer)) is type(choose_template(name, tokenizer))


def test_every_step_ends_with_the_layouts_own_token_not_with_the_end_of_sequence():
    tokenizer = family_tokenizer("llama3")
    assert tokenizer.eos_token == "<|im_end|>"
    assert choose_template("llama3", tokenizer).stop_token == "<|eot_id|>"
    assert choose_template("msagent", tokenizer).stop_token == "<|im_end|>"


def test_a_layout_that_the_tokenizer_cannot_write_is_refused():
    with pytest.raises(ConfigError, match="start_header_id"):
        choose_template("llama3", family_tokenizer("chatml"))
    with pytest.raises(ConfigError, match=", ".join(NAMES)):
        choose_template("vicuna", family_tokenizer("chatml"))


@pytest.mark.parametrize("name", ["qwen2.5", "llama3"])
def test_real_conversations_hold_the_laws(name, shared_data: Path):
    from agentft.data.sources import read_conversations, read_local

    talks = [c for c in read_conversations(read_local(shared_data / "dev.jsonl")) if isinstance(c, Conversation)]
    _, _, template = family(name)
    assert [template.problem(talk) for talk in talks] == [None] * len(talks)
    for talk in talks[::10]:
        _check_laws(name, talk)
