from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from memad_fast.scoring import heatmap


def test_what_good_parts_reach_lies_at_the_mark_and_the_scale_ends_beyond_it() -> None:
    values = np.array([[0.0, 0.2, 0.5, 9.0]], dtype=np.float32)
    places = heatmap.levels(values, 0.2, (4, 1))
    assert places.tolist() == [[0, round(255 * heatmap.NORMAL_MARK), 255, 255]]


def test_the_scale_is_the_runs_and_not_the_images() -> None:
    quiet = np.full((4, 4), 0.01, dtype=np.float32)
    loud = quiet.copy()
    loud[0, 0] = 1.0
    assert heatmap.levels(quiet, 0.2, (4, 4))[3, 3] == heatmap.levels(loud, 0.2, (4, 4))[3, 3] < 10


def test_a_map_of_zeros_and_a_level_of_zero_are_not_divided_by() -> None:
    values = np.array([[0.0, 0.1]], dtype=np.float32)
    assert heatmap.levels(values, 0.0, (2, 1)).tolist() == [[0, 255]]


def test_non_finite_values_end_on_the_scale() -> None:
    values = np.array([[np.nan, np.inf, -np.inf]], dtype=np.float32)
    assert heatmap.levels(values, 1.0, (3, 1)).tolist() == [[0, 255, 0]]


def test_a_saved_heat_map_reads_back_as_colours_and_as_places(tmp_path: Path) -> None:
    places = np.arange(256, dtype=np.uint8).reshape(16, 16)
    heatmap.save(tmp_path / "deep" / "map.png", places)
    with Image.open(tmp_path / "deep" / "map.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), places)
        assert np.array_equal(np.asarray(image.convert("RGB")).reshape(256, 3), heatmap.COLOURS)


def test_an_overlay_leaves_the_image_alone_where_nothing_differs() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    assert np.array_equal(heatmap.overlay(image, np.zeros((5, 5), dtype=np.uint8)), image)
    red = heatmap.overlay(np.zeros((1, 1, 3), dtype=np.uint8), np.full((1, 1), 255, dtype=np.uint8))
    assert red[0, 0, 0] > 100 > red[0, 0, 1]
