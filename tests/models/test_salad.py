"""SALAD, whole: losses and scores by hand, who learns from what, the centre, presets, options, bad input, resuming, and
a planted defect found."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devices import NothingWaits
from similarity import ssim_by_hand
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from trainings import ended_after, unplug

from memad_fast import models
from memad_fast.data import from_arrays
from memad_fast.models import SALAD, SALADConfig, TrainingSettings, salad
from memad_fast.scoring import Run, fit

TINY = SALADConfig(image_size=16, channels=1, latent=6, width=4, most_width=8)
WEIGHTS = ("adversarial", "structure", "feature", "centre", "restoration")
PARTS = ("encoder", "decoder", "restorer", "image_critic", "feature_critic")
# Which parts each loss trains (the table at the head of salad.py).
LEARNS = {
    "structure": {"encoder", "decoder"},
    "feature": {"encoder", "decoder"},
    "restoration": {"encoder", "restorer"},
    "centre": {"encoder"},
    "adversarial": {"encoder", "decoder"},
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """These networks are too small to share."""


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 1, 16, 16)


def _tiny(**changes: Any) -> SALAD:
    torch.manual_seed(0)
    model = SALAD(replace(TINY, **changes))
    model.centre.copy_(torch.linspace(-0.5, 0.5, TINY.latent))
    return model


def _by_hand(model: SALAD, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, z', x̂, and of the z that seed 5 draws first: z and x'."""
    x = images * 2 - 1
    code = model.encoder(x)[:, :, 0, 0]
    torch.manual_seed(5)
    z = torch.randn(len(images), TINY.latent)
    return x, code, model.decoder(code[:, :, None, None]), z, model.decoder(z[:, :, None, None])


def _losses(model: SALAD, images: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return model.translation_losses(images)


def test_shapes_and_ranges(images: Tensor) -> None:
    scores = _tiny().score(images)
    assert scores.image_score.shape == (4,)
    assert scores.anomaly_map.shape == (4, 1, 16, 16)
    assert scores.reconstruction.shape == (4, 1, 16, 16)
    assert {name: part.shape for name, part in scores.parts.items()} == dict.fromkeys(
        ("feature", "image", "centre"), (4,)
    )
    assert 0 <= float(scores.reconstruction.min()) <= float(scores.reconstruction.max()) <= 1
    assert all(
        value.dtype == torch.float32 for value in (scores.image_score, scores.anomaly_map, *scores.parts.values())
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_the_three_scores_are_those_of_the_paper(channels: int) -> None:
    images = torch.rand(4, channels, 16, 16)
    model = _tiny(channels=channels)
    with torch.no_grad():
        x, code, reconstruction, _, _ = _by_hand(model, images)
        again = model.encoder(reconstruction)[:, :, 0, 0]
    expected = {
        "feature": (code - again).abs().mean(dim=1),
        "image": (x - reconstruction).abs().mean(dim=(1, 2, 3)),
        "centre": (code - model.centre).abs().mean(dim=1),
    }
    for name, part in expected.items():
        scores = _tiny(channels=channels, score=name).score(images)
        torch.testing.assert_close(scores.image_score, part)
        torch.testing.assert_close(scores.parts, expected)
        torch.testing.assert_close(scores.reconstruction, (reconstruction + 1) / 2)
        torch.testing.assert_close(scores.anomaly_map, (x - reconstruction).abs().mean(dim=1, keepdim=True))


def test_the_image_loss_is_minus_ssim_for_values_that_span_two() -> None:
    images = torch.rand(4, 3, 16, 16)
    model = _tiny(channels=3)
    x, _, reconstruction, _, _ = _by_hand(model, images)
    structure = _losses(model, images)["structure"]
    torch.testing.assert_close(structure.double(), -ssim_by_hand(x, reconstruction, 2.0), rtol=1e-4, atol=1e-5)


def test_global_ssim_is_equation_5_over_whole_images() -> None:
    images = torch.rand(4, 3, 16, 16)
    model = _tiny(channels=3, image_loss="global-ssim")
    x, _, reconstruction, _, _ = _by_hand(model, images)
    values = []
    for one, other in zip(x.double().flatten(0, 1), reconstruction.detach().double().flatten(0, 1), strict=True):
        a, b = one.numpy().ravel(), other.numpy().ravel()
        (var_a, cov), (_, var_b) = np.cov(a, b, bias=True)
        c1, c2 = 0.02**2, 0.06**2
        luminance = (2 * a.mean() * b.mean() + c1) / (a.mean() ** 2 + b.mean() ** 2 + c1)
        values.append(luminance * (2 * cov + c2) / (var_a + var_b + c2))
    assert _losses(model, images)["structure"].item() == pytest.approx(-np.mean(values), rel=1e-4)


def test_the_image_loss_of_table_iii_is_the_mean_absolute_error(images: Tensor) -> None:
    model = _tiny(image_loss="l1")
    x, _, reconstruction, _, _ = _by_hand(model, images)
    torch.testing.assert_close(_losses(model, images)["structure"], (x - reconstruction).abs().mean())


def test_every_other_loss_is_its_equation(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(salad, "perturb", lambda images, *, control_points: 1 - images / control_points)
    model = _tiny()
    x, code, _, z, made = _by_hand(model, images)
    losses = _losses(model, images)
    again = model.encoder(made)[:, :, 0, 0]
    torch.testing.assert_close(losses["feature"], (again - z).abs().mean())
    real_feature, real_image = model.feature_critic(code) - 1, model.image_critic(made) - 1
    torch.testing.assert_close(losses["adversarial"], (real_feature**2).mean() / 2 + (real_image**2).mean() / 2)
    torch.testing.assert_close(losses["centre"], ((code - model.centre) ** 2).sum() / 2 / 4)
    restored = model.restorer(model.encoder(2 * (1 - images / 2) - 1))
    torch.testing.assert_close(losses["restoration"], (restored - x).abs().mean())


def test_the_total_weighs_the_terms_as_published(images: Tensor) -> None:
    losses = _losses(_tiny(), images)
    weights = {"adversarial": 1, "structure": 10, "feature": 10, "centre": 10, "restoration": 10}
    assert losses.keys() == {"total", *weights}
    torch.testing.assert_close(losses["total"], sum(weight * losses[name] for name, weight in weights.items()))
    for name in weights:
        changed = _losses(_tiny(**{name: 3.0}), images)
        expected = losses["total"] + (3 - weights[name]) * losses[name]
        torch.testing.assert_close(changed["total"], expected, rtol=1e-4, atol=1e-4)


def test_the_critics_tell_real_from_made_by_least_squares(images: Tensor) -> None:
    model = _tiny()
    x, code, _, z, made = _by_hand(model, images)
    torch.manual_seed(5)
    losses = model.critic_losses(images)
    image = ((model.image_critic(x) - 1) ** 2).mean() / 2 + (model.image_critic(made) ** 2).mean() / 2
    feature = ((model.feature_critic(z) - 1) ** 2).mean() / 2 + (model.feature_critic(code) ** 2).mean() / 2
    torch.testing.assert_close(losses, {"total": image + feature, "image": image, "feature": feature})


def _trained_by(model: SALAD, loss: Tensor) -> set[str]:
    """The parts that get a gradient that is not zero everywhere; every other has none at all."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = set()
    for part in PARTS:
        gradients = [parameter.grad for parameter in getattr(model, part).parameters()]
        if any(gradient is not None and gradient.any() for gradient in gradients):
            found.add(part)
            # A bias before an InstanceNorm has no effect; its gradient is zero but for rounding.
            assert all(gradient is not None for gradient in gradients)
        else:
            assert all(gradient is None for gradient in gradients)
    return found


@pytest.mark.parametrize("name", LEARNS)
def test_each_loss_trains_the_parts_it_is_meant_for(name: str, images: Tensor) -> None:
    """Also: the critics learn nothing from their makers' loss, and the restorer is the only one that restores."""
    model = _tiny()
    assert _trained_by(model, _losses(model, images)[name]) == LEARNS[name]


def test_the_critics_losses_train_the_critics_alone(images: Tensor) -> None:
    model = _tiny()
    assert _trained_by(model, model.critic_losses(images)["image"]) == {"image_critic"}
    assert _trained_by(model, model.critic_losses(images)["feature"]) == {"feature_critic"}


def test_every_parameter_has_one_optimiser() -> None:
    model = _tiny()
    (stage,) = model.stages()
    translation, critics = stage.objectives
    made_of = [model.encoder, model.decoder, model.restorer]
    assert list(map(id, translation.parameters)) == [id(p) for part in made_of for p in part.parameters()]
    judges = [model.image_critic, model.feature_critic]
    assert list(map(id, critics.parameters)) == [id(p) for part in judges for p in part.parameters()]
    assert len(list(model.parameters())) == len(translation.parameters) + len(critics.parameters)


def test_the_centre_moves_as_center_loss_has_it(images: Tensor) -> None:
    model = _tiny(centre_rate=0.25)
    before = model.centre.clone()
    (stage,) = model.stages()
    assert stage.observe is not None
    with torch.no_grad():
        code = model.encoder(images * 2 - 1)[:, :, 0, 0]
        stage.observe(images)
    torch.testing.assert_close(model.centre, before - 0.25 * (before - code).sum(dim=0) / 5)
    assert "centre" in model.state_dict()
    assert "centre" not in dict(model.named_parameters())


def test_the_centre_settles_where_the_features_are(images: Tensor) -> None:
    model = _tiny()
    (stage,) = model.stages()
    assert stage.observe is not None
    with torch.no_grad():
        for _ in range(60):
            stage.observe(images)
        torch.testing.assert_close(model.centre, model.encoder(images * 2 - 1)[:, :, 0, 0].mean(dim=0))


def test_scoring_changes_nothing_in_the_model(images: Tensor) -> None:
    model = _tiny().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.score(images)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_scores_do_not_depend_on_the_batch(images: Tensor) -> None:
    model = _tiny()
    together = model.score(images)
    for index in range(4):
        alone = model.score(images[index : index + 1])
        replaced = model.score(images.where(torch.arange(4)[:, None, None, None] == index, 1.0))
        for name, part in together.parts.items():
            torch.testing.assert_close(alone.parts[name][0], part[index], rtol=1e-5, atol=1e-6)
            assert torch.equal(replaced.parts[name][index], part[index])
        assert torch.equal(replaced.anomaly_map[index], together.anomaly_map[index])


@pytest.mark.parametrize("size", [8, 11, 16, 24, 50, 100])
def test_any_size_is_halved_to_one_pixel_and_back(size: int) -> None:
    model = _tiny(image_size=size, channels=3)
    images = torch.rand(2, 3, size, size)
    assert model.encoder(images).shape == (2, TINY.latent, 1, 1)
    assert model.score(images).reconstruction.shape == images.shape
    assert all(loss.isfinite() for loss in model.translation_losses(images).values())
    assert all(loss.isfinite() for loss in model.critic_losses(images).values())


def test_the_published_network_has_eight_convolutions_each_way() -> None:
    with torch.device("meta"):
        model = SALAD.paper()
        assert model.encoder(torch.empty(2, 1, 256, 256)).shape == (2, 128, 1, 1)
        assert model.decoder(torch.empty(2, 128, 1, 1)).shape == (2, 1, 256, 256)
        assert model.image_critic(torch.empty(2, 1, 256, 256)).shape == (2, 1, 30, 30)
    for network, kind in ((model.encoder, nn.Conv2d), (model.decoder, nn.ConvTranspose2d)):
        layers = [layer for layer in network if isinstance(layer, kind)]
        assert len(layers) == 8
        assert {(layer.kernel_size, layer.stride) for layer in layers} == {((4, 4), (2, 2))}
        assert sum(isinstance(layer, nn.InstanceNorm2d) for layer in network) == 7
        assert sum(isinstance(layer, nn.LeakyReLU) for layer in network) == 7
    assert isinstance(model.decoder[-1], nn.Tanh)
    assert model.restorer is not model.decoder
    assert [layer.weight.shape for layer in model.restorer if isinstance(layer, nn.ConvTranspose2d)] == [
        layer.weight.shape for layer in model.decoder if isinstance(layer, nn.ConvTranspose2d)
    ]


def test_the_published_setting_is_that_of_the_paper() -> None:
    preset = SALAD.presets()["paper"]
    config, training = preset.config, preset.training
    assert config.image_size == 256
    assert [getattr(config, name) for name in WEIGHTS] == [1, 10, 10, 10, 10]
    assert (config.score, config.image_loss, config.centre_rate) == ("feature", "ssim", 0.5)
    assert (training.learning_rate, training.batch_size, training.epochs) == (2e-4, 64, 200)
    assert training.constant_share == 0.5
    assert preset.resize == "bicubic"


@pytest.mark.parametrize("name", list(SALAD.presets()))
@pytest.mark.parametrize("channels", [1, 3])
def test_every_preset_builds_and_scores(name: str, channels: int) -> None:
    config = replace(SALAD.presets()[name].config, channels=channels)
    with torch.device("meta" if name == "paper" else "cpu"):
        model = SALAD(config)
        scores = model._score(torch.rand(2, channels, config.image_size, config.image_size))
    assert scores.anomaly_map.shape == (2, 1, config.image_size, config.image_size)


def _train(model: SALAD, images: Tensor, steps: int) -> list[float]:
    """As the trainer does: the objectives in turn, then the look at the batch."""
    (stage,) = model.train().stages()
    optimizers = [torch.optim.Adam(objective.parameters, lr=2e-3) for objective in stage.objectives]
    totals = []
    for _ in range(steps):
        for objective, optimizer in zip(stage.objectives, optimizers, strict=True):
            losses = objective.losses(images)
            optimizer.zero_grad()
            losses["total"].backward()
            optimizer.step()
            if objective.name == "translation":
                totals.append(float(losses["total"].detach()))
        with torch.no_grad():
            stage.observe(images)  # type: ignore[misc]
    return totals


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_of_zero_leaves_a_term_out(name: str, images: Tensor) -> None:
    model = _tiny(**{name: 0})
    losses = model.translation_losses(images)
    assert losses.keys() == {"total", *WEIGHTS} - {name}
    assert (model.restorer is None) == (name == "restoration")
    assert (model.image_critic is None) == (model.feature_critic is None) == (name == "adversarial")
    (stage,) = model.stages()
    assert len(stage.objectives) == (1 if name == "adversarial" else 2)
    assert len(_train(model, images, 2)) == 2
    assert model.score(images).image_score.isfinite().all()


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_term_can_stand_alone(name: str, images: Tensor) -> None:
    model = _tiny(**{other: 0 for other in WEIGHTS if other != name})
    losses = model.translation_losses(images)
    assert losses.keys() == {"total", name}
    losses["total"].backward()


def test_the_seed_fixes_initialisation_and_training(images: Tensor) -> None:
    first, second = _tiny(), _tiny()
    torch.manual_seed(3)
    totals = _train(first, images, 3)
    torch.manual_seed(3)
    assert totals == _train(second, images, 3)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_state_dict_round_trip_is_bit_identical(images: Tensor) -> None:
    model = _tiny()
    _train(model, images, 2)
    copy = models.build("salad", json.loads(json.dumps(asdict(model.config))))
    copy.load_state_dict(model.state_dict())
    ours, theirs = model.score(images), copy.score(images)
    assert all(torch.equal(part, theirs.parts[name]) for name, part in ours.parts.items())
    assert torch.equal(ours.reconstruction, theirs.reconstruction)


def _discs(count: int) -> Tensor:
    """Bright discs on a dark ground, a little apart in place and brightness."""
    across = torch.arange(16.0)
    middle = 7.5 + torch.rand(count, 2, 1, 1) * 2 - 1
    distance = (across[:, None] - middle[:, 0]) ** 2 + (across - middle[:, 1]) ** 2
    return (0.1 + 0.7 * (distance < 20)[:, None] + 0.05 * torch.rand(count, 1, 16, 16)).clamp(0, 1)


def _shares_found(model: SALAD, normal: Tensor, abnormal: Tensor) -> dict[str, float]:
    """AUROC of every score."""
    labels = np.repeat([0, 1], [len(normal), len(abnormal)])
    good, bad = model.score(normal).parts, model.score(abnormal).parts
    return {name: roc_auc_score(labels, torch.cat((good[name], bad[name])).numpy()) for name in good}


@pytest.mark.parametrize("image_loss", ["ssim", "l1"])
def test_training_lowers_the_loss_and_finds_a_planted_defect(image_loss: str) -> None:
    """A hole in a disc. SSIM asks for structure, not for grey values: only l1 makes |x − x̂| a map of the hole."""
    normal = _discs(32)
    model = _tiny(width=8, most_width=16, image_loss=image_loss)
    totals = _train(model, normal[:16], 100)
    assert np.mean(totals[-5:]) < np.mean(totals[:5]) / 2
    holes = normal[16:].clone()
    holes[:, :, 5:11, 5:11] = 0.1
    found = _shares_found(model, normal[16:], holes)
    if image_loss == "ssim":
        assert found["centre"] > 0.95
        assert found["feature"] > 0.7
        return
    assert min(found.values()) > 0.95
    maps = model.score(holes).anomaly_map
    assert float(maps[:, :, 5:11, 5:11].mean()) > 2 * float(maps.mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 7}, "image_size: expected an int of at least 8, got 7"),
        ({"image_size": "16"}, "image_size: expected an int of at least 8, got '16'"),
        ({"channels": 2}, "channels: expected 1 or 3, got 2"),
        ({"latent": 0}, "latent: expected an int of at least 1, got 0"),
        ({"width": 4.0}, "width: expected an int"),
        ({"most_width": -1}, "most_width"),
        ({"control_points": True}, "control_points: expected an int of at least 1, got True"),
        ({"structure": -1.0}, "structure: expected a finite number of at least 0, got -1.0"),
        ({"centre": float("inf")}, "centre: expected a finite number of at least 0, got inf"),
        ({"feature": "10"}, "feature: expected a finite number of at least 0, got '10'"),
        ({"centre_rate": 1.5}, "centre_rate: expected 0 to 1, got 1.5"),
        ({"image_loss": "mse"}, "image_loss: expected one of ssim, global-ssim, l1, got 'mse'"),
        ({"score": "pixel"}, "score: expected one of feature, image, centre, got 'pixel'"),
        (dict.fromkeys(WEIGHTS, 0), "expected at least one weight above 0"),
    ],
)
def test_bad_configs_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_no_images_give_no_scores() -> None:
    assert _tiny().score(torch.rand(0, 1, 16, 16)).image_score.shape == (0,)


def test_constant_images_are_scored(images: Tensor) -> None:
    assert all(part.isfinite().all() for part in _tiny().score(torch.zeros_like(images)).parts.values())


@pytest.mark.parametrize("image_loss", ["ssim", "global-ssim", "l1"])
def test_autocast_training_has_finite_losses_and_gradients(images: Tensor, image_loss: str) -> None:
    model = _tiny(image_loss=image_loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.translation_losses(images)
        critic = model.critic_losses(images)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in (*losses.values(), *critic.values()))
    (losses["total"] + critic["total"]).backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())


@pytest.mark.parametrize("image_loss", ["ssim", "global-ssim"])
def test_a_training_step_and_a_score_wait_for_no_device(images: Tensor, image_loss: str) -> None:
    model = _tiny(image_loss=image_loss)
    (stage,) = model.stages()
    with NothingWaits():
        for objective in stage.objectives:
            objective.losses(images)["total"].backward()
        with torch.no_grad():
            stage.observe(images)  # type: ignore[misc]
        model.eval()._score(images)


def _fit(folder: Path, **options: Any) -> Run:
    torch.manual_seed(0)
    model, data = SALAD(TINY), from_arrays(_discs(24)[:, 0].numpy(), image_size=16)
    settings = TrainingSettings(learning_rate=1e-3, batch_size=8, epochs=2, constant_share=0.5)
    return fit(model, data, folder, settings=settings, device="cpu", quiet=True, **options)


def test_an_interrupted_training_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = _fit(tmp_path / "whole")
    with ended_after(4, unplug) as done:
        with pytest.raises(InterruptedError):
            _fit(tmp_path / "parts", checkpoint_seconds=0.0)
        parts = _fit(tmp_path / "parts")
    assert 6 <= done[0] < 4 + 6  # it went on, and did not begin anew
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name
    assert whole.threshold == parts.threshold
    assert whole.model.centre.any()
