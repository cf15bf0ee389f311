"""bank_attention: read = shrunk softmax weights times the items, per partition; weights are never stored."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from attention import (
    MODES,
    SHAPES,
    TOLERANCE,
    assert_gradients_match,
    assert_near,
    away_from_kinks,
    inputs,
    options,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_memory import run_measured
from torch import Tensor

import memad_fast
from memad_fast.ops.bank_attention import reference, reference_stats


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(("shape", "items"), SHAPES, ids=str)
def test_equals_the_float64_definition(
    isa: str, shape: tuple[int, ...], items: int, mode: tuple[str, bool, str]
) -> None:
    query, bank = inputs(shape, items)
    chosen = away_from_kinks(query, bank, options(items, mode, shape[-1]))
    got = memad_fast.bank_attention(query, bank, **chosen)
    assert_near(got, reference(query.double(), bank.double(), **chosen), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_low_precision_reads_and_gradients_are_rounded_once(
    isa: str, mode: tuple[str, bool, str], dtype: torch.dtype
) -> None:
    query, bank = inputs((2, 3, 20, 37), 40, dtype)
    chosen = away_from_kinks(query, bank, options(40, mode, 37))
    assert_gradients_match(query, bank, chosen, TOLERANCE[dtype])


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(("shape", "items"), SHAPES[1:], ids=str)
def test_gradients_equal_the_references(
    isa: str, shape: tuple[int, ...], items: int, mode: tuple[str, bool, str]
) -> None:
    query, bank = inputs(shape, items)
    chosen = away_from_kinks(query, bank, options(items, mode, shape[-1]))
    assert_gradients_match(query, bank, chosen, 3e-5)


# (rows, width, M): one panel and several on either side, depths around a slice and above a block, a bank that is packed
# for each tile.
SPARSE_SHAPES = [(70, 33, 40), (64, 100, 230), (66, 300, 31), (20, 257, 600), (9, 1024, 1100)]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize(("rows", "width", "items"), SPARSE_SHAPES)
def test_rows_of_mostly_zeros_read_the_same_bits_beside_any_neighbours(
    isa: str, rows: int, width: int, items: int, similarity: str
) -> None:
    """Few values that are not zero, and few weights above the threshold, take a schedule of their own."""
    query, bank = inputs((2, rows, width), items)
    query[:, 1:] = torch.where(torch.rand(2, rows - 1, width) < 0.1, query[:, 1:], 0.0)
    query[:, -1] = 0.0
    chosen: dict[str, Any] = {
        "threshold": 2 / items, "shrink": "hard", "similarity": similarity,
        "temperature": 0.1 if similarity == "cosine" else 0.1 * width,
    }  # fmt: skip
    chosen = away_from_kinks(query, bank, chosen)
    read = memad_fast.bank_attention(query, bank, **chosen)
    assert_near(read, reference(query.double(), bank.double(), **chosen), TOLERANCE[torch.float32])
    among_dense = torch.randn(2, rows, width)
    among_dense[:, : rows // 4] = query[:, : rows // 4]
    again = memad_fast.bank_attention(among_dense, bank, **chosen)
    assert torch.equal(again[:, : rows // 4], read[:, : rows // 4])
    assert_gradients_match(query[:, :-1], bank, chosen, 3e-5)


@pytest.mark.parametrize("items", [15, 100, 2000])
def test_reads_where_few_weights_are_kept_have_the_same_bits_beside_any_neighbours(isa: str, items: int) -> None:
    query, bank = torch.randn(1, 64, 80), torch.randn(1, items, 80)
    query[:, 8:] *= 1e-3
    chosen: dict[str, Any] = {"threshold": 0.01 + 1 / items, "similarity": "dot", "shrink": "hard", "temperature": 2.0}
    kept = memad_fast.bank_attention(query, bank, **chosen)
    assert kept[:, 8:].eq(0).all()
    assert kept[:, :8].ne(0).any(dim=-1).all()
    alone = memad_fast.bank_attention(query[:, :8], bank, **chosen)
    assert torch.equal(alone, kept[:, :8])
    assert_near(kept, reference(query.double(), bank.double(), **chosen), 1e-5)


@pytest.mark.parametrize("temperature", [1e-3, 0.02, 0.0499, 0.05, 1.0, 1e3])
def test_cosine_at_any_temperature(isa: str, temperature: float) -> None:
    """Above some temperature no exponential can overflow, and the largest logit is not looked for."""
    query, bank = inputs((2, 3, 20, 19), 37)
    query[0, 0, 0], query[0, 0, 1] = bank[0, 0], -bank[0, 0]  # the extremes: cosines of 1 and -1
    bank[0, 5] = -bank[0, 0]
    for chosen in ({"threshold": 0.0, "shrink": "none"}, {"threshold": 1e-3, "shrink": "hard", "renormalize": True}):
        got = memad_fast.bank_attention(query, bank, temperature=temperature, **chosen)  # type: ignore[arg-type]
        expected = reference(query.double(), bank.double(), temperature=temperature, **chosen)  # type: ignore[arg-type]
        # A logit is rounded to one part in 2^24 of 1 / temperature.
        assert_near(got, expected, 1e-5 + 2e-7 / temperature)
    equal = bank[:, :1].expand(-1, 37, -1)
    assert memad_fast.bank_attention(query, equal, threshold=1 / 37, temperature=temperature).eq(0).all()


def test_cosine_of_queries_whose_squares_leave_float32(isa: str) -> None:
    query, bank = inputs((1, 12, 40), 9)
    scales = torch.tensor([1e-37, 1e-30, 1e-20, 1e-14, 1e-11, 1e-9, 1e9, 1e14, 1e16, 1e20, 1e30, 1e36])
    scaled = query * scales[:, None]
    expected = reference(scaled.double(), bank.double(), threshold=0.1)
    assert_near(memad_fast.bank_attention(scaled, bank, threshold=0.1), expected, 1e-5)


def test_bank_gradient_sums_many_chunks_of_rows(isa: str) -> None:
    query, bank = inputs((5, 1, 700, 24), 30)
    assert_gradients_match(query, bank, {"threshold": 0.0, "shrink": "soft"}, 3e-5)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_gradcheck(mode: tuple[str, bool, str]) -> None:
    query, bank = (x.double().requires_grad_() for x in inputs((2, 2, 3, 5), 4))
    chosen = away_from_kinks(query.detach(), bank.detach(), options(4, mode, 5))
    torch.autograd.gradcheck(lambda q, b: memad_fast.bank_attention(q, b, **chosen), (query, bank))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    items=st.integers(1, 70),
    width=st.integers(1, 70),
    partitions=st.integers(1, 3),
    temperature=st.floats(0.05, 20),
    scale=st.sampled_from([1e-30, 1e-8, 1.0, 1e8, 1e30]),
)
def test_cosine_weights_do_not_depend_on_the_length_of_the_query(
    rows: int, items: int, width: int, partitions: int, temperature: float, scale: float
) -> None:
    query, bank = inputs((partitions, rows, width), items)
    chosen: dict[str, Any] = {"threshold": 0.0, "shrink": "none", "temperature": temperature}
    scaled = query * max(scale, 1e-10)
    has_direction = scaled.norm(dim=-1) > 2e-12  # the norm's floor is 1e-12
    got = memad_fast.bank_attention(scaled, bank, **chosen)
    assert_near(got[has_direction], reference(query.double(), bank.double(), **chosen)[has_direction], 3e-5)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 70), items=st.integers(1, 70), width=st.integers(1, 70))
def test_unshrunk_reads_stay_within_the_items(rows: int, items: int, width: int) -> None:
    query, bank = inputs((1, rows, width), items)
    read = memad_fast.bank_attention(query, bank, threshold=0.0, shrink="none", similarity="dot")
    slack = 1e-5 * bank.abs().max()
    assert (read <= bank.amax(dim=1, keepdim=True) + slack).all()
    assert (read >= bank.amin(dim=1, keepdim=True) - slack).all()


@pytest.mark.parametrize("shrink", ["soft", "hard"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_equal_similarities_at_threshold_one_over_m_give_a_dead_row(isa: str, backend: str, shrink: str) -> None:
    for items in (*range(2, 60), 147, 150, 200, 999, 2000):
        item = torch.randn(1, 1, 9)
        bank = item.expand(1, items, 9)
        query = torch.cat([torch.zeros(1, 1, 9), torch.randn(1, 2, 9)], dim=1)
        with memad_fast.use_backend(backend):
            for renormalize in (False, True):
                read = memad_fast.bank_attention(
                    query, bank, threshold=1 / items, shrink=shrink, renormalize=renormalize
                )
                assert read.eq(0).all(), items
            stats = memad_fast.bank_attention_stats(query, bank, threshold=1 / items, shrink=shrink)
        assert stats.dead_share.tolist() == [1.0], items
        assert stats.entropy.item() == pytest.approx(math.log(items), rel=1e-6)


def test_equal_similarities_are_dead_in_float64_too() -> None:
    for items in range(2, 100):
        query, bank = torch.zeros(1, 1, 3, dtype=torch.float64), torch.randn(1, items, 3, dtype=torch.float64)
        assert memad_fast.bank_attention(query, bank, threshold=1 / items, shrink="hard").eq(0).all()


def test_hard_shrink_keeps_weights_above_the_threshold_only(isa: str) -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    query, bank = logits.reshape(1, 1, 3), torch.eye(3)[None]
    read = memad_fast.bank_attention(query, bank, threshold=0.25, shrink="hard", similarity="dot")
    torch.testing.assert_close(read[0, 0], torch.tensor([0.5, 0.3, 0.0]))
    read = memad_fast.bank_attention(query, bank, threshold=0.25, shrink="hard", renormalize=True, similarity="dot")
    torch.testing.assert_close(read[0, 0], torch.tensor([0.625, 0.375, 0.0]))
    read = memad_fast.bank_attention(query, bank, threshold=0.25, similarity="dot")
    torch.testing.assert_close(read[0, 0], torch.tensor([0.25, 0.05, 0.0]))


def test_expresses_the_read_of_memae(isa: str) -> None:
    query, memory = torch.randn(50, 16), torch.randn(300, 16)
    weights = (query.double() @ memory.double().T).softmax(-1)
    kept = torch.where(weights > 0.0025, weights, 0.0)
    expected = torch.nn.functional.normalize(kept, p=1, dim=-1) @ memory.double()
    read = memad_fast.bank_attention(
        query[None], memory[None], similarity="dot", shrink="hard", threshold=0.0025, renormalize=True
    )[0]
    assert_near(read, expected, 1e-5)


@pytest.mark.parametrize("shrink", ["soft", "hard", "none"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_statistics_equal_the_float64_definition(isa: str, shrink: str, similarity: str) -> None:
    query, bank = inputs((3, 2, 70, 33), 150)
    query[0, 1, :7] = 0.0
    chosen = {"threshold": 1 / 150, "shrink": shrink, "similarity": similarity, "temperature": 0.8}
    got = memad_fast.bank_attention_stats(query, bank, **chosen)  # type: ignore[arg-type]
    expected = reference_stats(query.double(), bank.double(), **chosen)  # type: ignore[arg-type]
    torch.testing.assert_close(got.dead_share.double(), expected.dead_share, rtol=1e-7, atol=0)
    torch.testing.assert_close(got.entropy.double(), expected.entropy, rtol=2e-6, atol=2e-6)
    assert (got.dead_share[1] > 0) == (shrink != "none")


def test_zero_vectors_have_similarity_zero_and_no_gradient_through_it(isa: str) -> None:
    query, bank = inputs((2, 5, 8), 4)
    query[0, 2] = 0.0
    bank[1, 3] = 0.0
    chosen: dict[str, Any] = {"threshold": 0.1, "shrink": "hard", "temperature": 0.7}
    assert_gradients_match(query, bank, chosen, 3e-5)
    query.requires_grad_()
    read = memad_fast.bank_attention(query, bank, **chosen)
    torch.testing.assert_close(read[0, 2], bank[0].mean(0))
    (grad,) = torch.autograd.grad(read.square().sum(), query)
    assert grad[0, 2].eq(0).all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_non_finite_query_row_poisons_its_own_read_only(isa: str, similarity: str, bad: float) -> None:
    query, bank = inputs((2, 3, 20, 19), 21)
    clean = memad_fast.bank_attention(query, bank, threshold=0.05, similarity=similarity)
    query[1, 2, 5, 3] = bad
    read = memad_fast.bank_attention(query, bank, threshold=0.05, similarity=similarity)
    assert read[1, 2, 5].isnan().all()
    clean[1, 2, 5] = math.nan
    torch.testing.assert_close(read, clean, rtol=0, atol=0, equal_nan=True)
    with memad_fast.use_backend("reference"):
        expected = memad_fast.bank_attention(query, bank, threshold=0.05, similarity=similarity)
    assert torch.equal(expected.isnan(), read.isnan())
    stats = memad_fast.bank_attention_stats(query, bank, threshold=0.05, similarity=similarity)
    assert stats.entropy.isnan().tolist() == [False, False, True]
    assert stats.dead_share.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_non_finite_item_poisons_its_own_partition_only(isa: str, similarity: str, bad: float) -> None:
    query, bank = inputs((2, 3, 20, 19), 21)
    clean = memad_fast.bank_attention(query, bank, threshold=0.05, similarity=similarity)
    bank[1, 20, 18] = bad
    read = memad_fast.bank_attention(query, bank, threshold=0.05, similarity=similarity)
    clean[:, 1] = math.nan
    torch.testing.assert_close(read, clean, rtol=0, atol=0, equal_nan=True)
    with memad_fast.use_backend("reference"):
        expected = memad_fast.bank_attention(query, bank, threshold=0.05, similarity=similarity)
    assert torch.equal(expected.isnan(), read.isnan())


def test_huge_and_tiny_logits_do_not_overflow(isa: str) -> None:
    query, bank = inputs((1, 9, 8), 5)
    for scale in (1e-20, 1e15):
        chosen: dict[str, Any] = {"threshold": 0.1, "shrink": "hard", "similarity": "dot", "temperature": 1.0}
        got = memad_fast.bank_attention(query * scale, bank, **chosen)
        assert_near(got, reference((query * scale).double(), bank.double(), **chosen), 1e-5)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (0, 0, 3, 4), (2, 2, 3, 0)])
def test_empty_queries_give_empty_reads_and_zero_bank_gradients(isa: str, shape: tuple[int, ...]) -> None:
    query = torch.empty(shape, requires_grad=True)
    bank = torch.randn(shape[1], 6, shape[3]).requires_grad_()
    read = memad_fast.bank_attention(query, bank, threshold=0.1)
    assert read.shape == shape
    grads = torch.autograd.grad(read.sum(), (query, bank))
    assert grads[0].shape == query.shape
    assert torch.equal(grads[1], torch.zeros_like(bank))
    stats = memad_fast.bank_attention_stats(query, bank, threshold=0.1)
    assert stats.dead_share.shape == (shape[1],)


def test_any_strides_give_the_same_bits(isa: str) -> None:
    base = torch.randn(4, 6, 3, 10, 18)
    bank = torch.randn(3, 7, 24)[..., 3:21]
    views = {
        "leading dimensions swapped": base.transpose(0, 1)[..., 1:],
        "every second": base[::2, :, :, ::3, :17],
        "rows between partitions": base.transpose(2, 3)[:, :, :3, :, :9],
        "expanded": base[:1, :, :, :1].expand(5, 6, 3, 4, 18),
        "last dimension strided": base.transpose(3, 4)[..., :3, :, :][..., 0:18, :],
        "overlapping": base.flatten().as_strided((5, 3, 4, 18), (7, 5, 2, 1)),
    }
    for name, view in views.items():
        items = bank[:, :, : view.shape[-1]]
        results = []
        for query in (view, view.contiguous()):
            query = query.detach().requires_grad_()
            read = memad_fast.bank_attention(query, items, threshold=0.1)
            upstream = torch.linspace(-1, 1, read.numel()).reshape(read.shape)
            results.append((read, *torch.autograd.grad(read, query, upstream)))
            stats = memad_fast.bank_attention_stats(query, items, threshold=0.1)
            results[-1] += tuple(stats)
        for got, expected in zip(*results, strict=True):
            assert torch.equal(got, expected), name


def test_cutting_a_feature_map_copies_nothing(isa: str) -> None:
    feature_map = torch.randn(3, 5, 8, 6)  # B, C, h, w, cut along h into 4 strips
    query = feature_map.view(3, 5, 4, 12).transpose(1, 2)
    read = memad_fast.bank_attention(query, torch.randn(4, 7, 12), threshold=1 / 7)
    assert read.stride() == query.stride()
    assembled = read.transpose(1, 2).reshape(3, 5, 8, 6)
    assert assembled.data_ptr() == read.data_ptr()
    assert assembled.is_contiguous()


MEMORY = """
import torch
import memad_fast
torch.set_num_threads(2)
x = torch.randn(32, 2048, 2 * 16).requires_grad_()
bank = torch.randn(2, 2000, 16).requires_grad_()
query = x.view(32, 2048, 2, 16).transpose(1, 2)
memad_fast.bank_attention(query[:1, :, :8], bank, threshold=1 / 2000).sum().backward()
before = peak()
weights = query.shape[0] * 2 * 2048 * 2000 * 4
assert weights > 500e6
read = memad_fast.bank_attention(query, bank, threshold=1 / 2000)
memad_fast.bank_attention_stats(query, bank, threshold=1 / 2000)
forward = peak() - before
read.backward(read.detach())
print(forward, peak() - before)
"""


def test_no_weights_are_stored() -> None:
    """A weight matrix would be 1,048 MB; the query is 8.4 MB. The rest is what the docstring allows two threads."""
    forward, backward = (int(value) for value in run_measured(MEMORY).split())
    query, packed, partial = 32 * 2048 * 2 * 16 * 4, 2 * (8 << 20), 32 << 20
    assert forward < query + packed + 2e6  # the result; tiles
    assert backward < 3 * query + packed + partial + 2e6  # with the gradients of query and feature map


def test_results_do_not_depend_on_batch_threads_or_repetition(isa: str) -> None:
    query, bank = inputs((6, 2, 90, 40), 50)
    upstream = torch.randn_like(query)
    chosen: dict[str, Any] = {"threshold": 1 / 50}

    def run(rows: slice) -> tuple[Tensor, ...]:
        q, b = query[rows].detach().requires_grad_(), bank.detach().requires_grad_()
        read = memad_fast.bank_attention(q, b, **chosen)
        stats = memad_fast.bank_attention_stats(q, b, **chosen)
        return (read.detach(), *torch.autograd.grad(read, (q, b), upstream[rows]), *stats)

    threads = torch.get_num_threads()
    whole = run(slice(None))
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for got, expected in zip(run(slice(None)), whole, strict=True):
                assert torch.equal(got, expected)
    finally:
        torch.set_num_threads(threads)
    parts = [run(slice(i, i + 1)) for i in range(6)]
    for index in (0, 1):
        assert torch.equal(torch.cat([part[index] for part in parts]), whole[index])
    rows = torch.cat(
        [memad_fast.bank_attention(query[:, :, i : i + 1], bank, **chosen) for i in range(query.shape[2])], dim=2
    )
    assert torch.equal(rows, whole[0])


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    base = torch.randn(2, 5, 12).requires_grad_(requires_grad)
    bank = torch.randn(3, 6, 4).requires_grad_(requires_grad)
    cut = base.detach().view(2, 5, 3, 4).transpose(1, 2).requires_grad_(requires_grad)
    for query in (
        torch.randn(2, 3, 5, 4).requires_grad_(requires_grad),
        cut,
        torch.randn(2, 3, 4, 5).transpose(2, 3).requires_grad_(requires_grad),
        torch.randn(1, 3, 1, 4).expand(2, 3, 5, 4).detach().requires_grad_(requires_grad),
    ):
        torch.library.opcheck(
            torch.ops.memad_fast.bank_attention.default, (query, bank, 0.2, "soft", True, "cosine", 0.9)
        )
        torch.library.opcheck(
            torch.ops.memad_fast.bank_attention_stats.default,
            (query.detach(), bank.detach(), 0.2, "soft", "cosine", 0.9),
        )
        grad = torch.randn_like(query).detach()
        torch.library.opcheck(
            torch.ops.memad_fast.bank_attention_backward.default,
            (grad, query.detach(), bank.detach(), 0.2, "soft", True, "cosine", 0.9),
        )


def test_compiles_and_exports_as_one_graph() -> None:
    query, bank = inputs((2, 3, 5, 8), 6)
    expected = memad_fast.bank_attention(query, bank, threshold=0.2)

    def partitioned(x: Tensor, bank: Tensor) -> Tensor:
        read = memad_fast.bank_attention(x.view(2, 5, 3, 8).transpose(1, 2), bank, threshold=0.2)
        return read.transpose(1, 2).reshape(2, 5, 24)

    x = query.transpose(1, 2).reshape(2, 5, 24).contiguous().requires_grad_()
    bank.requires_grad_()
    grads = []
    for call in (partitioned, torch.compile(partitioned, fullgraph=True)):
        got = call(x, bank)
        assert torch.equal(got.view(2, 5, 3, 8).transpose(1, 2), expected)
        grads.append(torch.autograd.grad(got.square().sum(), (x, bank)))
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(eager, compiled)

    class Module(torch.nn.Module):
        def forward(self, query: Tensor, bank: Tensor) -> tuple[Tensor, ...]:
            stats = memad_fast.bank_attention_stats(query, bank, threshold=0.2)
            return memad_fast.bank_attention(query, bank, threshold=0.2), *stats

    with torch.no_grad():
        exported = torch.export.export(Module(), (query, bank)).module()(query, bank)
        for got, want in zip(exported, Module()(query, bank), strict=True):
            assert torch.equal(got, want)


def test_more_elements_than_32_bits_keep_their_shape_and_strides() -> None:
    query = torch.empty(3, 2**20, 4, 2**10, device="meta").transpose(1, 2)
    bank = torch.empty(4, 200, 2**10, device="meta")
    read = memad_fast.bank_attention(query, bank, threshold=0.005)
    assert read.shape == query.shape
    assert read.stride() == query.stride()
    assert memad_fast.bank_attention_stats(query, bank, threshold=0.005).entropy.shape == (4,)


def test_offsets_beyond_32_bits_are_read(isa: str) -> None:
    """Rows 2^31 elements apart, in a file-less mapping of which two pages exist."""
    width, stride = 8, 2**31
    storage = torch.from_numpy(np.memmap("/dev/zero", dtype=np.float32, mode="c", shape=(stride + width,)))
    query = storage.as_strided((1, 2, width), (0, stride, 1))
    query[0, 1] = torch.randn(width)
    query[0, 0] = torch.randn(width)
    bank = torch.randn(1, 5, width)
    read = memad_fast.bank_attention(query, bank, threshold=0.0)
    assert torch.equal(read[0, 1], memad_fast.bank_attention(query[:, 1:], bank, threshold=0.0)[0, 0])


def test_bad_input_names_the_argument() -> None:
    query, bank = torch.randn(2, 3, 5, 4), torch.randn(3, 6, 4)
    cases: list[tuple[type[Exception], str, Any, Any, dict[str, Any]]] = [
        (TypeError, r"query: expected a torch.Tensor, got list", [1.0], bank, {}),
        (TypeError, r"bank: expected float32.*got torch.int64", query, bank.long(), {}),
        (TypeError, r"bank: expected torch.float32 like query, got torch.float16", query, bank.half(), {}),
        (ValueError, r"bank: expected device cpu like query, got meta", query, bank.to("meta"), {}),
        (ValueError, r"query: expected at least 3 dimensions .*\(5, 4\)", query[0, 0], bank, {}),
        (ValueError, r"bank: expected 3 dimensions \[P, M, D\]", query, bank[0], {}),
        (ValueError, r"bank: expected 3 partitions like query", query, bank[:2], {}),
        (ValueError, r"bank: expected 4 values an item like query", query, bank[..., :3], {}),
        (ValueError, r"bank: expected at least 1 item", query, bank[:, :0], {}),
        (ValueError, r"shrink: expected one of soft, hard, none, got 'weak'", query, bank, {"shrink": "weak"}),
        (ValueError, r"similarity: expected one of cosine, dot, got 'l2'", query, bank, {"similarity": "l2"}),
        (ValueError, r"threshold: expected a finite value of at least 0, got -0.1", query, bank, {"threshold": -0.1}),
        (ValueError, r"threshold: .*got nan", query, bank, {"threshold": math.nan}),
        (ValueError, r"temperature: expected a finite value above 0, got 0", query, bank, {"temperature": 0.0}),
        (ValueError, r"temperature: .*got inf", query, bank, {"temperature": math.inf}),
    ]
    for error, message, bad_query, bad_bank, bad_options in cases:
        for call in (memad_fast.bank_attention, memad_fast.bank_attention_stats):
            with pytest.raises(error, match=message):
                call(bad_query, bad_bank, **{"threshold": 0.1, **bad_options})


def test_native_gives_the_same_bits(isa: str) -> None:
    from memad_fast import native

    query, bank = inputs((3, 2, 11, 24), 14)
    for view in (query, query.permute(1, 0, 2, 3)[:, :2].transpose(0, 1), query[..., ::2]):
        items = bank[..., : view.shape[-1]].contiguous()
        arrays = view.numpy(), items.numpy()
        for mode in MODES:
            chosen = options(14, mode, 24)
            expected = memad_fast.bank_attention(view, items, **chosen)
            np.testing.assert_array_equal(native.bank_attention(*arrays, **chosen), expected.numpy())
        stats = memad_fast.bank_attention_stats(view, items, threshold=0.1)
        for got, want in zip(native.bank_attention_stats(*arrays, threshold=0.1), stats, strict=True):
            np.testing.assert_array_equal(got, want.numpy())
    with pytest.raises(TypeError, match=r"query: expected float32"):
        native.bank_attention(query.double().numpy(), bank.numpy(), threshold=0.1)
    with pytest.raises(ValueError, match=r"bank: expected \[2, at least 1, 24\] like query"):
        native.bank_attention(query.numpy(), bank[:1].numpy(), threshold=0.1)
