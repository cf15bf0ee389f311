"""A labelled set: images, and for each a label map that says the class of every pixel.

    FOLDER/image/STEM.*    images, of any sizes
    FOLDER/LABELS/STEM.*   label maps, each of its image's size: one integer a pixel. LABELS may have any name; where
                           there are several such folders, as of several annotators, one is chosen
    FOLDER/fov/STEM.*      not zero where pixels count in an evaluation (the field of view); all do where it is missing

Which integers mean which class is said once: ``values``, (0, 255) by default. Whatever else stands in a label map is an
error, as are label maps in JPEG, whose values are noisy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from memad_fast.data.dataset import DataError, Examples, channels_of_files
from memad_fast.data.folder import images_below
from memad_fast.data.images import ImageError, check_size, load_mask, read_label_map, read_pixels, to_tensor

IMAGES, FIELD_OF_VIEW = "image", "fov"
# Decoded images are kept in memory up to this size, else decoded again each time.
CACHE_BYTES = 2 << 30
_LEAST_SHARE = 1e-3


class LabelledItem(NamedTuple):
    """One image with its classes."""

    image: Tensor  # [C, H, W] float32 in [0, 1]
    labels: Tensor  # [H, W] int64, classes from 0
    counted: Tensor  # [H, W] bool, the field of view
    name: str


class AdaptationBatch(NamedTuple):
    """What one step of F_s sees."""

    images: Tensor  # [B, C, H, W], of the source
    labels: Tensor  # [B, H, W] int64, their classes
    targets: Tensor | None  # [B, C, H, W], of the target; None without adaptation


class PlainImages:
    """Image files, without labels.

    Args:
        paths: the files, at least one.
        image_size, channels: what they are brought to.
    """

    def __init__(self, paths: Sequence[Path], image_size: int, channels: int) -> None:
        check_size(image_size, channels)
        self.paths = list(paths)
        self.image_size = image_size
        self.channels = channels
        self._kept: dict[int, np.ndarray] = {}  # pixels by index, classes by ~index
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def names(self) -> list[str]:
        """The files."""
        return [str(path) for path in self.paths]

    def pixels(self, index: int) -> np.ndarray:
        """``[H, W]`` or ``[H, W, 3]``, in the file's own size."""
        return self._keep(index, lambda: read_pixels(self.paths[index]))

    def _keep(self, key: int, decode: Callable[[], np.ndarray]) -> np.ndarray:
        kept = self._kept.get(key)
        if kept is None:
            kept = decode()
            if self._bytes + kept.nbytes <= CACHE_BYTES:
                self._bytes += kept.nbytes
                self._kept[key] = kept
        return kept


class LabelledImages(PlainImages):
    """Image files with label maps; see ``open_labelled``."""

    def __init__(
        self,
        paths: Sequence[Path],
        label_maps: Sequence[Path],
        fields_of_view: Sequence[Path | None],
        values: Sequence[int],
        image_size: int,
        channels: int,
    ) -> None:
        super().__init__(paths, image_size, channels)
        self.label_maps = list(label_maps)
        self.fields_of_view = list(fields_of_view)
        self.values = tuple(values)

    def __getitem__(self, index: int) -> LabelledItem:
        path = self.fields_of_view[index]
        size = self.image_size
        counted = torch.ones(size, size, dtype=torch.bool) if path is None else load_mask(path, size)[0]
        name = str(self.paths[index])
        image = to_tensor(self.pixels(index), size, self.channels, name=name)
        return LabelledItem(image, resize_classes(self.classes(index), size), counted, name)

    def classes(self, index: int) -> np.ndarray:
        """``[H, W]`` uint8, the class of every pixel, in the file's own size.

        Raises:
            ImageError: the label map cannot be read, has another size than the image, or holds an unknown value.
        """
        return self._keep(~index, lambda: self._read_classes(index))

    def class_shares(self) -> list[float]:
        """The share of every class in the pixels, each image counting alike; of one that does not occur, nearly 0."""
        counts = np.zeros(len(self.values))
        for index in range(len(self)):
            classes = self.classes(index)
            counts += np.bincount(classes.ravel(), minlength=len(counts)) / classes.size
        return ((counts + _LEAST_SHARE) / (counts + _LEAST_SHARE).sum()).tolist()

    def _read_classes(self, index: int) -> np.ndarray:
        path, pixels = self.label_maps[index], self.pixels(index)
        stored = read_label_map(path)
        if stored.shape != pixels.shape[:2]:
            raise ImageError(
                f"{path}: a label map of {stored.shape[0]}x{stored.shape[1]} pixels (height x width) for the image"
                f" {self.paths[index]} of {pixels.shape[0]}x{pixels.shape[1]}"
            )
        unknown = np.setdiff1d(stored, self.values)
        if len(unknown):
            raise ImageError(
                f"{path}: holds the value {', '.join(map(str, unknown[:5]))}{', …' if len(unknown) > 5 else ''},"
                f" expected {', '.join(map(str, self.values))}: say with values which integers are classes"
            )
        order = np.argsort(self.values)
        return order[np.searchsorted(np.array(self.values)[order], stored)].astype(np.uint8)

    def batches(self, batch_size: int) -> Iterator[list[LabelledItem]]:
        """All items in order, ``batch_size`` at a time."""
        for first in range(0, len(self), batch_size):
            yield [self[index] for index in range(first, min(first + batch_size, len(self)))]


class AdaptationExamples(Examples):
    """Batches to train F_s with: source images in the order that is asked for, target images at random.

    Crops, flips and the choice of target images come from torch's global generator.

    Args:
        source: labelled images.
        target: images to adapt to; None: no adaptation.
        crop: the smallest share of an image's sides that a crop keeps before it is resized.
        flips: "none", "horizontal" or "both" (directions, each with probability ½).
    """

    def __init__(
        self, source: LabelledImages, target: PlainImages | None, *, crop: float = 1.0, flips: str = "none"
    ) -> None:
        names = source.names + ([] if target is None else target.names)
        super().__init__(names, source.image_size, source.channels)
        self.source = source
        self.target = target
        self.crop = crop
        self.flips = flips
        # All files are read now: what is wrong with one shows before the training, not amid it.
        with ThreadPoolExecutor() as pool:
            list(pool.map(source.classes, range(len(source))))
            list(pool.map(target.pixels, range(len(target)))) if target is not None else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, positions: list[int]) -> AdaptationBatch:
        """DataLoader asks for a batch at once."""
        images, labels = [], []
        for position in positions:
            view = self._view(self.source.pixels(position).shape)
            images.append(self._image(self.source, position, view))
            labels.append(resize_classes(view(self.source.classes(position)), self.image_size))
        targets = None
        if self.target is not None:
            chosen = torch.randint(len(self.target), (len(positions),)).tolist()
            targets = torch.stack(
                [self._image(self.target, index, self._view(self.target.pixels(index).shape)) for index in chosen]
            )
        return AdaptationBatch(torch.stack(images), torch.stack(labels), targets)

    def _image(self, images: PlainImages, index: int, view: Callable[[np.ndarray], np.ndarray]) -> Tensor:
        name = images.names[index]
        return to_tensor(view(images.pixels(index)), self.image_size, self.channels, name=name)

    def _view(self, shape: Sequence[int]) -> Callable[[np.ndarray], np.ndarray]:
        """A random crop and flip of arrays ``[H, W, …]``."""
        draws = torch.rand(5).tolist()
        share = self.crop + (1.0 - self.crop) * draws[0]
        sides = [max(1, round(share * side)) for side in shape[:2]]
        rows, columns = (
            slice(first := round(draw * (whole - side)), first + side)
            for draw, whole, side in zip(draws[1:3], shape, sides, strict=False)
        )
        mirrored = self.flips != "none" and draws[3] < 0.5
        upside_down = self.flips == "both" and draws[4] < 0.5
        across, down = -1 if mirrored else 1, -1 if upside_down else 1
        return lambda array: np.ascontiguousarray(array[rows, columns][::down, ::across])


def open_labelled(
    folder: str | os.PathLike[str],
    *,
    image_size: int,
    channels: int | None = None,
    values: Sequence[int] = (0, 255),
    labels: str | None = None,
) -> LabelledImages:
    """Open a folder of images with label maps, in the layout at the head of this module.

    Args:
        folder: has the folders "image" and one with label maps.
        image_size: images and label maps are resized to this height and width (label maps to the nearest pixel).
        channels: 1 or 3; default: 1 if a sample of the images is grey, else 3.
        values: the integer that stands in a label map for class 0, class 1, …
        labels: name of the folder with the label maps; needed where there are several.

    Raises:
        DataError: no such folder; no images; several or no folders of label maps; an image without a label map, which
            is named. A file that cannot be read, or whose label map does not fit it, raises ``ImageError`` when it is
            decoded.
    """
    folder = Path(folder)
    paths = _images_of(folder)
    label_maps = _by_stem(folder / (_label_folder(folder) if labels is None else labels))
    fields_of_view = _by_stem(folder / FIELD_OF_VIEW)
    missing = [path for path in paths if path.stem not in label_maps]
    if missing:
        where = folder / (labels or _label_folder(folder))
        more = f" (nor have {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise DataError(f"{missing[0]}: has no label map{more}; looked for {where / missing[0].stem}.png or the like")
    return LabelledImages(
        paths,
        [label_maps[path.stem] for path in paths],
        [fields_of_view.get(path.stem) for path in paths],
        values,
        image_size,
        channels_of_files(paths) if channels is None else channels,
    )


def open_plain(folder: str | os.PathLike[str], *, image_size: int, channels: int) -> PlainImages:
    """Images to adapt to: those in FOLDER/image, else in FOLDER/train/good (the MVTec layout), else in FOLDER.

    Raises:
        DataError: no such folder, or no images.
    """
    folder = Path(folder)
    places = (folder / IMAGES, folder / "train" / "good", folder)
    place = next((place for place in places if place.is_dir()), folder)
    return PlainImages(_images_in(place), image_size, channels)


def resize_classes(classes: np.ndarray, image_size: int) -> Tensor:
    """``[H, W]`` uint8 to ``[image_size, image_size]`` int64, nearest pixel."""
    image = Image.fromarray(classes)
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(image)).long()


def _images_of(folder: Path) -> list[Path]:
    if folder.is_dir() and not (folder / IMAGES).is_dir():
        raise DataError(f"{folder}: has no folder {IMAGES!r}; expected images in {folder / IMAGES}")
    return _images_in(folder / IMAGES)


def _images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    paths = images_below(folder)
    if not paths:
        raise DataError(f"{folder}: no images")
    return paths


def _label_folder(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    candidates = [name for name in names if name not in (IMAGES, FIELD_OF_VIEW) and not name.startswith(".")]
    if len(candidates) == 1:
        return candidates[0]
    found = f"found {', '.join(candidates)}: say with labels which" if candidates else "found none"
    raise DataError(f"{folder}: expected one folder of label maps beside {IMAGES!r}, {found}")


def _by_stem(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in images_below(folder)}
