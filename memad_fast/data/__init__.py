"""Images in: folders in MVTec layout, arrays, idx files and the built-in digits; and labelled images for extractors."""

from __future__ import annotations

import os
from pathlib import Path

from memad_fast.data.arrays import from_arrays
from memad_fast.data.classes import open_digits
from memad_fast.data.dataset import Batch, DataError, Dataset, Examples, Images, Item, collate, split_normals
from memad_fast.data.folder import open_folder
from memad_fast.data.idx import is_idx_folder, open_idx
from memad_fast.data.images import ImageError, is_image, load_image, load_mask, preprocessing
from memad_fast.data.segmentation import AdaptationExamples, LabelledImages, PlainImages, open_labelled, open_plain

__all__ = [
    "AdaptationExamples",
    "Batch",
    "DataError",
    "Dataset",
    "Examples",
    "ImageError",
    "Images",
    "Item",
    "LabelledImages",
    "PlainImages",
    "collate",
    "from_arrays",
    "is_image",
    "load_image",
    "load_mask",
    "open_data",
    "open_labelled",
    "open_plain",
    "preprocessing",
    "split_normals",
]


def open_data(
    spec: str | os.PathLike[str],
    *,
    image_size: int,
    channels: int | None = None,
    normal_class: int | None = None,
    resize: str = "bilinear",
) -> Dataset:
    """Open a data set by its name or place.

    Args:
        spec: "digits" (scikit-learn's, built in), a folder of MNIST-style idx files, or a folder in MVTec layout
            (``train/good``, ``test/good``, ``test/TYPE``, ``ground_truth/TYPE``). A folder called digits is ./digits.
        image_size: every image and mask is resized to this height and width; the aspect ratio is not kept.
        channels: 1 or 3; default: 1 if all of a sample of the training images are grey, else 3.
        normal_class: the class that is normal, for digits and idx files.
        resize: "bilinear" or "bicubic"; see ``load_image``. Masks always take the nearest pixel.

    Returns:
        A ``Dataset``. Its images are decoded when they are asked for; an unreadable one raises ``ImageError`` with
        its name then.

    Raises:
        DataError: no such folder; a folder of another layout; a missing, truncated or malformed idx file; a class
            that is not there, or one given for a folder.

    Example:
        >>> from memad_fast.data import open_data
        >>> data = open_data("digits", image_size=32, normal_class=0)
        >>> len(data.train), data.train[0].image.shape
        (124, torch.Size([1, 32, 32]))
    """
    return _open(spec, image_size, channels, normal_class).with_resize(resize)


def _open(spec: str | os.PathLike[str], image_size: int, channels: int | None, normal_class: int | None) -> Dataset:
    if os.fspath(spec) == "digits":
        return open_digits(image_size=image_size, channels=channels, normal_class=normal_class)
    folder = Path(spec)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected 'digits' or a folder of images or idx files")
    if is_idx_folder(folder):
        return open_idx(folder, image_size=image_size, channels=channels, normal_class=normal_class)
    if normal_class is not None:
        raise DataError(f"normal_class: {folder} is a folder of images, whose layout says which are normal")
    return open_folder(folder, image_size=image_size, channels=channels)
