"""gumbel_topk: the k largest of query · memory + Gumbel noise, read with the chosen weights; no [N, M] matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from choices import (
    DTYPES,
    assert_gradients_match,
    assert_matches_reference,
    assert_same_choice,
    call_reference,
    exact_scores,
    rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_memory import run_measured
from torch import Tensor

import memad_fast
from memad_fast._arguments import COMBINES
from memad_fast._noise import gumbel_from_words, gumbel_noise
from memad_fast.ops.gumbel_topk import reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(
    ("n", "m", "d", "k"), [(1, 1, 1, 1), (5, 64, 16, 3), (50, 65, 7, 65), (101, 333, 37, 8), (7, 200, 130, 1)]
)
def test_equals_the_float64_definition(
    isa: str, n: int, m: int, d: int, k: int, combine: str, dtype: torch.dtype
) -> None:
    query, memory = rows(n, d, dtype=dtype), rows(m, d, dtype=dtype)
    assert_matches_reference(query, memory, k, combine)
    assert_matches_reference(query, memory, k, combine, seed=None, temperature=0.7)


def test_the_band_helper_accepts_near_ties_and_nothing_else() -> None:
    scores = torch.tensor([[3.0, 2.0, 2.0 - 1e-9, 1.0]], dtype=torch.float64)
    band = torch.tensor([[1e-8]], dtype=torch.float64)
    assert_same_choice(torch.tensor([[0, 1]]), scores, band)
    assert_same_choice(torch.tensor([[0, 2]]), scores, band)  # 1 and 2 cannot be told apart in float32
    assert_same_choice(torch.tensor([[0, 2, 1]]), scores, band)
    for wrong in ([[1, 0]], [[0, 3]], [[1, 2]], [[0, 0]], [[0, 1, 3]]):
        with pytest.raises(AssertionError):
            assert_same_choice(torch.tensor(wrong), scores, band)


def test_noise_has_the_same_bits_at_every_level_and_in_the_reference(isa: str) -> None:
    for n, m, seed in ((9, 333, 0), (50, 64, -77), (3, 1, 2**62 + 12345)):
        _, indices, scores = memad_fast.gumbel_topk(torch.zeros(n, 1), torch.zeros(m, 1), m, seed=seed)
        by_column = torch.empty(n, m).scatter_(1, indices, scores)
        assert torch.equal(by_column, gumbel_noise(torch.tensor(seed), n, m))


def test_equal_scores_go_to_the_lowest_index(isa: str) -> None:
    memory = rows(1, 12).expand(150, 12)
    _, indices, scores = memad_fast.gumbel_topk(rows(20, 12), memory, 70, noise=False)
    assert torch.equal(indices, torch.arange(70).expand(20, 70))
    assert bool((scores == scores[:, :1]).all())
    some = torch.tensor([[1.0], [3.0], [2.0], [3.0], [2.0], [3.0]])
    _, indices, _ = memad_fast.gumbel_topk(torch.ones(1, 1), some, 4, noise=False)
    assert indices.tolist() == [[1, 3, 5, 2]]


def all_scores(query: Tensor, memory: Tensor, seed: int | None) -> Tensor:
    """The op's own scores of every column: with k = M nothing is left out."""
    m = memory.shape[0]
    _, indices, scores = memad_fast.gumbel_topk(query, memory, m, noise=seed is not None, seed=seed)
    return torch.empty(query.shape[0], m).scatter_(1, indices, scores)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("scale", [0.0, 0.05, 1.0, 30.0])
def test_the_choice_is_the_stable_sort_of_all_scores(isa: str, scale: float, seed: int | None) -> None:
    """Exactly, ties included: what is passed over without its noise could not have been chosen.

    ``scale`` 0 leaves the noise alone to decide, at 30 it seldom matters; 700 columns are three strips of the kernel.
    """
    query, memory = rows(40, 8) * scale, rows(700, 8)
    memory[300:] = memory[:400].clone()  # without noise every score but a few comes twice
    scores = all_scores(query, memory, seed)
    ranked, order = scores.sort(dim=1, descending=True, stable=True)
    for k in (1, 5, 16, 17, 100):
        _, indices, chosen = memad_fast.gumbel_topk(query, memory, k, noise=seed is not None, seed=seed)
        assert torch.equal(indices, order[:, :k])
        assert torch.equal(chosen, ranked[:, :k])


@pytest.mark.parametrize("order", ["ascending", "descending", "constant"])
def test_the_order_of_the_memory_does_not_matter(isa: str, order: str) -> None:
    """Ascending scores replace the k best again and again, descending ones never."""
    steps = {"ascending": torch.arange(900.0), "descending": -torch.arange(900.0), "constant": torch.ones(900)}[order]
    query, memory = torch.full((3, 1), 0.25), steps[:, None].clone()
    for seed in (None, 1):
        ranked, expected = all_scores(query, memory, seed).sort(dim=1, descending=True, stable=True)
        for k in (3, 16, 40):
            _, indices, scores = memad_fast.gumbel_topk(query, memory, k, noise=seed is not None, seed=seed)
            assert torch.equal(indices, expected[:, :k])
            assert torch.equal(scores, ranked[:, :k])


@pytest.mark.parametrize("combine", ["sum", "softmax"])
@pytest.mark.parametrize(("n", "k"), [(1, 3), (16, 20), (3, 1100)])
def test_few_queries_share_out_a_large_memory_exactly(isa: str, n: int, k: int, combine: str) -> None:
    """With fewer rows than threads the columns are cut; with 400 more rows they are not. The bits are the same."""
    query, memory = rows(n + 400, 6), rows(5_000, 6).half().float()
    memory[4_000:] = memory[:1_000].clone()  # ties across the cuts
    memory[1_500] = torch.nan
    memory[2_048:3_100] *= -1e-3  # a run of columns with nothing to offer
    threads = torch.get_num_threads()
    for seed in (None, 8):
        options = {"noise": seed is not None, "seed": seed, "combine": combine}
        whole = memad_fast.gumbel_topk(query, memory, k, **options)
        try:
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                few = memad_fast.gumbel_topk(query[:n], memory, k, **options)
                for a, b in zip(few, whole, strict=True):
                    assert torch.equal(a, b[:n])
        finally:
            torch.set_num_threads(threads)


def test_overflow_past_the_first_strip_keeps_its_order(isa: str) -> None:
    """+inf is the largest score wherever it stands and −inf is never chosen; with noise too."""
    memory = torch.zeros(600, 2)
    memory[:, 0] = torch.linspace(-1, 1, 600)
    memory[400], memory[555] = torch.tensor([3e38, 0.0]), torch.tensor([3e38, 0.0])
    memory[10], memory[500] = torch.tensor([-3e38, 0.0]), torch.tensor([-3e38, 1.0])
    query = torch.full((20, 2), 1e3)
    for seed in (None, 2):
        _, indices, scores = memad_fast.gumbel_topk(query, memory, 4, noise=seed is not None, seed=seed)
        assert (indices[:, :2] == torch.tensor([400, 555])).all()
        assert (scores[:, :2] == torch.inf).all()
        assert scores[:, 2:].isfinite().all()
        everything = memad_fast.gumbel_topk(query, memory, 600, noise=seed is not None, seed=seed)[1]
        assert not torch.isin(torch.tensor([10, 500]), everything[0]).any()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_small_integers_give_the_exact_answer(data: st.DataObject) -> None:
    n, m, d = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 140)), data.draw(st.integers(1, 20))
    k = data.draw(st.integers(1, m))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    query, memory = (torch.randint(-3, 4, (size, d), generator=generator).float() for size in (n, m))
    read, indices, scores = memad_fast.gumbel_topk(query, memory, k, noise=False)
    expected = reference(query.double(), memory.double(), k, 1.0, None, "sum")
    assert torch.equal(indices, expected[1])
    assert torch.equal(scores.double(), expected[2])
    assert torch.equal(read.double(), expected[0])


def test_noise_follows_the_seed_and_torchs_generator() -> None:
    query, memory = rows(6, 8), rows(200, 8)
    by_int = memad_fast.gumbel_topk(query, memory, 4, seed=123)
    by_tensor = memad_fast.gumbel_topk(query, memory, 4, seed=torch.tensor(123))
    other = memad_fast.gumbel_topk(query, memory, 4, seed=124)
    torch.manual_seed(5)
    drawn = [memad_fast.gumbel_topk(query, memory, 4) for _ in range(2)]
    torch.manual_seed(5)
    again = memad_fast.gumbel_topk(query, memory, 4)
    assert torch.equal(by_int[2], by_tensor[2])
    assert not torch.equal(by_int[2], other[2])
    assert torch.equal(drawn[0][2], again[2])
    assert not torch.equal(drawn[0][2], drawn[1][2])
    silent = [memad_fast.gumbel_topk(query, memory, 4, noise=False, seed=seed) for seed in (None, 1)]
    assert torch.equal(silent[0][2], silent[1][2])


def test_gumbel_noise_samples_from_the_softmax() -> None:
    """The argmax of score + Gumbel noise is distributed as softmax(score): the Gumbel-max theorem."""
    query, memory = torch.tensor([[1.0, -0.5]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.3]])
    _, indices, _ = memad_fast.gumbel_topk(query.expand(40_000, 2), memory, 1, seed=3)
    share = torch.bincount(indices[:, 0], minlength=4) / 40_000
    torch.testing.assert_close(share, (query @ memory.T).softmax(dim=1)[0], rtol=0, atol=0.01)


@pytest.mark.parametrize("combine", COMBINES)
def test_non_finite_rows_touch_nothing_else(isa: str, combine: str) -> None:
    query, memory = rows(70, 9), rows(130, 9)
    query[3, 2], query[69, 8] = torch.nan, torch.inf
    memory[5, 0], memory[64, 1], memory[129, 8] = torch.inf, torch.nan, -torch.inf
    read, indices, scores = memad_fast.gumbel_topk(query, memory, 6, noise=False, combine=combine)
    for bad in (3, 69):
        assert read[bad].isnan().all()
        assert scores[bad].isnan().all()
        assert indices[bad].tolist() == [-1] * 6
    good = [row for row in range(70) if row not in (3, 69)]
    usable = torch.tensor([column for column in range(130) if column not in (5, 64, 129)])
    expected = memad_fast.gumbel_topk(query[good], memory[usable], 6, noise=False, combine=combine)
    assert torch.equal(indices[good], usable[expected[1]])
    assert torch.equal(scores[good], expected[2])
    torch.testing.assert_close(read[good], expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("finite", [0, 2])
def test_too_few_finite_rows_leave_empty_slots(isa: str, finite: int, combine: str) -> None:
    query, memory = rows(4, 3), torch.full((5, 3), torch.nan)
    memory[:finite] = rows(finite, 3)
    for requires_grad in (False, True):
        got = memad_fast.gumbel_topk(query.requires_grad_(requires_grad), memory, 4, noise=False, combine=combine)
        expected = call_reference(query, memory, 4, None, 1.0, combine)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6, equal_nan=True)
        assert bool((got[1][:, finite:] == -1).all())
    got[0].sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()


def test_overflowing_products_keep_their_order(isa: str) -> None:
    memory = torch.tensor([[-3e38], [1.0], [3e38], [2.0]])
    read, indices, scores = memad_fast.gumbel_topk(torch.full((1, 1), 1e3), memory, 4, noise=False, combine="mean")
    assert indices.tolist() == [[2, 3, 1, -1]]  # +inf first, -inf never
    assert scores[0, :3].tolist() == [torch.inf, 2000.0, 1000.0]
    assert read.item() == pytest.approx(1e38, rel=1e-6)


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e6, 1e300])
def test_extreme_temperatures_give_the_limits(isa: str, temperature: float) -> None:
    query, memory = rows(30, 5), rows(90, 5)
    for combine in ("renormalized", "softmax"):
        read, indices, _ = memad_fast.gumbel_topk(
            query, memory, 3, noise=False, temperature=temperature, combine=combine
        )
        count = 3 if combine == "renormalized" else 90
        limit = memory[indices[:, 0]] if temperature < 1 else memory[indices].sum(dim=1) / count
        torch.testing.assert_close(read, limit, rtol=1e-4, atol=1e-4)


def test_strided_and_expanded_inputs_give_the_same(isa: str) -> None:
    wide, tall = rows(40, 24), rows(24, 90)
    views = [(wide[::2, :8], rows(300, 16)[::3, 4:12]), (wide[:1, :5].expand(9, 5), tall.T[:, 3:8])]
    for query, memory in views:
        for combine in ("sum", "straight_through"):
            got = memad_fast.gumbel_topk(query, memory, 4, seed=1, combine=combine)
            expected = memad_fast.gumbel_topk(query.contiguous(), memory.contiguous(), 4, seed=1, combine=combine)
            for a, b in zip(got, expected, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("combine", COMBINES)
def test_results_do_not_depend_on_batch_threads_or_repeats(isa: str, combine: str) -> None:
    query, memory = rows(107, 33).requires_grad_(), rows(300, 33).requires_grad_()
    grad = rows(107, 33)

    def run(first: int = 0, last: int = 107, seed: int | None = None) -> tuple[Tensor, ...]:
        outputs = memad_fast.gumbel_topk(
            query[first:last], memory, 6, noise=seed is not None, seed=seed, combine=combine
        )
        total = (outputs[0] * grad[first:last]).sum() + outputs[2].sum()
        return *(out.detach() for out in outputs), *torch.autograd.grad(total, (query, memory))

    threads = torch.get_num_threads()
    whole, noisy = run(), run(seed=9)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(), whole, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(run(seed=9), noisy, strict=True))
    finally:
        torch.set_num_threads(threads)
    parts = [run(first, min(first + 10, 107)) for first in range(0, 107, 10)]
    for index in range(3):
        assert torch.equal(torch.cat([part[index] for part in parts]), whole[index])
    assert torch.equal(sum(part[3] for part in parts), whole[3])


@pytest.mark.parametrize("shape", [(0, 5, 4, 2), (0, 1, 0, 1), (3, 4, 0, 2)])
def test_empty_input_gives_empty_results(isa: str, shape: tuple[int, int, int, int]) -> None:
    n, m, d, k = shape
    query, memory = torch.zeros(n, d, requires_grad=True), torch.zeros(m, d, requires_grad=True)
    for combine in COMBINES:
        read, indices, scores = memad_fast.gumbel_topk(query, memory, k, noise=False, combine=combine)
        assert (read.shape, indices.shape, scores.shape) == ((n, d), (n, k), (n, k))
        assert indices.tolist() == [list(range(k))] * n
        grads = torch.autograd.grad(read.sum() + scores.sum(), (query, memory))
        assert [grad.abs().sum().item() for grad in grads] == [0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(("n", "m", "d"), [(60, 150, 19), (5, 5, 70), (100, 64, 1)])
def test_gradient_equals_the_references(isa: str, n: int, m: int, d: int, combine: str, dtype: torch.dtype) -> None:
    query, memory = rows(n, d, dtype=dtype), rows(m, d, dtype=dtype)
    assert_gradients_match(query, memory, combine)


@pytest.mark.parametrize("combine", COMBINES)
def test_gradcheck(combine: str) -> None:
    query = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)

    def call(query: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        read, _, scores = memad_fast.gumbel_topk(query, memory, 9, seed=2, temperature=0.8, combine=combine)
        return read, scores

    # With k = M the sparse read is the dense one, so the straight-through gradient is the true gradient.
    torch.autograd.gradcheck(call, (query, memory))


def test_straight_through_is_the_published_gumbel_shrinkage(isa: str) -> None:
    """SQUID and SimSID: softmax, keep what is strictly above the k-th, L1, (h − y).detach() + y, then · memory."""
    query, memory = rows(12, 10).requires_grad_(), rows(40, 10).requires_grad_()
    grad = rows(12, 10)
    soft = (query @ memory.detach().T).softmax(dim=1)
    kept = torch.where(soft > soft.topk(5, dim=1).values[:, -1:], soft, 0.0).detach()
    kept = kept / kept.sum(dim=1, keepdim=True)
    expected = ((kept - soft).detach() + soft) @ memory.detach()
    read, indices, _ = memad_fast.gumbel_topk(query, memory, 4, noise=False, combine="straight_through")
    torch.testing.assert_close(read, expected, rtol=1e-5, atol=1e-6)
    assert bool((kept.gather(1, indices) > 0).all())
    got = torch.autograd.grad((read * grad).sum(), query)[0]
    torch.testing.assert_close(got, torch.autograd.grad((expected * grad).sum(), query)[0], rtol=1e-4, atol=1e-6)


def test_straight_through_has_the_gradient_of_the_dense_read(isa: str) -> None:
    query, memory = rows(12, 10).double().requires_grad_(), rows(90, 10).double().requires_grad_()
    grad = rows(12, 10)
    dense = (exact_scores(query, memory, 4) / 0.6).softmax(dim=1) @ memory
    expected = torch.autograd.grad((dense * grad).sum(), (query, memory))
    inputs = query.detach().float().requires_grad_(), memory.detach().float().requires_grad_()
    read, _, _ = memad_fast.gumbel_topk(*inputs, 3, seed=4, temperature=0.6, combine="straight_through")
    for got, want in zip(torch.autograd.grad((read * grad).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combine", COMBINES)
def test_non_finite_gradients_are_not_hidden(isa: str, combine: str) -> None:
    query, memory = rows(60, 4).requires_grad_(), rows(70, 4).requires_grad_()
    read, _, _ = memad_fast.gumbel_topk(query, memory, 3, seed=0, combine=combine)
    grad = torch.zeros_like(read)
    grad[50, 1] = torch.nan
    grads = torch.autograd.grad(read, (query, memory), grad)
    assert grads[1].isnan().any()
    assert not grads[0][:50].isnan().any()
    bad = query.detach().clone()
    bad[2] = torch.nan
    bad.requires_grad_()
    read, _, _ = memad_fast.gumbel_topk(bad, memory, 3, seed=0, combine=combine)
    grads = torch.autograd.grad(read[torch.arange(60) != 2].sum(), (bad, memory))
    assert all(bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("seed", [None, 3])
def test_opcheck(combine: str, seed: int | None) -> None:
    key = None if seed is None else torch.tensor(seed)
    for requires_grad in (False, True):
        query, memory = rows(5, 4).requires_grad_(requires_grad), rows(9, 4).requires_grad_(requires_grad)
        arguments = (query, memory, 3, 0.9, key, combine)
        torch.library.opcheck(torch.ops.memad_fast.gumbel_topk.default, arguments)


def test_compiles_and_exports_as_one_graph() -> None:
    query, memory = rows(11, 6), rows(20, 6)

    class Module(torch.nn.Module):
        def __init__(self, seed: int | None) -> None:
            super().__init__()
            self.seed = seed

        def forward(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return memad_fast.gumbel_topk(query, memory, 3, seed=self.seed, combine="softmax", noise=self.seed != 0)

    for seed in (0, 7, None):
        expected = Module(seed or 0)(query) if seed is not None else None
        for call in (torch.compile(Module(seed), fullgraph=True), torch.export.export(Module(seed), (query,)).module()):
            got = call(query)
            if expected is not None:
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            else:
                assert not torch.equal(got[2], call(query)[2])


def test_compiled_gradients_equal_the_eager_ones() -> None:
    query, memory = rows(11, 6).requires_grad_(), rows(20, 6).requires_grad_()

    def loss(query: Tensor, memory: Tensor) -> Tensor:
        read, _, scores = memad_fast.gumbel_topk(query, memory, 3, seed=5, combine="straight_through")
        return (read.square()).sum() + scores.sum()

    expected = torch.autograd.grad(loss(query, memory), (query, memory))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(query, memory), (query, memory))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_more_elements_than_32_bits_keep_their_shape() -> None:
    query, memory = torch.empty(2**31 + 1, 3, device="meta"), torch.empty(2**20, 3, device="meta")
    read, indices, scores = memad_fast.gumbel_topk(query, memory, 2)
    assert read.shape == query.shape
    assert indices.shape == scores.shape == (2**31 + 1, 2)


def test_no_matrix_of_queries_by_items_is_stored() -> None:
    """Forward and backward of 6,000 × 60,000 scores (1.4 GB in float32) grow the process by less than a tenth of it."""
    program = """
        import torch, memad_fast

        query, memory = torch.randn(6_000, 2, requires_grad=True), torch.randn(60_000, 2, requires_grad=True)
        small = memad_fast.gumbel_topk(query[:99], memory[:99], 4, seed=0, combine="straight_through")[0]
        small.sum().backward()
        before = peak()
        memad_fast.gumbel_topk(query, memory, 4, seed=0, combine="straight_through")[0].sum().backward()
        print(peak() - before)
    """
    assert int(run_measured(program)) < 140e6


def test_bad_input_names_the_argument() -> None:
    query, memory = rows(2, 3), rows(5, 3)
    call = memad_fast.gumbel_topk
    with pytest.raises(TypeError, match=r"query: expected a torch.Tensor, got list"):
        call([1.0], memory, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"memory: expected torch.float32 like query, got torch.float16"):
        call(query, memory.half(), 1)
    with pytest.raises(ValueError, match=r"query: expected 2 dimensions \[N, D\], got shape \(3,\)"):
        call(query[0], memory, 1)
    with pytest.raises(ValueError, match=r"memory: expected 3 like query in dimension 1, got shape \(5, 2\)"):
        call(query, memory[:, :2], 1)
    for k in (0, 6, -1):
        with pytest.raises(ValueError, match=rf"k: expected 1 to 5, the number of memory rows, got {k}"):
            call(query, memory, k)
    with pytest.raises(TypeError, match=r"k: expected an int, got float"):
        call(query, memory, 2.0)  # type: ignore[arg-type]
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"temperature: expected a positive, finite number, got {temperature}"):
            call(query, memory, 1, temperature=temperature)
    with pytest.raises(ValueError, match=r"combine: expected one of sum, mean.*got 'max'"):
        call(query, memory, 1, combine="max")
    with pytest.raises(ValueError, match=r"seed: expected -2\*\*63 to 2\*\*63 - 1, got 9223372036854775808"):
        call(query, memory, 1, seed=2**63)
    with pytest.raises(TypeError, match=r"seed: expected an int64 tensor, got torch.float32"):
        call(query, memory, 1, seed=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"seed: expected 0 dimensions, got shape \(1,\)"):
        call(query, memory, 1, seed=torch.tensor([1]))
    with pytest.raises(TypeError, match=r"seed: expected an int, an int64 tensor or None, got str"):
        call(query, memory, 1, seed="one")  # type: ignore[arg-type]


@pytest.mark.parametrize("combine", COMBINES)
def test_native_gives_the_same_bits(isa: str, combine: str) -> None:
    from memad_fast import native

    query, memory = rows(50, 9), rows(80, 9)
    for noise in (True, False):
        expected = memad_fast.gumbel_topk(query, memory, 4, seed=-9, noise=noise, temperature=2.0, combine=combine)
        got = native.gumbel_topk(
            query.numpy(), memory.numpy(), 4, seed=-9, noise=noise, temperature=2.0, combine=combine
        )
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(a, b.numpy())


def test_native_draws_its_own_seed_and_names_bad_input() -> None:
    native = pytest.importorskip("memad_fast.native")
    query, memory = np.ones((2, 3), np.float32), np.ones((50, 3), np.float32)
    first, second = (native.gumbel_topk(query, memory, 3)[2] for _ in range(2))
    assert not np.array_equal(first, second)
    with pytest.raises(ValueError, match=r"k: expected 1 to 50, the number of memory rows, got 51"):
        native.gumbel_topk(query, memory, 51)
    with pytest.raises(ValueError, match=r"memory: expected shape \[M, 3\] like query, got \(50, 2\)"):
        native.gumbel_topk(query, memory[:, :2], 1)
    with pytest.raises(TypeError, match=r"query: expected float32, got float64"):
        native.gumbel_topk(query.astype(np.float64), memory, 1)
    with pytest.raises(ValueError, match=r"combine: expected one of sum, .*got 'max'"):
        native.gumbel_topk(query, memory, 1, combine="max")
    with pytest.raises(ValueError, match=r"temperature: expected a positive, finite number, got 0"):
        native.gumbel_topk(query, memory, 1, temperature=0)
    with pytest.raises(ValueError, match=r"seed: expected -2\*\*63"):
        native.gumbel_topk(query, memory, 1, seed=2**64)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_compiled_philox_gives_the_published_words(
    isa: str, counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    from memad_fast import _native

    assert tuple(_native.philox4x32(counter, key)) == words


def test_bounds_enclose_every_value_of_the_noise(isa: str) -> None:
    """Scores whose upper bound is too low are never given their noise, so the bounds must hold for all 2²³ words."""
    from memad_fast import _native

    words = np.arange(2**23, dtype=np.uint32) << 9 | 0x1A5  # what is below bit 9 plays no part
    low, noise, high = _native.gumbel_noise(words)
    expected = gumbel_from_words(torch.from_numpy(words.astype(np.int64)))
    np.testing.assert_array_equal(noise, expected.numpy())
    assert (low <= noise).all()
    assert (noise <= high).all()
    assert noise.max() <= 16.64  # the largest noise that the kernel reckons with
    close = np.isfinite(low)
    assert close.mean() > 0.74
    assert (high - low)[close].max() < 0.3
