"""A detector that is given a part which was trained beforehand, in a run of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from memad_fast import models
from memad_fast.data import preprocessing
from memad_fast.models import EdgeConfig, EdgeExtractor, SemanticConfig, SemanticExtractor
from memad_fast.models.base import AnomalyModel, Objective, Preset, Scores, Stage, Trainable, TrainingSettings
from memad_fast.scoring import RunError, fit, load_extractor, load_run, save_run, set_up

SETTINGS = TrainingSettings(learning_rate=0.01, batch_size=8, epochs=1)


@dataclass(frozen=True)
class ContourConfig:
    image_size: int = 32
    channels: int = 1


class Contour(AnomalyModel):
    """Looks at the edges that it is given; makes do with its own, which it trains first, where none are."""

    name: ClassVar[str] = "contour"
    Config: ClassVar[type] = ContourConfig
    PARTS: ClassVar[dict[str, type[Trainable]]] = {"edges": EdgeExtractor}

    def __init__(self, config: ContourConfig, *, edges: EdgeExtractor | None = None) -> None:
        super().__init__(config, edges=edges)
        self.edges = EdgeExtractor(EdgeConfig(config.image_size, config.channels, width=2)) if edges is None else edges
        self.head = nn.Conv2d(1, config.channels, 3, padding=1)

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        return {"contour": Preset(ContourConfig(), SETTINGS)}

    def stages(self) -> tuple[Stage, ...]:
        head = Stage("head", (Objective("head", list(self.head.parameters()), self.losses),))
        return (head,) if self.given_parts else (*self.edges.stages(), head)

    def losses(self, images: Tensor) -> dict[str, Tensor]:
        return {"total": (self.head(self.edges.extract(images)) - images).square().mean()}

    def _score(self, images: Tensor) -> Scores:
        made = self.head(self.edges.extract(images))
        error = (made - images).abs().mean(dim=1, keepdim=True)
        return Scores(error.flatten(1).mean(dim=1), error, made)


@pytest.fixture(autouse=True)
def _contour_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "contour", Contour)


def edges_of(size: int = 32, channels: int = 1, width: int = 4) -> EdgeExtractor:
    torch.manual_seed(7)
    return EdgeExtractor(EdgeConfig(image_size=size, channels=channels, width=width))


def save(folder: Path, part: Trainable) -> Path:
    save_run(folder, part, preprocessing=preprocessing(part.config.image_size, part.config.channels), training={})
    return folder


@pytest.fixture
def grey_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "parts" / "train" / "good"
    folder.mkdir(parents=True)
    for index in range(3):
        Image.new("L", (40, 30), 60 * index).save(folder / f"{index}.png")
    return tmp_path / "parts"


@pytest.fixture
def stripes(make_stripes: Callable[..., Any]) -> Any:
    return make_stripes(train=12, image_size=32)


def test_an_extractors_run_gives_the_extractor_back(tmp_path: Path) -> None:
    part = edges_of()
    run = load_extractor(save(tmp_path / "fe", part), "cpu")
    assert (run.model_name, run.image_size, run.channels) == ("edge-extractor", 32, 1)
    assert not run.model.training
    assert all(torch.equal(value, run.model.state_dict()[name]) for name, value in part.state_dict().items())


def test_a_given_part_is_kept_as_it_is_and_its_stage_is_left_out(tmp_path: Path, stripes: Any) -> None:
    part = edges_of()
    before = {name: value.clone() for name, value in part.state_dict().items()}
    run = fit(Contour(ContourConfig(), edges=part), stripes, tmp_path / "run", settings=SETTINGS, quiet=True)
    assert list(run.config["training"]["stages"]) == ["head"]
    assert isinstance(run.model, Contour)
    assert run.model.edges.config == part.config  # width 4, where Contour's own has 2
    for name, value in run.model.edges.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(parameter.requires_grad for parameter in run.model.edges.parameters())


def test_a_training_goes_on_with_the_same_part_only(tmp_path: Path, stripes: Any) -> None:
    options = {"settings": SETTINGS, "quiet": True, "device": "cpu"}
    fit(
        Contour(ContourConfig(), edges=edges_of()), stripes, tmp_path / "run", epochs=10**6, max_minutes=1e-3, **options
    )
    other = edges_of()
    with torch.no_grad():
        other.network.head.bias += 1
    with pytest.raises(RunError, match="belongs to another training, its given parts"):
        fit(Contour(ContourConfig(), edges=other), stripes, tmp_path / "run", epochs=1, **options)


def test_without_the_part_the_model_trains_its_own(tmp_path: Path, stripes: Any) -> None:
    run = fit(Contour(ContourConfig()), stripes, tmp_path / "run", settings=SETTINGS, quiet=True)
    assert list(run.config["training"]["stages"]) == ["edges", "head"]
    assert "parts" not in run.config["model"]


def test_set_up_takes_parts_from_their_runs_and_their_size(tmp_path: Path, grey_folder: Path) -> None:
    folder = save(tmp_path / "fe", edges_of(size=48, channels=3))
    setup = set_up("contour", grey_folder, parts={"edges": folder})
    assert setup.model.given_parts["edges"].config.image_size == 48
    assert (setup.data.image_size, setup.data.channels) == (48, 3)


def test_a_size_that_the_part_does_not_have_is_refused(tmp_path: Path, grey_folder: Path) -> None:
    folder = save(tmp_path / "fe", edges_of(size=48))
    with pytest.raises(
        ValueError, match="edges: the model takes 1 channels at 64 pixels, the part was made for 1 at 48"
    ):
        set_up("contour", grey_folder, parts={"edges": folder}, size=64)


def test_a_part_of_another_kind_is_refused(tmp_path: Path, grey_folder: Path, toy_run_folder: Path) -> None:
    semantic = save(tmp_path / "fs", SemanticExtractor(SemanticConfig(image_size=32, channels=1, width=2)))
    with pytest.raises(RunError, match="a run of semantic-extractor, expected one of edge-extractor for part 'edges'"):
        set_up("contour", grey_folder, parts={"edges": semantic})
    with pytest.raises(RunError, match="a run of the detector toy, expected an extractor's"):
        set_up("contour", grey_folder, parts={"edges": toy_run_folder})
    with pytest.raises(ValueError, match="parts: model contour has edges, not 'semantic'"):
        set_up("contour", grey_folder, parts={"semantic": semantic})
    with pytest.raises(ValueError, match="parts: model pmb takes none, not 'edges'"):
        set_up("pmb", grey_folder, parts={"edges": semantic})
    with pytest.raises(RunError, match="no such run folder"):
        set_up("contour", grey_folder, parts={"edges": tmp_path / "nowhere"})
    with pytest.raises(TypeError, match="edges: expected EdgeExtractor, got Linear"):
        Contour(ContourConfig(), edges=nn.Linear(1, 1))  # type: ignore[arg-type]


def test_an_extractors_run_is_no_detector(tmp_path: Path) -> None:
    folder = save(tmp_path / "fe", edges_of())
    with pytest.raises(RunError, match="a run of edge-extractor, which scores nothing"):
        load_run(folder)


def test_a_torn_run_of_an_extractor_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "fe", edges_of())
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-9])
    with pytest.raises(RunError, match="truncated"):
        load_extractor(folder)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["config"]["width"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="altered"):
        load_extractor(folder)
