"""agentft fine-tunes language models that use tools."""

import os

# libgomp reads it as torch is imported. By default idle threads spin, and two trainings on one machine stand still; where they
# give up much sooner, one training alone loses a third of its speed to waking them.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
