"""Answer a run's held-out conversations again and score them: `python evaluate.py --help`."""

from agentft.config import EvaluateConfig, compose_and_run


def main(config: EvaluateConfig) -> float:
    from agentft.recipes.evaluate import evaluate

    return evaluate(config).objective


if __name__ == "__main__":
    compose_and_run("evaluate", EvaluateConfig, main)
