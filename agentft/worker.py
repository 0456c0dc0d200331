"""One rank of a training, for sites that start ranks themselves; it takes the settings and flags of `train.py`.

    torchrun --nproc-per-node 8 -m agentft.worker distributed=fsdp model=qwen2.5-7b run_dir=runs/mine

`train.py` starts ranks by itself and needs none of this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentft.signals import StopSignals

if TYPE_CHECKING:
    from agentft.config import TrainConfig


def main() -> None:
    """Run this process's part of the training; all ranks need the same `run_dir`."""
    with StopSignals() as signals, signals.deferred():
        from agentft.config import TrainConfig, compose_and_run

        compose_and_run("train", TrainConfig, _train)


def _train(config: TrainConfig) -> float | None:
    from agentft.recipes.config import config_to_yaml
    from agentft.recipes.train import train_rank

    with StopSignals.shared() as signals, signals.at_once():
        return train_rank(config_to_yaml(config)).objective


if __name__ == "__main__":
    main()
