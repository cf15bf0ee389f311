"""Compiles Triton kernels for processors that are not there.

Inside ``compiling_for(target)`` a launch compiles its kernel for the target, as the arguments would have it, and runs
nothing: the functions of ``memad_fast.kernels`` go through their whole host side on CPU tensors, whose contents stay
what they were. Needs a process in which TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from memad_fast.kernels import architecture

# What the launchers may use: shared memory of a block as the vendors document it.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), architecture.Architecture("sm_80", 163 << 10, 108)),
    "sm_90": (GPUTarget("cuda", 90, 32), architecture.Architecture("sm_90", 227 << 10, 132)),
    "sm_100": (GPUTarget("cuda", 100, 32), architecture.Architecture("sm_100", 227 << 10, 148)),
    "sm_120": (GPUTarget("cuda", 120, 32), architecture.Architecture("sm_120", 99 << 10, 84)),
    "gfx90a": (GPUTarget("hip", "gfx90a", 64), architecture.Architecture("gfx90a", 64 << 10, 104)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), architecture.Architecture("gfx942", 64 << 10, 304)),
}


# Matrix instructions, as PTX and AMD's assembly write them.
_MATRIX_INSTRUCTION = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)[\w.:]*")


@dataclass(frozen=True)
class Compiled:
    """One kernel as it was compiled for a launch."""

    name: str
    key: str
    """The same for two launches that run one binary."""
    shared_memory: int
    """Bytes of shared memory that a block takes."""
    stack: int
    """Bytes of local memory that a thread takes, for spilled registers above all."""
    assembly: str
    """PTX, or AMD's assembly."""

    @property
    def matrix_instructions(self) -> set[str]:
        """The kinds of tensor-core (matrix-core) instructions in it."""
        return set(_MATRIX_INSTRUCTION.findall(self.assembly))


class _Driver:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, target: GPUTarget, device: int) -> None:
        self.target = target
        self.device = device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return mock.MagicMock()

    def is_active(self) -> bool:
        return True


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[list[Compiled]]:
    """Compile every launch for ``TARGETS[name]``; the list fills with what was compiled."""
    target, processor = TARGETS[name]
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_launch(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        text, stack = _of_nvidia(kernel.asm) if target.backend == "cuda" else _of_amd(kernel.asm)
        compiled.append(Compiled(kernel.metadata.name, kernel.hash, kernel.metadata.shared, stack, text))
        return kernel

    triton.runtime.driver.set_active(_Driver(target, list(TARGETS).index(name)))
    with (
        mock.patch.object(JITFunction, "run", compile_launch),
        mock.patch.object(architecture, "_INTERPRETER", processor),  # what CPU tensors lie on
    ):
        yield compiled


def _of_nvidia(asm: Any) -> tuple[str, int]:
    """PTX, and the stack that the binary asks for."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return asm["ptx"], sum(int(size) for size in re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage))


def _of_amd(asm: Any) -> tuple[str, int]:
    """The assembly, and the scratch memory that it asks for."""
    sizes = re.findall(r"\.private_segment_fixed_size: *(\d+)", asm["amdgcn"])
    return asm["amdgcn"], sum(map(int, sizes))
