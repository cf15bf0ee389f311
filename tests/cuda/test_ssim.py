"""The CUDA kernels of ssim on the model of CUDA (tests/cuda_model): in tiles, and windows too wide for those."""

from __future__ import annotations

import pytest
import torch
from cuda_model.build import Model, at_end_of_page, model, needs_compiler
from image_pairs import DTYPES, GRADIENT_TOLERANCE, MAP_TOLERANCE, image_pair, relative
from torch import Tensor

from memad_fast.ops.ssim import reference

pytestmark = needs_compiler

SHIM = """
#include "cuda/ssim.cu"

using namespace memad_fast::cuda;

static SsimPlanes planes(const void* data, const int64_t* strides) {
  return {data, strides[0], strides[1], strides[2]};
}

// sizes: batch, channels, height, width, window size, whether borders are reflected, dtype
static SsimInput input(const void* x, const int64_t* x_strides, const void* y, const int64_t* y_strides,
                       const int64_t* sizes, double sigma, double data_range) {
  return {planes(x, x_strides), planes(y, y_strides), static_cast<memad_fast::Dtype>(sizes[6]), sizes[0], sizes[1],
          sizes[2], sizes[3], sizes[4], sigma, data_range, sizes[5] != 0};
}

static const int64_t kNoStrides[4] = {};

extern "C" int64_t workspace(const int64_t* sizes, int64_t pass) {
  const SsimInput args = input(nullptr, kNoStrides, nullptr, kNoStrides, sizes, 1.0, 1.0);
  if (pass == 0) return ssim_map_workspace(args);
  if (pass == 1) return ssim_loss_workspace(args);
  return ssim_backward_workspace({args, {}, 0, nullptr, nullptr, nullptr});
}

extern "C" int map(const void* x, const int64_t* x_strides, const void* y, const int64_t* y_strides,
                   const int64_t* sizes, double sigma, double data_range, void* out, void* workspace) {
  return ssim_map(input(x, x_strides, y, y_strides, sizes, sigma, data_range), out, workspace, nullptr);
}

extern "C" int loss(const void* x, const int64_t* x_strides, const void* y, const int64_t* y_strides,
                    const int64_t* sizes, double sigma, double data_range, float* out, void* workspace) {
  return ssim_loss(input(x, x_strides, y, y_strides, sizes, sigma, data_range), out, workspace, nullptr);
}

extern "C" int backward(const void* x, const int64_t* x_strides, const void* y, const int64_t* y_strides,
                        const int64_t* sizes, double sigma, double data_range, const void* grad_map,
                        const int64_t* grad_strides, const float* grad_loss, void* grad_x, void* grad_y,
                        void* workspace) {
  return ssim_backward({input(x, x_strides, y, y_strides, sizes, sigma, data_range), planes(grad_map, grad_strides),
                        grad_strides[3], grad_loss, grad_x, grad_y}, workspace, nullptr);
}
"""
MAP, LOSS, BACKWARD = range(3)


class Kernels:
    """The launchers, with tensors."""

    def __init__(self, library: Model) -> None:
        self.library = library

    def _arguments(
        self, x: Tensor, y: Tensor, window_size: int, sigma: float, data_range: float, padding: str
    ) -> tuple[object, ...]:
        sizes = torch.tensor([*x.shape, window_size, padding == "same", DTYPES.index(x.dtype)])
        return x, torch.tensor(x.stride()), y, torch.tensor(y.stride()), sizes, sigma, data_range

    def _workspace(self, arguments: tuple[object, ...], which: int) -> Tensor:
        size = self.library.value("workspace", arguments[4], which)
        return at_end_of_page(torch.full((-(-size // 16) * 16,), 0xFF, dtype=torch.uint8))

    def map(
        self, x: Tensor, y: Tensor, window_size: int = 11, sigma: float = 1.5, data_range: float = 1.0,
        padding: str = "valid"
    ) -> Tensor:  # fmt: skip
        arguments = self._arguments(x, y, window_size, sigma, data_range, padding)
        margin = 0 if padding == "same" else window_size - 1
        out = at_end_of_page(x.new_full((*x.shape[:2], x.shape[2] - margin, x.shape[3] - margin), torch.nan))
        self.library.call("map", *arguments, out, self._workspace(arguments, MAP))
        return out

    def loss(
        self, x: Tensor, y: Tensor, window_size: int = 11, sigma: float = 1.5, data_range: float = 1.0,
        padding: str = "valid"
    ) -> Tensor:  # fmt: skip
        arguments = self._arguments(x, y, window_size, sigma, data_range, padding)
        out = torch.full((), torch.nan)
        self.library.call("loss", *arguments, out, self._workspace(arguments, LOSS))
        return out

    def backward(
        self, grad: Tensor, x: Tensor, y: Tensor, window_size: int = 11, sigma: float = 1.5, data_range: float = 1.0,
        padding: str = "valid"
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``grad``: of the loss where it has no dimensions, else of the map."""
        arguments = self._arguments(x, y, window_size, sigma, data_range, padding)
        grads = tuple(at_end_of_page(x.new_full(x.shape, torch.nan)) for _ in range(2))
        of_map, of_loss = (None, grad) if grad.dim() == 0 else (grad, None)
        strides = torch.tensor(grad.stride() or (0, 0, 0, 0))
        workspace = self._workspace(arguments, BACKWARD)
        self.library.call("backward", *arguments, of_map, strides, of_loss, *grads, workspace)
        return grads


# The devices that differ in what a block may have of shared memory.
@pytest.fixture(params=["sm_90", "sm_120"])
def device(request: pytest.FixtureRequest) -> Kernels:
    library = model(SHIM)
    library.set_device(*{"sm_90": (90, 132, 227 << 10), "sm_120": (120, 188, 99 << 10)}[request.param])
    library.set_order("forward")
    return Kernels(library)


@pytest.fixture
def kernels() -> Kernels:
    library = model(SHIM)
    library.set_device(90, 132, 227 << 10)
    library.set_order("forward")
    return Kernels(library)


def assert_right(kernels: Kernels, x: Tensor, y: Tensor, **options: object) -> None:
    """The map, the loss and the gradients of both, against the definition in float64."""
    wide = [image.double().requires_grad_() for image in (x, y)]
    expected = reference(*wide, **options)
    got = kernels.map(x, y, **options)
    torch.testing.assert_close(got.double(), expected.detach(), rtol=0, atol=MAP_TOLERANCE[x.dtype])
    assert got.abs().max() <= 1
    loss = (1 - expected).mean()
    assert kernels.loss(x, y, **options).item() == pytest.approx(loss.item(), rel=1e-5)
    grad = torch.randn(expected.shape).to(x.dtype)
    pairs = [
        (
            kernels.backward(grad, x, y, **options),
            torch.autograd.grad(expected, wide, grad.double(), retain_graph=True),
        ),
        (kernels.backward(torch.tensor(3.0), x, y, **options), torch.autograd.grad(3 * loss, wide)),
    ]
    for ours, theirs in pairs:
        for a, b in zip(ours, theirs, strict=True):
            assert relative(a, b) < GRADIENT_TOLERANCE[x.dtype]


# One tile and less, and several tiles of 64 x 32 windows and of 32 x 32 pixels.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("shape", [(2, 2, 16, 17), (1, 1, 11, 11), (1, 1, 77, 45)])
def test_equals_the_float64_definition(
    kernels: Kernels, shape: tuple[int, ...], padding: str, dtype: torch.dtype
) -> None:
    assert_right(kernels, *image_pair(*shape, dtype=dtype), padding=padding)


# All sizes of tiles: up to 11, up to 21, up to 33 taps; and windows too wide for them.
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("window_size", [1, 3, 9, 11, 13, 21, 23, 33, 35])
def test_any_odd_window(device: Kernels, window_size: int, padding: str) -> None:
    x, y = image_pair(1, 1, 36, 43)
    options = {"window_size": window_size, "sigma": 0.2 * window_size, "data_range": 2.0, "padding": padding}
    assert_right(device, x, y, **options)


# Where a border is reflected more than once by the tile's margin, and where all pixels are borders.
@pytest.mark.parametrize(
    ("shape", "window_size", "padding"),
    [
        ((6, 7), 11, "same"), ((8, 7), 13, "same"), ((2, 9), 3, "same"), ((1, 4), 1, "same"), ((1, 1), 1, "valid"),
        ((18, 19), 35, "same"), ((35, 35), 35, "valid"), ((33, 34), 33, "valid"), ((17, 20), 33, "same"),
    ],
)  # fmt: skip
def test_images_as_small_as_the_window(
    kernels: Kernels, shape: tuple[int, int], window_size: int, padding: str
) -> None:
    assert_right(kernels, *image_pair(1, 2, *shape), window_size=window_size, padding=padding)


@pytest.mark.parametrize("scale", [1e-3, 255.0])
def test_any_range(kernels: Kernels, scale: float) -> None:
    x, y = (scale * image for image in image_pair(1, 1, 21, 34))
    assert_right(kernels, x, y, data_range=scale, padding="same")


@pytest.mark.parametrize("window_size", [5, 11, 35])
def test_identical_images_have_loss_exactly_0_and_no_gradient(kernels: Kernels, window_size: int) -> None:
    for image in (torch.rand(1, 1, 36, 40), torch.zeros(1, 1, 36, 36), torch.full((1, 1, 36, 36), 1e4)):
        for padding in ("valid", "same"):
            options = {"window_size": window_size, "padding": padding}
            assert kernels.loss(image, image, **options).item() == 0.0
            assert (kernels.map(image, image, **options) == 1).all()
            for grad in kernels.backward(torch.tensor(1.0), image, image, **options):
                assert grad.abs().max() == 0.0


def test_a_nearly_perfect_reconstruction_keeps_its_digits(kernels: Kernels) -> None:
    x = torch.rand(1, 1, 60, 60)
    y = x + 1e-4 * torch.randn(x.shape)
    for window_size in (11, 35):
        expected = (1 - reference(x.double(), y.double(), window_size)).mean().item()
        assert expected < 1e-6
        assert kernels.loss(x, y, window_size).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("window_size", [7, 11, 35])
@pytest.mark.parametrize("offset", [-1000.0, 30000.0])
def test_an_offset_of_both_images_costs_no_accuracy(kernels: Kernels, offset: float, window_size: int) -> None:
    x, y = (image + offset for image in image_pair(1, 1, 40, 43))
    for padding in ("valid", "same"):
        assert_right(kernels, x, y, window_size=window_size, padding=padding)


def test_an_offset_of_one_part_costs_the_other_part_no_accuracy(kernels: Kernels) -> None:
    """Each tile has its own centre."""
    x, y = image_pair(1, 1, 12, 150)
    wide = [image.double().requires_grad_() for image in (x, y)]
    for image in (x, y, wide[0].data, wide[1].data):
        image[..., :40] += 30000.0
    expected = reference(*wide)
    got = kernels.map(x, y)
    torch.testing.assert_close(got[..., 64:].double(), expected[..., 64:].detach(), rtol=0, atol=1e-4)
    grad = torch.randn(expected.shape)
    of_expected = torch.autograd.grad(expected, wide, grad.double())
    for a, b in zip(kernels.backward(grad, x, y), of_expected, strict=True):
        assert relative(a[..., 96:], b[..., 96:]) < GRADIENT_TOLERANCE[torch.float32]


def test_flat_bright_areas_beside_dark_ones_stay_within_the_bound(kernels: Kernels) -> None:
    """The worst case for E[q²] − E[q]²: no centring helps, and the variance is far below C2."""
    x = torch.ones(1, 1, 40, 60)
    x[..., :20] = 0.0
    y = x - 1e-3 * torch.rand(x.shape) * x
    for window_size in (11, 35):
        expected = reference(x.double(), y.double(), window_size, padding="same")
        got = kernels.map(x, y, window_size, padding="same")
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("window_size", [3, 11, 35])
def test_a_pixel_that_is_no_number_stays_in_the_windows_that_see_it(
    kernels: Kernels, window_size: int, padding: str, value: float
) -> None:
    x, y = image_pair(1, 2, 40, 75)
    broken = x.clone()
    broken[0, 1, 20, 37] = value
    options = {"window_size": window_size, "padding": padding}
    # Windows that see the pixel, by their first row and column; pixels that those windows see.
    clean, radius = kernels.map(x, y, **options), window_size // 2
    first = radius if padding == "same" else window_size - 1
    sees = torch.zeros(clean.shape, dtype=torch.bool)
    sees[0, 1, max(20 - first, 0) : 21 - first + 2 * radius, max(37 - first, 0) : 38 - first + 2 * radius] = True
    for got in (kernels.map(broken, y, **options), kernels.map(y, broken, **options)):
        assert torch.equal(got.isnan(), sees)
        torch.testing.assert_close(got[~sees], clean[~sees], rtol=0, atol=1e-4)
    assert kernels.loss(broken, y, **options).isnan()
    seen = torch.zeros(x.shape, dtype=torch.bool)
    reach = 2 * radius
    seen[0, 1, max(20 - reach, 0) : 21 + reach, max(37 - reach, 0) : 38 + reach] = True
    for grad in kernels.backward(torch.tensor(1.0), broken, y, **options):
        assert torch.equal(grad.isnan(), seen)


def test_one_huge_pixel_costs_no_accuracy_elsewhere(kernels: Kernels) -> None:
    x, y = (image + 0.5 for image in image_pair(1, 1, 40, 40))
    x[0, 0, 5, 5] = 1e8
    seen = torch.zeros(40, 40, dtype=torch.bool)
    seen[:11, :11] = True
    got = kernels.map(x, y, padding="same")[0, 0]
    expected = reference(x.double(), y.double(), padding="same")[0, 0]
    torch.testing.assert_close(got.double()[~seen], expected[~seen], rtol=0, atol=1e-4)


def test_no_image_gives_no_loss(kernels: Kernels) -> None:
    for window_size in (11, 35):
        x = torch.empty(0, 3, 40, 40)
        assert kernels.loss(x, x, window_size).isnan()
        assert kernels.map(x, x, window_size).shape == (0, 3, 41 - window_size, 41 - window_size)
        assert kernels.backward(torch.tensor(1.0), x, x, window_size)[0].shape == x.shape


@pytest.mark.parametrize("window_size", [5, 11, 35])
def test_strided_and_expanded_inputs_give_the_same(kernels: Kernels, window_size: int) -> None:
    x, y = image_pair(2, 2, 40, 47)
    for a, b in (
        (x.transpose(0, 1), y.transpose(0, 1)),
        (x[::2, 1:, 3:39, 5:43], y[::2, 1:, 3:39, 5:43]),
        (x[:1].expand(2, 2, 40, 47), y[1:].expand(2, 2, 40, 47)),
        (x[:, :, :1].expand(2, 2, 40, 47), y),
    ):
        whole = a.contiguous(), b.contiguous()
        got = kernels.map(a, b, window_size)
        assert torch.equal(got, kernels.map(*whole, window_size))
        assert torch.equal(kernels.loss(a, b, window_size), kernels.loss(*whole, window_size))
        grad = torch.randn(got.shape[::-1]).permute(3, 2, 1, 0)
        for of_view, of_whole in zip(
            kernels.backward(grad, a, b, window_size),
            kernels.backward(grad.contiguous(), *whole, window_size),
            strict=True,
        ):
            assert torch.equal(of_view, of_whole)


@pytest.mark.parametrize("window_size", [5, 11, 35])
def test_results_do_not_depend_on_the_order_of_threads_or_on_the_batch(kernels: Kernels, window_size: int) -> None:
    x, y = image_pair(3, 1, 43, 70)
    grad = torch.randn(kernels.map(x, y, window_size).shape)

    def everything(part: slice) -> tuple[Tensor, ...]:
        of = x[part], y[part]
        return kernels.map(*of, window_size), *kernels.backward(grad[part], *of, window_size)

    expected, loss = everything(slice(None)), kernels.loss(x, y, window_size)
    for order in ("backward", "random 1"):
        kernels.library.set_order(order)
        parts = [everything(slice(0, 1)), everything(slice(1, 3))]
        for got, want in zip(zip(*parts, strict=True), expected, strict=True):
            assert torch.equal(torch.cat(got), want)
        assert torch.equal(kernels.loss(x, y, window_size), loss)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("window_size", [3, 11, 35])
def test_touches_nothing_but_its_tensors(kernels: Kernels, window_size: int, padding: str) -> None:
    for shape in ((37, 41), (74, 41)):  # the latter: as high as a tile of 11 taps, and one column too narrow
        x, y = (at_end_of_page(image) for image in image_pair(1, 1, *shape))
        assert_right(kernels, x, y, window_size=window_size, padding=padding)
