"""A stream of images through a model in many processes, on one machine or on a cluster, over Ray Data.

    paths, a batch a block ──> actors of Ray Data, each with the model ──> results, in order ──> the same files
                                    │  decode, network                      as from one process
                                    └─ ledger: which image a worker was at

Ray Data hands out the batches, brings the results back in the order of the paths, holds the actors up when whoever
reads is slower, and starts an actor again that died. What it makes of the batch of a dead actor does not do here: it
repeats the whole batch for ever (``max_task_retries``), gives up the scoring, or leaves the batch out
(``max_errored_blocks``). So the batch is repeated, but image by image, and a ledger that outlives the workers says
which image the dead one was at: that one is reported with an error, and every other is scored.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
import os
import pickle
import platform
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from memad_fast._backend import BackendUnavailableError
from memad_fast._ledger import DIED, Ledger
from memad_fast.scoring.run import Run, RunError
from memad_fast.scoring.stream import Result, Scorer, Timing, usable_cores

if TYPE_CHECKING:
    import pyarrow

# Of a cluster of our own: results wait there until they are read; beyond it Ray holds the workers up, then writes to
# disk. Ray's own choice, a third of the machine's memory, would fill with results whenever the disk is the slowest.
_OBJECT_STORE_BYTES = 1 << 30
_SILENCE = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}

# So many processes may die while they load the run, in all: one that does not fit into memory would be loaded for ever.
_MOST_DEATHS_WHILE_LOADING = 2


class RayScorer:
    """A fitted model that scores image files on the actors of a Ray cluster: ``Scorer``, for very many files.

    A cluster that is there is used: the one this process is connected to, or the one that the variable RAY_ADDRESS
    names. Else one is started on this machine for each stream, without dashboard and usage statistics, and ended with
    it. Every node needs memad_fast and ``ray[data]``, and finds the run folder and the images under the same paths.

    A worker fails when its process dies, or when scoring raises an error that is not an unreadable image's. It is
    started anew, its batch is repeated image by image, and an image whose worker fails again is a result with the
    error ``worker failed twice: ...``. With graphics cards no such failure, and no scoring at all, has been tried yet.

    Args:
        run: a run folder. It is opened here too, so that a torn one is told before any worker starts.
        device: "cpu", "cuda", or "auto": CUDA where the cluster has GPUs. Ray decides which GPU an actor gets.
        batch_size: images per pass of the network, and per task of Ray.
        threshold: instead of the run's own.
        workers: threads that decode in each actor, and CPUs that it reserves; default 1.
        actors: processes with the model; default: as many as the cluster has CPUs for, or GPUs.
        actor_gpus: GPUs that an actor reserves; with 0.5 two of them share one, and one decodes while the other
            computes. Default: 1 with CUDA, else 0.
        pictures: whether results carry image, anomaly map and reconstruction. They make up nearly all of what travels
            from the actors: 1.8 MB an image at 256 x 256 in colour.

    Raises:
        BackendUnavailableError: Ray is not installed.
        TypeError: ``run`` is a loaded ``Run``; each actor loads its own.
        ValueError: an argument is out of range.
        RunError: the run folder is not whole.

    Example:
        >>> from PIL import Image
        >>> from memad_fast.scoring import RayScorer, fit, set_up
        >>> setup = set_up("pmb", "digits", normal_class=0, options={"memory": "none", "widths": (4, 8, 8)})
        >>> run = fit(setup.model, setup.data, "runs/zero", settings=setup.settings, epochs=1, quiet=True)
        >>> Image.new("L", (40, 30)).save("part.png")
        >>> scorer = RayScorer("runs/zero", actors=1, pictures=False)  # doctest: +SKIP
        >>> [(result.path, result.size) for result in scorer.stream(["part.png"])]  # doctest: +SKIP
        [('part.png', (40, 30))]
    """

    def __init__(
        self,
        run: Run | str | os.PathLike[str],
        *,
        device: str | torch.device = "auto",
        batch_size: int = 32,
        threshold: float | None = None,
        workers: int | None = None,
        actors: int | None = None,
        actor_gpus: float | None = None,
        pictures: bool = True,
    ) -> None:
        if isinstance(run, Run):
            raise TypeError("run: with engine 'ray' expected a run folder, which each actor loads, got a loaded Run")
        if actors is not None and actors < 1:
            raise ValueError(f"actors: expected at least 1, got {actors}")
        if str(device) not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device: with engine 'ray' expected auto, cpu or cuda, which Ray numbers, got {device}")
        if actor_gpus is not None and not 0.0 <= actor_gpus < math.inf:
            raise ValueError(f"actor_gpus: expected a finite number of at least 0, got {actor_gpus}")
        if actor_gpus is not None and (str(device), actor_gpus > 0.0) in (("cpu", True), ("cuda", False)):
            raise ValueError(f"actor_gpus: {actor_gpus} does not go with device {device}")
        _require_ray()
        here = Scorer(run, device="cpu", batch_size=batch_size, threshold=threshold, workers=workers)
        self.run = here.run
        self.threshold = here.threshold
        self.batch_size = batch_size
        self.workers = workers or 1
        self.actors = actors
        self.actor_gpus = actor_gpus
        self.pictures = pictures
        self._device = str(device)

    def stream(
        self, paths: Iterable[str | os.PathLike[str]], timing: Timing | None = None
    ) -> Generator[Result, None, None]:
        """Results of the files ``paths``, in their order.

        All paths are taken at once, some hundred bytes each in memory. ``timing.waiting`` is the time until
        results are there, the start and the end of a cluster of its own included; what actors spend is not counted.

        Raises:
            ValueError: the cluster has no room for one actor.
            RunError: an actor cannot load the run.
        """
        timing = timing if timing is not None else Timing()
        with closing(self._results(paths)) as results:
            while True:
                started = time.perf_counter()
                result = next(results, None)
                timing.waiting += time.perf_counter() - started
                if result is None:
                    return
                yield result

    def _results(self, paths: Iterable[str | os.PathLike[str]]) -> Generator[Result, None, None]:
        import ray.data

        with _cluster((self.actors or 1) * self.workers), _quiet():
            gpus = self._gpus_of_an_actor()
            room = self._room(gpus)
            blocks = list(_blocks(paths, self.batch_size))
            if not blocks:
                return
            actors = min(self.actors or room, len(blocks))
            ledger = _start_ledger(actors)
            dataset = _in_order(blocks).map_batches(
                _Worker,
                fn_constructor_kwargs={
                    "ledger": ledger,
                    "root": os.getcwd(),
                    "pictures": self.pictures,
                    "run": os.path.abspath(self.run.folder),
                    "device": "cuda" if gpus else "cpu",
                    "batch_size": self.batch_size,
                    "threshold": self.threshold,
                    "workers": self.workers,
                },
                batch_size=self.batch_size,
                batch_format="pyarrow",
                # One batch in work, one at hand: more would wait behind a slow one while other workers are idle.
                compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
                num_cpus=self.workers,
                num_gpus=gpus or None,
            )
            arrived = 0
            with closing(iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))) as tables:
                for table in tables:
                    for position, packed in zip(table["position"], table["result"], strict=True):
                        result = pickle.loads(packed.as_buffer())
                        if isinstance(result, RunError):
                            raise result
                        if position.as_py() != arrived:
                            raise RuntimeError(f"Ray Data gave image {position} where {arrived} was next")
                        yield result
                        arrived += 1
                        if arrived % self.batch_size == 0:
                            ledger.arrived.remote(arrived - self.batch_size)
            if arrived != (count := sum(map(len, blocks))):
                raise RuntimeError(f"Ray Data gave {arrived} of {count} images")

    def _gpus_of_an_actor(self) -> float:
        import ray

        if self.actor_gpus is not None:
            return self.actor_gpus
        return 1.0 if self._device == "cuda" or (self._device == "auto" and ray.cluster_resources().get("GPU")) else 0.0

    def _room(self, gpus: float) -> int:
        """How many actors the nodes have room for, if nothing else runs on them; an error if for none."""
        import ray

        wanted = {"CPU": float(self.workers), **({"GPU": gpus} if gpus else {})}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(min(int(node.get(name, 0.0) / amount) for name, amount in wanted.items()) for node in nodes)
        if room < 1:
            raise ValueError(
                f"no node of the Ray cluster has {' and '.join(f'{wanted[name]:g} {name}' for name in wanted)} for an "
                "actor (workers, actor_gpus)"
            )
        return room


class _Worker:
    """What a Ray actor runs: the model, loaded once, on batch after batch."""

    def __init__(self, *, ledger: Any, root: str, pictures: bool, **scorer: Any) -> None:
        with suppress(FileNotFoundError):  # here: then relative paths name nothing, and each is told
            os.chdir(root)
        self._ledger = ledger
        self._pictures = pictures
        self._problem: RunError | None = None
        try:
            deaths = self._tell("begin_loading")
            if deaths > _MOST_DEATHS_WHILE_LOADING:
                raise RunError(f"{deaths} workers before it died over that (killed, or out of memory)")
            self._scorer = self._load(**scorer)
            self._tell("has_loaded")
        except Exception as error:  # Ray would try for ever
            self._problem = RunError(f"a worker on {platform.node()} cannot load the run: {error}")

    def _load(self, **arguments: Any) -> Scorer:
        return Scorer(**arguments)

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        positions = table["position"].to_pylist()
        names = [os.fsdecode(name) for name in table["path"].to_pylist()]
        batch = positions[0]
        if self._problem is not None:
            return _table(positions[:1], [self._problem])
        attempt, failed = self._tell("enter", batch)
        if attempt == 1:
            results = self._score(batch, names)
        else:
            # Each attempt but the last adds an image to `failed`, unless workers die elsewhere: then that is the end.
            if attempt > len(names) + 2:
                failed = {position: failed.get(position, DIED) for position in positions}
            results = []
            for position, name in zip(positions, names, strict=True):
                if position in failed:
                    error = f"worker failed twice: {failed[position]}"
                    results.append(Result(name, math.nan, self._scorer.threshold, 0.0, error))
                else:
                    self._tell("at", batch, position)
                    results += self._score(batch, [name])
            self._tell("at", batch, None)
        return _table(positions, results)

    def _score(self, batch: int, names: list[str]) -> list[Result]:
        """Results of files; an error ends this process, so that nothing of what caused it meets another image: after
        some errors CUDA fails whatever is asked of the process."""
        try:
            results = list(self._scorer.stream(names))
        except Exception as error:
            self._tell("failing", batch, f"{type(error).__name__}: {' '.join(str(error).split())}")
            os._exit(1)
        if self._pictures:
            return results
        return [replace(result, image=None, anomaly_map=None, reconstruction=None) for result in results]

    def _tell(self, what: str, *words: Any) -> Any:
        """Call the ledger, and wait until it knows."""
        import ray

        return ray.get(getattr(self._ledger, what).remote(*words))


def _blocks(paths: Iterable[str | os.PathLike[str]], batch_size: int) -> Iterator[pyarrow.Table]:
    """Paths and their positions, a batch a block."""
    import pyarrow

    numbered = enumerate(paths)
    while batch := list(itertools.islice(numbered, batch_size)):
        positions, names = zip(*batch, strict=True)
        # File names are bytes, and not always text.
        packed = pyarrow.array([os.fsencode(name) for name in names], pyarrow.large_binary())
        yield pyarrow.table({"position": positions, "path": packed})


def _table(positions: list[int], results: Sequence[Result | RunError]) -> pyarrow.Table:
    import pyarrow

    packed = pyarrow.array([pickle.dumps(result) for result in results], pyarrow.large_binary())
    return pyarrow.table({"position": positions, "result": packed})


def _require_ray() -> None:
    """Ray and what Ray Data needs are installed."""
    for package in ("ray", "pyarrow"):
        if importlib.util.find_spec(package) is None:
            raise BackendUnavailableError(
                f"engine 'ray' needs the package {package}. To get it: pip install 'memad_fast[ray]'"
            )


@contextmanager
def _cluster(cpus: int) -> Iterator[None]:
    """Connected to a Ray cluster: as this process is already, as RAY_ADDRESS says, or to one of its own on this
    machine with room for ``cpus``."""
    import ray

    if ray.is_initialized():
        yield
        return
    own: dict[str, Any] = {
        "address": "local",
        "num_cpus": max(cpus, usable_cores()),
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    try:
        with _environment(_SILENCE):
            there = {} if os.environ.get("RAY_ADDRESS") else own
            ray.init(**there, log_to_driver=False, logging_level=logging.ERROR)
        yield
    finally:
        ray.shutdown()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """These variables in the environment, unless they are there."""
    new = variables.keys() - os.environ.keys()
    os.environ.update({name: variables[name] for name in new})
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of Ray Data, and no traceback for each worker that dies: its images' rows say what became of
    them. A line for each Ray prints all the same."""
    import ray.data

    logger, context = logging.getLogger("ray.data"), ray.data.DataContext.get_current()
    before = logger.level, context.enable_progress_bars
    logger.setLevel(logging.CRITICAL)
    context.enable_progress_bars = False
    try:
        yield
    finally:
        logger.setLevel(before[0])
        context.enable_progress_bars = before[1]


def _start_ledger(workers: int) -> Any:
    """A ledger in a process of its own, on this process's node: it is lost only together with the scoring."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor: Any = ray.remote(Ledger)
    return actor.options(num_cpus=0, scheduling_strategy=here).remote(workers)


def _in_order(blocks: list[pyarrow.Table]) -> Any:
    """A dataset of these blocks, whose results come in the order of the blocks."""
    import ray.data

    dataset = ray.data.from_blocks(blocks)
    dataset.context.execution_options.preserve_order = True
    dataset.context.target_max_block_size = None  # the results of a batch stay together
    return dataset
