"""fifo_write_ beside plain torch: new rows into the rings of MemSTC-Net, PatchCore and a large memory.

There is no arithmetic: the limit is one copy of the new rows. Peers write in place too, by index or by slices (which
need the cursor's value on the host).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Case, Provider, each_provider
from torch import Tensor

import memad_fast
from memad_fast.ops.fifo_write_ import reference

State = tuple[Tensor, Tensor, Tensor]


def by_slices(keys: Tensor, values: Tensor, cursor: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
    slots, count, at = len(keys), len(new_keys), int(cursor)
    first = min(count, slots - at)
    for ring, rows in ((keys, new_keys), (values, new_values)):
        ring[at : at + first].copy_(rows[:first])
        ring[: count - first].copy_(rows[first:])
    cursor.fill_((at + count) % slots)


def writing(write: Callable[..., None]) -> Callable[..., Callable[[], State]]:
    """Calls that go on around a ring of their own; the first is checked from cursor ``start``."""

    def prepare(slots: int, start: int, new_keys: Tensor, new_values: Tensor) -> Callable[[], State]:
        keys, values = (new.new_zeros(slots, new.shape[1]) for new in (new_keys, new_values))
        ring = (keys, values, torch.tensor(start, device=keys.device))

        def call() -> State:
            write(*ring, new_keys, new_values)
            return ring

        return call

    return prepare


def different(got: Any, exact: Any) -> float:
    """Share of elements that are not the expected ones."""
    return max(float((a.double() != b.double()).double().mean()) for a, b in zip(got, exact, strict=True))


def case(slots: int, count: int, dim: int) -> Case:
    return Case(
        f"{count} rows into {slots}x{dim}",
        inputs=lambda: (slots, slots - count // 2, torch.randn(count, dim), torch.randn(count, dim)),
        providers=[
            Provider("ours", writing(memad_fast.fifo_write_), is_ours=True),
            Provider("index_copy_", writing(reference)),
            Provider("slices", writing(by_slices)),
        ],
        expected=lambda *inputs: writing(reference)(*inputs)(),
        tolerance=0.0,
        error=different,
        bytes=2.0 * 2 * 4 * count * dim,
    )


@each_provider([case(2048, 1568, 512), case(16_384, 784, 1024), case(1_000_000, 65_536, 64)])
def bench_fifo_write_(measure: Callable, case: Case, provider: Provider) -> None:
    measure(case, provider)
