"""nearest_keys beside plain torch, faiss and scikit-learn, on the banks of MemSTC-Net and PatchCore and two extremes.

All providers search float32 rows for the single nearest key by squared Euclidean distance. Peers answer in float32, so
on near ties they may name another key; ours must name the float64 one. What a peer can compute once for its keys
(norms, an index) it does untimed, as prepared keys do. The limit is that of one int8 product and one byte read for each
value of the keys, which a certified screen needs at least; PERFORMANCE's targets are for prepared keys, and lower where
all run on AVX2 alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Case, Provider, compiled, each_provider, eager, largest_error, ours
from torch import Tensor

import memad_fast
from memad_fast import native
from memad_fast.ops.nearest_keys import reference

AVX2_TARGET = 1.5


def prepared(query: Tensor, keys: Tensor) -> Callable[[], Any]:
    searched = memad_fast.prepare_keys(keys)
    return lambda: memad_fast.nearest_keys(query, searched)


def cdist_argmin(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    distances, indices = torch.cdist(query, keys).min(dim=1, keepdim=True)
    return distances.square(), indices


def product_argmin(query: Tensor, keys: Tensor, half_squares: Tensor) -> tuple[Tensor, Tensor]:
    scores, indices = torch.addmm(half_squares, query, keys.T, alpha=-1.0).min(dim=1, keepdim=True)
    return 2.0 * scores + query.square().sum(dim=1, keepdim=True), indices


def with_cached_norms(query: Tensor, keys: Tensor) -> Callable[[], Any]:
    half_squares = keys.square().sum(dim=1) / 2
    return lambda: product_argmin(query, keys, half_squares)


def compiled_with_cached_norms(query: Tensor, keys: Tensor) -> Callable[[], Any]:
    half_squares = keys.square().sum(dim=1) / 2
    return compiled("mm+argmin", product_argmin).prepare(query, keys, half_squares)


def faiss_flat(query: Tensor, keys: Tensor) -> Callable[[], Any]:
    import faiss

    index = faiss.IndexFlatL2(keys.shape[1])
    index.add(keys.numpy())
    queries = query.numpy()
    return lambda: index.search(queries, 1)


def sklearn_argmin(query: Tensor, keys: Tensor) -> Callable[[], Any]:
    from sklearn.metrics import pairwise_distances_argmin_min

    queries, rows = query.numpy(), keys.numpy()

    def call() -> tuple[Tensor, Tensor]:
        indices, distances = pairwise_distances_argmin_min(queries, rows, metric="sqeuclidean")
        return torch.from_numpy(distances)[:, None], torch.from_numpy(indices)[:, None]

    return call


PROVIDERS = [
    Provider("ours, prepared", prepared, is_ours=True),
    ours(memad_fast.nearest_keys, "ours"),
    eager("cdist+argmin", cdist_argmin),
    Provider("mm+argmin", with_cached_norms),
    Provider("torch.compile(mm+argmin)", compiled_with_cached_norms),
    Provider("faiss IndexFlatL2", faiss_flat, requires="faiss"),
    Provider("scikit-learn", sklearn_argmin, requires="sklearn"),
]


def float64_search(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest by float64 products, then the reference among the few that could be nearest."""
    wide, rows = query.double(), keys.double()
    squares = rows.square().sum(dim=1) / 2
    best = []
    for part in wide.split(64):
        _, near = torch.addmm(squares, part, rows.T, alpha=-1.0).topk(min(4, len(keys)), largest=False)
        for row, candidates in zip(part, near.sort(dim=1).values, strict=True):
            distances, indices = reference(row[None], rows[candidates], 1)
            best.append((distances[0], candidates[indices[0]]))
    distances, indices = zip(*best, strict=True)
    return torch.stack(distances), torch.stack(indices)


def wrong_indices(got: Any, expected: Any) -> float:
    """Share of queries whose index is not the float64 one."""
    return float((torch.as_tensor(got[1]) != expected[1]).double().mean())


def distance_error(got: Any, expected: Any) -> float:
    return largest_error(got[0], expected[0])


def case(count: int, rows: int, dim: int, target: float) -> Case:
    return Case(
        f"{count}x{rows}x{dim}",
        inputs=lambda: (torch.randn(count, dim), torch.randn(rows, dim)),
        providers=PROVIDERS,
        expected=float64_search,
        tolerance=1e-6,
        error=distance_error,
        wrong=wrong_indices,
        flops=2.0 * count * rows * dim,
        bytes=(4.0 * count + rows) * dim,
        rate="int8",
        target=AVX2_TARGET if native.isa() == "avx2" else target,
    )


CASES = [
    case(196, 2048, 512, 3.0),
    case(1568, 2048, 512, 5.0),
    case(6272, 2048, 512, 6.0),
    case(784, 16384, 1024, 5.0),
    case(6272, 4096, 64, 4.0),
    case(1, 100_000, 512, 4.0),
    case(64, 1_000_000, 64, 8.0),
]


@each_provider(CASES)
def bench_nearest_keys(measure: Callable, case: Case, provider: Provider) -> None:
    measure(case, provider)
