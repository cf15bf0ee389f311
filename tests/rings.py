"""Ring memories and the write that defines all others, for the tests of fifo_write_ on every device."""

from __future__ import annotations

import torch
from torch import Tensor

State = tuple[Tensor, Tensor, Tensor]


def ring(slots: int = 5, dtype: torch.dtype = torch.float32, cursor: int = 3) -> State:
    return torch.randn(slots, 3).to(dtype), torch.randn(slots, 2).to(dtype), torch.tensor(cursor)


def row_by_row(state: State, new_keys: Tensor, new_values: Tensor) -> State:
    keys, values, cursor = (x.clone() for x in state)
    for key, value in zip(new_keys, new_values, strict=True):
        slot = int(cursor) % len(keys)
        keys[slot], values[slot] = key, value
        cursor.fill_(slot + 1)
    return keys, values, cursor % len(keys)


def assert_same(got: State, expected: State) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
