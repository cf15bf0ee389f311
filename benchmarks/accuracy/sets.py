"""The image sets: folders in MVTec layout, and one-class sets, where every class in turn is the normal one.

A folder's ``README.md`` may state what two simple methods reach on it (see ``REFERENCES``); the tables repeat that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from memad_fast.data import Dataset
from memad_fast.data.dataset import NORMAL, ArrayImages

# What a set's README says -> what the tables call it.
REFERENCES = {
    "image statistics": r"global image statistics \(one-class\): (?P<image>[01]\.\d+)",
    "patch neighbours": r"nearest neighbour at 128 px: (?P<image>[01]\.\d+)(, its pixel AUROC: (?P<pixel>[01]\.\d+))?",
}


@dataclass(frozen=True)
class ImageSet:
    """Where its images are, as ``memad-fast fit --data`` takes it; ``classes`` are normal one after the other."""

    name: str
    place: str
    classes: tuple[int, ...] = ()
    is_free: bool = False
    """Whether pictures of it may be published with this project."""

    def references(self) -> dict[str, tuple[float, float | None]]:
        """What the set's README says of simple methods: image and pixel AUROC by method."""
        readme = Path(self.place) / "README.md"
        text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
        found = {method: re.search(pattern, text) for method, pattern in REFERENCES.items()}
        return {
            method: (
                float(match["image"]),
                float(match.groupdict()["pixel"]) if match.groupdict().get("pixel") else None,
            )
            for method, match in found.items()
            if match
        }


DIGITS = ImageSet("digits", "digits", tuple(range(10)), is_free=True)


def mnist(folder: Path) -> ImageSet:
    """MNIST's idx files."""
    return ImageSet("mnist", str(folder), tuple(range(10)))


def find_sets(folder: Path) -> list[ImageSet]:
    """The digits that come with scikit-learn, and every folder in MVTec layout in ``folder``."""
    found = sorted(each.parent.parent for each in folder.glob("*/train/good"))
    return [DIGITS, *(ImageSet(each.name, str(each)) for each in found)]


def reduced(data: Dataset, train: int, test: int) -> Dataset:
    """A one-class set of at most ``train`` training images, and of ``test`` test images, as many of each class.

    They are drawn at random, once: the test images are the same whichever class is normal and whatever the seed.
    """
    normals, tests = data.train, data.test
    assert isinstance(normals, ArrayImages)
    assert isinstance(tests, ArrayImages)
    classes = sorted(set(tests.defects))
    chosen: list[int] = []
    for name in classes:
        of_class = [index for index, defect in enumerate(tests.defects) if defect == name]
        label = data.source["normal_class"] if name == NORMAL else int(name)
        chosen += np.random.default_rng(label).permutation(of_class)[: test // len(classes)].tolist()
    drawn = np.random.default_rng(0).permutation(len(normals))[:train].tolist()
    return replace(data, train_images=_some(normals, drawn), test_images=_some(tests, chosen))


def _some(images: ArrayImages, indices: Sequence[int]) -> ArrayImages:
    places = sorted(indices)
    return ArrayImages(
        [images.entries[place] for place in places],
        np.asarray(images.pixels)[places],
        [images.masks[place] for place in places],
        image_size=images.image_size,
        channels=images.channels,
    )
