"""ssim_map and ssim_loss on the GPU: values and gradients of the float64 definition."""

from __future__ import annotations

import pytest
import torch
from carried import on
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_pairs import GRADIENT_TOLERANCE, MAP_TOLERANCE, image_pair, relative
from torch import Tensor
from where import DEVICE, DTYPES, each_backend, sized

import memad_fast
from memad_fast.ops.ssim import reference

pytestmark = each_backend("ssim_map", "ssim_loss", "ssim_map_backward", "ssim_loss_backward")

ssim_map, ssim_loss = on(DEVICE, memad_fast.ssim_map), on(DEVICE, memad_fast.ssim_loss)
SHAPES = sized(
    [
        (2, 3, 16, 17), (1, 1, 11, 11), (1, 2, 70, 150), (1, 1, 13, 300), (1, 1, 140, 13), (300, 1, 12, 33),
        (2, 1, 257, 129),
    ],
    [(1, 2, 12, 13)],
)  # fmt: skip


def assert_equals_the_definition(x: Tensor, y: Tensor, **options: object) -> None:
    """The map, the loss and all their gradients."""
    dtype = x.dtype
    got = [image.clone().requires_grad_() for image in (x, y)]
    wide = [image.double().requires_grad_() for image in (x, y)]
    map_, expected = ssim_map(*got, **options), reference(*wide, **options)
    loss = ssim_loss(*got, **options)
    assert (map_.dtype, loss.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(map_.double(), expected, rtol=0, atol=MAP_TOLERANCE[dtype])
    assert map_.abs().max() <= 1.0
    assert loss.item() == pytest.approx((1 - expected).mean().item(), rel=1e-5, abs=1e-9)
    grad = torch.randn(map_.shape).to(dtype)
    pairs = [
        (torch.autograd.grad(map_, got, grad), torch.autograd.grad(expected, wide, grad.double(), retain_graph=True)),
        (torch.autograd.grad(3 * loss, got), torch.autograd.grad(3 * (1 - expected).mean(), wide)),
    ]
    for ours, theirs in pairs:
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == dtype
            assert relative(a, b) < GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_float64_definition(backend: str, shape: tuple[int, ...], padding: str, dtype: torch.dtype) -> None:
    assert_equals_the_definition(*image_pair(*shape, dtype=dtype), padding=padding)


# Of few window sizes, as each is a compilation.
@settings(max_examples=sized(100, 5), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    height=st.integers(1, sized(150, 12)),
    width=st.integers(1, sized(150, 12)),
    window_size=st.sampled_from([1, 7, 11, 13]),
    padding=st.sampled_from(["valid", "same"]),
    scale=st.sampled_from([1e-3, 1.0, 255.0]),
    seed=st.integers(0, 999),
)
def test_any_size(
    backend: str, height: int, width: int, window_size: int, padding: str, scale: float, seed: int
) -> None:
    least = window_size if padding == "valid" else window_size // 2 + 1
    torch.manual_seed(seed)
    x, y = (scale * image for image in image_pair(1, 2, max(height, least), max(width, least)))
    assert_equals_the_definition(x, y, window_size=window_size, data_range=scale, padding=padding)


def test_identical_images_have_loss_exactly_0_and_no_gradient(backend: str) -> None:
    for image in (torch.rand(1, 2, 80, 90), torch.zeros(1, 1, 12, 12), torch.full((1, 1, 12, 12), 1e4)):
        for padding in ("valid", "same"):
            assert ssim_loss(image, image, padding=padding).item() == 0.0
            assert (ssim_map(image, image, padding=padding) == 1).all()
    x = torch.rand(1, 1, 30, 30, requires_grad=True)
    assert torch.autograd.grad(ssim_loss(x, x.detach().clone()), x)[0].abs().max() == 0.0


def test_a_nearly_perfect_reconstruction_keeps_its_digits(backend: str) -> None:
    x = torch.rand(1, 1, 60, 60)
    y = x + 1e-4 * torch.randn(x.shape)
    expected = (1 - reference(x.double(), y.double())).mean().item()
    assert ssim_loss(x, y).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("offset", [10.0, -1000.0, 30000.0])
def test_an_offset_of_both_images_costs_no_accuracy(backend: str, offset: float) -> None:
    x, y = (image + offset for image in image_pair(1, 1, 100, 200))
    for padding in ("valid", "same"):
        expected = reference(x.double(), y.double(), padding=padding)
        torch.testing.assert_close(ssim_map(x, y, padding=padding).double(), expected, rtol=0, atol=1e-4)


def test_flat_bright_areas_beside_dark_ones_and_one_huge_pixel(backend: str) -> None:
    x = torch.ones(1, 1, 128, 128)
    x[..., :20] = 0.0
    y = x - 1e-3 * torch.rand(x.shape) * x
    expected = reference(x.double(), y.double(), padding="same")
    torch.testing.assert_close(ssim_map(x, y, padding="same").double(), expected, rtol=0, atol=1e-4)
    x, y = (image + 0.5 for image in image_pair(1, 1, 60, 60))
    x[0, 0, 5, 5] = 1e8
    seen = torch.zeros(60, 60, dtype=torch.bool)
    seen[:11, :11] = True
    got = ssim_map(x, y, padding="same")[0, 0]
    expected = reference(x.double(), y.double(), padding="same")[0, 0]
    torch.testing.assert_close(got.double()[~seen], expected[~seen], rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_a_pixel_that_is_no_number_stays_in_the_windows_that_see_it(backend: str, padding: str, value: float) -> None:
    x, y = image_pair(1, 2, 40, 150)
    broken = x.clone()
    broken[0, 1, 20, 75] = value
    clean = ssim_map(x, y, padding=padding)
    first = 10 if padding == "valid" else 5
    rows, columns = slice(20 - first, 31 - first), slice(75 - first, 86 - first)
    for got in (ssim_map(broken, y, padding=padding), ssim_map(y, broken, padding=padding)):
        assert got[0, 1, rows, columns].isnan().all()
        assert got.isnan().sum() == 11 * 11
        torch.testing.assert_close(got[~got.isnan()], clean[~got.isnan()], rtol=0, atol=1e-4)
    assert ssim_loss(broken, y, padding=padding).isnan()
    wanted = broken.clone().requires_grad_()
    grad = torch.autograd.grad(ssim_loss(wanted, y, padding=padding), wanted)[0]
    assert grad[0, 1, 10:31, 65:86].isnan().all()
    assert grad.isnan().sum() == 21 * 21


@pytest.mark.parametrize("shape", [(0, 3, 16, 16), (2, 0, 16, 16)])
def test_no_image_gives_an_empty_map_and_no_loss(backend: str, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, requires_grad=True)
    assert ssim_map(x, x).shape == (*shape[:2], 6, 6)
    loss = ssim_loss(x, x)
    assert loss.isnan()
    assert torch.autograd.grad(loss, x)[0].shape == shape


def test_views_and_parts_of_a_batch_give_the_same_bits(backend: str) -> None:
    x, y = (image.to(DEVICE) for image in image_pair(4, 3, 30, 40))

    def everything(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        leaves = [image.detach().requires_grad_() for image in (x, y)]
        map_ = memad_fast.ssim_map(*leaves)
        grads = torch.autograd.grad(map_.sum(), leaves)
        return (map_.detach(), *grads, *torch.autograd.grad(memad_fast.ssim_loss(*leaves), leaves))

    views = [
        (x.transpose(0, 1), y.transpose(0, 1)),
        (x[::2, :, 3:28, 5:37], y[::2, :, 3:28, 5:37]),
        (x[:1].expand(5, 3, 30, 40), y[1:2].expand(5, 3, 30, 40)),
        (x[..., ::2], y[..., ::2]),
        (x.to(memory_format=torch.channels_last), y),
        (x[:, :, :1].expand(4, 3, 30, 40), y),
    ]
    for a, b in views:
        for got, expected in zip(everything(a, b), everything(a.contiguous(), b.contiguous()), strict=True):
            assert torch.equal(got, expected)
    whole, parts = everything(x, y), [everything(x[n : n + 1], y[n : n + 1]) for n in range(4)]
    for index in range(3):
        assert torch.equal(torch.cat([part[index] for part in parts]), whole[index])
