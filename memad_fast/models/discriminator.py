"""PatchGAN, the discriminator that judges every patch of an image, and the two games that our models play with it.

    C_w ↓2 ─ C_2w ↓2 ─ C_4w ↓2 ─ C_8w ─ C_1       4 × 4 convolutions, leaky ReLU 0.2 between them, logits out

With three strides of 2 an answer sees 70 × 70 pixels (9·2ⁿ − 2 for n strides: 7, 16, 34, 70); smaller images take
fewer strides. Nothing is squashed at the end: the losses take logits.

    least squares    critic ½E(real − 1)² + ½E made²             maker ½E(made − 1)²            (SALAD, eq. 1 to 3)
    non-saturating   critic −E log σ(real) − E log(1 − σ(made))   maker −E log σ(made)           (MemSTC-Net, eq. 11)

Sources: P. Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017, section 6.1.2;
X. Mao et al., "Least Squares Generative Adversarial Networks", ICCV 2017, eq. 2; I. Goodfellow et al., "Generative
Adversarial Nets", NeurIPS 2014, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from memad_fast._arguments import check_choice

PATCH_STRIDES = 3
NORMS = ("batch", "instance", "none")
# Widths double from layer to layer, up to this many times the first.
_MOST_WIDENING = 8


class PatchDiscriminator(nn.Sequential):
    """Judges images ``[B, channels, H, W]``: logits ``[B, 1, h, w]``, one for every patch, h = H // 2**strides − 2.

    Args:
        channels: of the images.
        width: channels of the first layer; they double from layer to layer, up to eight times.
        strides: layers that halve the side; 3 is the published 70 × 70 PatchGAN. See ``patch_strides``.
        norm: after all layers but the first and the last: "batch" (pix2pix), "instance" (CycleGAN) or "none".

    The whole of an image counts for each of its answers with "instance"; other images of the batch only with "batch".

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import torch
        >>> critic = PatchDiscriminator(3, strides=3)
        >>> critic.receptive_field, critic(torch.rand(2, 3, 256, 256)).shape
        (70, torch.Size([2, 1, 30, 30]))
    """

    def __init__(self, channels: int, *, width: int = 64, strides: int = PATCH_STRIDES, norm: str = "batch") -> None:
        check_choice("norm", norm, NORMS)
        for name, value, least in (("channels", channels, 1), ("width", width, 1), ("strides", strides, 0)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        layers: list[nn.Module] = []
        source = channels
        for level in range(strides + 1):
            target = width * min(1 << level, _MOST_WIDENING)
            plain = level == 0 or norm == "none"
            layers.append(nn.Conv2d(source, target, 4, 2 if level < strides else 1, 1, bias=plain))
            if not plain:
                layers.append(nn.BatchNorm2d(target) if norm == "batch" else nn.InstanceNorm2d(target))
            layers.append(nn.LeakyReLU(0.2))
            source = target
        super().__init__(*layers, nn.Conv2d(source, 1, 4, 1, 1))
        self.receptive_field = _receptive_field(strides)


def patch_strides(image_size: int) -> int:
    """The most strides, up to the published three, with which an answer sees no more than the image.

    Example:
        >>> [patch_strides(side) for side in (8, 16, 32, 64, 256)]
        [0, 1, 1, 2, 3]
    """
    fitting = [strides for strides in range(PATCH_STRIDES + 1) if _receptive_field(strides) <= image_size]
    if not fitting:
        raise ValueError(f"image_size: a PatchGAN needs at least {_receptive_field(0)} pixels, got {image_size}")
    return fitting[-1]


def judge(critic: nn.Module, made: Tensor) -> Tensor:
    """What ``critic`` answers to ``made``, for the loss of whoever made it: the critic itself gets no gradients."""
    held = {name: parameter.detach() for name, parameter in critic.named_parameters()}
    return torch.func.functional_call(critic, held, (made,))


def least_squares_critic(real: Tensor, made: Tensor) -> Tensor:
    """½E(real − 1)² + ½E made² over answers of any shape; a float32 scalar."""
    return 0.5 * (real.float() - 1).square().mean() + 0.5 * made.float().square().mean()


def least_squares_maker(made: Tensor) -> Tensor:
    """½E(made − 1)² over answers of any shape; a float32 scalar."""
    return 0.5 * (made.float() - 1).square().mean()


def non_saturating_critic(real: Tensor, made: Tensor) -> Tensor:
    """−E log σ(real) − E log(1 − σ(made)) over logits of any shape; a float32 scalar."""
    return functional.softplus(-real.float()).mean() + functional.softplus(made.float()).mean()


def non_saturating_maker(made: Tensor) -> Tensor:
    """−E log σ(made) over logits of any shape; a float32 scalar."""
    return functional.softplus(-made.float()).mean()


def _receptive_field(strides: int) -> int:
    """Side in pixels of what one answer sees: two 4 × 4 layers at the end see 7, a stride before doubles it, and 2."""
    return 9 * (1 << strides) - 2
