"""A detector that is small enough to train in a test, with everything a large one has: BatchNorm, noise, a buffer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from memad_fast import models
from memad_fast.data import Dataset, from_arrays, preprocessing
from memad_fast.models.base import AnomalyModel, Objective, Preset, Scores, Stage, TrainingSettings
from memad_fast.scoring import Run, load_run, save_run


@dataclass(frozen=True)
class ToyConfig:
    image_size: int = 8
    channels: int = 1
    noise: float = 0.1
    poison_at: int = -1  # the loss becomes NaN when this many batches were seen


class Toy(AnomalyModel):
    name: ClassVar[str] = "toy"
    Config: ClassVar[type] = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.encode = nn.Sequential(nn.Conv2d(config.channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.decode = nn.Conv2d(4, config.channels, 3, padding=1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        return {"toy": Preset(ToyConfig(), TOY_SETTINGS)}

    def stages(self) -> tuple[Stage, ...]:
        return (Stage("training", (Objective("model", list(self.parameters()), self.loss),)),)

    def loss(self, images: Tensor) -> dict[str, Tensor]:
        noisy = images + self.config.noise * torch.randn_like(images)
        mse = (self.decode(self.encode(noisy)) - images).float().square().mean()
        if int(self.seen) == self.config.poison_at:
            mse = mse * torch.nan
        self.seen += 1
        return {"total": mse, "mse": mse}

    def _score(self, images: Tensor) -> Scores:
        reconstruction = self.decode(self.encode(images))
        error = (images - reconstruction).abs().mean(dim=1, keepdim=True)
        return Scores(error.flatten(1).double().mean(dim=1).float(), error, reconstruction)


TOY_SETTINGS = TrainingSettings(learning_rate=0.01, batch_size=8, epochs=3)


@pytest.fixture(autouse=True)
def _toy_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "toy", Toy)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """These networks are too small to share."""


@pytest.fixture
def make_toy() -> Callable[..., Toy]:
    return _make_toy


@pytest.fixture
def make_stripes() -> Callable[..., Dataset]:
    return _make_stripes


@pytest.fixture
def settings() -> TrainingSettings:
    return TOY_SETTINGS


def _make_toy(**config: object) -> Toy:
    torch.manual_seed(0)
    return Toy(ToyConfig(**config))  # type: ignore[arg-type]


def _make_stripes(train: int = 30, image_size: int = 8) -> Dataset:
    """Smooth gradients are normal; abnormal ones have a bright square, whose mask is known."""
    rng = np.random.default_rng(0)

    def normal(count: int) -> np.ndarray:
        ramp = np.linspace(0, 0.5, image_size)
        return ramp[None, None, :] * rng.uniform(0.8, 1.0, (count, image_size, 1)) + rng.uniform(
            0, 0.02, (count, image_size, image_size)
        )

    test, masks = normal(16), np.zeros((16, image_size, image_size), bool)
    for index in range(8, 16):
        masks[index, 2:5, index % 3 : index % 3 + 3] = True
        test[index][masks[index]] = 1.0
    labels = [0] * 8 + [1] * 8
    return from_arrays(normal(train), test, labels, masks=masks, defects=["good"] * 8 + ["square", "blob"] * 4)


@pytest.fixture
def toy_run_folder(tmp_path: Path) -> Path:
    """A run of an untrained toy, whose threshold lies amid the scores of ``parts``."""
    folder = tmp_path / "run"
    save_run(
        folder,
        _make_toy(noise=0.0),
        threshold={
            "value": 0.35,
            "map_level": 0.5,
            "quantile": 0.99,
            "count": 19,
            "images": "held-out normal images",
        },
        preprocessing=preprocessing(8, 1),
        training={},
    )
    return folder


@pytest.fixture
def toy_run(toy_run_folder: Path) -> Run:
    return load_run(toy_run_folder, "cpu")


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Ten images of several sizes and kinds in two folders that share file names."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "parts"
    for index in range(10):
        kind = ("good", "torn")[index % 2]
        size = (20 + index, 30) if index < 8 else (20 + index, 30, 3)
        pixels = rng.integers(0, 60 + 20 * index, size, dtype=np.uint8)
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / kind / f"{index // 2}.png")
    return folder
