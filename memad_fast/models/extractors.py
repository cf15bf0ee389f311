"""The structure extractors of MemSTC-Net: a U-Net that gives an image's edges, and one that gives its semantic classes.

    F_e   image ── U-Net ── sigmoid ── edge map [B, 1, H, W]
          L_edge = −mean(E·log F_e(I) + (1 − E)·log(1 − F_e(I)))             (eq. 3), E the Canny edges of I

    F_s   image ── U-Net ── softmax ── class maps [B, classes, H, W]
          L_src = −mean(S_src·log F_s(I_src))                                (eq. 1), on a labelled source set
          L_tar = mean(log D(F_s(I_src))) + mean(log(1 − D(F_s(I_tar))))     (eq. 2), D_da tells source from target

Eq. 3 is printed without its second half, without which "edges everywhere" would be the best answer. D_da maximises
L_tar; F_s minimises L_src + λ·mean(−log D(F_s(I_tar))), the non-saturating form, as AdaptSegNet does. MemSTC-Net names
no λ; here it is AdaptSegNet's 0.001.

Both are trained before MemSTC-Net and frozen in it: ``extract`` gives the map in eval mode, with gradients to the image
and never to the weights.

Sources: K. Zhou et al., "Memorizing Structure-Texture Correspondence for Image Anomaly Detection", section III-A;
Y.-H. Tsai et al., "Learning to Adapt Structured Output Space for Semantic Segmentation" (D_da, λ); O. Ronneberger et
al., "U-Net"; J. Canny, "A Computational Approach to Edge Detection".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from memad_fast._arguments import check_choice
from memad_fast.models.base import Objective, Preset, Stage, Trainable, TrainingSettings
from memad_fast.models.convolution import convolutions
from memad_fast.models.discriminator import judge, non_saturating_critic, non_saturating_maker

if TYPE_CHECKING:
    from memad_fast.data.segmentation import AdaptationBatch

# Four halvings.
LEVELS = 4
DIVISOR = 1 << LEVELS
# F_e starts from the answer that so many pixels are edges. Starting from one half, a small training spends most of its
# steps on finding that few are.
_EDGE_SHARE = 0.1
# A constant image has no deviation to divide by.
_LEAST_DEVIATION = 1e-3
FLIPS = ("none", "horizontal", "both")

# Rec. 601, as images become grey everywhere else.
_LUMA = (0.299, 0.587, 0.114)


class UNet(nn.Module):
    """U-Net with four halvings, BatchNorm, and one logit for each class and pixel.

    Args:
        channels: of the images.
        classes: maps that come out.
        width: feature channels of the first level; each level has twice those of the one before.

    Example:
        >>> import torch
        >>> UNet(channels=3, classes=2, width=4)(torch.rand(1, 3, 32, 48)).shape
        torch.Size([1, 2, 32, 48])
    """

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        widths = [width << level for level in range(LEVELS + 1)]
        sources = [channels, *widths]
        self.down = nn.ModuleList(convolutions(sources[level], widths[level]) for level in range(LEVELS + 1))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(widths[level + 1], widths[level], 2, stride=2) for level in range(LEVELS)
        )
        self.joint = nn.ModuleList(convolutions(2 * widths[level], widths[level]) for level in range(LEVELS))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes, H, W]`` of images ``[B, channels, H, W]``.

        Raises:
            ValueError: 16 does not divide height and width.
        """
        height, width = images.shape[2:]
        if min(height, width) < DIVISOR or height % DIVISOR or width % DIVISOR:
            raise ValueError(f"images: expected a height and a width that {DIVISOR} divides, got {height} x {width}")
        maps = [self.down[0](images)]
        for block in list(self.down)[1:]:
            maps.append(block(functional.max_pool2d(maps[-1], 2)))
        current = maps.pop()
        for level in reversed(range(LEVELS)):
            current = self.joint[level](torch.cat((maps[level], self.up[level](current)), dim=1))
        return self.head(current)


def canny_edges(images: Tensor, low: float = 50, high: float = 150) -> Tensor:
    """The Canny edges of images, by OpenCV: luma in 256 levels, Sobel gradients, thinned, followed by hysteresis.

    Args:
        images: ``[B, 1 or 3, H, W]``, floating, in [0, 1].
        low, high: a contour starts where |∂x| + |∂y| of the grey levels 0 to 255 exceeds ``high``, and is followed as
            long as it exceeds ``low``.

    Returns:
        ``[B, 1, H, W]`` of 0 and 1, float32, on the images' device. No gradients.

    Cost: on the CPU, one image after the other (0.1 ms at 64 pixels); images on a GPU are waited for.

    Source: J. Canny, "A Computational Approach to Edge Detection", 1986.

    Example:
        >>> import torch
        >>> image = torch.zeros(1, 1, 16, 16)
        >>> image[:, :, :, 8:] = 1.0
        >>> canny_edges(image)[0, 0].sum(dim=0).nonzero().flatten().tolist()
        [7]
    """
    try:
        import cv2
    except ImportError as error:
        raise ModuleNotFoundError(
            "Canny edges need the package opencv-python-headless: pip install 'memad_fast[app]'", name="cv2"
        ) from error
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise ValueError(f"images: expected floating [B, 1 or 3, H, W], got {images.dtype} {list(images.shape)}")
    planes = images.detach().float().cpu()
    if planes.shape[1] == 3:
        planes = (planes * planes.new_tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True)
    grey = (planes[:, 0].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    edges = np.zeros(grey.shape, dtype=np.float32)
    for index, image in enumerate(grey):
        edges[index] = cv2.Canny(image, low, high) > 0
    return torch.from_numpy(edges)[:, None].to(images.device)


@dataclass(frozen=True)
class EdgeConfig:
    """F_e: its network, and the edges that it learns; every value is plain JSON.

    Attributes:
        image_size: side of the square images, in pixels; a multiple of 16, at least 32.
        channels: 1 (grey) or 3 (colour).
        width: feature channels of the U-Net's first level.
        low, high: thresholds of the Canny edges, see ``canny_edges``.
    """

    image_size: int
    channels: int
    width: int = 32
    low: float = 50.0
    high: float = 150.0

    def __post_init__(self) -> None:
        _check_network(self.image_size, self.channels, self.width)
        for name in ("low", "high"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0.0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")
        if self.low > self.high:
            raise ValueError(f"low: expected at most high, {self.high:g}, got {self.low:g}")


@dataclass(frozen=True)
class SemanticConfig:
    """F_s: its network, the classes, and how it is adapted; every value is plain JSON.

    Attributes:
        image_size: side of the square images, in pixels; a multiple of 16, at least 32.
        channels: 1 (grey) or 3 (colour).
        values: what stands in a label map for class 0, class 1, …; their number is the number of classes.
        width: feature channels of the U-Net's first level.
        standardize: bring every channel of every image to mean 0 and deviation 1 before the network, so that brightness
            and colour of a camera do not count.
        adversarial: λ, the weight of the adversarial term; 0: no D_da, no adaptation, no target images.
        critic_width: feature channels of D_da's first layer.
        crop: in training, the smallest share of an image's side that a random crop keeps before it is resized to
            ``image_size``; 1 shows whole images, as scoring does.
        flips: in training, mirror images at random: "none", "horizontal" (left and right) or "both".
    """

    image_size: int
    channels: int
    values: tuple[int, ...] = (0, 255)
    width: int = 32
    standardize: bool = False
    adversarial: float = 0.001
    critic_width: int = 64
    crop: float = 1.0
    flips: str = "none"

    def __post_init__(self) -> None:
        _check_network(self.image_size, self.channels, self.width)
        if not isinstance(self.values, (list, tuple)) or not all(type(value) is int for value in self.values):
            raise ValueError(f"values: expected integers, one a class, got {self.values!r}")
        object.__setattr__(self, "values", tuple(self.values))  # JSON gives lists
        if len(self.values) < 2 or len(set(self.values)) < len(self.values):
            raise ValueError(f"values: expected at least two, all different, got {self.values}")
        if type(self.adversarial) not in (int, float) or not 0.0 <= self.adversarial < math.inf:
            raise ValueError(f"adversarial: expected a finite number of at least 0, got {self.adversarial!r}")
        if type(self.standardize) is not bool:
            raise ValueError(f"standardize: expected True or False, got {self.standardize!r}")
        if type(self.critic_width) is not int or self.critic_width < 1:
            raise ValueError(f"critic_width: expected a positive int, got {self.critic_width!r}")
        if type(self.crop) not in (int, float) or not 0.0 < self.crop <= 1.0:
            raise ValueError(f"crop: expected more than 0 and at most 1, got {self.crop!r}")
        check_choice("flips", self.flips, FLIPS)

    @property
    def classes(self) -> int:
        """How many."""
        return len(self.values)


class EdgeExtractor(Trainable):
    """F_e, the low-level structure: a differentiable stand-in for the Canny edges of an image.

    Args:
        config: ``EdgeExtractor.presets()`` holds settings for several sizes.

    Example:
        >>> import torch
        >>> from memad_fast.models import EdgeExtractor
        >>> extractor = EdgeExtractor(EdgeExtractor.presets()["digits"].config)
        >>> extractor.extract(torch.rand(2, 1, 32, 32)).shape
        torch.Size([2, 1, 32, 32])
    """

    name: ClassVar[str] = "edge-extractor"
    Config: ClassVar[type] = EdgeConfig
    config: EdgeConfig

    def __init__(self, config: EdgeConfig) -> None:
        super().__init__(config)
        self.network = UNet(config.channels, 1, config.width)
        nn.init.constant_(_bias(self.network), math.log(_EDGE_SHARE / (1 - _EDGE_SHARE)))

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        """Settings by name: "small" for folders, "digits" for small images, "paper" as published.

        The paper gives batch size, rate and betas for the whole; of the extractors' width and epochs it says nothing.
        """
        small = TrainingSettings(learning_rate=3e-3, batch_size=8, epochs=30, constant_share=0.5)
        return {
            "small": Preset(EdgeConfig(image_size=64, channels=1, width=8), small),
            "digits": Preset(EdgeConfig(image_size=32, channels=1, width=8), small),
            "paper": Preset(EdgeConfig(image_size=224, channels=3), _PUBLISHED),
        }

    def forward(self, images: Tensor) -> Tensor:
        """Edge maps ``[B, 1, H, W]`` in (0, 1), of the images' dtype."""
        return self.network(images).float().sigmoid().to(images.dtype)

    def extract(self, images: Tensor) -> Tensor:
        """``forward`` in eval mode, whatever the mode is; gradients go to ``images``, never to the weights."""
        with _frozen(self):
            return self(images)

    def stages(self) -> tuple[Stage, ...]:
        """One: against the Canny edges of the images."""
        return (Stage("edges", (Objective("edges", list(self.parameters()), self.losses),)),)

    def losses(self, images: Tensor) -> dict[str, Tensor]:
        """``total``: mean binary cross-entropy (eq. 3, both halves) of images ``[B, C, H, W]``."""
        edges = canny_edges(images, self.config.low, self.config.high)
        return {"total": functional.binary_cross_entropy_with_logits(self.network(images).float(), edges)}


class SemanticExtractor(Trainable):
    """F_s, the semantic structure: class maps, learned from a labelled source set and adapted to unlabelled images.

    Args:
        config: ``SemanticExtractor.presets()`` holds settings for several sizes.

    Example:
        >>> import torch
        >>> from memad_fast.models import SemanticConfig, SemanticExtractor
        >>> extractor = SemanticExtractor(SemanticConfig(image_size=32, channels=1, values=(0, 1, 2), width=4))
        >>> extractor.extract(torch.rand(2, 1, 32, 32)).sum(dim=1).allclose(torch.ones(2, 32, 32))
        True
    """

    name: ClassVar[str] = "semantic-extractor"
    Config: ClassVar[type] = SemanticConfig
    config: SemanticConfig

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__(config)
        self.network = UNet(config.channels, config.classes, config.width)
        self.critic = _critic(config.classes, config.critic_width) if config.adversarial else None
        self._judged: tuple[Tensor, Tensor] | None = None  # maps of source and target between the two losses of a step

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        """Settings by name: "small" for two cores, "paper" as published.

        The paper gives batch size, rate and betas for the whole; of the extractors' width and epochs it says nothing.
        """
        config = SemanticConfig(
            image_size=128, channels=3, width=8, standardize=True, critic_width=16, crop=0.6, flips="horizontal"
        )
        small = TrainingSettings(learning_rate=3e-3, batch_size=4, epochs=100, constant_share=0.5)
        return {
            "small": Preset(config, small),
            "paper": Preset(SemanticConfig(image_size=224, channels=3), _PUBLISHED),
        }

    @torch.no_grad()
    def start_from(self, shares: Sequence[float]) -> None:
        """Let an untrained network begin with the answer that the classes have these shares of the pixels.

        Where a class is rare, as vessels are, a small training that starts from equal shares may spend all of its steps
        on finding them: on STARE, the loss after 40 steps was 0.64, and is 0.21. ``LabelledImages.class_shares`` gives
        those of a set.
        """
        _bias(self.network).copy_(torch.tensor(shares).log())

    def forward(self, images: Tensor) -> Tensor:
        """Class maps ``[B, classes, H, W]``, whose sum over the classes is 1, of the images' dtype."""
        return self._logits(images).softmax(dim=1).to(images.dtype)

    def extract(self, images: Tensor) -> Tensor:
        """``forward`` in eval mode, whatever the mode is; gradients go to ``images``, never to the weights."""
        with _frozen(self):
            return self(images)

    def stages(self) -> tuple[Stage, ...]:
        """One: F_s, and in turns with it D_da where there is an adaptation."""
        objectives = [Objective("extractor", list(self.network.parameters()), self.extractor_losses)]
        if self.critic is not None:
            objectives.append(Objective("critic", list(self.critic.parameters()), self.critic_losses))
        return (Stage("semantic", tuple(objectives)),)

    def extractor_losses(self, batch: AdaptationBatch) -> dict[str, Tensor]:
        """What F_s minimises: ``source`` (eq. 1, mean over the pixels) and ``target``, before its weight."""
        source, target = self._logits_of(batch)
        labelled = functional.cross_entropy(source, batch.labels)
        if self.critic is None:
            return {"total": labelled, "source": labelled}
        source_maps, target_maps = source.softmax(dim=1), target.softmax(dim=1)
        self._judged = source_maps.detach(), target_maps.detach()
        taken_for_source = non_saturating_maker(judge(self.critic, target_maps))
        total = labelled + self.config.adversarial * taken_for_source
        return {"total": total, "source": labelled, "target": taken_for_source}

    def critic_losses(self, batch: AdaptationBatch) -> dict[str, Tensor]:
        """What D_da minimises: ``total``, −L_tar of eq. 2 for the maps that ``extractor_losses`` has just made.

        As in AdaptSegNet: a second pass of F_s over the same batch would cost a third more.
        """
        assert self.critic is not None
        assert self._judged is not None
        (source_maps, target_maps), self._judged = self._judged, None
        return {"total": non_saturating_critic(self.critic(source_maps), self.critic(target_maps))}

    def _logits(self, images: Tensor) -> Tensor:
        """``[B, classes, H, W]`` float32."""
        if self.config.standardize:
            deviation, mean = torch.std_mean(images.float(), dim=(2, 3), correction=0, keepdim=True)
            images = ((images - mean) / (deviation + _LEAST_DEVIATION)).to(images.dtype)
        return self.network(images).float()

    def _logits_of(self, batch: AdaptationBatch) -> tuple[Tensor, Tensor]:
        """Of the source images and of the target images (none without D_da).

        In one pass: BatchNorm sees the mixture whose statistics it will use in eval mode.
        """
        if self.critic is None:
            return self._logits(batch.images), batch.images[:0]
        if batch.targets is None:
            raise ValueError("targets: expected images to adapt to, got none; adversarial=0 trains without")
        logits = self._logits(torch.cat((batch.images, batch.targets)))
        return logits[: len(batch.images)], logits[len(batch.images) :]


_PUBLISHED = TrainingSettings(learning_rate=1e-3, batch_size=8, epochs=200, betas=(0.1, 0.9))


def _bias(network: UNet) -> Tensor:
    """Of the last layer."""
    assert network.head.bias is not None
    return network.head.bias


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """In eval mode, and without gradients to the parameters: those of the graph that is built meanwhile."""
    training, parameters = module.training, [each for each in module.parameters() if each.requires_grad]
    module.eval()
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        module.train(training)


def _check_network(image_size: object, channels: object, width: object) -> None:
    if type(image_size) is not int or image_size < 2 * DIVISOR or image_size % DIVISOR:
        raise ValueError(
            f"image_size: expected a multiple of {DIVISOR}, at least {2 * DIVISOR}, got {image_size!r}"
        )  # at 16 pixels the lowest map is one pixel, whose statistics BatchNorm cannot take of a single image
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 or 3, got {channels!r}")
    if type(width) is not int or width < 1:
        raise ValueError(f"width: expected a positive int, got {width!r}")


def _critic(classes: int, width: int) -> nn.Sequential:
    """D_da of AdaptSegNet: five 4×4 convolutions of stride 2, no normalisation; a logit for every region."""
    widths = [classes, width, 2 * width, 4 * width, 8 * width]
    layers: list[nn.Module] = []
    for source, target in pairwise(widths):
        layers += [nn.Conv2d(source, target, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, stride=2, padding=1))
