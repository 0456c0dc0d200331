"""Generate completions at any endpoint for OpenAI's chat completions: a served model or a commercial one.

A step's history becomes messages with native tool calls, and the tools that the system text lists become `tools`; where
the list cannot be read, everything is sent in the marks of the text. The reply becomes one text in MSAgent form.

The key comes from the environment and goes to the endpoint's own address alone; nothing that is raised or logged holds it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import takewhile
from typing import Any
from urllib.parse import urlsplit

from agentft.data.calls import JsonRefused, read_json
from agentft.data.conversation import THINK_CLOSE, THINK_OPEN, Conversation, Message
from agentft.data.msagent import MARK, lift_tools
from agentft.errors import ConfigError, EvaluationError
from agentft.evaluation.config import EvaluationConfig
from agentft.evaluation.generate import Completion, Finish, OnCompletion, deciding_settings
from agentft.evaluation.steps import Step
from agentft.secrets import redact_text

log = logging.getLogger(__name__)

_TYPES = {name: name for name in ("string", "number", "integer", "boolean", "array", "object", "null")}
_TYPES |= {"str": "string", "int": "integer", "float": "number", "double": "number", "bool": "boolean"}
_TYPES |= {"list": "array", "tuple": "array", "dict": "object"}
"""Type in a dataset, Python's ones too, which endpoints refuse -> JSON schema's."""
_LONGEST_NAME = 64


@dataclass(frozen=True, slots=True)
class ChatStep:
    """The body of the request for one step."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    names: Mapping[str, str]
    """Name of a tool as it is sent -> its own: endpoints allow letters, digits, `_` and `-` only."""


def chat_step(step: Step, *, as_recorded: bool = False) -> ChatStep:
    """Lay out the context of a step; its own reference is not in it.

    `as_recorded` leaves everything in the record's own marks, the list of tools in the system text too: for a model that
    was trained on them, such as an exported run. Results are messages of role `tool`.
    """
    lifted = step.conversation if as_recorded else lift_tools(step.conversation)
    conversation = lifted if isinstance(lifted, Conversation) else step.conversation
    history = conversation.messages[: step.at + len(conversation.messages) - len(step.conversation.messages)]
    tools = conversation.tools
    sent = _safe_names([tool["function"]["name"] for tool in tools] + [call.name for call in conversation.tool_calls])
    messages: list[dict[str, Any]] = []
    for at, message in enumerate(history):
        results = list(takewhile(lambda m: m.role == "tool", history[at + 1 :]))
        if message.role != "assistant":
            messages += [{"role": message.role, "content": message.text}] if message.role != "tool" else []
        elif message.source is None or (tools and not message.malformed_calls):
            messages += _native_exchange(message, results, sent, f"call_{at}")
        else:
            messages.append({"role": "assistant", "content": message.source_text.strip()})
            if results:
                content = "\n".join(result.source_text.strip() for result in results)
                role = {"role": "tool", "tool_call_id": f"result_{at}"} if as_recorded else {"role": "user"}
                messages.append(role | {"content": content})
    return ChatStep(messages, [_declared(tool, sent) for tool in tools], {safe: name for name, safe in sent.items()})


def _native_exchange(
    message: Message, results: Sequence[Message], sent: Mapping[str, str], prefix: str
) -> Iterator[dict[str, Any]]:
    """Yield the messages of one earlier step and of what its tools returned."""
    calls = [
        {
            "id": f"{prefix}_{i}",
            "type": "function",
            "function": {"name": sent[call.name], "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for i, call in enumerate(message.tool_calls)
    ]
    if not calls:
        yield {"role": "assistant", "content": message.text}
        return
    yield {"role": "assistant", "content": message.content or None, "tool_calls": calls}
    order = {call.id: i for i, call in enumerate(message.tool_calls) if call.id is not None}
    bodies = [each.text for each in sorted(results, key=lambda each: order.get(each.tool_call_id or "", len(order)))]
    # Every call must be answered once: results beyond the last call stand with it, a call without one gets an empty text.
    last = len(calls) - 1
    bodies[last:] = ["\n".join(bodies[last:])]
    for asked, body in zip(calls, [*bodies, *[""] * (len(calls) - len(bodies))], strict=True):
        yield {"role": "tool", "tool_call_id": asked["id"], "content": body}


def _safe_names(names: Sequence[str]) -> dict[str, str]:
    safe: dict[str, str] = {}
    for name in dict.fromkeys(names):
        plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:_LONGEST_NAME] or "tool"
        number, unique = 2, plain
        while unique in safe.values():
            suffix = f"_{number}"
            unique, number = plain[: _LONGEST_NAME - len(suffix)] + suffix, number + 1
        safe[name] = unique
    return safe


def _declared(tool: Mapping[str, Any], sent: Mapping[str, str]) -> dict[str, Any]:
    function = tool["function"]
    parameters = _valid_types(function["parameters"])
    return {"type": "function", "function": {**function, "name": sent[function["name"]], "parameters": parameters}}


def _valid_types(schema: Any) -> Any:
    """Return a schema with the types that JSON schema knows."""
    if isinstance(schema, list):
        return [_valid_types(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    valid = {key: value if key in ("default", "enum") else _valid_types(value) for key, value in schema.items()}
    if isinstance(valid.get("type"), str):
        kind = _TYPES.get(valid.pop("type").lower())
        valid |= {"type": kind} if kind else {}
    return valid


def reply_text(message: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return an endpoint's message as one text: its words, then its calls between marks."""
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(text for text in texts if isinstance(text, str))
    pieces = [content.strip()] if isinstance(content, str) and content.strip() else []
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            pieces.append(_call_text(function, names))
    return "\n".join(pieces)


def _call_text(function: Mapping[str, Any], names: Mapping[str, str]) -> str:
    name, arguments = function.get("name"), function.get("arguments")
    if isinstance(arguments, str):
        # What is no JSON stays a text: parameters that are no object, and never read as other fields of the call.
        with contextlib.suppress(JsonRefused):
            arguments = read_json(arguments) if arguments.strip() else {}
    call = {
        "api_name": names.get(name, name) if isinstance(name, str) else "",
        "parameters": {} if arguments is None else arguments,
    }
    body = json.dumps(call, ensure_ascii=False)
    if MARK.search(body):
        body = body.replace("<|", "\\u003c|")  # the same JSON: a bracket stands in strings only
    return f"{THINK_OPEN}```JSON\n{body}\n```{THINK_CLOSE}"


_TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_LONGEST_PAUSE = 60.0
_LARGEST_REPLY = 32 * 1024 * 1024
_LAYOUT = "chat-v2"
"""Part of a completion's identity: changes whenever a step is laid out in other messages."""


class OpenAIGenerator:
    """Completes steps by asking the endpoint of the settings, several at once."""

    def __init__(self, config: EvaluationConfig, *, pause: Callable[[float], object] | None = None) -> None:
        """`pause` waits between attempts.

        Raises:
            ConfigError: the address holds a name and password, or the environment variable no key.
        """
        self._config = config
        self._url = (config.base_url or "").rstrip("/")
        self._key = _key(config, self._url)
        self._stop = threading.Event()
        self._pause = pause or self._stop.wait
        # Redirects are not followed: they would carry the key to another address.
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if _is_this_machine(self._url):
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides a completion beside its step; never the key."""
        return deciding_settings(self._config) | {"layout": _LAYOUT}

    def generate(self, steps: Sequence[Step], on_completion: OnCompletion | None = None) -> list[Completion]:
        """Complete all steps and return them in the order given; `on_completion` is called with each in this thread.

        Raises:
            EvaluationError: a request is refused, or still fails after the last attempt; `on_completion` has been called
                with the completions before it.
        """
        self._stop.clear()
        completions: dict[int, Completion] = {}
        with ThreadPoolExecutor(self._config.batch, thread_name_prefix="chat") as pool:
            futures = {pool.submit(self._ask, step): order for order, step in enumerate(steps)}
            left = set(futures)
            try:
                while left:
                    done, left = wait(left, return_when=FIRST_COMPLETED)
                    # First what succeeded: a failure beside it must not cost it.
                    for future in sorted(done, key=lambda each: each.exception() is not None):
                        completions[futures[future]] = future.result()
                        if on_completion is not None:
                            on_completion(completions[futures[future]])
            finally:
                self._stop.set()
                for future in left:
                    future.cancel()
        return [completions[order] for order in range(len(steps))]

    def _ask(self, step: Step) -> Completion:
        fields = self._config.request_fields()
        chat = chat_step(step, as_recorded=fields.get("tools", ...) is None)
        request: dict[str, Any] = {
            "model": self._config.served_model,
            "messages": chat.messages,
            "temperature": 0,
            "max_tokens": self._config.max_new_tokens,
            **({"tools": chat.tools} if chat.tools else {}),
            **fields,
        }
        body = json.dumps({name: value for name, value in request.items() if value is not None}).encode()
        reply = self._post(body, f"{step.conversation.id} step {step.index}")
        match reply:
            case {"choices": [{"message": dict(message)} as choice, *_]}:
                usage = reply.get("usage")
                tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
                finish: Finish = "length" if choice.get("finish_reason") == "length" else "stop"
                text = reply_text(message, chat.names)
                return Completion(step, text, tokens if isinstance(tokens, int) else 0, finish)
        raise EvaluationError(f"{self._url}: the reply has no choices[0].message: {self._quoted(json.dumps(reply))}")

    def _post(self, body: bytes, what: str) -> dict[str, Any]:
        for attempt in range(self._config.retries + 1):
            wait_for = None
            try:
                return self._send(body)
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {self._quoted(_body(error))}"
                if error.code not in _TRY_AGAIN:
                    raise EvaluationError(f"{self._url}: {what}: refused with {problem}") from None
                wait_for = _seconds(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:
                problem = self._quoted(f"{type(error).__name__}: {error}")
            except (ValueError, RecursionError) as error:
                problem = self._quoted(f"the reply is no JSON object: {error}")
            if attempt == self._config.retries or self._stop.is_set():
                break
            delay = min(2.0**attempt if wait_for is None else wait_for, _LONGEST_PAUSE)
            log.warning("%s: %s: %s; again in %.0f s", self._url, what, problem, delay)
            self._pause(delay)
        raise EvaluationError(
            f"{self._url}: {what}: attempt {attempt + 1} of {self._config.retries + 1} failed: {problem}. "
            "Run the same command again to continue from the completions that are kept"
        )

    def _send(self, body: bytes) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "agentft"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self._url}/chat/completions", data=body, headers=headers, method="POST")
        with self._opener.open(request, timeout=self._config.request_timeout) as response:
            content = response.read(_LARGEST_REPLY + 1)
        if len(content) > _LARGEST_REPLY:
            raise ValueError(f"more than {_LARGEST_REPLY:,} bytes")
        value = json.loads(content)
        if not isinstance(value, dict):
            raise ValueError(f"found {type(value).__name__}")
        return value

    def _quoted(self, text: str) -> str:
        """Return a reply of the endpoint, short, on one line and without the key."""
        if self._key:
            text = text.replace(self._key, "<redacted>")
        return redact_text(" ".join(text.split()))[:400]


def _key(config: EvaluationConfig, url: str) -> str | None:
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            "evaluation.base_url holds a name or password; the key belongs into the environment variable "
            f"{config.auth_variable} (evaluation.auth_variable)"
        )
    key = os.environ.get(config.auth_variable, "").strip() or None
    if key and not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{config.auth_variable} holds no key: it has characters that no header may have")
    if key and parts.scheme == "http" and not _is_this_machine(url):
        log.warning("the key in %s goes to %s unencrypted", config.auth_variable, parts.hostname)
    return key


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Turns every redirect into the HTTP error that it is."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _is_this_machine(url: str) -> bool:
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def _body(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""


def _seconds(text: str | None) -> float | None:
    try:
        return max(float(text), 0.0) if text else None
    except ValueError:
        return None  # a date: the usual pause serves
