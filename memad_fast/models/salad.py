"""SALAD: image → feature → image and feature → image → feature, both to be consistent; scored in feature space.

    x ── E ── z' ── D ── x̂            structure     −SSIM(x, x̂)                                    (eq. 4, 5)
    z ── D ── x' ── E ── ẑ            feature       mean|ẑ − z|, z ~ N(0, I)                       (eq. 6)
    x_s ── E ── D' ── x'_s            restoration   mean|x'_s − x|, x_s a perturbed x              (eq. 8)
    z' and a centre C                 centre        ½‖z' − C‖²                                     (eq. 7)
    D_F(z'), D_I(x')                  adversarial   ½E(D_F(z') − 1)² + ½E(D_I(x') − 1)²            (eq. 3)
                                      critics       ½E(D_F(z) − 1)² + ½E D_F(z')²                  (eq. 2)
                                                    + ½E(D_I(x) − 1)² + ½E D_I(x')²                (eq. 1)

    A_F = mean|E(x) − E(D(E(x)))|     the score (larger is more anomalous)

Who learns from what:

                    E    D    D'   critics
    structure       x    x
    feature         x    x                    z passes D, then E: a cycle that trains both, as in the paper
    restoration     x         x               the encoder is shared, its decoder is not
    centre          x                         C itself follows the features, without gradients
    adversarial     x    x                    E through D_F, D through D_I
    critics                        x

Source: H. Zhao et al., "Anomaly Detection for Medical Images Using Self-Supervised and Translation-Consistent
Features". The paper gives kernels, strides, losses and their weights; widths, the length of z and the sizes of the
discriminators are this file's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from memad_fast._arguments import check_choice
from memad_fast.models.base import AnomalyModel, Objective, Preset, Scores, Stage, TrainingSettings, parameters_of
from memad_fast.models.discriminator import (
    PatchDiscriminator,
    judge,
    least_squares_critic,
    least_squares_maker,
    patch_strides,
)
from memad_fast.models.perturbations import perturb
from memad_fast.ops import ssim_loss

SCORES = ("feature", "image", "centre")
IMAGE_LOSSES = ("ssim", "global-ssim", "l1")
_WEIGHTS = ("adversarial", "structure", "feature", "centre", "restoration")
# Images are scaled to [−1, 1].
_RANGE = 2.0
_SMALLEST = 8


@dataclass(frozen=True)
class SALADConfig:
    """The architecture and the losses of a SALAD; every value is plain JSON.

    Attributes:
        image_size: side of the square images, in pixels, at least 8. Every level halves it, a last odd pixel left out,
            down to 1: 8 levels for 256.
        channels: 1 (grey) or 3 (colour).
        latent: n, the length of z.
        width: feature channels of the first level; they double from level to level up to ``most_width``.
        most_width: see ``width``.
        adversarial: α of eq. 9; 0 leaves both discriminators out.
        structure: β, of −SSIM between image and reconstruction; 0 leaves the term out, as with those below.
        feature: γ, of the consistency of random features.
        centre: δ, of the distance to the centre.
        restoration: η, of restoring perturbed images; 0 leaves D' out.
        image_loss: what "structure" is: "ssim" (windows of 11 × 11, σ 1.5), "global-ssim" (eq. 5 as printed: the whole
            image is one window), each negative, or "l1", the mean absolute error of table III's first row.
        control_points: free ones of the intensity curves, beside their two ends; the paper says three.
        centre_rate: how fast the centre follows the features of the batches.
        score: what the image score is: "feature" (A_F, the paper's), "image" (A_I, mean|x − x̂|) or "centre" (A_C,
            mean|E(x) − C|).
    """

    image_size: int
    channels: int
    latent: int = 128
    width: int = 64
    most_width: int = 512
    adversarial: float = 1.0
    structure: float = 10.0
    feature: float = 10.0
    centre: float = 10.0
    restoration: float = 10.0
    image_loss: str = "ssim"
    control_points: int = 2
    centre_rate: float = 0.5
    score: str = "feature"

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "latent", "width", "most_width", "control_points"):
            least = _SMALLEST if name == "image_size" else 1
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ValueError(f"{name}: expected an int of at least {least}, got {getattr(self, name)!r}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels: expected 1 or 3, got {self.channels}")
        for name in (*_WEIGHTS, "centre_rate"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0.0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")
        if not any(getattr(self, name) for name in _WEIGHTS):
            raise ValueError(f"{', '.join(_WEIGHTS)}: expected at least one weight above 0, got 0 for all")
        if self.centre_rate > 1:
            raise ValueError(f"centre_rate: expected 0 to 1, got {self.centre_rate}")
        check_choice("image_loss", self.image_loss, IMAGE_LOSSES)
        check_choice("score", self.score, SCORES)

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides in pixels of the image and behind every convolution of the encoder, down to 1."""
        return tuple(self.image_size >> level for level in range(self.image_size.bit_length()))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels behind every convolution of the encoder but the last."""
        return tuple(min(self.width << level, self.most_width) for level in range(len(self.sides) - 2))


class SALAD(AnomalyModel):
    """Self-supervised and translation-consistent features for anomaly detection.

    Args:
        config: the architecture; ``SALAD.presets()`` holds the published one and two small ones.

    ``image_score`` is A_F (or as ``score`` says), ``anomaly_map`` |x − x̂| averaged over the channels,
    ``reconstruction`` x̂ in [0, 1]. ``parts``: "feature" (A_F), "image" (A_I) and "centre" (A_C). A_I and the map are
    those of images in [−1, 1].

    InstanceNorm looks at one image at a time: nothing of a score depends on the rest of the batch.

    Example:
        >>> import torch
        >>> from memad_fast.models import SALAD
        >>> model = SALAD(SALAD.presets()["digits"].config)
        >>> scores = model.score(torch.rand(2, 1, 32, 32))
        >>> sorted(scores.parts), scores.anomaly_map.shape
        (['centre', 'feature', 'image'], torch.Size([2, 1, 32, 32]))
    """

    name: ClassVar[str] = "salad"
    Config: ClassVar[type] = SALADConfig
    config: SALADConfig
    centre: Tensor

    def __init__(self, config: SALADConfig) -> None:
        super().__init__(config)
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)
        self.restorer = _decoder(config) if config.restoration else None
        self.image_critic = self.feature_critic = None
        if config.adversarial:
            strides = patch_strides(config.image_size)
            self.image_critic = PatchDiscriminator(
                config.channels, width=config.width, strides=strides, norm="instance"
            )
            self.feature_critic = _feature_critic(config)
        self.register_buffer("centre", torch.zeros(config.latent))

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        """Settings by name: "small" for folders (64 pixels), "digits" for images of a few dozen, "paper" as published.

        The paper leaves open the widths and the length of z. The small ones keep its weights and take five times its
        learning rate. In a few hundred steps the centre draws all features together before random ones survive their
        translation ("feature" stays near E|z| = 0.8): A_F then tells much what A_C does, and less steadily. Without
        that pull it tells nothing yet: with ``centre`` 1 and ``latent`` 32 its AUROC was 0.5 on two folders after 170
        steps.
        """
        return {
            "small": Preset(
                SALADConfig(image_size=64, channels=1, latent=64, width=16, most_width=128),
                TrainingSettings(learning_rate=1e-3, batch_size=16, epochs=60, constant_share=0.5),
            ),
            "digits": Preset(
                SALADConfig(image_size=32, channels=1, latent=32, width=16, most_width=128),
                TrainingSettings(learning_rate=1e-3, batch_size=16, epochs=40, constant_share=0.5),
            ),
            "paper": Preset(
                SALADConfig(image_size=256, channels=1),
                TrainingSettings(learning_rate=2e-4, batch_size=64, epochs=200, constant_share=0.5),
                resize="bicubic",
            ),
        }

    @classmethod
    def paper(cls) -> SALAD:
        """An untrained network in the published setting."""
        return cls(cls.presets()["paper"].config)

    def stages(self) -> tuple[Stage, ...]:
        """One: encoder and decoders, then the discriminators; the centre follows the features of every batch."""
        made_of = [self.encoder, self.decoder, self.restorer]
        objectives = [Objective("translation", parameters_of(*made_of), self.translation_losses)]
        if self.config.adversarial:
            critics = parameters_of(self.image_critic, self.feature_critic)
            objectives.append(Objective("critics", critics, self.critic_losses))
        return (Stage("training", tuple(objectives), observe=self._move_centre),)

    def translation_losses(self, images: Tensor) -> dict[str, Tensor]:
        """What encoder and decoders minimise, "total" (eq. 9), and each term before its weight. The critics learn
        nothing from it.
        """
        config, x = self.config, _signed(images)
        code = self._encode(x)
        losses: dict[str, Tensor] = {}
        if config.structure:
            losses["structure"] = self._structure_loss(self._decode(code), x)
        if config.feature or config.adversarial:
            z = torch.randn_like(code)
            made = self._decode(z)
            if config.feature:
                losses["feature"] = (self._encode(made) - z).abs().mean()
            if self.image_critic is not None and self.feature_critic is not None:
                losses["adversarial"] = least_squares_maker(judge(self.feature_critic, code)) + least_squares_maker(
                    judge(self.image_critic, made)
                )
        if config.centre:
            losses["centre"] = 0.5 * (code - self.centre).square().sum(dim=1).mean()
        if self.restorer is not None:
            perturbed = _signed(perturb(images, control_points=config.control_points))
            restored = self.restorer(_as_map(self._encode(perturbed))).to(x.dtype)
            losses["restoration"] = (restored - x).abs().mean()
        total = torch.stack([getattr(config, name) * value for name, value in losses.items()]).sum()
        return {"total": total, **losses}

    def critic_losses(self, images: Tensor) -> dict[str, Tensor]:
        """What the discriminators minimise, "total", "image" (eq. 1) and "feature" (eq. 2). Encoder and decoder learn
        nothing from it.
        """
        assert self.image_critic is not None
        assert self.feature_critic is not None
        x = _signed(images)
        with torch.no_grad():
            code = self._encode(x)
            z = torch.randn_like(code)
            made = self._decode(z)
        image = least_squares_critic(self.image_critic(x), self.image_critic(made))
        feature = least_squares_critic(self.feature_critic(z), self.feature_critic(code))
        return {"total": image + feature, "image": image, "feature": feature}

    def _move_centre(self, images: Tensor) -> None:
        """C −= rate · Σ(C − z') / (1 + B): center loss, eq. 4 there, for its one class."""
        away = (self.centre - self._encode(_signed(images))).sum(dim=0)
        self.centre -= self.config.centre_rate * away / (1 + len(images))

    def _score(self, images: Tensor) -> Scores:
        x = _signed(images)
        code = self._encode(x)
        reconstruction = self._decode(code)
        error = (x - reconstruction).abs().float().mean(dim=1, keepdim=True)
        parts = {
            "feature": (code - self._encode(reconstruction)).abs().float().mean(dim=1),
            "image": error.mean(dim=(1, 2, 3)),
            "centre": (code - self.centre).abs().float().mean(dim=1),
        }
        return Scores(parts[self.config.score], error, (reconstruction.float() + 1) / 2, parts)

    def _encode(self, x: Tensor) -> Tensor:
        """E: images ``[B, C, H, W]`` in [−1, 1] to features ``[B, n]``, in the images' dtype under autocast too."""
        return self.encoder(x).flatten(1).to(x.dtype)

    def _decode(self, code: Tensor) -> Tensor:
        """D: features ``[B, n]`` to images ``[B, C, H, W]`` in [−1, 1]."""
        return self.decoder(_as_map(code)).to(code.dtype)

    def _structure_loss(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        if self.config.image_loss == "l1":
            return (reconstruction - x).abs().mean()
        if self.config.image_loss == "ssim":
            return ssim_loss(reconstruction, x, data_range=_RANGE, padding="same") - 1
        return -_global_ssim(reconstruction, x, _RANGE).mean()


def _signed(images: Tensor) -> Tensor:
    """[0, 1] to [−1, 1]."""
    return images * 2 - 1


def _as_map(code: Tensor) -> Tensor:
    return code[:, :, None, None]


def _global_ssim(x: Tensor, y: Tensor, data_range: float) -> Tensor:
    """SSIM of whole images ``[B, C, H, W]``, eq. 5 as printed: one value ``[B, C]`` for each image and channel."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_x, mean_y = x.mean(dim=(2, 3), keepdim=True), y.mean(dim=(2, 3), keepdim=True)
    variances = (x - mean_x).square().mean(dim=(2, 3)) + (y - mean_y).square().mean(dim=(2, 3))
    covariance = ((x - mean_x) * (y - mean_y)).mean(dim=(2, 3))
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return luminance[..., 0, 0] * (2 * covariance + c2) / (variances + c2)


def _encoder(config: SALADConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    source = config.channels
    for width in config.widths:
        layers += [nn.Conv2d(source, width, 4, 2, 1), nn.InstanceNorm2d(width), nn.LeakyReLU(0.2)]
        source = width
    return nn.Sequential(*layers, nn.Conv2d(source, config.latent, 4, 2, 1))  # 1 × 1: no norm is defined there


def _decoder(config: SALADConfig) -> nn.Sequential:
    """The encoder backwards; a side that was halved with a pixel left over gets it again."""
    layers: list[nn.Module] = []
    source = config.latent
    widths = (*config.widths[::-1], config.channels)
    for width, side in zip(widths, config.sides[-2::-1], strict=True):
        layers += [
            nn.ConvTranspose2d(source, width, 4, 2, 1, output_padding=side % 2),
            nn.InstanceNorm2d(width),
            nn.LeakyReLU(0.2),
        ]
        source = width
    return nn.Sequential(*layers[:-2], nn.Tanh())


def _feature_critic(config: SALADConfig) -> nn.Sequential:
    """An MLP of two hidden layers: ``[B, n]`` to ``[B, 1]``."""
    width = 2 * config.latent
    return nn.Sequential(
        nn.Linear(config.latent, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, 1),
    )
