"""Scoring on Ray: the local engine's output, bit for bit, whatever becomes of the workers.

Workers take their class from the driver by value, so a subclass here plants failures in them: its model dies, raises
or waits at images of certain grey levels. The driver knows the same model without the failures.
"""

from __future__ import annotations

import csv
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor

from memad_fast import models
from memad_fast.data import preprocessing
from memad_fast.models.base import AnomalyModel, Objective, Preset, Scores, Stage, TrainingSettings
from memad_fast.scoring import RunError, ScoreSummary, ray_engine, save_run, score

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
            _wait_for(flags / "waited for")
        if WAITED_FOR in levels:
            (flags / "waited for").touch()
        return super()._score(images)


def _wait_for(path: Path) -> None:
    until = time.monotonic() + 100  # only so that a mistake fails rather than hangs
    while not path.exists():
        assert time.monotonic() < until, f"{path} has not come"
        time.sleep(0.01)


class Planted(ray_engine._Worker):
    """A worker in whose process the model is the planted one."""

    def __init__(self, **arguments: object) -> None:
        models.MODELS["grey"] = PlantedGrey
        super().__init__(**arguments)  # type: ignore[arg-type]


class DiesLoading(ray_engine._Worker):
    """A worker that has not enough memory for the run."""

    def _load(self, **arguments: object) -> None:
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
