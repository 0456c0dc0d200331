"""What a training leaves behind for others to load: written beside its place and renamed, so that half of it is never there."""

from __future__ import annotations

import os
import shutil
from typing import Any

from safetensors import SafetensorError

from agentft.errors import RunError
from agentft.model.adapters import save_final
from agentft.model.config import LoraConfig, SftConfig
from agentft.runs import RunFolder
from agentft.training.engine import Engine


def write_final(model: Any, sft_type: SftConfig, tokenizer: Any, run: RunFolder, engine: Engine) -> None:
    """Write `run.final`: the adapter or the whole model with its tokenizer, by rank 0 from the weights of all.

    Raises:
        RunError: the disk refused; the checkpoints are intact, and the same command goes on from the last.
    """
    weights = engine.weights(frozen=not isinstance(sft_type, LoraConfig))
    if not engine.world.is_main:
        weights.take_part()
        return
    whole = dict(weights)
    work = run.path / f".final.{os.getpid()}"
    try:
        for left in run.path.glob(".final.*"):  # of a killed process: the run folder is ours
            shutil.rmtree(left)
        save_final(model, sft_type, tokenizer, work, whole)
        if run.final.exists():
            shutil.rmtree(run.final)
        work.rename(run.final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(work, ignore_errors=True)
        raise RunError(
            f"{run.final}: cannot be written: {error}; the last checkpoint is intact, so with room on the disk "
            f"run_dir={run.path} goes on from it"
        ) from error
