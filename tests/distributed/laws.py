"""Tiny trainings under any engine, measured; test_engines.py says which laws the measures must keep.

    python tests/distributed/laws.py <tasks.json> <results.json>

runs a list of tasks on two ranks, all in one launch, since starting the ranks costs more than the tasks.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from agentft.data.batches import StepPlan
from agentft.data.conversation import Conversation, Origin
from agentft.data.records import read_record
from agentft.data.render import MsagentTemplate
from agentft.data.tokens import SegmentEncoder
from agentft.distributed.config import DistributedConfig, EngineKind
from agentft.distributed.engines import make_engine
from agentft.distributed.evaluation import likelihood_on_ranks, run_on_main
from agentft.distributed.launch import run_on_ranks
from agentft.errors import RankError
from agentft.evaluation.generate import GreedyGenerator
from agentft.evaluation.likelihood import measure_likelihood
from agentft.evaluation.steps import all_steps
from agentft.model.adapters import prepare_for_training
from agentft.model.config import FullConfig, LoraConfig, ModelConfig
from agentft.model.labelled_loss import LabelledLoss
from agentft.model.load import load_model
from agentft.model.sources import ModelFiles, byte_tokenizer
from agentft.runtime import Device, World, join_world, leave_world
from agentft.training.config import TrainingConfig
from agentft.training.loop import Job, train_model
from tests.examples import tokenize

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 4
LORA = LoraConfig(name="lora", default_learning_rate=1e-2, rank=4, dropout=0.0)
FULL = FullConfig(name="full", default_learning_rate=1e-3)
METHODS = {"lora": LORA, "full": FULL, "dropout": dataclasses.replace(LORA, dropout=0.1)}


def conversations() -> list[Conversation]:
    lines = (ROOT / "tests" / "golden" / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    read = [read_record(json.loads(line), Origin("c", number)) for number, line in enumerate(lines)]
    return [outcome[0] for outcome in read if isinstance(outcome, tuple)]


def tiny_model(dtype: torch.dtype) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        use_cache=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).to(dtype)


def distributed(name: str) -> DistributedConfig:
    """Return an option of the group, read without Hydra."""

    def values(option: str) -> dict[str, Any]:
        read = yaml.safe_load((ROOT / "conf" / "distributed" / f"{option}.yaml").read_text(encoding="utf-8"))
        merged: dict[str, Any] = {}
        for base in read.pop("defaults"):
            if base not in ("_self_", "schema_distributed"):
                merged = values(base)
        return _merge(merged, read)

    found = values(name)
    return DistributedConfig(**{**found, "engine": EngineKind[found["engine"]]})


def _merge(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    merged = dict(left)
    for key, value in right.items():
        merged[key] = _merge(merged[key], value) if isinstance(value, dict) and key in merged else value
    return merged


SCALER = {"scale": 0.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}


@dataclasses.dataclass
class Case:
    """One engine with one method, ready to train."""

    engine: Any
    job: Job
    losses: list[tuple[int, float, float]]


def loaded(folder: Path, dtype: torch.dtype | None) -> torch.nn.Module:
    """The tiny model from a file in bf16, in `dtype` or, with None, as it is in the file."""
    settings = ModelConfig(name="tiny")
    return load_model(
        ModelFiles(folder, "tiny"), settings, device=Device("cpu", "cpu", 1), dtype=dtype, attention="sdpa"
    )


def case(
    option: str,
    method: str,
    folder: Path,
    world: World,
    *,
    dtype: torch.dtype = torch.float32,
    file: Path | None = None,
    mapped: bool = False,
) -> Case:
    template = MsagentTemplate(byte_tokenizer().eos_token)
    examples = list(tokenize(conversations(), template, SegmentEncoder(byte_tokenizer())))
    sft = METHODS[method]
    kept = torch.float32 if method == "full" else dtype
    base = tiny_model(kept) if file is None else loaded(file, None if mapped else kept)
    torch.manual_seed(11)
    model = prepare_for_training(base, sft, ModelConfig(name="tiny"), cast=not mapped)
    training = TrainingConfig(
        learning_rate=sft.default_learning_rate,
        gradient_accumulation_steps=5,
        max_steps=STEPS,
        logging_steps=1,
        save_steps=1,
        save_total_limit=9,
    )
    objective = LabelledLoss(model, autocast=dtype if method == "full" and dtype != torch.float32 else None)
    frozen = dtype if mapped else None
    engine = make_engine(distributed(option), objective, training, world, fp16=dtype is torch.float16, frozen=frozen)
    losses: list[tuple[int, float, float]] = []

    def note(values: Any, step: int) -> None:
        if "train/loss" in values:
            losses.append((step, values["train/loss"], values["train/grad_norm"]))

    job = Job(
        engine=engine,
        examples=examples,
        plan=StepPlan(examples=len(examples), examples_per_step=5, epochs=1, max_steps=STEPS, seed=5),
        config=training,
        pad_id=0,
        device=torch.device("cpu"),
        checkpoints=folder,
        fingerprint={"data": "x"},
        evaluate=lambda step: {"loss": 1.0},
        evaluation_steps=0,
        best_metric="loss",
        rank=lambda values: [-values["loss"]],
        log=note,
        fp16=dtype is torch.float16,
    )
    return Case(engine, job, losses)


def examine(found: Case, world: World) -> dict[str, Any]:
    """Loss of every conversation and answers to every step, with the ranks together."""
    tokenizer = byte_tokenizer()
    with found.engine.unsharded():
        model = found.engine.model.eval()
        likelihood = likelihood_on_ranks(
            world, found.job.examples, partial(measure_likelihood, model, batch=2, pad_id=0)
        )
        stop = tokenizer.eos_token_id
        generator = GreedyGenerator(model, tokenizer, stop_ids=[stop], batch=2, max_new_tokens=3)
        template = MsagentTemplate(tokenizer.eos_token)
        steps = all_steps(conversations(), found.job.examples, template)[:7]
        answers = run_on_main(world, generator, lambda together: together.generate(steps))
        model.train()
    return {
        "nats": likelihood.nats_GK.sum(1).tolist(),
        "answers": None if answers is None else [[a.step.conversation.id, a.step.index, a.text] for a in answers],
    }


def everywhere(found: Case, world: World) -> dict[str, torch.Tensor]:
    """Return on every rank the weights that rank 0 gets from a stream."""
    return world.broadcast(dict(found.engine.weights()))


def break_exams(found: Case, world: World) -> list[str]:
    """Let an exam end in errors, on rank 1 in the middle of its answers and on rank 0 between two rounds; what rank 0 heard."""
    tokenizer = byte_tokenizer()
    steps = all_steps(conversations(), found.job.examples, MsagentTemplate(tokenizer.eos_token))[:4]
    heard = []

    class Failing:
        def generate(self, steps: Any, on_completion: Any = None) -> list[Any]:
            if world.rank == 1:
                raise ValueError("rank 1 cannot answer")
            return generator.generate(steps, on_completion)

    def fail_between(together: Any) -> None:
        together.generate(steps)
        raise KeyError("rank 0 cannot score")

    for answerer, work in (("failing", lambda together: together.generate(steps)), ("own", fail_between)):
        try:
            with found.engine.unsharded():
                stop = tokenizer.eos_token_id
                generator = GreedyGenerator(
                    found.engine.model.eval(), tokenizer, stop_ids=[stop], batch=2, max_new_tokens=2
                )
                run_on_main(world, Failing() if answerer == "failing" else generator, work)
        except (RankError, ValueError, KeyError) as error:
            heard.append(f"{type(error).__name__}: {error}")
    found.engine.model.train()
    return heard


def held_bytes(engine: Any) -> dict[str, int]:
    """Bytes of weights and of AdamW's moments that this rank keeps between steps."""

    def own(tensor: Any) -> int:
        local = tensor.to_local() if hasattr(tensor, "to_local") else getattr(tensor, "ds_tensor", tensor)
        return local.numel() * local.element_size()

    moments = [value for state in engine.optimizer.state.values() for value in state.values() if value.ndim]
    return {"weights": sum(map(own, engine.model.parameters())), "moments": sum(map(own, moments))}


def run(task: dict[str, Any], world: World) -> dict[str, Any]:
    """Train one case, from the checkpoint of another if one is named, and return what was measured."""
    folder, started = Path(task["folder"]), time.process_time()
    if "start" in task and world.is_main:
        shutil.copytree(task["start"], folder / Path(task["start"]).name)
    world.barrier()
    dtype, file = getattr(torch, task.get("dtype", "float32")), task.get("file")
    here = case(
        *(task["option"], task["method"], folder, world),
        dtype=dtype,
        file=None if file is None else Path(file),
        mapped=task.get("mapped", False),
    )
    if "scale" in task:
        scaler = {"scaler": SCALER | {"scale": task["scale"]}}
        here.engine.load(everywhere(here, world), {}, here.engine.settings() | scaler)
    broken = break_exams(here, world) if task.get("break") else None
    examined = examine(here, world) if task.get("examine") else None
    train_model(here.job)
    final = dict(here.engine.weights())
    return {
        "losses": here.losses,
        "broken": broken,
        "scale": here.engine.settings().get("scaler", {}).get("scale"),
        "before": examined,
        "after": examine(here, world) if task.get("examine") else None,
        "bytes": held_bytes(here.engine),
        "cpu_seconds": time.process_time() - started,
        "sums": {name: float(tensor.double().sum()) for name, tensor in final.items()},
    }


def rank(payload: str) -> list[dict[str, Any]]:
    """What each rank does: all tasks, one after the other."""
    torch.set_num_threads(1)
    world = join_world("cpu", 120)
    try:
        return [run(task, world) for task in json.loads(payload)]
    finally:
        leave_world()


def on_two_ranks(tasks: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    config = DistributedConfig(name="test", engine=EngineKind.ddp, nproc=2)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks, whatever the machine has
    found: list[dict[str, Any]] = run_on_ranks(rank, json.dumps(tasks), config, folder=str(folder), threads=1)
    return found


if __name__ == "__main__":
    given, found_file = Path(sys.argv[1]), Path(sys.argv[2])
    measured = on_two_ranks(json.loads(given.read_text()), found_file.parent)
    found_file.write_text(json.dumps(measured))
