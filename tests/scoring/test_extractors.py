"""Extractors from their data to their figures: by the loop of the detectors, interrupted anywhere, in own runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from trainings import ended_after, unplug

from memad_fast.data import DataError, ImageError, preprocessing
from memad_fast.models import EdgeConfig, EdgeExtractor, SemanticConfig, SemanticExtractor, canny_edges
from memad_fast.models.base import TrainingSettings
from memad_fast.scoring import (
    RunError,
    TrainedRun,
    evaluate_semantic,
    fit_extractor,
    load_extractor,
    open_labels,
    save_run,
    set_up_edges,
    set_up_semantic,
)

SETTINGS = TrainingSettings(learning_rate=0.01, batch_size=4, epochs=3)
TINY = {"width": 2, "critic_width": 2, "crop": 0.6, "flips": "both"}
Set = Callable[..., Path]


@pytest.fixture
def make_set(tmp_path: Path) -> Set:
    """Bright bars on a dark ground, which are the class 255; ``gain`` and ``offset`` are another camera's."""

    def make(name: str, count: int = 6, gain: float = 1.0, offset: int = 0, size: int = 40, seed: int = 0) -> Path:
        rng = np.random.default_rng(seed)
        for kind in ("image", "vessel"):
            (tmp_path / name / kind).mkdir(parents=True)
        for index in range(count):
            marked = np.zeros((size, size), bool)
            for start in rng.integers(2, size - 6, 2):
                marked[start : start + 3] = True
            marked = marked if index % 2 else marked.T
            pixels = offset + gain * (60 + 120 * marked + rng.normal(0, 12, (size, size)))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / name / "image" / f"{index}.png")
            Image.fromarray(255 * marked.astype(np.uint8)).save(tmp_path / name / "vessel" / f"{index}.png")
        return tmp_path / name

    return make


def fit_semantic(source: Path, target: Path | None, out: Path, *, settings: TrainingSettings = SETTINGS, **given: Any):
    setup = set_up_semantic(source, target, size=32, options=TINY | given.pop("options", {}), seed=0)
    return fit_extractor(
        setup.model, setup.data, out, settings=settings, device="cpu", quiet=True, source=setup.source, **given
    )


def test_a_semantic_extractor_learns_its_source(make_set: Set, tmp_path: Path) -> None:
    source = make_set("source")
    settings = dataclasses.replace(SETTINGS, epochs=40)
    run = fit_semantic(source, None, tmp_path / "run", settings=settings, options={"width": 4})
    metrics = evaluate_semantic(run, open_labels(run, make_set("more", seed=1)))
    assert metrics["dice"] > 0.8
    assert metrics["auc"] > 0.95
    assert run.config["training"]["losses"].keys() == {"total", "source"}
    assert run.config["data"] == {"source": str(source), "target": None}
    assert "threshold" not in run.config


def test_adaptation_makes_target_maps_look_like_source_maps(make_set: Set, tmp_path: Path) -> None:
    """Another camera: after as many steps without adaptation, the classes' shares differ more (measured: 0.46)."""
    source, target = make_set("source"), make_set("target", gain=0.5, offset=90, seed=1)
    settings = dataclasses.replace(SETTINGS, epochs=30)
    setup = set_up_semantic(source, target, size=32, options=TINY | {"adversarial": 0.1, "crop": 1.0}, seed=0)
    extractor = setup.model
    assert isinstance(extractor, SemanticExtractor)
    run = fit_extractor(extractor, setup.data, tmp_path / "run", settings=settings, device="cpu", quiet=True)
    assert set(run.config["training"]["losses"]) == {
        "extractor.total",
        "extractor.source",
        "extractor.target",
        "critic.total",
    }
    torch.manual_seed(0)
    batch = setup.data.__getitems__(list(range(6)))

    def gap(maps_of: SemanticExtractor) -> float:
        """Between the shares of class 1 in source and target maps."""
        means = [maps_of.extract(images)[:, 1].mean() for images in (batch.images, batch.targets)]
        return float((means[0] - means[1]).abs())

    plain = fit_semantic(source, None, tmp_path / "plain", settings=settings, options={"crop": 1.0})
    assert isinstance(plain.model, SemanticExtractor)
    assert gap(run.model) < 0.75 * gap(plain.model)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("kind", ["edges", "semantic"])
def test_an_interruption_anywhere_changes_nothing(kind: str, steps: int, make_set: Set, tmp_path: Path) -> None:
    source, target = make_set("source"), make_set("target", seed=1)

    def fit(out: str) -> TrainedRun:
        if kind == "semantic":
            return fit_semantic(source, target, tmp_path / out, checkpoint_seconds=0.0)
        good = tmp_path / "parts" / "train" / "good"
        if not good.exists():
            good.parent.mkdir(parents=True)
            good.symlink_to(source / "image")
        setup = set_up_edges(tmp_path / "parts", size=32, options={"width": 2}, seed=0)
        return fit_extractor(
            setup.model, setup.data, tmp_path / out, settings=SETTINGS, device="cpu", quiet=True, checkpoint_seconds=0.0
        )

    whole = fit("whole")
    with ended_after(steps, unplug) as done:
        with pytest.raises(InterruptedError):
            fit("parts_run")
        resumed = fit("parts_run")
    assert 6 <= done[0] < 6 + steps  # of three epochs of two batches, not all were done again
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert whole.config["training"]["losses"] == resumed.config["training"]["losses"]


def test_another_target_is_another_training(make_set: Set, tmp_path: Path) -> None:
    source, target, other = make_set("source"), make_set("target", seed=1), make_set("other", seed=2)
    fit_semantic(source, target, tmp_path / "run", epochs=1_000_000, max_minutes=0.002)
    assert (tmp_path / "run" / "resume.safetensors").exists()
    with pytest.raises(RunError, match="belongs to another training, its training images"):
        fit_semantic(source, other, tmp_path / "run")


def test_an_edge_extractor_learns_the_edges_of_good_images(make_set: Set, tmp_path: Path) -> None:
    folder = make_set("source", count=8)
    (tmp_path / "parts" / "train").mkdir(parents=True)
    (folder / "image").rename(tmp_path / "parts" / "train" / "good")
    setup = set_up_edges(tmp_path / "parts", size=32, options={"width": 4}, seed=0)
    settings = dataclasses.replace(SETTINGS, epochs=40)
    run = fit_extractor(setup.model, setup.data, tmp_path / "run", settings=settings, device="cpu", quiet=True)
    images = torch.stack([setup.data[index].image for index in range(8)])
    edges, found = canny_edges(images), run.model.extract(images)
    assert found[edges == 1].mean() > found[edges == 0].mean() + 0.4
    assert run.config["data"] == {} or run.config["data"]["kind"] == "folder"
    assert run.model_name == "edge-extractor"


class Says(SemanticExtractor):
    """Answers what it is told."""

    maps: torch.Tensor

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        answer, self.maps = self.maps[: len(images)], self.maps[len(images) :]
        return answer


def says(maps: torch.Tensor, **config: Any) -> TrainedRun:
    model = Says(SemanticConfig(**{"image_size": 32, "channels": 1, "width": 2, "adversarial": 0} | config))
    model.maps = maps
    return TrainedRun(Path("run"), model.eval(), {"model": {"name": model.name}})


class TestFigures:
    def test_dice_and_auc_are_those_of_their_definitions(self, make_set: Set) -> None:
        folder = make_set("set", count=3, size=32)
        torch.manual_seed(0)
        maps = torch.rand(3, 2, 32, 32)
        run = says(maps)
        data = open_labels(run, folder)
        true = torch.stack([data[index].labels for index in range(3)]) == 1
        found = maps[:, 1] > maps[:, 0]
        dice = 2 * (true & found).sum() / (true.sum() + found.sum())
        from sklearn.metrics import roc_auc_score

        metrics = evaluate_semantic(run, data, batch_size=2)
        assert metrics["per_class"]["255"]["dice"] == pytest.approx(float(dice))
        expected = roc_auc_score(true.flatten(), maps[:, 1].flatten())
        assert metrics["per_class"]["255"]["auc"] == pytest.approx(expected, abs=1e-3)
        assert metrics["dice"] == metrics["per_class"]["255"]["dice"]
        assert metrics["counts"] == {"images": 3, "pixels": 3 * 32 * 32}
        json.dumps(metrics, allow_nan=False)

    def test_pixels_outside_the_field_of_view_do_not_count(self, make_set: Set) -> None:
        folder = make_set("set", count=1, size=32)
        inside = np.zeros((32, 32), np.uint8)
        inside[:8] = 255
        (folder / "fov").mkdir()
        Image.fromarray(inside).save(folder / "fov" / "0.png")
        run = says(torch.zeros(1, 2, 32, 32))
        labels = open_labels(run, folder)[0].labels
        maps = torch.nn.functional.one_hot(labels, 2).permute(2, 0, 1).float()
        maps[:, 8:] = maps[:, 8:].flip(0)  # wrong wherever it does not count
        run = says(maps[None])
        metrics = evaluate_semantic(run, open_labels(run, folder))
        assert (metrics["dice"], metrics["auc"]) == (1.0, 1.0)
        assert metrics["counts"]["pixels"] == 8 * 32

    def test_a_class_that_does_not_occur_has_no_auc_and_counts_in_no_mean(self, make_set: Set) -> None:
        folder = make_set("set", count=1, size=32)
        maps = torch.rand(1, 3, 32, 32)
        maps[:, 2] = 0
        run = says(maps, values=(0, 255, 9))
        metrics = evaluate_semantic(run, open_labels(run, folder))
        assert metrics["per_class"]["9"] == {"dice": None, "auc": None, "pixels": 0}
        assert metrics["dice"] == metrics["per_class"]["255"]["dice"]

    def test_maps_that_are_not_finite_are_named(self, make_set: Set) -> None:
        folder = make_set("set", count=2, size=32)
        maps = torch.rand(2, 2, 32, 32)
        maps[1, 0, 3, 3] = torch.nan
        run = says(maps)
        with pytest.raises(ValueError, match=r"NaN or infinite for .*1\.png"):
            evaluate_semantic(run, open_labels(run, folder))


class TestWhatIsWrong:
    def test_an_edge_extractor_has_no_classes(self, make_set: Set, tmp_path: Path) -> None:
        model = EdgeExtractor(EdgeConfig(image_size=32, channels=1, width=2))
        save_run(tmp_path / "fe", model, preprocessing=preprocessing(32, 1), training={})
        run = load_extractor(tmp_path / "fe", "cpu")
        with pytest.raises(RunError, match="a run of edge-extractor, expected one of semantic-extractor"):
            open_labels(run, make_set("set"))
        with pytest.raises(RunError, match="a run of edge-extractor, expected one of semantic-extractor"):
            evaluate_semantic(run, open_labels(says(torch.zeros(0)), tmp_path / "set"))

    def test_a_size_that_16_does_not_divide(self, make_set: Set) -> None:
        with pytest.raises(ValueError, match="image_size: expected a multiple of 16, at least 32, got 40"):
            set_up_semantic(make_set("set"), size=40)
        with pytest.raises(ValueError, match="image_size: expected a multiple of 16, at least 32, got 40"):
            set_up_edges("digits", normal_class=0, size=40)

    def test_labels_that_are_missing(self, make_set: Set) -> None:
        folder = make_set("set")
        (folder / "vessel" / "4.png").unlink()
        with pytest.raises(DataError, match=r"4\.png: has no label map"):
            set_up_semantic(folder, folder)

    def test_label_maps_of_other_values(self, make_set: Set) -> None:
        with pytest.raises(ImageError, match="holds the value 255, expected 0, 1: say with values"):
            set_up_semantic(make_set("set"), options={"values": (0, 1)})

    def test_data_of_another_size_than_the_extractors(self, make_set: Set, tmp_path: Path) -> None:
        setup = set_up_semantic(make_set("set"), size=32, options=TINY)
        other = SemanticExtractor(dataclasses.replace(setup.model.config, image_size=48))
        with pytest.raises(ValueError, match="data: the model takes 1 channels at 48 pixels, the data gives 1 at 32"):
            fit_extractor(other, setup.data, tmp_path / "run", settings=SETTINGS)

    def test_one_image_trains(self, make_set: Set, tmp_path: Path) -> None:
        folder = make_set("one", count=1)
        run = fit_semantic(folder, folder, tmp_path / "run", epochs=2)
        assert run.config["training"]["images"] == 1
