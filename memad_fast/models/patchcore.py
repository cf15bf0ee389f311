"""PatchCore: every patch is compared with the nearest patch of a bank of normal ones.

    stage 1   backbone    a small auto-encoder learns the normal images, where no other backbone is given
    stage 2   bank        features of all patches of the normal images → greedy coreset → bank

    image ── backbone ── maps of several levels ── 3 × 3 means, joined at the finest level's size ── patches [h·w, D]
    patch score = distance to the nearest patch of the bank (``nearest_keys``); image score = the largest one
    map = the patch scores, enlarged and smoothed

The bank is a tensor of the state dict, or an index: as many patches as a disk holds, and new ones while it serves.

Source: K. Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (sections 3.1 to 3.3). The paper's
backbone is a WideResNet-50-2 trained on ImageNet: ``PatchCore(config, backbone=module)`` takes any module that gives a
list of maps; nothing is downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from memad_fast._arguments import check_choice
from memad_fast._progress import Tell, untold
from memad_fast.index import Index
from memad_fast.memory import greedy_coreset
from memad_fast.memory.coreset import coreset_size
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
        index: the bank, where it is not to be a tensor: metric "l2", dim ``patch_dim``, without values. If it holds
            patches, they are the bank: there is nothing to fit. Patches have the index's dtype and go where it is. It
            is no part of the state dict, nor moved by ``to``; a run folder keeps a copy. A model on an index is neither
            copied nor pickled.

    ``image_score`` is the distance of the patch that is farthest from the bank (re-weighted if asked for),
    ``anomaly_map`` holds the patches' distances, ``reconstruction`` is the image itself: nothing is reconstructed.
    ``parts``: "distance", the image score before re-weighting.

    An ``ExactIndex`` of float32 gives the scores of the tensor bit for bit. All patches (``coreset=1.0``) are streamed
    into an index, one batch after the other, and only the index says what of them is in RAM; to choose a coreset, all
    are held until it is chosen. ``fit`` makes the index itself (``index="exact"``), since an interrupted training has
    to find its patches again. ``reweighted`` takes an index that gives its rows back (``rows``), as ``ExactIndex``.

    Raises:
        ValueError: config and backbone contradict each other, or the index is not what is said above.

    Example:
        >>> import torch
        >>> from memad_fast.models import PatchCore, PatchCoreConfig
        >>> model = PatchCore(PatchCoreConfig(image_size=16, channels=1, backbone="pixels", patch=4, coreset=1.0))
        >>> model.fill(torch.rand(3, 1, 16, 16))
        >>> model.score(torch.rand(2, 1, 16, 16)).anomaly_map.shape
        torch.Size([2, 1, 16, 16])

        The same with room for the patches of months, the oldest of which make place for new ones:

        >>> from memad_fast.index import ExactIndex
        >>> index = ExactIndex(model.patch_dim, capacity=1_000_000)
        >>> growing = PatchCore(model.config, index=index)
        >>> growing.remember(torch.rand(3, 1, 16, 16))
        >>> len(index)
        147
    """

    name: ClassVar[str] = "patchcore"
    Config: ClassVar[type] = PatchCoreConfig
    config: PatchCoreConfig
    bank: Tensor

    def __init__(
        self, config: PatchCoreConfig, *, backbone: nn.Module | None = None, index: Index | None = None
    ) -> None:
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
        self.index: Index | None = None
        self._collected: range | None = None  # ids of the patches that were collected here; None: given with the index
        if index is not None:
            self.use_indexes({"bank": index})

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
        """The backbone, where it is trained here, then the bank: one pass over the images.

        An index that was given with patches holds them as the backbone sees them now: then nothing is trained.
        """
        bank = Stage("bank", epochs=1, begin=self._begin, observe=self._collect, finish=self._select, time_share=0.5)
        if not isinstance(self.backbone, PMB) or self._is_given:
            return (bank,)
        objective = Objective("auto-encoder", list(self.backbone.parameters()), self.backbone.loss)
        return (Stage("backbone", (objective,)), bank)

    @property
    def patch_dim(self) -> int:
        """D: how many features a patch has. Costs one pass of the backbone over an empty image."""
        image = torch.zeros(1, self.config.channels, self.config.image_size, self.config.image_size)
        weights = next(self._weights())
        with torch.no_grad(), self._evaluating():
            return self.features(image.to(weights.device, weights.dtype)).shape[1]

    @property
    def indexes(self) -> dict[str, Index]:
        """The bank, where it is an index."""
        return {} if self.index is None else {"bank": self.index}

    @property
    def fitted_indexes(self) -> dict[str, int]:
        """The bank."""
        return {"bank": self.patch_dim}

    def use_indexes(self, indexes: Mapping[str, Index]) -> None:
        """Take ``indexes["bank"]`` for the bank from now on; a tensor of patches is let go.

        Raises:
            ValueError: another name, or the index is not what the class says.
        """
        super().use_indexes({name: index for name, index in indexes.items() if name != "bank"})
        if "bank" not in indexes:
            return
        index = indexes["bank"]
        self._check_index(index)
        self.index = index
        self._collected = None if len(index) else range(index.next_id, index.next_id)
        self.bank, self._prepared = self.bank.new_zeros(0, 0), None
        self._seen.clear()

    @torch.no_grad()
    def fill(self, images: Tensor) -> None:
        """Make the bank of the patches of ``images`` ``[B, C, H, W]`` alone, without training.

        Raises:
            RuntimeError: the bank is an index that was given with patches in it.
        """
        self.check_images(images)
        if self._is_given:
            assert self.index is not None
            raise RuntimeError(
                f"the index was given with {len(self.index)} patches, which fill would drop; remember(images) adds to"
                " them"
            )
        self._begin()
        self._collect(images)
        self._select()

    @torch.no_grad()
    def remember(self, images: Tensor) -> None:
        """Add all patches of ``images`` ``[B, C, H, W]`` to the index, as newer than those that are there.

        On a line, with parts that are known to be good: an index with a capacity forgets its oldest patches for them.
        ``model.index.save()`` makes it last.

        Raises:
            RuntimeError: the bank is a tensor. What ``Index.add`` raises.
        """
        self.check_images(images)
        if self.index is None:
            raise RuntimeError("remember: the bank is a tensor, which is made once; PatchCore(config, index=...) grows")
        self.index.add(self._for_index(self._patches(images)))

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

    @property
    def _is_given(self) -> bool:
        """Whether the index came with its patches, which nothing here may drop."""
        return self.index is not None and self._collected is None

    @property
    def _streams(self) -> bool:
        """Whether patches go into the index as they come: all of them are kept."""
        return self.index is not None and isinstance(self.config.coreset, float) and self.config.coreset == 1.0

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    def _patches(self, images: Tensor) -> Tensor:
        """``[B·h·w, D]``, as scores see them."""
        with self._evaluating():
            return _rows(self.features(images))

    def _begin(self) -> None:
        """Forget what was collected before."""
        self._seen.clear()
        if self.index is not None and not self._is_given:
            self.index.remove_oldest(len(self.index))
            self._collected = range(self.index.next_id, self.index.next_id)

    def _collect(self, images: Tensor) -> None:
        if self._is_given:
            return
        rows = self._patches(images)
        if self._streams:
            self._add(rows)
        else:
            self._seen.append(rows.cpu())

    def _add(self, rows: Tensor) -> None:
        """Add patches that are not in the index yet.

        It is saved before the checkpoint: after a crash between the two it holds patches that the checkpoint does not
        know of, the very next ones to come.
        """
        assert self.index is not None
        assert self._collected is not None
        there = self.index.next_id - self._collected.stop
        self.index.add(self._for_index(rows[there:]))
        self._collected = range(self._collected.start, self._collected.stop + len(rows))

    def _select(self, tell: Tell = untold) -> None:
        if self._is_given or self._streams:
            return
        rows = torch.cat(self._seen)
        self._seen.clear()
        kept = self.config.coreset
        size = coreset_size(min(kept, len(rows)) if isinstance(kept, int) else kept, len(rows))
        rows = rows.to(self.bank.device)
        chosen = rows[greedy_coreset(rows, size, progress=tell).sort().values] if size < len(rows) else rows
        if self.index is None:
            self.bank, self._prepared = chosen, None
        else:
            self._begin()  # a training that goes on chooses again
            self._add(chosen)

    def _score(self, images: Tensor) -> Scores:
        if len(self.bank if self.index is None else self.index) == 0:
            raise RuntimeError("the bank is empty: fit the model, fill(images), or load a run, first")
        features = self.features(images)
        count, _, height, width = features.shape
        rows = _rows(features)
        distances, nearest = self._nearest(rows, 1)
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
        neighbours = min(self.config.neighbours, len(self.bank if self.index is None else self.index))
        _, around = self._nearest(self._kept(nearest), neighbours)
        distances = (farthest[:, None] - self._kept(around)).norm(dim=2)
        return 1 - (distance - distances.logsumexp(dim=1)).exp()

    def _map(self, distances: Tensor) -> Tensor:
        size = (self.config.image_size, self.config.image_size)
        return _smooth(functional.interpolate(distances, size, mode="bilinear"), self.config.smoothing)

    def _nearest(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Squared distances and numbers ``[N, count]`` of the nearest patches of the bank."""
        if self.index is None:
            return nearest_keys(rows, self._keys(), count)
        found = self.index.search(self._for_index(rows), count)
        return found.distances.to(rows.device), found.ids.to(rows.device)

    def _kept(self, numbers: Tensor) -> Tensor:
        """``[*numbers, D]``: patches of the bank, by the numbers that ``_nearest`` gave."""
        if self.index is None:
            return self.bank[numbers]
        found = self.index.rows(numbers.flatten().to(self.index.device))  # type: ignore[attr-defined]  # checked
        return found.keys.to(numbers.device, torch.float32).unflatten(0, numbers.shape)

    def _for_index(self, rows: Tensor) -> Tensor:
        assert self.index is not None
        return rows.to(self.index.device, self.index.dtype)

    def _check_index(self, index: Index) -> None:
        if not isinstance(index, Index):
            raise TypeError(f"index: expected a memad_fast.index.Index, got {type(index).__name__}")
        for name, expected in (("metric", "l2"), ("values_dim", None), ("dim", self.patch_dim)):
            if getattr(index, name) != expected:
                raise ValueError(f"index: expected {name} {expected!r}, got {getattr(index, name)!r}")
        if self.config.reweighted and not hasattr(index, "rows"):
            raise ValueError(
                f"index: reweighted scores read patches back (rows), which {type(index).__name__} cannot; set"
                " reweighted to False, or take an ExactIndex"
            )

    def _keys(self) -> PreparedKeys:
        if self._prepared is None or self._prepared.keys is not self.bank:
            self._prepared = prepare_keys(self.bank)
        return self._prepared

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._seen:  # while patches are collected: an interrupted collection goes on
            destination[prefix + "seen"] = torch.cat(self._seen)
        if self.index is not None:  # what is in it as far as the rest of the state knows
            collected = self._collected
            ids = (-1, self.index.next_id) if collected is None else (collected.start, collected.stop)
            destination[prefix + "index_ids"] = torch.tensor(ids)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        seen, ids = state_dict.pop(prefix + "seen", None), state_dict.pop(prefix + "index_ids", None)
        stored = state_dict.get(prefix + "bank")
        self._check_state(stored, ids)
        self._seen = [] if seen is None else [seen]
        if stored is not None:
            self.bank = self.bank.new_empty(stored.shape)  # as many patches as were kept
        if ids is not None:
            first, end = ids.tolist()
            self._collected = None if first < 0 else range(first, end)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._prepared = None

    def _check_state(self, bank: Tensor | None, ids: Tensor | None) -> None:
        """Raises ValueError where the state is of a model with another kind of bank, or of patches that are gone."""
        if self.index is None and ids is not None:
            raise ValueError("index: the state is that of a model on an index; give it: PatchCore(config, index=...)")
        if self.index is not None and bank is not None and ids is None:
            raise ValueError(
                f"index: the state holds its bank as a tensor of {len(bank)} patches; load it without an index, and"
                " index.add(model.bank)"
            )
        if self.index is not None and ids is not None and self.index.next_id < int(ids[1]):
            raise ValueError(
                f"index: {self.index.next_id} patches were ever added to it, {int(ids[1])} to that of the state:"
                " an older copy, or another index"
            )


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
