"""Several processes train what one would have trained: losses, memories and stages that train nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from trainings import Turns, fit_tiny, parts, trained_together, turns

from memad_fast import models
from memad_fast.models import TrainingSettings

# Batches of 5 and of 1: shares of 3, 2, 1 and none.
OPTIONS = {"settings": TrainingSettings(0.01, 5, 2), "data": parts(8, train=11), "validation_fraction": 0.0}


@pytest.fixture(autouse=True)
def _turns_are_known(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setitem(models.MODELS, "turns", Turns)


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_train_what_one_would(tmp_path: Path, count: int) -> None:
    alone = fit_tiny("turns", tmp_path / "alone", model=turns(), **OPTIONS).model.state_dict()
    states = trained_together([partial(turns, seed=rank) for rank in range(count)], tmp_path / "run", **OPTIONS)
    for state in states:
        for name, value in alone.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6, msg=name)
            assert torch.equal(state[name], states[0][name]), name


def test_one_process_goes_on_where_two_stopped(tmp_path: Path) -> None:
    alone = fit_tiny("turns", tmp_path / "alone", model=turns(), **OPTIONS).model.state_dict()
    trained_together([turns, turns], tmp_path / "run", max_minutes=1e-9, **OPTIONS)
    assert (tmp_path / "run" / "resume.safetensors").exists()
    state = fit_tiny("turns", tmp_path / "run", model=turns(seed=1), **OPTIONS).model.state_dict()
    for name, value in alone.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6, msg=name)
