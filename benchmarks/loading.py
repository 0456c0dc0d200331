"""What a rank holds while a model is loaded and cut, per engine and method, before and after weights stayed mapped.

    python benchmarks/loading.py [--engines fsdp,deepspeed_zero3,...] [--layers 16]

A Llama of random weights is written once in bf16 (16 layers: 254 million parameters, 0.51 GB). Two ranks on the CPU then
load it, attach adapters or train all of it in fp32, and hand it to the engine. Counted is what the system says of each
process: the peak of its anonymous memory (`RssAnon`, read every 2 ms) over what it held before the model. Pages of mapped
files are not in it: all ranks share them, and the system takes them back when memory is short. `cast first` loads as
a job on one device does, in the number format that is kept; `as in the file` is what sharded engines do.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "distributed")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])

import torch  # noqa: E402

from agentft.distributed.config import (  # noqa: E402
    DistributedConfig,
    EngineKind,
)
from agentft.distributed.launch import run_on_ranks  # noqa: E402

ENGINES = ("ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "fsdp")
CASES = (("lora", "bfloat16"), ("lora", "float32"), ("full", "bfloat16"), ("full", "float32"))
"""Method and dtype of computation. The file is in bf16 throughout."""


def write_model(folder: Path, layers: int) -> int:
    """Write the model, without a tokenizer, and return its bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    return (folder / "model.safetensors").stat().st_size


class Peak:
    """The most anonymous memory of this process while the body runs, over what it had before, in bytes."""

    def __enter__(self) -> Peak:
        self._before = self.bytes = _anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.after = _anonymous() - self._before
        self.bytes -= self._before

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, _anonymous())


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def load(option: str, method: str, dtype: torch.dtype, folder: Path, *, mapped: bool, world: Any) -> dict[str, float]:
    """Do what a rank of a training does from the file to the engine; bytes at the peak and afterwards."""
    import laws

    from agentft.distributed.engines import make_engine
    from agentft.model.adapters import prepare_for_training
    from agentft.model.config import ModelConfig
    from agentft.model.labelled_loss import LabelledLoss
    from agentft.model.load import load_model
    from agentft.model.sources import ModelFiles
    from agentft.runtime import Device
    from agentft.training.config import TrainingConfig

    sft, settings = laws.METHODS[method], ModelConfig(name="random", lora_targets=["q_proj", "v_proj"])
    device = Device(kind="cpu", name="cpu", threads=1)
    kept = torch.float32 if method == "full" else dtype
    with Peak() as peak:
        model = load_model(
            ModelFiles(folder, "x"), settings, device=device, dtype=None if mapped else kept, attention="sdpa"
        )
        model = prepare_for_training(model, sft, settings, cast=not mapped)
        objective = LabelledLoss(model, autocast=dtype if method == "full" and dtype != torch.float32 else None)
        engine = make_engine(
            laws.distributed(option), objective, TrainingConfig(learning_rate=1e-4), world, fp16=False, frozen=dtype
        )
    held = {"peak": float(peak.bytes), "after": float(peak.after)}
    del engine, objective, model
    return held


def rank(payload: str) -> list[dict[str, float]]:
    """Run one case; every case has processes of its own."""
    from agentft.model.quantization import import_peft
    from agentft.runtime import join_world, leave_world

    task = json.loads(payload)
    torch.set_num_threads(1)
    import_peft()

    if task["option"].startswith("deepspeed"):
        import deepspeed  # noqa: F401
    world = join_world("cpu", 300)
    try:
        arguments = (task["option"], task["method"], getattr(torch, task["dtype"]), Path(task["folder"]))
        return world.gather(load(*arguments, mapped=task["mapped"], world=world))
    finally:
        leave_world()


def measure(task: dict[str, Any], folder: Path) -> dict[str, float]:
    """Return the larger of two ranks' figures."""
    config = DistributedConfig(name="loading", engine=EngineKind.ddp, nproc=2)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks, whatever the machine has
    found = run_on_ranks(rank, json.dumps(task), config, folder=str(folder), threads=1)
    return {name: max(each[name] for each in found) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--layers", type=int, default=16)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = write_model(folder / "model", given.layers)
        print(f"File: {whole / 1e6:,.0f} MB of bf16; MB of anonymous memory on the larger of two ranks: peak (kept)\n")
        print("| engine | method | cast first | as in the file |\n|---|---|---|---|")
        for option in given.engines.split(","):
            sharded = option in ("fsdp", "deepspeed_zero3")
            trains_mapped = sharded or option.startswith(
                "deepspeed"
            )  # as `loads_mapped` of agentft.recipes.components says
            for method, dtype in CASES:
                cells = []
                for mapped in (False, True):
                    if mapped and not (sharded if method == "lora" else trains_mapped):
                        cells.append("-")
                        continue
                    task = {"option": option, "method": method, "dtype": dtype, "mapped": mapped}
                    found = measure(task | {"folder": str(folder / "model")}, folder)
                    cells.append(f"{found['peak'] / 1e6:,.0f} ({found['after'] / 1e6:,.0f})")
                print(f"| {option} | {method}, {dtype} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
