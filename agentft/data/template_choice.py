"""Choose the layout of a run: the model's own chat template where it can say a conversation with tools, else MSAgent's.

| `model.template` | layout |
|---|---|
| `auto` | `native` where the model has a chat template that says tools, calls and results; else `msagent`, in a line that says why |
| `native` | the tokenizer's own chat template |
| `msagent` | the layout of the original script |
| `chatml`, `qwen2.5`, `qwen3`, `llama3` | small chat templates of ours, for tokenizers without one |
| a file `*.jinja` | that chat template |
"""  # noqa: E501

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from agentft.data.chat_layout import ChatLayout
from agentft.data.chat_template import ChatTemplate
from agentft.data.render import MsagentTemplate
from agentft.data.template_probe import probe
from agentft.errors import ConfigError

OURS = ("chatml", "qwen2.5", "qwen3", "llama3")
NAMES = ("auto", "native", "msagent", *OURS)
"""Values of `model.template`; a path that ends in `.jinja` is another."""

_CHATML = {
    "chatml": ("", ""),
    "qwen2.5": ("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", ""),
    "qwen3": ("", "<think>\\n\\n</think>\\n\\n"),
}
"""Layouts that share `chatml.jinja`: the system text where a conversation has none, and how an answer opens."""

Layout = MsagentTemplate | ChatLayout

log = logging.getLogger(__name__)


def choose_template(
    name: str,
    tokenizer: Any,
    stop_token: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    *,
    stable: bool = False,
) -> Layout:
    """Return the layout `name` for a model with this tokenizer.

    Args:
        stop_token: ends every step in `msagent`; None: the tokenizer's end-of-sequence token.
        template_args: for a chat template, as `apply_chat_template` takes them.
        stable: where a chat template rewrites history, one example whose prompts may differ, see `ChatLayout`.

    Raises:
        ConfigError: no layout of that name, or the tokenizer lacks what it needs.
    """
    if name == "auto":
        problem = _why_not_native(tokenizer, template_args)
        if problem is not None and tokenizer.chat_template:
            log.info("layout: msagent, since the model's own chat template cannot be used: %s", problem)
        name = "native" if problem is None else "msagent"
    if name == "msagent":
        marks = {"<think>", "</think>"} <= tokenizer.get_vocab().keys()
        return MsagentTemplate(
            _stop_token(tokenizer, stop_token), thought_tokens=marks, beginning=_beginning(tokenizer)
        )
    if stop_token is not None:
        raise ConfigError(
            f"model.stop_token={stop_token!r} is for model.template=msagent; a chat template writes its own"
        )
    if name == "native":
        return _chat_layout(tokenizer, None, template_args, stable=stable)
    if name in OURS:
        return _chat_layout(tokenizer, template_text(name), template_args, stable=stable)
    if name.endswith(".jinja"):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"model.template={name}: there is no such file in {Path.cwd()}")
        return _chat_layout(tokenizer, path.read_text(encoding="utf-8"), template_args, stable=stable)
    raise ConfigError(f"model.template={name!r}: unknown; expected one of {', '.join(NAMES)}, or a file *.jinja")


def template_text(name: str) -> str:
    """Return one of our own chat templates."""
    if name not in _CHATML:
        return _template_file(name)
    system, opening = _CHATML[name]
    return f"{{%- set SYSTEM = '{system}' -%}}\n{{%- set OPENING = '{opening}' -%}}\n{_template_file('chatml')}"


def _template_file(name: str) -> str:
    return files("agentft.data").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")


def stop_tokens(layout: Layout) -> tuple[str, ...]:
    """Return the tokens that end a step of the agent, that of a text first."""
    if isinstance(layout, MsagentTemplate):
        return (layout.stop_token,)
    return tuple(dict.fromkeys((*layout.traits.stops, *layout.traits.call_stops)))


def exported_template(layout: Layout) -> str:
    """Return the chat template by which a server writes the prompts of this layout."""
    if isinstance(layout, ChatLayout):
        return layout.template.source
    beginning = f"{{{{- '{layout.beginning}' -}}}}\n" if layout.beginning else ""
    return f"{{%- set STOP = '{layout.stop_token}' -%}}\n{beginning}{_template_file('msagent')}"


def _chat_layout(
    tokenizer: Any, text: str | None, template_args: Mapping[str, Any] | None, *, stable: bool
) -> ChatLayout:
    template = ChatTemplate(tokenizer, text, template_args)
    traits = probe(template)
    if not traits.stops:
        raise ConfigError(
            "model.template: no token of the tokenizer ends an answer in this chat template; keep model.template=msagent"
        )
    return ChatLayout(template, traits, "stable" if stable else "exact")


def _why_not_native(tokenizer: Any, template_args: Mapping[str, Any] | None) -> str | None:
    """Return what keeps the tokenizer's own chat template from being the layout; None where nothing does."""
    if not tokenizer.chat_template:
        return "it has none"
    try:
        traits = probe(ChatTemplate(tokenizer, None, template_args))
    except ConfigError as error:
        return str(error)
    if not traits.tools:
        return f"it cannot say calls and their results ({traits.problem})"
    if not traits.declarations:
        return "it leaves out the declarations of tools"
    return None if traits.stops else "no token of the tokenizer ends its answers"


def _beginning(tokenizer: Any) -> str | None:
    """Return the token that the tokenizer itself puts before every text, None where it puts none."""
    bos = tokenizer.bos_token_id
    return str(tokenizer.bos_token) if bos is not None and tokenizer("").input_ids[:1] == [bos] else None


def _stop_token(tokenizer: Any, given: str | None) -> str:
    stop = given or tokenizer.eos_token
    if stop is None:
        raise ConfigError("the tokenizer has no end-of-sequence token; set model.stop_token")
    return str(stop)
