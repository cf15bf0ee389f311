"""The Triton kernels of gumbel_topk, in Triton's interpreter, against the CPU's and the float64 reference.

Rows on a lattice (small integers over 8) have products that float32 holds exactly, in any order of summation: there
the CPU's indices and scores are matched bit for bit, noise included.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import memad_fast
from memad_fast import _triton
from memad_fast._arguments import COMBINES
from memad_fast._noise import gumbel_from_words, gumbel_noise
from memad_fast.kernels import gumbel_topk as kernels
from memad_fast.kernels import gumbel_topk_backward, philox
from memad_fast.ops.gumbel_topk import reference

pytestmark = [
    pytest.mark.skipif(
        not _triton.serves_cpu_tensors(), reason="Triton's interpreter is off (tests/gpu does the same on a GPU)"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),  # of NumPy: 1 / 0, ∞ − ∞
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter"),
]


@triton.jit
def _reach(scores, words, results, limit, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    for case in range(3):
        reached = philox.may_reach(tl.load(scores + case * SIZE + at), tl.load(words + at), philox.floor(limit))
        tl.store(results + case * SIZE + at, reached.to(tl.int32))


def lattice(*shape: int) -> Tensor:
    return torch.randint(-12, 13, shape) / 8


def by_triton(query: Tensor, memory: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    with memad_fast.use_backend("triton"):
        return memad_fast.gumbel_topk(query, memory, k, **options)


def assert_as_the_cpu(query: Tensor, memory: Tensor, k: int, **options: Any) -> None:
    """Indices and scores bit for bit, reads up to the order of their sums."""
    read, indices, scores = by_triton(query, memory, k, **options)
    expected = memad_fast.gumbel_topk(query, memory, k, **options)
    assert torch.equal(indices, expected[1])
    assert torch.equal(scores.nan_to_num(-7.0), expected[2].nan_to_num(-7.0))
    tolerance = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[query.dtype]
    torch.testing.assert_close(read, expected[0], rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("seed", [None, -77])
def test_every_way_of_reading_is_the_cpus(combine: str, seed: int | None) -> None:
    options = {"noise": seed is not None, "seed": seed, "combine": combine, "temperature": 0.7}
    assert_as_the_cpu(lattice(20, 9), lattice(150, 9), 5, **options)


@pytest.mark.parametrize(("n", "m", "d", "k"), [(1, 1, 1, 1), (3, 64, 130, 33), (70, 65, 3, 2)])
def test_sizes_off_the_tiles(n: int, m: int, d: int, k: int) -> None:
    assert_as_the_cpu(lattice(n, d), lattice(m, d), k, seed=3)


@pytest.mark.parametrize("seed", [None, 4])
def test_more_slots_than_are_kept_in_a_tile(monkeypatch: pytest.MonkeyPatch, seed: int | None) -> None:
    """Those sort all scores, some rows at a time."""
    monkeypatch.setattr(kernels, "_ALL_KEYS", 70 * 16)
    memory = lattice(70, 5)
    memory[3] = torch.nan
    assert_as_the_cpu(lattice(40, 5), memory, 66, noise=seed is not None, seed=seed, combine="softmax")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides_and_dtypes(dtype: torch.dtype) -> None:
    wide, tall = lattice(18, 30).to(dtype), lattice(8, 210).to(dtype)
    assert_as_the_cpu(wide[::2, 1:17:2], tall.T[::2], 4, seed=1, combine="renormalized")
    assert_as_the_cpu(wide[:1, :8].expand(6, 8), tall.T, 4, noise=False)


def test_noise_has_the_definitions_bits() -> None:
    for n, m, seed in ((3, 150, 0), (20, 70, 2**62 + 12345)):
        _, indices, scores = by_triton(torch.zeros(n, 1), torch.zeros(m, 1), min(m, 9), seed=seed)
        noise = gumbel_noise(torch.tensor(seed), n, m)
        ranked, order = noise.sort(dim=1, descending=True, stable=True)
        assert torch.equal(indices, order[:, :9])
        assert torch.equal(scores, ranked[:, :9])


def test_no_score_that_wins_is_passed_over() -> None:
    """Columns enough for the limit to turn away nearly all of them, by their words alone."""
    assert_as_the_cpu(lattice(4, 3) / 4, lattice(1500, 3), 8, seed=9)


@pytest.mark.parametrize("limit", [0.0, 1e-30, -3.0, 20.0, 1e3, -1e6, 1e30, 3e38])
def test_a_word_that_reaches_the_limit_is_let_through(limit: float) -> None:
    """Scores that just reach it with their noise are; of rare noise, those that miss it by a tenth are turned away."""
    words = torch.randint(0, 2**32, (1 << 14,))
    words[:64], words[64:128] = torch.arange(64) << 8, (2**32 - 1) - (torch.arange(64) << 8)
    noise = gumbel_from_words(words)
    least = torch.tensor(limit) - noise
    while bool((least + noise < limit).any()):
        least = torch.where(least + noise < limit, torch.nextafter(least, torch.tensor(torch.inf)), least)
    results = torch.empty(3, 1 << 14, dtype=torch.int32)
    scores = torch.stack([least, least - 0.1, torch.full_like(least, -torch.inf)])
    _reach[(1,)](scores, words.to(torch.uint32), results, limit, SIZE=1 << 14)
    assert bool((results[0] == 1).all())
    if abs(limit) < 1e4:
        assert bool((results[1][(noise > 4.0) & (noise < 12.0)] == 0).all())
    assert bool((results[2][noise < 15.0] == 0).all())


def test_no_operation_of_the_noise_is_fused() -> None:
    """In PTX: with noise there are no more multiply-adds than the product's, and nothing that ptxas may fuse."""
    program = """
import re, torch
from compile_only import compiling_for
from memad_fast import kernels

for seed in (None, torch.tensor(0)):
    with compiling_for("sm_90") as found:
        kernels.function("gumbel_topk")(torch.empty(9, 64), torch.empty(70, 64), 66, 1.0, seed, "sum")
    text = next(one.assembly for one in found if one.name == "_all_keys")
    patterns = (r"fma\\.rn\\.f32", r"mul\\.rn\\.f32", r"(?:mul|add|sub)\\.f32")
    print(*(len(re.findall(pattern, text)) for pattern in patterns))
"""
    folder = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder.parents[1]), str(folder)])
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    quiet, noisy = ([int(count) for count in line.split()] for line in run.stdout.splitlines())
    assert noisy[0] == quiet[0] > 0
    assert noisy[1] > quiet[1]
    assert noisy[2] == 0


@pytest.mark.parametrize("order", ["ascending", "descending", "constant"])
@pytest.mark.parametrize("seed", [None, 6])
def test_the_order_of_the_memory_does_not_matter(order: str, seed: int | None) -> None:
    """Ascending scores are all kept for a while, one tile after the other; among equals the lowest index wins."""
    steps = {"ascending": torch.arange(400.0), "descending": -torch.arange(400.0), "constant": torch.ones(400)}[order]
    assert_as_the_cpu(torch.full((2, 1), 0.25), steps[:, None], 7, noise=seed is not None, seed=seed)


@pytest.mark.parametrize("scale", [0.0, 30.0])
def test_columns_cut_into_runs_are_merged_exactly(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """Few queries share the columns out to more programs; ties across the cuts."""
    monkeypatch.setattr(kernels, "_BLOCKS", 8)
    query, memory = lattice(2, 4) * scale, lattice(600, 4)
    memory[300:] = memory[:300].clone()
    for seed in (None, 8):
        assert_as_the_cpu(query, memory, 9, noise=seed is not None, seed=seed)


@pytest.mark.parametrize("combine", COMBINES)
def test_rows_that_are_not_finite_touch_nothing_else(combine: str) -> None:
    query, memory = lattice(9, 4), lattice(70, 4)
    query[3, 2], query[8, 3] = torch.nan, torch.inf
    memory[5, 0], memory[64, 1], memory[69, 3] = torch.inf, torch.nan, -torch.inf
    for k in (4, 68):  # fewer than 68 rows can be chosen
        assert_as_the_cpu(query, memory, k, seed=2, combine=combine)
    assert_as_the_cpu(query[:3], torch.full((4, 4), torch.nan), 2, seed=2, combine=combine)


def test_overflow_keeps_its_order() -> None:
    """+inf is the largest score, −inf is never chosen, with or without noise."""
    memory = torch.zeros(200, 2)
    memory[:, 0] = torch.linspace(-1, 1, 200)
    memory[[120, 185]], memory[[10, 190]] = torch.tensor([3e38, 0.0]), torch.tensor([-3e38, 0.0])
    for seed in (None, 2):
        for k in (4, 199):
            assert_as_the_cpu(torch.full((3, 2), 1e3), memory, k, noise=seed is not None, seed=seed)


@pytest.mark.parametrize("temperature", [1e-300, 1e300])
@pytest.mark.parametrize("combine", ["softmax", "renormalized"])
def test_extreme_temperatures_give_the_limits(temperature: float, combine: str) -> None:
    assert_as_the_cpu(lattice(9, 5), torch.randn(90, 5), 3, noise=False, temperature=temperature, combine=combine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_rows_are_read_as_the_reference_does(dtype: torch.dtype) -> None:
    query, memory = torch.randn(17, 33).to(dtype), torch.randn(140, 33).to(dtype)
    got = by_triton(query.float(), memory.float(), 6, seed=5, combine="softmax")
    expected = reference(query.double(), memory.double(), 6, 1.0, torch.tensor(5), "softmax")
    assert torch.equal(got[1], expected[1])  # no two of these scores are closer than float32 tells
    torch.testing.assert_close(got[2].double(), expected[2].double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5, 4, 2), (0, 1, 0, 1), (3, 4, 0, 2)])
def test_empty_input_gives_empty_results(shape: tuple[int, int, int, int]) -> None:
    n, m, d, k = shape
    read, indices, scores = by_triton(torch.zeros(n, d), torch.zeros(m, d), k, noise=False)
    assert (read.shape, indices.tolist(), scores.tolist()) == ((n, d), [list(range(k))] * n, [[0.0] * k] * n)


@pytest.mark.parametrize("combine", ["sum", "softmax"])
def test_a_row_does_not_depend_on_its_batch(combine: str) -> None:
    query, memory = torch.randn(20, 7), torch.randn(600, 7)
    whole = by_triton(query, memory, 3, noise=False, combine=combine)
    part = by_triton(query[17:], memory, 3, noise=False, combine=combine)
    assert all(torch.equal(a, b[17:]) for a, b in zip(part, whole, strict=True))


def gradients(
    query: Tensor, memory: Tensor, k: int, grads: tuple[Tensor, Tensor], **options: Any
) -> tuple[Tensor, Tensor]:
    inputs = query.detach().requires_grad_(), memory.detach().requires_grad_()
    read, _, scores = memad_fast.gumbel_topk(*inputs, k, **options)
    return torch.autograd.grad((read, scores), inputs, grads)


def assert_gradients_as_the_cpu(
    query: Tensor, memory: Tensor, k: int, grads: tuple[Tensor, Tensor], **options: Any
) -> None:
    with memad_fast.use_backend("triton"):
        got = gradients(query, memory, k, grads, **options)
    for a, b in zip(got, gradients(query, memory, k, grads, **options), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.isnan(), b.isnan())
        tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[query.dtype]
        size = b.nan_to_num().abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * size, equal_nan=True)


@pytest.mark.parametrize("combine", COMBINES)
def test_gradients_are_the_cpus(monkeypatch: pytest.MonkeyPatch, combine: str) -> None:
    """In two blocks of rows."""
    monkeypatch.setattr(gumbel_topk_backward, "_BLOCK_SCORES", 20 * 64)
    query, memory = lattice(66, 5), lattice(20, 5)
    grads = torch.randn(66, 5), torch.randn(66, 2)
    assert_gradients_as_the_cpu(query, memory, 2, grads, seed=5, combine=combine, temperature=1.3)


@pytest.mark.parametrize("combine", ["softmax", "straight_through", "renormalized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_of_strided_rows_wider_than_a_tile(dtype: torch.dtype, combine: str) -> None:
    query, memory = lattice(70, 9).T.to(dtype), lattice(140, 12).T.to(dtype)[:, ::2]
    grads = torch.randn(9, 1, dtype=dtype).expand(9, 70), torch.randn(3, 9).T
    assert_gradients_as_the_cpu(query, memory, 3, grads, noise=False, combine=combine)


@pytest.mark.parametrize("combine", COMBINES)
def test_gradients_of_rows_that_are_not_finite(combine: str) -> None:
    """They have none and give none; what is not finite in an upstream gradient shows where it belongs."""
    query, memory = lattice(9, 4), lattice(12, 4)
    query[3, 2], memory[5, 0], memory[6, 1] = torch.nan, torch.inf, torch.nan
    grads = torch.randn(9, 4), torch.randn(9, 12)
    assert_gradients_as_the_cpu(query, memory, 12, grads, seed=2, combine=combine)
    grads[0][7, 1] = torch.nan
    assert_gradients_as_the_cpu(query, memory, 3, (grads[0], grads[1][:, :3]), seed=2, combine=combine)
    assert_gradients_as_the_cpu(
        query, torch.full((4, 4), torch.nan), 2, (torch.ones(9, 4), torch.ones(9, 2)), seed=2, combine=combine
    )


@pytest.mark.parametrize("shape", [(0, 5, 4, 2), (3, 4, 0, 2)])
@pytest.mark.parametrize("combine", ["mean", "softmax"])
def test_gradients_of_empty_input_are_zeros(shape: tuple[int, int, int, int], combine: str) -> None:
    n, m, d, k = shape
    grads = torch.ones(n, d), torch.ones(n, k)
    assert_gradients_as_the_cpu(torch.zeros(n, d), torch.zeros(m, d), k, grads, noise=False, combine=combine)
