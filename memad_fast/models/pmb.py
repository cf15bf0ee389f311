"""PMB: an auto-encoder whose skip connections read a partition memory bank, scored by histogram error estimation.

    image ─ E1 ─ E2 ─ … ─ EL        El: two 3×3 conv + BN + ReLU; max-pool between levels, so level l's map F_l has
            │    │        │         side image_size / 2^(l-1) (128, 64, 32, 16, 8 for L = 5 at 128 pixels)
            M1   M2       │         levels 1..p through a memory, p+1..L plainly
            │    │        │
    X_R ─── D1 ─ D2 ─ … ──┘         Dl: transposed conv doubles the side, concatenation with level l, the block of El

    A = |X − X_R|                                                        (eq. 1)
    A' = max(A − μ, 0), μ = mean of the smallest δ_H share of A          (eq. 6)
    loss = MSE + 0.1 · mean(1 − SSIM)                                    (eq. 7 to 9)

The anomaly map is A', the image score ΣA'. The paper says "U-Net-like" and no more: the blocks, the widths and the
sigmoid at the end are this file's choice.

Source: P. Xing, Z. Li, "Visual Anomaly Detection via Partition Memory Bank Module and Error Estimation".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import NoneType
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from memad_fast._arguments import SHRINKS, check_choice
from memad_fast.memory import MemoryUnit, PartitionMemoryBank
from memad_fast.models.base import AnomalyModel, Objective, Preset, Scores, Stage, TrainingSettings
from memad_fast.models.convolution import convolutions
from memad_fast.ops import BankAttentionStats, histogram_correction, ssim_loss

MEMORIES = ("partition", "pixel", "block", "none")

# What a config read from JSON or a command line may hold, so that "False" is not taken for True.
_KINDS = {
    "image_size": (int,),
    "channels": (int,),
    "block": (int,),
    "skip": (bool,),
    "threshold": (float, int, NoneType),
    "renormalize": (bool, NoneType),
    "error_fraction": (float, int),
    "ssim_weight": (float, int),
}


@dataclass(frozen=True)
class PMBConfig:
    """The architecture of a PMB; every value is plain JSON.

    Attributes:
        image_size: side of the square images, in pixels; 2^(L-1) divides it.
        channels: 1 (grey) or 3 (colour).
        widths: feature channels of levels 1..L; their number is L.
        items: memory items m of levels 1..p; their number is p.
        partitions: strips k of levels 1..p, for memory "partition"; each divides the side of its level's map.
        memory: "partition" (PMB), "pixel" (MemAE's query), "block" (DAAD's query) or "none": levels 1..p pass plainly.
        block: side of the query's window in pixels, for memory "block".
        skip: whether levels 1..L-1 reach the decoder at all. Without, only level L does: memory "none" is then the
            plain auto-encoder (AE), memory "pixel" with p = L is MemAE; with skip, memory "none" is AE+skip.
        threshold: δ_m, the weight below which an item does not count; ``None``: 1/m for "partition", else 0.0025.
        shrink: "soft", "hard" or "none"; ``None``: "soft" for "partition" (eq. 4), else "hard" (MemAE).
        renormalize: divide the shrunk weights by their sum; ``None``: not for "partition" (eq. 5), else yes (MemAE).
        error_fraction: δ_H, the share of each image's smallest errors that estimates μ; 0 switches it off.
        pixel_loss: "mse", or "norm" for eq. 7 as printed: the un-squared 2-norm of each image's difference.
        ssim_weight: λ_SSIM; 0 leaves the term out.
    """

    image_size: int
    channels: int
    widths: tuple[int, ...]
    items: tuple[int, ...]
    partitions: tuple[int, ...]
    memory: str = "partition"
    block: int = 8
    skip: bool = True
    threshold: float | None = None
    shrink: str | None = None
    renormalize: bool | None = None
    error_fraction: float = 0.5
    pixel_loss: str = "mse"
    ssim_weight: float = 0.1

    def __post_init__(self) -> None:
        for name in ("widths", "items", "partitions"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not all(type(entry) is int for entry in value):
                raise ValueError(f"{name}: expected integers, one a level, got {value!r}")
            object.__setattr__(self, name, tuple(value))  # JSON gives lists
        for name, kinds in _KINDS.items():
            if type(getattr(self, name)) not in kinds:
                expected = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        check_choice("memory", self.memory, MEMORIES)
        check_choice("pixel_loss", self.pixel_loss, ("mse", "norm"))
        if self.shrink is not None:
            check_choice("shrink", self.shrink, SHRINKS)
        self._check_sizes()
        self._check_levels()

    @property
    def levels(self) -> int:
        """L."""
        return len(self.widths)

    def side(self, level: int) -> int:
        """Side in pixels of the feature map of ``level``, counted from 0."""
        return self.image_size >> level

    def _check_sizes(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"channels: expected 1 or 3, got {self.channels}")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths: expected one positive width a level, got {self.widths}")
        divisor = 1 << (self.levels - 1)
        if self.image_size < divisor or self.image_size % divisor:
            raise ValueError(
                f"image_size: {self.levels} levels need a positive multiple of {divisor}, got {self.image_size}"
            )
        if self.threshold is not None and not 0.0 <= self.threshold < 1.0:
            raise ValueError(f"threshold: expected 0 to below 1, got {self.threshold}")
        if not 0.0 <= self.ssim_weight < math.inf:
            raise ValueError(f"ssim_weight: expected a finite value of at least 0, got {self.ssim_weight}")
        if not 0.0 <= self.error_fraction <= 1.0:
            raise ValueError(f"error_fraction: expected 0 to 1, got {self.error_fraction}")

    def _check_levels(self) -> None:
        if self.memory == "none":
            return
        if not 1 <= len(self.items) <= self.levels or min(self.items) < 1:
            raise ValueError(f"items: expected 1 to {self.levels} positive values, one a level, got {self.items}")
        if not self.skip and len(self.items) < self.levels:
            raise ValueError(
                f"items: without skip only level {self.levels} reaches the decoder, so that its memory is read; "
                f"expected {self.levels} values, got {self.items}"
            )
        if self.memory == "partition" and len(self.partitions) != len(self.items):
            raise ValueError(f"partitions: expected {len(self.items)} values like items, got {self.partitions}")
        for level in range(len(self.items)):
            side = self.side(level)
            divisor = self._divisor(level)
            if divisor < 1 or side % divisor:
                name = "partitions" if self.memory == "partition" else "block"
                fits = ", ".join(str(value) for value in range(1, side + 1) if side % value == 0)
                raise ValueError(
                    f"{name}: {divisor} does not divide the {side}-pixel map of level {level + 1} "
                    f"(image_size {self.image_size}); these do: {fits}"
                )

    def _divisor(self, level: int) -> int:
        if self.memory == "partition":
            return self.partitions[level]
        return self.block if self.memory == "block" else 1


class PMB(AnomalyModel):
    """Partition memory bank auto-encoder with histogram error estimation.

    Args:
        config: the architecture; ``PMB.presets()`` holds the published ones and two small ones.

    ``image_score`` is ΣA' over the ``image_size``² pixels, ``anomaly_map`` is A'. With three channels A is first
    averaged over them, so that the score is the sum of the map that is shown. ``parts``: "error_sum" (ΣA, the score
    without histogram error estimation) and "mu".

    Scores read running BatchNorm statistics and learned items: nothing of them depends on the rest of the batch.

    Example:
        >>> import torch
        >>> from memad_fast.models import PMB
        >>> model = PMB(PMB.presets()["digits"].config)
        >>> scores = model.score(torch.rand(2, 1, 32, 32))
        >>> scores.image_score.shape, scores.anomaly_map.shape
        (torch.Size([2]), torch.Size([2, 1, 32, 32]))
    """

    name: ClassVar[str] = "pmb"
    Config: ClassVar[type] = PMBConfig
    config: PMBConfig

    def __init__(self, config: PMBConfig) -> None:
        super().__init__(config)
        sources = (config.channels, *config.widths)
        self.encoder = nn.ModuleList(convolutions(sources[level], sources[level + 1]) for level in range(config.levels))
        self.memories = nn.ModuleList(_memory(config, level) for level in range(config.levels))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(deeper, width, 2, stride=2)
            for width, deeper in zip(config.widths, config.widths[1:], strict=False)
        )
        self.decoder = nn.ModuleList(
            convolutions(2 * width if config.skip else width, width) for width in config.widths[:-1]
        )
        self.head = nn.Conv2d(config.widths[0], config.channels, 3, padding=1)

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        """Settings by name.

        "small" is for folders of parts (64 pixels, or any multiple of 32), "digits" for images of a few dozen pixels
        (32, or any multiple of 4 from 8): narrow networks that train on two CPU cores in minutes and in seconds.
        Unlike the paper both renormalise the read. The others are the published settings, literally: "mvtec-texture",
        "mvtec-object", "mnist" and "retinal-oct".
        """
        return {**_SMALL, **_PAPER}

    @classmethod
    def paper(cls, setting: str = "mvtec-texture") -> PMB:
        """An untrained network in a published setting: "mvtec-texture", "mvtec-object", "mnist" or "retinal-oct"."""
        check_choice("setting", setting, tuple(_PAPER))
        return cls(_PAPER[setting].config)

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruct ``images`` ``[B, C, H, W]``; same shape, in [0, 1]."""
        maps = self._encode(images)
        decoded = self.memories[-1](maps[-1])
        for level in reversed(range(self.config.levels - 1)):
            decoded = self.up[level](decoded)
            if self.config.skip:
                decoded = torch.cat((self.memories[level](maps[level]), decoded), dim=1)
            decoded = self.decoder[level](decoded)
        return torch.sigmoid(self.head(decoded))

    def stages(self) -> tuple[Stage, ...]:
        """One: all parameters minimise ``loss``."""
        return (Stage("training", (Objective("model", list(self.parameters()), self.loss),)),)

    def loss(self, images: Tensor) -> dict[str, Tensor]:
        """``total`` (eq. 9), ``mse`` (eq. 7 as chosen by ``pixel_loss``) and ``ssim`` (eq. 8, before its weight)."""
        reconstruction = self(images).to(images.dtype)  # autocast gives 16 bits
        if self.config.pixel_loss == "mse":
            pixel = functional.mse_loss(reconstruction, images)
        else:
            pixel = (reconstruction - images).flatten(1).norm(dim=1).mean()
        if self.config.ssim_weight == 0:
            return {"total": pixel, "mse": pixel, "ssim": torch.zeros_like(pixel)}
        ssim = ssim_loss(reconstruction, images, padding="same")
        return {"total": pixel + self.config.ssim_weight * ssim, "mse": pixel, "ssim": ssim}

    def _score(self, images: Tensor) -> Scores:
        reconstruction = self(images)
        error = (images - reconstruction).abs().float().mean(dim=1, keepdim=True)
        corrected, mu, score = histogram_correction(error, self.config.error_fraction)
        return Scores(
            image_score=score,
            anomaly_map=corrected,
            reconstruction=reconstruction.float(),
            parts={"error_sum": error.sum(dim=(1, 2, 3)), "mu": mu},
        )

    def memory_stats(self, images: Tensor) -> dict[str, BankAttentionStats]:
        """How ``images`` use each memory that is read: "level1" … → dead-row share and entropy.

        With eq. 4's soft threshold a query that is equally similar to all items reads all zeros: a dead row.
        """
        self.check_images(images)
        images = images.to(self.head.weight.dtype)
        training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                maps = self._encode(images)
                read = range(self.config.levels) if self.config.skip else (self.config.levels - 1,)
                memories = {f"level{level + 1}": (self.memories[level], maps[level]) for level in read}
                return {
                    name: memory.stats(features)
                    for name, (memory, features) in memories.items()
                    if isinstance(memory, (MemoryUnit, PartitionMemoryBank))
                }
        finally:
            self.train(training)

    def _encode(self, images: Tensor) -> list[Tensor]:
        """F_1 … F_L."""
        features = self.encoder[0](images)
        maps = [features]
        for block in list(self.encoder)[1:]:
            features = block(functional.max_pool2d(features, 2))
            maps.append(features)
        return maps


def _memory(config: PMBConfig, level: int) -> nn.Module:
    """What level ``level`` (from 0) passes through on its way to the decoder."""
    reaches_decoder = config.skip or level == config.levels - 1
    if config.memory == "none" or level >= len(config.items) or not reaches_decoder:
        return nn.Identity()
    if config.memory == "partition":
        side = config.side(level)
        return PartitionMemoryBank(
            config.partitions[level],
            config.items[level],
            side,
            side,
            threshold=config.threshold,
            shrink=config.shrink or "soft",
            renormalize=bool(config.renormalize),
        )
    block = config.block if config.memory == "block" else 1
    return MemoryUnit(
        config.items[level],
        config.widths[level] * block**2,
        block=block,
        threshold=0.0025 if config.threshold is None else config.threshold,
        shrink=config.shrink or "hard",
        renormalize=config.renormalize is not False,
    )


_WIDTHS = (64, 128, 256, 512, 512)
_MVTEC_ITEMS = (150, 200, 200, 200)
_PAPER_TRAINING = TrainingSettings(learning_rate=2e-3, batch_size=20, epochs=200)

# Section IV-A. The paper gives no number of epochs.
_PAPER = {
    "mvtec-texture": Preset(
        PMBConfig(image_size=128, channels=3, widths=_WIDTHS, items=_MVTEC_ITEMS, partitions=(32, 16, 16, 8)),
        _PAPER_TRAINING,
    ),
    "mvtec-object": Preset(
        PMBConfig(image_size=128, channels=3, widths=_WIDTHS, items=_MVTEC_ITEMS, partitions=(16, 16, 16, 8)),
        _PAPER_TRAINING,
    ),
    "mnist": Preset(
        PMBConfig(image_size=128, channels=1, widths=_WIDTHS[:3], items=(10, 10, 10), partitions=(1, 1, 1)),
        TrainingSettings(learning_rate=2e-3, batch_size=64, epochs=50),
    ),
    "retinal-oct": Preset(
        PMBConfig(image_size=128, channels=1, widths=_WIDTHS[:4], items=(10, 10, 10), partitions=(2, 2, 2)),
        _PAPER_TRAINING,
    ),
}

# Settled on folders of 31 to 505 images at 64 pixels and on scikit-learn's digits. The reads are renormalised: with the
# literal soft threshold the weights sum to a few per cent, and the decoder takes many more steps to see them. δ_H is
# 75 %, the best of the paper's table VI for detection.
_SMALL = {
    "small": Preset(
        PMBConfig(
            image_size=64,
            channels=1,
            widths=(16, 32, 64, 64),
            items=(50, 50, 50),
            partitions=(16, 8, 8),
            renormalize=True,
            error_fraction=0.75,
        ),
        TrainingSettings(learning_rate=2e-3, batch_size=16, epochs=30),
    ),
    "digits": Preset(
        PMBConfig(
            image_size=32,
            channels=1,
            widths=(16, 32, 64),
            items=(10, 10, 10),
            partitions=(1, 1, 1),
            renormalize=True,
        ),
        TrainingSettings(learning_rate=2e-3, batch_size=16, epochs=40),
    ),
}
