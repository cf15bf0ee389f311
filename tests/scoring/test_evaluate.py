"""The figures of evaluate: against hand-computed cases, against scikit-learn, and where they are not defined."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from memad_fast.data import DataError, from_arrays
from memad_fast.models.base import Scores, TrainingSettings
from memad_fast.scoring import evaluate, fit, save_metrics
from memad_fast.scoring.evaluate import PixelCounts, _at_threshold, auroc, best_f1, bin_of

Make = Callable[..., Any]


@pytest.fixture
def run(make_toy: Make, make_stripes: Make, settings: TrainingSettings, tmp_path: Path) -> Any:
    return fit(make_toy(), make_stripes(), tmp_path / "run", settings=settings, epochs=10, device="cpu", quiet=True)


def counts_of(*images: tuple[np.ndarray, np.ndarray]) -> PixelCounts:
    counts = PixelCounts()
    for anomaly_map, mask in images:
        counts.add(np.asarray(anomaly_map, np.float32), np.asarray(mask, bool))
    return counts


def test_aupro_of_a_hand_computed_case() -> None:
    # Two regions, of 1 and of 3 pixels; 10 normal pixels.
    #   threshold  found                        false positive rate   mean overlap
    #   8          1 of the large region        0                     (0 + 1/3) / 2 = 1/6
    #   6          + one normal pixel           0.1                   1/6
    #   5          + the small region           0.1                   (1 + 1/3) / 2 = 2/3
    #   4          + one normal pixel           0.2                   2/3
    #   3          + rest of the large region   0.2                   1
    #   2          + two normal pixels          0.4                   1
    # Area up to 0.3: 0.1 · 1/6 + 0.1 · 2/3 + 0.1 · 1, divided by 0.3.
    anomaly_map = np.array([[8, 3, 3, 0, 5, 0, 6], [4, 2, 2, 0, 0, 0, 0]])
    mask = np.array([[1, 1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
    assert counts_of((anomaly_map, mask)).aupro() == pytest.approx((1 / 6 + 2 / 3 + 1) * 0.1 / 0.3)


def test_aupro_interpolates_at_its_limit() -> None:
    # Two normal pixels: the false positive rate goes 0, 1/2, 1, the overlap 0, 0, 1; at 0.3 the curve is still 0.
    # With the defect tied to the second normal pixel the curve rises from (0, 0) to (1/2, 1) in one step: 0.6 at 0.3.
    assert counts_of(([[3, 2, 1]], [[0, 1, 0]])).aupro() == pytest.approx(0.0)
    assert counts_of(([[2, 2, 1]], [[0, 1, 0]])).aupro() == pytest.approx(0.3 * 0.6 / 2 / 0.3)


def test_a_perfect_map_scores_one_and_an_inverted_one_zero() -> None:
    mask = np.zeros((8, 8), bool)
    mask[1:3, 1:3] = mask[5:8, 5:8] = True
    for counts, expected in [(counts_of((mask, mask)), 1.0), (counts_of((~mask, mask)), 0.0)]:
        assert counts.auroc() == expected
        assert counts.aupro() == pytest.approx(expected, abs=1e-12)


def test_diagonal_neighbours_are_one_region_and_images_add_their_regions() -> None:
    mask = np.eye(4, dtype=bool)
    counts = counts_of((mask, mask), (mask, mask), (mask, np.zeros_like(mask)))
    assert counts.regions == 2
    assert counts.normal.sum() == 12 + 12 + 16


def test_pixel_auroc_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((64, 64)) < 0.2
    for anomaly_map in (
        rng.normal(size=(64, 64)) + mask,
        rng.random((64, 64)) * 1e-30 + mask * 3e-31,
        np.round(rng.random((64, 64)) * 4) + mask,
        np.maximum(rng.normal(size=(64, 64)) + mask, 0),
    ):
        expected = roc_auc_score(mask.ravel(), anomaly_map.ravel())
        assert counts_of((anomaly_map, mask)).auroc() == pytest.approx(expected, abs=1e-4)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=50))
def test_bins_ascend_with_the_scores(values: list[float]) -> None:
    scores = np.sort(np.array(values, np.float32))
    bins = bin_of(scores)
    assert (np.diff(bins) >= 0).all()
    assert bins.min() >= 0
    assert bins.max() < 1 << 20
    assert bin_of(np.float32([-0.0]))[0] == bin_of(np.float32([0.0]))[0]


def test_aupro_agrees_with_the_definition_on_random_maps() -> None:
    from scipy.ndimage import label

    rng = np.random.default_rng(1)
    images = [(np.round(rng.random((12, 12)) * 30), rng.random((12, 12)) < 0.15) for _ in range(3)]
    points = [(0.0, 0.0)]
    normal = np.concatenate([anomaly_map[~mask] for anomaly_map, mask in images])
    for threshold in range(30, -1, -1):
        overlaps = []
        for anomaly_map, mask in images:
            regions, count = label(mask, structure=np.ones((3, 3)))
            overlaps += [(anomaly_map >= threshold)[regions == region].mean() for region in range(1, count + 1)]
        points.append(((normal >= threshold).mean(), np.mean(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 < 0.3:
            end = min(x1, 0.3)
            y_end = y1 if x1 == x0 else y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            area += (end - x0) * (y0 + y_end) / 2
    assert counts_of(*images).aupro() == pytest.approx(area / 0.3)


def test_every_figure_is_there_in_all_and_per_defect_type(run: Any, make_stripes: Make) -> None:
    metrics = evaluate(run, make_stripes(), batch_size=5)
    assert metrics["counts"] == {"images": 16, "normal": 8, "abnormal": 8, "masks": 8}
    assert metrics["image_auroc"] == 1.0
    assert metrics["pixel_auroc"] > 0.9
    assert metrics["pixel_aupro"] > 0.5
    assert metrics["recall"] == 1.0
    assert metrics["threshold"] == run.threshold
    assert metrics["f1"] == pytest.approx(
        2 * metrics["precision"] * metrics["recall"] / (metrics["precision"] + metrics["recall"])
    )
    assert metrics["f1"] <= metrics["best_f1"] == 1.0
    assert set(metrics["per_defect"]) == {"square", "blob"}
    for figures in metrics["per_defect"].values():
        assert figures["images"] == 4
        assert figures["detected"] == figures["image_auroc"] == 1.0
        assert 0.9 < figures["pixel_auroc"] <= 1.0


def test_the_best_f1_of_a_hand_computed_case() -> None:
    # Above 2: 2 of 2 found are abnormal, of 3 in all: F1 = 2·2 / (2 + 3). Above 0: 3 of 5, F1 = 2·3 / (5 + 3).
    abnormal, scores = np.array([0, 1, 0, 0, 1, 1], bool), np.array([2.0, 1.0, 0.0, 1.0, 3.0, 4.0])
    assert best_f1(abnormal, scores) == 0.8


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=12))
def test_the_best_f1_is_that_of_the_best_threshold(rows: list[tuple[bool, int]]) -> None:
    abnormal, scores = np.array([row[0] for row in rows]), np.array([float(row[1]) for row in rows])
    every = [_at_threshold(abnormal, scores > threshold)["f1"] for threshold in np.arange(-3.5, 4)]
    expected = max(value for value in every if value is not None) if abnormal.any() else None
    assert best_f1(abnormal, scores) == (None if expected is None else pytest.approx(expected))


def test_figures_do_not_depend_on_the_batch_size(run: Any, make_stripes: Make) -> None:
    assert evaluate(run, make_stripes(), batch_size=1) == evaluate(run, make_stripes(), batch_size=16)


def test_pixel_figures_agree_with_scikit_learn_on_whole_images(run: Any, make_stripes: Make) -> None:
    data = make_stripes()
    maps = run.model.score(torch.stack([item.image for item in data.test])).anomaly_map
    masks = torch.stack([item.mask for item in data.test])
    expected = roc_auc_score(masks.flatten(), maps.flatten())
    assert evaluate(run, data)["pixel_auroc"] == pytest.approx(expected, abs=1e-4)


def test_what_is_not_defined_is_none(run: Any) -> None:
    abnormal_only = evaluate(run, from_arrays(torch.rand(1, 8, 8), torch.rand(3, 8, 8), [1, 1, 1]))
    assert abnormal_only["image_auroc"] is abnormal_only["pixel_auroc"] is abnormal_only["pixel_aupro"] is None
    assert abnormal_only["false_alarms"] is None
    assert abnormal_only["per_defect"]["defect"]["image_auroc"] is None
    normal_only = evaluate(run, from_arrays(torch.rand(1, 8, 8), torch.rand(3, 8, 8), [0, 0, 0]))
    assert normal_only["image_auroc"] is normal_only["recall"] is normal_only["best_f1"] is None
    assert normal_only["per_defect"] == {}
    assert auroc(np.array([1, 1]), np.array([0.1, 0.2])) is None


def test_an_abnormal_image_without_a_mask_is_left_out_of_pixel_figures(run: Any, make_stripes: Make) -> None:
    data = make_stripes()
    test = torch.stack([item.image for item in data.test])
    masks = torch.stack([item.mask[0] for item in data.test])
    masks[12:] = False  # nobody drew the last four
    labels = data.test.labels
    metrics = evaluate(run, from_arrays(test[:1], test, labels, masks=masks))
    assert metrics["counts"]["masks"] == 4
    known = evaluate(run, from_arrays(test[:1], test[:12], labels[:12], masks=masks[:12]))
    assert metrics["pixel_auroc"] == known["pixel_auroc"]


def test_metrics_are_json_as_they_stand(run: Any, make_stripes: Make, tmp_path: Path) -> None:
    metrics = evaluate(run, make_stripes())
    save_metrics(metrics, tmp_path / "new" / "metrics.json")
    assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == metrics
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["metrics.json"]


def test_an_empty_test_set_and_another_size_are_errors(run: Any, make_stripes: Make) -> None:
    with pytest.raises(DataError, match="no test images"):
        evaluate(run, from_arrays(torch.rand(3, 8, 8)))
    with pytest.raises(ValueError, match="the run takes 1 channels at 8 pixels, the data gives 1 at 16"):
        evaluate(run, make_stripes(image_size=16))


def test_a_score_that_is_not_finite_names_the_image(
    run: Any, make_stripes: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(images: torch.Tensor) -> Scores:
        scores = torch.zeros(len(images))
        scores[1] = torch.nan
        return Scores(scores, images, images)

    monkeypatch.setattr(run.model, "_score", broken)
    with pytest.raises(ValueError, match=r"arrays/test/1$"):
        evaluate(run, make_stripes())
