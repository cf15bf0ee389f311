"""The packed keys of a GPU, in Triton's interpreter: codes and numbers that hold what the proof of the search needs."""

from __future__ import annotations

import pytest
import torch
from searches import METRICS
from torch import Tensor

from memad_fast import _triton
from memad_fast.ops.prepare_keys import packed_bytes

pytestmark = pytest.mark.skipif(
    not _triton.serves_cpu_tensors(), reason="Triton's interpreter is off (tests/gpu does the same on a GPU)"
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def packed_parts(keys: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [Mp, Dp], numbers [5, Mp] and centre [Dp] of packed keys."""
    from memad_fast.kernels import prepare_keys

    packed = prepare_keys.prepare_keys(keys, metric)
    layout = prepare_keys.Layout.of(*keys.shape)
    codes, numbers, centre = layout.parts(packed)
    return codes.view(layout.rows, layout.width), numbers.view(5, layout.rows), centre


def centred(rows: Tensor, centre: Tensor, metric: str) -> Tensor:
    """In float64."""
    rows = rows.double()
    if metric == "cosine":
        norm = rows.norm(dim=1, keepdim=True)
        rows = torch.where(norm > 0, rows / norm, 0.0)
    return rows - centre[: rows.shape[1]].double()


@pytest.mark.parametrize("shape", [(1, 1), (128, 64), (129, 65), (300, 0), (5, 1000)])
def test_the_size_is_what_the_fake_kernel_says(shape: tuple[int, int]) -> None:
    from memad_fast.kernels import prepare_keys

    packed = prepare_keys.prepare_keys(torch.randn(shape), "l2")
    assert packed.shape == (packed_bytes(*shape, on_gpu=True),)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e15, 1e-19])
def test_the_numbers_bound_what_codes_leave_out(dtype: torch.dtype, metric: str, magnitude: float) -> None:
    keys = (magnitude * (torch.randn(150, 70) + 3)).to(dtype)
    keys[1] = 0.0
    keys = keys.clamp(-6e4, 6e4) if dtype == torch.float16 else keys
    codes, numbers, centre = packed_parts(keys, metric)
    base, scale, residual, norm, slack = numbers[:, :150].double()
    rows = centred(keys, centre, metric)
    coded = scale[:, None] * codes[:150, :70].double()
    assert (residual >= (rows - coded).norm(dim=1)).all()
    assert (norm >= coded.norm(dim=1)).all()
    height = 0.5 * rows.square().sum(1) if metric == "l2" else torch.zeros(150)
    assert (base < height).all()
    assert (base + 2 * slack > height).all()
    if magnitude == 1.0 or (metric == "cosine" and dtype != torch.float16):
        assert codes.abs().max() == 127
        used = rows.norm(dim=1) > 0
        assert (residual[used] < 0.03 * rows.norm(dim=1)[used] + 1e-6).all(), "a bound that prunes nothing"


@pytest.mark.parametrize("metric", METRICS)
def test_no_score_lies_outside_its_interval(metric: str) -> None:
    """For queries that are their own codes: beta is 0, and alpha the norm."""
    keys = torch.randn(200, 40)
    codes, numbers, centre = packed_parts(keys, metric)
    base, scale, residual, _, slack = numbers[:, :200].double()
    rows = centred(keys, centre, metric)
    query = torch.randint(-127, 128, (50, 40)).double()
    score = (0.5 * rows.square().sum(1) if metric == "l2" else 0.0) - query @ rows.T
    low = base - scale * (query @ codes[:200, :40].double().T) - query.norm(dim=1)[:, None] * residual
    high = low + 2 * (query.norm(dim=1)[:, None] * residual + slack)
    assert (low <= score).all()
    assert (score <= high).all()
    assert ((high - low) < 0.05 * query.norm(dim=1)[:, None] * rows.norm(dim=1)).all(), "a bound that prunes nothing"


def test_padding_and_rows_that_no_screen_holds() -> None:
    keys = torch.randn(130, 70)
    keys[3, 4], keys[5, 6], keys[7] = torch.nan, torch.inf, keys[7] * 1e25
    codes, numbers, centre = packed_parts(keys, "l2")
    base, scale, residual, norm, slack = numbers
    assert codes.shape == (256, 128)
    assert (codes[:, 70:] == 0).all()
    assert (centre[70:] == 0).all()
    never = [3, 5, *range(130, 256)]
    assert (base[never] == torch.inf).all()
    assert (slack[never] == 0).all()
    assert base[7] == -torch.inf
    assert slack[7] == torch.inf
    for number in (scale, residual, norm):
        assert (number[[7, *never]] == 0).all()
    assert (codes[[7, *never]] == 0).all()
    assert base[[0, 1, 2, 4, 6, 8]].isfinite().all()


@pytest.mark.parametrize("metric", METRICS)
def test_the_centre_is_the_mean_of_finite_rows(metric: str) -> None:
    keys = torch.randn(1000, 9) + torch.arange(9)
    keys[::7, 2] = torch.nan
    _, _, centre = packed_parts(keys, metric)
    sample = keys[:768:3]  # 256 rows
    expected = centred(sample[sample.isfinite().all(1)], torch.zeros(9), metric).mean(0)
    torch.testing.assert_close(centre[:9].double(), expected, rtol=1e-6, atol=1e-7)
    assert (packed_parts(torch.full((3, 9), torch.nan), metric)[2] == 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_rows_packed_again_are_packed_as_at_first(metric: str) -> None:
    from memad_fast.kernels import prepare_keys

    keys = torch.randn(150, 70)
    packed = prepare_keys.prepare_keys(keys, metric)
    expected = packed.clone()
    rows = torch.tensor([149, 3, 0, 77])
    prepare_keys.prepare_keys_rows_(packed, keys.index_fill(0, rows, 5.0), rows, metric)
    assert not torch.equal(packed, expected)
    prepare_keys.prepare_keys_rows_(packed, keys, rows, metric)
    assert torch.equal(packed, expected)


def test_a_row_outside_the_keys_is_skipped() -> None:
    from memad_fast.kernels import prepare_keys

    keys = torch.randn(70, 40)
    packed = prepare_keys.prepare_keys(keys, "l2")
    expected = packed.clone()
    keys[4] = 9.0
    prepare_keys.prepare_keys_rows_(packed, keys, torch.tensor([-1, 70, 100, 2**40]), "l2")
    assert torch.equal(packed, expected)
    prepare_keys.prepare_keys_rows_(packed, keys, torch.empty(0, dtype=torch.int64), "l2")
    assert torch.equal(packed, expected)
