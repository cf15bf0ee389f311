"""greedy_coreset beside the two forms that go over all rows for every choice: by a matrix-vector product, and pairwise.

Rows are patches as PatchCore sees them: features of smooth images by a small convolutional network with random weights,
so that neighbours resemble each other; and Gaussian rows, which resemble nothing. All providers start from row 0.

The pairwise form is anomalib's (``KCenterGreedy``): the distances of all rows to the newest centre by
``pairwise_distance``, the minimum with those so far, its argmax. The matrix-vector form has its norms cached, untimed.
A choice costs these two the same however many came before, so they are timed on the first choices, and their times are
scaled to all of them: their names say so. (400 choices of 20,000 x 64 took the pairwise form a tenth less than that.)

error: how far a choice falls short of the farthest row, as a share of its squared distance, in float64, at up to 32
steps. The limit is that of int8 products of every row with every centre, of which ours needs a part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import Case, Provider, each_provider, ours
from torch import Tensor, nn

from memad_fast.memory import greedy_coreset

FIRST = 5  # choices that the peers are timed on


def smooth_patches(rows: int, dim: int) -> Tensor:
    """Of images of 112 x 112 pixels, 784 each, averaged over 3 x 3."""
    net = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.Conv2d(64, 128, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(128, dim, 3, 1, 1), nn.ReLU(), nn.AvgPool2d(3, 1, 1),
    )  # fmt: skip
    patches = []
    with torch.inference_mode():
        for _ in range(-(-rows // 6272)):
            images = F.interpolate(torch.rand(8, 3, 8, 8), size=(112, 112), mode="bicubic")
            patches.append(net(images + 0.05 * torch.rand(8, 3, 112, 112)).permute(0, 2, 3, 1).reshape(-1, dim))
    return torch.cat(patches)[:rows].clone()


def pairwise(features: Tensor, size: int) -> Tensor:
    chosen, nearest = [0], torch.full((len(features), 1), torch.inf)
    for _ in range(size):  # the last argmax is the next choice, which nobody needs
        distances = F.pairwise_distance(features, features[chosen[-1]][None], p=2).reshape(-1, 1)
        nearest = torch.minimum(nearest, distances)
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen[:size])


def matrix_vector(features: Tensor, size: int) -> Callable[[], Tensor]:
    rows = features - features.mean(dim=0)  # near the origin the expanded form loses the fewest digits
    squares = rows.square().sum(dim=1)

    def call() -> Tensor:
        chosen, nearest = [0], torch.full_like(squares, torch.inf)
        for _ in range(size):
            newest = chosen[-1]
            distances = torch.addmv(squares, rows, rows[newest], alpha=-2).add_(squares[newest])
            torch.minimum(nearest, distances, out=nearest)
            chosen.append(int(nearest.argmax()))
        return torch.tensor(chosen[:size])

    return call


def shortfall(chosen: Any, features: Tensor) -> float:
    """The largest, of choices that are spread over all of them."""
    rows = features.double()
    squares, nearest, worst, done = rows.square().sum(dim=1), torch.full((len(rows),), torch.inf).double(), 0.0, 0
    for step in torch.linspace(1, len(chosen) - 1, min(32, len(chosen) - 1)).long().tolist():
        for centres in chosen[done:step].split(256):
            products = torch.addmm(squares[centres], rows, rows[centres].T, alpha=-2)
            torch.minimum(nearest, products.amin(dim=1) + squares, out=nearest)
        done, farthest = step, nearest.max()
        worst = max(worst, float((farthest - nearest[chosen[step]]) / farthest))
    return worst


def case(kind: str, rows: int, dim: int, size: int) -> Case:
    make = {"patches": smooth_patches, "Gaussian": torch.randn}[kind]
    share = FIRST / size
    return Case(
        f"{size} of {rows}x{dim} {kind}",
        inputs=lambda: (make(rows, dim),),
        providers=[
            ours(lambda features: greedy_coreset(features, size)),
            Provider(
                f"matrix-vector, {FIRST} choices scaled", lambda features: matrix_vector(features, FIRST), share=share
            ),
            Provider(
                f"pairwise, {FIRST} choices scaled", lambda features: lambda: pairwise(features, FIRST), share=share
            ),
        ],
        expected=lambda features: features,
        tolerance=1e-12,
        error=shortfall,
        flops=2.0 * rows * dim * size,
        bytes=4.0 * rows * dim,
        rate="int8",
        target=5.0,
    )


CASES = [
    case("patches", 50_000, 384, 500),
    case("patches", 50_000, 384, 5_000),
    case("patches", 200_000, 64, 2_000),
    case("patches", 50_000, 1024, 500),
    case("Gaussian", 50_000, 384, 5_000),
]


@each_provider(CASES)
def bench_coreset(measure: Callable, case: Case, provider: Provider) -> None:
    measure(case, provider)
