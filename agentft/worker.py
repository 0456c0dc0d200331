"""One rank of a training, for sites that start ranks themselves: `torchrun ... -m agentft.worker --config <file>`.

The file is a resolved configuration, such as the `config.yaml` of a run folder; `--write` makes one:

    python -m agentft.worker --write job.yaml distributed=fsdp model=qwen2.5-7b run_dir=runs/mine
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node1:29400 -m agentft.worker --config job.yaml

What allows pickles or code counts from the command line only: `--config job.yaml model.allow_pickle=true`.
`agentft.recipes.train.train` starts ranks by itself and needs none of this.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from agentft.errors import AgentftError, ConfigError
from agentft.model.config import TrustConfig
from agentft.progress import outlive_console
from agentft.recipes.config import TrainConfig, config_from_yaml, require_typed
from agentft.signals import StopSignal, StopSignals


def main(arguments: Sequence[str]) -> None:
    """Run the program with its command line. Raises AgentftError."""
    outlive_console()
    parser = argparse.ArgumentParser(prog="python -m agentft.worker", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, help="resolved configuration, as in a run folder")
    parser.add_argument("--write", type=Path, help="only write such a file, from the settings that follow")
    parser.add_argument("settings", nargs="*", help="with --write: as for train.py, and run_dir=...")
    given = parser.parse_args(arguments)
    if given.write is not None:
        from agentft.config import compose, config_to_yaml, to_train_config

        if not any(setting.startswith("run_dir=") for setting in given.settings):
            raise ConfigError("run_dir: give run_dir=<folder>, which all ranks write to")
        given.write.write_text(config_to_yaml(to_train_config(compose("train", given.settings))), encoding="utf-8")
        return
    trust = {each.name: f"model.{each.name}=true" in given.settings for each in fields(TrustConfig)}
    if given.config is None or len(given.settings) > sum(trust.values()):
        raise ConfigError("--config <file> is needed, and settings belong to --write; see --help")
    with StopSignals() as signals, signals.deferred():
        from agentft.recipes.train import train_rank

        text = given.config.read_text(encoding="utf-8")
        model = config_from_yaml(text, TrainConfig).model
        require_typed(model, TrustConfig(**trust), given.config)
        with signals.at_once():
            train_rank(text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (AgentftError, StopSignal) as error:
        sys.stderr.write(f"agentft.worker: {error}\n")
        code = error.exit_code if isinstance(error, StopSignal) else 2 if isinstance(error, ConfigError) else 1
        raise SystemExit(code) from None
