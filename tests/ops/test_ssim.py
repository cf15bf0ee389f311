"""ssim_map and ssim_loss: the windowed SSIM of Wang et al., its mean, and their gradients for both images."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_pairs import DTYPES, GRADIENT_TOLERANCE, MAP_TOLERANCE, SHAPES, image_pair, relative
from torch import Tensor

import memad_fast
from memad_fast.ops.ssim import reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_float64_definition(isa: str, shape: tuple[int, ...], padding: str, dtype: torch.dtype) -> None:
    x, y = image_pair(*shape, dtype=dtype)
    got = memad_fast.ssim_map(x, y, padding=padding)
    expected = reference(x.double(), y.double(), padding=padding)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=MAP_TOLERANCE[dtype])
    loss = memad_fast.ssim_loss(x, y, padding=padding)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((1 - expected).mean().item(), rel=1e-5)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("window_size", [1, 3, 7, 13])
def test_any_odd_window(isa: str, window_size: int, padding: str) -> None:
    x, y = image_pair(2, 1, 13, 90)
    options = {"window_size": window_size, "sigma": 0.4 * window_size, "data_range": 2.0, "padding": padding}
    got = memad_fast.ssim_map(x, y, **options)
    torch.testing.assert_close(got.double(), reference(x.double(), y.double(), **options), rtol=0, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    radius=st.integers(0, 6),
    padding=st.sampled_from(["valid", "same"]),
    scale=st.sampled_from([1e-3, 1.0, 255.0]),
    seed=st.integers(0, 999),
)
def test_values_and_gradients_for_any_size(
    height: int, width: int, radius: int, padding: str, scale: float, seed: int
) -> None:
    window_size = 2 * radius + 1
    least = window_size if padding == "valid" else radius + 1
    shape = (1, 2, max(height, least), max(width, least))
    torch.manual_seed(seed)
    x, y = (scale * image for image in image_pair(*shape))
    options = {"window_size": window_size, "data_range": scale, "padding": padding}
    got = [image.clone().requires_grad_() for image in (x, y)]
    wide = [image.double().requires_grad_() for image in (x, y)]
    map_, expected = memad_fast.ssim_map(*got, **options), reference(*wide, **options)
    torch.testing.assert_close(map_.double(), expected, rtol=0, atol=1e-4)
    assert map_.abs().max() <= 1.0
    grad = torch.randn(map_.shape)
    for a, b in zip(
        torch.autograd.grad(map_, got, grad), torch.autograd.grad(expected, wide, grad.double()), strict=True
    ):
        assert relative(a, b) < GRADIENT_TOLERANCE[torch.float32]


def test_matches_pytorch_msssim() -> None:
    pytorch_msssim = pytest.importorskip("pytorch_msssim")
    x, y = image_pair(3, 2, 40, 50)
    theirs = 1 - pytorch_msssim.ssim(x.double(), y.double(), data_range=1.0)
    assert memad_fast.ssim_loss(x, y).item() == pytest.approx(theirs.item(), rel=1e-5)


def test_identical_images_have_loss_exactly_0(isa: str) -> None:
    for image in (torch.rand(1, 2, 80, 90), torch.zeros(1, 1, 12, 12), torch.full((1, 1, 12, 12), 1e4)):
        for padding in ("valid", "same"):
            assert memad_fast.ssim_loss(image, image, padding=padding).item() == 0.0
            assert (memad_fast.ssim_map(image, image, padding=padding) == 1).all()


def test_a_nearly_perfect_reconstruction_keeps_its_digits(isa: str) -> None:
    x = torch.rand(1, 1, 60, 60)
    y = x + 1e-4 * torch.randn(x.shape)
    expected = (1 - reference(x.double(), y.double())).mean().item()
    assert expected < 1e-6
    assert memad_fast.ssim_loss(x, y).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("offset", [10.0, -1000.0, 30000.0])
def test_an_offset_of_both_images_costs_no_accuracy(isa: str, offset: float) -> None:
    x, y = (image + offset for image in image_pair(1, 1, 100, 200))
    for padding in ("valid", "same"):
        got = memad_fast.ssim_map(x, y, padding=padding)
        expected = reference(x.double(), y.double(), padding=padding)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)


def test_flat_bright_areas_beside_dark_ones_stay_within_the_bound(isa: str) -> None:
    """The worst case for E[q²] − E[q]²: no centring helps, and the variance is far below C2."""
    x = torch.ones(1, 1, 128, 128)
    x[..., :20] = 0.0
    y = x - 1e-3 * torch.rand(x.shape) * x
    got = memad_fast.ssim_map(x, y, padding="same")
    expected = reference(x.double(), y.double(), padding="same")
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_a_pixel_that_is_no_number_stays_in_the_windows_that_see_it(isa: str, padding: str, value: float) -> None:
    x, y = image_pair(1, 2, 40, 150)
    broken = x.clone()
    broken[0, 1, 20, 75] = value
    clean = memad_fast.ssim_map(x, y, padding=padding)
    for got in (memad_fast.ssim_map(broken, y, padding=padding), memad_fast.ssim_map(y, broken, padding=padding)):
        first = 10 if padding == "valid" else 5
        rows, cols = slice(20 - first, 31 - first), slice(75 - first, 86 - first)
        assert got[0, 1, rows, cols].isnan().all()
        assert got.isnan().sum() == 11 * 11
        torch.testing.assert_close(got[~got.isnan()], clean[~got.isnan()], rtol=0, atol=1e-4)
    assert memad_fast.ssim_loss(broken, y, padding=padding).isnan()

    wanted = broken.clone().requires_grad_()
    grad = torch.autograd.grad(memad_fast.ssim_loss(wanted, y, padding=padding), wanted)[0]
    assert grad[0, 1, 10:31, 65:86].isnan().all()
    assert grad.isnan().sum() == 21 * 21


def test_one_huge_pixel_costs_no_accuracy_elsewhere(isa: str) -> None:
    x, y = (image + 0.5 for image in image_pair(1, 1, 60, 60))
    x[0, 0, 5, 5] = 1e8
    seen = torch.zeros(60, 60, dtype=torch.bool)
    seen[:11, :11] = True
    got = memad_fast.ssim_map(x, y, padding="same")[0, 0]
    expected = reference(x.double(), y.double(), padding="same")[0, 0]
    torch.testing.assert_close(got.double()[~seen], expected[~seen], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 3, 16, 16), (2, 0, 16, 16)])
def test_no_image_gives_an_empty_map_and_no_loss(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, requires_grad=True)
    assert memad_fast.ssim_map(x, x).shape == (*shape[:2], 6, 6)
    loss = memad_fast.ssim_loss(x, x)
    assert loss.isnan()
    assert torch.autograd.grad(loss, x)[0].shape == shape


def test_strided_and_expanded_inputs_give_the_same(isa: str) -> None:
    x, y = image_pair(4, 3, 30, 40)
    views = [
        (x.transpose(0, 1), y.transpose(0, 1)),
        (x[::2, :, 3:28, 5:37], y[::2, :, 3:28, 5:37]),
        (x[:1].expand(5, 3, 30, 40), y[1:2].expand(5, 3, 30, 40)),
        (x[..., ::2], y[..., ::2]),
        (x.to(memory_format=torch.channels_last), y),
        (x[:, :, :1].expand(4, 3, 30, 40), y),
    ]
    for a, b in views:
        assert torch.equal(memad_fast.ssim_map(a, b), memad_fast.ssim_map(a.contiguous(), b.contiguous()))
        results = []
        for pair in ((a, b), (a.contiguous(), b.contiguous())):
            leaves = [image.detach().requires_grad_() for image in pair]
            results.append(torch.autograd.grad(memad_fast.ssim_loss(*leaves), leaves))
        for got, expected in zip(*results, strict=True):
            assert torch.equal(got, expected)


def test_results_do_not_depend_on_batch_threads_or_repetition(isa: str) -> None:
    x, y = (image.requires_grad_() for image in image_pair(3, 2, 90, 150))

    def everything(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        map_ = memad_fast.ssim_map(x, y)
        return map_.detach(), *torch.autograd.grad(map_.sum(), (x, y))

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        whole, loss = everything(x, y), memad_fast.ssim_loss(x, y)
        torch.set_num_threads(1)
        parts = [everything(x[i : i + 1], y[i : i + 1]) for i in range(3)]
        assert torch.equal(memad_fast.ssim_loss(x, y), loss)
    finally:
        torch.set_num_threads(threads)
    for index, got in enumerate(whole):
        assert torch.equal(got, torch.cat([part[index] for part in parts]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_the_references(isa: str, shape: tuple[int, ...], padding: str, dtype: torch.dtype) -> None:
    x, y = image_pair(*shape, dtype=dtype)
    got = [image.clone().requires_grad_() for image in (x, y)]
    wide = [image.double().requires_grad_() for image in (x, y)]
    map_, expected = memad_fast.ssim_map(*got, padding=padding), reference(*wide, padding=padding)
    grad = torch.randn(map_.shape).to(dtype)
    pairs = [
        (torch.autograd.grad(map_, got, grad), torch.autograd.grad(expected, wide, grad.double(), retain_graph=True)),
        (
            torch.autograd.grad(3 * memad_fast.ssim_loss(*got, padding=padding), got),
            torch.autograd.grad(3 * (1 - expected).mean(), wide),
        ),
    ]
    for ours, theirs in pairs:
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == dtype
            assert relative(a, b) < GRADIENT_TOLERANCE[dtype]


def test_gradient_is_zero_where_the_images_are_identical(isa: str) -> None:
    x = torch.rand(1, 1, 30, 30, requires_grad=True)
    gradient = torch.autograd.grad(memad_fast.ssim_loss(x, x.detach().clone()), x)[0]
    assert gradient.abs().max() == 0.0


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_gradcheck(padding: str) -> None:
    x, y = (image.double().requires_grad_() for image in image_pair(1, 1, 7, 6))
    options = {"window_size": 5, "padding": padding}
    torch.autograd.gradcheck(lambda a, b: memad_fast.ssim_map(a, b, **options), (x, y))
    torch.autograd.gradcheck(lambda a, b: memad_fast.ssim_loss(a, b, **options), (x, y))


@pytest.mark.parametrize("reflect", [False, True])
def test_opcheck(reflect: bool) -> None:
    for requires_grad in (False, True):
        x, y = (image.requires_grad_(requires_grad) for image in image_pair(2, 1, 12, 13))
        for op in (torch.ops.memad_fast.ssim_map.default, torch.ops.memad_fast.ssim_loss.default):
            torch.library.opcheck(op, (x, y, 11, 1.5, 1.0, reflect))


def test_compiles_and_exports_as_one_graph() -> None:
    x, y = image_pair(2, 1, 16, 18)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return memad_fast.ssim_loss(x, y), memad_fast.ssim_map(x, y, padding="same")

    expected = Module()(x, y)
    for run in (
        torch.compile(Module(), fullgraph=True),
        torch.export.export(Module(), (x, y)).module(),
    ):
        for got, want in zip(run(x, y), expected, strict=True):
            assert torch.equal(got, want)


def test_more_elements_than_32_bits_keep_their_shape() -> None:
    x = torch.empty(3, 1, 50_000, 50_000, device="meta")
    assert memad_fast.ssim_map(x, x).shape == (3, 1, 49_990, 49_990)
    assert memad_fast.ssim_loss(x, x).shape == ()


_PEAK_MEMORY = """
import pathlib, re, torch, memad_fast
def status(name):
    return int(re.search(name + r":\\s*(\\d+) kB", pathlib.Path("/proc/self/status").read_text()).group(1)) * 1024
x = torch.rand(4, 1, 1024, 1024, requires_grad=True)
y = torch.rand(4, 1, 1024, 1024)
small = torch.rand(1, 1, 200, 200, requires_grad=True)
torch.autograd.grad(memad_fast.ssim_loss(small, small.detach()), small)
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
loss = memad_fast.ssim_loss(x, y)
print(status("VmHWM") - before)
torch.autograd.grad(loss, x)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_nothing_image_sized_is_stored() -> None:
    """Forward needs tiles only, backward the gradients of both images beside them; an image batch is 16 MiB."""
    found = subprocess.run([sys.executable, "-c", _PEAK_MEMORY], capture_output=True, text=True, check=True)
    forward, backward = (int(line) / 2**20 for line in found.stdout.split())
    assert forward < 8
    assert backward < 2 * 16 + 12


def test_the_reference_backend_gives_the_same() -> None:
    x, y = image_pair(1, 2, 20, 21, dtype=torch.float16)
    with memad_fast.use_backend("reference"):
        loss, map_ = memad_fast.ssim_loss(x, y), memad_fast.ssim_map(x, y)
    assert loss.dtype == torch.float32
    assert map_.dtype == torch.float16
    torch.testing.assert_close(memad_fast.ssim_loss(x, y), loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(memad_fast.ssim_map(x, y), map_, rtol=0, atol=1e-3)


def test_bad_input_names_the_argument() -> None:
    x = torch.rand(1, 1, 16, 16)
    cases = [
        (TypeError, r"x: expected a torch.Tensor, got list", ([1.0], x), {}),
        (TypeError, r"y: expected float32.*got torch.uint8", (x, x.byte()), {}),
        (TypeError, r"y: expected torch.float32 like x, got torch.float16", (x, x.half()), {}),
        (ValueError, r"x: expected 4 dimensions \[B, C, H, W\], got shape \(16, 16\)", (x[0, 0], x[0, 0]), {}),
        (ValueError, r"y: expected shape \(1, 1, 16, 16\) like x, got \(1, 1, 16, 15\)", (x, x[..., 1:]), {}),
        (ValueError, r"y: expected device cpu like x, got meta", (x, x.to("meta")), {}),
        (ValueError, r"padding: expected one of valid, same, got 'zeros'", (x, x), {"padding": "zeros"}),
        (ValueError, r"window_size: expected an odd number of at least 1, got 4", (x, x), {"window_size": 4}),
        (ValueError, r"window_size: expected an odd number of at least 1, got -1", (x, x), {"window_size": -1}),
        (ValueError, r"window_size: 17 .*17 × 17 pixels, got x of shape \(1, 1, 16, 16\)", (x, x), {"window_size": 17}),
        (ValueError, r"window_size: 33 .*at least 17 × 17", (x, x), {"window_size": 33, "padding": "same"}),
        (ValueError, r"sigma: expected > 0, got 0", (x, x), {"sigma": 0.0}),
        (ValueError, r"data_range: expected > 0 and finite, got nan", (x, x), {"data_range": float("nan")}),
    ]  # fmt: skip
    for error, message, images, options in cases:
        for function in (memad_fast.ssim_map, memad_fast.ssim_loss):
            with pytest.raises(error, match=message):
                function(*images, **options)


def test_direct_calls_of_the_ops_are_checked_too() -> None:
    x = torch.rand(1, 1, 16, 16)
    for bad in ((x, x[..., 1:], 11, 1.5, 1.0, False), (x, x, 4, 1.5, 1.0, False), (x, x, 17, 1.5, 1.0, False)):
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.memad_fast.ssim_map(*bad)


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_native_gives_the_same_bits(isa: str, padding: str) -> None:
    from memad_fast import native

    x, y = image_pair(2, 3, 80, 140)
    options = {"window_size": 7, "sigma": 1.1, "data_range": 2.0, "padding": padding}
    got = native.ssim_map(x.numpy(), y.numpy(), **options)
    np.testing.assert_array_equal(got, memad_fast.ssim_map(x, y, **options).numpy())
    assert native.ssim_loss(x.numpy(), y.numpy(), **options) == memad_fast.ssim_loss(x, y, **options).item()
    with pytest.raises(ValueError, match=r"y: expected shape"):
        native.ssim_map(x.numpy(), y.numpy()[:1])
