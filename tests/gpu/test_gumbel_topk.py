"""gumbel_topk on the GPU: the CPU's noise bit for bit, the choice and the read of float64 but for float32 sums."""

from __future__ import annotations

import pytest
import torch
from carried import on
from choices import assert_gradients_match, assert_matches_reference, call_reference, rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from where import DEVICE, DTYPES, each_backend, sized

import memad_fast
from memad_fast._arguments import COMBINES
from memad_fast._noise import gumbel_noise
from memad_fast.ops.gumbel_topk import reference

pytestmark = each_backend("gumbel_topk", "gumbel_topk_backward")

topk = on(DEVICE, memad_fast.gumbel_topk)
many = settings(max_examples=sized(200, 10), deadline=None, suppress_health_check=list(HealthCheck))

SHAPES = sized(
    [
        (1, 1, 1, 1), (5, 64, 16, 3), (50, 65, 64, 65), (101, 333, 64, 8), (7, 200, 130, 1), (129, 257, 64, 5),
        (1000, 4097, 64, 8), (3, 20_000, 64, 8), (16, 4000, 64, 300), (300, 1000, 512, 8),
    ],
    [(5, 64, 16, 3), (7, 65, 7, 65)],
)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(backend: str, shape: tuple[int, int, int, int]) -> None:
    n, m, d, k = shape
    query, memory = rows(n, d), rows(m, d)
    assert_matches_reference(query, memory, k, "renormalized", device=DEVICE)
    assert_matches_reference(query, memory, k, "sum", seed=None, device=DEVICE)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("k", [1, 8])
def test_every_option(backend: str, k: int, combine: str) -> None:
    n, m, d = sized((101, 333, 64), (9, 40, 8))
    query, memory = rows(n, d), rows(m, d)
    assert_matches_reference(query, memory, k, combine, device=DEVICE)
    assert_matches_reference(query, memory, k, combine, seed=None, temperature=0.7, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("combine", COMBINES)
def test_inputs_of_16_bits(backend: str, combine: str, dtype: torch.dtype) -> None:
    """Tensor cores sum exact products in float32, but cut where float32 would round: twice its unit."""
    n, m, d, k = sized((101, 333, 64, 8), (9, 40, 8, 3))
    query, memory = rows(n, d, dtype=dtype), rows(m, d, dtype=dtype)
    for seed, temperature in ((11, 1.0), (None, 0.7)):
        assert_matches_reference(
            query, memory, k, combine, seed=seed, temperature=temperature, device=DEVICE, unit=2.0**-23
        )


def test_noise_has_the_bits_of_its_definition(backend: str) -> None:
    """Zero products leave the noise alone; every column is returned."""
    for n, m, seed in sized(((9, 333, 0), (50, 64, -77), (3, 1, 2**62 + 12345), (700, 129, 5)), ((9, 70, 0),)):
        _, indices, scores = topk(torch.zeros(n, 1), torch.zeros(m, 1), m, seed=seed)
        by_column = torch.empty(n, m).scatter_(1, indices, scores)
        assert torch.equal(by_column, gumbel_noise(torch.tensor(seed), n, m))


def test_noise_of_high_rows_and_columns(backend: str) -> None:
    """One column of many rows, one row of many columns: the whole counter counts."""
    count = sized(300_000, 300)
    for n, m in ((count, 1), (1, count)):
        got = topk(torch.zeros(n, 1), torch.zeros(m, 1), 1, seed=2**63 - 1)
        noise = gumbel_noise(torch.tensor(2**63 - 1), n, m)
        best = noise.max(dim=1)
        assert torch.equal(got[2][:, 0], best.values)
        assert torch.equal(noise.gather(1, got[1])[:, 0], best.values)


@many
@given(data=st.data())
def test_small_integers_give_the_exact_answer(backend: str, data: st.DataObject) -> None:
    n, m = data.draw(st.integers(1, sized(150, 9))), data.draw(st.integers(1, sized(700, 70)))
    d = data.draw(st.sampled_from([3, 64]))
    k = data.draw(st.integers(1, min(m, 40)))
    dtype = data.draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    query, memory = (torch.randint(-2, 3, (size, d), generator=generator).to(dtype) for size in (n, m))
    read, indices, scores = topk(query, memory, k, noise=False)
    expected = reference(query.double(), memory.double(), k, 1.0, None, "sum")
    assert torch.equal(indices, expected[1])
    assert torch.equal(scores.double(), expected[2])
    assert torch.equal(read.double(), expected[0])


def all_scores(query: Tensor, memory: Tensor, seed: int | None) -> Tensor:
    """The op's own scores of every column: with k = M nothing is left out."""
    m = memory.shape[0]
    _, indices, scores = topk(query, memory, m, noise=seed is not None, seed=seed)
    return torch.empty(query.shape[0], m).scatter_(1, indices, scores)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("scale", [0.0, 0.05, 1.0, 30.0])
def test_the_choice_is_the_stable_sort_of_all_scores(backend: str, scale: float, seed: int | None) -> None:
    m = sized(700, 90)
    query, memory = rows(sized(40, 4), 64) * scale, rows(m, 64)
    memory[m // 2 :] = memory[: m - m // 2].clone()  # without noise every score comes twice
    ranked, order = all_scores(query, memory, seed).sort(dim=1, descending=True, stable=True)
    for k in (1, 5, 16, 17, *sized((100,), ())):
        _, indices, chosen = topk(query, memory, k, noise=seed is not None, seed=seed)
        assert torch.equal(indices, order[:, :k])
        assert torch.equal(chosen, ranked[:, :k])


@pytest.mark.parametrize("order", ["ascending", "descending", "constant"])
def test_the_order_of_the_memory_does_not_matter(backend: str, order: str) -> None:
    m = sized(900, 90)
    steps = {"ascending": torch.arange(m), "descending": -torch.arange(m), "constant": torch.ones(m)}[order].float()
    query, memory = torch.full((3, 1), 0.25), steps[:, None].clone()
    for seed in (None, 1):
        ranked, expected = all_scores(query, memory, seed).sort(dim=1, descending=True, stable=True)
        for k in (3, 16, 40):
            _, indices, scores = topk(query, memory, k, noise=seed is not None, seed=seed)
            assert torch.equal(indices, expected[:, :k])
            assert torch.equal(scores, ranked[:, :k])


@pytest.mark.parametrize("combine", COMBINES)
def test_non_finite_rows_touch_nothing_else(backend: str, combine: str) -> None:
    query, memory = rows(70, 64), rows(130, 64)
    query[3, 2], query[69, 8] = torch.nan, torch.inf
    memory[5, 0], memory[64, 1], memory[129, 8] = torch.inf, torch.nan, -torch.inf
    read, indices, scores = topk(query, memory, 6, noise=False, combine=combine)
    for bad in (3, 69):
        assert read[bad].isnan().all()
        assert scores[bad].isnan().all()
        assert indices[bad].tolist() == [-1] * 6
    good = [row for row in range(70) if row not in (3, 69)]
    usable = torch.tensor([column for column in range(130) if column not in (5, 64, 129)])
    expected = topk(query[good], memory[usable], 6, noise=False, combine=combine)
    assert torch.equal(indices[good], usable[expected[1]])
    torch.testing.assert_close(scores[good], expected[2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(read[good], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("finite", [0, 2])
def test_too_few_finite_rows_leave_empty_slots(backend: str, finite: int, combine: str) -> None:
    query, memory = rows(4, 64), torch.full((5, 64), torch.nan)
    memory[:finite] = rows(finite, 64)
    query.requires_grad_()
    got = topk(query, memory, 4, noise=False, combine=combine)
    expected = call_reference(query, memory, 4, None, 1.0, combine)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert bool((got[1][:, finite:] == -1).all())
    got[0].sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()


def test_overflowing_products_keep_their_order(backend: str) -> None:
    memory = torch.tensor([[-3e38], [1.0], [3e38], [2.0]])
    read, indices, scores = topk(torch.full((1, 1), 1e3), memory, 4, noise=False, combine="mean")
    assert indices.tolist() == [[2, 3, 1, -1]]  # +inf first, -inf never
    assert scores[0, :3].tolist() == [torch.inf, 2000.0, 1000.0]
    assert read.item() == pytest.approx(1e38, rel=1e-6)


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e6, 1e300])
def test_extreme_temperatures_give_the_limits(backend: str, temperature: float) -> None:
    query, memory = rows(30, 64), rows(90, 64)
    for combine in ("renormalized", "softmax"):
        read, indices, _ = topk(query, memory, 3, noise=False, temperature=temperature, combine=combine)
        count = 3 if combine == "renormalized" else 90
        limit = memory[indices[:, 0]] if temperature < 1 else memory[indices].sum(dim=1) / count
        torch.testing.assert_close(read, limit, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("shape", sized([(60, 150, 64), (5, 5, 64), (1000, 640, 64)], [(9, 30, 8)]))
def test_gradients_equal_the_references(
    backend: str, shape: tuple[int, int, int], combine: str, dtype: torch.dtype
) -> None:
    n, m, d = shape
    assert_gradients_match(rows(n, d, dtype=dtype) / 4, rows(m, d, dtype=dtype), combine, DEVICE)


@pytest.mark.parametrize("combine", COMBINES)
def test_non_finite_gradients_are_not_hidden(backend: str, combine: str) -> None:
    query, memory = rows(60, 64).requires_grad_(), rows(70, 64).requires_grad_()
    read, _, _ = topk(query, memory, 3, seed=0, combine=combine)
    grad = torch.zeros_like(read)
    grad[50, 1] = torch.nan
    grads = torch.autograd.grad(read, (query, memory), grad)
    assert grads[1].isnan().any()
    assert not grads[0][:50].isnan().any()
    bad = query.detach().clone()
    bad[2] = torch.nan
    bad.requires_grad_()
    read, _, _ = topk(bad, memory, 3, seed=0, combine=combine)
    grads = torch.autograd.grad(read[torch.arange(60) != 2].sum(), (bad, memory))
    assert all(bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("shape", [(0, 5, 4, 2), (0, 1, 0, 1), (3, 4, 0, 2)])
def test_empty_input_gives_empty_results(backend: str, shape: tuple[int, int, int, int]) -> None:
    n, m, d, k = shape
    query, memory = torch.zeros(n, d, requires_grad=True), torch.zeros(m, d, requires_grad=True)
    for combine in COMBINES:
        read, indices, scores = topk(query, memory, k, noise=False, combine=combine)
        assert (read.shape, indices.shape, scores.shape) == ((n, d), (n, k), (n, k))
        assert indices.tolist() == [list(range(k))] * n
        grads = torch.autograd.grad(read.sum() + scores.sum(), (query, memory))
        assert [grad.abs().sum().item() for grad in grads] == [0.0, 0.0]


def everything(query: Tensor, memory: Tensor, combine: str, seed: int | None = 4) -> tuple[Tensor, ...]:
    leaves = query.detach().requires_grad_(), memory.detach().requires_grad_()
    outputs = memad_fast.gumbel_topk(*leaves, 4, seed=seed, noise=seed is not None, combine=combine)
    grads = torch.autograd.grad((outputs[0] * query.detach()).sum() + outputs[2].sum(), leaves)
    return *(output.detach() for output in outputs), *grads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("combine", COMBINES)
def test_views_and_parts_of_a_batch_give_the_same_bits(backend: str, combine: str, dtype: torch.dtype) -> None:
    wide, tall = rows(200, 150, dtype=dtype).to(DEVICE), rows(66, 90, dtype=dtype).to(DEVICE)
    views = [
        (wide[::2, :64], rows(300, 130, dtype=dtype).to(DEVICE)[::3, 4:68]),
        (wide[:1, :64].expand(9, 64), tall.T[:, 2:66]),
    ]
    for query, memory in views:
        copies = everything(query.contiguous(), memory.contiguous(), combine)
        for got, expected in zip(everything(query, memory, combine), copies, strict=True):
            assert torch.equal(got, expected)
    query, memory = views[0]
    whole = everything(query, memory, combine, None)
    parts = [everything(part, memory, combine, None) for part in query.split(33)]
    for index in range(4):
        assert torch.equal(torch.cat([part[index] for part in parts]), whole[index])


def test_the_seed_is_read_on_the_device_and_drawn_by_torch(backend: str) -> None:
    query, memory = rows(6, 64).to(DEVICE), rows(200, 64).to(DEVICE)
    by_int = memad_fast.gumbel_topk(query, memory, 4, seed=123)
    by_tensor = memad_fast.gumbel_topk(query, memory, 4, seed=torch.tensor(123, device=DEVICE))
    assert torch.equal(by_int[2], by_tensor[2])
    torch.manual_seed(5)
    drawn = [memad_fast.gumbel_topk(query, memory, 4)[2] for _ in range(2)]
    torch.manual_seed(5)
    assert torch.equal(drawn[0], memad_fast.gumbel_topk(query, memory, 4)[2])
    assert not torch.equal(drawn[0], drawn[1])
