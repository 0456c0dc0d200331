"""Answer a run's held-out conversations again and score them: `python evaluate.py --help`."""

import sys

from agentft.config import EvaluateConfig, compose_and_run
from agentft.recipes.as_trained import with_run_settings


def main(config: EvaluateConfig) -> float:
    from agentft.recipes.evaluate import evaluate

    return evaluate(config).objective


if __name__ == "__main__":
    sys.argv[1:] = with_run_settings(sys.argv[1:])
    compose_and_run("evaluate", EvaluateConfig, main)
