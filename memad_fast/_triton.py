"""Makes the functions of ``memad_fast.kernels`` kernels of the ops, without importing triton before the first call.

Where ``_C_cuda`` has no kernel for an op, Triton's is the one for CUDA tensors. While the triton backend is asked for
by name it is the one for every op that it has; in Triton's interpreter (TRITON_INTERPRET=1) that goes for CPU tensors.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The folder kernels/ of the repository; by name, since type checkers do not know where it is installed.
kernels = importlib.import_module("memad_fast.kernels")
interpreted: Callable[[], bool] = kernels.interpreted

# Whether there may be a GPU. The driver, which takes its time, is asked only where the interpreter would stand in.
ON_GPU = torch.cuda.is_available() if interpreted() else bool(torch.version.cuda or torch.version.hip)
_defaults = torch.library.Library("memad_fast", "IMPL")
# Ops that compiled C++ serves for the device that Triton would serve, and the registration that puts Triton first.
_compiled: set[str] = set()
_override: torch.library.Library | None = None


def serve_by_triton(op: str) -> None:
    """Called once for every op that is defined: Triton serves it for CUDA tensors if no C++ does."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"memad_fast::{op}", _dispatch_key()):
        _compiled.add(op)
        if _override is not None and has_triton_kernel(op):
            _register(_override, op)
    elif has_triton_kernel(op) and (ON_GPU or interpreted()):
        _register(_defaults, op)


def serves_cpu_tensors() -> bool:
    """Whether CPU tensors are what Triton serves here."""
    return _dispatch_key() == "CPU"


def has_triton_kernel(op: str) -> bool:
    """Whether there is a Triton kernel for ``op``."""
    return op in kernels.FILES


def has_compiled_kernel(op: str) -> bool:
    """Whether compiled C++ has a kernel for ``op`` on the device that Triton would serve."""
    return op in _compiled


def put_triton_first(first: bool) -> None:
    """Let Triton serve, or no longer serve, the ops that compiled C++ has kernels for as well."""
    global _override
    if first and _override is None:
        _override = torch.library.Library("memad_fast", "IMPL")
        for op in filter(has_triton_kernel, _compiled):
            _register(_override, op)
    elif not first and _override is not None:
        _override._destroy()
        _override = None


def _dispatch_key() -> str:
    return "CPU" if interpreted() and not ON_GPU else "CUDA"


def _register(library: torch.library.Library, op: str) -> None:
    with warnings.catch_warnings():  # that a kernel is overridden, which is what is wanted
        warnings.simplefilter("ignore")
        library.impl(op, _kernel(op), _dispatch_key(), allow_override=True)


def _kernel(op: str) -> Callable[..., Any]:
    """What the dispatcher calls: the function of ``op``, with the tensors' device as the current one."""

    def kernel(*arguments: Any) -> Any:
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with on_device:
            return kernels.function(op)(*arguments)

    return kernel
