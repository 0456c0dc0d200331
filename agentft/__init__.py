"""agentft fine-tunes language models that use tools."""

import os

# libgomp reads it as torch is imported. By default idle threads spin, and two trainings on one machine stand still.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
