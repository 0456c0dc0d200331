"""Keep answers on the disk as they come, so that an evaluation that is killed goes on where it stopped.

One line says who answers; every further line is one answer. Lines are handed to the system whole and at once, so SIGKILL
costs at most the answers under way. An answer of somebody else (other weights, engine, settings) is never taken over.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from agentft.errors import EvaluationError
from agentft.evaluation.generate import Completion
from agentft.evaluation.steps import Step
from agentft.secrets import redact_text

log = logging.getLogger(__name__)

OnCompletion = Callable[[Completion], None]


class Generator(Protocol):
    """Whoever can answer steps: a model here, or one behind an endpoint."""

    def answer(self, steps: Sequence[Step], on_answer: OnCompletion | None = None) -> list[Completion]:
        """Answer all steps and return them in the order given; `on_answer` hears of each as it is finished."""


class PredictionCache:
    """An answerer that remembers: what stands in the file is not asked again. A context manager around the work."""

    def __init__(
        self, path: Path, answerer: Generator, identity: Mapping[str, Any], *, others: Sequence[Path] = ()
    ) -> None:
        """`identity` is everything beside the context that decides an answer; `others` are files of the same candidate's
        answers, which are read and left as they are."""
        self.path = path
        self._others = others
        self._answerer = answerer
        self._header = {"identity": json.loads(json.dumps(identity))}
        self._known: dict[tuple[str, int, str], dict[str, Any]] = {}
        self._handle: int | None = None

    def __enter__(self) -> Self:
        content = self.path.read_bytes() if self.path.exists() else b""
        kept = self._read(content)
        for other in self._others:
            self._read(other.read_bytes())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            os.ftruncate(self._handle, kept)
            if not kept:
                self._write(self._header)
        except OSError as error:
            raise EvaluationError(f"{self.path}: cannot be written: {error.strerror}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def answer(self, steps: Sequence[Step], on_answer: OnCompletion | None = None) -> list[Completion]:
        """Answer the steps that the file does not know, and return all in the order given."""
        answers: dict[int, Completion] = {}
        for order, step in enumerate(steps):
            row = self._known.get(_key(step))
            if row is not None:
                answers[order] = Completion(step, row["text"], row["tokens"], row["finish"])
                if on_answer is not None:
                    on_answer(answers[order])
        if answers:
            log.info("%d of %d answers are there already (%s)", len(answers), len(steps), self.path)
        missing = [order for order in range(len(steps)) if order not in answers]

        def keep(answer: Completion) -> None:
            self._write(
                {
                    "conversation_id": answer.step.conversation.id,
                    "step": answer.step.index,
                    "context_hash": answer.step.context_hash,
                    "text": answer.text,
                    "tokens": answer.tokens,
                    "finish": answer.finish,
                }
            )
            if on_answer is not None:
                on_answer(answer)

        fresh = self._answerer.answer([steps[order] for order in missing], keep)
        answers.update(zip(missing, fresh, strict=True))
        return [answers[order] for order in range(len(steps))]

    def _read(self, content: bytes) -> int:
        """Take over what is whole and ours; return the length of that part of the file."""
        kept = 0
        for number, line in enumerate(content.splitlines(keepends=True)):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if not isinstance(row, dict):
                break  # cut short in writing
            if number == 0 and row != self._header:
                log.warning("%s: answers of another model or other settings are left out", self.path)
                return 0
            if number:
                self._known[row["conversation_id"], row["step"], row["context_hash"]] = row
            kept += len(line)
        return kept

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self._handle is not None, "used outside of `with`"
        # ASCII, so that a lone surrogate of a served model survives and no other letter counts as the end of a line.
        content = (redact_text(json.dumps(row)) + "\n").encode()
        while content:
            content = content[os.write(self._handle, content) :]


def _key(step: Step) -> tuple[str, int, str]:
    return (step.conversation.id, step.index, step.context_hash)
