"""The picture of the perturbations: what stands where in it, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from memad_fast.scoring import write_perturbations
from memad_fast.scoring.perturb import _LINE, _MARGIN

SIZE = 160  # wider than any title, so that columns are this wide


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "images"
    place.mkdir()
    rng = np.random.default_rng(0)
    for index in range(5):
        shape = (SIZE, SIZE) if index % 2 else (SIZE, SIZE, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(place / f"größe {index}.png")
    return place


def _cell(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    top, left = _MARGIN + _LINE + row * (SIZE + _LINE), _MARGIN + column * (SIZE + _MARGIN)
    return picture[top : top + SIZE, left : left + SIZE].astype(int)


def _read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_each_image_stands_beside_its_perturbations(folder: Path, tmp_path: Path) -> None:
    assert write_perturbations(folder, tmp_path / "all.png", size=SIZE) == 5
    picture = _read(tmp_path / "all.png")
    assert picture.shape == (_MARGIN + _LINE + 5 * (SIZE + _LINE), _MARGIN + 4 * (SIZE + _MARGIN), 3)
    for row, path in enumerate(sorted(folder.iterdir())):
        original = np.asarray(Image.open(path).convert("RGB")).astype(int)
        same = [(_cell(picture, row, column) == original).all(axis=2) for column in range(4)]
        assert same[0].all()
        assert 5 / 64 / 5 < 1 - same[1].mean() <= 5 / 25  # five tiles, which may lie on each other
        assert 0.3 < 1 - same[2].mean() < 0.8
        assert np.array_equal(np.sort(_cell(picture, row, 2), axis=None), np.sort(original, axis=None))
        assert same[3].mean() < 0.5
        # Each grey value becomes one other, and their order stays.
        order = np.argsort(original, axis=None, kind="stable")
        assert (np.diff(_cell(picture, row, 3).ravel()[order]) >= 0).all()


@pytest.mark.parametrize("kind", ["inpainting", "shuffling", "intensity"])
def test_one_kind_can_be_shown_alone(kind: str, folder: Path, tmp_path: Path) -> None:
    write_perturbations(folder, tmp_path / "one.png", kind=kind, size=SIZE, most=1)
    picture = _read(tmp_path / "one.png")
    assert picture.shape[1] == _MARGIN + 2 * (SIZE + _MARGIN)
    assert (_cell(picture, 0, 0) != _cell(picture, 0, 1)).any()


def test_many_images_are_thinned_evenly(folder: Path, tmp_path: Path) -> None:
    assert write_perturbations(folder, tmp_path / "some.png", size=SIZE, most=3) == 3
    for row, index in enumerate((0, 2, 4)):
        original = np.asarray(Image.open(folder / f"größe {index}.png").convert("RGB"))
        assert np.array_equal(_cell(_read(tmp_path / "some.png"), row, 0), original)


def test_the_seed_fixes_the_picture_and_the_caller_keeps_his_random_numbers(folder: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    pictures = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_perturbations(folder, tmp_path / f"{name}.png", size=32, seed=seed)
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    assert torch.equal(state, torch.get_rng_state())


def test_what_cannot_be_done_is_told_and_leaves_the_old_picture(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    write_perturbations(folder, out, size=16)
    before = out.read_bytes()
    (folder / "torn.png").write_bytes((folder / "größe 0.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"torn\.png: not a readable image"):
        write_perturbations(folder, out, size=16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no images in it"):
        write_perturbations(tmp_path / "empty", out)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        write_perturbations(tmp_path / "nowhere", out)
    for changes, message in (
        ({"size": 0}, "size: expected at least 1 pixel, got 0"),
        ({"most": 0}, "most: expected at least 1 image, got 0"),
        ({"kind": "blur"}, "kind: expected one of inpainting, shuffling, intensity, all, got 'blur'"),
    ):
        with pytest.raises(ValueError, match=message):
            write_perturbations(folder, out, **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"out: expected a file that ends in \.png, got .*picture\.txt"):
        write_perturbations(folder, tmp_path / "picture.txt")
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []
