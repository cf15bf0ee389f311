"""A real detector through fit: PMB on the built-in digits, interrupted, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memad_fast.data import open_data
from memad_fast.models import PMB, PMBConfig, TrainingSettings
from memad_fast.scoring import evaluate, fit, load_run

SETTINGS = TrainingSettings(learning_rate=2e-3, batch_size=16, epochs=4)


def tiny() -> PMB:
    torch.manual_seed(0)
    return PMB(PMBConfig(image_size=16, channels=1, widths=(8, 16), items=(10, 10), partitions=(1, 1), ssim_weight=0.0))


def test_pmb_tells_zeros_from_other_digits_and_comes_back_from_its_folder(tmp_path: Path) -> None:
    data = open_data("digits", image_size=16, normal_class=0)
    run = fit(tiny(), data, tmp_path / "run", settings=SETTINGS, epochs=12, device="cpu", quiet=True)
    metrics = evaluate(run, data)
    assert metrics["image_auroc"] > 0.9
    assert set(metrics["per_defect"]) == set("123456789")
    again = load_run(tmp_path / "run", "cpu")
    images = torch.stack([data.test[index].image for index in range(5)])
    first, second = run.model.score(images), again.model.score(images)
    assert torch.equal(first.image_score, second.image_score)
    assert torch.equal(first.anomaly_map, second.anomaly_map)


def test_an_interrupted_pmb_ends_like_one_that_was_not(tmp_path: Path) -> None:
    data = open_data("digits", image_size=16, normal_class=0)
    whole = fit(tiny(), data, tmp_path / "whole", settings=SETTINGS, device="cpu", quiet=True)
    fit(tiny(), data, tmp_path / "parts", settings=SETTINGS, device="cpu", quiet=True, max_minutes=1e-9)
    parts = fit(tiny(), data, tmp_path / "parts", settings=SETTINGS, device="cpu", quiet=True)
    for (name, value), other in zip(whole.model.state_dict().items(), parts.model.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert whole.config["threshold"] == parts.config["threshold"]


def test_a_strategy_that_trains_in_child_processes_is_refused(tmp_path: Path) -> None:
    data = open_data("digits", image_size=16, normal_class=0)
    with pytest.raises(ValueError, match="whose processes each run the calling script"):
        fit(
            tiny(),
            data,
            tmp_path / "run",
            settings=SETTINGS,
            device="cpu",
            quiet=True,
            trainer_options={"devices": 2, "strategy": "ddp_spawn"},
        )
