"""What tests/kernels/test_compile.py compiles: for each op, calls that choose every kernel and configuration it has.

Run as a program it compiles the calls of one file of kernels for all targets, in this process (Triton's interpreter
must be off), and prints what came out as JSON:

    python tests/kernels/launches.py fifo_write_
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from compile_only import TARGETS, compiling_for

from memad_fast import kernels


@dataclass(frozen=True)
class Launch:
    """A call of an op's function, and what must be true of the kernels that it launches."""

    op: str
    arguments: Callable[[int], tuple[Any, ...]]
    """The arguments by position, as the op's schema has them, for a batch size. No kernel runs: contents are free."""
    name: str = ""
    """Which of the op's calls it is, where there are several."""
    matrix: str = ""
    """The name of a kernel that must use tensor cores; "" if none must."""
    accepted_stack: str = ""
    """Why these kernels may use local memory ("" forbids it): a test shows the reason."""
    batches: tuple[int, ...] = (48, 37, 1)
    """The first compiles; the others, of another divisibility, and the batch of one, must compile nothing new."""

    def __str__(self) -> str:
        return f"{self.op} {self.name}".strip()


def ring_write(batch: int, key_dim: int, value_dim: int) -> tuple[Any, ...]:
    ring, new = ((torch.empty(rows, key_dim), torch.empty(rows, value_dim).half()) for rows in (300, batch))
    return *ring, torch.tensor(0), *new


def search_gradient(batch: int, dtype: torch.dtype, metric: str) -> tuple[Any, ...]:
    query, keys = torch.empty(batch, 512, dtype=dtype), torch.empty(40, 512, dtype=dtype)
    return torch.empty(batch, 3), query, keys, torch.empty(batch, 3, dtype=torch.int64), metric


def search(width: int, dtype: torch.dtype, metric: str, k: int) -> Callable[[int], tuple[Any, ...]]:
    """Arguments of a search of 300 keys."""
    return lambda batch: (torch.zeros(batch, width, dtype=dtype), torch.zeros(300, width, dtype=dtype), None, k, metric)


def rows_of_prepared(batch: int) -> tuple[Any, ...]:
    keys = torch.zeros(300, 200)
    return kernels.function("prepare_keys")(keys, "l2"), keys, torch.zeros(batch, dtype=torch.int64), "l2"


def gumbel_read(
    width: int, k: int, combine: str, seed: bool = True, dtype: torch.dtype = torch.float32
) -> Callable[[int], tuple[Any, ...]]:
    """Arguments of a read of 300 memory rows."""

    def arguments(batch: int) -> tuple[Any, ...]:
        query, memory = torch.empty(batch, width, dtype=dtype), torch.empty(300, width, dtype=dtype)
        return query, memory, k, 1.0, torch.tensor(0) if seed else None, combine

    return arguments


def gumbel_gradient(
    width: int, k: int, combine: str, dtype: torch.dtype = torch.float32, items: int = 300
) -> Callable[[int], tuple[Any, ...]]:
    """Arguments of the gradient of a read with noise."""

    def arguments(batch: int) -> tuple[Any, ...]:
        query, memory = torch.empty(batch, width, dtype=dtype), torch.empty(items, width, dtype=dtype)
        slots = torch.zeros(batch, k)
        return (
            query,
            slots,
            query,
            memory,
            1.0,
            torch.tensor(0),
            combine,
            torch.zeros(batch, k, dtype=torch.int64),
            slots,
        )

    return arguments


def attention(width: int, items: int, dtype: torch.dtype) -> Callable[[int], tuple[Any, ...]]:
    """Reads of strips of a feature map, of a batch size."""

    def arguments(batch: int) -> tuple[Any, ...]:
        query = torch.zeros(batch, 8, 4, width, dtype=dtype).transpose(1, 2)
        return query, torch.zeros(4, items, width, dtype=dtype), 1 / items, "soft", False, "cosine", 1.0

    return arguments


def errors_and_gradients(batch: int) -> tuple[Any, ...]:
    images, means = torch.empty(batch, 4096), torch.empty(batch)
    return images, means, means, images, means, 0.5


def image_pair(batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(batch, 3, 64, 64, dtype=dtype), torch.empty(batch, 3, 64, 64, dtype=dtype)


_EXACT_STACK = "on some processors one to three values of compute_candidates, used outside of its loop of products"
_GUMBEL_STACK = "at most 24 bytes of what the loop over row blocks does not change, read again once a tile"


def attention_stats(batch: int) -> tuple[Any, ...]:
    query, bank, threshold, shrink, _, similarity, temperature = attention(64, 200, torch.float32)(batch)
    return query, bank, threshold, shrink, similarity, temperature


def attention_gradient(width: int, items: int, dtype: torch.dtype) -> Callable[[int], tuple[Any, ...]]:
    """Gradients of such reads."""

    def arguments(batch: int) -> tuple[Any, ...]:
        query, *rest = attention(width, items, dtype)(batch)
        return torch.zeros_like(query), query, *rest

    return arguments


# File of kernels -> its calls. One line for every path through the launcher that picks another kernel or constant:
# dtypes, row lengths, flags; not sizes, which compile nothing.
LAUNCHES: dict[str, list[Launch]] = {
    "bank_attention": [
        Launch(
            "bank_attention",
            attention(64, 200, torch.float32),
            "float32",
            "read_kernel",
            "208 weights of each row in registers, as three parts: some wait in local memory outside the inner loops",
        ),
        Launch("bank_attention", attention(33, 70, torch.bfloat16), "bfloat16, unaligned rows", "read_kernel"),
        Launch("bank_attention", attention(256, 2000, torch.float16), "of a large bank", "read_tiles_kernel"),
        Launch("bank_attention_stats", attention_stats, matrix="stats_kernel"),
    ],
    "bank_attention_backward": [
        Launch(
            "bank_attention_backward",
            attention_gradient(64, 200, torch.float32),
            "float32",
            accepted_stack="weights and gradients of 208 items for each row in registers: some wait in local memory",
        ),
        Launch(
            "bank_attention_backward",
            attention_gradient(33, 60, torch.float16),
            "unaligned rows",
            "gradient_kernel",
            "as above, and the addresses of rows that are read value by value",
        ),
        Launch(
            "bank_attention_backward",
            attention_gradient(64, 2000, torch.bfloat16),
            "of a large bank",
            "gradient_tiles_kernel",
        ),
    ],
    "fifo_write_": [
        Launch("fifo_write_", lambda n: ring_write(n, 512, 512), "long rows"),
        Launch("fifo_write_", lambda n: ring_write(n, 7, 1), "short rows"),
    ],
    "gumbel_topk": [
        Launch("gumbel_topk", gumbel_read(64, 8, "sum"), "64", accepted_stack=_GUMBEL_STACK),
        Launch("gumbel_topk", gumbel_read(512, 5, "renormalized", False), "512 quiet", accepted_stack=_GUMBEL_STACK),
        Launch(
            "gumbel_topk",
            gumbel_read(64, 5, "softmax", dtype=torch.bfloat16),
            "in bfloat16",
            "_select",
            accepted_stack=_GUMBEL_STACK,
        ),
        Launch("gumbel_topk", gumbel_read(64, 65, "straight_through"), "of many slots"),
    ],
    "gumbel_topk_backward": [
        Launch("gumbel_topk_backward", gumbel_gradient(512, 5, "renormalized", torch.float16), "renormalized"),
        Launch("gumbel_topk_backward", gumbel_gradient(64, 5, "softmax"), "softmax"),
        Launch("gumbel_topk_backward", gumbel_gradient(512, 8, "straight_through", torch.bfloat16), "in bfloat16"),
    ],
    "histogram_correction": [
        Launch("histogram_correction", lambda n: (torch.empty(n, 3, 64, 64, dtype=torch.bfloat16), 0.5)),
        Launch(
            "histogram_correction_backward",
            errors_and_gradients,
            accepted_stack="one value, once a program, beside the calls that two float64 divisions are on sm_120",
        ),
    ],
    "nearest_keys": [
        Launch(
            "nearest_keys",
            search(width, torch.float32, metric, k),
            f"{width} {metric} {k}",
            "_screen",
            accepted_stack=_EXACT_STACK,
        )
        for width, metric, k in [(128, "ip", 1), (1024, "cosine", 3)]
    ]
    + [
        Launch("nearest_keys", search(512, torch.bfloat16, "l2", 1), "of many", "_screen", batches=(1000, 1001)),
        Launch("nearest_keys", search(65_537, torch.float16, "l2", 1), "of long rows"),
        Launch("nearest_keys_stats", search(64, torch.float16, "l2", 1), matrix="_screen"),
    ],
    "nearest_keys_backward": [
        Launch(f"nearest_keys_backward_{of}", partial(search_gradient, dtype=dtype, metric=metric), f"{metric} {dtype}")
        for of in ("query", "keys")
        for dtype in (torch.float32, torch.bfloat16)
        for metric in ("l2", "cosine", "ip")
    ]
    + [
        Launch(
            "nearest_keys_backward_keys",
            partial(search_gradient, dtype=torch.float32, metric="cosine"),
            "with rows in several segments",
            batches=(2048, 1037, 600),
        )
    ],
    "prepare_keys": [
        Launch("prepare_keys", lambda batch: (torch.zeros(batch, 200), "l2")),
        Launch("prepare_keys", lambda batch: (torch.zeros(batch, 1024), "cosine"), "cosine"),
        Launch("prepare_keys", lambda batch: (torch.zeros(batch, 64, dtype=torch.bfloat16), "ip"), "ip"),
        Launch("prepare_keys_rows_", rows_of_prepared),
    ],
    "ssim": [
        Launch("ssim_loss", lambda n: (*image_pair(n, torch.float32), 11, 1.5, 1.0, False)),
        Launch("ssim_map", lambda n: (*image_pair(n, torch.bfloat16), 11, 1.5, 1.0, True), "reflected"),
        Launch("ssim_loss_backward", lambda n: (torch.zeros(()), *image_pair(n, torch.float32), 11, 1.5, 1.0, False)),
        Launch(
            "ssim_map_backward",
            lambda n: (image_pair(n, torch.bfloat16)[0], *image_pair(n, torch.bfloat16), 11, 1.5, 1.0, True),
            "reflected",
        ),
    ],
    "stcm_lookup": [
        Launch(
            "stcm_lookup",
            lambda n: (torch.empty(n, 512), torch.empty(300, 512), torch.empty(300, 64), None, torch.tensor(7)),
            "filled",
            accepted_stack=_EXACT_STACK,
        ),
        Launch(
            "stcm_lookup_backward_values",
            lambda n: (torch.empty(n, 512), torch.empty(40, 512), torch.empty(n, dtype=torch.int64)),
        ),
    ],
}


def compiled(
    launches: Sequence[Launch],
    targets: Iterable[str] = tuple(TARGETS),
    function: Callable[[str], Callable[..., Any]] = kernels.function,
) -> list[dict[str, Any]]:
    """What calls compile, for every target and batch size; ``function`` gives the function of an op."""
    rows = []
    for target, launch in itertools.product(targets, launches):
        for batch in launch.batches:
            with compiling_for(target) as found:
                function(launch.op)(*launch.arguments(batch))
            rows += [
                {
                    "target": target, "launch": str(launch), "batch": batch, "kernel": one.name, "key": one.key,
                    "shared_memory": one.shared_memory, "stack": one.stack,
                    "matrix_instructions": sorted(one.matrix_instructions), "tf32": "tf32" in one.assembly,
                }
                for one in found
            ]  # fmt: skip
    return rows


if __name__ == "__main__":
    print(json.dumps(compiled(LAUNCHES[sys.argv[1]])))
