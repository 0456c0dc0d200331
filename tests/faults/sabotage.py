"""Ways to break a training from inside, chosen by name for one trial; applied in the child after the fork."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from agentft.training import checkpoint, engine, loop


def apply(names: list[str]) -> None:
    """Apply each of `name` or `name:argument`."""
    for each in names:
        name, _, argument = each.partition(":")
        BY_NAME[name](argument)


def _before_each_call_of_a_save(act: Callable[[int, bool], None]) -> None:
    """Call `act` with a running number before every sync, rename, file and deletion of a save.

    And with whether the caller has asked that errors be ignored.
    """
    count = 0

    def told(function: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal count
            act(count, bool(kwargs.get("ignore_errors")))
            count += 1
            return function(*args, **kwargs)

        return call

    checkpoint._sync = told(checkpoint._sync)
    checkpoint.write_stream = told(checkpoint.write_stream)
    checkpoint.shutil.rmtree = told(checkpoint.shutil.rmtree)
    Path.rename = told(Path.rename)  # type: ignore[method-assign]


def slow_save(seconds: str) -> None:
    """Sleep before every call of a save, so that a kill at a random moment meets one."""
    _before_each_call_of_a_save(lambda _, __: time.sleep(float(seconds)))


def die_in_save(number: str) -> None:
    """Be killed before the n-th call of the saves of this process."""

    def act(count: int, _: bool) -> None:
        if count == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    _before_each_call_of_a_save(act)


def fail_in_save(argument: str) -> None:
    """Let the n-th call of the saves fail with an error number of the system: `17:ENOSPC`."""
    import errno

    number, _, name = argument.partition(":")

    def act(count: int, ignored: bool) -> None:
        if count == int(number) and not ignored:
            raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    _before_each_call_of_a_save(act)


def _at_step(step: int, act: Callable[[], None]) -> None:
    """Call `act` when step `step`, counted from 1, is under way: between its micro-batches."""
    original = loop.step_batches

    def step_batches(job, number, per_device_batch_size):
        batches = original(job, number, per_device_batch_size)
        if number + 1 == step:
            to, calls = job.engine.loss, 0

            def loss(batch):
                nonlocal calls
                calls += 1
                if calls == len(batches):  # in the middle of the accumulation
                    act()
                return to(batch)

            job.engine.loss = loss
        return batches

    loop.step_batches = step_batches


def die_at_step(step: str) -> None:
    _at_step(int(step), lambda: os.kill(os.getpid(), signal.SIGKILL))


def signal_at_step(argument: str) -> None:
    """`7:SIGTERM`: this process is sent the signal in the middle of step 7, and the time is noted."""
    step, _, name = argument.partition(":")

    def act() -> None:
        Path(os.environ["FAULT_TIMES"]).write_text(repr(time.monotonic()))
        os.kill(os.getpid(), getattr(signal, name))

    _at_step(int(step), act)


def signal_in_save(name: str) -> None:
    """A second signal while the first one's checkpoint is written."""

    def act(_: int, __: bool) -> None:
        if Path(os.environ["FAULT_TIMES"]).exists():
            os.kill(os.getpid(), getattr(signal, name))

    _before_each_call_of_a_save(act)


def _in_evaluation(act: Callable[[], None]) -> None:
    from agentft.recipes.evaluation_run import Validator

    original = Validator._measure

    def measure(self):
        result = original(self)
        act()
        return result

    Validator._measure = measure


def die_in_evaluation(_: str) -> None:
    _in_evaluation(lambda: os.kill(os.getpid(), signal.SIGKILL))


def signal_in_evaluation(name: str) -> None:
    def act() -> None:
        torch.rand(3)
        os.kill(os.getpid(), getattr(signal, name))

    _in_evaluation(act)


def time_of_save(_: str) -> None:
    """Note when the newest checkpoint was in its place."""
    original = checkpoint.save_checkpoint

    def save(*args, **kwargs):
        path = original(*args, **kwargs)
        Path(os.environ["FAULT_TIMES"] + ".saved").write_text(repr(time.monotonic()))
        return path

    loop.save_checkpoint = save


def forget_optimizer(_: str) -> None:
    """Ablation: a resume that restores the weights and not AdamW's moments."""
    original = engine.SingleEngine.load

    def load(self, weights, optimizer, settings):
        original(self, weights, {}, settings)

    engine.SingleEngine.load = load


def forget_cursor(_: str) -> None:
    """Ablation: a resume that reads the data from its beginning."""
    start = []
    original = loop.step_batches

    def step_batches(job, number, per_device_batch_size):
        start.append(number)
        return original(job, number - start[0], per_device_batch_size)

    loop.step_batches = step_batches


def note_ids(file: str) -> None:
    """Write the conversations of every step to a file, before the step."""
    original = loop.step_batches

    def step_batches(job, number, per_device_batch_size):
        batches = original(job, number, per_device_batch_size)
        ids = [name for batch in batches for name in batch.ids]
        with Path(file).open("a") as out:
            out.write(repr((number, ids)) + "\n")
        return batches

    loop.step_batches = step_batches


def limit_file_size(size: str) -> None:
    """The system refuses to write any file beyond `size` bytes."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))


def clock_set_back(seconds: str) -> None:
    """The system's clock as Python sees it stands `seconds` earlier, and jumps about."""
    original, draw = time.time, random.Random(0)
    time.time = lambda: original() - float(seconds) + draw.uniform(-3600, 3600)
    time.time_ns = lambda: int(time.time() * 1e9)


def spoil_loss(step: str) -> None:
    """The loss of the last micro-batch of a step is NaN."""
    original = loop.step_batches

    def step_batches(job, number, per_device_batch_size):
        batches = original(job, number, per_device_batch_size)
        to, calls = getattr(job.engine, "whole_loss", job.engine.loss), 0
        job.engine.whole_loss = to

        def loss(batch):
            nonlocal calls
            calls += 1
            value = to(batch)
            return value * float("nan") if number + 1 == int(step) and calls == len(batches) else value

        job.engine.loss = loss
        return batches

    loop.step_batches = step_batches


BY_NAME: dict[str, Callable[[str], None]] = {
    function.__name__: function
    for function in (
        *(slow_save, die_in_save, fail_in_save, die_at_step, signal_at_step, signal_in_save, die_in_evaluation),
        *(
            signal_in_evaluation,
            time_of_save,
            forget_optimizer,
            forget_cursor,
            note_ids,
            limit_file_size,
            clock_set_back,
            spoil_loss,
        ),
    )
}
