from __future__ import annotations

import csv
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from peak_memory import run_measured
from PIL import Image

from memad_fast.scoring import Result, Run, RunError, Scorer, ScoreSummary, score
from memad_fast.scoring.score import COLUMNS


def _rows(summary: ScoreSummary) -> list[dict[str, str]]:
    with summary.csv.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_says_of_each_image_what_the_scorer_says(toy_run: Run, parts: Path, tmp_path: Path) -> None:
    summary = score(toy_run, parts, tmp_path / "out")
    rows = _rows(summary)
    assert tuple(rows[0]) == COLUMNS
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    assert len(rows) == summary.images == 10
    for row in rows:
        alone = Scorer(toy_run).score(row["path"])
        assert float(row["score"]) == pytest.approx(alone.score, rel=1e-6)
        assert float(row["threshold"]) == toy_run.threshold
        assert row["is_anomaly"] == ("true" if float(row["score"]) > toy_run.threshold else "false")
        assert float(row["milliseconds"]) > 0
        assert row["error"] == ""
    assert 0 < summary.anomalies < 10
    assert summary.anomalies == sum(row["is_anomaly"] == "true" for row in rows)
    assert summary.failures == 0
    assert summary.images_per_second > 0


def test_an_unreadable_image_is_a_row_with_its_error_and_the_others_are_scored(
    toy_run: Run, parts: Path, tmp_path: Path
) -> None:
    (parts / "good" / "1x.png").write_text("not an image")
    good = (parts / "good" / "0.png").read_bytes()
    (parts / "good" / "2x.png").write_bytes(good[: len(good) // 2])
    summary = score(toy_run, parts, tmp_path / "out", heatmaps=True, report=True, batch_size=3)
    bad = [row for row in _rows(summary) if row["error"]]
    assert [Path(row["path"]).name for row in bad] == ["1x.png", "2x.png"]
    assert all(row["score"] == row["is_anomaly"] == "" for row in bad)
    assert (summary.images, summary.failures) == (12, 2)
    assert not (tmp_path / "out" / "heatmaps" / "good" / "1x.png.png").exists()


def test_a_heat_map_is_as_large_as_its_image_and_equal_names_stay_apart(
    toy_run: Run, parts: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (9, 5)).save(parts / "good" / "0.jpg")
    summary = score(toy_run, parts, tmp_path / "out", heatmaps=True)
    assert summary.heatmaps == tmp_path / "out" / "heatmaps"
    images = sorted(path for path in parts.rglob("*.*"))
    maps = sorted(path for path in summary.heatmaps.rglob("*.png"))
    assert [f"{path.relative_to(parts)}.png" for path in images] == [
        str(path.relative_to(summary.heatmaps)) for path in maps
    ]
    for image, heat in zip(images, maps, strict=True):
        with Image.open(image) as one, Image.open(heat) as other:
            assert one.size == other.size


def test_heat_maps_keep_their_folders_when_files_are_named_one_by_one(
    toy_run: Run, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = ["parts/good/0.png", str(parts / "torn" / "0.png")]
    score(toy_run, files, tmp_path / "out", heatmaps=True)
    written = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    assert written == ["heatmaps/good/0.png.png", "heatmaps/torn/0.png.png"]


def test_scoring_again_into_a_folder_below_the_images_scores_no_heat_map(toy_run: Run, parts: Path) -> None:
    counts = [score(toy_run, parts, parts, heatmaps=True).images for _ in range(2)]
    assert counts == [10, 10]


def test_scoring_twice_gives_the_same_scores_and_the_same_heat_maps(toy_run: Run, parts: Path, tmp_path: Path) -> None:
    outs = [tmp_path / "one", tmp_path / "two"]
    one, two = (_rows(score(toy_run, parts, out, heatmaps=True)) for out in outs)
    for row in one + two:
        del row["milliseconds"]
    assert one == two
    for path in (outs[0] / "heatmaps").rglob("*.png"):
        assert path.read_bytes() == (outs[1] / path.relative_to(outs[0])).read_bytes()


def test_a_folder_without_images_is_an_error_and_nothing_is_written(toy_run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match="no images found in"):
        score(toy_run, tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_scoring_leaves_its_rows_under_another_name(toy_run: Run, parts: Path, tmp_path: Path) -> None:
    def interrupt(result: Result) -> None:
        if result.path.endswith("torn/1.png"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(toy_run, parts, tmp_path / "out", on_result=interrupt)
    assert not (tmp_path / "out" / "scores.csv").exists()
    partial = (tmp_path / "out" / "scores.csv.partial").read_text().splitlines()
    assert len(partial) == 1 + 7
    score(toy_run, parts, tmp_path / "out")
    assert not (tmp_path / "out" / "scores.csv.partial").exists()


def test_file_names_with_commas_newlines_and_odd_bytes_survive_the_table(toy_run: Run, tmp_path: Path) -> None:
    names = ['a,"b".png', "line\nbreak.png", os.fsdecode(b"caf\xe9.png")]
    for name in names:
        Image.new("L", (4, 4)).save(tmp_path / name, format="PNG")
    summary = score(toy_run, tmp_path, tmp_path / "out", heatmaps=True, report=True)
    assert {os.path.basename(row["path"]) for row in _rows(summary)} == set(names)


def test_a_torn_run_is_refused_by_name(toy_run_folder: Path, parts: Path, tmp_path: Path) -> None:
    weights = toy_run_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(RunError, match=r"model\.safetensors.*truncated"):
        score(toy_run_folder, parts, tmp_path / "out")


def test_memory_does_not_grow_with_the_number_of_images(toy_run_folder: Path, tmp_path: Path) -> None:
    """The images, maps and reconstructions of the second scoring would fill 1 GB if they were kept."""
    program = f"""
import sys
sys.path[:0] = {sys.path!r}
import numpy as np, torch
from torch import nn
from memad_fast.models.base import Scores
from memad_fast.scoring import Run, score
from pathlib import Path

class Model(nn.Module):
    class config: image_size, channels = 512, 3
    device = torch.device("cpu")
    def score(self, images):
        return Scores(images.mean((1, 2, 3)), images[:, :1], images)

run = Run(Path("run"), Model(), {{"threshold": {{"value": 0.5, "map_level": 1.0}}, "model": {{"name": "none"}},
                                  "preprocessing": {{"image_size": 512, "channels": 3}}}})
peaks = []
for count in (30, 150):
    score(run, ["image.png"] * count, "out", heatmaps=True, report=True, batch_size=2, worst=5)
    peaks.append(peak())
assert peaks[1] - peaks[0] < 150e6, peaks
"""
    Image.fromarray(np.zeros((512, 512, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    run_measured(program, cwd=tmp_path)
