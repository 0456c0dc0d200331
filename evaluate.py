"""Answer a run's held-out conversations again and score them: `python evaluate.py --help`."""

from agentft.entry import evaluate

if __name__ == "__main__":
    evaluate()
