"""Scoring on Ray: the local engine's output, bit for bit, whatever becomes of the workers.

Workers take their class from the driver by value, so a subclass here plants failures in them: its model dies, raises
or waits at images of certain grey levels. The driver knows the same model without the failures.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor

import memad_fast
from memad_fast import BackendUnavailableError, models
from memad_fast.data import preprocessing
from memad_fast.models.base import AnomalyModel, Objective, Preset, Scores, Stage, TrainingSettings
from memad_fast.scoring import RayScorer, RunError, ScoreSummary, load_run, ray_engine, save_run, score, set_up

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'memad_fast[ray]'")
pytest.importorskip("ray.data", reason="needs Ray Data: pip install 'memad_fast[ray]'")

# Grey levels of images at which workers do something.
DIES_ONCE, DIES, RAISES, WAITS, WAITED_FOR = 10, 20, 30, 40, 50


@dataclass(frozen=True)
class GreyConfig:
    image_size: int = 4
    channels: int = 1
    flags: str = ""  # a folder: what happened once leaves a file there


class Grey(AnomalyModel):
    """An image's score is its mean grey level."""

    name: ClassVar[str] = "grey"
    Config: ClassVar[type] = GreyConfig

    def __init__(self, config: GreyConfig) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.ones(()))

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        return {"grey": Preset(GreyConfig(), TrainingSettings(learning_rate=0.01, batch_size=8, epochs=3))}

    def stages(self) -> tuple[Stage, ...]:
        return (Stage("training", (Objective("model", list(self.parameters()), self.loss),)),)

    def loss(self, images: Tensor) -> dict[str, Tensor]:
        return {"total": (self.weight * images).square().mean()}

    def _score(self, images: Tensor) -> Scores:
        return Scores((self.weight * images).mean((1, 2, 3)), self.weight * images, images / 2)


class PlantedGrey(Grey):
    """The same, but for some images."""

    def _score(self, images: Tensor) -> Scores:
        flags = Path(self.config.flags)
        levels = (images.amax((1, 2, 3)) * 255).round().int().tolist()
        if DIES_ONCE in levels and not (flags / "died").exists():
            (flags / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if DIES in levels:
            os.kill(os.getpid(), signal.SIGKILL)
        if RAISES in levels:
            raise ArithmeticError("no such\nlevel")
        if WAITS in levels:
            _wait_until((flags / "waited for").exists, "the last batch has not come")
        if WAITED_FOR in levels:
            (flags / "waited for").touch()
        return super()._score(images)


def _wait_until(holds: Callable[[], bool], otherwise: str) -> None:
    until = time.monotonic() + 100  # only so that a mistake fails rather than hangs
    while not holds():
        assert time.monotonic() < until, otherwise
        time.sleep(0.01)


class Planted(ray_engine._Worker):
    """A worker in whose process the model is the planted one."""

    def __init__(self, **arguments: object) -> None:
        models.MODELS["grey"] = PlantedGrey
        super().__init__(**arguments)  # type: ignore[arg-type]


class DiesLoading(ray_engine._Worker):
    """A worker that has not enough memory for the run, as the two before it, which left no more than their names."""

    def _load(self, **arguments: object) -> None:
        for _ in range(ray_engine._MOST_DEATHS_WHILE_LOADING):
            self._tell("begin_loading")
        os.kill(os.getpid(), signal.SIGKILL)


class FindsNoRun(ray_engine._Worker):
    """A worker on a node that does not see the run folder."""

    def __init__(self, **arguments: object) -> None:
        super().__init__(**{**arguments, "run": "/nowhere"})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=100 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    ray.shutdown()


@pytest.fixture(autouse=True)
def _grey_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "grey", Grey)
    monkeypatch.setattr(ray_engine, "_Worker", Planted)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (tmp_path / "flags").mkdir()
    save_run(
        folder,
        Grey(GreyConfig(flags=str(tmp_path / "flags"))),
        threshold={"value": 0.35, "map_level": 0.5, "quantile": 0.99, "count": 19, "images": "held-out images"},
        preprocessing=preprocessing(4, 1),
        training={},
    )
    return folder


def _fill(folder: Path, levels: list[int]) -> Path:
    folder.mkdir()
    for index, level in enumerate(levels):
        Image.new("L", (5 + index, 6), level).save(folder / f"{index:02}.png")
    return folder


def _rows(summary: ScoreSummary) -> list[dict[str, str]]:
    with summary.csv.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row.pop("milliseconds")) >= 0
    return rows


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


def _page(summary: ScoreSummary) -> str:
    """The report without what is of the clock."""
    assert summary.report is not None
    page = summary.report.read_text(encoding="utf-8")
    page = re.sub(r"[\d.,]+ ms|\d{4}-\d\d-\d\d \d\d:\d\d", "", page)
    return re.sub(r"<b>[\d.,]+</b>images per second", "", page)


@pytest.mark.slow
def test_the_output_is_that_of_the_local_engine_though_later_images_are_scored_first(
    cluster: None, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first batch waits for the last one. Its worker has one more batch at hand, which is an earlier one than that.
    images = _fill(tmp_path / "images", [WAITS, *range(100, 109), 60, WAITED_FOR])
    (images / "03x.png").write_text("not an image")
    (images / os.fsdecode(b"04\xe9.png")).write_bytes((images / "04.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    local, there = (
        score("run", "images", engine, heatmaps=True, report=True, batch_size=2, engine=engine)
        for engine in ("local", "ray")
    )
    assert _rows(there) == _rows(local)
    assert len(_files(tmp_path / "local")) == 13
    assert _files(tmp_path / "ray") == _files(tmp_path / "local")
    assert _page(there) == _page(local)
    assert (there.images, there.anomalies, there.failures) == (local.images, local.anomalies, local.failures)
    assert there.failures == 1
    assert (local.engine, there.engine) == ("local", "ray")
    assert 0 < there.waiting <= there.seconds


@pytest.mark.slow
def test_images_of_a_worker_that_dies_or_raises_are_tried_once_more_and_then_reported(
    cluster: None, run_folder: Path, tmp_path: Path
) -> None:
    """Batches of three: one whose worker dies once, one with two poisonous images, one that has none."""
    images = _fill(tmp_path / "images", [100, DIES_ONCE, 101, DIES, 102, RAISES, 200])
    seen = []
    summary = score(run_folder, images, tmp_path / "out", batch_size=3, engine="ray", on_result=seen.append)
    assert (tmp_path / "flags" / "died").exists()
    expected = _rows(score(run_folder, images, tmp_path / "local", batch_size=3))
    errors = {
        3: "worker failed twice: its process ended (killed, or out of memory)",
        5: "worker failed twice: ArithmeticError: no such level",
    }
    for position, error in errors.items():
        expected[position] |= {"score": "", "is_anomaly": "", "error": error}
    assert _rows(summary) == expected
    assert (summary.images, summary.failures) == (7, 2)
    assert [result.path for result in seen] == [row["path"] for row in expected]
    assert all(result.anomaly_map is result.image is result.reconstruction is None for result in seen)


@pytest.mark.slow
def test_a_run_that_no_worker_can_load_ends_the_scoring_with_the_reason(
    cluster: None, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = _fill(tmp_path / "images", [100])
    monkeypatch.setattr(ray_engine, "_Worker", FindsNoRun)
    with pytest.raises(RunError, match=r"cannot load the run: .*no such run folder"):
        score(run_folder, images, tmp_path / "out", engine="ray", actors=1)
    assert not (tmp_path / "out" / "scores.csv").exists()
    monkeypatch.setattr(ray_engine, "_Worker", DiesLoading)
    with pytest.raises(RunError, match="cannot load the run: 3 workers before it died"):
        score(run_folder, images, tmp_path / "out", engine="ray", actors=1)


def test_ray_is_asked_for_by_name_where_it_is_missing(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = _fill(tmp_path / "images", [100])
    find = importlib.util.find_spec
    for missing in ("ray", "pyarrow"):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, gone=missing: None if name == gone else find(name)
        )
        with pytest.raises(BackendUnavailableError, match=rf"needs the package {missing}.*memad_fast\[ray\]"):
            score(run_folder, images, tmp_path / "out", engine="ray")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "spark"}, "engine: expected one of local, ray, got 'spark'"),
        ({"engine": "local", "actors": 2}, "only engine 'ray' has actors"),
        ({"engine": "local", "actor_gpus": 1.0}, "only engine 'ray' has actors"),
        ({"actors": 0}, "actors: expected at least 1, got 0"),
        ({"workers": 0}, "workers: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"threshold": float("inf")}, "threshold: expected a finite number"),
        ({"actor_gpus": -1.0}, "actor_gpus: expected a finite number of at least 0, got -1"),
        ({"actor_gpus": float("nan")}, "actor_gpus: expected a finite number of at least 0, got nan"),
        ({"device": "cuda:1"}, "device: .* expected auto, cpu or cuda"),
        ({"device": "cpu", "actor_gpus": 0.5}, "actor_gpus: 0.5 does not go with device cpu"),
        ({"device": "cuda", "actor_gpus": 0.0}, "actor_gpus: 0.0 does not go with device cuda"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(
    run_folder: Path, tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score(run_folder, _fill(tmp_path / "images", [100]), tmp_path / "out", **{"engine": "ray", **arguments})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_loaded_run_and_a_torn_one_are_refused(run_folder: Path) -> None:
    with pytest.raises(TypeError, match="expected a run folder"):
        RayScorer(load_run(run_folder, "cpu"))
    (run_folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match="truncated"):
        RayScorer(run_folder)


def test_a_cluster_without_room_for_one_actor_is_told(cluster: None, run_folder: Path) -> None:
    with pytest.raises(ValueError, match="no node of the Ray cluster has 3 CPU for an actor"):
        next(RayScorer(run_folder, workers=3).stream(["x.png"]))
    with pytest.raises(ValueError, match="no node of the Ray cluster has 1 CPU and 1 GPU for an actor"):
        next(RayScorer(run_folder, device="cuda", actors=2).stream(["x.png"]))
    assert list(RayScorer(run_folder).stream([])) == []


@pytest.mark.slow
def test_who_stops_reading_frees_the_actors(cluster: None, run_folder: Path, tmp_path: Path) -> None:
    paths = sorted(_fill(tmp_path / "images", [100] * 6).iterdir())
    results = RayScorer(run_folder, batch_size=1).stream(paths)
    assert next(results).path == str(paths[0])
    assert ray.available_resources().get("CPU", 0) == 0
    results.close()
    _wait_until(lambda: ray.available_resources().get("CPU", 0) == 2, "the CPUs are not free")


COMMAND = "from memad_fast.cli import main; main()"


@pytest.mark.slow
def test_the_command_starts_a_cluster_of_its_own_and_leaves_nothing_behind(tmp_path: Path) -> None:
    images = _fill(tmp_path / "images", [100, 200])
    (images / "1x.png").write_text("not an image")
    setup = set_up("pmb", "digits", normal_class=0, options={"memory": "none", "widths": (4, 8, 8)})
    save_run(
        tmp_path / "run",
        setup.model,
        threshold={"value": 0.35, "map_level": 0.5},
        preprocessing=preprocessing(32, 1),
        training={},
    )
    command = [sys.executable, "-c", COMMAND, "score", "--run", "run", "--input", "images", "--out"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"MARK": str(tmp_path), "PYTHONPATH": str(Path(memad_fast.__file__).parents[1])}
    for engine in ("local", "ray"):
        done = subprocess.run(
            [*command, engine, "--engine", engine], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 1, done.stderr  # for the one that is not an image
        assert ("on Ray" in done.stdout) == (engine == "ray")
        assert "Traceback" not in done.stderr
    texts = [re.sub(r",[\d.]+,", ",", (tmp_path / engine / "scores.csv").read_text()) for engine in ("local", "ray")]
    assert texts[0] == texts[1]
    # Ray's helpers end by themselves, once they see that the cluster is gone.
    mark = f"MARK={tmp_path}"
    _wait_until(lambda: not any(mark in _environment_of(process) for process in _processes()), "processes are left")


def _processes() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit()] if os.path.isdir("/proc") else []


def _environment_of(process: str) -> str:
    try:
        return Path("/proc", process, "environ").read_text(errors="replace")
    except OSError:
        return ""
