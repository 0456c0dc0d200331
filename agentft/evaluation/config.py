"""Define the settings of the group `evaluation`: what is measured, and how completions are generated.

Metrics are defined in `agentft.evaluation.metrics`; a test holds the two together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from agentft.settings import SEED, Settings

BEST_METRICS = (
    *("loss", "tool_acc", "tool_precision", "tool_f1", "param_em", "param_em_given_tool", "param_em_lenient"),
    *("arg_f1", "arg_f1_micro", "step_em", "conv_em", "plan_acc", "call_wellformed_rate", "thought_wellformed_rate"),
    *("url_match", "rouge_l", "rouge_l_after_call", "rouge_l_no_call"),
    *("tool_acc_repaired", "param_em_repaired", "arg_f1_repaired", "step_em_repaired"),
    *("legacy_action_em", "legacy_input_em", "legacy_rouge_l", "action_em", "argument_f1"),
)


class Mode(StrEnum):
    """How a model is measured."""

    teacher_forced = "teacher_forced"
    """Each step is completed with the complete reference history before it: the headline."""
    replay = "replay"
    """The model's own completions stay in the history; recorded tool results are fed while its calls match."""
    likelihood = "likelihood"
    """Nothing is generated: loss and perplexity of the references, by kind of token."""


class Engine(StrEnum):
    """What generates the completions."""

    transformers = "transformers"
    """The run's model, in this process."""
    openai = "openai"
    """A model behind an endpoint for chat completions, at `base_url`."""


@dataclass(kw_only=True)
class EvaluationConfig(Settings, group="evaluation", affects="results"):
    """Greedy evaluation of the steps of the held-out conversations."""

    mode: Mode = Mode.teacher_forced
    """Protocol of `evaluate.py`; a training measures teacher-forced before and after, and likelihood in between."""
    engine: Engine = field(default=Engine.transformers, metadata={"affects": "answers"})
    """What generates in `evaluate.py`: the run's model here, or a served one, with the same steps and scores."""
    eval_steps: int = field(default=50, metadata={"minimum": 0, "maximum": 10**9})
    """Training steps between evaluations of the held-out loss; 0: never during training."""
    before: bool = True
    """Measure the untrained model too, so that the run ends with a table before / after."""
    after: bool = True
    """Generate and score at the end of training."""
    conversations: int = field(default=-1, metadata={"minimum": 1, "maximum": 10**9, "also": -1})
    """Held-out conversations that are evaluated, the first of the held-out order; -1: all."""
    conversations_during: int = field(default=0, metadata={"advanced": True, "minimum": 0, "maximum": 10**9})
    """Held-out conversations generated for at each evaluation of a training; 0: 16, none if `best_metric=loss`."""
    batch: int = field(default=8, metadata={"minimum": 1, "maximum": 10**5, "affects": "nothing"})
    """Sequences generated at once; for `engine=openai`, concurrent requests."""
    max_new_tokens: int = field(default=512, metadata={"minimum": 1, "maximum": 10**6, "affects": "answers"})
    """Longest completion, in tokens; the log says how many were cut."""
    speculation: int = field(
        default=16, metadata={"advanced": True, "minimum": 0, "maximum": 1024, "affects": "nothing"}
    )
    """Tokens drafted ahead by prompt look-up and checked in one pass; 0: none. Completions are the same."""
    best_metric: str = field(default="arg_f1", metadata={"choices": BEST_METRICS})
    """Decides the best checkpoint: a metric of completions, generated during training, or `loss`, which decides ties."""
    patience: int = field(default=0, metadata={"minimum": 0, "maximum": 10**6})
    """Evaluations in a row without an improvement after which training stops; 0: never early."""
    bootstrap_samples: int = field(default=10_000, metadata={"advanced": True, "minimum": 1, "maximum": 10**6})
    """Bootstrap resamples over conversations for the 95 % intervals."""
    seed: int = field(default=0, metadata={"advanced": True, **SEED})
    """Seed of the bootstrap."""
    allow_bad_references: bool = field(default=False, metadata={"advanced": True})
    """Continue when a reference call cannot be read; it is listed and left out of the scores."""
    examples: int = field(default=2, metadata={"advanced": True, "minimum": 0, "maximum": 1000, "affects": "nothing"})
    """Example completions shown side by side at the end."""
    base_url: str | None = field(default=None, metadata={"advanced": True, "affects": "answers"})
    """Address of the endpoint for `engine=openai`, including `/v1`."""
    served_model: str | None = field(default=None, metadata={"advanced": True, "affects": "answers"})
    """Name of the model at the endpoint."""
    auth_variable: str = field(default="OPENAI_API_KEY", metadata={"advanced": True, "affects": "nothing"})
    """Environment variable that holds the endpoint's key; without it, requests carry none."""
    request: str | None = field(default=None, metadata={"advanced": True, "json": True, "affects": "answers"})
    """JSON object merged into each request; null removes a field: `{"max_tokens": null, "max_completion_tokens": 512}`.
    Without `tools`, a step is sent as marked text."""
    request_timeout: float = field(
        default=120.0, metadata={"advanced": True, "above": 0, "maximum": 86400, "affects": "nothing"}
    )
    """Seconds without data from the endpoint after which a request is repeated."""
    retries: int = field(default=5, metadata={"advanced": True, "minimum": 0, "maximum": 1000, "affects": "nothing"})
    """Further attempts of a request that failed or got no answer."""

    @property
    def generates_during_training(self) -> int:
        """Held-out conversations generated for at each evaluation during training."""
        if self.conversations_during or self.best_metric == "loss":
            return self.conversations_during
        return 16 if self.conversations < 0 else min(16, self.conversations)

    def rank(self, measured: Mapping[str, float]) -> list[float] | None:
        """Return what evaluations during training are ordered by, the larger the better; None where the loss is NaN.

        First whether `best_metric` has a value (0/0 has none), then the value, then minus the loss.
        """
        loss = measured["loss"]
        if math.isnan(loss):
            return None
        if self.best_metric == "loss":
            return [1.0, -loss, -loss]
        value = measured.get(self.best_metric)
        return [0.0, 0.0, -loss] if value is None else [1.0, value, -loss]

    def request_fields(self) -> dict[str, object]:
        """Return what `request` lays over each request."""
        return dict(json.loads(self.request or "{}"))
