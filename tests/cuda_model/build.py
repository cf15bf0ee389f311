"""Builds CUDA sources with the model of CUDA into libraries for ctypes, once per session.

A test's shim is C++ that includes a .cu file of csrc/cuda and puts its launchers into functions of C.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = [
    "-std=c++20", "-O2", "-g1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing",
    # Every library has its own model: nothing of it is shared with the next one.
    "-fno-gnu-unique", "-Wl,-Bsymbolic",
    "-Wall", "-Wextra", "-Wno-unknown-pragmas",
]  # fmt: skip
ORDERS = {"forward": (0, 0), "backward": (1, 0), "random 1": (2, 1), "random 2": (2, 2)}

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class Model:
    """A library of kernels that run on the model."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.cuda_model_message.restype = ctypes.c_char_p

    def set_order(self, order: str) -> None:
        """Let threads and blocks run in one of ``ORDERS``."""
        kind, seed = ORDERS[order]
        self.library.cuda_model_set_order(kind, ctypes.c_uint64(seed))

    def set_device(self, capability: int, multiprocessors: int, shared_bytes: int) -> None:
        """Play a device: 90 for compute capability 9.0; bytes of shared memory that one block may have."""
        self.library.cuda_model_set_device(capability, multiprocessors, shared_bytes)

    def value(self, name: str, *arguments: object) -> int:
        """Call a function of the shim that returns an int64; integers go as int64, tensors and arrays as pointers."""
        function = getattr(self.library, name)
        function.restype = ctypes.c_int64
        return function(*[_as_c(argument) for argument in arguments])

    def call(self, name: str, *arguments: object) -> None:
        """Call a function of the shim that returns a ``cudaError_t`` as int."""
        error = getattr(self.library, name)(*[_as_c(argument) for argument in arguments])
        if error:
            raise RuntimeError(f"{name}: error {error}: {self.library.cuda_model_message().decode()}")


def _as_c(argument: object) -> object:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_void_p(argument.data_ptr() if hasattr(argument, "data_ptr") else argument.ctypes.data)


def at_end_of_page(values: Tensor) -> Tensor:
    """A copy whose last byte lies before a page that cannot be accessed: what reads or writes on is an error."""
    size = values.numel() * values.element_size()
    if size == 0:
        return values.clone()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    no_access = 0
    assert libc.mprotect(ctypes.c_void_p(start + pages), ctypes.c_size_t(mmap.PAGESIZE), no_access) == 0
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=pages - size).view(values.dtype)
    return copy.view(values.shape).copy_(values)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="cuda_model_")


@functools.cache
def model(shim: Path | str, architecture: int = 900) -> Model:
    """The library of a shim: a C++ file, or its text.

    Args:
        shim: what to compile.
        architecture: __CUDA_ARCH__, 900 for sm_90.
    """
    text = shim.read_text() if isinstance(shim, Path) else shim
    name = hashlib.sha256(f"{architecture} {text}".encode()).hexdigest()[:16]
    source, library = (Path(_folder().name) / f"{name}{suffix}" for suffix in (".cpp", ".so"))
    source.write_text(text)
    includes = [f"-I{HERE / 'include'}", f"-I{CSRC}", f"-I{HERE}"]
    command = ["g++", *FLAGS, f"-D__CUDA_ARCH__={architecture}", *includes, str(source), "-o", str(library), "-ldl"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-6000:]
    return Model(library)
