"""PatchGAN and its games: what an answer sees, losses by hand, and who gets gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from memad_fast.models.discriminator import (
    PatchDiscriminator,
    judge,
    least_squares_critic,
    least_squares_maker,
    non_saturating_critic,
    non_saturating_maker,
    patch_strides,
)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """These networks are too small to share."""


@pytest.mark.parametrize(("strides", "seen"), [(0, 7), (1, 16), (2, 34), (3, 70)])
def test_an_answer_sees_the_patch_that_is_claimed(strides: int, seen: int) -> None:
    critic = PatchDiscriminator(1, width=2, strides=strides, norm="none")
    image = torch.rand(1, 1, 128, 128, requires_grad=True)
    answers = critic(image)
    answers[0, 0, answers.shape[2] // 2, answers.shape[3] // 2].backward()
    assert image.grad is not None
    rows, columns = image.grad[0, 0].nonzero().T
    assert critic.receptive_field == seen
    assert int(rows.max() - rows.min()) + 1 == seen
    assert int(columns.max() - columns.min()) + 1 == seen


@pytest.mark.parametrize("size", [8, 16, 24, 32, 64, 100, 256])
def test_every_size_gets_a_discriminator_that_fits(size: int) -> None:
    strides = patch_strides(size)
    critic = PatchDiscriminator(3, width=2, strides=strides, norm="instance")
    side = size // 2**strides - 2
    assert critic.receptive_field <= size
    assert critic(torch.rand(2, 3, size, size)).shape == (2, 1, side, side)


def test_the_published_one_has_the_published_layers() -> None:
    convolutions = [layer for layer in PatchDiscriminator(3) if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64, 128, 256, 512, 1]
    assert [layer.stride for layer in convolutions] == [(2, 2), (2, 2), (2, 2), (1, 1), (1, 1)]
    assert {layer.kernel_size for layer in convolutions} == {(4, 4)}


@pytest.mark.parametrize(("norm", "kind"), [("batch", nn.BatchNorm2d), ("instance", nn.InstanceNorm2d)])
def test_all_but_the_first_and_the_last_layer_are_normalised(norm: str, kind: type) -> None:
    kinds = [type(layer) for layer in PatchDiscriminator(1, width=2, strides=2, norm=norm)]
    assert kinds == [nn.Conv2d, nn.LeakyReLU, nn.Conv2d, kind, nn.LeakyReLU, nn.Conv2d, kind, nn.LeakyReLU, nn.Conv2d]


def test_losses_are_those_of_the_papers() -> None:
    real, made = torch.tensor([[0.5, 2.0]]), torch.tensor([[-1.0, 0.25]])
    assert float(least_squares_critic(real, made)) == pytest.approx((0.25 + 1) / 4 + (1 + 0.0625) / 4)
    assert float(least_squares_maker(made)) == pytest.approx((4 + 0.5625) / 4)

    def log_sigmoid(value: float) -> float:
        return -math.log1p(math.exp(-value))

    critic = -(log_sigmoid(0.5) + log_sigmoid(2)) / 2 - (log_sigmoid(1) + log_sigmoid(-0.25)) / 2
    assert float(non_saturating_critic(real, made)) == pytest.approx(critic)
    assert float(non_saturating_maker(made)) == pytest.approx(-(log_sigmoid(-1) + log_sigmoid(0.25)) / 2)


def test_losses_of_sure_answers_are_finite_and_16_bits_are_widened() -> None:
    sure = torch.tensor([1e4], dtype=torch.float16)
    for loss in (non_saturating_critic(-sure, sure), non_saturating_maker(-sure), least_squares_critic(sure, sure)):
        assert loss.dtype == torch.float32
        assert loss.isfinite()


def _gradients(critic: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in critic.parameters() if parameter.grad is not None]


def test_a_judged_maker_gets_gradients_and_the_critic_none() -> None:
    critic, made = PatchDiscriminator(1, width=2, strides=1), torch.rand(2, 1, 16, 16, requires_grad=True)
    answers = judge(critic, made)
    torch.testing.assert_close(answers, critic(made))
    non_saturating_maker(answers).backward()
    assert made.grad is not None
    assert made.grad.any()
    assert not _gradients(critic)
    non_saturating_critic(critic(torch.rand(2, 1, 16, 16)), critic(made.detach())).backward()
    assert len(_gradients(critic)) == len(list(critic.parameters()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "layer"}, "norm: expected one of batch, instance, none, got 'layer'"),
        ({"width": 0}, "width: expected at least 1, got 0"),
        ({"strides": -1}, "strides: expected at least 0, got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchDiscriminator(1, **arguments)  # type: ignore[arg-type]


def test_images_below_the_smallest_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size: a PatchGAN needs at least 7 pixels, got 6"):
        patch_strides(6)
