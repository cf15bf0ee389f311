"""A folder in the layout of MVTec AD:

    FOLDER/train/good/*                      normal images to train on
    FOLDER/test/good/*                       normal images to test on
    FOLDER/test/TYPE/*                       abnormal images, one folder a defect type
    FOLDER/ground_truth/TYPE/STEM_mask.png   the mask of FOLDER/test/TYPE/STEM.*, where there is one

Masks may be of any image type, and may be called STEM without "_mask".
"""

from __future__ import annotations

from pathlib import Path

from memad_fast.data.dataset import NORMAL, DataError, Dataset, Entry, FileImages, channels_of_files
from memad_fast.data.images import is_image


def open_folder(folder: Path, *, image_size: int, channels: int | None) -> Dataset:
    """Open a folder in MVTec layout. Only names are read now; images are decoded when asked for."""
    train_folder, test_folder = folder / "train" / NORMAL, folder / "test"
    if not train_folder.is_dir() and not test_folder.is_dir():
        raise DataError(
            f"{folder}: neither {train_folder} nor {test_folder} is there; expected the MVTec layout, with the normal"
            f" images in {train_folder}"
        )
    normals = images_below(train_folder)
    entries, masks = _test_entries(folder)
    if channels is None:
        channels = channels_of_files(normals or [Path(entry.name) for entry in entries])
    return Dataset(
        name=folder.name or str(folder),
        image_size=image_size,
        channels=channels,
        train_images=FileImages(
            [Entry(str(path)) for path in normals], [None] * len(normals), image_size=image_size, channels=channels
        ),
        test_images=FileImages(entries, masks, image_size=image_size, channels=channels),
        looked_in={"train": str(train_folder), "test": f"{test_folder}/*"},
        source={"kind": "folder", "path": str(folder)},
    )


def images_below(folder: Path) -> list[Path]:
    """All images in the folder and the folders in it, sorted by path; none where the folder is missing."""
    return sorted(path for path in folder.rglob("*") if is_image(path) and path.is_file())


def _test_entries(folder: Path) -> tuple[list[Entry], list[Path | None]]:
    entries: list[Entry] = []
    masks: list[Path | None] = []
    test = folder / "test"
    types = sorted(path for path in test.iterdir() if path.is_dir()) if test.is_dir() else []
    for type_folder in types:
        defect = type_folder.name
        images = images_below(type_folder)
        found = [None] * len(images) if defect == NORMAL else _masks(folder / "ground_truth" / defect, images)
        entries += [Entry(str(path), int(defect != NORMAL), defect) for path in images]
        masks += found
    return entries, masks


def _masks(folder: Path, images: list[Path]) -> list[Path | None]:
    by_stem = {path.stem: path for path in images_below(folder)}
    found = [by_stem.get(f"{image.stem}_mask") or by_stem.get(image.stem) for image in images]
    if by_stem and images and not any(found):
        raise DataError(
            f"{folder}: none of its {len(by_stem)} masks belongs to an image; expected names like"
            f" {images[0].stem}_mask.png, found {sorted(by_stem.values())[0].name}"
        )
    return found
