"""Before weights are asked for, a training says what it needs; what cannot fit by far is refused."""

from __future__ import annotations

import json
import logging
import re

import pytest

from agentft import runtime
from agentft.config import compose, register_schemas, to_train_config
from agentft.distributed.config import DistributedConfig, EngineKind
from agentft.errors import ModelError
from agentft.model.config import Dtype, RandomShape
from agentft.model.memory import DeviceMemory, estimate_memory, planned_model
from agentft.model.sources import random_folder
from agentft.recipes import components
from agentft.recipes.components import MemoryPlan, plan_memory, workload
from agentft.recipes.train import train
from agentft.runs import read_json
from agentft.runtime import Device
from tests.model.loopback_hubs import Repository, serve

HUGE = {"model_type": "llama", "vocab_size": 128_000, "hidden_size": 131_072, "num_hidden_layers": 500}
HUGE |= {"num_attention_heads": 128, "intermediate_size": 500_000}
"""A model of more than a hundred thousand billion parameters, whose file of settings is small."""


def config(tmp_path, *overrides):
    register_schemas()
    quick = [
        *(
            "dataset.conversations=12",
            "dataset.heldout=4",
            "training.gradient_accumulation_steps=4",
            "training.max_steps=1",
        ),
        *(
            "evaluation.before=false",
            "evaluation.after=false",
            "evaluation.eval_steps=0",
            "tracking=disabled",
            "threads=1",
        ),
        *(f"model.cache_dir='{tmp_path}/cache'", f"run_dir='{tmp_path}/run'"),
    ]
    return to_train_config(compose("train", [*quick, *overrides]))


def check_memory(config, device=None) -> MemoryPlan:
    """Plan the memory of a composed training as the recipe does."""
    device = device or runtime.set_up(1)
    return plan_memory(
        config.model,
        config.sft_type,
        workload(config.distributed, config.training, max_length=config.dataset.max_length, device=device),
        device,
        check=config.training.memory_check,
        checkpointing=config.training.gradient_checkpointing,
    )


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr("modelscope_hub._legacy_api.time.sleep", lambda _: None)
    random_folder(RandomShape(hidden=16, intermediate=32), 4096, tmp_path / "model")
    repository = Repository({path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()})
    with serve("modelscope", repository) as url:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", url)
        yield repository


FROM_HUB = ["model=auto", "model.id=owner/small"]


def test_what_cannot_fit_is_refused_before_its_weights_are_fetched(tmp_path, hub):
    hub.files["config.json"] = json.dumps(HUGE).encode()
    with pytest.raises(ModelError, match=r"cannot fit: try .*training\.memory_check=warn trains"):
        train(config(tmp_path, *FROM_HUB))
    fetched = [what for command, what, _ in hub.log if command == "GET" and not what.startswith("/api")]
    assert fetched == ["config.json"]
    assert read_json(tmp_path / "run" / "status.json")["state"] == "failed"


def test_the_check_can_be_a_warning_or_nothing(tmp_path, hub, caplog):
    hub.files["config.json"] = json.dumps(HUGE).encode()
    with caplog.at_level(logging.WARNING):
        estimate = check_memory(config(tmp_path, *FROM_HUB, "training.memory_check=warn")).estimate
    assert estimate is not None
    assert estimate.total > 10**14
    assert "cannot fit" in caplog.text
    assert check_memory(config(tmp_path, *FROM_HUB, "training.memory_check=off")).estimate is None


def test_an_architecture_that_is_not_counted_says_so_and_goes_on(tmp_path, hub, caplog):
    hub.files["config.json"] = b'{"model_type": "unheard"}'
    with caplog.at_level(logging.INFO):
        assert check_memory(config(tmp_path, *FROM_HUB)).estimate is None
    assert "no memory estimate for model_type 'unheard'" in caplog.text


def test_a_run_from_a_hub_records_commit_and_estimate(tmp_path, hub):
    run = train(config(tmp_path, *FROM_HUB)).run_dir
    record = read_json(run / "run.json")
    assert record["model_commit"].startswith("master, files ")
    assert 0 < record["estimated_memory_bytes"] < 10**9
    line = next(line for line in (run / "train.log").read_text(encoding="utf-8").splitlines() if " training: " in line)
    assert re.search(
        r"[\d,]+ of [\d,]+ parameters are trained \(.+\); peak memory about [\d.]+ of [\d.]+ GB free on CPU.*; about [\d,]+ "
        r"tokens, 0\.333 epochs, in 1 steps of 4 conversations at learning rate",
        line,
    )


SEVEN_BILLION = {"model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 3584, "num_hidden_layers": 28}
SEVEN_BILLION |= {"num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18_944}


def _zero(stage, **offload):
    return {"zero_optimization": {"stage": stage, **{name: {"device": "cpu"} for name in offload}}}


def _zero(stage, **offload):
    return {"zero_optimization": {"stage": stage, **{name: {"device": "cpu"} for name in offload}}}


@pytest.mark.parametrize(
    ("engine", "deepspeed", "gigabytes"),
    [
        ("ddp", {}, 140),
        ("fsdp", {}, 24),
        ("deepspeed", _zero(1), 90),
        ("deepspeed", _zero(2), 60),
        ("deepspeed", _zero(3), 24),
        ("deepspeed", _zero(3, offload_optimizer=1, offload_param=1), 5),
    ],
    ids=["ddp", "fsdp", "zero1", "zero2", "zero3", "offload"],
)
def test_eight_ranks_need_what_their_engine_leaves_on_each(engine, deepspeed, gigabytes, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    wanted = config(tmp_path, "sft_type=full", "model=qwen2.5-7b", "training.gradient_checkpointing=true")
    distributed, card = (
        DistributedConfig(name="any", engine=EngineKind[engine], deepspeed=deepspeed),
        Device("cuda", "a card", 8),
    )
    work = workload(distributed, wanted.training, max_length=wanted.dataset.max_length, device=card)
    model = planned_model(SEVEN_BILLION)
    found = (
        estimate_memory(model, wanted.model, wanted.sft_type, work, dtype=Dtype.bf16, checkpointing=True).total / 1e9
    )
    assert 0.6 * gigabytes < found < 1.15 * gigabytes


@pytest.mark.parametrize(
    ("free", "asked", "wanted"),
    [(80, "null", False), (20, "null", True), (20, "false", False), (80, "true", True)],
)
def test_activations_are_computed_twice_on_a_gpu_where_memory_asks_for_it(
    free, asked, wanted, tmp_path, monkeypatch, caplog
):
    """7B by LoRA, 2,048 tokens: 16 GB with checkpointing, above 30 without."""
    monkeypatch.setattr(components, "resolve_dtype", lambda dtype, device: Dtype.bf16)
    monkeypatch.setattr(components, "model_settings", lambda model: SEVEN_BILLION)
    known = DeviceMemory(free * 10**9, 80 * 10**9)
    monkeypatch.setattr(components, "device_memory", lambda device: known)
    seven = config(tmp_path, "model=qwen2.5-7b", "sft_type=lora", f"training.gradient_checkpointing={asked}")
    with caplog.at_level(logging.INFO):
        plan = check_memory(seven, Device("cuda", "a card", 8))
    assert plan.checkpointing is wanted
    assert (plan.estimate.total < 25e9) is wanted
    assert ("training.gradient_checkpointing=null: on; without it memory" in caplog.text) is (
        wanted and asked == "null"
    )


def test_on_a_cpu_nothing_is_computed_twice_unasked(tmp_path, hub):
    assert not check_memory(config(tmp_path, *FROM_HUB)).checkpointing
    assert check_memory(config(tmp_path, *FROM_HUB, "training.gradient_checkpointing=true")).checkpointing
