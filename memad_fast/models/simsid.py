"""SimSID: patches are in-painted from what a space-aware memory knows of their neighbours, and decoded by a student.

    image ── patches ── CNN ── features ──────────────────────────── teacher ── G_t(E(I))     L_t = MSE(I, G_t(E(I)))
                                  │   ╲                                 │
                               memory   centre                     L_dist = Σ MSE of their maps
                                  │          ╲                          │
                     reads of the 8 neighbours ── in-painting ────── student ── Î             L_s = MSE(I, Î)
                                                                                │
                     L_dis = −mean(log D(I) + log(1 − D(Î)))             discriminator

    A = 1 − sigmoid((D(Î) − μ) / σ), μ and σ over the normal training images

    stage 1   teacher       CNN and teacher minimise L_t (eq. 5.3); both stay as they are from there on
    stage 2   memory        remembers the features of the patches: one pass over the images
    stage 3   student       in-painting and student minimise L_s + L_dist (eq. 5.4, 5.5), the discriminator minimises
                            L_dis (eq. 5.6) on what the student makes in scoring
    stage 4   calibration   μ and σ (eq. 5.7): one pass over the images

Source: the SimSID report ("Unsupervised anomaly detection using SimSID algorithm"), chapters 4 and 5, and for what it
takes from them the published SQUID and SimSID systems (T. Xiang et al., CVPR 2023). Where the report cannot work as it
is printed, this does: its CNN and its in-painting transformer are never trained, its memory starts from zeros, its
reads stay random in scoring, its anomaly score skips memory and in-painting, and the signs of eq. 5.6 and 5.7 are
inverted. It stores features while the student trains; since the CNN no longer changes then, one pass before is the
same memory, and all devices have it. It says nothing of the sizes of transformer and discriminator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from memad_fast._arguments import check_choice
from memad_fast._progress import Tell
from memad_fast.memory import HierarchicalMemory, MemoryQueue
from memad_fast.models.base import AnomalyModel, Objective, Preset, Scores, Stage, TrainingSettings
from memad_fast.models.discriminator import non_saturating_critic, non_saturating_maker

MEMORIES = ("space-aware", "queue", "none")
RETRIEVALS = {"gumbel-topk": "sum", "straight-through": "straight_through"}
CENTRES = ("feature", "read", "token")
BORDERS = ("masked", "zeros")
SCORES = ("discriminator", "discriminator-printed", "reconstruction")

# σ is at least this share of μ: images that the discriminator cannot tell apart differ by rounding alone.
_LEAST_DEVIATION = 1e-4


@dataclass(frozen=True)
class SimSIDConfig:
    """The architecture and the losses of a SimSID; every value is plain JSON.

    Attributes:
        image_size: side of the square images, in pixels; ``patch`` divides it.
        channels: 1 (grey) or 3 (colour).
        patch: side of the patches, in pixels.
        dim: D, length of a patch's feature; ``heads`` divides it.
        widths: channels behind the convolutions of the patch CNN. A max-pool follows each, as long as it halves the
            patch; the decoders go through the same widths backwards, and double the side as often.
        memory: "space-aware" (hierarchical, one row a position: the report), "queue" (a FIFO of features for each
            position: the published code) or "none": neighbours' own features in place of what is remembered.
        retrieval: "gumbel-topk" (the sum of the k best rows, chosen with Gumbel noise in training: the report) or
            "straight-through" (their softmax-weighted mean, no noise: the published Gumbel shrinkage).
        k: how many rows a read takes (the published code's shrink threshold of 5 keeps 4).
        threshold: a position of the space-aware memory takes a new feature if their cosine is below this.
        group: side of a group of memory level 1, in patches.
        slots: features that a position of the queue remembers.
        heads, layers: of the in-painting transformer.
        centre: what joins the neighbours in the transformer: the patch's own "feature" (the report), what the memory
            "read" for it (the published code's residual), or a learned "token": nothing of the patch itself.
        border: neighbours outside of the grid are "masked" out of the attention, or "zeros" (the published code).
        shortcut: share of patches that keep their own feature in training (the published masked shortcut has 0.05).
        distillation: weight of L_dist beside L_s.
        adversarial: weight of the student's −log D(Î): the feedback that the report tells of, but whose algorithm has
            not (the published code has 0.005).
        student_epochs: passes over the images in stage 2; ``None``: as many as in stage 1.
        score: the image score: "discriminator" (A), "discriminator-printed" (1 − A: the sign of eq. 5.7 as printed) or
            "reconstruction" (the image's mean squared error).
    """

    image_size: int
    channels: int
    patch: int = 16
    dim: int = 64
    widths: tuple[int, ...] = (32, 64, 128, 256)
    memory: str = "space-aware"
    retrieval: str = "gumbel-topk"
    k: int = 5
    threshold: float = 0.9
    group: int = 2
    slots: int = 200
    heads: int = 4
    layers: int = 2
    centre: str = "feature"
    border: str = "masked"
    shortcut: float = 0.0
    distillation: float = 1.0
    adversarial: float = 0.0
    student_epochs: int | None = None
    score: str = "discriminator"

    def __post_init__(self) -> None:
        if not isinstance(self.widths, (list, tuple)) or not self.widths:
            raise ValueError(f"widths: expected one channel number a convolution, got {self.widths!r}")
        object.__setattr__(self, "widths", tuple(self.widths))  # JSON gives lists
        names = ("image_size", "patch", "dim", "k", "group", "slots", "heads", "layers")
        counts = {name: getattr(self, name) for name in names} | {"widths": min(self.widths)}
        if self.student_epochs is not None:
            counts["student_epochs"] = self.student_epochs
        for name, value in counts.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected a positive int, got {getattr(self, name)!r}")
        for name, (low, high) in {
            "threshold": (-1.0, math.inf), "shortcut": (0.0, 1.0), "distillation": (0.0, math.inf),
            "adversarial": (0.0, math.inf),
        }.items():  # fmt: skip
            value = getattr(self, name)
            if type(value) not in (int, float) or not low <= value <= high or math.isinf(value):
                raise ValueError(f"{name}: expected a finite number from {low:g} to {high:g}, got {value!r}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels: expected 1 or 3, got {self.channels}")
        for name, choices in {
            "memory": MEMORIES, "retrieval": tuple(RETRIEVALS), "centre": CENTRES, "border": BORDERS, "score": SCORES,
        }.items():  # fmt: skip
            check_choice(name, getattr(self, name), choices)
        if self.image_size % self.patch:
            fits = ", ".join(str(side) for side in range(1, self.image_size + 1) if self.image_size % side == 0)
            raise ValueError(f"patch: {self.patch} does not divide image_size {self.image_size}; these do: {fits}")
        if self.dim % self.heads:
            raise ValueError(f"dim: expected a multiple of heads ({self.heads}), got {self.dim}")
        most = {"space-aware": self.grid**2, "queue": self.slots, "none": self.k}[self.memory]
        if self.k > most:
            raise ValueError(f"k: expected 1 to {most}, the rows of memory {self.memory!r}, got {self.k}")

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch

    @property
    def halvings(self) -> int:
        """How often the patch CNN halves the side of a patch, and a decoder doubles its own."""
        factors_of_two = (self.patch & -self.patch).bit_length() - 1
        return min(len(self.widths), factors_of_two)


class SimSID(AnomalyModel):
    """Space-aware memory for in-painting and detection.

    Args:
        config: the architecture; ``SimSID.presets()`` holds the published one and two small ones.

    ``image_score`` is A (or as ``score`` says), ``anomaly_map`` |I − Î| averaged over the channels, ``reconstruction``
    the student's Î, cut to [0, 1]. ``parts``: "discriminator" (A), "realness" (D(Î)) and "reconstruction" (the mean
    squared error).

    Reads are deterministic in scoring and memories change in training alone: nothing depends on the rest of the batch.

    Example:
        >>> import torch
        >>> from memad_fast.models import SimSID
        >>> model = SimSID(SimSID.presets()["digits"].config)
        >>> images = torch.rand(2, 1, 32, 32)
        >>> [stage.name for stage in model.stages()]
        ['teacher', 'memory', 'student', 'calibration']
        >>> model.stages()[1].observe(images)
        >>> scores = model.score(images)
        >>> scores.anomaly_map.shape, sorted(scores.parts)
        (torch.Size([2, 1, 32, 32]), ['discriminator', 'realness', 'reconstruction'])
    """

    name: ClassVar[str] = "simsid"
    Config: ClassVar[type] = SimSIDConfig
    config: SimSIDConfig
    normal_realness: Tensor

    def __init__(self, config: SimSIDConfig) -> None:
        super().__init__(config)
        self.cnn = PatchCNN(config)
        self.teacher = Decoder(config)
        self.memory = _memory(config)
        self.inpainting = InpaintingTransformer(config)
        self.student = Decoder(config)
        self.discriminator = _discriminator(config)
        # Of D(Î) over the normal images of the calibration: count, mean, sum of squared deviations.
        self.register_buffer("normal_realness", torch.zeros(3))

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        """Settings by name.

        "small" is for folders of parts (64 pixels, or any multiple of 16 from 48), "digits" for images of a few dozen
        pixels (32, or any multiple of 8 from 24): narrow networks that train on two CPU cores in minutes, with the
        published retrieval. Their student hears of the discriminator: without, it is enough for the discriminator to
        know what the student makes of normal images, and it takes what it makes of others for more real. In so short a
        training A tells little all the same: the image score is the reconstruction error. "paper" is the report's
        setting, with its retrieval, no feedback, and A.
        """
        return {**_SMALL, **_PAPER}

    @classmethod
    def paper(cls) -> SimSID:
        """An untrained network in the published setting."""
        return cls(_PAPER["paper"].config)

    def forward(self, images: Tensor) -> Tensor:
        """Î ``[B, C, H, W]``: ``images`` as the student makes them from in-painted features."""
        return self.student(self._inpaint(self.cnn(images)))[0]

    def stages(self) -> tuple[Stage, ...]:
        """Teacher, memory, student with discriminator, calibration."""
        teacher = Objective("teacher", [*self.cnn.parameters(), *self.teacher.parameters()], self.teacher_losses)
        student = Objective("student", [*self.inpainting.parameters(), *self.student.parameters()], self.student_losses)
        discriminator = Objective("discriminator", list(self.discriminator.parameters()), self.discriminator_losses)
        return (
            Stage("teacher", (teacher,), finish=self._forget),
            Stage("memory", epochs=1, observe=self._remember, time_share=0.1),
            Stage("student", (student, discriminator), epochs=self.config.student_epochs, time_share=2.0),
            Stage("calibration", epochs=1, observe=self._calibrate, time_share=0.1),
        )

    def teacher_losses(self, images: Tensor) -> dict[str, Tensor]:
        """L_t (eq. 5.3): trains CNN and teacher."""
        made, _ = self.teacher(self.cnn(images))
        return {"total": functional.mse_loss(made.to(images.dtype), images)}

    def student_losses(self, images: Tensor) -> dict[str, Tensor]:
        """``total``, ``reconstruction`` (L_s, eq. 5.4), ``distillation`` (L_dist, eq. 5.5), before their weights.

        Trains in-painting and student: CNN and teacher are used as they are.
        """
        with _used_as_they_are(self.cnn, self.teacher):
            features = self.cnn(images)
            _, goals = self.teacher(features)
        made, maps = self.student(self._inpaint(features))
        losses = {
            "reconstruction": functional.mse_loss(made.to(images.dtype), images),
            "distillation": distillation_loss(maps, goals),
        }
        total = losses["reconstruction"] + self.config.distillation * losses["distillation"]
        if self.config.adversarial:
            losses["adversarial"] = non_saturating_maker(self.discriminator(made))
            total = total + self.config.adversarial * losses["adversarial"]
        return {"total": total, **losses}

    def discriminator_losses(self, images: Tensor) -> dict[str, Tensor]:
        """L_dis (eq. 5.6 with algorithm 4.11's sign): trains the discriminator.

        It judges what it will judge in scoring: Î of deterministic reads and running BatchNorm statistics.
        """
        with _used_as_they_are(self):
            made = self(images).to(images.dtype)
        return {"total": non_saturating_critic(self.discriminator(images), self.discriminator(made))}

    def _score(self, images: Tensor) -> Scores:
        made = self(images)
        realness = self._realness(made)
        mean, deviation = self._normal_range()
        reconstruction = made.float().clamp(0, 1)
        difference = images.float() - reconstruction
        parts = {
            "discriminator": torch.sigmoid((mean - realness) / deviation),
            "reconstruction": difference.square().mean(dim=(1, 2, 3)),
            "realness": realness,
        }
        printed = torch.sigmoid((realness - mean) / deviation)
        score = {**parts, "discriminator-printed": printed}[self.config.score]
        return Scores(score, difference.abs().mean(dim=1, keepdim=True), reconstruction, parts)

    def _inpaint(self, features: Tensor) -> Tensor:
        """Features ``[B, P, D]`` as memory and neighbours have them; same shape."""
        inpainted = self.inpainting(self._read(features), features)
        if not (self.training and self.config.shortcut):
            return inpainted
        keeps = torch.rand(features.shape[:2], device=features.device) < self.config.shortcut
        return torch.where(keeps[:, :, None], features.to(inpainted.dtype), inpainted)

    def _read(self, features: Tensor) -> Tensor:
        """What the memory answers to each patch, ``[B, P, levels·D]``."""
        if isinstance(self.memory, HierarchicalMemory):
            return self.memory(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        reads: Tensor = self.memory(features)
        return reads

    def _remember(self, images: Tensor) -> None:
        with _used_as_they_are(self.cnn):
            features = self.cnn(images)
        if isinstance(self.memory, HierarchicalMemory):
            self.memory.store(features)
        elif isinstance(self.memory, MemoryQueue):
            self.memory.write(features)

    def _forget(self, tell: Tell) -> None:
        """A new CNN makes other features: what the memory holds, and the calibration, are no longer of this model."""
        if isinstance(self.memory, (HierarchicalMemory, MemoryQueue)):
            self.memory.clear()
        self.normal_realness.zero_()

    def _realness(self, made: Tensor) -> Tensor:
        """D(Î) in (0, 1), ``[B]``."""
        return torch.sigmoid(self.discriminator(made).float())

    def _normal_range(self) -> tuple[Tensor, Tensor]:
        """μ and σ; 0 and 1 before the calibration."""
        count, mean, squares = self.normal_realness.float().unbind()
        deviation = torch.maximum((squares / count).sqrt(), _LEAST_DEVIATION * mean)
        return mean, torch.where((count > 0) & (deviation > 0), deviation, 1.0)

    def _calibrate(self, images: Tensor) -> None:
        """Count the images' D(Î) in."""
        with _used_as_they_are(self):
            realness = self._realness(self(images))
        count, mean, squares = self.normal_realness
        added, away = float(len(images)), realness.mean() - mean
        total = count + added
        squares = squares + (realness - realness.mean()).square().sum() + away**2 * count * added / total
        self.normal_realness.copy_(torch.stack((total, mean + away * added / total, squares)))


class PatchCNN(nn.Module):
    """Images ``[B, C, H, W]`` to the features of their patches ``[B, P, D]`` (algorithms 4.1, 4.2)."""

    def __init__(self, config: SimSIDConfig) -> None:
        super().__init__()
        self.patch, self.patches = config.patch, config.grid**2
        layers: list[nn.Module] = []
        source = config.channels
        for level, width in enumerate(config.widths):
            layers += [nn.Conv2d(source, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            if level < config.halvings:
                layers.append(nn.MaxPool2d(2))
            source = width
        self.convolutions = nn.Sequential(*layers)
        self.linear = nn.Linear(source * (config.patch >> config.halvings) ** 2, config.dim)

    def forward(self, images: Tensor) -> Tensor:
        """One row of patches after the other."""
        size = (self.patch, self.patch)
        patches = images.unfold(2, *size).unfold(3, *size).permute(0, 2, 3, 1, 4, 5)  # [B, rows, columns, C, h, w]
        features: Tensor = self.linear(self.convolutions(patches.flatten(0, 2)).flatten(1))
        return features.reshape(len(images), self.patches, self.linear.out_features)


class InpaintingTransformer(nn.Module):
    """What a patch looks like, from what is known of its neighbours (algorithms 4.6, 4.7).

    The tokens of a patch are its centre and, linearly projected, the reads of its eight neighbours; the encoder's
    answer at the centre goes through a last linear layer.
    """

    neighbours: Tensor
    outside: Tensor

    def __init__(self, config: SimSIDConfig) -> None:
        super().__init__()
        dim, levels = config.dim, 3 if config.memory == "space-aware" else 1
        self.centre = config.centre
        self.token = nn.Parameter(0.02 * torch.randn(dim)) if config.centre == "token" else None
        self.projection = nn.Linear(levels * dim, dim)
        layer = nn.TransformerEncoderLayer(dim, config.heads, 4 * dim, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.output = nn.Linear(dim, dim)
        neighbours = _neighbours(config.grid)
        outside = functional.pad(neighbours == config.grid**2, (1, 0)) & (config.border == "masked")
        self.register_buffer("neighbours", neighbours, persistent=False)
        self.register_buffer("outside", outside, persistent=False)

    def forward(self, reads: Tensor, features: Tensor) -> Tensor:
        """``[B, P, D]`` from the reads ``[B, P, levels·D]`` and the features ``[B, P, D]`` of all patches."""
        projected = self.projection(reads)
        if self.token is not None:
            centre = self.token.to(projected.dtype).expand_as(projected)
        else:
            centre = projected if self.centre == "read" else features.to(projected.dtype)
        around = functional.pad(projected, (0, 0, 0, 1))[:, self.neighbours]  # the row that is added: outside
        tokens = torch.cat((centre[:, :, None], around), dim=2).flatten(0, 1)
        answers = self.encoder(tokens, src_key_padding_mask=self.outside.repeat(len(reads), 1))
        inpainted: Tensor = self.output(answers[:, 0])
        return inpainted.reshape(features.shape)


class Decoder(nn.Module):
    """Features of all patches to an image, and the maps on the way (algorithm 4.8): teacher and student."""

    def __init__(self, config: SimSIDConfig) -> None:
        super().__init__()
        widths = (*config.widths[::-1], config.channels)
        side = config.image_size >> config.halvings
        self.start = (widths[0], side, side)
        self.linear = nn.Linear(config.grid**2 * config.dim, widths[0] * side**2)
        doubles = [level >= len(config.widths) - config.halvings for level in range(len(config.widths))]
        self.convolutions = nn.ModuleList(
            nn.ConvTranspose2d(source, width, 4, stride=2, padding=1)
            if double
            else nn.ConvTranspose2d(source, width, 3, padding=1)
            for source, width, double in zip(widths, widths[1:], doubles, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:-1])

    def forward(self, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The image ``[B, C, H, W]``, whose range is not bounded, and the maps behind each BatchNorm and ReLU."""
        x = self.linear(features.flatten(1)).unflatten(1, self.start)
        maps = []
        for convolution, norm in zip(self.convolutions, self.norms, strict=False):
            x = functional.relu(norm(convolution(x)))
            maps.append(x)
        return self.convolutions[-1](x), maps


def distillation_loss(maps: list[Tensor], goals: list[Tensor]) -> Tensor:
    """L_dist (eq. 5.5): the sum over the levels of the mean squared error between student and teacher."""
    errors = [functional.mse_loss(ours.float(), theirs.float()) for ours, theirs in zip(maps, goals, strict=True)]
    return torch.stack(errors).sum()


def _memory(config: SimSIDConfig) -> nn.Module:
    if config.memory == "none":
        return nn.Identity()
    combine, noise = RETRIEVALS[config.retrieval], config.retrieval == "gumbel-topk"
    patches, dim = config.grid**2, config.dim
    if config.memory == "queue":
        return MemoryQueue(patches, dim, slots=config.slots, k=config.k, noise=noise, combine=combine)
    return HierarchicalMemory(
        config.grid,
        config.grid,
        dim,
        group=config.group,
        threshold=config.threshold,
        k=config.k,
        noise=noise,
        combine=combine,
    )


def _discriminator(config: SimSIDConfig) -> nn.Sequential:
    """Images to logits ``[B]``: strided convolutions in the widths of the patch CNN, without BatchNorm."""
    layers: list[nn.Module] = []
    source, side = config.channels, config.image_size
    for width in config.widths:
        layers += [nn.Conv2d(source, width, 3, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        source, side = width, -(-side // 2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(source * side**2, 1), nn.Flatten(0))


def _neighbours(grid: int) -> Tensor:
    """``[P, 8]``: the patches around each patch of the grid; P where there is none."""
    numbers = functional.pad(torch.arange(grid**2).view(1, grid, grid), (1, 1, 1, 1), value=grid**2)
    windows = numbers.unfold(1, 3, 1).unfold(2, 3, 1).reshape(grid**2, 9)
    return torch.cat((windows[:, :4], windows[:, 5:]), dim=1)


@contextmanager
def _used_as_they_are(*modules: nn.Module) -> Iterator[None]:
    """Without gradients, and in eval mode."""
    training = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for module, was in zip(modules, training, strict=True):
            module.train(was)


# Settled on folders of 31 and 168 good images at 64 pixels and on scikit-learn's digits. Weighted reads without noise
# did better than the noisy sums of the report on both folders.
_DIGITS = SimSIDConfig(
    image_size=32,
    channels=1,
    patch=8,
    dim=32,
    widths=(16, 32, 64, 64),
    retrieval="straight-through",
    distillation=0.1,
    adversarial=0.05,
    score="reconstruction",
)
_SMALL = {
    "small": Preset(
        replace(_DIGITS, image_size=64, patch=16), TrainingSettings(learning_rate=1e-3, batch_size=8, epochs=40)
    ),
    "digits": Preset(_DIGITS, TrainingSettings(learning_rate=1e-3, batch_size=16, epochs=40)),
}
# The learning rate is that of the discriminator, the only one in the report; the batch is SQUID's.
_PAPER = {
    "paper": Preset(
        SimSIDConfig(image_size=128, channels=1, student_epochs=250),
        TrainingSettings(learning_rate=1e-4, batch_size=16, epochs=1000),
    ),
}
