"""Fine-tune a model: `python train.py --help`."""

from agentft.config import TrainConfig, compose_and_run


def main(config: TrainConfig) -> float:
    # Imported here: composing, refusing a typo and --help must not wait for torch.
    from agentft.recipes.train import train

    return train(config).objective


if __name__ == "__main__":
    compose_and_run("train", TrainConfig, main)
