"""A sheet shows the images that it says it shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.accuracy.sheets import _GAP, _MARGIN, _TITLE, TILE, Block, choose, draw, save_sheet
from memad_fast.data import open_data, preprocessing
from memad_fast.models import PatchCore, PatchCoreConfig
from memad_fast.scoring import Run, heatmap, load_run, save_run


@pytest.fixture
def run(parts: Path, tmp_path: Path) -> Run:
    data = open_data(parts, image_size=16)
    config = PatchCoreConfig(image_size=16, channels=1, backbone="pixels", patch=4, coreset=1.0, smoothing=0.0)
    model = PatchCore(config)
    model.fill(torch.stack([data.train[index].image for index in range(14)]))
    threshold = {"value": 0.5, "map_level": 0.5, "quantile": 0.99, "count": 14}
    save_run(tmp_path / "run", model, threshold=threshold, preprocessing=preprocessing(16, 1), training={})
    return load_run(tmp_path / "run", "cpu")


def test_the_worst_are_high_good_ones_and_low_defective_ones() -> None:
    scores, labels = np.array([3.0, 9.0, 1.0, 2.0, 8.0, 0.0]), np.array([0, 0, 0, 1, 1, 1])
    blocks = choose(scores, labels, seed=0, count=2)
    assert [len(block.images) for block in blocks] == [2, 2, 2, 2]
    assert set(blocks[0].images) < {0, 1, 2}
    assert set(blocks[1].images) < {3, 4, 5}
    assert blocks[2].images == [1, 0]
    assert blocks[3].images == [5, 3]


def test_the_images_at_random_are_the_same_for_every_system() -> None:
    scores, labels = np.arange(40.0), np.array([0] * 20 + [1] * 20)
    first = choose(scores, labels, seed=0)
    assert choose(scores[::-1], labels, seed=0)[:2] == first[:2]
    assert choose(scores, labels, seed=1)[:2] != first[:2]


def tile(sheet: Image.Image, row: int, column: int) -> np.ndarray:
    left, top = _MARGIN + column * (TILE + _GAP), _TITLE + row * (TILE + _GAP)
    return np.asarray(sheet.crop((left, top, left + TILE, top + TILE)))


def test_the_tiles_are_input_reconstruction_map_and_mask(run: Run, parts: Path) -> None:
    data = open_data(parts, image_size=16)
    square, bright = data.test.defects.index("square"), data.test.defects.index("bright")
    scores = np.ones(len(data.test))
    sheet = draw(run, data, scores, [Block("two", [square, bright]), Block("none", [])])
    image = (data.test[square].image[0].numpy() * 255 + 0.5).astype(np.uint8)
    enlarged = np.repeat(np.repeat(image, TILE // 16, axis=0), TILE // 16, axis=1)
    assert np.array_equal(tile(sheet, 0, 0)[..., 0], enlarged)
    assert np.array_equal(tile(sheet, 1, 0)[..., 0], enlarged), "PatchCore's reconstruction is the image"
    mask = np.zeros((TILE, TILE), np.uint8)
    mask[4 * TILE // 16 : 9 * TILE // 16, 5 * TILE // 16 : 10 * TILE // 16] = 255
    assert np.array_equal(tile(sheet, 3, 0)[..., 0], mask)
    assert (tile(sheet, 3, 1) == tile(sheet, 3, 1)[0, 0]).all(), "no mask is known of this one"
    assert not (tile(sheet, 3, 1)[0, 0] == 0).all()
    found = run.model.score(data.test[square].image[None]).anomaly_map[0, 0].numpy()
    colours = heatmap.COLOURS[heatmap.levels(found, run.map_level, (TILE, TILE))]
    assert np.array_equal(tile(sheet, 2, 0), colours), "the map has the run's scale, not one of its own"


def test_a_sheet_is_a_png(run: Run, parts: Path, tmp_path: Path) -> None:
    save_sheet(run, open_data(parts, image_size=16), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 8 * TILE
