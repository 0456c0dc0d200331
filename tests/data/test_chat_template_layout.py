"""The two laws of the layout, on every published template of TRL's wheel, against `apply_chat_template` itself."""

from __future__ import annotations

from functools import cache

import pytest
from chat_families import NO_TOOLS, TOKENIZERS, VALUES, conversation, template_names, with_template

from agentft.data.chat_template import ChatLayout, ChatTemplate, LaidOut, handed_over, server_messages
from agentft.data.chat_tokens import RenderingEncoder
from agentft.data.template_probe import probe

STOPS = {
    "deepseekv3": {"<｜end▁of▁sentence｜>"},
    "diffusion_gemma": {"<turn|>", "<|tool_response>"},
    "gemma4": {"<turn|>", "<|tool_response>"},
    "glm4moe": {"<|user|>", "<|observation|>"},
    "gptoss": {"<|return|>", "<|call|>"},
    "llama3_1": {"<|eot_id|>"},
    "llama3_2": {"<|eot_id|>"},
    "muse_glimmer": {"<|eot|>"},
}
"""By the beginning of a template's name; all others end a step with `<|im_end|>`."""

ARGS = {"llama3_1": {"tools_in_user_message": False}}


@cache
def layout_of(name: str, tokenizer: str) -> ChatLayout:
    made = with_template(TOKENIZERS[tokenizer](), name)
    template = ChatTemplate(made, template_args={"strftime_now": "2026-11-30"} if "strftime" in made.chat_template else {})
    return ChatLayout(template, probe(template))


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
    encoder = RenderingEncoder(own, layout.template.control)
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
            assert ids[:begin] == list(prompt), f"prompt of step {number}: {own.decode(ids[:begin])!r} {own.decode(prompt)!r}"
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


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_laws(tokenizer, kind):
    check_laws("qwen2_5", tokenizer, kind)
