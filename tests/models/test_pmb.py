"""PMB, whole: loss and score by hand, gradients, seeds, presets, options, bad input, and a planted defect found."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from devices import NothingWaits
from similarity import ssim_by_hand
from torch import Tensor

from memad_fast import models
from memad_fast.memory import MemoryUnit, PartitionMemoryBank
from memad_fast.models import PMB, PMBConfig

TINY = PMBConfig(image_size=16, channels=1, widths=(4, 6, 8), items=(5, 5), partitions=(4, 2))


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """These networks are too small to share."""


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 1, 16, 16)


def _tiny(**changes: object) -> PMB:
    torch.manual_seed(0)
    return PMB(replace(TINY, **changes))


def test_shapes_and_ranges(images: Tensor) -> None:
    scores = _tiny().score(images)
    assert scores.image_score.shape == (4,)
    assert scores.anomaly_map.shape == (4, 1, 16, 16)
    assert scores.reconstruction.shape == (4, 1, 16, 16)
    assert {name: part.shape for name, part in scores.parts.items()} == {"error_sum": (4,), "mu": (4,)}
    assert 0 <= float(scores.reconstruction.min()) <= float(scores.reconstruction.max()) <= 1
    assert float(scores.anomaly_map.min()) >= 0


def test_loss_is_mse_plus_a_tenth_of_one_minus_ssim(images: Tensor) -> None:
    model = _tiny().eval()
    losses = model.loss(images)
    reconstruction = model(images)
    mse = (reconstruction.double() - images.double()).square().mean()
    ssim = 1 - ssim_by_hand(reconstruction, images)
    torch.testing.assert_close(losses["mse"].double(), mse, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(losses["ssim"].double(), ssim, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["total"].double(), mse + 0.1 * ssim, rtol=1e-4, atol=1e-5)


def test_loss_options(images: Tensor) -> None:
    model = _tiny(pixel_loss="norm", ssim_weight=0.0).eval()
    norms = (model(images) - images).flatten(1).double().square().sum(dim=1).sqrt()
    torch.testing.assert_close(model.loss(images)["total"].double(), norms.mean(), rtol=1e-5, atol=1e-6)
    assert float(model.loss(images)["ssim"]) == 0


def test_score_is_histogram_error_estimation_of_the_error(images: Tensor) -> None:
    scores = _tiny().score(images)
    error = (images - scores.reconstruction).abs()
    mu = error.flatten(1).sort(dim=1).values[:, :128].mean(dim=1)
    corrected = (error - mu[:, None, None, None]).clamp(min=0)
    torch.testing.assert_close(scores.parts["mu"], mu)
    torch.testing.assert_close(scores.parts["error_sum"], error.sum(dim=(1, 2, 3)))
    torch.testing.assert_close(scores.anomaly_map, corrected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores.image_score, corrected.sum(dim=(1, 2, 3)), rtol=1e-5, atol=1e-4)


def test_without_histogram_the_score_is_the_sum_of_the_error(images: Tensor) -> None:
    scores = _tiny(error_fraction=0.0).score(images)
    assert torch.count_nonzero(scores.parts["mu"]) == 0
    torch.testing.assert_close(scores.image_score, scores.parts["error_sum"])


def test_colour_maps_are_the_mean_over_the_channels() -> None:
    images = torch.rand(2, 3, 16, 16)
    scores = _tiny(channels=3, error_fraction=0.0).score(images)
    expected = (images - scores.reconstruction).abs().mean(dim=1, keepdim=True)
    torch.testing.assert_close(scores.anomaly_map, expected)


def test_gradients_reach_every_parameter(images: Tensor) -> None:
    model = _tiny()
    model.loss(images)["total"].backward()
    without = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert not without


def test_level_one_reaches_the_decoder_through_its_memory_alone(images: Tensor) -> None:
    model = _tiny(widths=(4,), items=(5,), partitions=(4,)).eval()
    with torch.no_grad():
        model.memories[0].bank.zero_()
    reconstruction = model(images)
    assert torch.equal(reconstruction[0], reconstruction[1])


def test_the_deepest_level_without_a_memory_passes_plainly(images: Tensor) -> None:
    model = _tiny()
    kinds = [type(memory) for memory in model.memories]
    assert kinds == [PartitionMemoryBank, PartitionMemoryBank, torch.nn.Identity]


def test_scoring_changes_nothing_in_the_model(images: Tensor) -> None:
    model = _tiny()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.score(images)
    model.memory_stats(images)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_scores_do_not_depend_on_the_batch(images: Tensor) -> None:
    model = _tiny()
    model.loss(images)
    together = model.score(images)
    for index in range(4):
        alone = model.score(images[index : index + 1])
        beside_white = model.score(torch.cat((images[index : index + 1], torch.ones(3, 1, 16, 16))))
        for other in (alone, beside_white):
            torch.testing.assert_close(other.image_score[0], together.image_score[index], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(other.anomaly_map[0], together.anomaly_map[index], rtol=1e-5, atol=1e-6)
        replaced = model.score(images.where(torch.arange(4)[:, None, None, None] == index, 1.0))
        assert torch.equal(replaced.anomaly_map[index], together.anomaly_map[index])


def _train(model: PMB, images: Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model.loss(images)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_the_seed_fixes_initialisation_and_training(images: Tensor) -> None:
    first, second = _tiny(), _tiny()
    assert _train(first, images, 3) == _train(second, images, 3)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_training_lowers_the_loss_and_a_planted_defect_scores_highest() -> None:
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0.2, 0.8, 16).expand(1, 1, 16, 16)
    normal = (ramp + 0.02 * torch.randn(24, 1, 16, 16, generator=generator)).clamp(0, 1)
    model = _tiny()
    losses = _train(model, normal[:16], 80)
    assert losses[-1] < losses[0] / 3
    defective = normal[16:].clone()
    defective[:, :, 5:9, 6:10] = 1 - defective[:, :, 5:9, 6:10]
    good, bad = model.score(normal[16:]), model.score(defective)
    assert float(bad.image_score.min()) > float(good.image_score.max())
    inside = bad.anomaly_map[:, :, 5:9, 6:10].mean()
    assert float(inside) > 3 * float(bad.anomaly_map.mean())


def test_state_dict_round_trip_is_bit_identical(images: Tensor) -> None:
    model = _tiny()
    _train(model, images, 2)
    copy = models.build("pmb", json.loads(json.dumps(asdict(model.config))))
    copy.load_state_dict(model.state_dict())
    ours, theirs = model.score(images), copy.score(images)
    assert torch.equal(ours.image_score, theirs.image_score)
    assert torch.equal(ours.anomaly_map, theirs.anomaly_map)
    assert torch.equal(ours.reconstruction, theirs.reconstruction)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("memory", ["partition", "pixel", "block", "none"])
def test_every_memory_trains_and_scores(memory: str, skip: bool, images: Tensor) -> None:
    model = _tiny(memory=memory, skip=skip, items=(5, 5, 5), partitions=(4, 2, 1), block=2)
    losses = _train(model, images, 5)
    assert losses[-1] < losses[0]
    assert model.score(images).image_score.isfinite().all()
    read = 0 if memory == "none" else 3 if skip else 1
    assert len(model.memory_stats(images)) == read


def test_without_skip_the_decoder_sees_the_deepest_level_alone(images: Tensor) -> None:
    model = _tiny(memory="pixel", skip=False, items=(5, 5, 5)).eval()
    assert [isinstance(memory, MemoryUnit) for memory in model.memories] == [False, False, True]
    with torch.no_grad():
        model.memories[2].weight.zero_()
    reconstruction = model(images)
    assert torch.equal(reconstruction[0], reconstruction[1])


def test_memory_stats_count_dead_rows(images: Tensor) -> None:
    model = _tiny()
    with torch.no_grad():
        model.memories[0].bank.fill_(1.0)
    stats = model.memory_stats(images)
    assert set(stats) == {"level1", "level2"}
    assert stats["level1"].dead_share.tolist() == [1.0] * 4


def test_shrink_options_change_the_read(images: Tensor) -> None:
    soft = _tiny().eval()
    for changes in ({"shrink": "hard"}, {"shrink": "none"}, {"renormalize": True}, {"threshold": 0.19}):
        other = _tiny(**changes).eval()
        other.load_state_dict(soft.state_dict())
        assert not torch.allclose(other(images), soft(images), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", list(PMB.presets()))
def test_every_preset_builds(name: str) -> None:
    preset = PMB.presets()[name]
    with torch.device("meta"):
        model = PMB(preset.config)
    assert preset.training.batch_size > 0
    assert sum(isinstance(memory, PartitionMemoryBank) for memory in model.memories) == len(preset.config.items)


@pytest.mark.parametrize("name", ["small", "digits"])
@pytest.mark.parametrize("channels", [1, 3])
def test_small_presets_score(name: str, channels: int) -> None:
    config = replace(PMB.presets()[name].config, channels=channels)
    images = torch.rand(2, channels, config.image_size, config.image_size)
    assert PMB(config).score(images).anomaly_map.shape == (2, 1, config.image_size, config.image_size)


def test_the_published_settings_are_those_of_the_paper() -> None:
    texture, mnist, oct_ = (PMB.presets()[name] for name in ("mvtec-texture", "mnist", "retinal-oct"))
    assert (texture.config.levels, texture.config.items) == (5, (150, 200, 200, 200))
    assert texture.config.partitions == (32, 16, 16, 8)
    assert PMB.presets()["mvtec-object"].config.partitions == (16, 16, 16, 8)
    assert (mnist.config.levels, mnist.config.items, mnist.config.partitions) == (3, (10, 10, 10), (1, 1, 1))
    assert (oct_.config.levels, oct_.config.items, oct_.config.partitions) == (4, (10, 10, 10), (2, 2, 2))
    assert [preset.training.batch_size for preset in (texture, mnist, oct_)] == [20, 64, 20]
    for preset in (texture, mnist, oct_):
        assert preset.config.image_size == 128
        assert preset.training.learning_rate == 2e-3
        assert preset.config.shrink is None
        assert preset.config.renormalize is None


def test_the_published_texture_banks_hold_the_published_sizes() -> None:
    with torch.device("meta"):
        model = PMB.paper("mvtec-texture")
    shapes = [tuple(memory.bank.shape) for memory in model.memories if isinstance(memory, PartitionMemoryBank)]
    assert shapes == [(32, 150, 512), (16, 200, 256), (16, 200, 64), (8, 200, 32)]


def test_sizes_that_do_not_divide_name_those_that_do() -> None:
    with pytest.raises(ValueError, match="image_size: 3 levels need a positive multiple of 4, got 18"):
        replace(TINY, image_size=18)
    with pytest.raises(ValueError, match=r"partitions: 4 does not divide the 10-pixel map of level 2 .*: 1, 2, 5, 10"):
        replace(TINY, image_size=20, partitions=(4, 4))
    with pytest.raises(ValueError, match=r"block: 8 does not divide the 4-pixel map of level 3"):
        replace(TINY, memory="block", items=(5, 5, 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 2}, "channels: expected 1 or 3, got 2"),
        ({"widths": ()}, "widths"),
        ({"items": (5, 5, 5, 5)}, "items: expected 1 to 3"),
        ({"partitions": (4,)}, "partitions: expected 2 values"),
        ({"memory": "queue"}, "memory: expected one of partition, pixel, block, none"),
        ({"pixel_loss": "l1"}, "pixel_loss"),
        ({"shrink": "firm"}, "shrink"),
        ({"error_fraction": 1.5}, "error_fraction"),
        ({"skip": False}, "items: without skip only level 3"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": "16"}, "image_size: expected int, got '16'"),
        ({"skip": "False"}, "skip: expected bool, got 'False'"),
        ({"renormalize": "no"}, "renormalize: expected bool or None"),
        ({"items": 5}, "items: expected integers, one a level, got 5"),
        ({"threshold": 1.0}, "threshold"),
        ({"ssim_weight": -1}, "ssim_weight"),
    ],
)
def test_bad_configs_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_bad_images_are_refused(images: Tensor) -> None:
    model = _tiny()
    with pytest.raises(ValueError, match=r"expected \[B, 1, 16, 16\], got \[4, 1, 8, 8\]"):
        model.score(torch.rand(4, 1, 8, 8))
    with pytest.raises(TypeError, match=r"torch.uint8"):
        model.score(torch.zeros(4, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"expected pixels in \[0, 1\], got 0 to 255"):
        model.score(torch.tensor([0.0, 255.0]).repeat(128).reshape(1, 1, 16, 16))
    images[2, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"image \[2\] of the batch"):
        model.score(images)
    with pytest.raises(ValueError, match=r"image \[2\] of the batch"):
        model.memory_stats(images)


def test_no_images_give_no_scores() -> None:
    assert _tiny().score(torch.rand(0, 1, 16, 16)).image_score.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_images_of_any_float_dtype_are_scored(dtype: torch.dtype, images: Tensor) -> None:
    images = images.half()
    model = _tiny()
    assert torch.equal(model.score(images.to(dtype)).image_score, model.score(images.float()).image_score)


def test_autocast_training_has_a_finite_loss_and_gradients(images: Tensor) -> None:
    model = _tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(images)["total"]
    loss.backward()
    assert loss.isfinite()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"name: expected one of pmb, .*, got 'pbm'"):
        models.build("pbm", {})
    with pytest.raises(ValueError, match="config: does not fit pmb"):
        models.build("pmb", {"size": 3})
    with pytest.raises(ValueError, match="setting: expected one of mvtec-texture"):
        PMB.paper("imagenet")


@pytest.mark.parametrize("memory", ["partition", "pixel", "block", "none"])
def test_a_training_step_and_a_score_wait_for_no_device(images: Tensor, memory: str) -> None:
    """But for one look at the range of images that are scored (``check_images``)."""
    model = _tiny(memory=memory, block=4, items=(5, 5))
    with NothingWaits():
        model.loss(images)["total"].backward()
        model.eval()._score(images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_images_that_are_not_finite_are_named(images: Tensor, dtype: torch.dtype) -> None:
    model, images = _tiny(), images.to(dtype)
    model.check_images(images)
    model.check_images(images[:0])
    images[1, 0, 3, 4], images[3, 0, 0, 0] = torch.nan, -torch.inf
    with pytest.raises(ValueError, match=r"got NaN or infinity in image \[1, 3\]"):
        model.check_images(images)
