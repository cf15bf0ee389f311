"""What every detector is to the code around it: a config, a loss to train on, a score to read; and what is trained in
stages without being a detector: a part of one, that is trained beforehand and given to it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memad_fast._progress import Tell
from memad_fast.index import Index

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
    losses: Callable[[Any], dict[str, Tensor]]
    """Scalar losses of a batch; "total" is minimised."""


@dataclass(frozen=True)
class Stage:
    """A part of a training that begins when the one before it is done.

    Every step takes one batch (a detector's: normal images ``[B, C, H, W]`` in [0, 1]): each objective in turn computes
    its losses and changes its parameters, then ``observe`` looks at the batch. The model is in training mode;
    parameters that no objective of the stage holds require no gradients. What is to outlast an interruption is in the
    state dict, or in an index that the model names (``indexes``).
    """

    name: str
    objectives: tuple[Objective, ...] = ()
    epochs: int | None = None
    """Passes over the images; None: as many as the settings say."""
    begin: Callable[[], None] | None = None
    """Called before the first step, and not where an interrupted stage goes on."""
    observe: Callable[[Any], None] | None = None
    """Called with every batch, without gradients: the place to write memories. With several devices every process calls
    it with the images of all and with the same random numbers, so that there is nothing to gather; what an objective
    left behind for it is of the process's own share."""
    finish: Callable[[Tell], None] | None = None
    """Called once, after the last step or when the stage's time is up, with a function that it may tell how far it is:
    ``tell(done, of_how_many)``."""
    time_share: float = 1.0
    """Of a limited time, beside the shares of the other stages."""


@dataclass(frozen=True)
class Preset:
    """A named setting: the model's config and how it is trained."""

    config: Any
    training: TrainingSettings
    resize: str = "bilinear"
    """How images are brought to the model's size: "bilinear" or "bicubic"."""


class Trainable(nn.Module, ABC):
    """What is trained in stages and kept in a run folder: a detector, or a part that is trained beforehand.

    A subclass sets ``name`` (its word in a run's config.json) and ``Config`` (a frozen dataclass of JSON-able values
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

    @property
    def device(self) -> torch.device:
        """Where its weights are (of a model without parameters: its buffers)."""
        return next(self._weights()).device

    def _weights(self) -> Iterator[Tensor]:
        return chain(self.parameters(), (buffer for buffer in self.buffers() if buffer.is_floating_point()))

    @property
    def indexes(self) -> dict[str, Index]:
        """The memories that are indexes, by name. A run keeps each in a folder of its own, not in the state dict."""
        return {}

    @property
    def fitted_indexes(self) -> dict[str, int]:
        """The memories that a training can fill an index for: name and D, the length of a row."""
        return {}

    def use_indexes(self, indexes: Mapping[str, Index]) -> None:
        """Remember in these indexes from now on.

        Args:
            indexes: by the name of the memory that each stands for.

        Raises:
            ValueError: there is no such memory, or the index does not fit it.
        """
        if indexes:
            raise ValueError(f"index: {self.name} has no memory {', '.join(map(repr, indexes))} that an index could be")

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


class AnomalyModel(Trainable):
    """A detector that is trained on normal images alone.

    ``name`` is its word on the command line. A detector that can take parts which were trained beforehand names them in
    ``PARTS``, has a keyword argument for each in its constructor, hands these on to this one, and leaves the stages
    that would train a given part out::

        PARTS = {"edges": EdgeExtractor}

        def __init__(self, config, *, edges: EdgeExtractor | None = None) -> None:
            super().__init__(config, edges=edges)
            self.edges = EdgeExtractor(...) if edges is None else edges

    What a part settles (a number of classes) is read from the part's config, not repeated in the model's: a run
    records name and config of every given part, and builds the parts before the model.

    Args:
        config: the architecture.
        parts: the given parts; None for one that was not given. They become the model's own and are frozen.

    Raises:
        TypeError, ValueError: a part of another kind, or for images of another size or number of channels.
    """

    PARTS: ClassVar[Mapping[str, type[Trainable]]] = {}
    given_parts: dict[str, Trainable]

    def __init__(self, config: Any, **parts: Trainable | None) -> None:
        super().__init__(config)
        self.given_parts = {name: part for name, part in parts.items() if part is not None}
        for name, part in self.given_parts.items():
            self._check_part(name, part)
            part.requires_grad_(False).eval()

    @abstractmethod
    def _score(self, images: Tensor) -> Scores:
        """Score checked images; called in eval and inference mode."""

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

    def _check_part(self, name: str, part: Trainable) -> None:
        kind = self.PARTS[name]
        if not isinstance(part, kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(part).__name__}")
        expected = (self.config.channels, self.config.image_size)
        got = (part.config.channels, part.config.image_size)
        if got != expected:
            raise ValueError(
                f"{name}: the model takes {expected[0]} channels at {expected[1]} pixels, the part was made for"
                f" {got[0]} at {got[1]}"
            )


def parameters_of(*modules: nn.Module | None) -> list[nn.Parameter]:
    """The parameters of all of them, for an ``Objective``; None stands for a part that was left out."""
    return [parameter for module in modules if module is not None for parameter in module.parameters()]
