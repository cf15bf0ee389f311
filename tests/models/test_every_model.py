"""What holds for every detector, whatever it is made of: scores, settings, training, interruption, devices, commands.

All of ``MODELS`` are taken, in their "digits" presets made smaller (``trainings.py``).
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from trainings import (
    ended_after,
    fit_tiny,
    gradients,
    killed_after,
    parts,
    tiny_config,
    tiny_model,
    tiny_settings,
    trained_together,
    unplug,
)
from typer.testing import CliRunner, Result

from memad_fast.cli import app
from memad_fast.data import open_data
from memad_fast.models import MODELS, AnomalyModel, Scores, build
from memad_fast.scoring import Run, RunError, evaluate, find_images, load_run, score
from memad_fast.scoring.training import Detector

# Real images in MVTec layout, one folder a set, as the README's table of variables says.
REAL_SETS = os.environ.get("MEMAD_FAST_TEST_DATA", "")

pytestmark = [pytest.mark.parametrize("name", list(MODELS)), pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def fitted(name: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A training without interruption, made once for each model: a folder to copy, a model to read."""
    if name not in _FITTED:
        _FITTED[name] = fit_tiny(name, tmp_path_factory.mktemp("fitted") / name)
    return load_run(_FITTED[name].folder, "cpu")


_FITTED: dict[str, Run] = {}


@pytest.fixture
def images(fitted: Run) -> Tensor:
    """Five images of the kind that the model was trained on; the last has a defect."""
    data = parts(fitted.image_size)
    return torch.stack([data.test[index].image for index in (0, 1, 2, 3, 8)])


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def assert_close(first: Scores, second: Scores, rows: Any = slice(None), *, rtol: float, atol: float) -> None:
    """All of ``first`` against the chosen rows of ``second``."""
    for name in ("image_score", "anomaly_map", "reconstruction"):
        got, expected = getattr(first, name), getattr(second, name)[rows]
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    for name, part in first.parts.items():
        torch.testing.assert_close(part, second.parts[name][rows], rtol=rtol, atol=atol)


def assert_finite(scores: Scores) -> None:
    for value in (scores.image_score, scores.anomaly_map, scores.reconstruction, *scores.parts.values()):
        assert value.isfinite().all()


# Scores


def test_scores_have_their_shapes_and_names(fitted: Run, images: Tensor) -> None:
    scores, count, side = fitted.model.score(images), len(images), fitted.image_size
    assert scores.image_score.shape == (count,)
    assert scores.anomaly_map.shape == (count, 1, side, side)
    assert scores.reconstruction.shape == images.shape
    assert scores.parts
    assert {part.shape for part in scores.parts.values()} == {(count,)}
    for value in (scores.image_score, scores.anomaly_map, scores.reconstruction, *scores.parts.values()):
        assert value.dtype == torch.float32
        assert not value.requires_grad
    assert_finite(scores)


def test_the_score_of_an_image_does_not_depend_on_its_batch(fitted: Run, images: Tensor) -> None:
    """Bitwise where the batch is as large; of other sizes, convolutions add in another order: float32's rounding."""
    together = fitted.model.score(images)
    order = torch.tensor([3, 0, 4, 2, 1])
    assert_close(fitted.model.score(images[order]), together, order, rtol=0, atol=0)
    beside_white = images.clone()
    beside_white[1:] = 1.0
    first = fitted.model.score(beside_white)
    assert torch.equal(first.image_score[0], together.image_score[0])
    assert torch.equal(first.anomaly_map[0], together.anomaly_map[0])
    for index in range(len(images)):
        alone = fitted.model.score(images[index : index + 1])
        assert_close(alone, together, slice(index, index + 1), rtol=1e-4, atol=1e-5)


def test_scoring_reads_the_model_and_changes_nothing(fitted: Run, images: Tensor) -> None:
    model, before = fitted.model, state(fitted.model)
    in_eval = model.score(images)
    model.train()
    torch.manual_seed(3)
    in_training = model.score(images)
    assert model.training
    assert_close(in_training, in_eval, rtol=0, atol=0)
    model.score(torch.zeros_like(images))
    assert same(before, state(model))
    assert torch.initial_seed() == 3
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(3))), "a score drew numbers"


def test_strides_and_dtypes_of_images_do_not_matter(fitted: Run, images: Tensor) -> None:
    images = images.to(torch.bfloat16).float()  # what every dtype can hold
    expected = fitted.model.score(images)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        lossless = images if dtype != torch.float16 else images.half().float()
        same_values = fitted.model.score(lossless)
        assert_close(fitted.model.score(lossless.to(dtype)), same_values, rtol=0, atol=0)
    transposed = images.transpose(2, 3).contiguous().transpose(2, 3)
    spread = torch.full((5, 1, images.shape[2], 2 * images.shape[3]), torch.nan)[..., ::2].copy_(images)
    for other in (transposed, spread, images.contiguous(memory_format=torch.channels_last)):
        assert_close(fitted.model.score(other), expected, rtol=1e-4, atol=1e-5)
    expanded = images[:1].expand(3, -1, -1, -1)
    assert_close(fitted.model.score(expanded), fitted.model.score(expanded.clone()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_no_image_and_one_image_are_batches(fitted: Run, images: Tensor, count: int) -> None:
    scores = fitted.model.score(images[:count])
    assert scores.image_score.shape == (count,)
    assert scores.anomaly_map.shape == (count, 1, *images.shape[2:])
    assert scores.reconstruction.shape == (count, *images.shape[1:])
    assert {part.shape for part in scores.parts.values()} == {(count,)}


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant_images_have_finite_scores(fitted: Run, images: Tensor, value: float) -> None:
    assert_finite(fitted.model.score(torch.full_like(images, value)))


def test_wrong_images_are_named(fitted: Run, images: Tensor) -> None:
    model, side = fitted.model, fitted.image_size
    for wrong in (images[:, :, 1:], images.repeat(1, 3, 1, 1), images[0], images[..., :1, :1]):
        with pytest.raises(ValueError, match=rf"images: expected \[B, 1, {side}, {side}\], got \["):
            model.score(wrong)
    with pytest.raises(TypeError, match=r"images: expected a floating torch\.Tensor in \[0, 1\], got torch\.uint8"):
        model.score((images * 255).to(torch.uint8))
    with pytest.raises(ValueError, match=r"images: expected pixels in \[0, 1\], got .*divide 8-bit pixels by 255"):
        model.score(images * 255)
    images[2, 0, 1, 1] = torch.nan
    with pytest.raises(ValueError, match=r"images: expected finite pixels, got NaN or infinity in image \[2\]"):
        model.score(images)


# Settings


# Every figure that MODELS.md gives of a published setting; what is trained and what is built.
_PMB = {
    "image_size": 128, "levels": 5, "widths": (64, 128, 256, 512, 512), "items": (150, 200, 200, 200),
    "memory": "partition", "shrink": None, "renormalize": None, "threshold": None, "error_fraction": 0.5,
    "pixel_loss": "mse", "ssim_weight": 0.1,
}  # fmt: skip
_PMB_SMALLER = {"image_size": 128, "error_fraction": 0.5, "shrink": None, "ssim_weight": 0.1}
_MEMSTC = {
    "image_size": 224, "widths": (64, 128, 256, 512), "items": 2048, "memory": ("stcm",), "key": "structure",
    "value": "texture", "fusion": "attention", "encoding_weights": (0.5, 0.5, 0.5), "reconstruction_weight": 1.0,
    "adversarial_weight": 0.1, "semantic_weight": 0.05, "edge_weight": 0.01, "cycles": 1, "critic_strides": 3,
}  # fmt: skip
_SALAD = {
    "image_size": 256, "adversarial": 1.0, "structure": 10.0, "feature": 10.0, "centre": 10.0, "restoration": 10.0,
    "image_loss": "ssim", "control_points": 2, "centre_rate": 0.5, "score": "feature",
}  # fmt: skip
_PATCHCORE = {"image_size": 224, "channels": 3, "coreset": 0.1, "neighbourhood": 3, "reweighted": True, "smoothing": 4}
_SIMSID = {
    "image_size": 128, "channels": 1, "patch": 16, "grid": 8, "dim": 64, "widths": (32, 64, 128, 256),
    "memory": "space-aware", "retrieval": "gumbel-topk", "centre": "feature", "distillation": 1.0,
    "student_epochs": 250, "score": "discriminator", "shortcut": 0.0, "adversarial": 0.0,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "pmb": {
        "mvtec-texture": (_PMB | {"partitions": (32, 16, 16, 8)}, {"learning_rate": 2e-3, "batch_size": 20}),
        "mvtec-object": (_PMB | {"partitions": (16, 16, 16, 8)}, {"learning_rate": 2e-3, "batch_size": 20}),
        "mnist": (
            _PMB_SMALLER | {"levels": 3, "items": (10, 10, 10), "partitions": (1, 1, 1), "channels": 1},
            {"learning_rate": 2e-3, "batch_size": 64},
        ),
        "retinal-oct": (
            _PMB_SMALLER | {"levels": 4, "items": (10, 10, 10), "partitions": (2, 2, 2), "channels": 1},
            {"learning_rate": 2e-3, "batch_size": 20},
        ),
    },
    "patchcore": {"paper": (_PATCHCORE, {})},
    "simsid": {"paper": (_SIMSID, {"epochs": 1000})},
    "salad": {
        "paper": (_SALAD, {"learning_rate": 2e-4, "batch_size": 64, "epochs": 200, "constant_share": 0.5}),
    },
    "memstc": {
        preset: (
            _MEMSTC | {"structures": structures, "gamma": gamma},
            {"learning_rate": 1e-3, "batch_size": 8, "epochs": 800, "betas": (0.1, 0.9)},
        )
        for preset, structures, gamma in (
            ("paper", ("semantic", "edges"), 0.4),
            ("paper-oct", ("semantic", "edges"), 0.8),
            ("paper-industrial", ("edges",), 0.0),
        )
    },
}


def given_to(name: str, config: Any) -> dict[str, nn.Module]:
    """What a network of this config cannot make for itself: a backbone from elsewhere, an F_s trained on labels."""
    if getattr(config, "backbone", "") == "custom":
        return {"backbone": nn.Identity()}
    if "semantic" not in getattr(config, "structures", ()):
        return {}
    kind = MODELS[name].PARTS["semantic"]
    return {"semantic": kind(kind.Config(image_size=config.image_size, channels=config.channels))}


def test_published_settings_are_the_papers(name: str) -> None:
    presets = MODELS[name].presets()
    for preset, (config, training) in PUBLISHED[name].items():
        for key, value in config.items():
            assert getattr(presets[preset].config, key) == value, f"{preset}: {key}"
        for key, value in training.items():
            assert getattr(presets[preset].training, key) == value, f"{preset}: {key}"
    with torch.device("meta"):
        model = MODELS[name].paper(**({"backbone": nn.Identity()} if name == "patchcore" else {}))
    assert model.config in [presets[preset].config for preset in PUBLISHED[name]]


def test_every_preset_builds_and_its_config_survives_json(name: str) -> None:
    presets = MODELS[name].presets()
    assert {"small", "digits"} <= presets.keys()
    for preset in presets.values():
        with torch.device("meta"):
            model = MODELS[name](preset.config, **given_to(name, preset.config))
        assert model.stages()
        assert len({stage.name for stage in model.stages()}) == len(model.stages())
        assert MODELS[name].Config(**json.loads(json.dumps(asdict(preset.config)))) == preset.config
        training = preset.training
        assert min(training.batch_size, training.epochs, training.learning_rate) > 0
        assert 0 <= training.constant_share <= 1


def test_a_loaded_model_scores_bit_for_bit(fitted: Run, images: Tensor, name: str) -> None:
    other = build(name, json.loads(json.dumps(asdict(fitted.model.config))))
    other.load_state_dict(fitted.model.state_dict())
    assert_close(other.score(images), fitted.model.score(images), rtol=0, atol=0)


@pytest.mark.parametrize("size", [0, 1, 17])
def test_a_size_that_the_network_cannot_take_is_named(name: str, size: int, folder: Path, tmp_path: Path) -> None:
    """No network takes the first two. One that takes the third scores images of that size."""
    words = ("fit", "--model", name, "--data", folder, "--out", tmp_path / "run", *options_of(name), "--size", size)
    try:
        model = tiny_model(name, image_size=size)
    except ValueError as error:
        assert re.search(rf"image_size.*\b{size}\b", str(error))  # noqa: PT017
        result = command(*words)
        assert result.exit_code == 2
        assert len(result.stderr.strip().splitlines()) == 1
        assert re.search(rf"size.*\b{size}\b", result.stderr)
        assert not (tmp_path / "run").exists()
        return
    assert size > 1
    run = fit_tiny(name, tmp_path / "run", model=model, epochs=1)
    assert_finite(run.model.score(torch.rand(2, 1, size, size)))


def test_colour_is_taken_as_well_as_grey(name: str) -> None:
    """Or refused by the config, by name."""
    try:
        model = tiny_model(name, channels=3)
    except ValueError as error:
        assert str(error).startswith("channels: expected 1")  # noqa: PT017
        return
    size = model.config.image_size
    with torch.no_grad():
        assert all(
            torch.isfinite(objective.losses(torch.rand(4, 3, size, size))["total"])
            for objective in model.train().stages()[0].objectives
        )
    with pytest.raises(ValueError, match="channels: expected 1"):
        tiny_config(name, channels=2)


# Training


def test_every_parameter_is_trained_by_one_objective_and_by_no_other(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    for stage in model.stages():
        held = [id(parameter) for objective in stage.objectives for parameter in objective.parameters]
        assert len(set(held)) == len(held), f"stage {stage.name} holds a parameter twice"
    names = {id(parameter): its_name for its_name, parameter in model.named_parameters()}
    moved: set[str] = set()
    original = Detector._minimise

    def minimise(self: Detector, objective: Any, *arguments: Any) -> None:
        own = {names[id(parameter)] for parameter in objective.parameters}
        before = state(model)
        model.zero_grad()
        original(self, objective, *arguments)
        for its_name, parameter in model.named_parameters():
            changed = not torch.equal(parameter, before[its_name])
            reached = parameter.grad is not None and bool(parameter.grad.any())
            assert its_name in own or not (changed or reached), f"{objective.name} reaches {its_name}"
            if changed:
                moved.add(its_name)

    with mock.patch.object(Detector, "_minimise", minimise):
        fit_tiny(name, tmp_path, model=model)
    untouched = set(names.values()) - moved
    assert not untouched, "no objective trains these"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_lowers_the_loss_and_a_planted_defect_is_found(name: str, tmp_path: Path) -> None:
    # In so short a training SALAD's features are not yet those of one kind of images; its reconstructions are.
    model = tiny_model(name, **({"score": "image"} if name == "salad" else {}))
    run = fit_tiny(name, tmp_path, model=model, epochs=20, data=parts(model.config.image_size, train=40))
    for path in (run.folder / "log").iterdir():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        total = next((key for key in rows[0] if key.endswith("total")), None)
        assert total is None or float(rows[-1][total]) < float(rows[0][total]), path.name
    metrics = evaluate(run, parts(run.image_size))
    assert metrics["image_auroc"] > 0.95
    assert metrics["pixel_auroc"] > 0.8


@pytest.mark.parametrize("count", [1, 2])
def test_one_image_and_two_images_are_a_data_set(name: str, tmp_path: Path, count: int) -> None:
    run = fit_tiny(name, tmp_path, data=parts(tiny_config(name).image_size, train=count))
    assert "No normal image was held out" in run.warnings[0]
    assert np.isfinite(evaluate(run, parts(run.image_size))["image_auroc"])


def test_images_that_are_all_the_same_and_one_pixel_large_can_be_trained_on(name: str, tmp_path: Path) -> None:
    for split in ("train/good", "test/good", "test/bright"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for index in range(12):
            Image.new("L", (1, 1), 200 if "bright" in split else 0).save(tmp_path / "data" / split / f"{index}.png")
    data = open_data(tmp_path / "data", image_size=tiny_config(name).image_size)
    run = fit_tiny(name, tmp_path / "run", data=data)
    assert_finite(run.model.score(torch.stack([item.image for item in data.test])))
    assert np.isfinite(evaluate(run, data)["image_auroc"])


def test_the_seed_fixes_the_run_and_another_gives_another(fitted: Run, name: str, tmp_path: Path) -> None:
    again, other = fit_tiny(name, tmp_path / "again"), fit_tiny(name, tmp_path / "other", seed=1)
    assert same(state(fitted.model), state(again.model))
    assert again.config["threshold"] == fitted.config["threshold"]
    assert not same(state(fitted.model), state(other.model))


def test_mixed_precision_trains_without_nan(fitted: Run, name: str, tmp_path: Path) -> None:
    run = fit_tiny(name, tmp_path, precision="bf16-mixed")
    assert all(value.isfinite().all() and value.dtype != torch.bfloat16 for value in state(run.model).values())
    assert not same(state(run.model), state(fitted.model))
    for stage, row in run.config["training"]["stages"].items():
        for loss, value in row["losses"].items():
            assert value == pytest.approx(fitted.config["training"]["stages"][stage]["losses"][loss], rel=0.3, abs=0.1)


# Interruption


def steps_of(run: Run) -> dict[str, int]:
    return {name: stage["steps_done"] for name, stage in run.config["training"]["stages"].items()}


def assert_same_run(first: Run, second: Run) -> None:
    assert same(state(first.model), state(second.model))
    assert first.config["threshold"] == second.config["threshold"]
    assert steps_of(first) == steps_of(second)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_training_interrupted_at_any_step_ends_like_one_that_was_not(
    fitted: Run, name: str, tmp_path: Path, share: float
) -> None:
    steps = 1 + int(share * sum(steps_of(fitted).values()))
    shutil.rmtree(tmp_path / "parts", ignore_errors=True)
    with ended_after(steps, unplug), pytest.raises(InterruptedError):
        fit_tiny(name, tmp_path / "parts", checkpoint_seconds=0.0)
    assert not (tmp_path / "parts" / "config.json").exists()
    assert_same_run(fit_tiny(name, tmp_path / "parts"), fitted)


def test_a_training_interrupted_between_its_stages_ends_like_one_that_was_not(
    fitted: Run, name: str, tmp_path: Path
) -> None:
    """While a stage finishes: its last step is in the checkpoint, what comes of it is not."""
    stages = MODELS[name].stages
    count = len(fitted.model.stages())
    for number in range(count):

        def unplugged(self: AnomalyModel, number: int = number) -> Any:
            made = list(stages(self))
            made[number] = replace(made[number], finish=lambda tell: unplug())
            return tuple(made)

        out = tmp_path / str(number)
        with mock.patch.object(MODELS[name], "stages", unplugged), pytest.raises(InterruptedError):
            fit_tiny(name, out, checkpoint_seconds=0.0)
        assert_same_run(fit_tiny(name, out), fitted)


def test_a_training_that_is_killed_in_any_stage_goes_on(fitted: Run, name: str, tmp_path: Path) -> None:
    before = 0
    for stage, steps in steps_of(fitted).items():
        assert killed_after(name, tmp_path / stage, before + min(2, steps)) == -9
        assert not (tmp_path / stage / "config.json").exists()
        assert_same_run(fit_tiny(name, tmp_path / stage), fitted)
        before += steps


def test_without_time_every_stage_makes_a_step_and_the_same_command_goes_on(
    fitted: Run, name: str, tmp_path: Path
) -> None:
    run = fit_tiny(name, tmp_path, max_minutes=1e-9)
    assert all(steps == 1 for steps in steps_of(run).values())
    assert run.config["training"]["stopped_by"] == "max_minutes"
    assert np.isfinite(evaluate(run, parts(run.image_size))["image_auroc"])
    assert steps_of(fit_tiny(name, tmp_path, max_minutes=1e-9)) == steps_of(run) | {next(iter(steps_of(run))): 2}
    again = fit_tiny(name, tmp_path)
    assert again.config["training"]["stopped_by"] == "epochs"
    assert_same_run(again, fitted)
    assert not (tmp_path / "resume.safetensors").exists()


def test_an_interruption_after_time_ran_out_loses_nothing(fitted: Run, name: str, tmp_path: Path) -> None:
    """The first stage was cut short; it goes on, not the later one that was interrupted."""
    with ended_after(len(steps_of(fitted)), unplug), pytest.raises(InterruptedError):
        fit_tiny(name, tmp_path, max_minutes=1e-9, checkpoint_seconds=0.0)
    assert_same_run(fit_tiny(name, tmp_path), fitted)


def test_time_that_ran_out_in_the_last_stage_changes_nothing_in_the_end(fitted: Run, name: str, tmp_path: Path) -> None:
    """What a stage's end makes of half of its steps is not what the rest goes on from."""
    *others, last = steps_of(fitted)
    before = sum(steps_of(fitted)[stage] for stage in others)
    with ended_after(before + 1, unplug), pytest.raises(InterruptedError):
        fit_tiny(name, tmp_path, checkpoint_seconds=0.0)
    stopped = fit_tiny(name, tmp_path, max_minutes=1e-9)
    assert steps_of(stopped)[last] == 2
    assert_same_run(fit_tiny(name, tmp_path), fitted)


# What is not this model's


@pytest.fixture
def other(name: str) -> str:
    """The next of the models."""
    names = list(MODELS)
    return names[(names.index(name) + 1) % len(names)]


def test_the_files_of_another_model_are_refused(fitted: Run, name: str, other: str, tmp_path: Path) -> None:
    fit_tiny(other, tmp_path / "other", max_minutes=1e-9)
    message = rf"resume\.safetensors: belongs to another training, its model was {other} and is now {name}; remove it"
    with pytest.raises(RunError, match=message):
        fit_tiny(name, tmp_path / "other", model=tiny_model(name))
    mixed = shutil.copytree(fitted.folder, tmp_path / "mixed")
    shutil.copy(tmp_path / "other" / "model.safetensors", mixed)
    for use in (load_run, lambda run: score(run, [mixed], tmp_path / "scored")):
        with pytest.raises(RunError, match=r"model\.safetensors: .*another model's"):
            use(mixed)
    for arguments in (("evaluate", "--data", "digits"), ("score", "--input", mixed, "--out", tmp_path / "scored")):
        result = command(arguments[0], "--run", mixed, *arguments[1:])
        assert result.exit_code == 2
        assert "another model's" in result.stderr


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "resume.safetensors"])
def test_torn_and_altered_files_are_refused_by_name(fitted: Run, name: str, tmp_path: Path, file: str) -> None:
    run = shutil.copytree(fitted.folder, tmp_path / "run")
    if file == "resume.safetensors":
        fit_tiny(name, run, max_minutes=1e-9)
    whole = (run / file).read_bytes()
    middle = len(whole) // 2
    altered = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (whole[:-9], whole[:middle], b"", altered):
        (run / file).write_bytes(content)
        with pytest.raises(RunError, match=file.replace(".", r"\.")):
            fit_tiny(name, run) if file == "resume.safetensors" else load_run(run, "cpu")


# Devices


def test_two_processes_end_with_one_model_and_the_memories_of_both(fitted: Run, name: str, tmp_path: Path) -> None:
    # The first process's weights are everyone's.
    first, second = trained_together([partial(tiny_model, name, seed=rank) for rank in range(2)], tmp_path / "run")
    assert same(first, second), [key for key in first if not torch.equal(first[key], second[key])]
    assert same(first, state(load_run(tmp_path / "run", "cpu").model))
    # Memories are as large and count as much as those of one process; weights are as close as a few steps of Adam on
    # BatchNorm's and the noise's other draws allow.
    alone = state(fitted.model)
    assert {key: value.shape for key, value in first.items()} == {key: value.shape for key, value in alone.items()}
    for key, value in alone.items():
        assert value.is_floating_point() or torch.equal(first[key], value), key
    reach = 3 * tiny_settings(name).learning_rate * max(steps_of(fitted).values())
    for key, _ in fitted.model.named_parameters():
        torch.testing.assert_close(first[key], alone[key], rtol=0, atol=reach)


# Commands


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures in MVTec layout, of a size that no network takes."""
    for split, seed in (("train/good", 0), ("test/good", 1), ("test/square", 2)):
        (tmp_path / "set" / split).mkdir(parents=True)
        for index, image in enumerate(gradients(12 if seed == 0 else 4, 41, seed=seed)):
            if seed == 2:
                image[10:20, 10:20] = 1.0
            Image.fromarray((image * 255).astype(np.uint8)).save(tmp_path / "set" / split / f"{index}.png")
    mask = np.zeros((41, 41), np.uint8)
    mask[10:20, 10:20] = 255
    (tmp_path / "set" / "ground_truth" / "square").mkdir(parents=True)
    for index in range(4):
        Image.fromarray(mask).save(tmp_path / "set" / "ground_truth" / "square" / f"{index}_mask.png")
    return tmp_path / "set"


def options_of(name: str) -> list[str]:
    """The tiny config, as one types it."""
    config, preset = asdict(tiny_config(name)), asdict(MODELS[name].presets()["digits"].config)
    changes = {key: value for key, value in config.items() if value != preset[key] and key != "image_size"}
    texts = {key: ",".join(map(str, value)) if isinstance(value, tuple) else value for key, value in changes.items()}
    typed = [text for key, value in texts.items() for text in ("--set", f"{key}={value}")]
    return ["--preset", "digits", "--size", str(config["image_size"]), *typed]


def fit_evaluate_and_score(name: str, data: str | Path, source: Path, out: Path, *more: object) -> dict[str, Any]:
    result = command("fit", "--model", name, "--data", data, "--out", out / "run", "--device", "cpu", *more)
    assert result.exit_code == 0, result.output
    result = command("evaluate", "--run", out / "run", "--data", data, "--device", "cpu")
    assert result.exit_code == 0, result.output
    scored = out / "scored"
    result = command("score", "--run", out / "run", "--input", source, "--out", scored, "--report", "--heatmaps")
    assert result.exit_code == 0, result.output
    with (scored / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all(np.isfinite(float(row["score"])) for row in rows)
    assert (scored / "report.html").stat().st_size > 1000
    return json.loads((out / "run" / "metrics.json").read_text())


def test_the_commands_run_on_digits(name: str, folder: Path, tmp_path: Path) -> None:
    metrics = fit_evaluate_and_score(
        name, "digits", folder / "test" / "good", tmp_path, "--normal-class", 0, "--epochs", 1, *options_of(name)
    )
    assert metrics["image_auroc"] is not None
    assert len(metrics["per_defect"]) == 9


def test_the_commands_run_on_a_folder(name: str, folder: Path, tmp_path: Path) -> None:
    metrics = fit_evaluate_and_score(
        name, folder, folder / "test", tmp_path, "--epochs", 1, "--precision", "bf16-mixed", *options_of(name)
    )
    assert {"image_auroc", "pixel_auroc", "pixel_aupro"} <= {key for key in metrics if metrics[key] is not None}
    assert load_run(tmp_path / "run", "cpu").config["training"]["precision"] == "bf16-mixed"


def real_sets() -> list[Any]:
    found = sorted(path.parents[1] for path in Path(REAL_SETS).glob("*/train/good")) if REAL_SETS else []
    reason = "MEMAD_FAST_TEST_DATA names no folder with data sets in MVTec layout"
    return [pytest.param(path, id=path.name) for path in found[:3]] or [
        pytest.param(None, marks=pytest.mark.skip(reason=reason))
    ]


@pytest.mark.parametrize("data", real_sets())
def test_the_commands_run_on_real_images(name: str, data: Path, tmp_path: Path) -> None:
    some = next(iter(find_images([data / "test" / "good"])))
    metrics = fit_evaluate_and_score(name, data, some, tmp_path, "--max-minutes", 0.02, *options_of(name))
    assert 0 <= metrics["image_auroc"] <= 1
