"""Training: images in, a run folder out.

normal images ─┬─ to train on ── Lightning ── weights ─┐
               └─ held out ─────────── scores ── threshold ── run folder of a detector

images (and labels) ──────────── Lightning ── weights ─────── run folder of an extractor
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from memad_fast.data import AdaptationExamples, Dataset, Examples, Images, preprocessing, split_normals
from memad_fast.models.base import AnomalyModel, Trainable, TrainingSettings
from memad_fast.scoring.indexes import IndexChoice, check_indexes, closing_indexes, start_indexes
from memad_fast.scoring.run import Run, TrainedRun, load_extractor, load_run, resolve_device, save_run

if TYPE_CHECKING:
    from memad_fast.scoring.training import Plan

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
# With fewer normal images than this, none can be spared for the threshold.
FEWEST_TO_SPLIT = 10
# A threshold from fewer held-out images than this comes with a warning.
FEWEST_TO_TRUST = 20
# What fit itself tells Lightning's Trainer; everything else may be passed on.
_OURS = frozenset(
    [
        "accumulate_grad_batches",
        "callbacks",
        "enable_checkpointing",
        "enable_model_summary",
        "enable_progress_bar",
        "limit_train_batches",
        "logger",
        "max_epochs",
        "max_steps",
        "max_time",
        "precision",
        "use_distributed_sampler",
    ]
)


def fit(
    model: AnomalyModel,
    data: Dataset,
    out: str | os.PathLike[str],
    *,
    settings: TrainingSettings,
    epochs: int | None = None,
    max_minutes: float | None = None,
    device: str = "auto",
    precision: str = "32-true",
    seed: int = 0,
    validation_fraction: float = 0.15,
    quantile: float = 0.99,
    resume: bool = True,
    quiet: bool = False,
    checkpoint_seconds: float = 30.0,
    trainer_options: Mapping[str, Any] | None = None,
    index: IndexChoice | None = None,
) -> Run:
    """Train ``model`` on the normal images of ``data``, set its threshold, write the run to ``out`` and open it.

    Adam minimises the model's objectives, stage by stage; Lightning runs the loop. ``out`` gets ``model.safetensors``,
    ``config.json`` and ``log/metrics.csv`` (one row an epoch). A run that is there already is replaced once the new
    one is whole.

    The threshold is the ``quantile`` of the scores of held-out normal images, taken upward to a score that occurs; so
    for up to 100 of them the 0.99 quantile is the largest. An image is an anomaly if its score is greater. With fewer
    than 10 normal images, or ``validation_fraction`` 0, nothing is held out: the threshold comes from the training
    images, which makes it too low for unseen ones, and the run says so in ``warnings``. It also says so if fewer than
    20 were held out.

    An unfinished training, stopped by ``max_minutes`` or interrupted, leaves ``out/resume.safetensors``; the same
    call goes on from there. On a CPU the result is the same as without the interruption. More ``epochs`` may be asked
    for than at first.

    Args:
        model: built by the caller, who seeds for its initial weights (``torch.manual_seed(seed)``).
        data: what ``memad_fast.data.open_data`` or ``from_arrays`` gives, in the model's image size and channels.
            Decoded images are kept in memory up to 2 GiB, else decoded again in every epoch.
        out: the run folder; made if need be.
        settings: learning rate, betas, batch size, and epochs unless ``epochs`` is given. The batch size is that of all
            devices together. A last batch of one image is left out where the model has BatchNorm.
        epochs: passes over the training images.
        max_minutes: stop at the first step to end after this time; the threshold is set and the run saved all the same.
            Each stage has its share of the time and makes at least one step; a later call goes on with the first stage
            that was cut short, and does those after it again.
        device: "auto" (a CUDA device where there is one, else the CPU), "cpu", "cuda", "cuda:1".
        precision: Lightning's "32-true", "bf16-mixed" or "16-mixed", for training; weights and scores are float32.
        seed: of the images' order, the split, and all noise.
        validation_fraction: share of the normal images that is held out, in [0, 1).
        quantile: of their scores, in (0, 1].
        resume: go on where an unfinished training in ``out`` stopped; False starts anew.
        quiet: no progress bar.
        checkpoint_seconds: time between checkpoints for resuming.
        trainer_options: passed on to ``lightning.Trainer``, as ``{"devices": 2}``. Several devices train by DDP: each
            process runs the calling script, and all return the same run. Every batch is shared among them.
        index: what is to hold a PatchCore's bank, in a folder of the run: "exact" (``ExactIndex``), a factory string of
            FAISS, or a function of D and a folder, as ``lambda dim, path: ExactIndex(dim, dtype=torch.float16,
            path=path)``. It is saved with every checkpoint; a training that goes on finds each patch in it once. Of an
            index that the model was given with its patches the run gets a copy; one that is in RAM alone is saved there
            itself and closed. In one process only.

    Raises:
        DataError: no normal images. ImageError: a training image cannot be read; it is named.
        TrainingError: a loss is NaN or infinite; the message names epoch and step, and no run is written.
        RunError: ``out/resume.safetensors`` is damaged or belongs to another training.
        ValueError: an argument is out of its range, or data and model differ in size or channels.

    Cost: memory for the decoded images and three times the weights.

    Example::

        model = PMB(PMB.presets()["digits"].config)
        run = fit(model, open_data("digits", image_size=32, normal_class=0), "runs/zero",
                  settings=PMB.presets()["digits"].training)
        run.model.score(images).image_score > run.threshold
    """
    deadline = _deadline(max_minutes)
    if not 0.0 < quantile <= 1.0:
        raise ValueError(f"quantile: expected more than 0 and at most 1, got {quantile}")
    _check_size(model, data.image_size, data.channels)
    images = data.train
    train_indices, held_out = _split(len(images), validation_fraction, seed)

    from memad_fast.scoring.training import TrainingImages

    def threshold() -> dict[str, Any]:
        source = "held-out normal images" if held_out else "training images"
        indices = held_out or train_indices
        return {**calibrate(model, images, indices, quantile, batch_size=settings.batch_size), "images": source}

    _train(
        model,
        TrainingImages(images, train_indices),
        Path(out),
        threshold,
        settings=settings,
        epochs=epochs,
        deadline=deadline,
        device=device,
        precision=precision,
        seed=seed,
        resume=resume,
        quiet=quiet,
        checkpoint_seconds=checkpoint_seconds,
        trainer_options=trainer_options,
        recorded={"validation_fraction": validation_fraction},
        source={"name": data.name, **data.source},
        warnings=_warnings(len(held_out), len(train_indices)),
        index=index,
    )
    return load_run(out, device)


def fit_extractor(
    extractor: Trainable,
    data: Images | AdaptationExamples,
    out: str | os.PathLike[str],
    *,
    settings: TrainingSettings,
    epochs: int | None = None,
    max_minutes: float | None = None,
    device: str = "auto",
    precision: str = "32-true",
    seed: int = 0,
    resume: bool = True,
    quiet: bool = False,
    checkpoint_seconds: float = 30.0,
    trainer_options: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
) -> TrainedRun:
    """Train a structure extractor on all of ``data``, write its run to ``out`` and open it.

    As ``fit``, which says what the other arguments are, but for the threshold: an extractor scores nothing.

    Args:
        extractor: an ``EdgeExtractor`` or a ``SemanticExtractor``, built by the caller, who seeds for its weights.
        data: images for the one, as ``open_data(…).train``; ``AdaptationExamples`` for the other.
        source: what the run is to record of the data.

    Raises:
        What ``fit`` raises.
    """
    deadline = _deadline(max_minutes)
    _check_size(extractor, data.image_size, data.channels)

    from memad_fast.scoring.training import TrainingImages

    _train(
        extractor,
        TrainingImages(data, range(len(data))) if isinstance(data, Images) else data,
        Path(out),
        None,
        settings=settings,
        epochs=epochs,
        deadline=deadline,
        device=device,
        precision=precision,
        seed=seed,
        resume=resume,
        quiet=quiet,
        checkpoint_seconds=checkpoint_seconds,
        trainer_options=trainer_options,
        source=source,
    )
    return load_extractor(out, device)


def _train(
    model: Trainable,
    examples: Examples,
    folder: Path,
    threshold: Callable[[], Mapping[str, Any]] | None,
    *,
    settings: TrainingSettings,
    epochs: int | None,
    deadline: float | None,
    device: str,
    precision: str,
    seed: int,
    resume: bool,
    quiet: bool,
    checkpoint_seconds: float,
    trainer_options: Mapping[str, Any] | None,
    recorded: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
    warnings: list[str] | None = None,
    index: IndexChoice | None = None,
) -> None:
    """Train what is left to train, then write the run; in several processes, the first of them writes."""
    options = _trainer_options(device, precision, trainer_options)
    epochs = settings.epochs if epochs is None else epochs
    if epochs < 1:
        raise ValueError(f"epochs: expected at least 1, got {epochs}")
    if settings.batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {settings.batch_size}")

    import lightning

    from memad_fast.scoring import training
    from memad_fast.scoring.resume import RESUME_FILE, Checkpoint, load_checkpoint

    if index is not None or model.indexes:
        _check_alone(options)
        check_indexes(folder, model, index)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / RESUME_FILE
    identity = _identity(model, examples, settings, precision, seed) | _index_in_words(model, index)
    plans = _plans(model, len(examples), settings.batch_size, epochs, seed)
    with closing_indexes(folder, model):
        with _lightning_without_advice():
            lightning.seed_everything(seed, workers=True, verbose=False)
            model.train()
            if resume and checkpoint.exists():
                resumed = load_checkpoint(checkpoint, model, identity)
            else:
                resumed = Checkpoint()
                start_indexes(folder, model, index)
            finished = training.train(
                model,
                examples,
                settings,
                plans,
                resumed,
                folder,
                checkpoint,
                identity,
                seconds=None if deadline is None else deadline - time.monotonic(),
                precision=precision,
                quiet=quiet,
                checkpoint_seconds=checkpoint_seconds,
                trainer_options=options,
            )
        progress = resumed.progress
        if not _is_main_process():
            torch.distributed.barrier()
            return

        model.to(resolve_device(device)).eval()
        save_run(
            folder,
            model,
            threshold=None if threshold is None else threshold(),
            preprocessing=preprocessing(examples.image_size, examples.channels, examples.resize),
            training={
                "optimizer": "Adam",
                "learning_rate": settings.learning_rate,
                "betas": list(settings.betas),
                "batch_size": settings.batch_size,
                "epochs": epochs,
                **_told(progress.done),
                "stopped_by": "epochs" if finished else "max_minutes",
                "minutes": round(progress.seconds / 60, 3),
                "stages": progress.done,
                "images": len(examples),
                "seed": seed,
                "precision": precision,
                "device": str(resolve_device(device)),
                **(recorded or {}),
            },
            data=source,
            warnings=warnings,
        )
        if finished:
            checkpoint.unlink(missing_ok=True)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()


def calibrate(
    model: AnomalyModel, images: Images, indices: Sequence[int], quantile: float, *, batch_size: int
) -> dict[str, Any]:
    """The threshold from the scores of normal images: their ``quantile``, taken upward to a score that occurs.

    "map_level" is the same quantile of the images' largest map values.

    Raises:
        TrainingError: a score or a map is NaN or infinite; the image is named.
    """
    device = model.device
    scores, peaks = [], []
    for batch in images.batches(batch_size, indices):
        result = model.score(batch.images.to(device))
        scores.append(result.image_score.double().cpu())
        peaks.append(result.anomaly_map.flatten(1).amax(dim=1).double().cpu())
    values, highest = torch.cat(scores).numpy(), torch.cat(peaks).numpy()
    (bad,) = np.nonzero(~np.isfinite(values) | ~np.isfinite(highest))
    if len(bad):
        from memad_fast.scoring.training import TrainingError

        raise TrainingError(
            f"the trained model gives {images.names[indices[bad[0]]]} the score {values[bad[0]]} and a largest map"
            f" value of {highest[bad[0]]}; no run was written"
        )
    return {
        "value": float(np.quantile(values, quantile, method="higher")),
        "map_level": float(np.quantile(highest, quantile, method="higher")),
        "quantile": quantile,
        "count": len(values),
        "scores": {
            "min": float(values.min()),
            "median": float(np.median(values)),
            "mean": float(values.mean()),
            "max": float(values.max()),
        },
    }


def _trainer_options(device: str, precision: str, passed: Mapping[str, Any] | None) -> dict[str, Any]:
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    passed = dict(passed or {})
    if taken := sorted(_OURS & passed.keys()):
        raise ValueError(f"trainer_options: fit sets {', '.join(taken)} itself")
    resolved = resolve_device(device)
    if resolved.type == "cpu" and precision == "16-mixed":  # which Lightning would make bf16-mixed of
        raise ValueError("precision: 16-mixed needs a GPU; a CPU trains in 32-true or bf16-mixed")
    if resolved.type == "cpu":
        where: dict[str, Any] = {"accelerator": "cpu", "devices": 1}
    elif resolved.type == "cuda":
        where = {"accelerator": "gpu", "devices": [resolved.index or 0]}
    else:
        where = {"accelerator": resolved.type, "devices": 1}
    devices = passed.get("devices", 1)
    if type(devices) is int and devices < 1 and devices != -1:
        raise ValueError(f"devices: expected at least 1, or -1 for all, got {devices}")
    several = {"strategy": "ddp"} if devices != 1 else {}
    return {**where, **several, "precision": precision, **passed}


def _check_alone(options: Mapping[str, Any]) -> None:
    devices = options["devices"]
    if options.get("num_nodes", 1) != 1 or (len(devices) if isinstance(devices, list) else devices) != 1:
        raise ValueError(f"index: expected one process, since a folder has one writer, got devices={devices}")


def _index_in_words(model: Trainable, index: IndexChoice | None) -> dict[str, str]:
    """For the identity of a training; nothing without an index."""
    if index is not None:
        return {"index": index if isinstance(index, str) else "made by a function"}
    return {"index": "given"} if model.indexes else {}


def _check_size(model: Trainable, image_size: int, channels: int) -> None:
    expected, got = (model.config.channels, model.config.image_size), (channels, image_size)
    if expected != got:
        raise ValueError(
            f"data: the model takes {expected[0]} channels at {expected[1]} pixels, the data gives {got[0]} at {got[1]}"
        )


def _deadline(max_minutes: float | None) -> float | None:
    """On the monotonic clock."""
    if max_minutes is None:
        return None
    if not (max_minutes > 0 and math.isfinite(max_minutes)):
        raise ValueError(f"max_minutes: expected more than 0, got {max_minutes}")
    return time.monotonic() + 60 * max_minutes


def _split(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and indices held out; the latter may be empty."""
    return split_normals(count, fraction if count >= FEWEST_TO_SPLIT else 0.0, seed)


def _warnings(held_out: int, trained: int) -> list[str]:
    if not held_out:
        return [
            f"No normal image was held out: the threshold comes from the {trained} training images themselves, so"
            " unseen normal images will often exceed it. Add normal images."
        ]
    if held_out < FEWEST_TO_TRUST:
        return [f"The threshold rests on only {held_out} held-out normal images. Add normal images."]
    return []


def _identity(
    model: Trainable, examples: Examples, settings: TrainingSettings, precision: str, seed: int
) -> dict[str, Any]:
    """What must be unchanged for an interrupted training to go on. The number of epochs may grow."""
    from memad_fast.scoring.resume import digest

    parts = model.given_parts if isinstance(model, AnomalyModel) else {}
    return {
        "model": model.name,
        "model config": dataclasses.asdict(model.config),
        "given parts (hash of their weights)": {name: digest(part.state_dict())[:16] for name, part in parts.items()},
        "learning rate": settings.learning_rate,
        "betas": list(settings.betas),
        "batch size": settings.batch_size,
        "precision": precision,
        "seed": seed,
        "resize": examples.resize,
        "training images (count, hash of their names)": [
            len(examples.names),
            hashlib.sha256("\0".join(examples.names).encode()).hexdigest()[:16],
        ],
    }


def _told(stages: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The stage that stands for the whole training: the last that had losses."""
    backwards = list(stages.values())[::-1]
    return next((stage for stage in backwards if stage["losses"]), backwards[0])


def _plans(model: Trainable, images: int, batch_size: int, epochs: int, seed: int) -> list[Plan]:
    """The steps of every stage. Stages draw their random numbers from seeds of their own."""
    from memad_fast.scoring.training import Plan

    return [
        Plan(images, batch_size, stage.epochs or epochs, seed + (number << 32), _has_batch_norm(model))
        for number, stage in enumerate(model.stages())
    ]


def _has_batch_norm(model: torch.nn.Module) -> bool:
    return any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _is_main_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


@contextmanager
def _lightning_without_advice() -> Iterator[None]:
    """Without its lines on the hardware it found, and its advice on workers that do not apply here."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            yield
    finally:
        logger.setLevel(level)
