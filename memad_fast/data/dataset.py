"""What a data set is to the rest: normal images to train on, and labelled images to test on.

Dataset ── train: Images   normal, unlabelled use
        └─ test:  Images   normal and abnormal, each with its defect type and, where known, its mask
Images[i] -> Item          decoded on demand, resized to the model's size
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from memad_fast._arguments import check_choice
from memad_fast.data.images import (
    RESIZES,
    check_size,
    grey_or_colour,
    load_image,
    load_mask,
    read_pixels,
    resize_mask,
    to_tensor,
)

if TYPE_CHECKING:
    from typing_extensions import Self

NORMAL = "good"


class DataError(ValueError):
    """A data set that is not what it must be. The message names the file or folder and what was looked for."""


class Item(NamedTuple):
    """One image with what is known of it."""

    image: Tensor  # [C, H, W] float32 in [0, 1]
    label: int  # 0 normal, 1 abnormal
    defect: str  # "good", or the defect type
    mask: Tensor | None  # [1, H, W] bool; all False for a normal image, None for an abnormal one without a mask
    name: str  # the path, or the place in an array


class Batch(NamedTuple):
    """Items stacked by ``collate``."""

    images: Tensor  # [B, C, H, W]
    labels: Tensor  # [B] int64
    defects: list[str]
    masks: list[Tensor | None]
    names: list[str]


class Entry(NamedTuple):
    """What is known of an image before it is decoded."""

    name: str
    label: int = 0
    defect: str = NORMAL


class Examples(TorchDataset[Any], ABC):
    """What a training takes its batches from; whatever a batch is, the model that is trained understands it.

    Args:
        names: files, or places in an array, of all that it is made of.
        image_size, channels: of the images.
    """

    def __init__(self, names: Sequence[str], image_size: int, channels: int) -> None:
        self.names = list(names)
        self.image_size = image_size
        self.channels = channels
        self.resize = "bilinear"

    @abstractmethod
    def __len__(self) -> int:
        """How many make an epoch."""

    @abstractmethod
    def __getitems__(self, positions: list[int]) -> Any:
        """The batch of some examples. What is random in it comes from the global generators, which are seeded."""


class Images(TorchDataset[Item], ABC):
    """A list of images that are decoded when they are asked for. Works with ``torch.utils.data.DataLoader``
    (``collate_fn=memad_fast.data.collate``).
    """

    def __init__(self, entries: Sequence[Entry], image_size: int, channels: int) -> None:
        check_size(image_size, channels)
        self.entries = list(entries)
        self.image_size = image_size
        self.channels = channels
        self.resize = "bilinear"

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Item:
        entry = self.entries[index]
        return Item(self.image(index), entry.label, entry.defect, self.mask(index), entry.name)

    def with_resize(self, resize: str) -> Self:
        """The same images, brought to their size by another filter: "bilinear" or "bicubic"."""
        check_choice("resize", resize, tuple(RESIZES))
        images = copy.copy(self)
        images.resize = resize
        return images

    def batches(self, batch_size: int, indices: Sequence[int] | None = None) -> Iterator[Batch]:
        """Batches in order, of all images or of the chosen ones. Threads decode the next one while this one is used."""
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        chosen = range(len(self)) if indices is None else indices
        with ThreadPoolExecutor() as pool:
            ahead: list[Future[Item]] = []
            for first in range(0, len(chosen) + batch_size, batch_size):
                ready, ahead = ahead, [pool.submit(self.__getitem__, i) for i in chosen[first : first + batch_size]]
                if ready:
                    yield collate([item.result() for item in ready])

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """Decode image ``index`` to ``[C, H, W]`` float32."""

    @abstractmethod
    def has_mask(self, index: int) -> bool:
        """Whether a drawn mask belongs to image ``index``; nothing is decoded."""

    @abstractmethod
    def _mask(self, index: int) -> Tensor:
        """Decode the mask of an image that has one."""

    def mask(self, index: int) -> Tensor | None:
        """The mask ``[1, H, W]`` bool of image ``index``; all False for a normal image, None where none is known."""
        if self.has_mask(index):
            return self._mask(index)
        if self.entries[index].label == 0:
            return torch.zeros(1, self.image_size, self.image_size, dtype=torch.bool)
        return None

    @property
    def names(self) -> list[str]:
        """Path, or place in an array, of each image."""
        return [entry.name for entry in self.entries]

    @property
    def labels(self) -> Tensor:
        """``[N]`` int64: 0 normal, 1 abnormal."""
        return torch.tensor([entry.label for entry in self.entries], dtype=torch.int64)

    @property
    def defects(self) -> list[str]:
        """Defect type of each image; "good" for a normal one."""
        return [entry.defect for entry in self.entries]


class FileImages(Images):
    """Images in files. ``masks[i]`` is the mask's file or None."""

    def __init__(
        self, entries: Sequence[Entry], masks: Sequence[Path | None], *, image_size: int, channels: int
    ) -> None:
        super().__init__(entries, image_size, channels)
        self.masks = list(masks)

    def image(self, index: int) -> Tensor:
        """Decode the file."""
        return load_image(self.entries[index].name, self.image_size, self.channels, resize=self.resize)

    def has_mask(self, index: int) -> bool:
        """Whether a mask file was found."""
        return self.masks[index] is not None

    def _mask(self, index: int) -> Tensor:
        path = self.masks[index]
        assert path is not None
        return load_mask(path, self.image_size)


class ArrayImages(Images):
    """Images in memory, in their own size and type; resized when asked for."""

    def __init__(
        self,
        entries: Sequence[Entry],
        pixels: Sequence[np.ndarray] | np.ndarray,
        masks: Sequence[np.ndarray | None],
        *,
        image_size: int,
        channels: int,
    ) -> None:
        super().__init__(entries, image_size, channels)
        self.pixels = pixels
        self.masks = masks

    def image(self, index: int) -> Tensor:
        """Resize the array's image."""
        name = self.entries[index].name
        return to_tensor(self.pixels[index], self.image_size, self.channels, name=name, resize=self.resize)

    def has_mask(self, index: int) -> bool:
        """Whether a mask was given."""
        return self.masks[index] is not None

    def _mask(self, index: int) -> Tensor:
        mask = self.masks[index]
        assert mask is not None
        return resize_mask(np.asarray(mask) != 0, self.image_size)


@dataclass(frozen=True)
class Dataset:
    """Normal images to train on and labelled images to test on, all of one size and channel count.

    ``train`` and ``test`` raise ``DataError`` when they are empty: fitting needs the one, evaluating the other, and
    neither needs both.
    """

    name: str
    image_size: int
    channels: int
    train_images: Images
    test_images: Images
    looked_in: Mapping[str, str]  # "train" and "test" -> where the images were looked for
    source: Mapping[str, Any] = field(default_factory=dict)  # what config.json records of the data

    def with_resize(self, resize: str) -> Dataset:
        """The same set, its images brought to their size by another filter: "bilinear" or "bicubic"."""
        return replace(
            self,
            train_images=self.train_images.with_resize(resize),
            test_images=self.test_images.with_resize(resize),
        )

    @property
    def train(self) -> Images:
        """The normal training images, at least one."""
        return self._at_least_one("train", self.train_images, "normal training images")

    @property
    def test(self) -> Images:
        """The labelled test images, at least one."""
        return self._at_least_one("test", self.test_images, "test images")

    @property
    def has_masks(self) -> bool:
        """Whether any abnormal test image has a mask."""
        images = self.test_images
        return any(entry.label and images.has_mask(index) for index, entry in enumerate(images.entries))

    def _at_least_one(self, part: str, images: Images, what: str) -> Images:
        if not len(images):
            raise DataError(f"{self.name}: no {what}; looked in {self.looked_in[part]}")
        return images


def collate(items: Sequence[Item]) -> Batch:
    """Stack items to a batch; masks stay a list, since some images have none."""
    return Batch(
        images=torch.stack([item.image for item in items]),
        labels=torch.tensor([item.label for item in items], dtype=torch.int64),
        defects=[item.defect for item in items],
        masks=[item.mask for item in items],
        names=[item.name for item in items],
    )


def split_normals(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split ``count`` normal images into those to train on and those held out, the same for the same arguments.

    ``round(fraction · count)`` are held out, but never all and, where fraction > 0 and count > 1, never none.
    Returns two ascending lists of indices.

    Example:
        >>> from memad_fast.data import split_normals
        >>> train, held_out = split_normals(10, 0.2, seed=0)
        >>> len(train), len(held_out), sorted(train + held_out) == list(range(10))
        (8, 2, True)
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1 image, got {count}")
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"fraction: expected 0 to below 1, got {fraction}")
    held_out = round(fraction * count)
    if fraction > 0:
        held_out = min(max(held_out, 1), count - 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def channels_of_files(paths: Sequence[Path], sample: int = 16) -> int:
    """1 if all of an evenly spaced sample of the files are grey, else 3."""
    step = max(1, len(paths) // sample)
    return max((grey_or_colour(read_pixels(path)) for path in paths[::step][:sample]), default=3)
