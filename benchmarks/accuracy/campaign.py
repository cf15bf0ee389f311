"""Which experiments a table takes, in which order, and how they are run: some at a time, each in its own process.

All of the first seed come before any of the second, so that a table is even when it is cut short. A row is in the CSV
as soon as it is there. What is there already is not done again; an experiment that was interrupted goes on; one that
fails is a row that says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.accuracy.contenders import Contender
from benchmarks.accuracy.experiment import Experiment, Row, identity
from benchmarks.accuracy.results import Store, hardware
from benchmarks.accuracy.sets import ImageSet
from memad_fast._atomic import write_json
from memad_fast.models import MODELS

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Budget:
    """How much every row of a table may see."""

    images: int | None
    """Training images of one training, over all its stages; None: as the preset says."""
    most_train: int | None = None
    """Of a one-class set: so many of a class's training images are used; None: all."""
    most_test: int | None = None
    is_published: bool = False
    """Take the presets of the published settings; else those that ``memad-fast fit`` takes."""


def plan(
    sets: Sequence[ImageSet], contenders: Sequence[Contender], seeds: Sequence[int], budget: Budget, device: str
) -> list[Experiment]:
    """The experiments in their order; those that need no seed stand with the first one."""
    return [
        _experiment(image_set, contender, seed, budget, device, with_sheet=number == 0)
        for number, seed in enumerate(seeds)
        for image_set in sets
        for contender in contenders
        if contender.is_seeded or number == 0
    ]


def _experiment(
    image_set: ImageSet, contender: Contender, seed: int, budget: Budget, device: str, *, with_sheet: bool
) -> Experiment:
    preset, settings = _preset(contender, bool(image_set.classes), budget)
    return Experiment(
        set=image_set.name,
        place=image_set.place,
        classes=image_set.classes,
        system=contender.system,
        variant=contender.variant,
        model=contender.model,
        options=dict(contender.options),
        preset=preset,
        settings=settings,
        seed=seed,
        images=budget.images,
        most_train=budget.most_train,
        most_test=budget.most_test,
        device=device,
        sheet=with_sheet,
    )


def _preset(contender: Contender, is_one_class: bool, budget: Budget) -> tuple[str, dict[str, object]]:
    """Its name and all that it holds; nothing for a model that is unknown, whose experiment will say so."""
    if contender.model not in MODELS:
        return "", {}
    presets = MODELS[contender.model].presets()
    name = "digits" if is_one_class and "digits" in presets else next(iter(presets))
    if budget.is_published and contender.published:
        name = contender.published
    return name, dataclasses.asdict(presets[name])


@dataclass
class Campaign:
    """Runs experiments into a table's CSV."""

    store: Store[Row]
    runs: Path
    """A folder for each experiment goes here: checkpoints, logs, weights, sheets. It is not committed."""
    jobs: int = 2
    tell: Callable[[str], None] = print
    _children: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def folder(self, experiment: Experiment) -> Path:
        """Where an experiment keeps its files. Another preset or budget has another folder."""
        name = f"{experiment.system} {experiment.variant}".strip().replace(" ", "-")
        return self.runs / experiment.set / f"{name}-seed{experiment.seed}-{experiment.fingerprint}"

    def forget(self, experiments: Sequence[Experiment], *, only_failed: bool) -> None:
        """Remove rows and run folders, so that the experiments are done from the start."""
        failed = {row.fingerprint for row in self.store.load() if row.error}
        meant = [each for each in experiments if not only_failed or each.fingerprint in failed]
        fingerprints = {each.fingerprint for each in meant}
        self.store.remove(lambda row: row.fingerprint in fingerprints)
        for experiment in meant:
            shutil.rmtree(self.folder(experiment), ignore_errors=True)

    def run(self, experiments: Sequence[Experiment], *, after_each: Callable[[], None]) -> None:
        """Do what is not done. ``after_each`` is called when the CSV has a new row."""
        done = {row.fingerprint for row in self.store.load()}
        left = [experiment for experiment in experiments if experiment.fingerprint not in done]
        self.tell(f"{len(experiments)} rows, {len(experiments) - len(left)} of them there already")
        with _terminated_like_interrupted(), ThreadPoolExecutor(self.jobs) as pool:
            futures: dict[Future[Row | None], Experiment] = {pool.submit(self._row, each): each for each in left}
            try:
                for number, future in enumerate(as_completed(futures), start=1):
                    row = future.result()
                    if row is not None:
                        self.store.put(row)
                        self.tell(f"[{number}/{len(left)}] {_told(row)}")
                        after_each()
            except BaseException:
                self._stop()
                raise

    def _row(self, experiment: Experiment) -> Row | None:
        """The row of an experiment, of its process or of an earlier one; None if all is being stopped."""
        folder = self.folder(experiment)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "row.json").exists():
            write_json(folder / "experiment.json", dataclasses.asdict(experiment))
            error = self._process(folder)
            if self._stopped.is_set():
                return None
            if not (folder / "row.json").exists():
                error = error.replace(experiment.place, experiment.set)  # no place of this machine in a table
                return Row(**identity(experiment), error=error, hardware=hardware())
        return Row(**json.loads((folder / "row.json").read_text()))

    def _process(self, folder: Path) -> str:
        """Run the experiment in ``folder``. Returns its last words: if it made no row, they say why."""
        if self._stopped.is_set():
            return ""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (folder / "log.txt").open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.accuracy.experiment", str(folder.resolve()), "--until-stdin-ends"],
                stdin=subprocess.PIPE,  # it ends with this process, however this one ends
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=ROOT,
                start_new_session=True,  # an interruption at the keyboard comes to this process alone, which tells it
            )
            self._children.add(child)
            code = child.wait()
            self._children.discard(child)
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"ended with exit code {code}"

    def _stop(self) -> None:
        self._stopped.set()
        for child in list(self._children):
            child.terminate()


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """A request to end ends the processes too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _told(row: Row) -> str:
    title = f"{row.set}: {row.system}{', ' + row.variant if row.variant else ''}, seed {row.seed}"
    if row.error:
        return f"{title}: failed: {row.error}"
    return f"{title}: image AUROC {row.image_auroc:.3f}" + (f", {row.seconds:.0f} s" if row.seconds else "")
