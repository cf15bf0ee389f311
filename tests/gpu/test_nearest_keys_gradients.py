"""nearest_keys on the GPU: what a search tells of itself, and its gradients."""

from __future__ import annotations

import pytest
import torch
from searches import METRICS
from where import DEVICE, DTYPES, each_backend, sized

import memad_fast
from memad_fast.ops.nearest_keys import reference


@each_backend("nearest_keys_stats")
class TestStats:
    def test_codes_leave_few_of_random_keys_to_float64(self, backend: str) -> None:
        query, keys = torch.randn(50, 64, device=DEVICE), torch.randn(1000, 64, device=DEVICE)
        survivors, full_path = memad_fast.nearest_keys_stats(query, keys)
        assert survivors.shape == full_path.shape == (50,)
        assert (survivors.dtype, full_path.dtype) == (torch.int64, torch.bool)
        assert (survivors >= 1).all()
        assert (survivors < 200).all()
        assert not full_path.any()

    def test_equal_rows_all_survive_and_no_row_that_is_not_finite(self, backend: str) -> None:
        query, keys = torch.randn(3, 64), torch.ones(200, 64)
        query[1, 4] = torch.nan
        survivors, full_path = memad_fast.nearest_keys_stats(query.to(DEVICE), keys.to(DEVICE), 2)
        assert survivors[1] == 0
        assert not full_path[1]
        assert (survivors[[0, 2]] >= 200).all()


@each_backend("nearest_keys", "nearest_keys_backward_query", "nearest_keys_backward_keys")
class TestGradients:
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_they_equal_the_references(self, backend: str, metric: str, dtype: torch.dtype) -> None:
        query, keys = torch.randn(sized(700, 25), 64).to(dtype), torch.randn(sized(150, 12), 64).to(dtype)
        query[3, 2] = torch.nan
        keys[4] = 0.0
        keys[5, 1] = torch.inf
        weights = torch.randn(len(query), 3).masked_fill(torch.arange(len(query))[:, None] == 3, 0.0)
        results = []
        for q, rows, call, device in (
            (query.to(DEVICE), keys.to(DEVICE), memad_fast.nearest_keys, DEVICE),
            (query.double(), keys.double(), reference, "cpu"),
        ):
            q.requires_grad_()
            rows.requires_grad_()
            distances, _ = call(q, rows, 3, metric=metric)
            results.append(torch.autograd.grad((distances.nan_to_num() * weights.to(device)).sum(), (q, rows)))
        tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}[dtype]
        for got, expected in zip(*results, strict=True):
            assert got.dtype == dtype
            largest = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(got.double().cpu(), expected, rtol=tolerance, atol=tolerance * largest)

    def test_many_queries_of_one_key_are_summed_in_one_order(self, backend: str) -> None:
        query = torch.randn(sized(20_000, 60), 64, device=DEVICE, requires_grad=True)
        keys = torch.randn(3, 64, device=DEVICE, requires_grad=True)
        first, second = (
            torch.autograd.grad(memad_fast.nearest_keys(query, keys)[0].sum(), (query, keys)) for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with torch.no_grad():
            nearest = keys[memad_fast.nearest_keys(query, keys)[1][:, 0]]
            each = -2 * (query.double() - nearest.double())
        torch.testing.assert_close(first[0].double(), -each, rtol=1e-6, atol=1e-6)

    def test_slots_that_found_nothing_give_none(self, backend: str) -> None:
        query = torch.full((2, 64), torch.nan, device=DEVICE, requires_grad=True)
        keys = torch.randn(4, 64, device=DEVICE, requires_grad=True)
        distances, _ = memad_fast.nearest_keys(query, keys, 2)
        for gradient in torch.autograd.grad(distances.sum(), (query, keys)):
            assert (gradient == 0).all()
