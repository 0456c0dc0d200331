"""Log a run while it trains: into `metrics.jsonl` in the run folder, and to Weights & Biases.

`metrics.jsonl` is the truth that runs are compared by: it survives SIGKILL, and every mode of W&B writes it. W&B shows
the same numbers in a dashboard; an error there is a line in the log and never the end of a training.
"""

from agentft.tracking.config import TrackingConfig, TrackingMode, resolve_mode
from agentft.tracking.tracker import STEP, Tracker, read_metrics

__all__ = ["STEP", "Tracker", "TrackingConfig", "TrackingMode", "read_metrics", "resolve_mode"]
