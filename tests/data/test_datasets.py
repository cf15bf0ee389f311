"""Folders, arrays, digits and idx files: what is found, in which order, and what is refused by name."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from memad_fast.data import DataError, ImageError, collate, from_arrays, open_data, split_normals
from memad_fast.data.idx import read_idx


def save(path: Path, pixels: np.ndarray | int = 100, size: tuple[int, int] = (10, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full(size, pixels, np.uint8) if isinstance(pixels, int) else pixels
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def bottles(tmp_path: Path) -> Path:
    """Three normals to train on; one normal, two scratched and one dented bottle to test; one mask is missing."""
    folder = tmp_path / "bottles"
    for index in range(3):
        save(folder / "train" / "good" / f"{index}.png", 10 * index)
    save(folder / "test" / "good" / "0.JPG")
    save(folder / "test" / "scratch" / "0.png", size=(30, 20))
    save(folder / "test" / "scratch" / "1.bmp")
    save(folder / "test" / "dent" / "0.tif")
    mask = np.zeros((10, 10), np.uint8)
    mask[:5] = 255
    save(folder / "ground_truth" / "scratch" / "0_mask.png", mask)
    save(folder / "ground_truth" / "dent" / "0.png", mask)
    (folder / "train" / "good" / "manifest.csv").write_text("not an image")
    (folder / "train" / "good" / "._0.png").write_text("what a file system leaves")
    (folder / "license.txt").write_text("free")
    return folder


def test_a_folder_in_mvtec_layout_gives_images_types_and_masks(bottles: Path) -> None:
    data = open_data(bottles, image_size=8)
    assert (data.name, data.channels, len(data.train), len(data.test)) == ("bottles", 1, 3, 4)
    assert [Path(name).name for name in data.train.names] == ["0.png", "1.png", "2.png"]
    assert [(Path(item.name).name, item.label, item.defect) for item in data.test] == [
        ("0.tif", 1, "dent"),
        ("0.JPG", 0, "good"),
        ("0.png", 1, "scratch"),
        ("1.bmp", 1, "scratch"),
    ]
    dent, good, scratch, unmasked = data.test
    assert dent.mask is not None
    assert dent.mask.sum() == 32
    assert good.mask is not None
    assert not good.mask.any()
    assert scratch.mask is not None
    assert scratch.mask.shape == (1, 8, 8)
    assert unmasked.mask is None
    assert data.has_masks
    assert data.test.labels.tolist() == [1, 0, 1, 1]


def test_a_dataset_feeds_a_dataloader(bottles: Path) -> None:
    data = open_data(bottles, image_size=8, channels=3)
    (batch,) = DataLoader(data.test, batch_size=4, collate_fn=collate)
    assert batch.images.shape == (4, 3, 8, 8)
    assert batch.defects == ["dent", "good", "scratch", "scratch"]
    assert [mask is None for mask in batch.masks] == [False, False, False, True]


def test_batches_come_in_order_with_a_rest(bottles: Path) -> None:
    images = open_data(bottles, image_size=8).test
    assert [len(batch.names) for batch in images.batches(3)] == [3, 1]
    assert [name for batch in images.batches(1) for name in batch.names] == images.names
    (chosen,) = images.batches(8, [2, 0])
    assert chosen.names == [images.names[2], images.names[0]]
    assert list(images.batches(2, [])) == []
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        next(images.batches(0))


def test_a_folder_without_normals_names_where_it_looked(bottles: Path) -> None:
    for path in (bottles / "train" / "good").glob("*.png"):
        path.unlink()
    data = open_data(bottles, image_size=8)
    assert len(data.test) == 4  # enough to evaluate
    with pytest.raises(DataError, match=r"bottles: no normal training images; looked in .*/train/good"):
        _ = data.train


def test_a_folder_without_test_images_can_be_trained_on(bottles: Path, tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    (bottles / "train").rename(tmp_path / "only" / "train")
    data = open_data(tmp_path / "only", image_size=8)
    assert len(data.train) == 3
    assert not data.has_masks
    with pytest.raises(DataError, match=r"only: no test images; looked in .*/test/\*"):
        _ = data.test


def test_a_folder_of_another_layout_is_refused_with_the_expected_one(tmp_path: Path) -> None:
    save(tmp_path / "flat" / "0.png")
    with pytest.raises(DataError, match=r"flat: neither .*train/good nor .*test is there; expected the MVTec layout"):
        open_data(tmp_path / "flat", image_size=8)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_data(tmp_path / "nowhere", image_size=8)


def test_masks_of_which_none_fits_are_refused(bottles: Path) -> None:
    masks = bottles / "ground_truth" / "scratch"
    (masks / "0_mask.png").rename(masks / "scratch-zero.png")
    with pytest.raises(DataError, match=r"scratch: none of its 1 masks.*0_mask\.png, found scratch-zero\.png"):
        open_data(bottles, image_size=8)


def test_an_unreadable_image_is_named_when_it_is_asked_for(bottles: Path) -> None:
    data = open_data(bottles, image_size=8)
    path = bottles / "train" / "good" / "1.png"
    path.write_bytes(path.read_bytes()[:50])
    assert data.train[0].image.shape == (1, 8, 8)
    with pytest.raises(ImageError, match=r"good/1\.png: not a readable image"):
        data.train[1]


def test_one_colour_image_makes_the_set_a_colour_one(bottles: Path) -> None:
    same = np.repeat(np.arange(100, dtype=np.uint8).reshape(10, 10, 1), 3, axis=2)
    save(bottles / "train" / "good" / "3.png", same)
    assert open_data(bottles, image_size=8).channels == 1  # grey, stored as colour
    same[0, 0, 0] = 200
    save(bottles / "train" / "good" / "3.png", same)
    assert open_data(bottles, image_size=8).channels == 3


def test_nested_folders_are_searched(bottles: Path) -> None:
    save(bottles / "train" / "good" / "monday" / "7.png")
    assert len(open_data(bottles, image_size=8).train) == 4


def test_a_class_is_refused_for_a_folder(bottles: Path) -> None:
    with pytest.raises(DataError, match="normal_class"):
        open_data(bottles, image_size=8, normal_class=1)


def test_digits_are_there_without_a_download() -> None:
    data = open_data("digits", image_size=16, normal_class=3)
    assert data.channels == 1
    assert len(data.train) == 128
    assert len(data.test) == 544
    assert {item.defect for item in data.test if item.label == 0} == {"good"}
    assert set(data.test.defects) == {"good", *"012456789"}
    assert data.train[0].image.shape == (1, 16, 16)
    assert 0.5 < data.train[0].image.max() <= 1
    assert data.train.labels.sum() == 0
    again = open_data("digits", image_size=16, normal_class=3)
    assert torch.equal(data.train[5].image, again.train[5].image)


def test_no_digit_is_both_trained_and_tested_on() -> None:
    data = open_data("digits", image_size=8, normal_class=0)
    train = {item.image.numpy().tobytes() for item in data.train}
    assert not train & {item.image.numpy().tobytes() for item in data.test}


@pytest.mark.parametrize("normal_class", [None, 10, -1])
def test_the_normal_class_must_be_one_of_the_classes(normal_class: int | None) -> None:
    with pytest.raises(DataError, match=r"normal_class: .*digits.*\[0, 1, 2"):
        open_data("digits", image_size=8, normal_class=normal_class)


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """Idx files, some gzipped: 6 + 4 images of 5×7 pixels in the classes 0 and 1."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "letters"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 256, (6, 5, 7), dtype=np.uint8)))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.array([0, 1, 0, 1, 0, 0], np.uint8))))
    (folder / "t10k-images.idx3-ubyte.gz").write_bytes(
        gzip.compress(idx(rng.integers(0, 256, (4, 5, 7), dtype=np.uint8)))
    )
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([1, 0, 1, 1], np.uint8)))
    return folder


def test_idx_files_give_one_class_as_normal(letters: Path) -> None:
    data = open_data(letters, image_size=8, normal_class=1)
    assert (len(data.train), len(data.test), data.channels) == (2, 4, 1)
    assert [(item.label, item.defect) for item in data.test] == [(0, "good"), (1, "0"), (0, "good"), (0, "good")]
    assert data.train.names == ["letters/train/1", "letters/train/3"]
    assert data.train[0].image.shape == (1, 8, 8)
    assert dict(data.source) == {"kind": "idx", "path": str(letters), "normal_class": 1}


def test_pixels_of_idx_files_are_the_stored_ones(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "x").write_bytes(idx(values))
    assert np.array_equal(read_idx(tmp_path / "x", 3), values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "truncated, expected"),
        (lambda data: data + b"x", "longer than its header says"),
        (lambda data: data[:9], "truncated in its header"),
        (lambda data: data[:2], "too few"),
        (lambda data: b"", "too few"),
        (lambda data: b"\x00\x00\x0d" + data[3:], "expected the magic number 0x00000803.*got 0x00000d03"),
        (lambda data: data[:3] + b"\x01" + data[4:], "magic number"),
        (lambda data: data[:4] + b"\xff\xff\xff\xff" + data[8:], "truncated, expected"),
        (lambda data: b"\x89PNG" + data[4:], "magic number"),
    ],
)
def test_a_malformed_idx_file_is_named(letters: Path, damage: Any, message: str) -> None:
    path = letters / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"train-images-idx3-ubyte: .*{message}"):
        open_data(letters, image_size=8, normal_class=0)


@pytest.mark.parametrize("keep", [0, 5, 30])
def test_a_truncated_gzip_file_is_named(letters: Path, keep: int) -> None:
    path = letters / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz"):
        open_data(letters, image_size=8, normal_class=0)


def test_a_missing_idx_file_is_named_with_what_was_looked_for(letters: Path) -> None:
    (letters / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="letters: no test labels; looked for t10k-labels-idx1-ubyte, "):
        open_data(letters, image_size=8, normal_class=0)


def test_labels_and_images_must_be_as_many(letters: Path) -> None:
    (letters / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([1, 0], np.uint8)))
    with pytest.raises(DataError, match="letters: 4 test images but 2 labels"):
        open_data(letters, image_size=8, normal_class=0)


@pytest.mark.parametrize(
    "images",
    [
        np.random.default_rng(0).random((5, 8, 8)),
        np.random.default_rng(0).random((5, 8, 8, 1)).astype(np.float32),
        (np.random.default_rng(0).random((5, 8, 8)) * 255).astype(np.uint8),
        (np.random.default_rng(0).random((5, 8, 8)) * 65535).astype(np.uint16),
        torch.rand(5, 8, 8),
        torch.rand(5, 1, 8, 8).half(),
        torch.rand(5, 1, 8, 8, requires_grad=True),
    ],
)
def test_grey_arrays_of_every_type_are_taken(images: Any) -> None:
    data = from_arrays(images)
    assert (data.channels, data.image_size) == (1, 8)
    expected = torch.as_tensor(np.asarray(images.detach() if isinstance(images, torch.Tensor) else images)).double()
    expected = expected.reshape(5, 1, 8, 8) / {torch.uint8: 255, torch.uint16: 65535}.get(
        torch.as_tensor(np.asarray(images)).dtype if isinstance(images, np.ndarray) else torch.float32, 1
    )
    torch.testing.assert_close(data.train[2].image.double(), expected[2], atol=1e-6, rtol=0)


def test_colour_tensors_are_channels_first_and_arrays_channels_last() -> None:
    images = torch.rand(2, 3, 8, 8)
    first, last = from_arrays(images), from_arrays(images.permute(0, 2, 3, 1).numpy())
    assert first.channels == last.channels == 3
    assert torch.equal(first.train[1].image, images[1])
    assert torch.equal(last.train[1].image, images[1])


def test_arrays_of_another_size_are_resized() -> None:
    data = from_arrays(torch.rand(2, 8, 8), torch.rand(3, 20, 30), [0, 1, 1], masks=np.ones((3, 40, 50)))
    assert data.test[1].image.shape == data.test[1].mask.shape == (1, 8, 8)
    assert not data.test[0].mask.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": np.zeros((4, 8))}, r"train: expected \[N, H, W\]"),
        ({"train": np.zeros((4, 3, 8, 8))}, r"train: expected .*\[N, H, W, C\]"),
        ({"train": torch.zeros(4, 8, 8, 3)}, r"train: expected .*\[N, C, H, W\]"),
        ({"train": np.zeros((4, 8, 9))}, "image_size: say which"),
        ({"test": np.zeros((2, 8, 8))}, "labels: expected 2, one a test image, got none"),
        ({"test": np.zeros((2, 8, 8)), "labels": [1]}, "labels: expected 2, one a test image, got 1"),
        ({"test": np.zeros((2, 8, 8)), "labels": [0, 1], "defects": ["a"]}, "defects: expected 2"),
        ({"test": np.zeros((2, 8, 8)), "labels": [0, 1], "masks": np.zeros((3, 8, 8))}, r"masks: expected \[2, H, W\]"),
    ],
)
def test_arrays_that_do_not_fit_together_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_arrays(**({"train": np.zeros((4, 8, 8))} | options))


def test_a_value_that_is_no_pixel_is_named_with_its_place() -> None:
    images = torch.rand(4, 8, 8)
    images[2, 0, 0] = torch.nan
    with pytest.raises(ImageError, match="arrays/train/2: expected finite pixels"):
        from_arrays(images).train[2]


def test_no_training_images_is_an_error_when_they_are_asked_for() -> None:
    with pytest.raises(DataError, match="no normal training images"):
        _ = from_arrays(np.zeros((0, 8, 8))).train


@given(st.integers(1, 300), st.floats(0, 0.99), st.integers(0, 5))
def test_a_split_is_a_partition_and_always_the_same(count: int, fraction: float, seed: int) -> None:
    train, held_out = split_normals(count, fraction, seed)
    assert sorted(train + held_out) == list(range(count))
    assert train
    assert bool(held_out) == (fraction > 0 and count > 1)
    assert (train, held_out) == split_normals(count, fraction, seed)


def test_seeds_give_different_splits() -> None:
    assert split_normals(100, 0.2, 0) != split_normals(100, 0.2, 1)
