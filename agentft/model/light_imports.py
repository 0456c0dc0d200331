"""transformers and peft without what training a language model never touches: half of the time to the first step is imports.

transformers' models import scipy for losses of object detection, and decorators of its continuous batching and of its 8-bit
layers load torch's compiler; peft imports bitsandbytes, and with it the compiler, wherever it is installed. All of these
are put off while the two are first imported; whoever wants them later gets them.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_MARKS = ("disable", "assume_constant_result", "allow_in_graph")
_MODE = "torch._dynamo._trace_wrapped_higher_order_op"
"""Holds the one thing of the compiler's that transformers' masks are built with."""

_TOLD: list[tuple[str, Any]] = []
"""What torch's compiler was to be told about functions, by the name of the mark."""


def import_model_libraries() -> None:
    """Import transformers' modelling core and peft, once, lightly."""
    if "transformers.modeling_utils" in sys.modules:
        return
    with _without_scipy(), compiler_put_off():
        importlib.import_module("transformers.modeling_utils")
        with without_hub_kernels(), _without("bitsandbytes"):
            importlib.import_module("peft")
    _ask_for_what_is_loaded()


@contextmanager
def without_hub_kernels() -> Iterator[None]:
    """Import bitsandbytes without code that it would fetch from a hub."""
    # With the package `kernels` installed, importing bitsandbytes on a CPU with bf16 downloads code and runs it.
    if "bitsandbytes" in sys.modules:
        yield
        return
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it would advise to install that package
    try:
        with _without("kernels"):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Let the package look as if it were not installed, unless it is loaded already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


def _ask_for_what_is_loaded() -> None:
    """Let peft's questions for bitsandbytes be answered with yes once it is loaded, as it is where a model is quantised."""
    questions: Any = importlib.import_module("peft.import_utils")
    for name in ("is_bnb_available", "is_bnb_4bit_available"):
        stock = getattr(questions, name)
        stock.cache_clear()
        answer = _if_loaded(stock)
        for module in [each for path, each in sys.modules.items() if path.startswith("peft.")]:
            if vars(module).get(name) is stock:
                setattr(module, name, answer)


def _if_loaded(stock: Callable[[], bool]) -> Callable[[], bool]:
    return lambda: sys.modules.get("bitsandbytes") is not None and stock()


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
def compiler_put_off() -> Iterator[None]:
    """Keep torch's compiler from being loaded by those who only want to be known to it, or left alone by it.

    Decorators of transformers do so when it is imported, and many of torch's own operations when a model is first laid out
    without memory. `tell_the_compiler` makes up for it. Whoever uses the compiler here gets it.
    """
    import torch.compiler

    if "torch._dynamo" in sys.modules:
        yield
        return
    stock = {name: getattr(torch.compiler, name) for name in _MARKS}
    stand_in, mode = _PutOff("torch._dynamo"), ModuleType(_MODE)
    mode.TransformGetItemToIndex = _index_mode  # type: ignore[attr-defined]
    vars(torch.compiler).update({name: getattr(stand_in, name) for name in _MARKS})
    vars(torch)["_dynamo"] = sys.modules["torch._dynamo"] = stand_in
    sys.modules[_MODE] = mode
    try:
        yield
    finally:
        vars(torch.compiler).update(stock)
        stand_in.leave()
        if sys.modules.get(_MODE) is mode:
            del sys.modules[_MODE]


def tell_the_compiler() -> None:
    """Tell torch's compiler what was kept from it; to be called before anything is compiled."""
    dynamo: Any = importlib.import_module("torch._dynamo")
    while _TOLD:
        name, function = _TOLD.pop()
        if name == "disable":  # asked again by torch at the next call
            vars(function).pop("__dynamo_disable", None)
        else:
            getattr(dynamo, name)(function)
    masks: Any = importlib.import_module("transformers.masking_utils")
    masks.TransformGetItemToIndex = importlib.import_module(_MODE).TransformGetItemToIndex


class _PutOff(ModuleType):
    """Stands for `torch._dynamo`: notes what it is told about functions, and gives way to it when asked for anything else."""

    def disable(self, fn: Any = None, *_: Any, **__: Any) -> Any:
        return self.disable if fn is None else self._note("disable", fn)

    def assume_constant_result(self, fn: Any) -> Any:
        return self._note("assume_constant_result", fn)

    def allow_in_graph(self, fn: Any) -> Any:
        return self._note("allow_in_graph", fn)

    def _note(self, name: str, fn: Any) -> Any:
        _TOLD.append((name, fn))
        return fn

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # who looks through all modules asks for `__file__`
            raise AttributeError(name)
        self.leave()
        sys.modules.pop(_MODE, None)
        return getattr(importlib.import_module("torch._dynamo"), name)

    def leave(self) -> None:
        """Make room for the module itself."""
        torch: Any = sys.modules["torch"]
        if sys.modules.get("torch._dynamo") is self:
            del sys.modules["torch._dynamo"]
        if vars(torch).get("_dynamo") is self:
            del torch._dynamo


def _index_mode() -> Any:
    """torch's way to index by a tensor while a mask is built, taken from the compiler's modules when a mask needs it."""
    return importlib.import_module(_MODE).TransformGetItemToIndex()
