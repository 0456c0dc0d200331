"""A built-in dataset: conversations with tools, made up from a catalogue of tools and pools of values.

It needs no download, can be of any length, and is short enough to train a small model on a CPU. Tool and parameter
names change from conversation to conversation, so that a model has to read the tool list to call the right one.
"""

from agentft.data.synthetic.dialogues import generate

__all__ = ["generate"]
