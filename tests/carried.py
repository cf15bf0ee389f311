"""Calls on another device that take and give tensors of this one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def on(device: torch.device | str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` run on ``device``: its tensors are carried there and the results back, and gradients likewise."""

    def to(place: torch.device | str) -> Callable[[Any], Any]:
        return lambda value: value.to(place) if isinstance(value, Tensor) else value

    def call(*arguments: Any, **options: Any) -> Any:
        arguments, options = tree_map(to(device), (arguments, options))
        return tree_map(to("cpu"), function(*arguments, **options))

    return call
