"""transformers and peft without what training a language model never touches: half of the time to the first step is imports.

transformers' models import scipy for losses of object detection, and one decorator of its continuous batching loads
torch's compiler. Both are put off while its core is first imported; whoever wants them later gets them.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def import_model_libraries() -> None:
    """Import transformers' modelling core and peft, once, lightly."""
    if "transformers.modeling_utils" in sys.modules:
        return
    with _without_scipy(), _undecorated_for_the_compiler(), without_hub_kernels():
        for name in ("transformers.modeling_utils", "peft"):
            importlib.import_module(name)


@contextmanager
def without_hub_kernels() -> Iterator[None]:
    """Import bitsandbytes, which peft does too where it is installed, without code that it would fetch from a hub."""
    # With the package `kernels` installed, importing bitsandbytes on a CPU with bf16 downloads code and runs it.
    if "bitsandbytes" in sys.modules or "kernels" in sys.modules:
        yield
        return
    sys.modules["kernels"] = None  # type: ignore[assignment]
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it would advise to install that package
    try:
        yield
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]


@contextmanager
def _without_scipy() -> Iterator[None]:
    """Let transformers' question for scipy be answered with no."""
    import transformers.utils as questions

    stock = questions.is_scipy_available
    questions.is_scipy_available = lambda: False
    try:
        yield
    finally:
        questions.is_scipy_available = stock


@contextmanager
def _undecorated_for_the_compiler() -> Iterator[None]:
    """Make `torch.compiler.disable` return functions as they are: nothing of them is compiled by us, and it loads dynamo."""
    import torch.compiler

    stock = torch.compiler.disable

    def leave(fn: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
        return fn if fn is not None else leave

    torch.compiler.disable = leave
    try:
        yield
    finally:
        torch.compiler.disable = stock
