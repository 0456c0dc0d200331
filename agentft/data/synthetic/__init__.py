"""Make up conversations with tools; names change from one to the next, so that a model has to read the tool list."""

from agentft.data.synthetic.dialogues import generate

__all__ = ["generate"]
