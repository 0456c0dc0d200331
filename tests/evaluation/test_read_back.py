"""The law of the answer on published templates: what a layout trains an agent to say is read back as the message."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest

from agentft.data.calls import Call, Said, ToolCall, parameter_types
from agentft.data.chat_layout import ChatLayout
from agentft.data.chat_template import ChatTemplate
from agentft.data.conversation import Conversation, Message
from agentft.data.render import LaidOut
from agentft.data.response import our_templates
from agentft.data.response_choice import choose_response, differs, servers_template, trained_steps
from agentft.data.template_choice import OURS, choose_template, probe
from agentft.data.tokens import SegmentEncoder
from agentft.evaluation.generate import read_completion
from agentft.evaluation.metrics import aggregate
from agentft.evaluation.parse import msagent_text, with_msagent_calls
from agentft.evaluation.steps import ReplyReader, Step, conversation_steps, score_step
from agentft.model.sources import byte_tokenizer
from tests.data.chat_families import (
    NO_TOOLS,
    TOOL,
    VALUES,
    conversation,
    merging_tokenizer,
    stand_in_names,
    template_names,
)
from tests.data.test_chat_template_layout import encoder_of, layout_of
from tests.examples import tokenize

FAMILIES = {
    "deepseekv3": "deepseek3",
    "devstral": "mistral_args",
    "gemma4_v5": "gemma4",
    "glm4moe": "glm4",
    "gptoss": "harmony",
    "kimi_k2": "kimi",
    "lfm2_2_5": "pythonic_unescaped",
    "lfm2_v2": "pythonic",
    "llama3_1": "llama3",
    "minimax_m2": "invoke_xml",
    "muse_glimmer": "muse",
    "nemotron_3_nano": "function_xml",
    "phi4": "listed",
    "qwen2_5": "hermes",
    "qwen3_coder": "function_xml",
    "qwen3_5_think": "function_xml",
    "qwen3": "hermes",
    "smollm3": "hermes",
}
"""A template of each family, and the response template that reads it."""

EXCEPTIONS = {
    ("gptoss", "text_beside_call"): "reasoning",  # it writes the text beside a call as analysis
    ("llama3_1", "json"): "text",  # an answer that is spelt as a call is one: nothing marks its calls
    ("llama3_2", "json"): "text",
}
"""What is not read back: (template, conversation) -> the part."""


def made_steps(layout: ChatLayout, name: str, talk: Conversation) -> Iterator[tuple[Step, Message]]:
    """The steps that training shows, each with its message, by their ids."""
    laid_out = layout.lay_out(talk)
    renderings = laid_out.renderings if isinstance(laid_out, LaidOut) else ()
    for found in encoder_of(name, "merging").encode([(talk.id, each) for each in renderings]):
        for example, numbers in found:
            ids = example.input_ids
            for (start, stop), number in zip(example.steps(), numbers, strict=True):
                message = talk.messages[talk.steps[number]]
                yield Step(talk, number, talk.steps[number], ids, start, stop, "", ReplyReader(layout)), message


def read(step: Step) -> Said:
    """What training shows as an answer, decoded and read."""
    assert step.reader is not None
    text = step.reader.decode(step.input_ids[step.start : step.stop - 1].tolist())
    prompt = step.reader.prompt_end(step.input_ids[: step.start].tolist())
    types = parameter_types(step.conversation.tools, step.conversation.tool_calls)
    return step.reader.read(text, prompt, types, calls=False)


def named_marks(layout: ChatLayout) -> Conversation:
    """An answer that names every mark of its family, and an argument that does."""
    marks = " ".join(layout.template.control_tokens)
    call = ToolCall("get_tide", {"harbour": f"Is {marks} one?"}, id="call_1")
    talk = conversation("plain", declared=layout.traits.declarations)
    told = {2: Message("assistant", tool_calls=(call,)), 4: Message("assistant", f"Marks are {marks} and more.")}
    return replace(talk, messages=tuple(told.get(at, message) for at, message in enumerate(talk.messages)))


def check_family(name: str) -> int:
    layout = layout_of(name, "merging")
    found = {}
    count = 0
    for kind in (*VALUES, "named_marks"):
        declared = layout.traits.declarations
        talk = named_marks(layout) if kind == "named_marks" else conversation(kind, declared=declared)
        for step, message in made_steps(layout, name, talk):
            said = read(step)
            count += 1
            if wrong := differs(said, message):
                found[name, kind] = wrong
            record = step.record(step.reader.decode(step.input_ids[step.start : step.stop].tolist()))  # type: ignore[union-attr]
            score = score_step(record)
            if not wrong:
                assert score.is_exact, (kind, record)
                assert score.rouge_l in (None, 1.0)
                assert score.thoughts == score.wellformed_thoughts == int(bool(message.reasoning_content))
            # The texts of a predictions file score as what they were written from.
            again = score_step(replace(record, reference_reply=None, prediction_reply=None))
            thinking = {"thoughts": score.thoughts, "wellformed_thoughts": score.wellformed_thoughts}
            assert replace(again, **thinking) == score, kind  # type: ignore[arg-type]
    assert found == {key: part for key, part in EXCEPTIONS.items() if key[0] == name}
    return count


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "llama3_1", "gptoss", "lfm2_2_5", *stand_in_names()])
def test_reading_a_step_gives_back_its_message(name: str):
    assert check_family(name) > 40


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in template_names() if name not in NO_TOOLS])
def test_every_published_template_is_read_back(name: str):
    assert check_family(name) > 40


@pytest.mark.parametrize("name", FAMILIES)
def test_a_template_is_read_by_the_response_template_of_its_family(name: str):
    response = choose_response(layout_of(name, "merging"))
    assert response is not None
    assert response.name == FAMILIES[name]


SERVERS_DO_NOT_READ = {"lfm2_v2", "lfm2_2_5", "gemma4_v5", "devstral", "phi4"}
"""`parse_response` knows no list of calls as Python writes it, reads other reasoning of Gemma 4, needs a text before an answer
that Devstral's template does not have everywhere, and hands over Phi-4's list of calls as it stands."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in ("gptoss", "deepseekv3", "lfm2_v2") else [pytest.mark.slow]) for n in FAMILIES],
)
def test_servers_read_answers_by_the_template_that_an_export_has(name: str):
    layout = layout_of(name, "merging")
    template = servers_template(layout)
    assert (template is None) == (name in SERVERS_DO_NOT_READ)
    if template is None:
        return
    tokenizer, stop = layout.template.tokenizer, layout.traits.stops[0]
    for kind in ("plain", "reasoning") if layout.traits.reasoning else ("plain",):
        talk = conversation(kind, declared=layout.traits.declarations)
        for step in trained_steps(layout, talk):
            read = tokenizer.parse_response(step.text + stop, template, prefix=step.prompt, tools=list(talk.tools))
            message = talk.messages[talk.steps[step.number]]
            calls = [(call["function"]["name"], call["function"]["arguments"]) for call in read.get("tool_calls", ())]
            assert calls == [(call.name, call.arguments) for call in message.tool_calls]
            assert read.get("content", "") == message.text.strip()
            assert read.get("reasoning_content", "").strip() == (message.reasoning_content or "")


@pytest.mark.parametrize(
    "name", ["gemma4_v5", "glm4moe", "gptoss", "muse_glimmer", "qwen3_5_think", "qwen3", "llama3_1"]
)
def test_an_argument_may_be_called_name_and_objects_may_be_sorted(name: str):
    call = ToolCall("get_tide", {"name": "Husum", "content": "x", "days": {"to": 2, "from": 1}}, id="call_1")
    talk = replace(
        conversation("plain"), messages=(*conversation("plain").messages[:2], Message("assistant", tool_calls=(call,)))
    )
    layout = layout_of(name, "merging")
    ((step, message),) = made_steps(layout, name, talk)
    assert not differs(read(step), message)
    assert read(step).calls[0].name == "get_tide"


def test_gpt_oss_has_the_text_beside_a_call_as_reasoning():
    layout = layout_of("gptoss", "merging")
    step, _ = next(iter(made_steps(layout, "gptoss", conversation("text_beside_call"))))
    said = read(step)
    assert (said.reasoning, said.text, [call.name for call in said.calls]) == ("I look.", "", ["get_tide"])


def test_llama_reads_an_answer_that_is_spelt_as_a_call_as_one():
    said = read_as("llama3_1", '{"name": "get_tide", "parameters": {}} and more')
    assert [call.name for call in said.calls] == ["get_tide"]
    assert said.text == "and more"


def read_as(name: str, text: str, prompt: str = "") -> Said:
    response = choose_response(layout_of(name, "merging"))
    assert response is not None
    return response.read(text, prompt, parameter_types([TOOL]))


@cache
def two_calls(name: str) -> str:
    layout = layout_of(name, "merging")
    talk = conversation("parallel_calls", declared=layout.traits.declarations)
    return next(step.text for step in trained_steps(layout, talk) if "Husum" in step.text)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("gptoss", "llama3_1")])
def test_a_malformed_call_is_an_attempt_beside_the_good_ones(name: str):
    text = two_calls(name)
    at = text.rindex("get_tide", 0, text.index("Husum"))
    broken = text[:at] + text[at + len("get_tide") :]
    said = read_as(name, broken)
    attempts = [piece for piece in said.pieces if isinstance(piece, Call)]
    assert [attempt.failure is not None for attempt in attempts] == [True, False], attempts
    assert said.calls == (ToolCall("get_tide", {"harbour": "Kiel", "days": 1}),)
    written = with_msagent_calls(said)
    assert (len(written.failures), len(written.calls)) == (1, 1)
    assert "Kiel" in msagent_text(said)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_that_breaks_off_anywhere_is_read_without_an_error(name: str):
    text = two_calls(name) if name not in ("gptoss", "llama3_1") else next(
        step.text for step in trained_steps(layout_of(name, "merging"), conversation("plain"))
    )  # fmt: skip
    for end in range(len(text)):
        said = read_as(name, text[:end])
        assert all(call.name.strip() for call in said.calls)
    whole = read_as(name, text)
    assert whole.calls
    assert not any(isinstance(piece, Call) and piece.failure for piece in whole.pieces)


@pytest.mark.parametrize("name", ["lfm2_v2", "lfm2_2_5"])
def test_a_malformed_call_of_a_list_is_an_attempt_beside_the_good_ones(name: str):
    calls = ["get_tide(harbour='Kiel')", "get_tide(harbour=)", "get_tide(days=1, days=2)", "7", "get_tide(days=3)"]
    said = read_as(name, f"<|tool_call_start|>[{', '.join(calls)}]<|tool_call_end|>")
    assert said.calls == (ToolCall("get_tide", {"harbour": "Kiel"}), ToolCall("get_tide", {"days": 3}))
    written = with_msagent_calls(said)
    assert (len(written.failures), len(written.calls)) == (3, 2)
    assert [each.source for each in written.attempts if each.failure] == calls[1:4]
    assert len(read_as(name, "<|tool_call_start|>[get_tide(harbour=]<|tool_call_end|>").failures) == 1


def test_arguments_under_another_name_are_read_and_unclear_ones_are_malformed():
    assert read_as("qwen3", HERMES.replace("arguments", "parameters") % '{"days": 1}').calls[0].arguments == {"days": 1}
    for body in ('{"name": "get_tide", "kwargs": {"days": 1}}', '{"name": "get_tide", "arguments": "{}"}'):
        assert len(with_msagent_calls(read_as("qwen3", f"<tool_call>{body}</tool_call>")).failures) == 1


HERMES = '<tool_call>\n{"name": "get_tide", "arguments": %s}\n</tool_call>'


def test_what_parse_response_loses_is_kept():
    said = read_as("qwen3", "I look.\n" + HERMES % '{"harbour": "a </tool_call> b"}')
    assert said.text == "I look."
    assert said.calls == (ToolCall("get_tide", {"harbour": "a </tool_call> b"}),)
    assert read_as("qwen3", "Is <|im_end|> a mark? Yes.").text == "Is <|im_end|> a mark? Yes."
    for arguments, why in (
        ('{"harbour": "a", "harbour": "b"}', "twice"),
        ('{"days": 1e400}', "beyond the numbers"),
        ('{"days": NaN}', "NaN"),
        ('{"days": [1, {"x": 1, "x": 2}]}', "twice"),
    ):
        (attempt,) = [piece for piece in read_as("qwen3", HERMES % arguments).pieces if isinstance(piece, Call)]
        assert attempt.failure is not None
        assert why in attempt.failure.detail


XML = "<tool_call>\n<function=get_tide>\n%s</function>\n</tool_call>"
PARAMETER = "<parameter=%s>\n%s\n</parameter>\n"


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("harbour", "75001", "75001"),
        ("harbour", "true", "true"),
        ("harbour", "a\n</parameter>\nb", "a\n</parameter>\nb"),
        ("harbour", "", ""),
        ("harbour", " Husum\n", " Husum\n"),
        ("days", "3", 3),
        ("days", "3.0", 3),
        ("days", "three", "three"),
        ("unknown", "75001", 75001),
        ("unknown", "True", True),
        ("unknown", "[1]", [1]),
        ("unknown", "Husum", "Husum"),
    ],
)
def test_a_value_without_quotes_has_the_type_of_its_schema(key: str, value: str, read: object):
    said = read_as("qwen3_5_think", XML % (PARAMETER % (key, value)))
    assert said.calls == (ToolCall("get_tide", {key: read}),)


@pytest.mark.parametrize("name", ["qwen3_5_think", "glm4moe", "minimax_m2"])
@pytest.mark.parametrize(("key", "value"), [("harbour", 75001), ("harbour", None), ("days", "3"), ("days", True)])
def test_a_value_against_its_schema_is_read_back_as_the_record_has_it(name: str, key: str, value: object):
    layout = layout_of(name, "merging")
    plain = conversation("plain")
    told = Message("assistant", tool_calls=(ToolCall("get_tide", {key: value}, id="call_1"),))
    ((step, message),) = made_steps(layout, name, replace(plain, messages=(*plain.messages[:2], told)))
    assert not differs(read(step), message)
    assert step.reader is not None
    assert score_step(step.record(step.reader.decode(step.input_ids[step.start : step.stop].tolist()))).is_exact


def test_exception_a_record_that_gives_a_parameter_two_types_is_read_back_by_its_schema():
    layout = layout_of("qwen3_5_think", "merging")
    plain = conversation("plain")
    calls = tuple(ToolCall("get_tide", {"harbour": value}, id=f"call_{value}") for value in (75001, "Husum"))
    talk = replace(plain, messages=(*plain.messages[:2], Message("assistant", tool_calls=calls)))
    ((step, message),) = made_steps(layout, "qwen3_5_think", talk)
    assert differs(read(step), message) == "calls"
    assert [call.arguments["harbour"] for call in read(step).calls] == ["75001", "Husum"]


def test_a_key_twice_is_malformed_in_xml_too():
    said = read_as("qwen3_5_think", XML % (PARAMETER % ("days", "1") + PARAMETER % ("days", "2")))
    assert len(with_msagent_calls(said).failures) == 1


def test_a_tool_result_that_the_model_invents_is_cut():
    call = HERMES % '{"harbour": "Husum"}'
    said = read_as("qwen3", f"{call}\n<tool_response>\n14:20\n</tool_response>{call}")
    assert (len(said.calls), said.text) == (1, "")


@pytest.mark.parametrize(
    ("text", "prompt", "reasoning", "answer", "thought"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", "", "Hm.", "Yes.", True),
        ("Hm.\n</think>\n\nYes.", "<|im_start|>assistant\n<think>\n", "Hm.", "Yes.", True),
        ("Yes.", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "", "Yes.", None),
        ("<think>\n\n</think>\n\nYes.", "", "", "Yes.", None),
        ("Yes.", "", "", "Yes.", None),
        ("<think>\nHm. Yes.", "", "Hm. Yes.", "", False),
        ("Hm.\n</think>\n\nYes.", "", "", "Hm.\n</think>\n\nYes.", False),
        ("Models write <think> first.", "", "", "Models write <think> first.", None),
    ],
)
def test_thoughts_are_told_from_the_answer(text: str, prompt: str, reasoning: str, answer: str, thought: bool | None):
    said = read_as("qwen3", text, prompt)
    assert (said.reasoning, said.text, said.thought) == (reasoning, answer, thought)


def test_the_rate_of_wellformed_thoughts_counts_those_that_lack():
    layout = layout_of("qwen3", "merging")
    steps = [step for step, _ in made_steps(layout, "qwen3", conversation("reasoning"))]
    answers = ["<think>\nHm.\n</think>\n\nYes.", "<think>\nHm.", "Yes.", "<think>\nHm.\n</think>\n\nNo.", "Hm.</think>"]
    report = aggregate(
        [score_step(step.record(said)) for step, said in zip(steps, answers, strict=True)], bootstrap_samples=10
    )
    rate = report["metrics"]["thought_wellformed_rate"]
    assert (rate["numerator"], rate["denominator"]) == (2, 5)
    plain = [step for step, _ in made_steps(layout, "qwen3", conversation("plain"))]
    assert (
        "thought_wellformed_rate"
        not in aggregate([score_step(s.record("Yes.")) for s in plain], bootstrap_samples=10)["metrics"]
    )


def test_the_tokenizers_own_response_template_comes_first():
    own = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "tool_calls": {
                "open_pattern": r"<tool_call>\s*",
                "close_pattern": r"\s*</tool_call>\s*",
                "content": "json",
                "repeats": True,
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close_pattern": r"<\|im_end\|>\s*"},
        },
    }
    layout = layout_of("qwen2_5", "merging")
    template = ChatTemplate(layout.template.tokenizer)
    template.tokenizer.response_template = own
    try:
        chosen = choose_response(replace(layout, template=template))
        template.tokenizer.response_template = {**own, "fields": {"content": {}, "unheard_of": {"open": "<"}}}
        other = choose_response(replace(layout, template=ChatTemplate(template.tokenizer)))
    finally:
        template.tokenizer.response_template = None
    assert chosen is not None
    assert chosen.name == "of the tokenizer"
    assert other is not None
    assert other.name == "hermes"


def test_a_layout_that_nothing_reads_says_so_and_its_calls_count_as_not_read(caplog: pytest.LogCaptureFixture):
    source = (
        "{%- for m in messages -%}<|im_start|>{{ m.role }}\n"
        "{%- for c in m.tool_calls or [] -%}CALL {{ c.function.name }} WITH {{ c.function.arguments | tojson }}{%- endfor -%}"
        "{{ m.content or '' }}<|im_end|>\n{% endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
    )
    tokenizer = merging_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    template = ChatTemplate(tokenizer, source)
    layout = ChatLayout(template, probe(template))
    assert layout.traits.tools, layout.traits.problem
    talk = conversation("plain", declared=False)
    with caplog.at_level(logging.WARNING):
        reader = ReplyReader(layout)
        steps = [Step(talk, n, at, tokenizer("x", return_tensors="np").input_ids[0], 0, 1, "", reader)
                 for n, at in enumerate(talk.steps)]  # fmt: skip
        scores = [score_step(step.record("CALL get_tide WITH {}<|im_end|>")) for step in steps]
    assert sum("no response template" in each.message for each in caplog.records) == 1
    assert [(score.attempts, score.wellformed) for score in scores] == [(1, 0), (0, 0), (0, 0)]


def test_steps_of_what_msagent_text_cannot_say_are_scored_all_the_same():
    layout = layout_of("qwen3", "bytes")
    talk = conversation("plain")
    marked = replace(talk.messages[-1], content="Its mark is <|startofexec|>, not </s>.")
    talk = replace(talk, messages=(*talk.messages[:-1], marked))
    laid_out = layout.lay_out(talk)
    assert isinstance(laid_out, LaidOut)
    (((example, _),),) = encoder_of("qwen3", "bytes").encode([(talk.id, laid_out.renderings[0])])
    *_, step = conversation_steps(talk, example, layout)
    assert step.reader is not None
    record = step.record(step.reader.decode(step.input_ids[step.start : step.stop].tolist()))
    assert score_step(record).rouge_l == 1.0
    assert record.prediction == record.reference


def test_the_layout_msagent_tells_thoughts_from_answers_too():
    talk = conversation("reasoning", declared=False)
    template = choose_template("msagent", byte_tokenizer())
    (example,) = tokenize([talk], template, SegmentEncoder(byte_tokenizer()))
    step = conversation_steps(talk, example, template)[1]
    thinking = score_step(step.record("<think>\nIt is high at two.\n</think>\n\nAt 14:20."))
    assert (thinking.rouge_l, thinking.thoughts, thinking.wellformed_thoughts) == (1.0, 1, 1)
    unclosed = score_step(step.record("<think>\nAt 14:20."))
    assert (unclosed.rouge_l, unclosed.thoughts, unclosed.wellformed_thoughts) == (0.0, 1, 0)


def test_an_answer_that_names_a_mark_goes_on_to_its_stop():
    layout = layout_of("qwen3", "bytes")
    tokenizer = layout.template.tokenizer
    step, _ = next(iter(made_steps(layout_of("qwen3", "merging"), "qwen3", conversation("plain"))))
    step = replace(step, reader=ReplyReader(layout))
    ids = tokenizer("Write <|user|> first.").input_ids
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answer = read_completion(step, [*ids, stop, *ids], tokenizer, [stop])
    assert (answer.text, answer.finish) == ("Write <|user|> first.", "stop")
    assert read_completion(replace(step, reader=None), ids, tokenizer, [stop]).finish == "text_stop"


@pytest.mark.parametrize("name", OURS)
def test_the_layouts_of_the_package_are_read_back(name: str):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<tool_call>", "</tool_call>"])
    layout = choose_template(name, tokenizer)
    assert isinstance(layout, ChatLayout)
    response = choose_response(layout)
    assert response is not None
    count = 0
    for kind in VALUES:
        talk = conversation(kind, declared=layout.traits.declarations)
        for step in trained_steps(layout, talk):
            said = response.read(step.text, step.prompt, parameter_types(talk.tools, talk.tool_calls))
            wrong = differs(said, talk.messages[talk.steps[step.number]])
            assert wrong == ("text" if (name, kind, step.number) == ("llama3", "json", 1) else ""), (kind, said)
            count += 1
    assert count >= 44


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("mistral", 'I look.[TOOL_CALLS] [{"name": "get_tide", "arguments": %s, "id": "call00000"}]', "I look."),
        ("mistral_args", "I look.[TOOL_CALLS]get_tide[ARGS]%s", "I look."),
        ("mistral_args", "[TOOL_CALLS]get_tide[CALL_ID]call00000[ARGS]%s", ""),
        ("deepseek3_1", "<｜tool▁call▁begin｜>get_tide<｜tool▁sep｜>%s<｜tool▁call▁end｜>", ""),
        ("llama3", 'I look.<|python_tag|>{"name": "get_tide", "parameters": %s}', "I look."),
        ("harmony", "<|channel|>commentary to=functions.get_tide <|constrain|>json<|message|>%s", ""),
        ("glm4", "<tool_call>get_tide<arg_key>harbour</arg_key><arg_value>Husum [1]</arg_value></tool_call>", ""),
    ],
)  # fmt: skip
def test_calls_as_families_write_them_whose_template_is_in_no_package(name: str, text: str, told: str):
    template = next(each for each in our_templates() if each.name == name)
    said = template.read(text % '{"harbour": "Husum [1]"}' if "%s" in text else text)
    assert [(call.name, call.arguments) for call in said.calls] == [("get_tide", {"harbour": "Husum [1]"})]
    assert said.text == told
