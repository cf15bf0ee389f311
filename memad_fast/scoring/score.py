"""Score a stream of image files into a folder: scores.csv, heat maps, report.html.

Rows go to the disk as they come, so a million images need no more memory than a thousand. The files get their final
names when they are complete; an interrupted scoring leaves ``scores.csv.partial`` with all rows up to there.
"""

from __future__ import annotations

import csv
import glob
import itertools
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from numpy.typing import NDArray

from memad_fast import __version__
from memad_fast._arguments import check_choice
from memad_fast.scoring import heatmap
from memad_fast.scoring.ray_engine import RayScorer
from memad_fast.scoring.report import Facts, Report
from memad_fast.scoring.run import Run
from memad_fast.scoring.stream import Result, Scorer, Timing, default_workers, find_images

ENGINES = ("local", "ray")
COLUMNS = ("path", "score", "threshold", "is_anomaly", "milliseconds", "error")


@dataclass(frozen=True)
class ScoreSummary:
    """What a scoring came to. Seconds are of the wall clock, and ``network`` + ``waiting`` + ``writing`` make up
    nearly all of ``seconds``: waiting is for images that were not decoded yet, writing for heat maps, CSV and report.
    With engine "ray" waiting is for results, and ``network`` and ``decode``, which others spend, are 0.
    """

    images: int
    anomalies: int
    failures: int
    threshold: float
    seconds: float
    network: float
    waiting: float
    decode: float  # summed over the decoding threads, most of it hidden behind the network
    csv: Path
    heatmaps: Path | None
    report: Path | None
    engine: str = "local"

    @property
    def images_per_second(self) -> float:
        """Images, readable or not, per second of wall clock, all writing included."""
        return self.images / self.seconds if self.seconds > 0 else 0.0

    @property
    def writing(self) -> float:
        """Seconds that were neither network nor waiting for decoding."""
        return max(0.0, self.seconds - self.network - self.waiting)


def score(
    run: Run | str | os.PathLike[str],
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    heatmaps: bool = False,
    report: bool = False,
    batch_size: int = 32,
    threshold: float | None = None,
    device: str | torch.device = "auto",
    workers: int | None = None,
    worst: int = 200,
    on_result: Callable[[Result], None] | None = None,
    engine: str = "local",
    actors: int | None = None,
    actor_gpus: float | None = None,
) -> ScoreSummary:
    """Score image files and write what came out.

    Args:
        run: a run folder, or with engine "local" a loaded ``Run``.
        inputs: files, folders (searched through) and glob patterns; one or several.
        out: the folder for ``scores.csv`` (path, score, threshold, is_anomaly, milliseconds, error), ``heatmaps/`` and
            ``report.html``; made if it is not there.
        heatmaps: write a heat map for each image, as large as the image, all on one colour scale:
            ``heatmaps/FOLDER/NAME.EXT.png`` for ``FOLDER/NAME.EXT`` below the inputs' common folder.
        report: write the page.
        batch_size: images per pass of the network.
        threshold: instead of the run's own.
        device: where the network computes, "auto" for CUDA where there is one; a loaded ``Run`` stays where it is
            unless a device is named.
        workers: threads that decode, and as many that write heat maps; default: the cores, at most 8. With engine
            "ray" each actor decodes in so many, by default one.
        worst: how many images the report shows.
        on_result: called with each result, in order, for example to move a progress bar. With engine "ray" the
            result's arrays are None if neither heat maps nor a report need them.
        engine: "local" scores in this process; "ray" on the actors of a Ray cluster, see ``RayScorer``: the same
            files, for very many images. An error while an image is scored ends a local scoring; here the image is
            tried once more, on another worker, and then counts as a failure.
        actors: with engine "ray", how many processes score; default: as many as the cluster has room for.
        actor_gpus: with engine "ray", the GPUs that each reserves; default: 1 with CUDA.

    Returns:
        Counts, times and paths. An unreadable image counts in ``failures`` and has its error in its row.

    Raises:
        FileNotFoundError: an input does not exist, or there is no image in it.
        RunError: the run folder is not whole.
        ValueError: an argument is out of range, or does not go with the engine.
        BackendUnavailableError: engine "ray", and Ray is not installed.

    Example:
        >>> from PIL import Image
        >>> from memad_fast.scoring import fit, score, set_up
        >>> setup = set_up("pmb", "digits", normal_class=0, options={"memory": "none", "widths": (4, 8, 8)})
        >>> run = fit(setup.model, setup.data, "runs/zero", settings=setup.settings, epochs=1, quiet=True)
        >>> Image.new("L", (40, 30)).save("part.png")
        >>> summary = score("runs/zero", "part.png", "scores", heatmaps=True, report=True)
        >>> summary.images, summary.failures, str(summary.report)
        (1, 0, 'scores/report.html')
    """
    sources = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    if worst < 1:
        raise ValueError(f"worst: expected at least 1, got {worst}")
    check_choice("engine", engine, ENGINES)
    scorer: Scorer | RayScorer
    if engine == "ray":
        scorer = RayScorer(
            run,
            device=device,
            batch_size=batch_size,
            threshold=threshold,
            workers=workers,
            actors=actors,
            actor_gpus=actor_gpus,
            pictures=heatmaps or report,
        )
    elif actors is not None or actor_gpus is not None:
        raise ValueError("actors, actor_gpus: only engine 'ray' has actors, this is engine 'local'")
    else:
        scorer = Scorer(run, device=device, batch_size=batch_size, threshold=threshold, workers=workers)
    folder = Path(out)
    heatmap_folder = folder / "heatmaps"
    paths = _at_least_one(find_images(sources, leave_out=heatmap_folder), sources)
    folder.mkdir(parents=True, exist_ok=True)

    page = Report(scorer.threshold, scorer.run.map_level, worst) if report else None
    timing = Timing()
    anomalies = failures = images = 0
    started = time.perf_counter()
    with ExitStack() as stack:
        file = stack.enter_context(_complete_or_partial(folder / "scores.csv"))
        pictures = None
        if heatmaps:
            threads = workers or default_workers()
            writer = _HeatmapWriter(heatmap_folder, _common_folder(sources), scorer.run.map_level, threads)
            pictures = stack.enter_context(writer)
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for result in stack.enter_context(closing(scorer.stream(paths, timing))):
            rows.writerow(_row(result))
            if pictures is not None and not result.error:
                pictures.add(result)
            if page is not None:
                page.add(result)
            images += 1
            anomalies += result.is_anomaly
            failures += bool(result.error)
            if on_result is not None:
                on_result(result)
    report_path = None
    if page is not None:
        report_path = folder / "report.html"
        speed = images / (time.perf_counter() - started)
        note = _threshold_note(scorer.run, threshold)
        page.write(report_path, Facts(_model_words(scorer.run), str(scorer.run.folder), note, speed, __version__))
    return ScoreSummary(
        images,
        anomalies,
        failures,
        scorer.threshold,
        time.perf_counter() - started,
        timing.network,
        timing.waiting,
        timing.decode,
        folder / "scores.csv",
        heatmap_folder if heatmaps else None,
        report_path,
        engine,
    )


def _at_least_one(paths: Iterator[Path], sources: Sequence[str | os.PathLike[str]]) -> Iterator[Path]:
    """The same paths; an error now, before anything is written, where there are none."""
    first = next(paths, None)
    if first is None:
        raise FileNotFoundError(f"no images found in {', '.join(os.fspath(source) for source in sources)}")
    return itertools.chain([first], paths)


@contextmanager
def _complete_or_partial(path: Path) -> Iterator[TextIO]:
    """A text file that bears its name only once it is complete and on the disk."""
    partial = path.with_name(path.name + ".partial")
    # File names are bytes: those that are no UTF-8 come out as the same bytes.
    with partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _row(result: Result) -> tuple[str, ...]:
    milliseconds = f"{result.milliseconds:.3f}"
    if result.error:
        return result.path, "", f"{result.threshold:.9g}", "", milliseconds, result.error
    verdict = "true" if result.is_anomaly else "false"
    return result.path, f"{result.score:.9g}", f"{result.threshold:.9g}", verdict, milliseconds, ""


class _HeatmapWriter:
    """Writes heat maps in threads, at most a few images behind the network."""

    def __init__(self, folder: Path, root: str, map_level: float, workers: int) -> None:
        self.folder = folder
        self.map_level = map_level
        self._root = root
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="memad-fast-heatmap")
        self._pending: deque[Future[None]] = deque()
        self._most_pending = 4 * workers

    def __enter__(self) -> _HeatmapWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self._pending:
                future.result()

    def add(self, result: Result) -> None:
        """Begin to write the heat map of a result; an earlier one that could not be written raises its error."""
        assert result.anomaly_map is not None
        path = self.folder / (os.path.relpath(os.path.abspath(result.path), self._root) + ".png")
        self._pending.append(self._pool.submit(self._write, path, result.anomaly_map, result.size))
        if len(self._pending) > self._most_pending:
            self._pending.popleft().result()

    def _write(self, path: Path, anomaly_map: NDArray[np.float32], size: tuple[int, int]) -> None:
        heatmap.save(path, heatmap.levels(anomaly_map, self.map_level, size))


def _common_folder(sources: Sequence[str | os.PathLike[str]]) -> str:
    """The lowest folder that holds everything the inputs can name: heat maps keep the paths below it, so that equal
    names in different folders stay apart."""
    folders = []
    for source in sources:
        path = os.path.abspath(source)
        if not os.path.exists(path):  # a pattern: up to its first folder with a wildcard
            while glob.has_magic(path):
                path = os.path.dirname(path)
        folders.append(path if os.path.isdir(path) else os.path.dirname(path))
    return os.path.commonpath(folders)


def _threshold_note(run: Run, given: float | None) -> str:
    """Where the threshold comes from, in words for the report."""
    if given is not None:
        return f"It was given with the command. The run's own threshold is {run.threshold:.6g}."
    source = run.config["threshold"]
    sentences = []
    if {"quantile", "count", "images"} <= source.keys():
        quantile, count = float(source["quantile"]), int(source["count"])
        sentences.append(f"It is the {quantile:.4g} quantile of the scores of {count} {source['images']}.")
        if source["images"] != "training images":
            # The threshold is the score of this rank; a new image of the same kind falls into each of the count + 1
            # gaps between the scores with equal chance.
            rank = math.ceil(quantile * (count - 1)) + 1
            share = (count + 1 - rank) / (count + 1)
            sentences.append(f"About {100 * share:.2g} % of good parts like those are expected above it.")
    return " ".join([*sentences, *run.warnings])


def _model_words(run: Run) -> str:
    return f"{run.model_name} at {run.image_size} × {run.image_size} pixels"
