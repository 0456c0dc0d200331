"""The row-wise parts of a transformer as compiled code for bf16 on a CPU: `kernels.c`, built once a machine in about a second.

torch runs such parts one elementary operation at a time, with copies in float between them; in bf16 on a CPU they take as
long as the matrix products. A C compiler is used where there is one; without it everything runs in torch, slower and with
other last bits, which is why a run's identity names which of the two computed it.

Axes: M rows (batch x positions), B batch, T positions, G key-value heads, N query heads in each, D head width, V vocabulary.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from ctypes import c_float, c_int, c_long, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch

from agentft.model.cache import build_once, cache_root

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")

_FLAGS = ["-std=c11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC"]
_MACHINES: tuple[list[str], ...] = (["-march=native", "-mprefer-vector-width=512"], ["-march=native"], [])
"""Tried in turn: not every compiler knows every flag."""

FEWEST_TO_SHARE = 32768
"""Elements below which one thread does the work: torch's own measure for elementwise operations."""

_PLAIN = {"p": c_void_p, "l": c_long, "f": c_float, "i": c_int, "u": c_uint32}
_SIGNATURES = {
    "rms_norm": "pppp llf",
    "rms_norm_back": "ppppp ll",
    "gated_silu": "ppp ll",
    "gated_silu_back": "ppppp ll",
    "rotate": "pppp l pp lllll ff",
    "causal_softmax": "p llll",
    "softmax_back": "pp ll",
    "accumulate": "p l p ll",
    "cross_entropy": "pppp ll",
    "dropout": "pp ll uuu",
}
"""Arguments of the C functions: pointers, longs, floats, unsigned; the number of threads comes last in each."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The compiled functions. All tensors are bf16 and contiguous unless said otherwise."""

    library: ctypes.CDLL
    parallel: bool
    """Built with OpenMP, by the runtime that torch has loaded; without it they use one thread."""

    def _call(self, name: str, elements: int, *arguments: object) -> None:
        """Run a function over so many elements; for few of them, starting a second thread costs more than it saves."""
        threads = torch.get_num_threads() if self.parallel and elements >= FEWEST_TO_SHARE else 1
        getattr(self.library, name)(*arguments, threads)

    def rms_norm(self, x_MI: torch.Tensor, weight_I: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the normalised rows and each row's factor, fp32."""
        y, rate = torch.empty_like(x_MI), torch.empty(x_MI.shape[:-1], dtype=torch.float32)
        self._call("rms_norm", x_MI.numel(), *_at(x_MI, weight_I, y, rate), rate.numel(), x_MI.shape[-1], epsilon)
        return y, rate

    def rms_norm_back(
        self, grad_MI: torch.Tensor, x_MI: torch.Tensor, weight_I: torch.Tensor, rate_M: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty_like(x_MI)
        self._call(
            "rms_norm_back", x_MI.numel(), *_at(grad_MI, x_MI, weight_I, rate_M, out), rate_M.numel(), x_MI.shape[-1]
        )
        return out

    def gated_silu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(gate)
        self._call("gated_silu", gate.numel(), *_at(gate, up, out), *_rows(gate))
        return out

    def gated_silu_back(
        self, grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of gate and up."""
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        self._call("gated_silu_back", gate.numel(), *_at(grad, gate, up, grad_gate, grad_up), *_rows(gate))
        return grad_gate, grad_up

    def rotate_in(
        self, x_BTGND: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Turn by the positions' angles, scale, and return as `[B, G, T, N, D]`."""
        batch, length, groups, heads, width = x_BTGND.shape
        out = x_BTGND.new_empty(batch, groups, length, heads, width)
        tokens_first, groups_first = _strides(x_BTGND, 0, 1, 2), _strides(out, 0, 2, 1)
        angles = cos_BTD.data_ptr(), sin_BTD.data_ptr(), cos_BTD[0].numel() * (len(cos_BTD) > 1)
        sizes = batch, length, groups, heads, width, scale, 1.0
        self._call(
            "rotate", x_BTGND.numel(), x_BTGND.data_ptr(), tokens_first, *angles, out.data_ptr(), groups_first, *sizes
        )
        return out

    def rotate_out(
        self, x_BGTND: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Turn back, scale, and return as `[B, T, G, N, D]`: the transpose of `rotate_in`."""
        batch, groups, length, heads, width = x_BGTND.shape
        out = x_BGTND.new_empty(batch, length, groups, heads, width)
        groups_first, tokens_first = _strides(x_BGTND, 0, 2, 1), _strides(out, 0, 1, 2)
        angles = cos_BTD.data_ptr(), sin_BTD.data_ptr(), cos_BTD[0].numel() * (len(cos_BTD) > 1)
        sizes = batch, length, groups, heads, width, scale, -1.0
        self._call(
            "rotate", x_BGTND.numel(), x_BGTND.data_ptr(), groups_first, *angles, out.data_ptr(), tokens_first, *sizes
        )
        return out

    def causal_softmax_(self, scores_GQK: torch.Tensor, heads: int) -> torch.Tensor:
        """Softmax in place; rows are queries with their `heads` side by side, the last query sees every key."""
        groups, rows, keys = scores_GQK.shape
        self._call("causal_softmax", scores_GQK.numel(), scores_GQK.data_ptr(), groups, rows // heads, heads, keys)
        return scores_GQK

    def softmax_back_(self, grad: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Replace the gradient of softmax's weights by that of its scores."""
        self._call("softmax_back", grad.numel(), *_at(grad, weights), *_rows(grad))
        return grad

    def accumulate_(self, sum_GTD: torch.Tensor, first: int, x_GKD: torch.Tensor) -> None:
        """Add to the fp32 sum, from position `first` on."""
        groups, length, width = sum_GTD.shape
        at = sum_GTD.data_ptr() + first * width * 4
        self._call("accumulate", x_GKD.numel(), at, length * width, x_GKD.data_ptr(), groups, x_GKD.shape[1] * width)

    def cross_entropy_(
        self, logits_NV: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor | None
    ) -> torch.Tensor:
        """Return each row's weighted loss, fp32, and leave its gradient in place of the logits."""
        losses = torch.empty(len(targets_N), dtype=torch.float32)
        weights = None if weights_N is None else weights_N.data_ptr()
        self._call(
            "cross_entropy",
            logits_NV.numel(),
            logits_NV.data_ptr(),
            targets_N.data_ptr(),
            weights,
            losses.data_ptr(),
            *_rows(logits_NV),
        )
        return losses

    def dropout(
        self, x: torch.Tensor, probability: float, seed: tuple[int, int], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return `x` with about `probability` of its elements 0, always the same ones for a seed; not scaled."""
        out = torch.empty_like(x) if out is None else out
        self._call("dropout", x.numel(), *_at(x, out), *_rows(x), *seed, round(probability * 2**32))
        return out


def _at(*tensors: torch.Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _rows(x: torch.Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def _strides(x: torch.Tensor, *axes: int) -> ctypes.Array[c_long]:
    strides = x.stride()
    return (c_long * len(axes))(*(strides[axis] for axis in axes))


def load_kernels(cache_dir: str | None) -> Kernels | None:
    """Build the functions if this machine has not yet, and load them; None, with the reason logged, where that fails."""
    found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        log.info("no C compiler: row-wise parts run in torch")
        return None
    try:
        compiler = shlex.split(found)  # CC may hold a wrapper or flags too: `ccache gcc`
        folder = cache_root(cache_dir) / "kernels" / _key(compiler)
        return _load(build_once(folder, lambda work: _build(compiler, work), is_whole=_is_built))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        log.warning("kernels.c cannot be built with %s (%s): row-wise parts run in torch", found, error)
        return None


def _key(compiler: list[str]) -> str:
    """Digest of what decides the machine code: source, flags, compiler, and the instructions of this CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        cpu = platform.processor()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = (SOURCE.read_text(), str(_FLAGS), str(_MACHINES), *compiler, version, cpu, platform.platform())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _build(compiler: list[str], folder: Path) -> None:
    """Compile and link into `folder`: with OpenMP under `parallel.so`, and without it under `plain.so`.

    The link names no OpenMP library, so that the calls reach the one that torch has loaded: two of them in one process
    would each start their own threads.
    """
    for name, threads in (("parallel", "-fopenmp"), ("plain", "-fopenmp-simd")):
        for machine in _MACHINES:
            done = _run([*compiler, *_FLAGS, threads, *machine, "-c", str(SOURCE), "-o", str(folder / f"{name}.o")])
            if done.returncode == 0:
                break
        if done.returncode == 0:
            done = _run([*compiler, "-shared", "-o", str(folder / f"{name}.so"), str(folder / f"{name}.o"), "-lm"])
        if done.returncode and name == "plain":
            raise OSError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the compiler failed")


def _is_built(folder: Path) -> bool:
    return (folder / "plain.so").is_file()


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def _load(folder: Path) -> Kernels:
    try:
        library, parallel = ctypes.CDLL(str(folder / "parallel.so"), mode=os.RTLD_NOW), True
    except OSError:  # torch's OpenMP is another one than this compiler's
        library, parallel = ctypes.CDLL(str(folder / "plain.so"), mode=os.RTLD_NOW), False
    for name, signature in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = [*(_PLAIN[letter] for letter in signature.replace(" ", "")), c_int]
        function.restype = None
    return Kernels(library, parallel)
