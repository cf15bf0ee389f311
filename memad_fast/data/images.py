"""One image file, or one array, to the float tensor that the models read. Training and scoring both come through here.

Decoding is Pillow's. A file that Pillow cannot read to its last pixel is an error that names it: half an image scored
as a whole one would be a wrong answer that nobody sees.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from memad_fast._arguments import check_choice

# Endings that count as images in a folder; everything else there (manifests, thumbnails' caches) is left alone.
EXTENSIONS = frozenset(
    [
        ".avif",
        ".bmp",
        ".gif",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".pbm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    ]
)

# How images are brought to a model's size. Both average over the whole footprint of a target pixel when they shrink.
RESIZES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

# Rec. 601 luma, as Pillow's convert("L") uses for 8-bit images.
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


class ImageError(ValueError):
    """An image that cannot be read, or whose values are not an image's. The message names it."""


def preprocessing(image_size: int, channels: int, resize: str = "bilinear") -> dict[str, Any]:
    """What ``load_image`` does, as it is recorded in a run's config.json. "resize" begins with the filter's name."""
    return {
        "image_size": image_size,
        "channels": channels,
        "resize": f"{resize} with antialiasing to a square; the aspect ratio is not kept",
        "range": [0.0, 1.0],
        "grey": "Rec. 601 luma",
        "alpha": "dropped",
        "exif_orientation": "applied",
    }


def is_image(path: Path) -> bool:
    """Whether the name is that of an image: a known ending, and not a hidden file."""
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def load_image(path: str | os.PathLike[str], image_size: int, channels: int, *, resize: str = "bilinear") -> Tensor:
    """Decode one file to what a model reads.

    Args:
        path: a file of any type Pillow reads: grey, colour, palette, CMYK, 16-bit, with or without alpha. Alpha is
            dropped, the EXIF orientation is applied, the first frame of an animation is taken. 16-bit images are
            divided by 65535, so nothing is clipped.
        image_size: height and width of the result; the aspect ratio is not kept.
        channels: 1 (colour becomes Rec. 601 luma) or 3 (grey is repeated).
        resize: "bilinear" or "bicubic", both with antialiasing. What bicubic overshoots is cut off at 0 and 1.

    Returns:
        ``[channels, image_size, image_size]`` float32 in [0, 1].

    Raises:
        ImageError: the file is missing, is no image, is truncated or damaged, or holds values outside its range.
        ValueError: ``channels`` is neither 1 nor 3, ``image_size`` is not positive, or ``resize`` is unknown.

    Example:
        >>> import tempfile, pathlib
        >>> from PIL import Image
        >>> from memad_fast.data import load_image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "part.png"
        ...     Image.new("RGB", (40, 30), (255, 0, 0)).save(file)
        ...     load_image(file, 16, 3).shape
        torch.Size([3, 16, 16])
    """
    return to_tensor(read_pixels(path), image_size, channels, name=os.fspath(path), resize=resize)


def read_pixels(path: str | os.PathLike[str]) -> np.ndarray:
    """The pixels as stored: ``[H, W]`` or ``[H, W, 3]``; uint8, or float32 in [0, 1] for deeper images."""
    image = _decode(path)
    if image.mode in ("1", "L", "LA", "La"):
        return np.asarray(image.convert("L"))
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _scaled(np.asarray(image).astype(np.int64), os.fspath(path))
    if image.mode == "F":
        return np.asarray(image)
    return np.asarray(image.convert("RGB"))


def load_mask(path: str | os.PathLike[str], image_size: int) -> Tensor:
    """Decode a defect mask to ``[1, image_size, image_size]`` bool, resized to the nearest pixel.

    A pixel is marked where any channel is not zero (alpha ignored), so masks of 0 and 1, of 0 and 255, in grey, in a
    palette or in 16 bits all mean the same. A JPEG mask is cut at half of its range, because its zeros are noisy.
    """
    image = _decode(path)
    lossy = image.format == "JPEG"
    if image.mode not in ("1", "L", "I", "F") and not image.mode.startswith("I;16"):
        image = image.convert("RGB")
    pixels = np.asarray(image)
    marked = np.asarray(pixels >= 128 if lossy else pixels != 0)
    return resize_mask(np.asarray(marked.any(axis=2)) if marked.ndim == 3 else marked, image_size)


def read_label_map(path: str | os.PathLike[str]) -> np.ndarray:
    """The values ``[H, W]`` of a label map, integers as stored: grey levels, a palette's indices, 0 and 255 of one bit.

    Raises:
        ImageError: the file cannot be read, or a pixel holds several values (colours), or one that is no integer.
    """
    image = _decode(path)
    if image.mode == "1":
        image = image.convert("L")
    values = np.asarray(image)
    if image.mode in ("LA", "La") or (values.ndim == 3 and grey_or_colour(values) == 1):
        values = values[:, :, 0]
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        raise ImageError(
            f"{os.fspath(path)}: expected a label map, one integer a pixel, got an image of mode {image.mode}"
        )
    return values


def grey_or_colour(pixels: np.ndarray) -> int:
    """1 where the pixels are grey, be it stored in three equal channels; else 3."""
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return 1
    first = pixels[:, :, 0]
    return 1 if np.array_equal(first, pixels[:, :, 1]) and np.array_equal(first, pixels[:, :, 2]) else 3


def resize_mask(marked: np.ndarray, image_size: int) -> Tensor:
    """``[H, W]`` bool to ``[1, image_size, image_size]`` bool, nearest pixel."""
    mask = Image.fromarray(marked.astype(np.uint8))
    if mask.size != (image_size, image_size):
        mask = mask.resize((image_size, image_size), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(mask)).bool()[None]


def to_tensor(pixels: np.ndarray, image_size: int, channels: int, *, name: str, resize: str = "bilinear") -> Tensor:
    """Pixels ``[H, W]`` or ``[H, W, 1 | 3 | 4]`` to ``[channels, image_size, image_size]`` float32 in [0, 1].

    uint8 is divided by 255, uint16 by 65535, bool becomes 0 and 1, floats must lie in [0, 1]. ``name`` is what an
    error calls the image.
    """
    check_size(image_size, channels)
    check_choice("resize", resize, tuple(RESIZES))
    if pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4):
        pixels = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels[:, :, :3]
    elif pixels.ndim != 2:
        raise ImageError(f"{name}: expected pixels [H, W] or [H, W, 1, 3 or 4], got shape {list(pixels.shape)}")
    if 0 in pixels.shape:
        raise ImageError(f"{name}: the image is empty, {list(pixels.shape)}")
    if pixels.dtype != np.uint8:
        pixels = _as_float(pixels, name)
    return _to_planes(_resize(_to_channels(pixels, channels), image_size, resize))


def check_size(image_size: int, channels: int) -> None:
    """``image_size`` and ``channels`` are ones that a model can have."""
    if image_size < 1:
        raise ValueError(f"image_size: expected at least 1 pixel, got {image_size}")
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 (grey) or 3 (colour), got {channels}")


def _decode(path: str | os.PathLike[str]) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            upright.format = image.format
            return upright
    except FileNotFoundError:
        raise ImageError(f"{os.fspath(path)}: no such file") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their format's parser does
        raise ImageError(f"{os.fspath(path)}: not a readable image: {error}") from error


def _scaled(values: np.ndarray, name: str) -> np.ndarray:
    """Integers of up to 16 bits, by their full range."""
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(f"{name}: expected values of 16 bits, 0 to 65535, got {values.min()} to {values.max()}")
    return values.astype(np.float32) / np.float32(65535)


def _as_float(pixels: np.ndarray, name: str) -> np.ndarray:
    if pixels.dtype == np.bool_:
        return pixels.astype(np.float32)
    if pixels.dtype == np.uint16:
        return _scaled(pixels.astype(np.int64), name)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ImageError(f"{name}: expected uint8, uint16, bool or floats in [0, 1], got {pixels.dtype}")
    if not np.isfinite(pixels).all():
        raise ImageError(f"{name}: expected finite pixels, got NaN or infinity")
    if pixels.min() < 0 or pixels.max() > 1:
        raise ImageError(f"{name}: expected floats in [0, 1], got {pixels.min():g} to {pixels.max():g}")
    return pixels.astype(np.float32)


def _to_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    if pixels.ndim == 2:
        return pixels if channels == 1 else np.repeat(pixels[:, :, None], 3, axis=2)
    if channels == 3:
        return pixels
    if pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))
    return pixels @ _LUMA


def _resize(pixels: np.ndarray, image_size: int, resize: str) -> np.ndarray:
    """Pillow's filter of that name; floats stay in [0, 1], as bytes do in 0 to 255."""
    if pixels.shape[:2] == (image_size, image_size):
        return pixels
    if pixels.ndim == 3 and pixels.dtype != np.uint8:  # Pillow has no float image of several channels
        return np.stack([_resize(pixels[:, :, channel], image_size, resize) for channel in range(3)], axis=2)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    resized = np.asarray(image.resize((image_size, image_size), RESIZES[resize]))
    return resized if pixels.dtype == np.uint8 else resized.clip(0, 1)


def _to_planes(pixels: np.ndarray) -> Tensor:
    planes = torch.from_numpy(np.array(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), np.float32))
    return planes.contiguous().div_(255) if pixels.dtype == np.uint8 else planes.contiguous()
