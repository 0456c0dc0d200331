"""Conversations as the messages that a client of an inference server would send."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

from agentft.data.calls import strip_fence
from agentft.data.conversation import Conversation
from agentft.data.grammar import Call, Observation
from agentft.data.native_system import read_system
from agentft.data.render import Kind, Segment


def msagent_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """Calls and tool results as text, marks included."""
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        if message.role != "assistant":
            messages.append({"role": message.role, "content": message.source})
            continue
        for observed, group in groupby(message.parts, key=lambda part: isinstance(part, Observation)):
            if observed:
                messages += [{"role": "tool", "content": part.source} for part in group]
            elif said := "".join(part.source for part in group).strip():
                messages.append({"role": "assistant", "content": said})
    return messages


def native_messages(
    conversation: Conversation, *, system: bool = True
) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Calls in `tool_calls`, results as plain text, and the tools; texts after a call of one step come before it."""
    read = read_system(conversation.system)
    messages: list[dict[str, Any]] = (
        [{"role": "system", "content": read.text}] if system and conversation.system else []
    )
    for message in conversation.messages:
        if message.role == "user":
            messages.append({"role": "user", "content": message.source})
        if message.role != "assistant":
            continue
        parts = [part for part in message.parts if part.source.strip()]
        for observed, group in groupby(parts, key=lambda part: isinstance(part, Observation)):
            members = list(group)
            if observed:
                messages += [{"role": "tool", "content": strip_fence(part.body)} for part in members]
                continue
            words = "\n".join(part.source.strip() for part in members if not isinstance(part, Call))
            requests = [request for part in members if isinstance(part, Call) for request in part.requests]
            calls = [{"function": {"name": each.name, "arguments": each.arguments}} for each in requests]
            messages.append({"role": "assistant", "content": words} | ({"tool_calls": calls} if calls else {}))
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
