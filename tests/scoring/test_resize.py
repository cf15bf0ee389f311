"""A run remembers how its images were resized: evaluation and scoring do the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from memad_fast.data import open_data
from memad_fast.models.base import TrainingSettings
from memad_fast.scoring import Run, RunError, Scorer, fit, open_test_data

Make = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "parts"
    (place / "train" / "good").mkdir(parents=True)
    (place / "test" / "good").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(12):
        where = "train" if index < 11 else "test"
        Image.fromarray(rng.integers(0, 256, (21, 21), dtype=np.uint8)).save(place / where / "good" / f"{index}.png")
    return place


def _fit(folder: Path, out: Path, make_toy: Make, settings: TrainingSettings, resize: str, **options: Any) -> Run:
    data = open_data(folder, image_size=8, resize=resize)
    return fit(make_toy(), data, out, settings=settings, device="cpu", quiet=True, **options)


def test_a_run_resizes_as_its_training_did(
    folder: Path, make_toy: Make, settings: TrainingSettings, tmp_path: Path
) -> None:
    run = _fit(folder, tmp_path / "run", make_toy, settings, "bicubic")
    assert run.resize == "bicubic"
    data = open_test_data(run, folder)
    cubic = open_data(folder, image_size=8, resize="bicubic").test[0].image
    assert data.test[0].image.equal(cubic)
    streamed = Scorer(run).score(folder / "test" / "good" / "11.png").image
    assert streamed is not None
    assert np.array_equal(streamed, cubic.numpy())
    assert not cubic.equal(open_data(folder, image_size=8).test[0].image)


def test_a_training_does_not_go_on_with_other_pixels(
    folder: Path, make_toy: Make, settings: TrainingSettings, tmp_path: Path
) -> None:
    _fit(folder, tmp_path / "run", make_toy, settings, "bicubic", epochs=10**6, max_minutes=1e-5)
    with pytest.raises(RunError, match="resize"):
        _fit(folder, tmp_path / "run", make_toy, settings, "bilinear", epochs=10**6)
