"""Prompts and label borders beside those of the package `renderers`, which writes model families' chat templates in Python.

    pip install renderers

Compared are ids of a byte-level tokenizer without merges, so that where a renderer cuts its texts changes nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from agentft.data.chat_layout import ChatLayout
from agentft.data.chat_template import ChatTemplate, handed_over, server_messages
from agentft.data.render import LaidOut
from agentft.data.template_choice import probe
from agentft.data.tokens import SegmentEncoder
from agentft.model.sources import byte_tokenizer
from tests.data.chat_families import VALUES, conversation, with_template

pytestmark = pytest.mark.slow

SPELT = {"control_tokens", "think_marks", "think_in_answer"}
"""Left out: a renderer encodes values with the tokenizer as they are, so one that spells a control token becomes it."""

RENDERERS = {
    "qwen3": "qwen3.Qwen3",
    "qwen3_5_think": "qwen35.Qwen35",
    "qwen3_6": "qwen36.Qwen36",
    "qwen3_8": "qwen38.Qwen38",
    "glm4moe": "glm45.GLM45",
    "nemotron_3_nano": "nemotron3.Nemotron3",
    "llama3_1": "llama_3.Llama3",
    "gemma4_v5": "gemma4.Gemma4",
}
"""Its renderers of published templates. Not here: DeepSeek V3's, of another revision than the published template, and
gpt-oss's, which downloads a vocabulary."""

TOKENS = {
    "gemma4_v5": ["<bos>", "<eos>", "<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>"],
    "llama3_1": ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>"],
}
"""What a renderer asks the tokenizer for; the first begins a text."""

DEVIATIONS = {
    # Without thinking it writes the empty thought of each past step again, which the template takes out of history.
    "qwen3_5_think": {"prompt"},
    "qwen3_6": {"prompt"},
    # The break behind `<|assistant|>` counts as the template's, though no generation prompt has it.
    "glm4moe": {"labels"},
    # A step without a thought does not close the one that its prompt opened.
    "nemotron_3_nano": {"labels of reasoning_in_some"},
    "gemma4_v5": {"labels of reasoning_in_some"},
}
"""Where the renderers differ from the published templates or from what a model has to say, by template."""


def differences(name: str) -> dict[str, set[str]]:
    package = pytest.importorskip("renderers", reason="the second oracle of chat templates: pip install renderers")
    module, kind = RENDERERS[name].split(".")
    tokenizer = with_template(byte_tokenizer(), name)
    if name in TOKENS:
        tokenizer.add_tokens(TOKENS[name], special_tokens=True)
        tokenizer.bos_token = TOKENS[name][0]
    template = ChatTemplate(tokenizer, template_args={"date_string": "26 Jul 2024"} if name == "llama3_1" else {})
    layout = ChatLayout(template, probe(template))
    made = importlib.import_module(f"{package.__name__}.{module}")
    configs = importlib.import_module(f"{package.__name__}.configs")
    encoder = SegmentEncoder(tokenizer)
    found: dict[str, set[str]] = {}
    for value in sorted(VALUES.keys() - SPELT):
        talk = conversation(value, declared=layout.traits.declarations)
        laid_out = layout.lay_out(talk)
        if not isinstance(laid_out, LaidOut):
            continue
        args = layout.args(reasoning=any(message.reasoning_content for message in talk.messages))
        config = getattr(configs, f"{kind}RendererConfig")
        known = {key: given for key, given in args.items() if key in config.model_fields}
        renderer = getattr(made, f"{kind}Renderer")(tokenizer, config(**known))
        # It writes a missing text as "None", where templates and servers write none.
        messages = [
            {"content": "", **message} for message in handed_over(server_messages(talk, layout.traits), layout.traits)
        ]
        tools = list(talk.tools) or None
        for examples in encoder.encode([(value, rendering) for rendering in laid_out.renderings]):
            for example, numbers in examples:
                ids = example.input_ids.tolist()
                for (begin, end), number in zip(example.steps(), numbers, strict=True):
                    at = talk.steps[number]
                    prompt = renderer.render_ids(messages[:at], tools=tools, add_generation_prompt=True)
                    if prompt != ids[:begin]:
                        found.setdefault("prompt", set()).add(value)
                    elif ids[begin:end] not in labels(renderer, messages, tools, at, prompt):
                        found.setdefault("labels", set()).add(value)
    return found


def labels(renderer: Any, messages: list[dict[str, Any]], tools: Any, at: int, prompt: list[int]) -> list[list[int]]:
    """The ids of a step that a renderer says a model samples, as the last of all and as it is in history.

    What its generation prompt has already is left out: it counts a thought that this opens among the sampled.
    """
    results = messages[at + 1 : at + 1 + len(messages[at].get("tool_calls", ()))]
    found = []
    for shown in (messages[: at + 1], [*messages[: at + 1], *(results or [{"role": "user", "content": "?"}])]):
        made = renderer.render(shown, tools=tools)
        parts = zip(made.token_ids, made.message_indices, made.sampled_mask, strict=True)
        ids = [token for token, message, sampled in parts if sampled and message == at]
        shared = next((n for n in range(len(ids), 0, -1) if n > 1 and prompt[-n:] == ids[:n]), 0)
        found.append(ids[shared:])
    return found


@pytest.mark.parametrize("name", RENDERERS)
def test_prompts_and_labels_are_those_of_the_renderers(name: str):
    found = differences(name)
    most = {part for part, values in found.items() if len(values) > 10}
    few = {f"{part} of {value}" for part, values in found.items() if part not in most for value in values}
    assert most | few == DEVIATIONS.get(name, set())
