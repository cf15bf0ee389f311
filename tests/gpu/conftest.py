"""Marks every test of this folder, and chooses its backend; see ``where``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# cuBLAS asks for it where torch is to be deterministic, as it is in all tests.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from where import DRY_RUN, HAS_GPU

import memad_fast


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not (HAS_GPU or DRY_RUN):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device (MEMAD_FAST_GPU_DRY_RUN=cpu tries it)"))


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend by which ``each_backend`` runs the test."""
    with memad_fast.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _torch_may_sum_in_any_order(_poisoned_empties: None) -> None:
    """Fresh tensors are poisoned as in all tests, but torch's own CUDA kernels that have no fixed order may run."""
    torch.use_deterministic_algorithms(True, warn_only=True)
