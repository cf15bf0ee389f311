"""SimSID: losses and scores as in the report, gradients where they belong, memories that training alone changes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainings import ended_after, unplug

from memad_fast import models
from memad_fast._progress import untold
from memad_fast.data import from_arrays
from memad_fast.memory import HierarchicalMemory, MemoryQueue
from memad_fast.models import SimSID, SimSIDConfig, TrainingSettings
from memad_fast.models.simsid import Decoder, InpaintingTransformer, PatchCNN, distillation_loss
from memad_fast.scoring import fit

TINY = SimSIDConfig(
    image_size=16, channels=1, patch=4, dim=8, widths=(4, 6, 8), heads=2, layers=1, k=3, slots=6, threshold=0.9
)
MEMORIES = ("space-aware", "queue", "none")


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """These networks are too small to share."""


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 1, 16, 16)


def _tiny(**changes: Any) -> SimSID:
    torch.manual_seed(0)
    return SimSID(replace(TINY, **changes))


def _seen(images: Tensor, **changes: Any) -> SimSID:
    """A model in training mode whose memory and BatchNorm statistics have seen ``images``."""
    model = _tiny(**changes)
    model.teacher_losses(images)
    with torch.no_grad():
        _stage(model, "memory").observe(images)
    model.student_losses(images)
    return model


def _stage(model: SimSID, name: str) -> Any:
    return next(stage for stage in model.stages() if stage.name == name)


def _parameters(*modules: nn.Module) -> set[nn.Parameter]:
    return {parameter for module in modules for parameter in module.parameters()}


def _reached(model: SimSID) -> set[nn.Parameter]:
    return {value for value in model.parameters() if value.grad is not None and value.grad.any()}


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(value.nan_to_num(1e9), theirs[name].nan_to_num(1e9)) for name, value in ours.items())


# What it is made of


def test_the_published_network_has_the_reports_sizes() -> None:
    with torch.device("meta"):
        model = SimSID.paper()
    convolutions = [layer for layer in model.cnn.convolutions if isinstance(layer, nn.Conv2d)]
    assert [(layer.in_channels, layer.out_channels) for layer in convolutions] == [
        (1, 32), (32, 64), (64, 128), (128, 256)
    ]  # fmt: skip
    kinds = [type(layer).__name__ for layer in model.cnn.convolutions]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"] * 4
    assert (model.cnn.linear.in_features, model.cnn.linear.out_features) == (256, 64)
    for decoder in (model.teacher, model.student):
        assert (decoder.linear.in_features, decoder.linear.out_features) == (4096, 256 * 8 * 8)
        assert [layer.out_channels for layer in decoder.convolutions] == [128, 64, 32, 1]
        assert len(decoder.norms) == 3
    assert [tuple(level.memory.shape) for level in model.memory.levels] == [(64, 64), (16, 64), (1, 64)]
    preset = SimSID.presets()["paper"]
    assert (preset.config.image_size, preset.config.patch, preset.config.grid) == (128, 16, 8)
    assert (preset.training.epochs, preset.config.student_epochs) == (1000, 250)


@pytest.mark.parametrize("name", list(SimSID.presets()))
def test_every_preset_builds(name: str) -> None:
    with torch.device("meta"):
        model = SimSID(SimSID.presets()[name].config)
    assert [stage.name for stage in model.stages()] == ["teacher", "memory", "student", "calibration"]


@pytest.mark.parametrize("name", ["small", "digits"])
@pytest.mark.parametrize("channels", [1, 3])
def test_small_presets_train_and_score(name: str, channels: int) -> None:
    config = replace(SimSID.presets()[name].config, channels=channels)
    images = torch.rand(2, channels, config.image_size, config.image_size)
    model = SimSID(config)
    _stage(model, "memory").observe(images)
    assert model.student_losses(images)["total"].isfinite()
    scores = model.score(images)
    assert scores.anomaly_map.shape == (2, 1, config.image_size, config.image_size)
    assert scores.reconstruction.shape == images.shape


@pytest.mark.parametrize(
    ("image_size", "patch", "halvings"), [(16, 8, 3), (16, 2, 1), (15, 5, 0), (24, 12, 2), (8, 8, 3), (32, 16, 3)]
)
def test_image_and_patch_sizes_that_divide_work(image_size: int, patch: int, halvings: int) -> None:
    config = replace(TINY, image_size=image_size, patch=patch, k=1)
    assert config.halvings == halvings
    images = torch.rand(2, 1, image_size, image_size)
    model = SimSID(config)
    features = model.cnn(images)
    assert features.shape == (2, (image_size // patch) ** 2, 8)
    made, maps = model.teacher(features)
    assert made.shape == images.shape
    assert len(maps) == 2
    _stage(model, "memory").observe(images)
    assert model.student_losses(images)["total"].isfinite()
    assert model.score(images).image_score.isfinite().all()


def test_a_feature_is_of_its_patch_alone_row_by_row(images: Tensor) -> None:
    cnn = PatchCNN(TINY).eval()
    before, changed = cnn(images), images.clone()
    changed[:, :, 4:8, 12:16] = 0.5  # row 1, column 3
    moved = (cnn(changed) != before).any(dim=2)
    assert moved[:, 7].all()
    assert int(moved.sum()) == len(images)


def test_neighbours_are_those_on_the_grid() -> None:
    transformer = InpaintingTransformer(replace(TINY, image_size=12))
    none = 9
    assert transformer.neighbours.tolist()[4] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert transformer.neighbours.tolist()[0] == [none, none, none, none, 1, none, 3, 4]
    assert transformer.neighbours.tolist()[5] == [1, 2, none, 4, none, 7, 8, none]
    assert transformer.outside[4].tolist() == [False] * 9
    assert transformer.outside[0].tolist() == [False, True, True, True, True, False, True, False, False]


def _influence(centre: str, border: str = "masked") -> tuple[Tensor, Tensor]:
    """Which patches' [reads, features] change what is in-painted for patch 5 (row 1, column 1 of 4)."""
    transformer = InpaintingTransformer(replace(TINY, centre=centre, border=border, memory="none")).double()
    reads = torch.randn(1, 16, 8, dtype=torch.float64, requires_grad=True)
    features = torch.randn(1, 16, 8, dtype=torch.float64, requires_grad=True)
    transformer(reads, features)[0, 5].square().sum().backward()
    gradients = (torch.zeros_like(x) if x.grad is None else x.grad for x in (reads, features))
    of_reads, of_features = (gradient[0].abs().sum(dim=1) > 0 for gradient in gradients)
    return of_reads.nonzero().flatten(), of_features.nonzero().flatten()


def test_a_patch_is_inpainted_from_its_neighbours_reads_and_its_centre() -> None:
    around = [0, 1, 2, 4, 6, 8, 9, 10]
    reads, features = _influence("feature")
    assert (reads.tolist(), features.tolist()) == (around, [5])
    reads, features = _influence("read")
    assert (reads.tolist(), features.tolist()) == (sorted([*around, 5]), [])
    reads, features = _influence("token")
    assert (reads.tolist(), features.tolist()) == (around, [])


def test_the_answer_is_that_at_the_centre() -> None:
    transformer = InpaintingTransformer(replace(TINY, memory="none"))
    with torch.no_grad():
        for parameter in transformer.encoder.layers[0].self_attn.out_proj.parameters():
            parameter.zero_()  # every token keeps to itself
    features = torch.randn(1, 16, 8)
    first, second = (transformer(torch.randn(1, 16, 8), features) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.isclose(transformer(torch.randn(1, 16, 8), 1 - features), first).all(dim=2).any()


def test_borders_are_masked_or_zeros() -> None:
    masked, zeros = (
        InpaintingTransformer(replace(TINY, memory="none", border=border)) for border in ("masked", "zeros")
    )
    zeros.load_state_dict(masked.state_dict())
    reads, features = torch.randn(1, 16, 8), torch.randn(1, 16, 8)
    differs = (masked(reads, features) - zeros(reads, features)).abs().amax(dim=2)[0] > 1e-4
    inner = [5, 6, 9, 10]
    assert [patch for patch in range(16) if not differs[patch]] == inner


# Losses


def test_the_teachers_loss_is_the_mean_squared_error(images: Tensor) -> None:
    model = _tiny()
    made = model.teacher(model.cnn(images))[0]
    torch.testing.assert_close(model.teacher_losses(images)["total"], (made - images).square().mean())


def test_the_distillation_loss_is_the_sum_over_the_levels_of_the_mean_squared_error() -> None:
    ours = [torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0]])]
    theirs = [torch.tensor([[1.0, 4.0]]), torch.tensor([[3.0]])]
    assert float(distillation_loss(ours, theirs)) == 2.0 + 9.0


def test_the_students_loss_is_reconstruction_and_distillation(images: Tensor) -> None:
    model = _seen(images, memory="none", distillation=0.5)
    losses = model.student_losses(images)
    model.cnn.eval()
    model.teacher.eval()
    features = model.cnn(images)
    made, maps = model.student(model.inpainting(features, features))
    goals = model.teacher(features)[1]
    reconstruction = (made - images).square().mean()
    distillation = sum((ours - theirs).square().mean() for ours, theirs in zip(maps, goals, strict=True))
    assert len(maps) == 2
    torch.testing.assert_close(losses["reconstruction"], reconstruction)
    torch.testing.assert_close(losses["distillation"], distillation)
    torch.testing.assert_close(losses["total"], reconstruction + 0.5 * distillation)


def test_the_students_feedback_is_minus_the_log_of_the_discriminators_output(images: Tensor) -> None:
    model = _seen(images, memory="none", adversarial=0.3)
    losses = model.student_losses(images)
    features = model.cnn.eval()(images)
    made = model.student(model.inpainting(features, features))[0]
    expected = -torch.log(torch.sigmoid(model.discriminator(made).double())).mean()
    torch.testing.assert_close(losses["adversarial"].double(), expected)
    assert set(_seen(images).student_losses(images)) == {"total", "reconstruction", "distillation"}
    plain = losses["reconstruction"] + losses["distillation"]
    torch.testing.assert_close(losses["total"], plain + 0.3 * losses["adversarial"])


def test_the_discriminators_loss_is_that_of_equation_5_6(images: Tensor) -> None:
    model = _seen(images)
    loss = model.discriminator_losses(images)["total"]
    made = model.score(images).reconstruction
    with torch.no_grad():
        made = model.eval()(images)
    real, fake = (torch.sigmoid(model.discriminator(each).double()) for each in (images, made))
    torch.testing.assert_close(loss.double(), -(real.log() + (1 - fake).log()).mean())


def test_the_discriminator_learns_from_images_as_scoring_makes_them(images: Tensor) -> None:
    model, judged = _seen(images, shortcut=0.5), []
    hook = model.discriminator.register_forward_pre_hook(lambda _, arguments: judged.append(arguments[0]))
    model.discriminator_losses(images)
    hook.remove()
    with torch.no_grad():
        made = model.eval()(images)
    assert torch.equal(judged[0], images)
    assert torch.equal(judged[1], made)


def test_a_discriminator_that_is_sure_has_a_finite_loss(images: Tensor) -> None:
    model = _seen(images)
    with torch.no_grad():
        model.discriminator[-2].bias.fill_(-1e4)
    loss = model.discriminator_losses(images)["total"]
    assert 9e3 < float(loss.detach()) < 2e4


# Gradients


@pytest.mark.parametrize("memory", MEMORIES)
def test_gradients_reach_exactly_what_each_objective_trains(images: Tensor, memory: str) -> None:
    model = _seen(images, memory=memory)
    expected = {
        "teacher": _parameters(model.cnn, model.teacher),
        "student": _parameters(model.inpainting, model.student),
        "discriminator": _parameters(model.discriminator),
    }
    objectives = [objective for stage in model.stages() for objective in stage.objectives]
    assert [objective.name for objective in objectives] == list(expected)
    for objective in objectives:
        model.zero_grad(set_to_none=True)
        objective.losses(images)["total"].backward()
        assert set(objective.parameters) == expected[objective.name]
        assert _reached(model) == expected[objective.name]
        touched = {value for value in model.parameters() if value.grad is not None}
        assert touched == expected[objective.name]


def test_the_students_feedback_reaches_student_and_inpainting(images: Tensor) -> None:
    model = _seen(images, adversarial=1.0)
    losses = model.student_losses(images)
    model.zero_grad()
    losses["adversarial"].backward()
    wanted = _parameters(model.inpainting, model.student)
    assert wanted <= _reached(model)
    assert not _reached(model) & _parameters(model.cnn, model.teacher)


# Memory


@pytest.mark.parametrize("memory", ["space-aware", "queue"])
def test_the_memorys_stage_alone_changes_the_memory(images: Tensor, memory: str) -> None:
    model = _tiny(memory=memory)
    empty = _state(model.memory)
    model.teacher_losses(images)
    assert _same(_state(model.memory), empty)
    _stage(model, "memory").observe(images)
    seen = _state(model.memory)
    assert not _same(seen, empty)
    other = images.flip(3)
    model.student_losses(other)
    model.discriminator_losses(other)
    _stage(model, "calibration").observe(other)
    model.score(other)
    model.eval().student_losses(other)
    assert _same(_state(model.memory), seen)
    with pytest.raises(RuntimeError, match="read-only in eval mode"):
        _stage(model, "memory").observe(other)


@pytest.mark.parametrize("memory", ["space-aware", "queue"])
def test_a_newly_trained_teacher_empties_the_memory(images: Tensor, memory: str) -> None:
    model = _seen(images, memory=memory)
    model.teacher_losses(images)
    _stage(model, "teacher").finish(untold)
    with pytest.raises(RuntimeError, match=r"only 0 positions are written|the memory is empty"):
        model.score(images)


def test_the_memory_holds_the_features_of_the_patches(images: Tensor) -> None:
    model = _seen(images[:1])
    features = model.cnn.eval()(images[:1])
    assert isinstance(model.memory, HierarchicalMemory)
    torch.testing.assert_close(model.memory.levels[0].memory, features[0].detach())
    model = _seen(images, memory="queue")
    assert isinstance(model.memory, MemoryQueue)
    torch.testing.assert_close(model.memory.memory[:4], model.cnn.eval()(images).detach())


def test_reads_have_noise_in_training_alone(images: Tensor) -> None:
    for memory in ("space-aware", "queue"):
        model = _seen(images, memory=memory, threshold=-1.0)
        features = 0.01 * torch.randn(1, 16, 8)
        assert not torch.equal(model._read(features), model._read(features)), memory
        assert torch.equal(model.eval()._read(features), model._read(features)), memory
        quiet = _seen(images, memory=memory, threshold=-1.0, retrieval="straight-through").eval()
        quiet.memory.train()
        quiet.memory.load_state_dict(model.memory.state_dict())
        assert torch.equal(quiet.memory.eval()(*_query(quiet, features)), quiet.memory(*_query(quiet, features)))


def _query(model: SimSID, features: Tensor) -> tuple[Tensor]:
    return (features.flatten(0, 1) if isinstance(model.memory, HierarchicalMemory) else features,)


def test_the_shortcut_keeps_features_in_training_alone(images: Tensor) -> None:
    model = _seen(images, shortcut=1.0)
    features = torch.randn(2, 16, 8)
    assert torch.equal(model._inpaint(features), features)
    assert not torch.isclose(model.eval()._inpaint(features), features).all(dim=2).any()
    half = _seen(images, shortcut=0.5)
    kept = (half._inpaint(features) == features).all(dim=2)
    assert 0 < int(kept.sum()) < kept.numel()


# Scores


def test_the_score_is_one_minus_the_sigmoid_of_the_normalised_realness(images: Tensor) -> None:
    model = _seen(images, memory="none").eval()
    last = model.discriminator[-2]
    with torch.no_grad():  # it hardly tells images apart before it is trained: logits of mean 0 and deviation 1
        logits = model.discriminator(model(images))
        last.bias.sub_(logits.mean()).div_(logits.std())
        last.weight.div_(logits.std())
    calibrate = _stage(model, "calibration").observe
    for batch in (images[:3], images[3:]):
        calibrate(batch)
    scores, normal = model.score(images[:2].flip(2)), model.score(images).parts["realness"].double()
    mean, deviation = normal.mean(), normal.std(correction=0)
    expected = 1 - torch.sigmoid((scores.parts["realness"].double() - mean) / deviation)
    torch.testing.assert_close(scores.image_score.double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(scores.image_score, scores.parts["discriminator"])
    model.config = replace(model.config, score="discriminator-printed")
    torch.testing.assert_close(model.score(images[:2].flip(2)).image_score, 1 - scores.image_score)
    with torch.no_grad():
        made = model.eval()(images[:2].flip(2))
    torch.testing.assert_close(scores.parts["realness"], torch.sigmoid(model.discriminator(made)))


def test_the_map_is_the_reconstructions_error_and_its_score_the_squared_one() -> None:
    images = torch.rand(3, 3, 16, 16)
    scores = _seen(images, channels=3, score="reconstruction").score(images)
    assert 0 <= float(scores.reconstruction.min()) <= float(scores.reconstruction.max()) <= 1
    expected = (images - scores.reconstruction).abs().mean(dim=1, keepdim=True)
    torch.testing.assert_close(scores.anomaly_map, expected)
    torch.testing.assert_close(scores.image_score, (images - scores.reconstruction).square().mean(dim=(1, 2, 3)))
    assert torch.equal(scores.image_score, scores.parts["reconstruction"])


def test_images_that_the_discriminator_cannot_tell_apart_have_finite_scores(images: Tensor) -> None:
    model = _seen(images)
    assert model.score(images).image_score.isfinite().all()  # not calibrated
    _stage(model, "calibration").observe(images[:1])
    assert model.score(images).image_score.isfinite().all()  # σ of one image
    with torch.no_grad():
        model.discriminator[-2].weight.zero_()
        model.discriminator[-2].bias.fill_(-1e4)
    model.normal_realness.zero_()
    _stage(model, "calibration").observe(images)
    assert model.score(images).image_score.tolist() == [0.5] * 4  # all are certainly made


def test_a_new_training_forgets_the_old_calibration(images: Tensor) -> None:
    model = _seen(images)
    _stage(model, "calibration").observe(images)
    first = model.normal_realness.clone()
    _stage(model, "teacher").finish(untold)
    _stage(model, "memory").observe(images)
    _stage(model, "calibration").observe(images)
    assert torch.equal(model.normal_realness, first)


@pytest.mark.parametrize("memory", MEMORIES)
def test_scores_do_not_depend_on_the_batch(images: Tensor, memory: str) -> None:
    model = _seen(images, memory=memory)
    _stage(model, "calibration").observe(images)
    together = model.score(images)
    for index in range(4):
        alone = model.score(images[index : index + 1])
        torch.testing.assert_close(alone.image_score[0], together.image_score[index], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone.anomaly_map[0], together.anomaly_map[index], rtol=1e-5, atol=1e-5)
        replaced = model.score(images.where(torch.arange(4)[:, None, None, None] == index, 1.0))
        assert torch.equal(replaced.anomaly_map[index], together.anomaly_map[index])
        assert torch.equal(replaced.image_score[index], together.image_score[index])


@pytest.mark.parametrize("memory", MEMORIES)
def test_scoring_changes_nothing_in_the_model(images: Tensor, memory: str) -> None:
    model = _seen(images, memory=memory)
    before = _state(model)
    model.score(images)
    assert all(module.training for module in model.modules())
    assert _same(_state(model), before)


def test_training_modes_are_as_they_were_after_every_loss(images: Tensor) -> None:
    model = _seen(images)
    statistics = _state(model.cnn), _state(model.teacher)
    model.student_losses(images)
    model.discriminator_losses(images)
    _stage(model, "calibration").observe(images)
    assert all(module.training for module in model.modules())
    assert _same(_state(model.cnn), statistics[0])
    assert _same(_state(model.teacher), statistics[1])


def test_no_images_give_no_scores(images: Tensor) -> None:
    for memory in MEMORIES:
        assert _seen(images, memory=memory).score(images[:0]).image_score.shape == (0,)


def test_a_model_that_has_seen_nothing_says_so(images: Tensor) -> None:
    with pytest.raises(RuntimeError, match="only 0 positions are written"):
        _tiny().score(images)
    with pytest.raises(RuntimeError, match="the memory is empty"):
        _tiny(memory="queue").score(images)


@pytest.mark.parametrize("memory", MEMORIES)
def test_state_dict_round_trip_is_bit_identical(images: Tensor, memory: str) -> None:
    model = _seen(images, memory=memory)
    _stage(model, "calibration").observe(images)
    copy = models.build("simsid", json.loads(json.dumps(asdict(model.config))))
    copy.load_state_dict(model.state_dict())
    ours, theirs = model.score(images), copy.score(images)
    assert torch.equal(ours.image_score, theirs.image_score)
    assert torch.equal(ours.anomaly_map, theirs.anomaly_map)


# Training


SETTINGS = TrainingSettings(learning_rate=5e-3, batch_size=8, epochs=3)


def _bumps(count: int, seed: int = 0) -> Tensor:
    """A bright disc whose place, size and brightness vary a little."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    shift = torch.rand(count, 2, 1, 1, generator=generator) * 2 + 6.5
    distance = (y - shift[:, 0]).square() + (x - shift[:, 1]).square()
    bright = 0.6 + 0.2 * torch.rand(count, 1, 1, generator=generator)
    return (0.1 + bright * torch.exp(-distance / 18)).clamp(0, 1)[:, None]


def _fit(folder: Path, **options: Any) -> Any:
    changes = {name: options.pop(name) for name in list(options) if name in SimSIDConfig.__dataclass_fields__}
    data = from_arrays(_bumps(24)[:, 0].numpy(), _bumps(4, 1)[:, 0].numpy(), [0] * 4)
    return fit(_tiny(**changes), data, folder, **{"settings": SETTINGS, "device": "cpu", "quiet": True} | options)


@pytest.mark.parametrize("memory", MEMORIES)
def test_training_lowers_the_losses_and_a_planted_defect_is_found(memory: str) -> None:
    model, normal = _tiny(memory=memory, centre="token", dim=16, widths=(8, 16, 16)), _bumps(64)
    first, last = {}, {}
    for stage in model.stages():
        optimizers = [torch.optim.Adam(objective.parameters, lr=5e-3) for objective in stage.objectives]
        for step in range(50 if stage.objectives else 1):
            batch = normal[8 * (step % 8) :][:8]
            for objective, optimizer in zip(stage.objectives, optimizers, strict=True):
                losses = objective.losses(batch)
                optimizer.zero_grad()
                losses["total"].backward()
                optimizer.step()
                values = {f"{objective.name}.{name}": float(loss.detach()) for name, loss in losses.items()}
                first, last = values | first, last | values
        if stage.observe is not None:
            stage.observe(normal)
    for name in ("teacher.total", "student.total", "student.reconstruction", "student.distillation"):
        assert last[name] < first[name] / 3, name
    good = _bumps(16, 1)
    bad = good.clone()
    bad[:, :, 8:13, 1:6] = 1 - bad[:, :, 8:13, 1:6]
    errors = [model.score(each).parts["reconstruction"] for each in (good, bad)]
    assert float(errors[1].min()) > float(errors[0].max())
    heat = model.score(bad).anomaly_map
    assert float(heat[:, :, 8:13, 1:6].mean()) > 3 * float(heat.mean())


def test_the_seed_fixes_the_training(tmp_path: Path) -> None:
    first, second = (_fit(tmp_path / name) for name in ("first", "second"))
    assert _same(first.model.state_dict(), second.model.state_dict())
    assert first.config["threshold"] == second.config["threshold"]


def test_every_stage_runs(tmp_path: Path) -> None:
    run = _fit(tmp_path, student_epochs=2)
    stages = run.config["training"]["stages"]
    assert {name: stage["epochs_done"] for name, stage in stages.items()} == {
        "teacher": 3.0, "memory": 1.0, "student": 2.0, "calibration": 1.0
    }  # fmt: skip
    assert int(run.model.normal_realness[0]) == run.config["training"]["images"]


@pytest.mark.parametrize("memory", ["space-aware", "queue"])
@pytest.mark.parametrize("steps", [2, 5, 8, 11])
def test_an_interruption_in_any_stage_changes_nothing(tmp_path: Path, memory: str, steps: int) -> None:
    """With 20 images in batches of 8 each of the four stages has 3 steps."""
    options = {"memory": memory, "epochs": 1, "checkpoint_seconds": 0.0}
    whole = _fit(tmp_path / "whole", **options)
    with ended_after(steps, unplug), pytest.raises(InterruptedError):
        _fit(tmp_path / "parts", **options)
    parts = _fit(tmp_path / "parts", **options)
    assert _same(whole.model.state_dict(), parts.model.state_dict())
    assert whole.config["threshold"] == parts.config["threshold"]


def test_autocast_training_has_finite_losses_and_gradients(images: Tensor) -> None:
    model = _seen(images, adversarial=0.1)
    for stage in model.stages():
        for objective in stage.objectives:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = objective.losses(images)["total"]
            loss.backward()
            assert loss.isfinite()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())


# Config


@pytest.mark.parametrize(
    "changes",
    [
        {"memory": "queue"}, {"memory": "none"}, {"retrieval": "straight-through"}, {"k": 1}, {"threshold": 1.1},
        {"group": 4}, {"heads": 1}, {"layers": 2}, {"centre": "read"}, {"centre": "token"}, {"border": "zeros"},
        {"shortcut": 0.5}, {"distillation": 0.0}, {"adversarial": 0.1}, {"patch": 8}, {"dim": 16},
        {"widths": (4, 6, 10)},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_changes_the_training(images: Tensor, changes: dict[str, Any]) -> None:
    def total(**changes: Any) -> float:
        model = _seen(images, **changes)
        _stage(model, "memory").observe(images.flip(2))
        torch.manual_seed(1)
        return float(model.student_losses(images)["total"].detach())

    assert total() == total()
    assert total(**changes) != total()


def test_a_queue_remembers_as_many_images_as_it_has_slots(images: Tensor) -> None:
    assert _tiny(memory="queue", slots=3).memory.memory.shape == (3, 16, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 2}, "channels: expected 1 or 3, got 2"),
        ({"patch": 5}, "patch: 5 does not divide image_size 16; these do: 1, 2, 4, 8, 16"),
        ({"image_size": 0}, "image_size: expected a positive int, got 0"),
        ({"image_size": "16"}, "image_size: expected a positive int, got '16'"),
        ({"widths": ()}, "widths: expected one channel number a convolution"),
        ({"widths": (4, 0)}, "widths: expected a positive int"),
        ({"widths": 4}, "widths: expected one channel number a convolution, got 4"),
        ({"memory": "fifo"}, "memory: expected one of space-aware, queue, none, got 'fifo'"),
        ({"retrieval": "softmax"}, "retrieval: expected one of gumbel-topk, straight-through"),
        ({"centre": "none"}, "centre: expected one of feature, read, token"),
        ({"border": "reflect"}, "border: expected one of masked, zeros"),
        ({"score": "mse"}, "score: expected one of discriminator, discriminator-printed, reconstruction"),
        ({"k": 17}, "k: expected 1 to 16, the rows of memory 'space-aware', got 17"),
        ({"k": 7, "memory": "queue"}, "k: expected 1 to 6, the rows of memory 'queue', got 7"),
        ({"heads": 3}, r"dim: expected a multiple of heads \(3\), got 8"),
        ({"shortcut": 1.5}, "shortcut: expected a finite number from 0 to 1, got 1.5"),
        ({"threshold": "high"}, "threshold: expected a finite number"),
        ({"distillation": -1}, "distillation: expected a finite number"),
        ({"adversarial": float("nan")}, "adversarial: expected a finite number"),
        ({"student_epochs": 0}, "student_epochs: expected a positive int, got 0"),
        ({"layers": True}, "layers: expected a positive int, got True"),
    ],
)
def test_bad_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_a_decoder_gives_a_map_behind_each_norm() -> None:
    made, maps = Decoder(TINY)(torch.randn(2, 16, 8))
    assert made.shape == (2, 1, 16, 16)
    assert [tuple(each.shape) for each in maps] == [(2, 6, 4, 4), (2, 4, 8, 8)]
    assert all(float(each.detach().min()) >= 0 for each in maps)
