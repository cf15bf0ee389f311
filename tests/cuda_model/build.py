"""Builds CUDA sources with the model of CUDA into libraries for ctypes, once per session.

A test's shim is C++ that includes a .cu file of csrc/cuda and puts its launchers into functions of C.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

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

    def call(self, name: str, *arguments: object) -> None:
        """Call a function of the shim that returns a ``cudaError_t``; integers go as int64, tensors as pointers."""
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
