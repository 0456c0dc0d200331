"""Which layout a model is trained in: the one that is named, or that of its family, by its tokenizer."""

from __future__ import annotations

import re
from typing import Any

from agentft.data.native import HERMES_MARKS, ChatmlTemplate, Llama3Template, NativeTemplate, Qwen3Template
from agentft.data.render import MsagentTemplate, Template
from agentft.errors import ConfigError

NAMES = ("msagent", "native", "chatml", "qwen2.5", "qwen3", "llama3")
"""Values of `model.template`; `native` is one of the four behind it, by the tokenizer."""

_FAMILIES: dict[str, tuple[type[NativeTemplate], str, tuple[str, ...], str | None]] = {
    "chatml": (ChatmlTemplate, "<|im_end|>", HERMES_MARKS, None),
    "qwen2.5": (
        ChatmlTemplate,
        "<|im_end|>",
        HERMES_MARKS,
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    "qwen3": (Qwen3Template, "<|im_end|>", HERMES_MARKS, None),
    "llama3": (Llama3Template, "<|eot_id|>", ("<|python_tag|>",), None),
}


def choose_template(name: str, tokenizer: Any, stop_token: str | None = None) -> Template:
    """Return the layout `name` for a model with this tokenizer.

    Args:
        stop_token: ends every step; None: the layout's own, for `msagent` the tokenizer's end-of-sequence token.

    Raises:
        ConfigError: no layout of that name, or the tokenizer lacks a token that the layout is made of.
    """
    if name not in NAMES:
        raise ConfigError(f"model.template={name!r}: unknown; expected one of {', '.join(NAMES)}")
    if name == "msagent":
        stop = stop_token or tokenizer.eos_token
        if stop is None:
            raise ConfigError("the tokenizer has no end-of-sequence token; set model.stop_token")
        return MsagentTemplate(str(stop))
    family = detect_family(tokenizer) if name == "native" else name
    layout, own_stop, marks, default_system = _FAMILIES[family]
    added = tokenizer.get_added_vocab()
    needed = ("<|im_start|>",) if layout is not Llama3Template else ("<|start_header_id|>", "<|end_header_id|>")
    missing = [token for token in (*needed, stop_token or own_stop) if token not in tokenizer.get_vocab()]
    if missing:
        raise ConfigError(f"model.template={name}: the tokenizer has no {' and no '.join(missing)}")
    own_system = _own_default_system(tokenizer) if layout is ChatmlTemplate else None
    return layout(
        stop_token or own_stop,
        frozenset(mark for mark in marks if mark in added),
        own_system or default_system,
    )


def detect_family(tokenizer: Any) -> str:
    """Name the family whose layout a tokenizer's tokens and chat template show.

    Raises:
        ConfigError: they show none.
    """
    tokens = tokenizer.get_added_vocab()
    if "<|start_header_id|>" in tokens and "<|eot_id|>" in tokens:
        return "llama3"
    if "<|im_start|>" in tokens and "<|im_end|>" in tokens:
        own = str(tokenizer.chat_template or "")
        if "enable_thinking" in own or ("<think>" in tokens and (not own or "<think>" in own)):
            return "qwen3"
        if "<think>" in tokens:  # Qwen3 of July 2025, which never thinks and has no default system text
            return "chatml"
        return "qwen2.5" if "<tool_call>" in tokens or "created by Alibaba Cloud" in own else "chatml"
    raise ConfigError(
        "model.template=native: the tokenizer has neither <|im_start|> nor <|start_header_id|>, so its layout is not known; "
        f"name one of {', '.join(NAMES[2:])}, or keep model.template=msagent"
    )


def _own_default_system(tokenizer: Any) -> str | None:
    """The system text that the model's own ChatML template puts where a conversation has none."""
    if not tokenizer.chat_template:
        return None
    from jinja2 import TemplateError

    try:
        shown = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except TemplateError:
        return None  # a template that wants more than a user's message
    found = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", shown, re.DOTALL)
    return found[1] if found else None
