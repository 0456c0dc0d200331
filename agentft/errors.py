"""Define every error that agentft raises on purpose.

A message names the place, what was found, what was expected and what to do; the entry points print it as one line and keep the
traceback for the log. Anything else that escapes is a defect of agentft.
"""


class AgentftError(Exception):
    """Base of the errors that a user can act on."""


class ConfigError(AgentftError, ValueError):
    """A value in the composed configuration cannot be used."""


class DataError(AgentftError, ValueError):
    """A source of conversations cannot be read, or too little of it is usable."""


class FormatError(DataError):
    """A record that does not follow its format; `reason` is a stable snake_case code."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class ModelError(AgentftError, RuntimeError):
    """A model or tokenizer cannot be found, fetched or loaded as asked."""


class TrainingError(AgentftError, RuntimeError):
    """Training cannot continue (a loss that is not finite, for example)."""


class CheckpointError(AgentftError, RuntimeError):
    """A checkpoint is missing, damaged or belongs to another run."""


class EvaluationError(AgentftError, ValueError):
    """Predictions and references are not of one test set."""


class RunError(AgentftError, RuntimeError):
    """A run folder is missing, incomplete or in use."""


class RankError(AgentftError, RuntimeError):
    """A process of a job on several has died, hung, or could not meet the others."""
