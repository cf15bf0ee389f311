"""Every kind of image file becomes the same tensor, and one that cannot be read whole is refused by name."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from memad_fast.data import ImageError, load_image, load_mask, preprocessing
from memad_fast.data.images import to_tensor

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (12, 12, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (12, 12), dtype=np.uint8)


def smooth(size: int = 64) -> np.ndarray:
    """A picture that a lossy format keeps nearly unchanged."""
    ramp = np.linspace(0, 255, size)
    return np.stack([ramp[:, None] + 0 * ramp, ramp[None] + 0 * ramp[:, None], 128 + 0 * ramp + 0 * ramp[:, None]], 2)


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "ppm", "webp"])
def test_lossless_colour_files_keep_every_value(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"part.{ending}"
    Image.fromarray(COLOUR).save(path, lossless=True)
    image = load_image(path, 12, 3)
    assert image.dtype == torch.float32
    assert torch.equal(image, torch.from_numpy(COLOUR).permute(2, 0, 1) / 255)
    assert image.is_contiguous()


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "pgm"])
def test_grey_files_fill_one_channel_or_three(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"part.{ending}"
    Image.fromarray(GREY).save(path)
    expected = torch.from_numpy(GREY)[None] / 255
    assert torch.equal(load_image(path, 12, 1), expected)
    assert torch.equal(load_image(path, 12, 3), expected.expand(3, -1, -1))


def test_colour_becomes_grey_by_luma(tmp_path: Path) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "part.png")
    expected = torch.from_numpy(COLOUR / 255 @ [0.299, 0.587, 0.114]).float()
    torch.testing.assert_close(load_image(tmp_path / "part.png", 12, 1)[0], expected, atol=1 / 255, rtol=0)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bit_images_are_scaled_by_their_full_range(tmp_path: Path, ending: str) -> None:
    values = np.array([[0, 255], [256, 65535]], np.uint16)
    path = tmp_path / f"deep.{ending}"
    Image.fromarray(values).save(path)
    expected = torch.tensor([[0.0, 255.0], [256.0, 65535.0]]) / 65535
    torch.testing.assert_close(load_image(path, 2, 1)[0], expected, atol=1e-7, rtol=0)
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(path)
    small = load_image(path, 8, 3)
    assert small.unique().numel() == 64  # not clipped to 255, not rounded to 8 bits
    assert 0.9 < small.max() < 1


def test_palette_files_give_their_colours(tmp_path: Path) -> None:
    indexed = Image.fromarray(COLOUR).quantize(64)
    for ending in ("png", "gif"):
        indexed.save(tmp_path / f"part.{ending}")
        expected = torch.from_numpy(np.array(indexed.convert("RGB"))).permute(2, 0, 1) / 255
        assert torch.equal(load_image(tmp_path / f"part.{ending}", 12, 3), expected)


def test_a_palette_with_transparency_gives_its_colours(tmp_path: Path) -> None:
    indexed = Image.fromarray(COLOUR).quantize(16)
    indexed.save(tmp_path / "part.png", transparency=0)
    expected = torch.from_numpy(np.array(indexed.convert("RGB"))).permute(2, 0, 1) / 255
    assert torch.equal(load_image(tmp_path / "part.png", 12, 3), expected)


def test_alpha_is_dropped(tmp_path: Path) -> None:
    alpha = RNG.integers(0, 256, (12, 12, 1), dtype=np.uint8)
    Image.fromarray(np.concatenate([COLOUR, alpha], axis=2)).save(tmp_path / "rgba.png")
    assert torch.equal(load_image(tmp_path / "rgba.png", 12, 3), torch.from_numpy(COLOUR).permute(2, 0, 1) / 255)
    Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha[:, :, 0])]).save(tmp_path / "la.png")
    assert torch.equal(load_image(tmp_path / "la.png", 12, 1), torch.from_numpy(GREY)[None] / 255)


def test_a_cmyk_jpeg_shows_what_its_rgb_twin_shows(tmp_path: Path) -> None:
    picture = Image.fromarray(smooth().astype(np.uint8))
    picture.save(tmp_path / "rgb.jpg", quality=95)
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    with Image.open(tmp_path / "cmyk.jpg") as stored:
        assert stored.mode == "CMYK"
    difference = load_image(tmp_path / "rgb.jpg", 32, 3) - load_image(tmp_path / "cmyk.jpg", 32, 3)
    assert difference.abs().mean() < 0.03


def test_one_bit_images_are_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(GREY > 127).save(tmp_path / "part.png")
    assert torch.equal(load_image(tmp_path / "part.png", 12, 1)[0], torch.from_numpy(GREY > 127).float())


def test_the_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:8, :16] = 255  # top left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise to be seen upright
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image = load_image(tmp_path / "turned.jpg", 16, 1)[0]
    assert image[2:6, 10:14].min() > 0.9
    assert image[2:6, 2:6].max() < 0.1


def test_shrinking_averages_over_the_whole_image(tmp_path: Path) -> None:
    checks = np.indices((256, 256)).sum(axis=0) % 2 * 255
    Image.fromarray(checks.astype(np.uint8)).save(tmp_path / "fine.png")
    image = load_image(tmp_path / "fine.png", 16, 1)
    assert (image - 0.5).abs().max() < 0.01


def test_every_size_and_aspect_is_resized(tmp_path: Path) -> None:
    for size in [(1, 1), (3, 200), (200, 3), (31, 17)]:
        Image.new("RGB", size, (51, 102, 255)).save(tmp_path / "part.png")
        image = load_image(tmp_path / "part.png", 16, 3)
        assert torch.allclose(image, torch.tensor([0.2, 0.4, 1.0])[:, None, None].expand(3, 16, 16))


def encoded(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((smooth(256) + RNG.integers(0, 40, (256, 256, 3))).clip(0, 255).astype(np.uint8)).save(
        buffer, kind, **options
    )
    return buffer.getvalue()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {})],
)
def test_a_truncated_file_is_refused_by_name(
    tmp_path: Path, kind: str, options: dict[str, object], share: float
) -> None:
    data = encoded(kind, **options)
    path = tmp_path / f"half.{kind.lower()}"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ImageError, match=rf"half\.{kind.lower()}: not a readable image"):
        load_image(path, 16, 3)


def test_a_damaged_png_is_refused(tmp_path: Path) -> None:
    data = bytearray(encoded("PNG"))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(ImageError, match=r"bad\.png: not a readable image"):
        load_image(tmp_path / "bad.png", 16, 3)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "folder.png").mkdir()
    for name in ("text.png", "folder.png"):
        with pytest.raises(ImageError, match=name):
            load_image(tmp_path / name, 16, 3)
    with pytest.raises(ImageError, match=r"nothing\.png: no such file"):
        load_image(tmp_path / "nothing.png", 16, 3)


def test_floating_point_files_must_lie_between_0_and_1(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 0.25], [0.5, 1.0]], np.float32)).save(tmp_path / "good.tif")
    assert load_image(tmp_path / "good.tif", 2, 1).flatten().tolist() == [0.0, 0.25, 0.5, 1.0]
    for name, value in [("range.tif", 3.0), ("nan.tif", np.nan), ("inf.tif", np.inf)]:
        Image.fromarray(np.full((2, 2), value, np.float32)).save(tmp_path / name)
        with pytest.raises(ImageError, match=name):
            load_image(tmp_path / name, 2, 1)


def test_sizes_and_channels_that_cannot_be_are_named(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "part.png")
    with pytest.raises(ValueError, match=r"channels: expected 1 .* or 3 .*, got 2"):
        load_image(tmp_path / "part.png", 8, 2)
    with pytest.raises(ValueError, match="image_size: expected at least 1 pixel, got 0"):
        load_image(tmp_path / "part.png", 0, 1)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"expected pixels \[H, W\]"),
        (np.zeros((4,), np.uint8), r"expected pixels \[H, W\]"),
        (np.zeros((0, 4), np.uint8), "the image is empty"),
        (np.zeros((4, 4), np.int32), "expected uint8, uint16, bool or floats"),
        (np.full((4, 4), 2.0), r"expected floats in \[0, 1\], got 2 to 2"),
        (np.full((4, 4), -0.1), r"expected floats in \[0, 1\]"),
        (np.full((4, 4), np.nan), "expected finite pixels"),
    ],
)
def test_pixels_that_are_no_image_are_refused_by_name(pixels: np.ndarray, message: str) -> None:
    with pytest.raises(ImageError, match=f"^mine: {message}"):
        to_tensor(pixels, 8, 1, name="mine")


def test_a_tensor_never_shares_memory_with_its_pixels() -> None:
    pixels = np.ones((8, 8), np.float32)
    to_tensor(pixels, 8, 1, name="mine").zero_()
    assert pixels.min() == 1


MARKED = np.zeros((8, 8), bool)
MARKED[2:5, 3:6] = True


@pytest.mark.parametrize("value", [1, 7, 255])
def test_a_mask_means_the_same_in_any_encoding(tmp_path: Path, value: int) -> None:
    grey = (MARKED * value).astype(np.uint8)
    files = {
        "grey": Image.fromarray(grey),
        "deep": Image.fromarray((MARKED * 300).astype(np.uint16)),
        "bits": Image.fromarray(MARKED),
        "red": Image.fromarray(np.stack([grey, 0 * grey, 0 * grey], 2)),
        "alpha": Image.fromarray(np.stack([grey, grey, grey, np.full_like(grey, 255)], 2)),
        "palette": Image.fromarray(np.stack([0 * grey, grey, 0 * grey], 2)).quantize(4),
    }
    for name, image in files.items():
        image.save(tmp_path / f"{name}.png")
        mask = load_mask(tmp_path / f"{name}.png", 8)
        assert mask.dtype == torch.bool
        assert torch.equal(mask[0], torch.from_numpy(MARKED)), name


def test_a_jpeg_mask_is_cut_at_half(tmp_path: Path) -> None:
    marked = np.kron(MARKED, np.ones((8, 8)))
    Image.fromarray((marked * 255).astype(np.uint8)).save(tmp_path / "mask.jpg", quality=60)
    assert (load_mask(tmp_path / "mask.jpg", 8)[0] == torch.from_numpy(MARKED)).all()


def test_a_mask_is_resized_to_the_nearest_pixel(tmp_path: Path) -> None:
    Image.fromarray((MARKED * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    assert torch.equal(load_mask(tmp_path / "mask.png", 16)[0], torch.from_numpy(np.kron(MARKED, np.ones((2, 2))) > 0))


def _stretched(pixels: np.ndarray, size: int) -> np.ndarray:
    """Bicubic (a = −½) at twice the size and more, by hand: a row, then a column, each from four pixels."""

    def weight(distance: float) -> float:
        distance = abs(distance)
        if distance < 1:
            return 1.5 * distance**3 - 2.5 * distance**2 + 1
        return -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2 if distance < 2 else 0.0

    def matrix(count: int) -> np.ndarray:
        centres = (np.arange(size) + 0.5) * count / size - 0.5
        rows = np.array([[weight(centre - place) for place in range(count)] for centre in centres])
        return rows / rows.sum(axis=1, keepdims=True)

    return matrix(pixels.shape[0]) @ pixels @ matrix(pixels.shape[1]).T


def test_a_bicubic_resize_is_one(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(80, 176, (6, 5)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "part.png")
    for image in (
        load_image(tmp_path / "part.png", 12, 1, resize="bicubic"),
        to_tensor((pixels / 255.0).astype(np.float32), 12, 1, name="mine", resize="bicubic"),
        to_tensor(np.repeat(pixels[:, :, None] / 255.0, 3, axis=2), 12, 3, name="mine", resize="bicubic"),
    ):
        np.testing.assert_allclose(image[0].numpy(), _stretched(pixels / 255.0, 12), atol=1.5 / 255)
    with pytest.raises(ValueError, match="resize: expected one of bilinear, bicubic, got 'nearest'"):
        load_image(tmp_path / "part.png", 12, 1, resize="nearest")


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_what_bicubic_overshoots_is_cut_off(dtype: type) -> None:
    pixels = np.random.default_rng(0).integers(0, 2, (6, 5))
    assert _stretched(pixels, 12).min() < -0.05
    image = to_tensor((pixels * (255 if dtype is np.uint8 else 1)).astype(dtype), 12, 1, name="mine", resize="bicubic")
    assert (float(image.min()), float(image.max())) == (0.0, 1.0)


def test_the_preprocessing_is_written_down() -> None:
    described = preprocessing(32, 1)
    assert (described["image_size"], described["channels"], described["range"]) == (32, 1, [0.0, 1.0])
    assert described["resize"].startswith("bilinear ")
    assert preprocessing(32, 1, "bicubic")["resize"].startswith("bicubic ")
