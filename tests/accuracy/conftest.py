"""Image sets that are made on the spot, and a row to vary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.accuracy.experiment import Row


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """These networks are too small to share."""


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A folder of one set in MVTec layout: smooth ramps are good; bad ones have a square, or are bright all over."""
    folder = tmp_path / "sets" / "parts"
    random = np.random.default_rng(0)

    def save(place: str, count: int, change: Callable[[np.ndarray], None]) -> None:
        (folder / place).mkdir(parents=True)
        for number in range(count):
            pixels = np.linspace(40, 120, 16)[None, :] + random.uniform(-8, 8, (16, 1)) + random.uniform(0, 4, (16, 16))
            change(pixels)
            Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(folder / place / f"{number}.png")

    def square(pixels: np.ndarray) -> None:
        pixels[4:9, 5:10] = 230

    def brighten(pixels: np.ndarray) -> None:
        pixels += 100

    def nothing(pixels: np.ndarray) -> None:
        pass

    save("train/good", 14, nothing)
    save("test/good", 6, nothing)
    save("test/square", 5, square)
    save("test/bright", 4, brighten)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 5:10] = 255
    (folder / "ground_truth" / "square").mkdir(parents=True)
    for number in range(5):
        Image.fromarray(mask).save(folder / "ground_truth" / "square" / f"{number}_mask.png")
    return folder


@pytest.fixture
def make_row() -> Callable[..., Row]:
    def make(system: str, variant: str, seed: int, image_auroc: float | None, **more: object) -> Row:
        values = {"set": "parts", "images": 100, "fingerprint": f"{system}{variant}{seed}"} | more
        return Row(system=system, variant=variant, seed=seed, image_auroc=image_auroc, **values)  # type: ignore[arg-type]

    return make
