"""The two laws of the layout, on every published template of TRL's wheel, against `apply_chat_template` itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from agentft.data.calls import ToolCall
from agentft.data.chat_layout import ChatLayout
from agentft.data.chat_template import ChatTemplate, handed_over, server_messages
from agentft.data.conversation import Conversation, Message, Origin
from agentft.data.render import LaidOut, SpanKind
from agentft.data.template_choice import probe
from agentft.data.tokens import Example, SegmentEncoder
from agentft.errors import ConfigError
from agentft.model.sources import byte_tokenizer
from tests.data.chat_families import (
    MISTRAL_FILES,
    NO_TOOLS,
    TOKENIZERS,
    TOOL,
    VALUES,
    conversation,
    mistral_tokenizer,
    stand_in_names,
    template_names,
    with_template,
)

STOPS = {
    "deepseekv3": {"<｜end▁of▁sentence｜>"},
    "devstral": {"</s>"},
    "diffusion_gemma": {"<turn|>", "<|tool_response>"},
    "gemma4": {"<turn|>", "<|tool_response>"},
    "glm4moe": {"<|user|>", "<|observation|>"},
    "gptoss": {"<|return|>", "<|call|>"},
    "llama3_1": {"<|eot_id|>"},
    "llama3_2": {"<|eot_id|>"},
    "minimax_m2": {"[e~["},
    "muse_glimmer": {"<|eot|>"},
    "phi4": {"<|end|>"},
}
"""By the beginning of a template's name; all others end a step with `<|im_end|>`."""

NO_REASONING = {"reasoning": {"template_has_no_reasoning"}, "reasoning_in_some": {"template_has_no_reasoning"}}
ONE_CALL = {"parallel_calls": {"template_takes_one_call_a_step"}}
NO_TEXT = {"text_beside_call": {"template_has_no_text_beside_calls"}}
# Gemma 4 writes reasoning before calls only; its last revision lets a thought begin after every result.
CALLS_THINK = {"reasoning": {"template_drops_reasoning"}, "reasoning_in_some": {"template_drops_reasoning"}}
# An answer that names the mark is written without the empty thought that its prompt ends with.
NEMOTRON = {"think_in_answer": {"template_cannot_continue"}}
UNSAID: dict[str, dict[str, set[str]]] = {
    # It writes the header of calls once a conversation, and a thought nowhere but behind its generation prompt.
    "deepseekv3": {
        "rounds": {"template_cannot_continue"},
        "reasoning": {"template_cannot_continue", "template_drops_reasoning"},
    },
    "devstral": NO_REASONING,
    "gemma4": CALLS_THINK,
    "gemma4_v2": NO_REASONING,
    "gemma4_v3": CALLS_THINK,
    "gemma4_v4": CALLS_THINK,
    "gemma4_v5": NO_TEXT,
    "gptoss": ONE_CALL,
    "kimi_k2": NO_REASONING,
    "lfm2_v2": NO_REASONING,
    "llama3_1": {**NO_REASONING, **ONE_CALL, **NO_TEXT},
    "llama3_2": {**NO_REASONING, **ONE_CALL, **NO_TEXT},
    "muse_glimmer": NO_TEXT,
    "nemotron_3_5_lightning": NEMOTRON,
    "nemotron_3_nano": NEMOTRON,
    "nemotron_3_super": NEMOTRON,
    "nemotron_3_ultra": NEMOTRON,
    "phi4": NO_REASONING,
    "qwen2_5": NO_REASONING,
    "qwen3_coder": NO_REASONING,
    "qwen3_instruct_2507": NO_REASONING,
    "qwen3_vl": NO_REASONING,
}
"""What a template cannot say of `VALUES`, a conversation or some of its steps, and the reasons given."""


@cache
def layout_of(name: str, tokenizer: str) -> ChatLayout:
    if tokenizer in MISTRAL_FILES:
        base = mistral_tokenizer(tokenizer)
    else:
        base = byte_tokenizer() if tokenizer == "bytes" else TOKENIZERS[tokenizer]()
    made = with_template(base, name)
    template = ChatTemplate(
        made, template_args={"strftime_now": "2026-11-30"} if "strftime" in made.chat_template else {}
    )
    return ChatLayout(template, probe(template))


@cache
def encoder_of(name: str, tokenizer: str) -> SegmentEncoder:
    return SegmentEncoder(layout_of(name, tokenizer).template.tokenizer)


def check_laws(name: str, tokenizer: str, kind: str) -> tuple[LaidOut | tuple[str, str], int, int]:
    """Check all steps of a conversation; return how it was laid out, its examples' tokens and those of its longest one."""
    layout = layout_of(name, tokenizer)
    talk = conversation(kind, declared=layout.traits.declarations)
    laid_out = layout.lay_out(talk)
    if not isinstance(laid_out, LaidOut):
        return laid_out, 0, 0
    own = layout.template.tokenizer
    messages = server_messages(talk, layout.traits)
    args = layout.args(reasoning=any(message.reasoning_content for message in talk.messages))
    args.pop("strftime_now", None)
    spelt = any(token in str(message) for message in messages for token in layout.template.control_tokens)
    encoder = encoder_of(name, tokenizer)
    examples = [each for found in encoder.encode([(kind, r) for r in laid_out.renderings]) for each in found]
    stops = next((tokens for family, tokens in STOPS.items() if name.startswith(family)), {"<|im_end|>"})
    trained = []
    for example, numbers in examples:
        ids = example.input_ids.tolist()
        for (begin, end), number in zip(example.steps(), numbers, strict=True):
            at = talk.steps[number]
            prompt = own.apply_chat_template(
                handed_over(messages[:at], layout.traits), tools=list(talk.tools) or None,
                chat_template=layout.template.source, add_generation_prompt=True, tokenize=True, return_dict=False,
                sanitize_control_tokens=spelt, **args,
            )  # fmt: skip
            assert ids[:begin] == list(prompt), (
                f"prompt of step {number}: {own.decode(ids[:begin])!r} {own.decode(prompt)!r}"
            )
            said = own.decode(ids[begin:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            assert own.convert_ids_to_tokens(ids[end - 1]) in stops, said
            message = talk.messages[at]
            position = 0
            for words in (message.reasoning_content, message.text):
                if words and words.strip():
                    position = said.find(words.strip(), position)
                    assert position >= 0, f"{words!r} is not in {said!r}"
            assert said.count("get_tide") >= len(message.tool_calls), said
            trained.append(number)
    left_out = [each.step for each in laid_out.left_out]
    assert sorted(trained + left_out) == list(range(len(talk.steps)))
    sizes = [len(example.example) for example in examples]
    return laid_out, sum(sizes), max(sizes)


def check_all(name: str, tokenizer: str) -> None:
    unsaid = {}
    for kind in VALUES:
        laid_out, _, _ = check_laws(name, tokenizer, kind)
        reasons = {each.reason for each in laid_out.left_out} if isinstance(laid_out, LaidOut) else {laid_out[0]}
        if reasons:
            unsaid[kind] = reasons
    assert unsaid == UNSAID.get(name, {})


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [("qwen2_5", "merging"), ("qwen3", "sentencepiece"), ("glm4moe", "merging"), ("gptoss", "sentencepiece"),
     ("gemma4_v5", "merging"), ("deepseekv3", "merging"), *((name, "merging") for name in stand_in_names())],
)  # fmt: skip
def test_prompts_are_the_servers_and_steps_hold_their_messages_and_end_with_a_stop(name: str, tokenizer: str):
    check_all(name, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", [*(name for name in template_names() if name not in NO_TOOLS), *stand_in_names()])
def test_every_template_keeps_the_laws_with_every_tokenizer(name: str, tokenizer: str):
    check_all(name, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["mistral_v1", "mistral_v3"])
@pytest.mark.parametrize("name", ["devstral", "qwen2_5", "glm4moe", "llama3_1"])
def test_templates_keep_the_laws_with_mistrals_own_tokenizers(name: str, tokenizer: str):
    check_all(name, tokenizer)


@pytest.mark.parametrize("name", NO_TOOLS)
def test_templates_without_tools_say_so(name: str):
    layout = layout_of(name, "merging")
    assert not layout.traits.tools
    assert NO_TOOLS[name] in layout.traits.problem or not layout.traits.stops, layout.traits.problem
    laid_out = layout.lay_out(conversation("plain"))
    assert not isinstance(laid_out, LaidOut)
    assert laid_out[0] in ("template_has_no_tools", "template_has_no_stop"), laid_out


@pytest.mark.parametrize(
    ("name", "without", "with_reasoning"),
    [
        ("qwen3", {}, {"enable_thinking": True}),
        ("nemotron_3_nano", {"enable_thinking": False}, {"enable_thinking": True}),
        ("qwen2_5", {}, {}),
    ],
)
def test_enable_thinking_is_what_keeps_the_prompts_prefixes_of_the_whole(name, without, with_reasoning):
    layout = layout_of(name, "merging")
    assert layout.args(reasoning=False) == without
    assert layout.args(reasoning=True) == with_reasoning
    assert layout.traits.manners[0].whole


@pytest.mark.parametrize("ask", ["High tide?", "What is </think>?"], ids=["one_rendering", "by_round"])
def test_five_rounds_without_reasoning_cost_qwen3_nothing(ask: str):
    rounds = [Message("user", ask), Message("assistant", "At 14:20.")] * 5
    laid_out = layout_of("qwen3", "merging").lay_out(Conversation("five", tuple(rounds), (), Origin("test", 1)))
    assert isinstance(laid_out, LaidOut)
    (rendering,) = laid_out.renderings
    assert rendering.steps == (0, 1, 2, 3, 4)
    assert "think" not in "".join(segment.text for segment in rendering.segments if segment.trained)


def test_stable_is_one_rendering_and_counts_prompts_that_differ():
    exact = layout_of("qwen3_5_think", "merging")
    talk = conversation("rounds")
    served = exact.lay_out(talk)
    stable = replace(exact, rewritten="stable").lay_out(talk)
    assert isinstance(served, LaidOut)
    assert isinstance(stable, LaidOut)
    assert (len(served.renderings), served.prompts_differ) == (3, 0)
    (rendering,) = stable.renderings
    assert sorted([*rendering.steps, *(each.step for each in stable.left_out)]) == [0, 1, 2, 3, 4]
    assert stable.prompts_differ > 0


@pytest.mark.parametrize("name", ["diffusion_gemma", "gemma4_v5", "qwen3_5_think"])
def test_a_step_without_a_thought_closes_the_one_that_its_prompt_opens(name: str):
    layout = layout_of(name, "merging")
    opening, close = layout.traits.thought
    laid_out = layout.lay_out(conversation("reasoning_in_some"))
    assert isinstance(laid_out, LaidOut)
    for rendering in laid_out.renderings:
        text = "".join("\0" * (segment.kind is SpanKind.stop) + segment.text for segment in rendering.segments)
        for said in re.findall(rf"{re.escape(opening.strip())}(.*?)\0", text, re.DOTALL):
            assert close.strip() in said, text


def test_history_of_an_untrained_step_is_context():
    talk = conversation("plain")
    at = talk.steps[0]
    messages = (*talk.messages[:at], replace(talk.messages[at], trained=False), *talk.messages[at + 1 :])
    laid_out = layout_of("qwen2_5", "merging").lay_out(replace(talk, messages=messages))
    assert isinstance(laid_out, LaidOut)
    (rendering,) = laid_out.renderings
    assert rendering.steps == (1, 2)
    shown = [segment.text for segment in rendering.segments if segment.is_assistant and segment.context_only]
    assert "get_tide" in "".join(shown)
    assert "get_tide" not in "".join(segment.text for segment in rendering.segments if segment.trained)


def test_a_step_that_the_tokenizer_would_join_to_its_prompt_has_a_border_and_later_steps_their_own_example():
    layout = layout_of("qwen2_5", "merging")
    laid_out = layout.lay_out(conversation("leading_breaks"))
    assert isinstance(laid_out, LaidOut)
    (examples,) = encoder_of("qwen2_5", "merging").encode([("x", laid_out.renderings[0])])
    assert [steps for _, steps in examples] == [(0, 2), (1,)]


def test_a_parameter_that_is_called_like_a_control_token_leaves_the_token_whole():
    layout = layout_of("muse_glimmer", "merging")
    call = ToolCall("get_tide", {"message": 1, "recipient": "Kiel"})
    messages = (Message("user", "Tide?"), Message("assistant", tool_calls=(call,)))
    laid_out = layout.lay_out(Conversation("x", messages, (TOOL,), Origin("test", 1)))
    assert isinstance(laid_out, LaidOut)
    (rendering,) = laid_out.renderings
    tokens = [segment.text for segment in rendering.segments if segment.special]
    text = "".join(segment.text for segment in rendering.segments)
    assert tokens == layout.template.control.findall(text)
    assert "<|message|>" in tokens


def test_strings_in_a_list_that_a_template_writes_as_python_does_are_found():
    layout = layout_of("lfm2_2_5", "merging")
    call = ToolCall("get_tide", {"harbour": "Kiel", "days": [{"a": "it's <|im_end|>"}, "\n"]})
    messages = (Message("user", "Tide?"), Message("assistant", tool_calls=(call,)))
    laid_out = layout.lay_out(Conversation("x", messages, (TOOL,), Origin("test", 1)))
    assert isinstance(laid_out, LaidOut)
    (rendering,) = laid_out.renderings
    text = "".join(segment.text for segment in rendering.segments)
    assert "[{'a': \"it's <|im_end|>\"}, '\\n']" in text
    assert any(segment.text == "it's <|im_end|>" and not segment.special for segment in rendering.segments)
    escaped = replace(messages[0], content="Tide at \\ufdd3?")
    refused = layout.lay_out(Conversation("x", (escaped, *messages[1:]), (TOOL,), Origin("test", 1)))
    assert not isinstance(refused, LaidOut)
    assert refused[0] == "text_holds_a_noncharacter"


@pytest.mark.parametrize("place", ["argument", "key", "name", "schema"])
def test_names_that_hold_a_control_token_are_refused_by_name(place: str):
    name = "<|im_end|>" if place == "name" else "get_tide"
    arguments = {"<|im_end|>" if place == "key" else "harbour": "<|im_end|>" if place == "argument" else "Husum"}
    properties = {"<|im_end|>" if place == "schema" else "harbour": {"type": "string"}}
    tool = {"type": "function", "function": {"name": "get_tide", "parameters": {"properties": properties}}}
    messages = (Message("user", "Tide?"), Message("assistant", tool_calls=(ToolCall(name, arguments),)))
    laid_out = layout_of("qwen2_5", "merging").lay_out(Conversation("x", messages, (tool,), Origin("test", 1)))
    if place == "argument":
        assert isinstance(laid_out, LaidOut)
        assert laid_out.renderings[0].as_letters
    else:
        assert isinstance(laid_out, tuple)
        assert laid_out[0] == "name_holds_a_control_token"
        assert "'<|im_end|>'" in laid_out[1]


STRICT_IDS = """\
{%- for m in messages -%}
{%- if m.role == 'user' -%}[INST]{{ m.content }}[/INST]
{%- elif m.role == 'tool' -%}
{%- if m.tool_call_id | length != 9 -%}{{- raise_exception('Tool call IDs should be nine letters') -}}{%- endif -%}
[RESULTS]{{ m.content }}[/RESULTS]
{%- elif m.tool_calls -%}
[CALLS]{%- for c in m.tool_calls -%}
{%- if c.id | length != 9 -%}{{- raise_exception('Tool call IDs should be nine letters') -}}{%- endif -%}
{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}{%- endfor -%}</s>
{%- else -%}{{ m.content }}</s>{%- endif -%}
{%- endfor -%}"""


def test_call_ids_have_the_form_that_the_template_demands():
    tokenizer = TOKENIZERS["merging"]()
    tokenizer.add_tokens(["[INST]", "[/INST]", "[CALLS]", "[RESULTS]", "[/RESULTS]", "</s>"])
    template = ChatTemplate(tokenizer, STRICT_IDS)
    layout = ChatLayout(template, probe(template))
    assert layout.traits.call_ids == "nine"
    laid_out = layout.lay_out(
        replace(conversation("rounds", declared=False), messages=conversation("rounds").messages[1:])
    )
    assert isinstance(laid_out, LaidOut)
    assert sum(len(rendering.steps) for rendering in laid_out.renderings) == 5
    assert '"id": "call00000"' in "".join(segment.text for segment in laid_out.renderings[0].segments)


def test_the_date_is_fixed_and_recorded():
    tokenizer = with_template(TOKENIZERS["merging"](), "llama3_2")
    template = ChatTemplate(tokenizer, template_args={"strftime_now": "2031-02-03"})
    assert "Today Date: 03 Feb 2031" in template.render([{"role": "user", "content": "?"}], (), prompt=True)
    assert len(ChatTemplate(tokenizer).args["strftime_now"]) == 10
    with pytest.raises(ConfigError, match="expected a date like"):
        ChatTemplate(tokenizer, template_args={"strftime_now": "today"})


FAMILIES = {
    "qwen2_5": False,
    "qwen3": True,
    "qwen3_5_think": True,
    "qwen3_6": True,
    "llama3_1": False,
    "glm4moe": True,
    "deepseekv3": False,
    "gptoss": True,
    "gemma4_v5": True,
    "nemotron_3_nano": True,
    "lfm2_2_5": True,
}
"""Templates that have golden labels, and whether these show reasoning too."""


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_of_a_family_equal_the_golden_file(name: str, golden_folder: Path, update_golden: bool):
    layout = layout_of(name, "bytes")
    lines = []
    for kind in ("plain", "reasoning") if FAMILIES[name] else ("plain",):
        laid_out = layout.lay_out(conversation(kind, declared=False))
        assert isinstance(laid_out, LaidOut)
        encoded = encoder_of(name, "bytes").encode([(kind, rendering) for rendering in laid_out.renderings])
        for example, steps in (each for found in encoded for each in found):
            lines += [f"=== {kind}, step {', '.join(str(step + 1) for step in steps)}", *readable(layout, example)]
    text = "\n".join(lines) + "\n"
    golden = golden_folder / "chat_labels" / f"{name}.txt"
    if update_golden:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), f"{golden} differs; if that is meant: pytest --update-golden"


def readable(layout: ChatLayout, example: Example) -> Iterator[str]:
    """A line for each line of a run of tokens of one kind, with a sign before what is trained."""
    at = 0
    for start, stop, kind in [*example.spans, (len(example), len(example), None)]:
        for first, last, name in ((at, start, "-context"), (start, stop, f"+{kind.name if kind else ''}")):
            text = layout.template.tokenizer.decode(example.input_ids[first:last], skip_special_tokens=False)
            yield from (f"{name:<10}|{line}|" for line in text.split("\n") if last > first)
        at = stop


def test_the_faster_tokenizer_gives_the_same_examples():
    layout = layout_of("qwen3", "bytes")
    laid_out = [layout.lay_out(conversation(kind)) for kind in VALUES]
    renderings = [
        (str(at), r) for at, each in enumerate(laid_out) if isinstance(each, LaidOut) for r in each.renderings
    ]
    encoder = encoder_of("qwen3", "bytes")
    fast = encoder.for_much_text(much=True)
    fast.encode(renderings[:2])
    assert fast.settle()
    for ours, theirs in zip(encoder.encode(renderings), fast.encode(renderings), strict=True):
        assert [each.example.input_ids.tolist() for each in ours] == [
            each.example.input_ids.tolist() for each in theirs
        ]
        assert [each.example.spans for each in ours] == [each.example.spans for each in theirs]
