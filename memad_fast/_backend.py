"""Which implementation serves a call.

==========  =====================================================  ==============================
backend     what it is                                             where it works
==========  =====================================================  ==============================
reference   plain torch, float64-capable: the definition of right  every device
cpu         C++ kernels (``_C_cpu``)                               CPU tensors
triton      Triton kernels (``memad_fast.kernels``)                CUDA and ROCm tensors
cuda        CUDA C++ kernels (``_C_cuda``)                         CUDA tensors
==========  =====================================================  ==============================

The device of the input picks; on a GPU, ``cuda`` serves the ops that it has a kernel for and ``triton`` the others.
float64 inputs are served by ``reference`` on every device. ``use_backend`` or the environment variable
``MEMAD_FAST_BACKEND`` overrides the choice. Nothing falls back silently: asking for a backend that is not there is a
``BackendUnavailableError`` that says why and how to get it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from memad_fast._triton import (
    has_compiled_kernel,
    has_triton_kernel,
    interpreted,
    put_triton_first,
    serves_cpu_tensors,
)

BACKENDS = ("reference", "cpu", "triton", "cuda")

_BUILD_COMMAND = "pip install --no-build-isolation ."
_CUDA_BUILD_COMMAND = "MEMAD_FAST_BUILD_CUDA=1 " + _BUILD_COMMAND + " (needs nvcc)"


class BackendUnavailableError(RuntimeError):
    """A backend was asked for, by name or by the input's device, that cannot run here."""


@dataclass(frozen=True)
class Backend:
    """One row of ``backends()``: a backend, and if it cannot run here, why and what to do."""

    name: str
    available: bool
    reason: str = ""
    fix: str = ""


def _load(name: str) -> str:
    """Load a compiled library of this package; the reason if that fails, else an empty string."""
    path = Path(__file__).with_name(f"{name}.so")
    if not path.exists():
        return f"the compiled library {path.name} is not in {path.parent}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} could not be loaded: {error.__cause__ or error}"  # torch's own message leaves out why
    return ""


_cpu_problem = _load("_C_cpu")
_cuda_problem = _load("_C_cuda") if torch.version.cuda else "this torch is built without CUDA"
_forced: str | None = None


def _cpu_backend() -> Backend:
    return Backend("cpu", not _cpu_problem, _cpu_problem, _BUILD_COMMAND if _cpu_problem else "")


def _triton_backend() -> Backend:
    if importlib.util.find_spec("triton") is None:
        return Backend("triton", False, "the package triton is not installed", "pip install triton")
    if not (torch.cuda.is_available() or interpreted()):
        fix = "check the driver, or set TRITON_INTERPRET=1 before the start to try kernels on CPU tensors, slowly"
        return Backend("triton", False, "torch finds no CUDA or ROCm device", fix)
    return Backend("triton", True)


def _cuda_backend() -> Backend:
    if not torch.version.cuda:
        return Backend("cuda", False, _cuda_problem, "install a torch for CUDA, then " + _CUDA_BUILD_COMMAND)
    if _cuda_problem:
        return Backend("cuda", False, _cuda_problem, _CUDA_BUILD_COMMAND)
    if not torch.cuda.is_available():
        return Backend("cuda", False, "torch finds no CUDA device", "check the driver with nvidia-smi")
    return Backend("cuda", True)


def backends() -> dict[str, Backend]:
    """Every backend by name, with the reason and the fix for each that cannot run here.

    Example:
        >>> import memad_fast
        >>> memad_fast.backends()["reference"].available
        True
    """
    rows = [Backend("reference", True), _cpu_backend(), _triton_backend(), _cuda_backend()]
    return {row.name: row for row in rows}


def _require(name: str) -> None:
    if problem := _unavailable(backends()[name]):
        raise BackendUnavailableError(problem)


def _unavailable(backend: Backend) -> str:
    """Why a backend cannot run here, and what to do; "" if it can."""
    if backend.available:
        return ""
    return f"backend {backend.name!r} is not available: {backend.reason}. To fix it: {backend.fix}"


class use_backend:
    """Choose the backend for all following calls of this process, or for a ``with`` block.

    Args:
        name: "reference", "cpu", "triton" or "cuda"; ``None`` returns to the choice by device.

    Raises:
        ValueError: ``name`` is not a backend.
        BackendUnavailableError: the backend cannot run here; the message says why and what to do.

    Example:
        >>> import torch, memad_fast
        >>> with memad_fast.use_backend("reference"):
        ...     distances, indices = memad_fast.nearest_keys(torch.zeros(1, 3), torch.ones(2, 3))
        >>> indices
        tensor([[0]])
    """

    def __init__(self, name: str | None) -> None:
        if name is not None:
            if name not in BACKENDS:
                raise ValueError(f"name: expected one of {', '.join(BACKENDS)} or None, got {name!r}")
            _require(name)
        self._previous = _forced
        _force(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        _force(self._previous)


def _force(name: str | None) -> None:
    global _forced
    _forced = name
    put_triton_first(name == "triton")


if os.environ.get("MEMAD_FAST_BACKEND"):
    try:
        use_backend(os.environ["MEMAD_FAST_BACKEND"])
    except ValueError as error:
        raise ValueError(f"MEMAD_FAST_BACKEND: {error}") from None


def serves_reference(op: str, tensor: torch.Tensor) -> bool:
    """True if the reference serves this call of ``op``, False if the compiled op does.

    Raises:
        BackendUnavailableError: the backend that the device or ``use_backend`` picks cannot run ``op`` on ``tensor``.
        TypeError: a compiled backend was forced and ``tensor`` is float64.
    """
    if _forced is None and tensor.is_cpu and not _cpu_problem:
        return tensor.dtype == torch.float64
    if _forced == "reference" or (_forced is None and tensor.dtype == torch.float64):
        return True
    device = tensor.device.type
    if tensor.dtype == torch.float64:
        raise TypeError(
            f"backend {_forced!r} computes in float32, float16 and bfloat16, got float64; "
            'use_backend(None) or use_backend("reference") serves float64 by the reference'
        )
    if device == "meta":
        return False
    if problem := _problem(op, device, _forced):
        raise BackendUnavailableError(
            f'{op}: {problem}; memad_fast.use_backend("reference") runs plain torch on every device'
        )
    return False


def served_by_cpu(tensor: torch.Tensor) -> bool:
    """True if the C++ kernels serve this call, for ops that all other backends compose of others."""
    return tensor.is_cpu and tensor.dtype != torch.float64 and not _cpu_problem and _forced in (None, "cpu")


@functools.cache
def _problem(op: str, device: str, forced: str | None) -> str:
    """Why the backend that is asked for (if none is: every compiled one) cannot run ``op`` on ``device``, or ""."""
    backends = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(device, ())
    if device == "cpu" and forced == "triton" and serves_cpu_tensors():
        backends = ("triton",)
    if forced is not None:
        if forced not in backends:
            return f"no compiled backend serves device {device!r} here (asked for: {forced})"
        backends = (forced,)
    problems = [_problem_of(backend, op) for backend in backends]
    if "" in problems:
        return ""
    return "; ".join(problems) or f"no compiled backend serves device {device!r} here (asked for: by device)"


def _problem_of(backend: str, op: str) -> str:
    if backend == "cpu":
        return _unavailable(_cpu_backend())
    if backend == "cuda":
        return _unavailable(_cuda_backend()) or (
            "" if has_compiled_kernel(op) else "the cuda backend has no kernel for it"
        )
    return _unavailable(_triton_backend()) if has_triton_kernel(op) else "the triton backend has no kernel for it"
