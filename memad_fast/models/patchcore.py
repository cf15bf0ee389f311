"""PatchCore: every patch is compared with the nearest patch of a bank of normal ones.

    stage 1   backbone    a small auto-encoder learns the normal images, where no other backbone is given
    stage 2   bank        features of all patches of the normal images → greedy coreset → bank

    image ── backbone ── maps of several levels ── 3 × 3 means, joined at the finest level's size ── patches [h·w, D]
    patch score = distance to the nearest patch of the bank (``nearest_keys``); image score = the largest one
    map = the patch scores, enlarged and smoothed

Source: K. Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (sections 3.1 to 3.3). The paper's
backbone is a WideResNet-50-2 trained on ImageNet: ``PatchCore(config, backbone=module)`` takes any module that gives a
list of maps; nothing is downloaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from memad_fast._arguments import check_choice
from memad_fast.memory import greedy_coreset
from memad_fast.models.base import AnomalyModel, Objective, Preset, Scores, Stage, TrainingSettings
from memad_fast.models.pmb import PMB, PMBConfig
from memad_fast.ops import PreparedKeys, nearest_keys, prepare_keys

BACKBONES = ("auto-encoder", "pixels", "custom")


@dataclass(frozen=True)
class PatchCoreConfig:
    """The features and the bank of a PatchCore; every value is plain JSON.

    Attributes:
        image_size: side of the square images, in pixels.
        channels: 1 (grey) or 3 (colour).
        backbone: "auto-encoder" (trained first, on the same normal images), "pixels" (the patches themselves: patch
            nearest neighbours without features) or "custom" (the module that is passed to ``PatchCore``).
        widths: feature channels of the auto-encoder's levels; each level but the first halves the side.
        levels: which maps of the backbone are joined, counted from 0. The first is the finest of them.
        patch: side of a patch in pixels, for backbone "pixels"; patches overlap by half.
        neighbourhood: side of the window of positions whose features are averaged; odd.
        coreset: share of all patches that the bank keeps (0 to 1), or their number (an int above 1).
        reweighted: weigh the image score by the neighbours of the nearest patch (eq. 7 of the paper).
        neighbours: b of that weight.
        smoothing: standard deviation of the map's Gaussian, in pixels; 0 leaves it as it is.
    """

    image_size: int
    channels: int
    backbone: str = "auto-encoder"
    widths: tuple[int, ...] = (32, 64, 128)
    levels: tuple[int, ...] = (1, 2)
    patch: int = 8
    neighbourhood: int = 3
    coreset: float | int = 0.1
    reweighted: bool = False
    neighbours: int = 9
    smoothing: float = 4.0

    def __post_init__(self) -> None:
        check_choice("backbone", self.backbone, BACKBONES)
        for name in ("widths", "levels"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not value or not all(type(entry) is int for entry in value):
                raise ValueError(f"{name}: expected integers, got {value!r}")
            object.__setattr__(self, name, tuple(value))  # JSON gives lists
        if self.channels not in (1, 3):
            raise ValueError(f"channels: expected 1 or 3, got {self.channels}")
        if type(self.image_size) is not int or self.image_size < 1:
            raise ValueError(f"image_size: expected a positive int, got {self.image_size!r}")
        if min(self.levels) < 0 or list(self.levels) != sorted(set(self.levels)):
            raise ValueError(f"levels: expected ascending numbers from 0, got {self.levels}")
        if self.backbone == "auto-encoder":
            PMBConfig(**_auto_encoder(self))  # whose errors name image_size and widths
            if self.levels[-1] >= len(self.widths):
                raise ValueError(f"levels: expected 0 to {len(self.widths) - 1} (one a width), got {self.levels}")
        if self.backbone == "pixels" and not 2 <= self.patch <= self.image_size:
            raise ValueError(f"patch: expected 2 to {self.image_size} pixels, got {self.patch}")
        if type(self.neighbourhood) is not int or self.neighbourhood < 1 or self.neighbourhood % 2 == 0:
            raise ValueError(f"neighbourhood: expected a positive odd int, got {self.neighbourhood!r}")
        is_count = type(self.coreset) is int and self.coreset >= 1
        if not (is_count or (type(self.coreset) is float and 0.0 < self.coreset <= 1.0)):
            raise ValueError(
                f"coreset: expected a share above 0 up to 1.0 or a number of patches, got {self.coreset!r}"
            )
        if type(self.neighbours) is not int or self.neighbours < 1:
            raise ValueError(f"neighbours: expected a positive int, got {self.neighbours!r}")
        if not 0.0 <= self.smoothing < math.inf:
            raise ValueError(f"smoothing: expected a finite value of at least 0, got {self.smoothing}")


class PatchCore(AnomalyModel):
    """A bank of normal patches, and the distance to it.

    Args:
        config: the features and the bank; ``PatchCore.presets()`` holds settings for two kinds of images.
        backbone: for ``config.backbone`` "custom": a module that takes ``[B, C, H, W]`` in [0, 1] and gives a list of
            maps ``[B, D_l, h_l, w_l]``, the finest first. It is used as it is, without gradients, in eval mode.

    ``image_score`` is the distance of the patch that is farthest from the bank (re-weighted if asked for),
    ``anomaly_map`` holds the patches' distances, ``reconstruction`` is the image itself: nothing is reconstructed.
    ``parts``: "distance", the image score before re-weighting.

    Example:
        >>> import torch
        >>> from memad_fast.models import PatchCore, PatchCoreConfig
        >>> model = PatchCore(PatchCoreConfig(image_size=16, channels=1, backbone="pixels", patch=4, coreset=1.0))
        >>> model.fill(torch.rand(3, 1, 16, 16))
        >>> model.score(torch.rand(2, 1, 16, 16)).anomaly_map.shape
        torch.Size([2, 1, 16, 16])
    """

    name: ClassVar[str] = "patchcore"
    Config: ClassVar[type] = PatchCoreConfig
    config: PatchCoreConfig
    bank: Tensor

    def __init__(self, config: PatchCoreConfig, *, backbone: nn.Module | None = None) -> None:
        super().__init__(config)
        if (config.backbone == "custom") != (backbone is not None):
            raise ValueError(
                f"backbone: expected a module with config.backbone 'custom' and none otherwise, got "
                f"{None if backbone is None else type(backbone).__name__} with {config.backbone!r}"
            )
        self.backbone = PMB(PMBConfig(**_auto_encoder(config))) if config.backbone == "auto-encoder" else backbone
        self.register_buffer("bank", torch.zeros(0, 0))
        self._seen: list[Tensor] = []
        self._prepared: PreparedKeys | None = None

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        """Settings by name: "small" for folders, "digits" for small images, "pixels" without features, "paper".

        The small ones keep as many patches whatever the set is: choosing a share of all of them, as the paper does,
        takes time that grows with the square of their number.
        """
        training = TrainingSettings(learning_rate=2e-3, batch_size=16, epochs=30)
        return {
            "small": Preset(PatchCoreConfig(image_size=64, channels=1, coreset=2000), training),
            "digits": Preset(PatchCoreConfig(image_size=32, channels=1, coreset=2000, smoothing=2.0), training),
            "pixels": Preset(PatchCoreConfig(image_size=64, channels=1, backbone="pixels", coreset=2000), training),
            # The backbone gives the maps of its stages from the first on; the second and the third are read.
            "paper": Preset(
                PatchCoreConfig(
                    image_size=224, channels=3, backbone="custom", levels=(1, 2), coreset=0.1, reweighted=True
                ),
                training,
            ),
        }

    @classmethod
    def paper(cls, backbone: nn.Module) -> PatchCore:
        """The published setting on a module that gives the maps of its stages: the paper's is a WideResNet-50-2."""
        return cls(cls.presets()["paper"].config, backbone=backbone)

    def stages(self) -> tuple[Stage, ...]:
        """The backbone, where it is trained here, then the bank: one pass over the images."""
        bank = Stage("bank", epochs=1, observe=self._collect, finish=self._select, time_share=0.5)
        if not isinstance(self.backbone, PMB):
            return (bank,)
        objective = Objective("auto-encoder", list(self.backbone.parameters()), self.backbone.loss)
        return (Stage("backbone", (objective,)), bank)

    @torch.no_grad()
    def fill(self, images: Tensor) -> None:
        """Make the bank of the patches of ``images`` ``[B, C, H, W]`` alone, without training."""
        self.check_images(images)
        self._seen.clear()
        self._collect(images)
        self._select()

    def features(self, images: Tensor) -> Tensor:
        """``[B, D, h, w]``: the features of all patches, as the bank holds them."""
        if self.config.backbone == "pixels":
            return self._pixel_patches(images)
        assert self.backbone is not None
        maps = self.backbone._encode(images) if isinstance(self.backbone, PMB) else self.backbone(images)
        side = self.config.neighbourhood
        chosen = [functional.avg_pool2d(maps[level].float(), side, 1, side // 2) for level in self.config.levels]
        finest = chosen[0].shape[-2:]
        return torch.cat([functional.interpolate(each, finest, mode="bilinear") for each in chosen], dim=1)

    def train(self, mode: bool = True) -> PatchCore:
        """As ``Module.train``; a backbone from elsewhere stays in eval mode."""
        super().train(mode)
        if self.config.backbone == "custom":
            assert self.backbone is not None
            self.backbone.eval()
        return self

    def _pixel_patches(self, images: Tensor) -> Tensor:
        side, step = self.config.patch, max(1, self.config.patch // 2)
        count = (self.config.image_size - side) // step + 1
        return functional.unfold(images.float(), side, stride=step).unflatten(2, (count, count))

    def _collect(self, images: Tensor) -> None:
        training = self.training
        self.eval()
        self._seen.append(_rows(self.features(images)).cpu())
        self.train(training)

    def _select(self) -> None:
        rows = torch.cat(self._seen)
        self._seen.clear()
        share = self.config.coreset
        size = min(len(rows), share if isinstance(share, int) else max(1, round(share * len(rows))))
        device = self.bank.device
        rows = rows.to(device)
        self.bank = rows[greedy_coreset(rows, size).sort().values] if size < len(rows) else rows
        self._prepared = None

    def _score(self, images: Tensor) -> Scores:
        if len(self.bank) == 0:
            raise RuntimeError("the bank is empty: fit the model, fill(images), or load a run, first")
        features = self.features(images)
        count, _, height, width = features.shape
        rows = _rows(features)
        distances, nearest = nearest_keys(rows, self._keys(), 1)
        distance = distances[:, 0].sqrt().reshape(count, height * width)
        farthest, patch = distance.max(dim=1)
        score = farthest
        if self.config.reweighted:
            first = torch.arange(count, device=images.device) * height * width + patch
            score = farthest * self._weight(rows[first], nearest[first, 0], farthest)
        return Scores(
            score, self._map(distance.reshape(count, 1, height, width)), images.float(), {"distance": farthest}
        )

    def _weight(self, farthest: Tensor, nearest: Tensor, distance: Tensor) -> Tensor:
        """1 − exp d(m) / Σ exp d(m_i) over the b patches of the bank nearest to the nearest one (eq. 7)."""
        neighbours = min(self.config.neighbours, len(self.bank))
        _, around = nearest_keys(self.bank[nearest], self._keys(), neighbours)
        distances = (farthest[:, None] - self.bank[around]).norm(dim=2)
        return 1 - (distance - distances.logsumexp(dim=1)).exp()

    def _map(self, distances: Tensor) -> Tensor:
        size = (self.config.image_size, self.config.image_size)
        return _smooth(functional.interpolate(distances, size, mode="bilinear"), self.config.smoothing)

    def _keys(self) -> PreparedKeys:
        if self._prepared is None or self._prepared.keys is not self.bank:
            self._prepared = prepare_keys(self.bank)
        return self._prepared

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._seen:  # while patches are collected: an interrupted collection goes on
            destination[prefix + "seen"] = torch.cat(self._seen)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        seen = state_dict.pop(prefix + "seen", None)
        self._seen = [] if seen is None else [seen]
        stored = state_dict.get(prefix + "bank")
        if stored is not None:
            self.bank = self.bank.new_empty(stored.shape)  # as many patches as were kept
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._prepared = None


def _rows(features: Tensor) -> Tensor:
    """``[B, D, h, w]`` → ``[B·h·w, D]``."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def _auto_encoder(config: PatchCoreConfig) -> dict[str, Any]:
    """The config of a PMB without memory and skips: a plain auto-encoder."""
    return {
        "image_size": config.image_size, "channels": config.channels, "widths": config.widths,
        "items": (), "partitions": (), "memory": "none", "skip": False,
    }  # fmt: skip


def _smooth(maps: Tensor, deviation: float) -> Tensor:
    """``[B, 1, H, W]`` under a Gaussian that is cut at four deviations; borders are repeated."""
    if deviation == 0:
        return maps
    reach = max(1, math.ceil(4 * deviation))
    distance = torch.arange(-reach, reach + 1, dtype=torch.float32, device=maps.device)
    window = torch.exp(-0.5 * (distance / deviation).square())
    window = window / window.sum()
    padded = functional.pad(maps, (reach,) * 4, mode="replicate")
    return functional.conv2d(functional.conv2d(padded, window[None, None, None, :]), window[None, None, :, None])
