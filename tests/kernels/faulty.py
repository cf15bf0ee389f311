"""Calls with one fault each, for the test of the checks in test_compile.py; run as launches.py is."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from launches import Launch, compiled


@triton.jit
def product(x, y, out, rows, count, SIDE: tl.constexpr, PRECISION: tl.constexpr):
    """Sums products of tiles of x with y, ``count`` of them."""
    at = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for tile in range(count):
        left, right = tl.load(x + tile * rows * SIDE + at), tl.load(y + tile * SIDE * SIDE + at)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(out + at, total)


def call(
    rows: int, dtype: torch.dtype, side: int = 32, precision: str = "ieee", warps: int = 4, stages: int = 2
) -> None:
    x = torch.zeros(1, dtype=dtype)
    product[(1,)](x, x, torch.zeros(1), rows, 8, side, precision, num_warps=warps, num_stages=stages)


def specialised(rows: int) -> None:
    """Its batch size is a compile-time constant."""
    x = torch.zeros(1, dtype=torch.float16)
    product[(1,)](x, x, torch.zeros(1), 48, 8, 16 * triton.next_power_of_2(rows // 16), "ieee")


FUNCTIONS: dict[str, Any] = {
    "sound": partial(call, dtype=torch.float16),
    "greedy": partial(call, dtype=torch.float16, side=128, stages=9),
    "rounding": partial(call, dtype=torch.float32, precision="tf32"),
    "spilling": partial(call, dtype=torch.float16, side=128, warps=1),
    "slow": partial(call, dtype=torch.float32),
    "specialised": specialised,
}
LAUNCHES = {name: Launch(name, lambda batch: (batch,), batches=(48, 32)) for name in FUNCTIONS}


if __name__ == "__main__":
    on_nvidia = compiled(list(LAUNCHES.values()), ["sm_80", "sm_90"], FUNCTIONS.__getitem__)
    on_amd = compiled([LAUNCHES["sound"], LAUNCHES["spilling"]], ["gfx942"], FUNCTIONS.__getitem__)
    print(json.dumps(on_nvidia + on_amd))
