"""Conversations as the messages that a client of an inference server would send."""

from __future__ import annotations

from typing import Any

from agentft.data.conversation import Conversation, chat_messages
from agentft.data.msagent import lift_tools


def msagent_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """Calls and tool results as text, marks included."""
    return [
        {"role": message.role, "content": message.source_text.strip() if message.source else message.text}
        for message in conversation.messages
    ]


def native_messages(conversation: Conversation) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Calls in `tool_calls`, results as plain text, and the tools."""
    lifted = lift_tools(conversation)
    assert isinstance(lifted, Conversation)
    messages = chat_messages(lifted.messages)
    for message in messages:
        if message["role"] == "assistant":
            message.setdefault("content", "")
    return messages, list(lifted.tools) or None


def before_steps(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The messages before each of the agent's."""
    return [messages[:i] for i, message in enumerate(messages) if message["role"] == "assistant"]
