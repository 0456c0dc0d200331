"""Fine-tune a model: `python train.py --help`."""

from agentft.entry import train

if __name__ == "__main__":
    train()
