"""ssim_map, ssim_loss and their gradients in Triton's interpreter: the public functions, on CPU tensors.

A row of an interpreted kernel costs up to 0.1 s, so most cases have windows of 3 or 5 pixels, which take the same code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import memad_fast
from memad_fast import _triton
from memad_fast.kernels import ssim
from memad_fast.ops.ssim import reference

pytestmark = [
    pytest.mark.skipif(not _triton.serves_cpu_tensors(), reason="Triton serves the GPU here: tests/gpu tests it there"),
    # The interpreter is numpy, which warns of the NaN and infinities that a test is about.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

# Of the map: what the contract promises, and half a unit in the last place of the output where that is coarser.
MAP_TOLERANCE = {torch.float32: 1e-4, torch.float16: 6e-4, torch.bfloat16: 4e-3}

# Of the gradient, relative to its largest value.
GRADIENT_TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _triton_backend() -> Iterator[None]:
    with memad_fast.use_backend("triton"):
        yield


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Tiles of 4 rows by 8 columns, a lane each, so that small images have several each way."""
    with mock.patch.multiple(ssim, _ROWS_OF_SMALL=4, _COLUMNS=(), _COLUMNS_REFLECTED_BACK=(), _lanes=lambda x: 8):
        yield


def image_pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """An image and a reconstruction of it, in [0, 1]: alike, but not the same."""
    x = torch.rand(shape)
    return x.to(dtype), (x + 0.2 * torch.randn(shape)).clamp(0, 1).to(dtype)


def assert_map_is_right(x: Tensor, y: Tensor, **options: Any) -> None:
    got = memad_fast.ssim_map(x, y, **options)
    expected = reference(x.double(), y.double(), **options)
    assert got.dtype == x.dtype
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=MAP_TOLERANCE[x.dtype], equal_nan=True)


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_the_usual_window_equals_the_float64_definition(padding: str) -> None:
    x, y = image_pair(1, 1, 11, 13)
    assert_map_is_right(x, y, padding=padding)
    expected = (1 - reference(x.double(), y.double(), padding=padding)).mean().item()
    assert memad_fast.ssim_loss(x, y, padding=padding).item() == pytest.approx(expected, rel=1e-5)


# 11 and 17 are the last windows with 4 and 2 columns a lane.
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("window_size", [1, 3, 13, 19])
def test_any_odd_window(window_size: int, padding: str) -> None:
    least = window_size if padding == "valid" else window_size // 2 + 1
    x, y = image_pair(1, 1, least, least + 2)
    assert_map_is_right(x, y, window_size=window_size, sigma=0.4 * window_size, data_range=2.0, padding=padding)


# Planes of several images and channels; of the other dtypes two planes.
@pytest.mark.parametrize(("images", "dtype"), [(2, torch.float32), (1, torch.float16), (1, torch.bfloat16)])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_several_planes_and_tiles(small_tiles: None, padding: str, images: int, dtype: torch.dtype) -> None:
    x, y = image_pair(images, 2, 7, 11, dtype=dtype)
    options = {"window_size": 3, "padding": padding}
    assert_map_is_right(x, y, **options)
    expected = (1 - reference(x.double(), y.double(), **options)).mean().item()
    assert memad_fast.ssim_loss(x, y, **options).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("columns", [2, 4])
def test_several_tiles_of_several_columns_a_lane(columns: int, padding: str) -> None:
    x, y = image_pair(1, 1, 5, 19)
    with mock.patch.multiple(ssim, _COLUMNS=((3, columns),), _lanes=lambda x: 2):
        assert_map_is_right(x, y, window_size=3, padding=padding)


def test_identical_images_have_loss_exactly_0(small_tiles: None) -> None:
    for image in (torch.rand(1, 1, 7, 12), torch.full((1, 1, 7, 12), 1e4)):
        for padding in ("valid", "same"):
            assert memad_fast.ssim_loss(image, image, window_size=3, padding=padding).item() == 0.0
            assert (memad_fast.ssim_map(image, image, window_size=3, padding=padding) == 1).all()


def test_a_nearly_perfect_reconstruction_keeps_its_digits() -> None:
    x = torch.rand(1, 1, 9, 40)
    y = x + 1e-4 * torch.randn(x.shape)
    expected = (1 - reference(x.double(), y.double(), 5)).mean().item()
    assert expected < 1e-6
    assert memad_fast.ssim_loss(x, y, window_size=5).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("offset", [-1000.0, 30000.0])
def test_an_offset_of_both_images_costs_no_accuracy(small_tiles: None, offset: float, padding: str) -> None:
    x, y = (image + offset for image in image_pair(1, 1, 8, 14))
    assert_map_is_right(x, y, window_size=5, padding=padding)


def test_an_offset_beside_a_dark_tile_costs_no_accuracy(small_tiles: None) -> None:
    """Each tile has its own centre; only windows that see the edge have none, and a large variance."""
    x, y = image_pair(1, 1, 6, 32)
    x[..., 16:] += 30000.0
    y[..., 16:] += 30000.0
    got = memad_fast.ssim_map(x, y, window_size=3)
    expected = reference(x.double(), y.double(), 3)
    away = torch.ones(30, dtype=torch.bool)
    away[6:18] = False  # the two tiles that see both
    torch.testing.assert_close(got[..., away].double(), expected[..., away], rtol=0, atol=1e-4)


def test_flat_bright_areas_beside_dark_ones_stay_within_the_bound() -> None:
    """The worst case for E[q²] − E[q]²: no centring helps, and the variance is far below C2."""
    x = torch.ones(1, 1, 5, 40)
    x[..., :10] = 0.0
    assert_map_is_right(x, x - 1e-3 * torch.rand(x.shape) * x, window_size=3, padding="same")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_a_pixel_that_is_no_number_stays_in_the_windows_that_see_it(
    small_tiles: None, padding: str, value: float
) -> None:
    x, y = image_pair(1, 2, 7, 14)
    broken = x.clone()
    broken[0, 1, 3, 7] = value
    options = {"window_size": 3, "padding": padding}
    clean = reference(x.double(), y.double(), **options)
    first = 2 if padding == "valid" else 1
    clean[0, 1, 3 - first : 6 - first, 7 - first : 10 - first] = torch.nan
    for pair in ((broken, y), (y, broken)):
        got = memad_fast.ssim_map(*pair, **options)
        torch.testing.assert_close(got.double(), clean, rtol=0, atol=1e-4, equal_nan=True)
    assert memad_fast.ssim_loss(broken, y, **options).isnan()


def test_one_huge_pixel_costs_no_accuracy_elsewhere() -> None:
    x, y = (image + 0.5 for image in image_pair(1, 1, 7, 20))
    x[0, 0, 2, 2] = 1e8
    seen = torch.zeros(7, 20, dtype=torch.bool)
    seen[1:4, 1:4] = True
    got = memad_fast.ssim_map(x, y, window_size=3, padding="same")[0, 0]
    expected = reference(x.double(), y.double(), 3, padding="same")[0, 0]
    torch.testing.assert_close(got.double()[~seen], expected[~seen], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 3, 16, 16), (2, 0, 16, 16)])
def test_no_image_gives_an_empty_map_and_no_loss(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    assert memad_fast.ssim_map(x, x).shape == (*shape[:2], 6, 6)
    assert memad_fast.ssim_loss(x, x).isnan()


def test_strided_and_expanded_inputs_give_the_same(small_tiles: None) -> None:
    x, y = image_pair(2, 2, 5, 12)
    for a, b in (
        (x.transpose(0, 1), y.transpose(0, 1)),
        (x[::2, 1:, 1:, 3:11], y[::2, 1:, 1:, 3:11]),
        (x[:1].expand(2, 2, 5, 12), y[1:2].expand(2, 2, 5, 12)),
        (x[..., ::2], y[..., ::2]),
        (x.to(memory_format=torch.channels_last), y),
        (x[:, :, :1].expand(2, 2, 5, 12), y),
    ):
        options = {"window_size": 3}
        assert torch.equal(memad_fast.ssim_map(a, b, **options), memad_fast.ssim_map(a.clone(), b.clone(), **options))


def test_results_do_not_depend_on_the_batch(small_tiles: None) -> None:
    x, y = image_pair(3, 1, 7, 10)
    whole = memad_fast.ssim_map(x, y, window_size=3)
    parts = [memad_fast.ssim_map(x[i : i + 1], y[i : i + 1], window_size=3) for i in range(3)]
    assert torch.equal(whole, torch.cat(parts))


def test_the_cpu_backend_gives_the_same_loss() -> None:
    x, y = image_pair(1, 2, 9, 20)
    loss = memad_fast.ssim_loss(x, y, window_size=5)
    with memad_fast.use_backend("cpu"):
        assert loss.item() == pytest.approx(memad_fast.ssim_loss(x, y, window_size=5).item(), rel=1e-6)


def assert_gradients_are_right(x: Tensor, y: Tensor, **options: Any) -> None:
    """Of the map, for a random gradient, and of the loss, for an expanded one."""
    got = [image.clone().requires_grad_() for image in (x, y)]
    wide = [image.double().requires_grad_() for image in (x, y)]
    map_, expected = memad_fast.ssim_map(*got, **options), reference(*wide, **options)
    grad = torch.randn(map_.shape).to(x.dtype)
    pairs = [
        (torch.autograd.grad(map_, got, grad), torch.autograd.grad(expected, wide, grad.double(), retain_graph=True)),
        (
            torch.autograd.grad(3 * memad_fast.ssim_loss(*got, **options), got),
            torch.autograd.grad(3 * (1 - expected).mean(), wide),
        ),
    ]
    for ours, theirs in pairs:
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == x.dtype
            assert a.is_contiguous()
            assert (a.double() - b).abs().max() < GRADIENT_TOLERANCE[x.dtype] * b.abs().max()


@pytest.mark.parametrize(("channels", "dtype"), [(2, torch.float32), (1, torch.float16), (1, torch.bfloat16)])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_gradients_equal_the_references(small_tiles: None, padding: str, channels: int, dtype: torch.dtype) -> None:
    assert_gradients_are_right(*image_pair(1, channels, 6, 10, dtype=dtype), window_size=3, padding=padding)


# Windows that reach both borders at once, and that are a pixel or all of the image.
@pytest.mark.parametrize(
    ("shape", "window_size", "padding"),
    [((4, 5), 7, "same"), ((3, 4), 1, "same"), ((3, 4), 1, "valid"), ((5, 5), 5, "valid"), ((2, 9), 3, "same")],
)
def test_gradients_at_borders(small_tiles: None, shape: tuple[int, int], window_size: int, padding: str) -> None:
    assert_gradients_are_right(*image_pair(1, 1, *shape), window_size=window_size, padding=padding)


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_gradients_with_several_columns_a_lane(padding: str) -> None:
    with mock.patch.multiple(ssim, _COLUMNS=((3, 4),), _COLUMNS_REFLECTED_BACK=((3, 2),), _lanes=lambda x: 2):
        assert_gradients_are_right(*image_pair(1, 1, 5, 13), window_size=3, padding=padding)


def test_gradients_of_many_images_take_the_workspace_in_turns(small_tiles: None) -> None:
    x, y = image_pair(3, 1, 4, 6)
    with mock.patch.object(ssim, "_WORKSPACE", 2 * 16 * 2 * 16):  # of two images of 2 by 4 windows, 16 a row
        assert_gradients_are_right(x, y, window_size=3)


@pytest.mark.parametrize("offset", [-1000.0, 30000.0])
def test_an_offset_of_both_images_costs_gradients_no_accuracy(small_tiles: None, offset: float) -> None:
    x, y = (image + offset for image in image_pair(1, 1, 6, 12))
    assert_gradients_are_right(x, y, window_size=3)


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_gradients_are_nan_where_a_window_sees_a_nan(small_tiles: None, padding: str) -> None:
    x, y = image_pair(1, 1, 8, 12)
    x[0, 0, 4, 6] = torch.nan
    x.requires_grad_()
    grad = torch.autograd.grad(memad_fast.ssim_loss(x, y, window_size=3, padding=padding), x)[0]
    assert grad[0, 0, 2:7, 4:9].isnan().all()
    assert grad.isnan().sum() == 5 * 5


def test_gradient_is_zero_where_the_images_are_identical(small_tiles: None) -> None:
    x = torch.rand(1, 1, 6, 9, requires_grad=True)
    gradient = torch.autograd.grad(memad_fast.ssim_loss(x, x.detach().clone(), window_size=3), x)[0]
    assert gradient.abs().max() == 0.0


def test_gradients_of_no_image_are_empty() -> None:
    x = torch.empty(0, 3, 16, 16, requires_grad=True)
    assert torch.autograd.grad(memad_fast.ssim_loss(x, x), x)[0].shape == x.shape


def test_opcheck(small_tiles: None) -> None:
    x, y = (image.requires_grad_() for image in image_pair(1, 1, 4, 5))
    for op in (torch.ops.memad_fast.ssim_map.default, torch.ops.memad_fast.ssim_loss.default):
        torch.library.opcheck(op, (x, y, 3, 1.5, 1.0, False))
