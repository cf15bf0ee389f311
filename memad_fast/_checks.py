"""Checks of tensors that the ops share; those of plain arguments are in ``_arguments``.

Each names the argument, what was expected and what came.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(name: str, value: object) -> None:
    """``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def check_float(name: str, value: object) -> None:
    """``value`` is a tensor of a dtype that the ops compute in."""
    check_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {value.dtype}")


def check_rank(name: str, value: Tensor, rank: int, layout: str) -> None:
    """``value`` has ``rank`` dimensions; ``layout`` says which, as in "[N, D]"."""
    if value.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimensions {layout}, got shape {tuple(value.shape)}")


def check_like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """``value`` has the dtype and the device of ``other``."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: expected {other.dtype} like {other_name}, got {value.dtype}")
    if value.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} like {other_name}, got {value.device}")


def check_size(name: str, value: Tensor, dim: int, expected: int, meaning: str) -> None:
    """Dimension ``dim`` of ``value`` is ``expected``; ``meaning`` says why, as in "like query"."""
    if value.shape[dim] != expected:
        raise ValueError(f"{name}: expected {expected} {meaning} in dimension {dim}, got shape {tuple(value.shape)}")
