"""Shared fixtures: every instruction set, poisoned empty memory, deterministic seeds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Before triton is imported: its kernels then run in its interpreter, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Before a console is made: what is printed has the width that a test asks for, not that of the terminal it runs in.
os.environ.pop("COLUMNS", None)

import memad_fast

# torch.compile would take graphs that another version of these ops left in the cache on disk.
torch.compiler.config.force_disable_caches = True


def _isas() -> list[str]:
    try:
        from memad_fast import native
    except ImportError:
        return []
    return native.isas()


@pytest.fixture(params=_isas() or [pytest.param("none", marks=pytest.mark.skip(reason="no compiled library"))])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test at every instruction set this machine has."""
    from memad_fast import native

    native.set_isa(request.param)
    yield request.param
    native.set_isa("auto")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tensors of a few hundred values: a second thread costs more than the work, most of all on a busy CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _poisoned_empties() -> Iterator[None]:
    """Deterministic mode fills fresh tensors with NaN, so that an element no kernel wrote shows."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    memad_fast.use_backend(None)
