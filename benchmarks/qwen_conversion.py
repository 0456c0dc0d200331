"""First-generation Qwen as Qwen2: logits, token ids, and what conversion and loading cost.

    python -m benchmarks.qwen_conversion                                        a minute; 0.05B parameters
    python -m benchmarks.qwen_conversion --billions 1 --strings 100000 --ranks qwen.tiktoken

Prints the largest logit difference against a reference forward pass written from the description, mismatches of token
ids against tiktoken on random Unicode, and for a synthetic bf16 checkpoint in shards: seconds and peak memory of the
conversion and of loading, beside the size of the files. Memory is the process's anonymous resident set (what mapped
files do not explain) and its whole resident set, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from agentft.model import conversion
from agentft.model.config import Dtype, ModelConfig, ModelSource
from agentft.model.conversion import qwen_tokenizer, read_ranks
from agentft.model.load import load_model
from agentft.model.sources import locate_model
from agentft.runtime import Device
from tests.model.test_conversion_qwen import logits_of, old_folder, old_settings, random_state, reference_logits
from tests.model.test_conversion_qwen_tokenizer import (
    ASSIGNED,
    random_text,
    reference,
    reference_ids,
    small_ranks,
    write_ranks,
)

SHARD_LAYERS = 4
"""Layers in one file of the synthetic checkpoint."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=float, default=0.05, help="parameters of the synthetic checkpoint")
    parser.add_argument("--strings", type=int, default=10_000, help="random strings for the tokenizer")
    parser.add_argument("--ranks", type=Path, help="a qwen.tiktoken; without it a small one is trained")
    parser.add_argument("--folder", type=Path, help="where to write; it needs three times the checkpoint")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        compare_logits(Path(scratch))
        compare_ids(Path(scratch), arguments.ranks, arguments.strings)
        measure_costs(Path(scratch), arguments.billions)


def compare_logits(scratch: Path) -> None:
    for number, changes in enumerate([{}, {"n_embd": 128, "n_head": 2, "kv_channels": 64}, {"n_layer": 4}]):
        settings = old_settings(seq_length=512, **changes)
        state = random_state(settings, seed=number)
        source = old_folder(scratch / f"logits-{number}", settings, state)
        folder = conversion.converted_folder(source, fingerprint="0", context=512, cache_dir=str(scratch / "cache"))
        ids_BT = torch.randint(0, 1024, (2, 512), generator=torch.Generator().manual_seed(number))
        expected = reference_logits(state, ids_BT, heads=settings["n_head"], base=10000.0, eps=1e-6)
        for attention in ("eager", "sdpa"):
            difference = (logits_of(folder, ids_BT, torch.float32, attention) - expected).abs().max().item()
            print(
                f"logits, fp32, 2 x 512 tokens, {changes or 'default shape'}, {attention}: difference {difference:.3g}"
            )


def compare_ids(scratch: Path, ranks_file: Path | None, strings: int) -> None:
    ranks = read_ranks(ranks_file) if ranks_file else small_ranks()
    path = ranks_file or write_ranks(scratch / "qwen.tiktoken", ranks)
    began = time.perf_counter()
    tokenizer = qwen_tokenizer(path.parent)
    print(f"tokenizer: {len(ranks):,} ranks, built in {time.perf_counter() - began:.1f} s")
    encoding, rng = reference(ranks), random.Random(1)
    found = {"random strings": 0, "characters in context": 0}
    for _ in range(strings):
        text = random_text(rng, longest=60)
        found["random strings"] += tokenizer.encode(text) != reference_ids(encoding, text)
    for character in ASSIGNED:
        text = f"a{character} {character}\n{character}1"
        found["characters in context"] += tokenizer.encode(text) != reference_ids(encoding, text)
    print(
        f"token ids against tiktoken: {found['random strings']} of {strings:,} random strings differ, "
        f"{found['characters in context']} of {len(ASSIGNED):,} assigned characters"
    )


def synthetic_checkpoint(folder: Path, billions: float) -> int:
    """Write random bf16 shards in the old layout, a few layers at a time; returns their bytes."""
    layers = 24 if billions >= 0.5 else 8
    width = max(128, round((billions * 1e9 / (12 * layers + 48)) ** 0.5 / 128) * 128)
    settings = old_settings(
        n_embd=width,
        n_layer=layers,
        n_head=width // 128,
        kv_channels=128,
        ffn_hidden_size=16 * width // 3 // 2 * 2,
        padded_vocab_size=24 * width,
        vocab_size=24 * width,
        fp32=False,
        bf16=True,
    )
    folder.mkdir()
    weight_map: dict[str, str] = {}
    small = random_state({**settings, "n_layer": 1}, torch.bfloat16)
    outer = {name: tensor for name, tensor in small.items() if ".h.0." not in name}
    groups = [range(first, min(first + SHARD_LAYERS, layers)) for first in range(0, layers, SHARD_LAYERS)]
    for number, group in enumerate(groups):
        tensors = outer if number == 0 else {}
        for layer in group:
            tensors |= {n.replace(".h.0.", f".h.{layer}."): t.clone() for n, t in small.items() if ".h.0." in n}
        file = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(settings))
    write_ranks(folder / "qwen.tiktoken", small_ranks())
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure_costs(scratch: Path, billions: float) -> None:
    size = synthetic_checkpoint(scratch / "old", billions)
    print(f"synthetic checkpoint: {size / 2e9:.2f}B parameters, files {size / 1e9:.2f} GB")
    for what, job in (("convert", _convert), ("load", _load), ("load again", _load)):
        seconds, start, anonymous, resident = _in_own_process(job, scratch)
        print(
            f"{what}: {seconds:.1f} s, peak anonymous memory {(anonymous - start) / 1e9:.2f} GB "
            f"({(anonymous - start) / size:.2f} of the files), peak resident {resident / 1e9:.2f} GB"
        )


def _config(scratch: Path) -> ModelConfig:
    source, cache = str(scratch / "old"), str(scratch / "cache")
    return ModelConfig(name="old", source=ModelSource.local, path=source, cache_dir=cache, context=64, dtype=Dtype.bf16)


def _convert(scratch: Path) -> None:
    locate_model(_config(scratch))


def _load(scratch: Path) -> Any:
    config, device = _config(scratch), Device("cpu", "CPU", 1)
    model = load_model(locate_model(config), config, device=device, dtype=torch.bfloat16, attention="sdpa")
    for parameter in model.parameters():
        assert parameter.isfinite().all()  # every page is read
    return model


def _in_own_process(job: Callable[[Path], Any], scratch: Path) -> tuple[float, int, int, int]:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_watched, args=(job, scratch, sender))
    process.start()
    sender.close()
    result: tuple[float, int, int, int] = receiver.recv()
    process.join()
    return result


def _watched(job: Callable[[Path], Any], scratch: Path, sender: Any) -> None:
    torch.set_num_threads(1)
    import transformers  # noqa: F401 (its own memory is no part of the job's)

    peak, done = {"RssAnon": 0, "VmRSS": 0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            for name, value in _status().items():
                peak[name] = max(peak[name], value)

    start = _status()["RssAnon"]
    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    kept = job(scratch)
    seconds = time.perf_counter() - began
    done.set()
    thread.join()
    sender.send((seconds, start, peak["RssAnon"], peak["VmRSS"]))
    del kept


def _status() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {parts[0][:-1]: int(parts[1]) * 1024 for parts in lines if parts[0] in ("RssAnon:", "VmRSS:")}


if __name__ == "__main__":
    main()
