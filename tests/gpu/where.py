"""Where the tests of this folder run, and by which backends.

On a CUDA device: by "triton" and "cuda", each where it has a kernel. Without one they skip themselves; with
MEMAD_FAST_GPU_DRY_RUN=cpu they run on CPU tensors and the CPU's kernels ("triton": in Triton's interpreter, slowly), on
small shapes, so that a mistake in a test does not wait for a GPU. A dry run says nothing about a GPU.
"""

from __future__ import annotations

import importlib
import os
from typing import TypeVar

import pytest
import torch

from memad_fast import _triton

importlib.import_module("memad_fast.ops")  # defines the ops: only then it is known which have kernels

Size = TypeVar("Size")

DRY_RUN = os.environ.get("MEMAD_FAST_GPU_DRY_RUN", "")
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# For graphs, streams, the device's memory: nothing of it can be tried without one.
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")


def sized(full: Size, dry: Size) -> Size:
    """A size for the GPU, and one for a dry run."""
    return full if HAS_GPU else dry


def has_kernels(backend: str, *ops: str) -> bool:
    """Whether a backend has a kernel for each of these ops."""
    if backend == "triton":
        return all(_triton.has_triton_kernel(op) for op in ops)
    return backend == "cpu" or all(_triton.has_compiled_kernel(op) for op in ops)


def each_backend(*ops: str) -> pytest.MarkDecorator:
    """Runs a test by every backend that serves ``ops`` here."""
    backends = ("triton", "cuda") if HAS_GPU else (DRY_RUN or "triton",)
    return pytest.mark.parametrize(
        "backend",
        [
            pytest.param(
                backend,
                marks=[]
                if has_kernels(backend, *ops)
                else pytest.mark.skip(reason=f"the {backend} backend has no kernel for one of {', '.join(ops)}"),
            )
            for backend in backends
        ],
        indirect=True,
    )
