"""The engine for vLLM. The package wants an environment of its own: a stand-in with its documented signatures answers."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from agentft.data.tokens import tokenize
from agentft.errors import ConfigError, EvaluationError
from agentft.evaluation.config import Engine, EvaluationConfig, Mode
from agentft.evaluation.steps import all_steps
from agentft.evaluation.vllm import VllmGenerator, VllmModel


@pytest.fixture(scope="module")
def steps(golden_conversations, template, encoder):
    conversations = list(golden_conversations.values())[:4]
    return all_steps(conversations, list(tokenize(conversations, template, encoder)), template)


@dataclass
class _SamplingParams:
    temperature: float = 1.0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    stop: list[str] | None = None
    skip_special_tokens: bool = True


@dataclass
class _LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@pytest.fixture
def vllm(monkeypatch, byte_tokenizer, steps):
    """Says each reference and its stop token, then what a model that runs on would say."""
    package, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    told: dict[str, Any] = {"calls": []}
    replies = {tuple(s.input_ids[: s.start].tolist()): s.input_ids[s.start : s.stop].tolist() for s in steps}
    run_on = byte_tokenizer("<|startofexec|>{}").input_ids

    class LLM:
        def __init__(
            self, model: str, *, dtype: str = "auto", seed: int | None = None, **engine_arguments: Any
        ) -> None:
            told["model"] = {"model": model, "dtype": dtype, **engine_arguments}

        def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
            told["calls"].append((len(prompts), sampling_params, lora_request))
            said = [replies[tuple(prompt["prompt_token_ids"])] for prompt in prompts]
            said[0] = [*said[0][:-1], *run_on]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids))]) for ids in said]

    package.LLM, package.SamplingParams, package.__version__ = LLM, _SamplingParams, "0.0.stand-in"
    request.LoRARequest = _LoRARequest
    for module in (package, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return told


def test_token_ids_go_in_and_answers_end_as_everywhere(vllm, steps, byte_tokenizer, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 12, "rank_pattern": {}}))
    model = VllmModel(
        folder=tmp_path / "base", adapter=tmp_path, dtype="bfloat16", context=99, options={"tensor_parallel_size": 2}
    )
    stop = byte_tokenizer.eos_token_id
    engine = VllmGenerator(model, byte_tokenizer, stop_ids=[stop], max_new_tokens=50)
    heard = []
    answers = engine.generate(steps, heard.append)
    assert heard == answers
    assert [answer.step for answer in answers] == list(steps)
    assert answers[0].finish == "text_stop"
    assert answers[0].text == steps[0].reference + "<|startofexec|>"
    for step, answer in list(zip(steps, answers, strict=True))[1:]:
        assert (answer.text, answer.finish, answer.tokens) == (step.reference, "stop", step.stop - step.start)
    assert vllm["model"] == {
        "model": str(tmp_path / "base"),
        "dtype": "bfloat16",
        "max_model_len": 99,
        "trust_remote_code": False,
        "enable_prefix_caching": True,
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": 16,
        "tensor_parallel_size": 2,
    }
    ((count, parameters, adapter),) = vllm["calls"]
    assert count == len(steps)
    assert (parameters.temperature, parameters.max_tokens, parameters.stop_token_ids) == (0.0, 50, [stop])
    assert parameters.ignore_eos, "the run's stop token ends an answer, not what the model's files say"
    assert adapter == _LoRARequest("run", 1, str(tmp_path))


def test_without_the_package_it_says_what_to_install(monkeypatch, byte_tokenizer, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    model = VllmModel(folder=tmp_path, dtype="bfloat16", context=99)
    with pytest.raises(EvaluationError, match="pip install vllm"):
        VllmGenerator(model, byte_tokenizer, stop_ids=[0], max_new_tokens=5)


def test_settings_that_vllm_cannot_serve_are_refused():
    with pytest.raises(ConfigError, match=r"mode=likelihood"):
        EvaluationConfig(engine=Engine.vllm, mode=Mode.likelihood)
    with pytest.raises(ConfigError, match=r"vllm_options='\[1\]': expected a JSON object"):
        EvaluationConfig(engine=Engine.vllm, vllm_options="[1]")
    with pytest.raises(ConfigError, match=r"base_url"):
        EvaluationConfig(engine=Engine.vllm, base_url="http://localhost")
