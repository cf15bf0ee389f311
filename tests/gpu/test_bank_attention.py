"""bank_attention on the GPU: reads and gradients of the float64 definition, the rules of the CPU's kernel."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention import MODES, TOLERANCE, assert_gradients_match, assert_near, away_from_kinks, inputs, options
from carried import on
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from where import DEVICE, DTYPES, each_backend, sized

import memad_fast
from memad_fast.ops.bank_attention import reference, reference_stats

pytestmark = each_backend("bank_attention", "bank_attention_backward", "bank_attention_stats")

attention, statistics = on(DEVICE, memad_fast.bank_attention), on(DEVICE, memad_fast.bank_attention_stats)
many = settings(max_examples=sized(60, 5), deadline=None, suppress_health_check=list(HealthCheck))

# (query shape, M): around tiles of rows, of items and of the row's length; several leading dimensions; PMB's levels.
SHAPES = sized(
    [
        ((1, 1, 1), 1), ((2, 3, 4, 32), 6), ((2, 2, 1, 3, 33), 16), ((1, 130, 200), 37), ((2, 2, 9, 64), 300),
        ((1, 3, 1024), 1100), ((2, 32, 64, 512), 150), ((2, 8, 512, 32), 200), ((1, 16, 128, 256), 200),
        ((4, 65, 15, 64), 33),
    ],
    [((2, 3, 4, 5), 6)],
)  # fmt: skip


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_option(backend: str, mode: tuple[str, bool, str]) -> None:
    """Reads and gradients; all at one length of rows, as each pair of length and options is a compilation."""
    for shape, items in sized([((2, 3, 70, 64), 150), ((2, 20, 64), 40), ((1, 1, 64), 1)], [((2, 3, 9, 5), 7)]):
        query, bank = inputs(shape, items)
        chosen = away_from_kinks(query, bank, options(items, mode, shape[-1]))
        assert_near(
            attention(query, bank, **chosen),
            reference(query.double(), bank.double(), **chosen),
            TOLERANCE[torch.float32],
        )
        assert_gradients_match(query, bank, chosen, 3e-5, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("mode", [MODES[0], MODES[7], MODES[9]], ids=str)
def test_every_option_of_16_bits(backend: str, mode: tuple[str, bool, str], dtype: torch.dtype) -> None:
    query, bank = inputs(*sized(((2, 3, 70, 64), 150), ((2, 3, 9, 5), 7)), dtype)
    chosen = away_from_kinks(query, bank, options(bank.shape[1], mode, query.shape[-1]))
    assert_gradients_match(query, bank, chosen, TOLERANCE[dtype], DEVICE)


@pytest.mark.parametrize(("shape", "items"), SHAPES, ids=str)
def test_every_shape(backend: str, shape: tuple[int, ...], items: int) -> None:
    query, bank = inputs(shape, items)
    chosen = away_from_kinks(query, bank, {"threshold": 1 / items, "similarity": "cosine", "temperature": 1.0})
    expected = reference(query.double(), bank.double(), **chosen)
    assert_near(attention(query, bank, **chosen), expected, TOLERANCE[torch.float32])
    assert_gradients_match(query, bank, chosen, 3e-5, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_long_rows_of_16_bits(backend: str, dtype: torch.dtype) -> None:
    query, bank = inputs(*sized(((2, 4, 64, 512), 150), ((2, 3, 9, 5), 7)), dtype)
    chosen = away_from_kinks(query, bank, {"threshold": 1 / 150, "similarity": "cosine", "temperature": 1.0})
    assert_gradients_match(query, bank, chosen, TOLERANCE[dtype], DEVICE)


def test_bank_gradient_sums_many_chunks_of_rows(backend: str) -> None:
    query, bank = inputs(sized((5, 1, 7000, 64), (2, 1, 40, 5)), 30)
    assert_gradients_match(query, bank, {"threshold": 0.0, "shrink": "soft"}, 3e-5, DEVICE)


@many
@given(
    rows=st.integers(1, 150),
    items=st.integers(1, 300),
    width=st.sampled_from([3, 64]),
    partitions=st.integers(1, 3),
    temperature=st.floats(0.05, 20),
    scale=st.sampled_from([1e-10, 1e-8, 1.0, 1e8, 1e30]),
)
def test_cosine_weights_do_not_depend_on_the_length_of_the_query(
    backend: str, rows: int, items: int, width: int, partitions: int, temperature: float, scale: float
) -> None:
    query, bank = inputs((partitions, rows, width), items)
    chosen: dict[str, Any] = {"threshold": 0.0, "shrink": "none", "temperature": temperature}
    scaled = query * scale
    has_direction = scaled.norm(dim=-1) > 2e-12  # the norm's floor is 1e-12
    got = attention(scaled, bank, **chosen)
    assert_near(got[has_direction], reference(query.double(), bank.double(), **chosen)[has_direction], 3e-5)


def test_queries_whose_squares_leave_float32(backend: str) -> None:
    query, bank = inputs((1, 12, 64), 9)
    scales = torch.tensor([1e-37, 1e-30, 1e-20, 1e-14, 1e-11, 1e-9, 1e9, 1e14, 1e16, 1e20, 1e30, 1e36])
    scaled = query * scales[:, None]
    expected = reference(scaled.double(), bank.double(), threshold=0.1)
    assert_near(attention(scaled, bank, threshold=0.1), expected, 1e-5)


@pytest.mark.parametrize("temperature", [1e-3, 0.02, 0.0499, 0.05, 1.0, 1e3])
def test_cosine_at_any_temperature(backend: str, temperature: float) -> None:
    query, bank = inputs((2, 3, 20, 64), 37)
    query[0, 0, 0], query[0, 0, 1] = bank[0, 0], -bank[0, 0]  # the extremes: cosines of 1 and -1
    bank[0, 5] = -bank[0, 0]
    for chosen in ({"threshold": 0.0, "shrink": "none"}, {"threshold": 1e-3, "shrink": "hard", "renormalize": True}):
        got = attention(query, bank, temperature=temperature, **chosen)
        expected = reference(query.double(), bank.double(), temperature=temperature, **chosen)  # type: ignore[arg-type]
        assert_near(got, expected, 1e-5 + 2e-7 / temperature)
    equal = bank[:, :1].expand(-1, 37, -1)
    assert attention(query, equal, threshold=1 / 37, temperature=temperature).eq(0).all()


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_huge_and_tiny_logits_do_not_overflow(backend: str, scale: float) -> None:
    query, bank = inputs((1, 9, 64), 5)
    chosen: dict[str, Any] = {"threshold": 0.1, "shrink": "hard", "similarity": "dot", "temperature": 1.0}
    got = attention(query * scale, bank, **chosen)
    assert_near(got, reference((query * scale).double(), bank.double(), **chosen), 1e-5)


@pytest.mark.parametrize("shrink", ["soft", "hard"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_similarities_at_threshold_one_over_m_give_a_dead_row(
    backend: str, shrink: str, dtype: torch.dtype
) -> None:
    for items in (*range(2, sized(60, 6)), *sized((147, 150, 200, 999, 2000), ())):
        bank = torch.randn(1, 1, 64).to(dtype).expand(1, items, 64)
        query = torch.cat([torch.zeros(1, 1, 64), torch.randn(1, 2, 64)], dim=1).to(dtype)
        for renormalize in (False, True):
            read = attention(query, bank, threshold=1 / items, shrink=shrink, renormalize=renormalize)
            assert read.eq(0).all(), items
        stats = statistics(query, bank, threshold=1 / items, shrink=shrink)
        assert stats[0].tolist() == [1.0], items
        assert stats[1].item() == pytest.approx(math.log(items), rel=1e-6)


@pytest.mark.parametrize("shrink", ["soft", "hard", "none"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_statistics_equal_the_float64_definition(backend: str, shrink: str, similarity: str) -> None:
    query, bank = inputs(sized((3, 2, 700, 64), (2, 2, 9, 5)), sized(150, 12))
    query[0, 1, :7] = 0.0
    chosen = {"threshold": 1 / bank.shape[1], "shrink": shrink, "similarity": similarity, "temperature": 0.8}
    chosen = away_from_kinks(query, bank, chosen)
    dead_share, entropy = statistics(query, bank, **chosen)
    expected = reference_stats(query.double(), bank.double(), **chosen)  # type: ignore[arg-type]
    torch.testing.assert_close(dead_share.double(), expected.dead_share, rtol=1e-7, atol=0)
    torch.testing.assert_close(entropy.double(), expected.entropy, rtol=2e-6, atol=2e-6)


def test_zero_vectors_have_similarity_zero_and_no_gradient_through_it(backend: str) -> None:
    query, bank = inputs((2, 5, 64), 4)
    query[0, 2] = 0.0
    bank[1, 3] = 0.0
    chosen: dict[str, Any] = {"threshold": 0.1, "shrink": "hard", "temperature": 0.7}
    assert_gradients_match(query, bank, chosen, 3e-5, DEVICE)
    query.requires_grad_()
    read = attention(query, bank, **chosen)
    torch.testing.assert_close(read[0, 2], bank[0].mean(0))
    (grad,) = torch.autograd.grad(read.square().sum(), query)
    assert grad[0, 2].eq(0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_what_is_not_finite_poisons_its_own_row_or_partition_only(backend: str, similarity: str, bad: float) -> None:
    query, bank = inputs((2, 3, 20, 64), 21)
    clean = attention(query, bank, threshold=0.05, similarity=similarity)
    broken = query.clone()
    broken[1, 2, 5, 3] = bad
    expected = clean.clone()
    expected[1, 2, 5] = math.nan
    read = attention(broken, bank, threshold=0.05, similarity=similarity)
    torch.testing.assert_close(read, expected, rtol=0, atol=0, equal_nan=True)
    dead_share, entropy = statistics(broken, bank, threshold=0.05, similarity=similarity)
    assert entropy.isnan().tolist() == [False, False, True]
    assert dead_share.isfinite().all()
    bank[1, 20, 63] = bad
    expected = clean.clone()
    expected[:, 1] = math.nan
    read = attention(query, bank, threshold=0.05, similarity=similarity)
    torch.testing.assert_close(read, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (0, 0, 3, 4), (2, 2, 3, 0)])
def test_empty_queries_give_empty_reads_and_zero_bank_gradients(backend: str, shape: tuple[int, ...]) -> None:
    query = torch.empty(shape, requires_grad=True)
    bank = torch.randn(shape[1], 6, shape[3]).requires_grad_()
    read = attention(query, bank, threshold=0.1)
    assert read.shape == shape
    grads = torch.autograd.grad(read.sum(), (query, bank))
    assert grads[0].shape == query.shape
    assert torch.equal(grads[1], torch.zeros_like(bank))
    assert statistics(query, bank, threshold=0.1)[0].shape == (shape[1],)


def everything(query: Tensor, bank: Tensor) -> tuple[Tensor, ...]:
    """The read, the gradients of query and bank, the statistics."""
    leaves = query.detach().requires_grad_(), bank.detach().requires_grad_()
    read = memad_fast.bank_attention(*leaves, threshold=1 / bank.shape[1])
    upstream = torch.linspace(-1, 1, read.numel(), device=read.device).reshape(read.shape).to(read.dtype)
    stats = memad_fast.bank_attention_stats(*leaves, threshold=1 / bank.shape[1])
    return (read.detach(), *torch.autograd.grad(read, leaves, upstream), *stats)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_give_the_same_bits(backend: str, dtype: torch.dtype) -> None:
    base = torch.randn(4, 6, 3, 10, 66, device=DEVICE).to(dtype)
    bank = torch.randn(3, 7, 72, device=DEVICE).to(dtype)[..., 3:69]
    views = {
        "leading dimensions swapped": base.transpose(0, 1)[..., 2:],
        "every second": base[::2, :, :, ::3, :64],
        "rows between partitions": base.transpose(2, 3)[:, :, :3, :, :64],
        "expanded": base[:1, :, :, :1].expand(5, 6, 3, 4, 66),
        "last dimension strided": base.transpose(3, 4)[..., :10],
        "overlapping": base.flatten().as_strided((5, 3, 4, 64), (7, 5, 2, 1)),
    }
    for name, view in views.items():
        items = bank[:, :, : view.shape[-1]]
        for got, expected in zip(everything(view, items), everything(view.contiguous(), items), strict=True):
            assert torch.equal(got, expected), name


def test_cutting_a_feature_map_copies_nothing(backend: str) -> None:
    feature_map = torch.randn(3, 5, 8, 32, device=DEVICE)  # B, C, h, w, cut along h into 4 strips
    query = feature_map.view(3, 5, 4, 64).transpose(1, 2)
    read = memad_fast.bank_attention(query, torch.randn(4, 7, 64, device=DEVICE), threshold=1 / 7)
    assert read.stride() == query.stride()
    assert read.transpose(1, 2).reshape(3, 5, 8, 32).data_ptr() == read.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_a_batch_give_the_same_bits(backend: str, dtype: torch.dtype) -> None:
    query, bank = (x.to(DEVICE) for x in inputs(sized((6, 2, 300, 64), (3, 2, 9, 5)), 50, dtype))

    def read_and_gradient(part: slice) -> tuple[Tensor, Tensor]:
        leaf = query[part].detach().requires_grad_()
        read = memad_fast.bank_attention(leaf, bank, threshold=1 / 50)
        return read.detach(), torch.autograd.grad(read, leaf, query[part])[0]

    whole = read_and_gradient(slice(None))
    parts = [read_and_gradient(slice(n, n + 1)) for n in range(len(query))]
    for index, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[index] for part in parts]), expected)
    rows = [memad_fast.bank_attention(query[:, :, n : n + 1], bank, threshold=1 / 50) for n in range(0, 9)]
    assert torch.equal(torch.cat(rows, dim=2), whole[0][:, :, :9])
