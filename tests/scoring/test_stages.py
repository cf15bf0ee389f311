"""A training of several stages: each runs to its end, its optimisers change their own parameters only, and an
interruption anywhere changes nothing."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from trainings import ended_after, unplug

from memad_fast import models
from memad_fast._progress import Tell
from memad_fast.models.base import AnomalyModel, Objective, Preset, Scores, Stage, TrainingSettings
from memad_fast.scoring import fit
from memad_fast.scoring.training import _decay

SETTINGS = TrainingSettings(learning_rate=0.01, batch_size=8, epochs=3)


@dataclass(frozen=True)
class PairConfig:
    image_size: int = 8
    channels: int = 1
    poison: bool = False


class Pair(AnomalyModel):
    """Two stages: an auto-encoder against a critic, then a bank of seen images, without an optimiser."""

    name: ClassVar[str] = "pair"
    Config: ClassVar[type] = PairConfig

    def __init__(self, config: PairConfig) -> None:
        super().__init__(config)
        self.maker = nn.Conv2d(1, 1, 3, padding=1)
        self.critic = nn.Conv2d(1, 1, 3)
        self.register_buffer("brightness", torch.zeros(()))
        self.register_buffer("finished", torch.zeros((), dtype=torch.int64))

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        return {"pair": Preset(PairConfig(), SETTINGS)}

    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage(
                "contest",
                (
                    Objective("maker", list(self.maker.parameters()), self._maker_losses),
                    Objective("critic", list(self.critic.parameters()), self._critic_losses),
                ),
            ),
            Stage("collection", epochs=2, observe=self._see, finish=self._finish, time_share=3.0),
        )

    def _maker_losses(self, images: Tensor) -> dict[str, Tensor]:
        assert not any(parameter.requires_grad for parameter in self.critic.parameters())
        made = self.maker(images + 0.1 * torch.randn_like(images))
        total = (made - images).square().mean() - 0.01 * self.critic(made).mean()
        return {"total": total, "mse": (made - images).square().mean()}

    def _critic_losses(self, images: Tensor) -> dict[str, Tensor]:
        assert not any(parameter.requires_grad for parameter in self.maker.parameters())
        total = self.critic(self.maker(images).detach()).mean() + self.critic(images).square().mean()
        return {"total": total * torch.nan if self.config.poison else total}

    def _see(self, images: Tensor) -> None:
        self.brightness += images.mean()

    def _finish(self, tell: Tell) -> None:
        self.finished.fill_(1)
        tell(1, 1)

    def _score(self, images: Tensor) -> Scores:
        made = self.maker(images)
        error = (made - images).abs()
        return Scores(error.flatten(1).mean(dim=1), error, made)


@pytest.fixture(autouse=True)
def _pair_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "pair", Pair)


@pytest.fixture
def run_fit(make_stripes: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    def run(out: str, **options: Any) -> Any:
        torch.manual_seed(0)
        model = Pair(PairConfig(poison=options.pop("poison", False)))
        return fit(
            model, make_stripes(), tmp_path / out, **{"settings": SETTINGS, "device": "cpu", "quiet": True} | options
        )

    return run


def weights(run: Any) -> dict[str, Tensor]:
    return run.model.state_dict()


def test_every_stage_runs_to_its_end_and_leaves_a_log(run_fit: Callable[..., Any]) -> None:
    run = run_fit("run")
    stages = run.config["training"]["stages"]
    assert {name: (stage["epochs_done"], stage["steps_done"]) for name, stage in stages.items()} == {
        "contest": (3.0, 12),
        "collection": (2.0, 8),
    }
    assert set(run.config["training"]["losses"]) == {"maker.total", "maker.mse", "critic.total"}
    with (run.folder / "log" / "contest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert set(rows[0]) == {"epoch", "step", "seconds", "maker.total", "maker.mse", "critic.total"}
    assert float(weights(run)["brightness"]) > 0
    assert int(weights(run)["finished"]) == 1
    assert not (run.folder / "resume.safetensors").exists()


def test_a_bar_shows_how_a_stage_ends_unless_it_is_to_be_quiet(
    run_fit: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run_fit("shown", quiet=False)
    shown = capsys.readouterr().out
    assert "finishing collection" in shown
    assert "finishing contest" not in shown
    run_fit("quiet")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("steps", [1, 7, 12, 13, 19])
def test_an_interruption_in_any_stage_changes_nothing(run_fit: Callable[..., Any], steps: int) -> None:
    whole = run_fit("whole")
    with ended_after(steps, unplug) as done:
        with pytest.raises(InterruptedError):
            run_fit("parts", checkpoint_seconds=0.0)
        parts = run_fit("parts", checkpoint_seconds=0.0)
    assert done[0] >= 20
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(parts)[name]), name
    assert whole.config["threshold"] == parts.config["threshold"]


def test_every_stage_has_its_share_of_a_limited_time(run_fit: Callable[..., Any]) -> None:
    run = run_fit("run", epochs=1_000_000, max_minutes=0.02)
    stages = run.config["training"]["stages"]
    assert stages["contest"]["steps_done"] >= 1
    assert stages["collection"]["epochs_done"] == 2.0
    assert int(weights(run)["finished"]) == 1


def test_a_loss_of_any_objective_that_is_not_finite_stops_the_training(run_fit: Callable[..., Any]) -> None:
    from memad_fast.scoring.training import TrainingError

    with pytest.raises(TrainingError, match="the loss became nan in epoch 1, step 1 of 4"):
        run_fit("run", poison=True)


def test_gradients_are_clipped_where_that_is_asked_for(run_fit: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    start = Pair(PairConfig()).maker.weight
    # Adam divides by the gradient's size: only below its epsilon does a clipped gradient move nothing.
    clipped = run_fit("clipped", trainer_options={"gradient_clip_val": 1e-12})
    torch.testing.assert_close(weights(clipped)["maker.weight"], start, atol=1e-4, rtol=0)
    assert (weights(run_fit("free"))["maker.weight"] - start).abs().max() > 1e-2


def test_the_learning_rate_is_constant_and_then_falls_to_zero_linearly() -> None:
    assert [_decay(step, 10, 1.0) for step in range(10)] == [1.0] * 10
    assert [_decay(step, 8, 0.5) for step in range(8)] == [1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert [_decay(step, 4, 0.0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
