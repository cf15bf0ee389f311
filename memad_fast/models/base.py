"""What every detector is to the code around it: a config, a loss to train on, a score to read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

# Resizing filters overshoot [0, 1] a little; anything beyond this is another scale.
_RANGE_SLACK = 0.1


@dataclass
class Scores:
    """What a detector says of a batch. All tensors are detached, float32, on the images' device."""

    image_score: Tensor  # [B], larger is more anomalous
    anomaly_map: Tensor  # [B, 1, H, W], same scale for every image
    reconstruction: Tensor  # [B, C, H, W]
    parts: dict[str, Tensor] = field(default_factory=dict)  # each part of the score by name, [B]


@dataclass(frozen=True)
class TrainingSettings:
    """How a preset is trained."""

    learning_rate: float
    batch_size: int
    epochs: int
    betas: tuple[float, float] = (0.9, 0.999)
    constant_share: float = 1.0
    """Share of a stage's steps at the full learning rate; over the rest it falls linearly, towards 0."""


@dataclass(frozen=True)
class Objective:
    """One optimiser's part in every training step: what it minimises, and what it alone may change."""

    name: str
    parameters: Sequence[nn.Parameter]
    losses: Callable[[Tensor], dict[str, Tensor]]
    """Scalar losses of a batch ``[B, C, H, W]`` in [0, 1]; "total" is minimised."""


@dataclass(frozen=True)
class Stage:
    """A part of a training that begins when the one before it is done.

    Every step takes one batch of normal images: each objective in turn computes its losses and changes its parameters,
    then ``observe`` looks at the batch. The model is in training mode; parameters that no objective of the stage holds
    require no gradients. What is to outlast an interruption is in the state dict.
    """

    name: str
    objectives: tuple[Objective, ...] = ()
    epochs: int | None = None
    """Passes over the images; None: as many as the settings say."""
    observe: Callable[[Tensor], None] | None = None
    """Called with every batch, without gradients: the place to write memories. With several devices every process calls
    it with the images of all and with the same random numbers, so that there is nothing to gather."""
    finish: Callable[[], None] | None = None
    """Called once, after the last step or when the stage's time is up."""
    time_share: float = 1.0
    """Of a limited time, beside the shares of the other stages."""


@dataclass(frozen=True)
class Preset:
    """A named setting: the model's config and how it is trained."""

    config: Any
    training: TrainingSettings


class AnomalyModel(nn.Module, ABC):
    """A detector that is trained on normal images alone.

    A subclass sets ``name`` (its word on the command line) and ``Config`` (a frozen dataclass of JSON-able values
    with at least ``image_size: int`` and ``channels: int``), and builds its layers from ``config``.
    """

    name: ClassVar[str]
    Config: ClassVar[type]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    @abstractmethod
    def presets(cls) -> dict[str, Preset]:
        """The published settings and the small ones, by name; the first is the default."""

    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """How it is trained; the objectives of a stage hold the parameters of this very module."""

    @abstractmethod
    def _score(self, images: Tensor) -> Scores:
        """Score checked images; called in eval and inference mode."""

    @property
    def device(self) -> torch.device:
        """Where its weights are (of a model without parameters: its buffers)."""
        return next(self._weights()).device

    def _weights(self) -> Iterator[Tensor]:
        return chain(self.parameters(), (buffer for buffer in self.buffers() if buffer.is_floating_point()))

    def score(self, images: Tensor) -> Scores:
        """Score images ``[B, C, H, W]``, float in [0, 1], of any floating dtype. The model is read, never changed.

        Raises:
            TypeError, ValueError: wrong dtype, shape or range, or a non-finite pixel; the message says which.
        """
        self.check_images(images)
        images = images.to(next(self._weights()).dtype)
        training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                return self._score(images)
        finally:
            self.train(training)

    def check_images(self, images: Tensor) -> None:
        """``images`` is a finite floating ``[B, channels, image_size, image_size]`` in [0, 1]."""
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images: expected a floating torch.Tensor in [0, 1], got {kind}")
        expected = (self.config.channels, self.config.image_size, self.config.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images: expected [B, {', '.join(map(str, expected))}], got {list(images.shape)}")
        low, high = torch.stack(images.aminmax()).tolist() if images.numel() else (0.0, 0.0)  # waits for a GPU once
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = (~images.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
            raise ValueError(f"images: expected finite pixels, got NaN or infinity in image {bad} of the batch")
        if low < -_RANGE_SLACK or high > 1 + _RANGE_SLACK:
            raise ValueError(f"images: expected pixels in [0, 1], got {low:g} to {high:g}; divide 8-bit pixels by 255")
