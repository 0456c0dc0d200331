"""Conversations as the messages that a client of an inference server would send."""

from __future__ import annotations

import json
from typing import Any

from agentft.data.conversation import Conversation, chat_messages
from agentft.data.msagent import read_system
from agentft.data.render import Kind, Segment


def msagent_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """Calls and tool results as text, marks included."""
    return [
        {"role": message.role, "content": message.source_text.strip() if message.source else message.text}
        for message in conversation.messages
    ]


def native_messages(
    conversation: Conversation, *, system: bool = True
) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Calls in `tool_calls`, results as plain text, and the tools; texts after a call of one step come before it."""
    read = read_system(conversation.system)
    messages: list[dict[str, Any]] = (
        [{"role": "system", "content": read.text}] if system and conversation.system else []
    )
    messages += [message for message in chat_messages(conversation.messages) if message["role"] != "system"]
    for message in messages:
        if message["role"] == "assistant":
            message.setdefault("content", "")
    return messages, [json.loads(tool) for tool in read.tools] or None


def prompts(segments: list[Segment]) -> list[str]:
    """The text before each step."""
    found, text, speaking = [], "", False
    for segment in segments:
        if segment.spoken and not speaking:
            found.append(text)
        # A stop ends the step, so that two steps in a row are two.
        speaking = segment.spoken and segment.kind is not Kind.stop
        text += segment.text
    return found


def before_steps(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The messages before each of the agent's."""
    return [messages[:i] for i, message in enumerate(messages) if message["role"] == "assistant"]
