"""Trainings of every detector that take a second: tiny networks on generated images, in this process or in others.

Other processes come from a fork server that has loaded torch and Lightning, so that each costs no more than a fork.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from memad_fast.data import Dataset, from_arrays
from memad_fast.models import MODELS, AnomalyModel, Objective, Preset, Scores, Stage, TrainingSettings
from memad_fast.scoring import Run, fit
from memad_fast.scoring.training import Recorder

# What makes the "digits" presets smaller still; a model that is not here is trained in its preset.
_SMALLER: dict[str, dict[str, Any]] = {
    "pmb": {"image_size": 16, "widths": (4, 8), "items": (6, 6), "partitions": (2, 1)},
    "patchcore": {"image_size": 16, "widths": (4, 8, 8)},
    "memstc": {"widths": (4, 8), "edge_width": 2, "critic_width": 2, "items": 600},
    "salad": {"image_size": 16, "latent": 8, "width": 8, "most_width": 16},
    "simsid": {"image_size": 16, "dim": 8, "widths": (4, 8), "k": 2},
}
BATCH, EPOCHS, IMAGES = 8, 2, 20

State = dict[str, torch.Tensor]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["memad_fast.scoring.training", "memad_fast.models"])


@dataclasses.dataclass(frozen=True)
class TurnsConfig:
    image_size: int = 8
    channels: int = 1


class Turns(AnomalyModel):
    """Takes its turns without noise or BatchNorm: what one process computes, several compute too, up to rounding.

    A maker and a critic train first, one after the other; what they make of each image is remembered in order. Then the
    memory is averaged, and last a network that the first stage did not use learns from it.
    """

    name: ClassVar[str] = "turns"
    Config: ClassVar[type] = TurnsConfig

    def __init__(self, config: TurnsConfig) -> None:
        super().__init__(config)
        self.maker, self.critic = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3)
        self.last = nn.Linear(1, 1)
        self.register_buffer("memory", torch.zeros(6, 64))
        self.register_buffer("noise", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(1))

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        return {"digits": Preset(TurnsConfig(), TrainingSettings(learning_rate=0.01, batch_size=5, epochs=2))}

    def stages(self) -> tuple[Stage, ...]:
        makers = Objective("maker", list(self.maker.parameters()), self._maker_losses)
        critics = Objective("critic", list(self.critic.parameters()), self._critic_losses)
        return (
            Stage("contest", (makers, critics), observe=self._remember),
            Stage("mean", epochs=1, observe=self._add),
            Stage("last", (Objective("last", list(self.last.parameters()), self._last_losses),)),
        )

    def _maker_losses(self, images: Tensor) -> dict[str, Tensor]:
        made = self.maker(images)
        return {"total": (made - images).square().mean() - 0.1 * self.critic(made).mean()}

    def _critic_losses(self, images: Tensor) -> dict[str, Tensor]:
        made = self.maker(images)
        return {"total": self.critic(made).mean() - self.critic(images).mean() + self.critic(images).square().mean()}

    def _last_losses(self, images: Tensor) -> dict[str, Tensor]:
        return {"total": (self.last(self.mean) - images.flatten(1).mean(dim=1)).square().mean()}

    def _remember(self, images: Tensor) -> None:
        self.memory.copy_(torch.cat((self.memory, self.maker(images).flatten(1)))[-6:])
        self.noise += torch.rand(())

    def _add(self, images: Tensor) -> None:
        self.mean += images.mean()

    def _score(self, images: Tensor) -> Scores:
        error = (self.maker(images) - images).abs()
        return Scores(error.flatten(1).mean(dim=1), error, images, {"error": error.flatten(1).mean(dim=1)})


def turns(*, seed: int = 0) -> Turns:
    """An untrained one."""
    torch.manual_seed(seed)
    return Turns(TurnsConfig())


def tiny_config(name: str, **changes: Any) -> Any:
    """The "digits" preset's config, made smaller."""
    return dataclasses.replace(MODELS[name].presets()["digits"].config, **{**_SMALLER.get(name, {}), **changes})


def tiny_model(name: str, *, seed: int = 0, **changes: Any) -> AnomalyModel:
    """An untrained detector."""
    config = tiny_config(name, **changes)
    torch.manual_seed(seed)
    return MODELS[name](config)


def tiny_settings(name: str, **changes: Any) -> TrainingSettings:
    """The "digits" preset's settings with small batches and few epochs."""
    return dataclasses.replace(
        MODELS[name].presets()["digits"].training, **{"batch_size": BATCH, "epochs": EPOCHS, **changes}
    )


def gradients(count: int, size: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """``[count, size, size(, 3)]``: bright towards one corner, a little different in each image."""
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.linspace(0.1, 0.4, size), np.linspace(0.1, 0.4, size))
    images = ramp * rng.uniform(0.9, 1.1, (count, 1, 1)) + rng.uniform(0, 0.03, (count, size, size))
    return np.repeat(images[..., None], channels, axis=3) if channels > 1 else images


def parts(size: int, *, train: int = IMAGES, channels: int = 1) -> Dataset:
    """Gradients to train on; of those to test every second one has a checked square, whose mask is known."""
    test = gradients(16, size, channels, seed=1)
    masks = np.zeros((16, size, size), bool)
    edge, rng = size // 4, np.random.default_rng(2)
    checks = np.add.outer(np.arange(edge), np.arange(edge)) % 2
    for index in range(8, 16):
        top, left = rng.integers(0, size - edge, 2)
        square = np.s_[index, top : top + edge, left : left + edge]
        test[square] = checks if channels == 1 else checks[..., None]
        masks[square] = True
    return from_arrays(
        gradients(train, size, channels), test, [0] * 8 + [1] * 8, masks=masks, defects=["good"] * 8 + ["square"] * 8
    )


def fit_tiny(name: str, out: Path, *, model: AnomalyModel | None = None, **options: Any) -> Run:
    """Train one of ``MODELS`` for a moment."""
    model = tiny_model(name) if model is None else model
    data = options.pop("data", None) or parts(model.config.image_size, channels=model.config.channels)
    return fit(model, data, out, **{"settings": tiny_settings(name), "device": "cpu", "quiet": True, **options})


@contextmanager
def ended_after(steps: int, end: Callable[[], None]) -> Iterator[list[int]]:
    """Call ``end`` once so many steps of all stages are done; checkpoints are as the caller of ``fit`` asked.

    Gives how many steps were done, in a list.
    """
    done, original = [0], Recorder.on_train_batch_end

    def count(self: Recorder, *arguments: Any) -> None:
        original(self, *arguments)
        done[0] += 1
        if done[0] == steps:
            end()

    with mock.patch.object(Recorder, "on_train_batch_end", count):
        yield done


def unplug() -> None:
    """End a training as an unforeseen error does."""
    raise InterruptedError


def killed_after(name: str, out: Path, steps: int) -> int | None:
    """Train in another process that kills itself (SIGKILL) once so many steps are done; its exit code."""
    return run_together([(_train_and_die, (name, out, steps))])[0]


def trained_together(makers: Sequence[Callable[[], AnomalyModel]], out: Path, **options: Any) -> list[State]:
    """The states that processes have after training one model by DDP: each made its own, and trained all the same."""
    count = len(makers)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out.mkdir(parents=True, exist_ok=True)
    tasks = [(_train_as_one_of, (make, out, rank, count, port, options)) for rank, make in enumerate(makers)]
    codes = run_together(tasks)
    assert codes == [0] * count, f"exit codes {codes}"
    return [safetensors.torch.load_file(out / f"rank{rank}.safetensors") for rank in range(count)]


def run_together(tasks: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> list[int | None]:
    """Exit codes of functions that run at once, each in a process of its own."""
    processes = [_context.Process(target=function, args=arguments) for function, arguments in tasks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
    assert not stuck, "a process neither ended nor failed within two minutes"
    return [process.exitcode for process in processes]


def _train_and_die(name: str, out: Path, steps: int) -> None:
    torch.set_num_threads(1)
    with ended_after(steps, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        fit_tiny(name, out, checkpoint_seconds=0.0)


def _train_as_one_of(
    make: Callable[[], AnomalyModel], out: Path, rank: int, count: int, port: int, options: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    model = make()
    with mock.patch.dict(MODELS, {model.name: type(model)}):
        fit_tiny(model.name, out, model=model, trainer_options={"devices": count}, **options)
    state = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(state, out / f"rank{rank}.safetensors")
