"""Images that are already in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from memad_fast.data.dataset import NORMAL, ArrayImages, DataError, Dataset, Entry
from memad_fast.data.images import grey_or_colour

Pixels = np.ndarray | Tensor


def from_arrays(
    train: Pixels,
    test: Pixels | None = None,
    labels: Sequence[int] | np.ndarray | Tensor | None = None,
    *,
    masks: Pixels | None = None,
    defects: Sequence[str] | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    name: str = "arrays",
) -> Dataset:
    """A data set of images in memory.

    Args:
        train: normal images. NumPy ``[N, H, W]`` or ``[N, H, W, C]``, torch ``[N, H, W]`` or ``[N, C, H, W]``, with C
            1, 3 or 4 (the fourth, alpha, is dropped). uint8, uint16 (divided by 65535), bool, or floats in [0, 1].
        test: images to test on, likewise; any size.
        labels: ``[N]`` of the test images: 0 normal, everything else abnormal.
        masks: ``[N, H, W]`` of the test images, non-zero where the defect is. A mask without a marked pixel on an
            abnormal image means that none was drawn.
        defects: ``[N]`` the test images' defect types; by default "defect" for every abnormal one.
        image_size: default: the height of ``train``, which must then be square.
        channels: default: 1 if the training images are grey, else 3.
        name: what messages and names of images begin with.

    Raises:
        DataError: shapes or lengths do not fit together; the message says which.

    Example:
        >>> import numpy as np
        >>> from memad_fast.data import from_arrays
        >>> rng = np.random.default_rng(0)
        >>> data = from_arrays(rng.random((20, 16, 16)), rng.random((4, 16, 16)), [0, 0, 1, 1])
        >>> len(data.train), data.test[3].defect, data.train[0].image.shape
        (20, 'defect', torch.Size([1, 16, 16]))
    """
    train_pixels = _channels_last("train", train)
    if image_size is None:
        height, width = train_pixels.shape[1:3]
        if height != width:
            raise DataError(f"image_size: say which, the training images are not square ({height}x{width})")
        image_size = height
    if channels is None:
        channels = max((grey_or_colour(pixels) for pixels in train_pixels[:16]), default=3)
    test_pixels = train_pixels[:0] if test is None else _channels_last("test", test)
    entries = _test_entries(name, len(test_pixels), labels, defects)
    return Dataset(
        name=name,
        image_size=image_size,
        channels=channels,
        train_images=ArrayImages(
            [Entry(f"{name}/train/{index}") for index in range(len(train_pixels))],
            train_pixels,
            [None] * len(train_pixels),
            image_size=image_size,
            channels=channels,
        ),
        test_images=ArrayImages(
            entries, test_pixels, _drawn_masks(masks, entries), image_size=image_size, channels=channels
        ),
        looked_in={"train": "train", "test": "test"},
        source={"kind": "arrays"},
    )


def _channels_last(argument: str, images: Pixels) -> np.ndarray:
    """NumPy ``[N, H, W]`` or ``[N, H, W, C]``."""
    if isinstance(images, Tensor):
        wide = images.detach().cpu()
        wide = wide.float() if wide.dtype in (torch.bfloat16, torch.float16) else wide
        array = wide.numpy()
        array = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
    else:
        array = np.asarray(images)
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in (1, 3, 4)):
        expected = "[N, H, W] or [N, C, H, W]" if isinstance(images, Tensor) else "[N, H, W] or [N, H, W, C]"
        raise DataError(f"{argument}: expected {expected} with C 1, 3 or 4, got shape {list(images.shape)}")
    return array


def _test_entries(
    name: str, count: int, labels: Sequence[int] | np.ndarray | Tensor | None, defects: Sequence[str] | None
) -> list[Entry]:
    if labels is None:
        if count:
            raise DataError(f"labels: expected {count}, one a test image, got none")
        return []
    flags = [int(bool(label)) for label in torch.as_tensor(labels).flatten().tolist()]
    if len(flags) != count:
        raise DataError(f"labels: expected {count}, one a test image, got {len(flags)}")
    if defects is not None and len(defects) != count:
        raise DataError(f"defects: expected {count}, one a test image, got {len(defects)}")
    types = ["defect"] * count if defects is None else list(defects)
    return [Entry(f"{name}/test/{index}", flag, types[index] if flag else NORMAL) for index, flag in enumerate(flags)]


def _drawn_masks(masks: Pixels | None, entries: list[Entry]) -> list[np.ndarray | None]:
    if masks is None:
        return [None] * len(entries)
    drawn = np.asarray(masks.cpu() if isinstance(masks, Tensor) else masks)
    if drawn.ndim == 4 and 1 in (drawn.shape[1], drawn.shape[3]):
        drawn = drawn.squeeze(1 if drawn.shape[1] == 1 else 3)
    if drawn.ndim != 3 or len(drawn) != len(entries):
        raise DataError(f"masks: expected [{len(entries)}, H, W], one a test image, got shape {list(drawn.shape)}")
    return [mask if entry.label and mask.any() else None for mask, entry in zip(drawn, entries, strict=True)]
