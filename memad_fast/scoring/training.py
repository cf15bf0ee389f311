"""The training loop, run by Lightning: devices, precision and the loop are Lightning's; what is here is the model's
stages and their objectives, the order of the images, the log, the checkpoints and the time limit.

Lightning sees each stage as one long epoch of all the steps that are left, because its own way to resume goes through
pickled checkpoints. Step s of a stage takes its images and its random numbers from (seed, stage, s) alone; so a
training that was interrupted at any step, and goes on from there, does what it would have done without.

With several devices each process trains on its share of every batch, and gradients are averaged as if the batch were
one; what a stage observes is the whole batch, in every process. So memories hold what one process would have written,
the same everywhere, and nothing in a model needs to know of other processes.
"""

from __future__ import annotations

import csv
import random
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from memad_fast._progress import progress_bar, untold
from memad_fast.data import Examples, Images
from memad_fast.models.base import Objective, Stage, Trainable, TrainingSettings
from memad_fast.scoring.resume import Checkpoint, Progress, save_checkpoint

# Decoded training images are kept in memory up to this size, else decoded again in every epoch.
CACHE_BYTES = 2 << 30
# Losses are looked at this often, so that a GPU need not be waited for after every step.
STEPS_BETWEEN_LOOKS = 16


class TrainingError(RuntimeError):
    """The training cannot go on. The message names the epoch and the step."""


@dataclass(frozen=True)
class Plan:
    """The steps of one stage."""

    images: int
    batch_size: int
    epochs: int
    seed: int
    drop_single: bool  # leave out a last batch of one image, which BatchNorm cannot use well

    @property
    def epoch_steps(self) -> int:
        """Steps of one epoch."""
        full, rest = divmod(self.images, self.batch_size)
        return full + (rest > 1 or (rest == 1 and not (self.drop_single and full)))

    @property
    def steps(self) -> int:
        """Steps of all epochs."""
        return self.epochs * self.epoch_steps

    def batch_images(self, step: int) -> int:
        """Images of the batch of a step: fewer at an epoch's end."""
        return min(self.batch_size, self.images - step % self.epoch_steps * self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The images' order in an epoch, from (seed, epoch) alone."""
        mixed = np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0]
        return torch.randperm(self.images, generator=torch.Generator().manual_seed(int(mixed >> np.uint64(1))))


class Batches(Sampler[list[int]]):
    """Indices of every batch from ``start`` on: whole, or this process's share. What the examples draw at random when
    they are asked for a batch comes, like its indices, from the step alone.
    """

    def __init__(self, plan: Plan, start: int, *, whole: bool = False) -> None:
        self.plan = plan
        self.start = start
        self.whole = whole

    def __len__(self) -> int:
        return self.plan.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        order, epoch = None, -1
        for step in range(self.start, self.plan.steps):
            if order is None or step // self.plan.epoch_steps != epoch:
                epoch = step // self.plan.epoch_steps
                order = self.plan.order(epoch)
            first = step % self.plan.epoch_steps * self.plan.batch_size
            batch = order[first : first + self.plan.batch_size]
            rank, world = _rank()
            seed_step(self.plan.seed, step, stream=1 + world + (0 if self.whole else rank))
            yield (batch if self.whole else _share(batch)).tolist()


class TrainingImages(Examples):
    """The chosen images of a set, as batches: decoded once and kept where they fit into ``CACHE_BYTES``."""

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        self.images = images
        self.indices = list(indices)
        super().__init__([images.names[index] for index in self.indices], images.image_size, images.channels)
        self.resize = images.resize
        size = 4 * len(self.indices) * images.channels * images.image_size**2
        self.cache = self._decode(self.indices) if size <= CACHE_BYTES else None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, positions: list[int]) -> Tensor:
        """``[B, C, H, W]``: DataLoader asks for a batch at once."""
        if self.cache is not None:
            return self.cache[positions]
        return self._decode([self.indices[position] for position in positions])

    def _decode(self, indices: Sequence[int]) -> Tensor:
        with ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
            return torch.stack(list(pool.map(self.images.image, indices)))


class Detector(lightning.LightningModule):
    """One stage of the model as Lightning drives it."""

    def __init__(
        self,
        model: Trainable,
        stage: Stage,
        optimizers: Sequence[torch.optim.Optimizer],
        plan: Plan,
        start: int,
        settings: TrainingSettings,
        clip: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.stage = stage
        self.step_optimizers = list(optimizers)
        self.plan = plan
        self.start = start
        self.settings = settings
        self.clip = clip

    def training_step(self, batch: Any, batch_index: int) -> dict[str, Any]:
        """One batch, with random numbers that depend on the seed, the stage and the step only."""
        step = self.start + batch_index
        parts: dict[str, Tensor] = {}
        if self.stage.objectives:
            share = batch if self.stage.observe is None else _share(batch)
            seed_step(self.plan.seed, step, stream=1 + _rank()[0])
            for objective, optimizer in zip(self.stage.objectives, self._lightning_optimizers(), strict=True):
                self._minimise(objective, optimizer, share, step, parts)
        if self.stage.observe is not None:
            seed_step(self.plan.seed, step, stream=0)  # the same in every process
            with torch.no_grad():
                self.stage.observe(batch)
        return {"parts": parts}

    def on_train_end(self) -> None:
        """Every process goes on with the first one's running statistics, as DDP has it at the start of a step."""
        if _rank()[1] > 1:
            for buffer in self.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimisers, with their moments where a training goes on."""
        return self.step_optimizers

    def _lightning_optimizers(self) -> list[Any]:
        found = self.optimizers()
        return found if isinstance(found, list) else [found]

    def _minimise(self, objective: Objective, optimizer: Any, batch: Any, step: int, parts: dict[str, Tensor]) -> None:
        alone = len(self.stage.objectives) == 1
        if not alone:
            self.toggle_optimizer(optimizer)  # no gradients for what it may not change
        losses = objective.losses(batch)
        parts |= {name if alone else f"{objective.name}.{name}": value.detach() for name, value in losses.items()}
        for group in optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * _decay(step, self.plan.steps, self.settings.constant_share)
        optimizer.zero_grad()
        self.manual_backward(losses["total"] * self._weight(step))
        if self.clip:
            self.clip_gradients(optimizer, **self.clip)
        optimizer.step()
        if not alone:
            self.untoggle_optimizer(optimizer)

    def _weight(self, step: int) -> float:
        """Of this process's mean loss, so that the mean over the processes is that over the batch's images."""
        (rank, world), count = _rank(), self.plan.batch_images(step)
        return len(range(rank, count, world)) * world / count


class StageDDP(DDPStrategy):
    """Gradients averaged over the processes, if the stage has any."""

    def __init__(self, stage: Stage) -> None:
        # Where objectives take turns, each leaves the parameters of the others without gradients.
        super().__init__(find_unused_parameters=len(stage.objectives) > 1)
        self.stage = stage

    def configure_ddp(self) -> None:
        """Wrap the model where there is something to average."""
        if self.stage.objectives:
            super().configure_ddp()


def _decay(step: int, steps: int, constant_share: float) -> float:
    """Factor of the learning rate: 1, then falling linearly so that the step after the last would have 0."""
    falling = steps * (1.0 - constant_share)
    return min(1.0, (steps - step) / falling) if falling > 0 else 1.0


class Recorder(Callback):
    """Counts, logs, looks for losses that are not finite, and saves checkpoints."""

    def __init__(
        self,
        plan: Plan,
        progress: Progress,
        log: Path,
        checkpoint: Path | None,
        identity: Mapping[str, Any],
        pause: float,
    ) -> None:
        self.plan = plan
        self.progress = progress
        self.epoch_log = EpochLog(log, progress.step // plan.epoch_steps)
        self.checkpoint = checkpoint
        self.identity = identity
        self.pause = pause
        self.unseen: list[dict[str, Tensor]] = []
        self.last_losses: dict[str, float] = {}

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Start the clocks."""
        self.clock = self.saved = time.monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step; at an epoch's end write the log; when it is time, save."""
        self.progress.step += 1
        self.unseen.append(outputs["parts"])
        ends_epoch = self.progress.step % self.plan.epoch_steps == 0
        if ends_epoch or len(self.unseen) == STEPS_BETWEEN_LOOKS:
            self.look()
        if ends_epoch:
            self._end_epoch(trainer.is_global_zero)
        if time.monotonic() - self.saved >= self.pause:
            self.save(trainer)

    def look(self) -> None:
        """Add the new losses to the epoch's sums.

        Raises:
            TrainingError: the total of a step is NaN or infinite.
        """
        first = self.progress.step - len(self.unseen)
        names = list(self.unseen[0]) if self.unseen else []
        rows = [torch.stack([parts[name].float() for name in names]) for parts in self.unseen] if names else []
        for offset, row in enumerate(torch.stack(rows).tolist() if names else []):  # waits for a GPU once
            values = dict(zip(names, row, strict=True))
            totals = [value for name, value in values.items() if name.endswith("total")]
            if not np.isfinite(totals).all():
                epoch, batch = divmod(first + offset, self.plan.epoch_steps)
                raise TrainingError(
                    f"the loss became {sum(totals)} in epoch {epoch + 1}, step {batch + 1} of"
                    f" {self.plan.epoch_steps} (losses {values}); nothing was saved from there on. Try a smaller"
                    " learning rate, or 32-bit precision"
                )
            for name, value in values.items():
                self.progress.sums[name] = self.progress.sums.get(name, 0.0) + value
            self.progress.batches += 1
        self.unseen.clear()
        if self.progress.batches:
            self.last_losses = {name: total / self.progress.batches for name, total in self.progress.sums.items()}

    def save(self, trainer: lightning.Trainer) -> None:
        """Write a checkpoint of the state after the last step, where there is to be one."""
        self.look()
        self._count_seconds()
        begun = time.monotonic()
        if trainer.is_global_zero and self.checkpoint is not None:
            module = trainer.lightning_module
            assert isinstance(module, Detector)
            save_checkpoint(
                self.checkpoint,
                module.model,
                _by_name(module.stage, module.step_optimizers),
                self.progress,
                self.identity,
            )
        self.saved = time.monotonic()
        # A large model on a slow disk spends at most a twentieth of its time here.
        self.pause = max(self.pause, 20 * (self.saved - begun))

    def _end_epoch(self, writes: bool) -> None:
        self._count_seconds()
        epoch = self.progress.step // self.plan.epoch_steps
        if writes:
            self.epoch_log.append(epoch, self.progress.step, self.progress.seconds, self.last_losses)
        self.progress.sums, self.progress.batches = {}, 0

    def _count_seconds(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self.clock
        self.clock = now


class EpochLog:
    """A CSV file with one row an epoch. A training that goes on keeps the rows before, and drops what it repeats."""

    def __init__(self, path: Path, epochs_done: int) -> None:
        self.path = path
        self.epochs_done = epochs_done
        self.started = False

    def append(self, epoch: int, step: int, seconds: float, losses: Mapping[str, float]) -> None:
        """Write the row of one epoch: mean losses over its batches."""
        row = {"epoch": epoch, "step": step, "seconds": round(seconds, 3), **losses}
        if not self.started:
            self._start(list(row))
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(row.values())

    def _start(self, header: list[str]) -> None:
        rows: list[list[str]] = []
        if self.epochs_done and self.path.is_file():
            with self.path.open(newline="") as file:
                rows = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= self.epochs_done]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        self.started = True


class ProgressBar(Callback):
    """One bar for the whole training, with the last look's loss."""

    def __init__(self, stage: str, plan: Plan, recorder: Recorder) -> None:
        self.stage = stage
        self.plan = plan
        self.recorder = recorder
        self.bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"),
            TimeRemainingColumn(), TextColumn("{task.fields[loss]}"),
        )  # fmt: skip

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Show the bar."""
        if trainer.is_global_zero:
            self.task = self.bar.add_task(
                self.stage, total=self.plan.steps, completed=self.recorder.progress.step, loss=""
            )
            self.bar.start()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move it on."""
        if trainer.is_global_zero:
            step, losses = self.recorder.progress.step, self.recorder.last_losses
            epoch = min(step // self.plan.epoch_steps + 1, self.plan.epochs)
            self.bar.update(
                self.task,
                completed=step,
                description=f"{self.stage}, epoch {epoch}/{self.plan.epochs}",
                loss=", ".join(f"{name} {value:.4g}" for name, value in losses.items() if name.endswith("total")),
            )

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Leave the bar as it is."""
        self.bar.stop()

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back."""
        self.bar.stop()


def train(
    model: Trainable,
    examples: Examples,
    settings: TrainingSettings,
    plans: Sequence[Plan],
    resumed: Checkpoint,
    folder: Path,
    checkpoint: Path,
    identity: Mapping[str, Any],
    *,
    seconds: float | None,
    precision: str,
    quiet: bool,
    checkpoint_seconds: float,
    trainer_options: Mapping[str, Any],
) -> bool:
    """Run the stages that are left, or as many steps of each as its share of ``seconds`` allows, but at least one.

    A stage whose time is up gives way to the next, so that the model can be used; the checkpoint stays at the first
    such stage. So a training that goes on from there ends like one that had the time. Returns whether every stage ran
    to its end. ``resumed.progress`` is brought up to date.

    Raises:
        TrainingError: a loss is not finite.
        ValueError: a strategy that would train in child processes, from which nothing comes back.
    """
    stages = model.stages()
    progress, begun, complete = resumed.progress, time.monotonic(), True
    for number in range(progress.stage, len(stages)):
        stage, plan = stages[number], plans[number]
        if number > progress.stage:
            progress.begin(number)
        if stage.begin is not None and progress.step == 0:
            stage.begin()
        optimizers = [_make_optimizer(objective, settings, precision) for objective in stage.objectives]
        for name, optimizer in _by_name(stage, optimizers).items():
            resumed.restore(name, optimizer)
        share = stage.time_share / sum(later.time_share for later in stages[number:])
        left = None if seconds is None else share * (seconds - (time.monotonic() - begun))
        log = folder / "log" / ("metrics.csv" if len(stages) == 1 else f"{stage.name}.csv")
        recorder = Recorder(plan, progress, log, checkpoint if complete else None, identity, checkpoint_seconds)
        complete &= progress.step >= plan.steps or _train_stage(
            model, stage, optimizers, examples, settings, plan, recorder, left, quiet, trainer_options
        )
        if stage.finish is not None:
            shows_bar = not quiet and _rank()[0] == 0
            with progress_bar(f"finishing {stage.name}") if shows_bar else nullcontext(untold) as tell:
                stage.finish(tell)
        resumed.forget()
        progress.done[stage.name] = {
            "epochs_done": round(progress.step / plan.epoch_steps, 3),
            "steps_done": progress.step,
            "losses": recorder.last_losses,
        }
    return complete


def _train_stage(
    model: Trainable,
    stage: Stage,
    optimizers: Sequence[torch.optim.Optimizer],
    examples: Examples,
    settings: TrainingSettings,
    plan: Plan,
    recorder: Recorder,
    seconds: float | None,
    quiet: bool,
    trainer_options: Mapping[str, Any],
) -> bool:
    """Run the steps that are left of one stage; whether all were run."""
    start = recorder.progress.step
    callbacks: list[Callback] = [recorder]
    if seconds is not None:
        # Not below a microsecond: with no time left at all, Timer would not allow the one step.
        callbacks.append(Timer(timedelta(seconds=max(seconds, 1e-6)), interval="step", verbose=False))
    if not quiet:
        callbacks.append(ProgressBar(stage.name, plan, recorder))
    clip = {name: value for name, value in trainer_options.items() if name.startswith("gradient_clip_")}
    options = {name: value for name, value in trainer_options.items() if name not in clip}
    if options.get("strategy") == "ddp":
        options["strategy"] = StageDDP(stage)
    trainer = lightning.Trainer(
        **options,
        callbacks=callbacks,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            "trainer_options: expected a strategy whose processes each run the calling script, as 'ddp', got one that"
            " trains in child processes (spawn, fork, notebook)"
        )
    loader = DataLoader(
        examples,
        batch_sampler=Batches(plan, start, whole=stage.observe is not None),
        collate_fn=_as_it_is,
        pin_memory=trainer.strategy.root_device.type == "cuda",
    )
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with _trainable(model, stage):
            trainer.fit(Detector(model, stage, optimizers, plan, start, settings, clip), loader)
    except SystemExit as stop:  # what Lightning makes of a KeyboardInterrupt, and it stops listening to further ones
        signal.signal(signal.SIGINT, on_interrupt)
        raise KeyboardInterrupt from stop
    model.to(trainer.strategy.root_device)  # Lightning leaves it on the CPU; what follows (a coreset) is slow there
    recorder.look()
    finished = recorder.progress.step == plan.steps
    if not finished:
        recorder.save(trainer)
    return finished


@contextmanager
def _trainable(model: Trainable, stage: Stage) -> Iterator[None]:
    """Parameters that no objective of the stage holds require no gradients meanwhile."""
    held = {id(parameter) for objective in stage.objectives for parameter in objective.parameters}
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in held]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _make_optimizer(objective: Objective, settings: TrainingSettings, precision: str) -> torch.optim.Optimizer:
    """Adam with the preset's settings."""
    # Fused: one pass over the memory. Lightning cannot unscale float16 gradients for clipping with it.
    return torch.optim.Adam(
        list(objective.parameters),
        lr=settings.learning_rate,
        betas=settings.betas,
        fused=precision != "16-mixed",
    )


def _by_name(stage: Stage, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, torch.optim.Optimizer]:
    return {objective.name: optimizer for objective, optimizer in zip(stage.objectives, optimizers, strict=True)}


def seed_step(seed: int, step: int, stream: int) -> None:
    """Seed every generator a model may draw from, for one step; streams are independent of each other."""
    torch_seed, numpy_seed = np.random.SeedSequence([seed, step, stream]).generate_state(2, np.uint32).tolist()
    # Not torch.manual_seed: where CUDA is not in use it records a stack trace each time, a millisecond.
    torch.default_generator.manual_seed(torch_seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(torch_seed)
    np.random.seed(numpy_seed)
    random.seed(numpy_seed)


def _rank() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _share(batch: Tensor) -> Tensor:
    """Every world_size-th image from this process's rank on; of too small a batch the first, which weighs nothing."""
    rank, world = _rank()
    return batch[rank::world] if rank < len(batch) else batch[:1]


def _as_it_is(batch: Any) -> Any:
    return batch
