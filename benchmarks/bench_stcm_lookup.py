"""stcm_lookup beside plain torch: nearest key and its value, for one MemSTC-Net image and batches of 8 and 32.

Every row reads a 512-value texture beside its 512-value structure. The peers find the key in float32; their reads are
checked against float64 like ours, which must name the float64 key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bench_nearest_keys import cdist_argmin, float64_search
from harness import Case, Provider, compiled, each_provider, eager, largest_error, ours
from torch import Tensor

import memad_fast


def prepared(query: Tensor, keys: Tensor, values: Tensor) -> Callable[[], Any]:
    searched = memad_fast.prepare_keys(keys)
    return lambda: memad_fast.stcm_lookup(query, searched, values)


def gathered(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    distances, indices = cdist_argmin(query, keys)
    return values[indices[:, 0]], distances[:, 0], indices[:, 0]


def product_gathered(
    query: Tensor, keys: Tensor, values: Tensor, half_squares: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    scores, indices = torch.addmm(half_squares, query, keys.T, alpha=-1.0).min(dim=1)
    return values[indices], 2.0 * scores + query.square().sum(dim=1), indices


def with_cached_norms(query: Tensor, keys: Tensor, values: Tensor) -> Callable[[], Any]:
    half_squares = keys.square().sum(dim=1) / 2
    return lambda: product_gathered(query, keys, values, half_squares)


def compiled_with_cached_norms(query: Tensor, keys: Tensor, values: Tensor) -> Callable[[], Any]:
    half_squares = keys.square().sum(dim=1) / 2
    return compiled("mm+argmin+gather", product_gathered).prepare(query, keys, values, half_squares)


def expected(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    distances, indices = float64_search(query, keys)
    return values[indices[:, 0]], distances[:, 0], indices[:, 0]


def wrong_reads(got: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Share of rows whose index or value is not the float64 one."""
    wrong = (got[2] != exact[2]) | (got[0] != exact[0]).any(dim=1)
    return float(wrong.double().mean())


def distance_error(got: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    return largest_error(got[1], exact[1])


def case(count: int) -> Case:
    slots, dim = 2048, 512
    return Case(
        f"{count}x{slots}x{dim}",
        inputs=lambda: (torch.randn(count, dim), torch.randn(slots, dim), torch.randn(slots, dim)),
        providers=[
            Provider("ours, prepared", prepared, is_ours=True),
            ours(memad_fast.stcm_lookup),
            eager("cdist+argmin+gather", gathered),
            Provider("mm+argmin+gather", with_cached_norms),
            Provider("torch.compile(mm+argmin+gather)", compiled_with_cached_norms),
        ],
        expected=expected,
        tolerance=1e-6,
        error=distance_error,
        wrong=wrong_reads,
        flops=2.0 * count * slots * dim,
        bytes=(4.0 * (3 * count) + slots) * dim,
        rate="int8",
    )


@each_provider([case(196), case(1568), case(6272)])
def bench_stcm_lookup(measure: Callable, case: Case, provider: Provider) -> None:
    measure(case, provider)
