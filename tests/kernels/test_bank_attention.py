"""The Triton kernels of bank_attention in Triton's interpreter: float32 logic, ties, NaN, strides, tiles, splitting."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention import assert_near, away_from_kinks
from torch import Tensor

pytest.importorskip("triton")

import memad_fast
from memad_fast.kernels import bank_attention as kernels
from memad_fast.kernels import bank_attention_backward, interpreted
from memad_fast.ops.bank_attention import reference, reference_stats

pytestmark = pytest.mark.skipif(
    not interpreted(), reason="Triton's interpreter is off; tests/gpu runs the kernels themselves"
)

# The interpreter stores bfloat16 cut off, not rounded: up to 2^-7 of a value.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _triton(one_thread: None) -> Iterator[None]:
    with memad_fast.use_backend("triton"):
        yield


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Banks of more than 32 items are walked over, 16 at a time: few items show what many would."""
    monkeypatch.setattr(kernels, "PIECE", 16)
    for file in (kernels, bank_attention_backward):
        config = dataclasses.replace(file.CONFIGS["interpreter"][0], resident=32)
        monkeypatch.setitem(file.CONFIGS, "interpreter", [config])
    monkeypatch.setattr(kernels, "READ_COLUMNS", 16)


def inputs(shape: tuple[int, ...], items: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A query whose rows lean to some items, so that weights lie on both sides of 1 / M."""
    bank = torch.randn(shape[-3], items, shape[-1])
    query = torch.randn(shape) + bank[:, torch.arange(shape[-2]) % items]
    return query.to(dtype), bank.to(dtype)


def options(items: int, width: int, mode: tuple[str, bool, str]) -> dict[str, Any]:
    shrink, renormalize, similarity = mode
    return {
        "threshold": 1 / items,
        "shrink": shrink,
        "renormalize": renormalize,
        "similarity": similarity,
        "temperature": 0.5 if similarity == "cosine" else 0.5 + 0.4 * width,
    }


MODES = [
    ("soft", False, "cosine"),
    ("soft", True, "dot"),
    ("hard", False, "dot"),
    ("hard", True, "cosine"),
    ("none", False, "cosine"),
    ("none", True, "dot"),
]


def gradients(query: Tensor, bank: Tensor, upstream: Tensor, chosen: dict[str, Any], call: Any) -> tuple[Tensor, ...]:
    query, bank = query.detach().requires_grad_(), bank.detach().requires_grad_()
    read = call(query, bank, **chosen)
    return torch.autograd.grad(read, (query, bank), upstream.to(read.dtype))


def assert_gradients_match(query: Tensor, bank: Tensor, chosen: dict[str, Any], tolerance: float) -> None:
    upstream = torch.randn(query.shape).to(query.dtype)
    got = gradients(query, bank, upstream, chosen, memad_fast.bank_attention)
    expected = gradients(query.double(), bank.double(), upstream, chosen, reference)
    for ours, right in zip(got, expected, strict=True):
        assert ours.dtype == query.dtype
        assert_near(ours, right, tolerance)


# One row and one item; several leading dimensions; two pieces, the last of 16 and of 32; more columns than one slice.
@pytest.mark.parametrize(("shape", "items"), [((1, 1, 1), 1), ((2, 1, 2, 3, 33), 70), ((1, 70, 130), 90)], ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_reads_equal_the_float64_definition(shape: tuple[int, ...], items: int, mode: tuple[str, bool, str]) -> None:
    query, bank = inputs(shape, items)
    chosen = away_from_kinks(query, bank, options(items, shape[-1], mode))
    got = memad_fast.bank_attention(query, bank, **chosen)
    assert_near(got, reference(query.double(), bank.double(), **chosen), TOLERANCE[torch.float32])


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_larger_banks_are_walked_over(small_pieces: None, mode: tuple[str, bool, str]) -> None:
    query, bank = inputs((2, 2, 3, 20), 41)
    chosen = away_from_kinks(query, bank, options(41, 20, mode))
    got = memad_fast.bank_attention(query, bank, **chosen)
    assert_near(got, reference(query.double(), bank.double(), **chosen), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_low_precision_reads_are_rounded_once(dtype: torch.dtype, similarity: str) -> None:
    query, bank = inputs((2, 2, 5, 37), 40, dtype)
    chosen = away_from_kinks(query, bank, options(40, 37, ("soft", True, similarity)))
    got = memad_fast.bank_attention(query, bank, **chosen)
    assert got.dtype == dtype
    assert_near(got, reference(query.double(), bank.double(), **chosen), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_parts_add_up_to_the_items(dtype: torch.dtype) -> None:
    """A product of parts is exact, so that of two factors is, but for what is left out."""
    bank = (torch.randn(3, 21, 19) * torch.logspace(-3, 3, 21)[:, None]).to(dtype)
    prepared = kernels.prepare(bank, "cosine", 0.7, 32, 16, kernels.CONFIGS["interpreter"][0])
    parts = prepared.parts
    assert len(parts) == {torch.float32: 3, torch.float16: 2, torch.bfloat16: 1}[dtype]
    assert torch.equal(parts, parts.bfloat16().float())
    assert torch.equal(parts.sum(0)[:, :21, :19], bank.float())
    assert parts[:, :, 21:].eq(0).all()
    assert parts[..., 19:].eq(0).all()
    norm = bank.double().norm(dim=-1)
    torch.testing.assert_close(prepared.scales[0, :, :21].double(), 1 / (0.7 * norm), rtol=1e-7, atol=0)
    torch.testing.assert_close(prepared.scales[1, :, :21].double(), 1 / norm, rtol=1e-7, atol=0)


def test_cosine_of_rows_of_any_length() -> None:
    query, bank = inputs((1, 12, 40), 9)
    scales = torch.tensor([1e-37, 1e-30, 1e-20, 1e-14, 1e-11, 1e-9, 1e9, 1e14, 1e16, 1e20, 1e30, 1e36])
    scaled = query * scales[:, None]
    expected = reference(scaled.double(), bank.double(), threshold=0.1)
    assert_near(memad_fast.bank_attention(scaled, bank, threshold=0.1), expected, 2e-6)


def test_huge_and_tiny_logits_do_not_overflow() -> None:
    query, bank = inputs((1, 9, 8), 5)
    for scale in (1e-20, 1e15):
        chosen: dict[str, Any] = {"threshold": 0.1, "shrink": "hard", "similarity": "dot", "temperature": 1.0}
        got = memad_fast.bank_attention(query * scale, bank, **chosen)
        assert_near(got, reference((query * scale).double(), bank.double(), **chosen), 2e-6)


@pytest.mark.parametrize("shrink", ["soft", "hard"])
@pytest.mark.parametrize("items", [2, 3, 7, 49, 147, 200])
def test_equal_similarities_at_threshold_one_over_m_give_a_dead_row(items: int, shrink: str) -> None:
    bank = torch.randn(1, 1, 9).expand(1, items, 9)
    query = torch.cat([torch.zeros(1, 1, 9), torch.randn(1, 2, 9)], dim=1)
    read = memad_fast.bank_attention(query, bank, threshold=1 / items, shrink=shrink, renormalize=shrink == "hard")
    assert read.eq(0).all()


def test_equal_similarities_are_dead_where_the_bank_is_walked_over(small_pieces: None) -> None:
    for items in (33, 49, 90):
        bank = torch.randn(1, 1, 9).expand(1, items, 9)
        assert memad_fast.bank_attention(torch.randn(1, 2, 9), bank, threshold=1 / items).eq(0).all()


def test_hard_shrink_keeps_weights_above_the_threshold_only() -> None:
    query, bank = torch.tensor([0.5, 0.3, 0.2]).log().reshape(1, 1, 3), torch.eye(3)[None]
    read = memad_fast.bank_attention(query, bank, threshold=0.25, shrink="hard", similarity="dot")
    torch.testing.assert_close(read[0, 0], torch.tensor([0.5, 0.3, 0.0]))
    read = memad_fast.bank_attention(query, bank, threshold=0.25, shrink="hard", renormalize=True, similarity="dot")
    torch.testing.assert_close(read[0, 0], torch.tensor([0.625, 0.375, 0.0]))
    read = memad_fast.bank_attention(query, bank, threshold=0.25, similarity="dot")
    torch.testing.assert_close(read[0, 0], torch.tensor([0.25, 0.05, 0.0]))
    read = memad_fast.bank_attention(query, bank, threshold=1e300, similarity="dot")
    assert read.eq(0).all()


def test_zero_vectors_have_similarity_zero() -> None:
    query, bank = inputs((2, 5, 8), 4)
    query[0, 2] = 0.0
    bank[1, 3] = 0.0
    chosen: dict[str, Any] = {"threshold": 0.1, "shrink": "hard", "temperature": 0.7}
    read = memad_fast.bank_attention(query, bank, **chosen)
    assert_near(read, reference(query.double(), bank.double(), **chosen), 2e-6)
    torch.testing.assert_close(read[0, 2], bank[0].mean(0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_non_finite_query_row_poisons_its_own_read_only(similarity: str, bad: float) -> None:
    query, bank = inputs((2, 2, 5, 19), 21)
    clean = memad_fast.bank_attention(query, bank, threshold=0.05, similarity=similarity)
    query[1, 1, 3, 3] = bad
    read = memad_fast.bank_attention(query, bank, threshold=0.05, similarity=similarity)
    clean[1, 1, 3] = math.nan
    torch.testing.assert_close(read, clean, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_non_finite_item_poisons_its_own_partition_only(similarity: str, bad: float) -> None:
    query, bank = inputs((2, 3, 5, 19), 21)
    clean = memad_fast.bank_attention(query, bank, threshold=0.05, similarity=similarity)
    bank[1, 20, 18] = bad
    read = memad_fast.bank_attention(query, bank, threshold=0.05, similarity=similarity)
    clean[:, 1] = math.nan
    torch.testing.assert_close(read, clean, rtol=0, atol=0, equal_nan=True)


def test_non_finite_values_where_the_bank_is_walked_over(small_pieces: None) -> None:
    query, bank = inputs((2, 3, 9), 40)
    clean = memad_fast.bank_attention(query, bank, threshold=0.02)
    query[0, 1, 0] = math.inf
    bank[1, 39, 8] = math.nan
    clean[0, 1] = math.nan
    clean[1] = math.nan
    read = memad_fast.bank_attention(query, bank, threshold=0.02)
    torch.testing.assert_close(read, clean, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (0, 0, 3, 4), (2, 2, 3, 0)])
def test_empty_queries_give_empty_reads(shape: tuple[int, ...]) -> None:
    assert (
        memad_fast.bank_attention(torch.empty(shape), torch.randn(shape[1], 6, shape[3]), threshold=0.1).shape == shape
    )


BASE = torch.arange(4 * 6 * 3 * 10 * 18, dtype=torch.float32).mul_(0.7).sin_().reshape(4, 6, 3, 10, 18)
VIEWS = {
    "leading dimensions swapped": BASE.transpose(0, 1)[:2, :2, ..., 1:],
    "every second": BASE[::2, :2, :, ::3, :17],
    "rows between partitions": BASE.transpose(2, 3)[:, :, :3, :, :9],
    "expanded": BASE[:1, :2, :, :1].expand(3, 2, 3, 4, 18),
    "last dimension strided": BASE.transpose(3, 4)[:1, :2],
    "overlapping": BASE.flatten().as_strided((5, 3, 4, 18), (7, 5, 2, 1)),
    "four leading dimensions": BASE.reshape(2, 2, 3, 2, 3, 10, 18).permute(2, 0, 3, 1, 4, 5, 6)[:, :, :, :1],
}


@pytest.mark.parametrize("name", VIEWS)
def test_any_strides_give_the_same_bits(name: str) -> None:
    query = VIEWS[name]
    bank = torch.randn(3, 7, 24)[..., 3 : 3 + query.shape[-1]]
    read = memad_fast.bank_attention(query, bank, threshold=0.1)
    assert torch.equal(read, memad_fast.bank_attention(query.contiguous(), bank.contiguous(), threshold=0.1))
    assert_near(read, reference(query.double(), bank.double(), 0.1), 2e-6)


def test_cutting_a_feature_map_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(3, 5, 8, 6).view(3, 5, 4, 12).transpose(1, 2)  # B, C, h, w, cut along h into 4 strips
    rows = kernels.Rows.of(query)
    assert rows.tensor.data_ptr() == query.data_ptr()
    read = memad_fast.bank_attention(query, torch.randn(4, 7, 12), threshold=1 / 7)
    assert read.stride() == query.stride()


def test_rows_read_the_same_bits_beside_any_others() -> None:
    query, bank = inputs((3, 2, 70, 20), 30)
    whole = memad_fast.bank_attention(query, bank, threshold=1 / 30)
    assert torch.equal(memad_fast.bank_attention(query[1:2], bank, threshold=1 / 30), whole[1:2])
    assert torch.equal(memad_fast.bank_attention(query[:, :, 60:], bank, threshold=1 / 30), whole[:, :, 60:])


@pytest.mark.parametrize(("shape", "items"), [((1, 1, 1), 1), ((2, 1, 2, 3, 33), 70)], ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_gradients_equal_the_float64_ones(shape: tuple[int, ...], items: int, mode: tuple[str, bool, str]) -> None:
    query, bank = inputs(shape, items)
    chosen = away_from_kinks(query, bank, options(items, shape[-1], mode))
    assert_gradients_match(query, bank, chosen, 3e-6)


@pytest.mark.parametrize("mode", MODES[:4], ids=str)
def test_gradients_where_the_bank_is_walked_over(small_pieces: None, mode: tuple[str, bool, str]) -> None:
    query, bank = inputs((2, 2, 3, 20), 41)
    assert_gradients_match(query, bank, away_from_kinks(query, bank, options(41, 20, mode)), 3e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_gradients_are_rounded_once(dtype: torch.dtype) -> None:
    query, bank = inputs((2, 2, 5, 37), 40, dtype)
    chosen = away_from_kinks(query, bank, options(40, 37, ("soft", True, "cosine")))
    assert_gradients_match(query, bank, chosen, TOLERANCE[dtype])


@pytest.mark.parametrize("items", [9, 33])
def test_bank_gradients_sum_over_many_runs_and_blocks_of_rows(
    small_pieces: None, monkeypatch: pytest.MonkeyPatch, items: int
) -> None:
    """A run of several blocks adds to what it has; runs are added up; the cut moves no gradient of a row."""
    query, bank = inputs((3, 1, 44, 12), items)
    chosen: dict[str, Any] = {"threshold": 0.0}
    upstream = torch.randn(query.shape)
    expected = gradients(query.double(), bank.double(), upstream, chosen, reference)
    results = []
    for programs in (1, 2):
        monkeypatch.setattr(bank_attention_backward, "PROGRAMS", programs)
        results.append(gradients(query, bank, upstream, chosen, memad_fast.bank_attention))
        for got, right in zip(results[-1], expected, strict=True):
            assert_near(got, right, 3e-6)
    assert torch.equal(results[0][0], results[1][0])
    again = gradients(query, bank, upstream, chosen, memad_fast.bank_attention)
    assert torch.equal(again[1], results[1][1])


def test_partial_gradients_are_bounded() -> None:
    runs_of = bank_attention_backward.runs_of
    assert runs_of(1000, 8, 1 << 20) == 16
    assert runs_of(3, 8, 1 << 20) == 3
    assert runs_of(1000, 8, 20 << 20) == 3
    assert runs_of(1000, 8, 1 << 40) == 1
    assert runs_of(1000, 1000, 1) == 1


def test_zero_vectors_get_no_gradient_through_their_cosine() -> None:
    query, bank = inputs((2, 5, 8), 4)
    query[0, 2] = 0.0
    bank[1, 3] = 0.0
    chosen: dict[str, Any] = {"threshold": 0.1, "shrink": "hard", "temperature": 0.7}
    assert_gradients_match(query, bank, chosen, 3e-6)
    got = gradients(query, bank, torch.randn(query.shape), chosen, memad_fast.bank_attention)
    assert got[0][0, 2].eq(0).all()


def test_dead_rows_have_no_gradient() -> None:
    bank = torch.randn(1, 1, 9).expand(1, 7, 9).contiguous()
    got = gradients(torch.randn(1, 3, 9), bank, torch.randn(1, 3, 9), {"threshold": 1 / 7}, memad_fast.bank_attention)
    assert got[0].eq(0).all()
    assert got[1].eq(0).all()


def test_gradients_of_rows_are_not_touched_by_a_nan_in_others() -> None:
    query, bank = inputs((2, 5, 19), 21)
    upstream = torch.randn(query.shape)
    clean = gradients(query, bank, upstream, {"threshold": 0.05}, memad_fast.bank_attention)
    query[1, 3, 2] = math.nan
    got = gradients(query, bank, upstream, {"threshold": 0.05}, memad_fast.bank_attention)
    assert got[0][1, 3].isnan().all()
    others = torch.ones(2, 5, dtype=torch.bool)
    others[1, 3] = False
    assert torch.equal(got[0][others], clean[0][others])
    assert torch.equal(got[1][0], clean[1][0])
    assert got[1][1].isnan().all()


@pytest.mark.parametrize("name", ["leading dimensions swapped", "expanded", "last dimension strided"])
def test_gradients_of_any_strides_have_the_same_bits(name: str) -> None:
    query = VIEWS[name]
    bank = torch.randn(3, 7, 24)[..., 3 : 3 + query.shape[-1]]
    upstream = torch.randn(1, query.shape[-1]).expand(query.shape)
    chosen: dict[str, Any] = {"threshold": 0.1}
    got = gradients(query, bank, upstream, chosen, memad_fast.bank_attention)
    dense = gradients(query.contiguous(), bank.contiguous(), upstream.contiguous(), chosen, memad_fast.bank_attention)
    assert torch.equal(got[0], dense[0])
    assert torch.equal(got[1], dense[1])


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty_queries_give_zero_bank_gradients(shape: tuple[int, ...]) -> None:
    query, bank = torch.empty(shape), torch.randn(shape[1], 6, shape[3])
    got = gradients(query, bank, query, {"threshold": 0.1}, memad_fast.bank_attention)
    assert got[0].shape == shape
    assert torch.equal(got[1], torch.zeros_like(bank))


@pytest.mark.parametrize("shrink", ["soft", "hard", "none"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_statistics_equal_the_float64_definition(shrink: str, similarity: str) -> None:
    query, bank = inputs((3, 2, 30, 33), 75)
    query[0, 1, :7] = 0.0
    chosen = {"threshold": 1 / 75, "shrink": shrink, "similarity": similarity, "temperature": 0.8}
    got = memad_fast.bank_attention_stats(query, bank, **chosen)  # type: ignore[arg-type]
    expected = reference_stats(query.double(), bank.double(), **chosen)  # type: ignore[arg-type]
    torch.testing.assert_close(got.dead_share.double(), expected.dead_share, rtol=1e-7, atol=0)
    torch.testing.assert_close(got.entropy.double(), expected.entropy, rtol=2e-6, atol=2e-6)
    assert (got.dead_share[1] > 0) == (shrink != "none")


def test_statistics_of_equal_similarities_nan_and_no_rows() -> None:
    bank = torch.randn(1, 1, 9).expand(2, 147, 9)
    query = torch.randn(2, 3, 9)
    query[1, 1] = math.nan
    stats = memad_fast.bank_attention_stats(query, bank, threshold=1 / 147)
    assert stats.dead_share.tolist() == [1.0, pytest.approx(2 / 3)]
    assert stats.entropy[0].item() == pytest.approx(math.log(147), rel=1e-6)
    assert stats.entropy[1].isnan()
    for shape in ((0, 2, 3, 9), (2, 2, 0, 9)):
        assert memad_fast.bank_attention_stats(torch.empty(shape), bank, threshold=0.1).entropy.isnan().all()
    assert (
        memad_fast.bank_attention_stats(torch.empty(2, 3, 0), torch.empty(2, 5, 0), threshold=0.1).entropy.tolist()
        == [pytest.approx(math.log(5))] * 2
    )
