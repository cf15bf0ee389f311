"""A stream of images through a model: decoding in threads overlaps the network, memory stays bounded.

    paths ──> decode (threads) ──> at most a few batches wait ──> network, a batch at a time ──> results, in order

An image that cannot be read becomes a result with its error; the others of its batch are scored. The score of an
image does not depend on its batch, so neither does a result.
"""

from __future__ import annotations

import glob
import itertools
import math
import os
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memad_fast.data.images import is_image, read_pixels, to_tensor
from memad_fast.scoring.run import Run, load_run, resolve_device

# A file, or pixels.
Source = str | os.PathLike[str] | NDArray[np.generic]

# Batches that are decoded ahead of the network: one being filled, one ready.
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Result:
    """What the scoring of one image gave.

    ``score`` is NaN, the arrays are None and ``error`` says why where the image could not be scored.
    ``milliseconds`` is the image's decoding plus its share of its batch's time in the network. Arrays are float32 at
    the model's size: image and reconstruction ``[C, H, W]`` in [0, 1], anomaly map ``[H, W]``; ``size`` is the
    (width, height) of the file.
    """

    path: str
    score: float
    threshold: float
    milliseconds: float
    error: str = ""
    size: tuple[int, int] = (0, 0)
    parts: dict[str, float] = field(default_factory=dict)
    image: NDArray[np.float32] | None = field(default=None, repr=False)
    anomaly_map: NDArray[np.float32] | None = field(default=None, repr=False)
    reconstruction: NDArray[np.float32] | None = field(default=None, repr=False)

    @property
    def is_anomaly(self) -> bool:
        """The score is above the threshold. False for an image that could not be scored: look at ``error``."""
        return self.score > self.threshold


@dataclass
class Timing:
    """Where the time of a stream went, in seconds of the consuming thread; ``decode`` is summed over the threads."""

    network: float = 0.0
    waiting: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class _Decoded:
    image: Tensor | None
    size: tuple[int, int]
    seconds: float
    error: str


class Scorer:
    """A fitted model, loaded once, that scores images for as long as the line runs.

    Args:
        run: a run folder, or a loaded ``Run``.
        device: where the network computes, "auto" for CUDA where there is one; a loaded ``Run`` stays where it is
            unless a device is named.
        batch_size: images per pass of the network.
        threshold: instead of the run's own.
        workers: threads that decode; default: the cores of this process, at most 8.

    Example:
        >>> import numpy as np
        >>> from memad_fast.scoring import Scorer, fit, set_up
        >>> setup = set_up("pmb", "digits", normal_class=0, options={"memory": "none", "widths": (4, 8, 8)})
        >>> run = fit(setup.model, setup.data, "runs/zero", settings=setup.settings, epochs=1, quiet=True)
        >>> scorer = Scorer("runs/zero", threshold=run.threshold)
        >>> camera = (np.zeros((480, 640), dtype=np.uint8) for _ in range(3))
        >>> for result in scorer.stream(camera):
        ...     print(result.path, result.size, result.error or result.anomaly_map.shape)
        0 (640, 480) (32, 32)
        1 (640, 480) (32, 32)
        2 (640, 480) (32, 32)
    """

    def __init__(
        self,
        run: Run | str | os.PathLike[str],
        *,
        device: str | torch.device = "auto",
        batch_size: int = 32,
        threshold: float | None = None,
        workers: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if workers is not None and workers < 1:
            raise ValueError(f"workers: expected at least 1, got {workers}")
        self.run = run if isinstance(run, Run) else load_run(run, device)
        if isinstance(run, Run) and device != "auto":
            self.run.model.to(resolve_device(device))
        self.threshold = float(self.run.threshold if threshold is None else threshold)
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold: expected a finite number, got {self.threshold}")
        self.batch_size = batch_size
        self.workers = workers or default_workers()

    def score(self, image: Source) -> Result:
        """Score one image: a file, or pixels ``[H, W]`` or ``[H, W, 3]`` (uint8, uint16, or float in [0, 1]).

        An image that cannot be read gives a result with its ``error``.
        """
        return next(self.stream([image]))

    def stream(self, images: Iterable[Source], timing: Timing | None = None) -> Generator[Result, None, None]:
        """Results of ``images``, in their order, as soon as each batch is scored.

        Reads ahead at most a few batches, so that an endless iterable is fine. An array's path is its position.
        """
        timing = timing if timing is not None else Timing()
        source = enumerate(images)
        pending: deque[tuple[str, Future[_Decoded]]] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="memad-fast-decode")
        try:
            while True:
                missing = (1 + _BATCHES_AHEAD) * self.batch_size - len(pending)
                for position, image in itertools.islice(source, missing):
                    name = str(position) if isinstance(image, np.ndarray) else os.fspath(image)
                    pending.append((name, pool.submit(self._decode, image)))
                if not pending:
                    return
                count = min(self.batch_size, len(pending))
                started = time.perf_counter()
                batch = [(name, future.result()) for name, future in (pending.popleft() for _ in range(count))]
                timing.waiting += time.perf_counter() - started
                timing.decode += sum(decoded.seconds for _, decoded in batch)
                yield from self._score_batch(batch, timing)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _decode(self, source: Source) -> _Decoded:
        started = time.perf_counter()
        image, size, error = None, (0, 0), ""
        config = self.run.model.config
        try:
            pixels = source if isinstance(source, np.ndarray) else read_pixels(source)
            size = pixels.shape[1], pixels.shape[0]
            image = to_tensor(pixels, config.image_size, config.channels, name="pixels", resize=self.run.resize)
        except Exception as failure:  # whatever a broken file brings about, the line goes on
            error = " ".join(str(failure).removeprefix(f"{source}: ").split()) or type(failure).__name__
        return _Decoded(image, size, time.perf_counter() - started, error)

    def _score_batch(self, batch: list[tuple[str, _Decoded]], timing: Timing) -> Iterator[Result]:
        started = time.perf_counter()
        images = [decoded.image for _, decoded in batch if decoded.image is not None]
        if images:
            scores = self.run.model.score(torch.stack(images).to(self.run.device))
            image_score = scores.image_score.cpu().numpy()
            anomaly_map = scores.anomaly_map[:, 0].cpu().numpy()
            reconstruction = scores.reconstruction.cpu().numpy()
            parts = {name: part.cpu().tolist() for name, part in scores.parts.items()}
        seconds = time.perf_counter() - started
        timing.network += seconds
        scored = 0
        for path, decoded in batch:
            if decoded.image is None:
                yield Result(path, math.nan, self.threshold, 1e3 * decoded.seconds, decoded.error, decoded.size)
                continue
            index, scored = scored, scored + 1
            milliseconds = 1e3 * (decoded.seconds + seconds / len(images))
            if not math.isfinite(image_score[index]):
                error = f"the model gave the score {image_score[index]}"
                yield Result(path, math.nan, self.threshold, milliseconds, error, decoded.size)
                continue
            yield Result(
                path,
                float(image_score[index]),
                self.threshold,
                milliseconds,
                "",
                decoded.size,
                {name: part[index] for name, part in parts.items()},
                decoded.image.numpy(),
                anomaly_map[index],
                reconstruction[index],
            )


def find_images(
    inputs: Sequence[str | os.PathLike[str]], leave_out: str | os.PathLike[str] | None = None
) -> Iterator[Path]:
    """The image files that ``inputs`` name, in a fixed order, found as they are asked for.

    An input is a file, a folder (searched through for image endings, hidden files left out, sorted by name), or a
    glob pattern ("line3/**/*.png"). The folder ``leave_out`` is not searched: pictures of an earlier scoring are there.

    Raises:
        FileNotFoundError: an input does not exist, or a pattern matches nothing.
    """
    for source in inputs:
        if not os.path.exists(source) and not glob.has_magic(os.fspath(source)):
            raise FileNotFoundError(f"{os.fspath(source)}: no such file or folder")
    not_again = () if leave_out is None else (os.path.realpath(leave_out),)
    return itertools.chain.from_iterable(_images_of(os.fspath(source), not_again) for source in inputs)


def _images_of(source: str, not_again: tuple[str, ...]) -> Iterator[Path]:
    if os.path.isdir(source):
        return _walk(Path(source), not_again)
    if os.path.exists(source):
        return iter((Path(source),))
    return _matches(source)


def _walk(folder: Path, not_again: tuple[str, ...]) -> Iterator[Path]:
    """Images below ``folder`` by name; through symbolic links too, but not into the folders ``not_again``."""
    here = os.path.realpath(folder)
    if here in not_again:
        return
    with os.scandir(folder) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    for name, is_folder in found:
        if is_folder:
            yield from _walk(folder / name, (*not_again, here))
        elif is_image(Path(name)):
            yield folder / name


def _matches(pattern: str) -> Iterator[Path]:
    found = False
    for name in sorted(glob.iglob(pattern, recursive=True)):
        if not os.path.isdir(name):
            found = True
            yield Path(name)
    if not found:
        raise FileNotFoundError(f"{pattern}: no file matches")


def default_workers() -> int:
    """Threads that decode where nobody says how many: the cores of this process, at most 8."""
    return min(8, usable_cores())


def usable_cores() -> int:
    """The CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
