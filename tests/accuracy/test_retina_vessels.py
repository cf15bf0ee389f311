"""The table of the semantic extractor: one row a training, none done twice."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.accuracy import retina_vessels


@pytest.fixture
def eyes(tmp_path: Path) -> Path:
    """Two images for each part of the sets, a vessel across each."""
    rng = np.random.default_rng(0)
    for place in retina_vessels.EVALUATED.values():
        for index in range(2):
            vessel = np.zeros((48, 50), np.uint8)
            vessel[10 + 9 * index : 16 + 9 * index] = 255
            pixels = np.stack([vessel // 2 + rng.integers(0, 60, vessel.shape) for _ in range(3)], axis=2)
            for kind, content in (("image", pixels), ("vessel", vessel), ("fov", np.full_like(vessel, 255))):
                path = tmp_path / place / kind / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(content.astype(np.uint8)).save(path)
    return tmp_path


def test_each_row_is_made_once_and_shown(
    eyes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    adapted = next(variant.name for variant in retina_vessels.VARIANTS if variant.is_adapted)
    arguments = ["--data", str(eyes), "--seeds", "1", "--epochs", "1", "--only", f"source only+{adapted}"]
    arguments += ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    retina_vessels.main(arguments)
    first = (tmp_path / "results" / "retina_vessels.csv").read_text()
    page = (tmp_path / "results" / "retina_vessels.md").read_text()
    assert len(first.splitlines()) == 3
    assert f"| {adapted} " in page
    assert "| source only " in page
    rows = list(csv.DictReader(first.splitlines()))
    dices = {row["variant"]: float(row["dice_test"]) for row in rows}
    gain = dices[adapted] - dices["source only"]
    line = next(line for line in page.splitlines() if line.startswith(f"| {adapted}"))
    assert line.split("|")[3].strip() == f"{gain:+.3f}"

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(retina_vessels, "fit_extractor", refuse)
    retina_vessels.main(arguments)
    assert (tmp_path / "results" / "retina_vessels.csv").read_text() == first
    (tmp_path / "results" / "retina_vessels.csv").unlink()  # runs that are there are evaluated, not made again
    retina_vessels.main(arguments)
    assert len((tmp_path / "results" / "retina_vessels.csv").read_text().splitlines()) == 3
