"""The structure extractors: what they compute, what each loss is, and whose gradients it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from memad_fast.data.segmentation import AdaptationBatch
from memad_fast.models import (
    EdgeConfig,
    EdgeExtractor,
    SemanticConfig,
    SemanticExtractor,
    UNet,
    canny_edges,
)
from memad_fast.models.base import Trainable

EDGES = EdgeConfig(image_size=32, channels=1, width=2)
SEMANTIC = SemanticConfig(image_size=32, channels=1, values=(0, 1, 7), width=2, critic_width=2, adversarial=0.5)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """These networks are too small to share."""


def batch(count: int = 2, channels: int = 1, classes: int = 3, targets: bool = True) -> AdaptationBatch:
    torch.manual_seed(1)
    return AdaptationBatch(
        torch.rand(count, channels, 32, 32),
        torch.randint(classes, (count, 32, 32)),
        torch.rand(count, channels, 32, 32) if targets else None,
    )


def made(kind: type[Any], config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config)


def changed_by(module: nn.Module, loss: Tensor) -> set[str]:
    """Names of the parameters that the loss has a gradient for, by their first part."""
    module.zero_grad(set_to_none=True)
    loss.backward()
    return {
        name.split(".")[0]
        for name, parameter in module.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }


class TestCanny:
    def test_the_edge_of_a_step_is_one_pixel_wide_and_where_it_is(self) -> None:
        image = torch.zeros(2, 1, 16, 24)
        image[0, :, :, 12:] = 1.0
        edges = canny_edges(image)
        assert edges.shape == (2, 1, 16, 24)
        assert edges.dtype == torch.float32
        assert set(edges.unique().tolist()) == {0.0, 1.0}
        assert edges[0, 0].sum(dim=0).nonzero().flatten().tolist() == [11]
        assert not edges[1].any()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_of_any_floating_type(self, dtype: torch.dtype) -> None:
        levels = torch.randint(0, 2, (2, 1, 32, 32)).to(dtype)
        torch.testing.assert_close(canny_edges(levels), canny_edges(levels.float()), atol=0, rtol=0)

    def test_colour_counts_as_its_luma(self) -> None:
        images = torch.rand(3, 3, 32, 32)
        images[:, :, 8:24, 8:24] = torch.tensor([0.9, 0.1, 0.5])[:, None, None]
        luma = 0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]
        expected = [cv2.Canny((plane * 255).round().to(torch.uint8).numpy(), 50, 150) for plane in luma]
        np.testing.assert_array_equal(canny_edges(images)[:, 0].numpy(), np.stack(expected) / 255)

    def test_an_empty_batch_has_no_edges(self) -> None:
        assert canny_edges(torch.zeros(0, 3, 32, 48)).shape == (0, 1, 32, 48)

    def test_thresholds_are_on_grey_levels(self) -> None:
        image = torch.zeros(1, 1, 16, 16)
        image[..., 8:] = 50 / 255  # Sobel: 4 times the step, 200
        assert canny_edges(image, 50, 199).any()
        assert not canny_edges(image, 50, 200).any()

    @pytest.mark.parametrize(
        "images", [torch.zeros(1, 2, 16, 16), torch.zeros(1, 16, 16), torch.zeros(1, 1, 16, 16, dtype=torch.uint8)]
    )
    def test_anything_else_is_refused(self, images: Tensor) -> None:
        with pytest.raises(ValueError, match=r"images: expected floating \[B, 1 or 3, H, W\]"):
            canny_edges(images)

    def test_a_missing_opencv_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "cv2", None)
        with pytest.raises(ModuleNotFoundError, match="opencv-python-headless"):
            canny_edges(torch.zeros(1, 1, 16, 16))


class TestUNet:
    @pytest.mark.parametrize("shape", [(31, 32), (32, 40), (1, 1), (0, 16)])
    def test_a_size_that_16_does_not_divide_is_refused(self, shape: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match="that 16 divides"):
            UNet(1, 1, 2)(torch.zeros(1, 1, *shape))

    def test_every_level_reaches_the_answer(self) -> None:
        network = UNet(1, 2, 2)
        network(torch.rand(2, 1, 32, 32)).square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


@pytest.mark.parametrize(("kind", "config"), [(EdgeExtractor, EDGES), (SemanticExtractor, SEMANTIC)])
class TestBoth:
    def test_maps_are_probabilities(self, kind: type[Trainable], config: Any) -> None:
        maps = made(kind, config)(torch.rand(2, 1, 32, 32))
        assert maps.shape == (2, 1 if kind is EdgeExtractor else 3, 32, 32)
        assert ((maps > 0) & (maps < 1)).all()
        if kind is SemanticExtractor:
            torch.testing.assert_close(maps.sum(dim=1), torch.ones(2, 32, 32))

    def test_extraction_is_in_eval_mode_and_leaves_the_mode(self, kind: type[Trainable], config: Any) -> None:
        extractor = made(kind, config)
        before = {name: value.clone() for name, value in extractor.state_dict().items()}
        images = torch.rand(4, 1, 32, 32)
        together = extractor.train().extract(images)
        assert extractor.training
        assert all(torch.equal(value, before[name]) for name, value in extractor.state_dict().items())
        torch.testing.assert_close(together[:1], extractor.eval()(images[:1]))
        assert all(parameter.requires_grad for parameter in extractor.parameters())

    def test_extraction_passes_gradients_to_the_image_alone(self, kind: type[Trainable], config: Any) -> None:
        extractor = made(kind, config)
        images = torch.rand(2, 1, 32, 32, requires_grad=True)
        assert changed_by(extractor, extractor.extract(images)[:, :1].sum()) == set()
        assert images.grad is not None
        assert images.grad.abs().sum() > 0


class TestEdges:
    def test_the_loss_is_the_whole_binary_cross_entropy(self) -> None:
        extractor, images = made(EdgeExtractor, EDGES), torch.rand(2, 1, 32, 32)
        edges, answer = canny_edges(images), extractor(images).double()
        expected = -(edges * answer.log() + (1 - edges) * (1 - answer).log()).mean()
        assert 0 < edges.mean() < 1
        torch.testing.assert_close(extractor.losses(images)["total"].double(), expected, atol=1e-5, rtol=1e-5)

    def test_the_first_answer_is_that_few_pixels_are_edges(self) -> None:
        extractor = made(EdgeExtractor, EDGES)
        with torch.no_grad():
            extractor.network.head.weight.zero_()
        torch.testing.assert_close(extractor(torch.rand(1, 1, 32, 32)), torch.full((1, 1, 32, 32), 0.1))


class TestSemantic:
    def test_brightness_and_colour_do_not_count_where_images_are_standardized(self) -> None:
        images = torch.rand(2, 3, 32, 32)
        other = images * torch.tensor([0.5, 0.9, 0.2])[:, None, None] + torch.tensor([0.1, 0.0, 0.6])[:, None, None]
        gaps = {}
        for standardize in (True, False):
            config = SemanticConfig(image_size=32, channels=3, width=2, standardize=standardize, adversarial=0)
            extractor = made(SemanticExtractor, config)
            gaps[standardize] = (extractor(images) - extractor(other)).abs().max()
            assert extractor.extract(torch.full((1, 3, 32, 32), 0.3)).isfinite().all()
        assert gaps[True] < 0.05 * gaps[False]

    def test_the_losses_are_those_of_the_paper(self) -> None:
        extractor, given = made(SemanticExtractor, SEMANTIC), batch()
        maps = extractor(torch.cat((given.images, given.targets)))
        source, target = maps[:2].double(), maps[2:].double()
        cross_entropy = -source.log().gather(1, given.labels[:, None]).mean()
        real, fake = extractor.critic(source.float()).sigmoid(), extractor.critic(target.float()).sigmoid()
        losses = extractor.extractor_losses(given)
        close = {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(losses["source"].double(), cross_entropy, **close)
        torch.testing.assert_close(losses["target"], -fake.log().mean(), **close)
        torch.testing.assert_close(losses["total"], losses["source"] + 0.5 * losses["target"])
        losses = extractor.critic_losses(given)
        torch.testing.assert_close(losses["total"], -real.log().mean() - (1 - fake).log().mean(), **close)

    def test_each_objective_changes_its_own_part_only(self) -> None:
        extractor = made(SemanticExtractor, SEMANTIC)
        assert changed_by(extractor, extractor.extractor_losses(batch())["total"]) == {"network"}
        assert changed_by(extractor, extractor.extractor_losses(batch())["target"]) == {"network"}
        extractor.extractor_losses(batch())
        assert changed_by(extractor, extractor.critic_losses(batch())["total"]) == {"critic"}

    def test_no_adaptation_has_no_critic_and_looks_at_no_target(self) -> None:
        extractor = made(SemanticExtractor, SemanticConfig(image_size=32, channels=1, width=2, adversarial=0))
        assert extractor.critic is None
        assert [objective.name for objective in extractor.stages()[0].objectives] == ["extractor"]
        losses = extractor.extractor_losses(batch(classes=2, targets=False))
        assert set(losses) == {"total", "source"}

    def test_the_first_answer_can_be_the_shares_of_the_classes(self) -> None:
        extractor = made(SemanticExtractor, SEMANTIC)
        with torch.no_grad():
            extractor.network.head.weight.zero_()
        extractor.start_from([0.7, 0.2, 0.1])
        maps = extractor(torch.rand(1, 1, 32, 32))
        torch.testing.assert_close(maps.mean(dim=(0, 2, 3)), torch.tensor([0.7, 0.2, 0.1]))
        assert all(parameter.requires_grad for parameter in extractor.parameters())

    def test_adaptation_without_target_images_is_refused(self) -> None:
        with pytest.raises(ValueError, match="targets: expected images to adapt to"):
            made(SemanticExtractor, SEMANTIC).extractor_losses(batch(targets=False))


@pytest.mark.parametrize("kind", [EdgeExtractor, SemanticExtractor])
def test_every_preset_builds(kind: type[Trainable]) -> None:
    for preset in kind.presets().values():
        with torch.device("meta"):
            kind(preset.config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EdgeConfig(image_size=40, channels=1), "image_size: expected a multiple of 16, at least 32, got 40"),
        (lambda: EdgeConfig(image_size=16, channels=1), "at least 32, got 16"),
        (lambda: EdgeConfig(image_size=1, channels=1), "at least 32, got 1"),
        (lambda: EdgeConfig(image_size=32, channels=2), "channels: expected 1 or 3, got 2"),
        (lambda: EdgeConfig(image_size=32, channels=1, width=0), "width: expected a positive int, got 0"),
        (lambda: EdgeConfig(image_size=32, channels=1, low=-1), "low: expected a finite number of at least 0"),
        (lambda: EdgeConfig(image_size=32, channels=1, low=10, high=9), "low: expected at most high, 9, got 10"),
        (lambda: SemanticConfig(image_size=32, channels=1, values=(0,)), "values: expected at least two"),
        (lambda: SemanticConfig(image_size=32, channels=1, values=(0, 0)), "values: expected at least two, all diff"),
        (lambda: SemanticConfig(image_size=32, channels=1, values=("a", "b")), "values: expected integers"),
        (lambda: SemanticConfig(image_size=32, channels=1, adversarial=-1), "adversarial: expected a finite number"),
        (lambda: SemanticConfig(image_size=32, channels=1, standardize=1), "standardize: expected True or False"),
        (lambda: SemanticConfig(image_size=32, channels=1, critic_width=0), "critic_width: expected a positive int"),
        (lambda: SemanticConfig(image_size=32, channels=1, crop=0), "crop: expected more than 0"),
        (lambda: SemanticConfig(image_size=32, channels=1, flips="yes"), "flips: expected one of none, horizontal"),
    ],
)
def test_a_wrong_value_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
