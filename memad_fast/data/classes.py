"""Anomaly detection from a classification set: one class is normal, every other class is a defect type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from memad_fast.data.dataset import NORMAL, ArrayImages, DataError, Dataset, Entry
from memad_fast.data.images import grey_or_colour


def one_class_normal(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    name: str,
    normal_class: int | None,
    image_size: int,
    channels: int | None,
    source: Mapping[str, Any],
) -> Dataset:
    """Train on ``train`` images of ``normal_class``; test on all ``test`` images. A class's name is its number."""
    classes = np.unique(train_labels).tolist()
    if normal_class is None:
        raise DataError(f"normal_class: say which class of {name} is normal, one of {classes}")
    if normal_class not in classes:
        raise DataError(f"normal_class: {name} has the classes {classes}, not {normal_class}")
    (normals,) = np.nonzero(train_labels == normal_class)
    if channels is None:
        channels = max(grey_or_colour(pixels) for pixels in train[normals[:16]])
    return Dataset(
        name=name,
        image_size=image_size,
        channels=channels,
        train_images=ArrayImages(
            [Entry(f"{name}/train/{index}") for index in normals],
            train[normals],
            [None] * len(normals),
            image_size=image_size,
            channels=channels,
        ),
        test_images=ArrayImages(
            [
                Entry(
                    f"{name}/test/{index}", int(label != normal_class), NORMAL if label == normal_class else str(label)
                )
                for index, label in enumerate(test_labels.tolist())
            ],
            test,
            [None] * len(test),
            image_size=image_size,
            channels=channels,
        ),
        looked_in={"train": f"class {normal_class} of {name}", "test": name},
        source={**source, "normal_class": normal_class},
    )


def open_digits(*, image_size: int, channels: int | None, normal_class: int | None) -> Dataset:
    """scikit-learn's 1,797 real handwritten digits, 8×8, which come with the library.

    The first 70 % of each class are for training, the rest for testing. The file keeps a writer's digits together, so
    few writers are in both.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels, labels = (digits.images / 16).astype(np.float32), digits.target
    in_train = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        (of_class,) = np.nonzero(labels == digit)
        in_train[of_class[: len(of_class) * 7 // 10]] = True
    return one_class_normal(
        pixels[in_train],
        labels[in_train],
        pixels[~in_train],
        labels[~in_train],
        name="digits",
        normal_class=normal_class,
        image_size=image_size,
        channels=channels,
        source={"kind": "digits"},
    )
