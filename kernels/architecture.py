"""What a kernel's configuration depends on: the kind of processor and what one block may use of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton

Config = TypeVar("Config")


@dataclass(frozen=True)
class Architecture:
    """A processor as kernels see it."""

    name: str
    """"sm_90", "gfx942", ...; "interpreter"."""
    shared_memory: int
    """Bytes of shared memory (LDS) that one block may have."""
    multiprocessors: int
    """How many blocks run at once at least."""


_INTERPRETER = Architecture("interpreter", 1 << 30, 2)


@functools.cache
def _of_device(index: int) -> Architecture:
    # What Triton itself asks before a launch: on NVIDIA the shared memory that a kernel may opt in to.
    device = triton.runtime.driver.active.utils.get_device_properties(index)
    kind = torch.cuda.get_device_properties(index)
    name = kind.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{kind.major}{kind.minor}"
    return Architecture(name, device["max_shared_mem"], device["multiprocessor_count"])


def architecture(tensor: torch.Tensor) -> Architecture:
    """The processor that ``tensor`` lies on."""
    return _of_device(tensor.get_device()) if tensor.is_cuda else _INTERPRETER


def fitting(configs: Mapping[str, Sequence[Config]], on: Architecture, shared_bytes: Callable[[Config], int]) -> Config:
    """The first configuration for this architecture (else of "any") whose shared memory fits a block.

    Args:
        configs: by architecture's name, the best first; "any" serves all that are not named.
        on: the processor.
        shared_bytes: how much shared memory a configuration needs.

    Raises:
        RuntimeError: none fits; the table should end in one that always does.
    """
    candidates = configs.get(on.name, configs["any"])
    for config in candidates:
        if shared_bytes(config) <= on.shared_memory:
            return config
    least = min(shared_bytes(config) for config in candidates)
    raise RuntimeError(f"no configuration fits {on.name}: the smallest needs {least} bytes of {on.shared_memory}")
