"""One training and what it achieves, in a process of its own:

    python -m benchmarks.accuracy.experiment FOLDER [--until-stdin-ends]

reads ``FOLDER/experiment.json`` and writes ``FOLDER/row.json``. A one-class set is trained and tested once for each of
its classes, and its figures are their means. Started again after an interruption, it goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy import image_statistics
from benchmarks.accuracy.contenders import STATISTICS
from benchmarks.accuracy.results import hardware
from benchmarks.accuracy.sets import reduced
from benchmarks.accuracy.sheets import save_sheet
from memad_fast._atomic import write_json
from memad_fast.data import Dataset, open_data, split_normals
from memad_fast.data.dataset import NORMAL
from memad_fast.models import PMB
from memad_fast.scoring import Run, Setup, evaluate, fit, load_run, set_up
from memad_fast.scoring.evaluate import auroc
from memad_fast.scoring.fit import FEWEST_TO_SPLIT

HELD_OUT = 0.15
"""Share of the normal training images that the threshold comes from."""
STATISTICS_SIZE = 64
KEY = ("set", "system", "variant", "seed")
"""What two rows of a table differ in."""


@dataclass(frozen=True)
class Experiment:
    """What a row of a table is made from; every value is plain JSON."""

    set: str
    place: str
    classes: tuple[int, ...]
    system: str
    variant: str
    model: str
    options: Mapping[str, Any]
    preset: str
    settings: Mapping[str, Any]
    """Of the preset, all of them: a row made by another preset of this name is another row."""
    seed: int
    images: int | None
    """Training images to be seen, over all stages; None: as many as the preset's epochs make."""
    most_train: int | None
    most_test: int | None
    device: str
    sheet: bool

    @property
    def fingerprint(self) -> str:
        """The same for experiments whose figures must be the same."""
        content = {name: value for name, value in dataclasses.asdict(self).items() if name not in ("place", "sheet")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Row:
    """What came of it. Figures that are not defined, and all figures of a failure, are None."""

    set: str
    system: str
    variant: str
    seed: int
    images: int | None
    fingerprint: str
    image_auroc: float | None = None
    pixel_auroc: float | None = None
    pixel_aupro: float | None = None
    types: dict[str, float] = dataclasses.field(default_factory=dict)
    """Image AUROC of each defect type against all normal images; of a one-class set: with each class as the normal
    one."""
    recall: float | None = None
    false_alarms: float | None = None
    dead_rows: float | None = None
    """Largest share of reads of any memory that give all zeros."""
    preset: str = ""
    size: int | None = None
    channels: int | None = None
    trained_on: float | None = None
    """Normal images, without those held out for the threshold. This and the other counts are means over classes."""
    normal: float | None = None
    abnormal: float | None = None
    masks: float | None = None
    epochs: float | None = None
    """Of all stages that train."""
    steps: int | None = None
    seen: int | None = None
    """Training images seen."""
    parameters: int | None = None
    kept: int | None = None
    """Values in the model's file: weights, memories, banks."""
    seconds: float | None = None
    """Of training, by the clock, over all sittings."""
    cpu_seconds: float | None = None
    """Of training; None if it was interrupted."""
    error: str = ""
    hardware: str = ""


# How a one-class set's figures come from those of its classes: added up, or else averaged.
_ADDED = ("steps", "seen", "seconds", "cpu_seconds")
_ALIKE = ("preset", "size", "channels", "parameters", "kept", "hardware")


def run_experiment(experiment: Experiment, folder: Path) -> Row:
    """Train and test, or go on with it."""
    make = _of_statistics if experiment.model == STATISTICS else _of_model
    found = []
    for number, normal_class in enumerate(experiment.classes or (None,)):
        place = folder if normal_class is None else folder / f"class{normal_class}"
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "figures.json").exists():
            is_shown = experiment.sheet and number == len(experiment.classes) // 2
            figures = make(experiment, normal_class, place, folder / "sheet.png" if is_shown else None)
            write_json(place / "figures.json", figures)
        found.append(json.loads((place / "figures.json").read_text()))
    figures = found[0]
    if experiment.classes:
        figures = {name: _together(name, [each[name] for each in found]) for name in found[0] if name != "types"}
        aurocs = [each["image_auroc"] for each in found]
        figures["types"] = dict(zip(map(str, experiment.classes), aurocs, strict=True))
    return Row(**identity(experiment), **figures)


def identity(experiment: Experiment) -> dict[str, Any]:
    """The part of a row that is known beforehand."""
    names = ("set", "system", "variant", "seed", "images")
    return {**{name: getattr(experiment, name) for name in names}, "fingerprint": experiment.fingerprint}


def _together(name: str, values: Sequence[Any]) -> Any:
    if name in _ALIKE:
        return values[0]
    if any(value is None for value in values):
        return None
    total = sum(values)
    return total if name in _ADDED else total / len(values)


def _of_model(experiment: Experiment, normal_class: int | None, folder: Path, sheet: Path | None) -> dict[str, Any]:
    setup = set_up(
        experiment.model,
        experiment.place,
        normal_class=normal_class,
        preset=experiment.preset,
        options=experiment.options,
        seed=experiment.seed,
    )
    setup = dataclasses.replace(setup, data=_chosen(experiment, setup.data))
    run, cpu_seconds = _trained(experiment, setup, folder)
    metrics = evaluate(run, setup.data)
    if sheet is not None:
        save_sheet(run, setup.data, sheet)
    training = run.config["training"]
    stages = [stage for stage in training["stages"].values() if stage["losses"]]
    epochs = sum(stage["epochs_done"] for stage in stages)
    return {
        **_figures(metrics),
        "recall": metrics["recall"],
        "false_alarms": metrics["false_alarms"],
        "dead_rows": _dead_rows(run, setup.data),
        "preset": experiment.preset,
        "size": run.image_size,
        "channels": run.channels,
        "trained_on": training["images"],
        "epochs": epochs,
        "steps": sum(stage["steps_done"] for stage in stages),
        "seen": round(epochs * training["images"]),
        "parameters": sum(each.numel() for each in run.model.parameters()),
        "kept": sum(each.numel() for each in run.model.state_dict().values()),
        "seconds": round(60 * training["minutes"], 1),
        "cpu_seconds": cpu_seconds,
        "hardware": hardware(str(run.device)),
    }


def _trained(experiment: Experiment, setup: Setup, folder: Path) -> tuple[Run, float | None]:
    """The run, and what its training took if it was not interrupted."""
    out = folder / "run"
    if (out / "config.json").exists():
        return load_run(out, experiment.device), None
    is_resumed = (out / "resume.safetensors").exists()
    import memad_fast.scoring.training  # noqa: F401  (so that loading Lightning is not counted as training)

    held_out = HELD_OUT if len(setup.data.train) >= FEWEST_TO_SPLIT else 0.0
    begun = time.process_time()
    run = fit(
        setup.model,
        setup.data,
        out,
        settings=setup.settings,
        epochs=epochs(experiment.images, setup, held_out),
        device=experiment.device,
        seed=experiment.seed,
        validation_fraction=held_out,
        quiet=True,
    )
    return run, None if is_resumed else round(time.process_time() - begun, 1)


def epochs(images: int | None, setup: Setup, held_out: float) -> int:
    """Of every stage whose length is open, so that all of them together see at least ``images`` training images."""
    if images is None:
        return setup.settings.epochs
    open_stages = sum(stage.epochs is None for stage in setup.model.stages())
    train, _ = split_normals(len(setup.data.train), held_out, 0)
    return math.ceil(images / (len(train) * max(1, open_stages)))


def _of_statistics(
    experiment: Experiment, normal_class: int | None, folder: Path, sheet: Path | None
) -> dict[str, Any]:
    data = _chosen(experiment, open_data(experiment.place, image_size=STATISTICS_SIZE, normal_class=normal_class))
    scores, labels, kinds = image_statistics.scores(data), data.test.labels.numpy(), data.test.defects
    of_type = {kind: [label == 0 or kind == other for label, other in zip(labels, kinds, strict=True)]
               for kind in sorted(set(kinds)) if kind != NORMAL}  # fmt: skip
    metrics = {
        "image_auroc": auroc(labels, scores),
        "pixel_auroc": None,
        "pixel_aupro": None,
        "counts": {"normal": int((labels == 0).sum()), "abnormal": int(labels.sum()), "masks": _masks(data)},
        "per_defect": {
            kind: {"image_auroc": auroc(labels[chosen], scores[chosen])} for kind, chosen in of_type.items()
        },
    }
    return {
        **_figures(metrics),
        "size": data.image_size,
        "channels": data.channels,
        "trained_on": len(data.train),
        "hardware": hardware(),
    }


def _figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    counts = metrics["counts"]
    return {
        **{name: metrics[name] for name in ("image_auroc", "pixel_auroc", "pixel_aupro")},
        "types": {kind: each["image_auroc"] for kind, each in metrics["per_defect"].items()},
        **{name: counts[name] for name in ("normal", "abnormal", "masks")},
    }


def _chosen(experiment: Experiment, data: Dataset) -> Dataset:
    if experiment.most_train is None or experiment.most_test is None:
        return data
    return reduced(data, experiment.most_train, experiment.most_test)


def _masks(data: Dataset) -> int:
    return sum(entry.label and data.test.has_mask(index) for index, entry in enumerate(data.test.entries))


def _dead_rows(run: Run, data: Dataset) -> float | None:
    """The largest share over all memories and their partitions, on the first test images; None without a memory."""
    if not isinstance(run.model, PMB):
        return None
    batch = next(data.test.batches(32))
    stats = run.model.memory_stats(batch.images.to(run.device))
    return max((float(each.dead_share.max()) for each in stats.values()), default=None)


def main(folder: Path) -> None:
    """Do the experiment of ``folder``."""
    description = json.loads((folder / "experiment.json").read_text())
    row = run_experiment(Experiment(**description), folder)
    write_json(folder / "row.json", dataclasses.asdict(row))


def _end_with_stdin() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    if sys.argv[2:] == ["--until-stdin-ends"]:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    main(Path(sys.argv[1]))
