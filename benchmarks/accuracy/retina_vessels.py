"""MemSTC-Net's semantic extractor F_s on retinal vessels: learned on STARE, adapted to CHASE_DB1, held to its labels.

    python -m benchmarks.accuracy.retina_vessels --data FOLDER

FOLDER holds stare/all, chasedb1/train and chasedb1/test, each with image/, vessel/ and fov/. Adaptation sees the images
of chasedb1/train and no label of CHASE_DB1. Results go to ``benchmarks/results/accuracy/retina_vessels.{csv,md}``, runs
to ``runs/accuracy/retina_vessels``; a command that was stopped goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.accuracy.results import RESULTS, Spread, Store, hardware, write_page
from benchmarks.report import table
from memad_fast.models import SemanticExtractor
from memad_fast.scoring import evaluate_semantic, fit_extractor, load_extractor, open_labels, set_up_semantic

SOURCE, TARGET = "stare/all", "chasedb1/train"
EVALUATED = {"test": "chasedb1/test", "train": TARGET, "source": SOURCE}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to train F_s."""

    name: str
    options: dict[str, object]
    is_adapted: bool = False
    source: str = SOURCE

    @property
    def unadapted(self) -> str | None:
        """The row that this one is to be better than."""
        if not self.is_adapted:
            return None
        return "source only" if self.options.get("standardize", True) else "source only, not standardized"


# The small preset standardizes its images; the order is that of the trainings.
VARIANTS = (
    Variant("source only", {}),
    Variant("adapted, λ 0.001", {"adversarial": 0.001}, is_adapted=True),
    Variant("adapted, λ 0.01", {"adversarial": 0.01}, is_adapted=True),
    Variant("source only, not standardized", {"standardize": False}),
    Variant("adapted, λ 0.001, not standardized", {"adversarial": 0.001, "standardize": False}, is_adapted=True),
    Variant("labels of CHASE_DB1", {}, source=TARGET),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of one training: Dice and AUC of the vessels."""

    variant: str
    seed: int
    fingerprint: str
    dice_test: float
    auc_test: float
    dice_train: float
    auc_train: float
    dice_source: float
    auc_source: float
    size: int
    width: int
    adversarial: float
    epochs: float
    steps: int
    source_loss: float
    cpu_seconds: float | None
    """Of the training; None if it was interrupted."""
    hardware: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the table."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    store = Store(options.results / "retina_vessels.csv", Row, key=("variant", "seed"))
    variants = [variant for variant in VARIANTS if options.only is None or variant.name in options.only.split("+")]
    for variant in variants:
        for seed in range(options.seeds):
            fingerprint = _fingerprint(variant, seed, options.epochs)
            if fingerprint not in {row.fingerprint for row in store.load()}:
                row = _row(variant, seed, fingerprint, options)
                store.put(row)
                print(f"{row.variant}, seed {seed}: test Dice {row.dice_test:.3f}, AUC {row.auc_test:.3f}", flush=True)
            write_page(options.results / "retina_vessels.md", page(store.load()))
    print(f"wrote {options.results / 'retina_vessels.md'}")


def page(rows: Sequence[Row]) -> list[str]:
    """The table as text."""
    columns = ("F_s", "Dice", "gain", "AUC", "gain", "Dice, adapted to", "AUC, adapted to", "Dice, source", "seeds",
               "epochs", "steps", "CPU s")  # fmt: skip
    cells = []
    for variant in VARIANTS:
        of_variant = [row for row in rows if row.variant == variant.name]
        if of_variant:
            before = [row for row in rows if row.variant == variant.unadapted]
            seconds = Spread.of(row.cpu_seconds for row in of_variant if row.cpu_seconds is not None)
            cells.append([
                variant.name,
                _figure(of_variant, "dice_test"),
                _gain(of_variant, before, "dice_test"),
                _figure(of_variant, "auc_test"),
                _gain(of_variant, before, "auc_test"),
                *(_figure(of_variant, name) for name in ("dice_train", "auc_train", "dice_source")),
                ", ".join(str(row.seed) for row in of_variant),
                f"{of_variant[0].epochs:g}",
                str(of_variant[0].steps),
                seconds.text(".0f") if seconds else "",
            ])  # fmt: skip
    return [
        "# Retinal vessels: the semantic extractor of MemSTC-Net",
        "",
        "F_s learns vessels on STARE (20 images, 10 of them pathological) and is compared with the first observer of"
        " CHASE_DB1, inside the field of view. `adapted` sees the 21 training images of CHASE_DB1 as well, without"
        " labels, through D_da (eq. 2). Dice and AUC without further words are those of the 7 test images, which no"
        " training saw; `adapted to` are the 21. `labels of CHASE_DB1` is trained on the labels of the 21: what the"
        " same network and budget reach without a gap between domains.",
        "",
        "Mean over the seeds (least to most). Dice at the class of largest probability, over all pixels together."
        " `gain`: over the row without adaptation, seed by seed; adaptation helps where its least value is above 0.",
        "",
        *table(columns, cells),
        "",
        *sorted(
            {
                f"Preset small but for the epochs: {row.size} x {row.size} pixels, width {row.width}. One thread of:"
                f" {row.hardware}."
                for row in rows
            }
        ),
        "",
        "Made by `python -m benchmarks.accuracy.retina_vessels --data FOLDER`.",
    ]


def _figure(rows: Sequence[Row], name: str) -> str:
    spread = Spread.of(getattr(row, name) for row in rows)
    return spread.text() if spread else ""


def _gain(rows: Sequence[Row], before: Sequence[Row], name: str) -> str:
    of_seed = {row.seed: getattr(row, name) for row in before}
    spread = Spread.of(getattr(row, name) - of_seed[row.seed] for row in rows if row.seed in of_seed)
    return spread.text("+.3f") if spread else ""


def _row(variant: Variant, seed: int, fingerprint: str, options: argparse.Namespace) -> Row:
    folder = options.runs / f"{re.sub('[^a-z0-9.]+', '-', variant.name.lower())}-seed{seed}-{fingerprint}"
    cpu_seconds = None
    if not (folder / "config.json").exists() or (folder / "resume.safetensors").exists():
        setup = set_up_semantic(
            options.data / variant.source,
            options.data / TARGET if variant.is_adapted else None,
            options=variant.options,
            seed=seed,
        )
        is_resumed = (folder / "resume.safetensors").exists()
        import memad_fast.scoring.training  # noqa: F401  (so that loading Lightning is not counted as training)

        begun = time.process_time()
        fit_extractor(
            setup.model,
            setup.data,
            folder,
            settings=setup.settings,
            epochs=options.epochs,
            device="cpu",
            seed=seed,
            source=setup.source,
        )
        cpu_seconds = None if is_resumed else round(time.process_time() - begun, 1)
    run = load_extractor(folder, "cpu")
    figures = {}
    for name, place in EVALUATED.items():
        metrics = evaluate_semantic(run, open_labels(run, options.data / place))
        figures |= {f"dice_{name}": metrics["dice"], f"auc_{name}": metrics["auc"]}
    training, losses = run.config["training"], run.config["training"]["losses"]
    return Row(
        variant=variant.name,
        seed=seed,
        fingerprint=fingerprint,
        **figures,
        size=run.image_size,
        width=run.model.config.width,
        adversarial=run.model.config.adversarial,
        epochs=training["epochs_done"],
        steps=training["stages"]["semantic"]["steps_done"],
        source_loss=losses["extractor.source" if variant.is_adapted else "source"],
        cpu_seconds=cpu_seconds,
        hardware=hardware(),
    )


def _fingerprint(variant: Variant, seed: int, epochs: int) -> str:
    """The same for trainings whose figures must be the same."""
    preset = dataclasses.asdict(next(iter(SemanticExtractor.presets().values())))
    content = json.dumps([dataclasses.asdict(variant), seed, epochs, preset], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.retina_vessels", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder with stare/ and chasedb1/")
    parser.add_argument("--seeds", type=int, default=3, help="how many; default: 3")
    parser.add_argument("--epochs", type=int, default=24, help="passes over the source; default: 24")
    parser.add_argument("--only", help="names of rows, joined by +; default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the table goes")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy/retina_vessels"), help="where the runs go")
    return parser


if __name__ == "__main__":
    main()
