"""Training: reproducible, resumable at any step, limited in time, and never half written."""

from __future__ import annotations

import csv
import json
import math
import signal
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from memad_fast.data import ImageError, from_arrays, open_data, split_normals
from memad_fast.models.base import AnomalyModel, TrainingSettings
from memad_fast.scoring import RunError, fit, load_run
from memad_fast.scoring.training import Batches, Plan, Recorder, TrainingError, TrainingImages

Make = Callable[..., Any]


@pytest.fixture
def run_fit(make_toy: Make, make_stripes: Make, settings: TrainingSettings, tmp_path: Path) -> Make:
    def run(out: str = "run", model: AnomalyModel | None = None, data: Any = None, **options: Any) -> Any:
        options = {"settings": settings, "device": "cpu", "quiet": True} | options
        return fit(model or make_toy(), data or make_stripes(), tmp_path / out, **options)

    return run


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Interrupt the training with an exception once that many steps are done; None lets it run."""
    original = Recorder.on_train_batch_end
    limit: list[int | None] = [None]

    def wrapped(self: Recorder, *arguments: Any) -> None:
        original(self, *arguments)
        if limit[0] is not None and self.progress.step >= limit[0]:
            raise InterruptedError("pulled the plug")

    monkeypatch.setattr(Recorder, "on_train_batch_end", wrapped)
    return lambda steps: limit.__setitem__(0, steps)


def same_weights(first: Any, second: Any) -> bool:
    other = second.model.state_dict()
    return all(torch.equal(value, other[name]) for name, value in first.model.state_dict().items())


def read_log(folder: Path) -> list[dict[str, str]]:
    with (folder / "log" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_training_learns_the_normal_images_and_separates_the_others(run_fit: Make, make_stripes: Make) -> None:
    run = run_fit(epochs=20)
    data = make_stripes()
    scores = run.model.score(torch.stack([item.image for item in data.test])).image_score
    assert scores[:8].max() < scores[8:].min()
    rows = read_log(run.folder)
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(1, 21)]
    assert float(rows[-1]["total"]) < 0.1 * float(rows[0]["total"])


def test_the_run_records_how_it_came_about_and_holds_no_pickle(run_fit: Make) -> None:
    run = run_fit(epochs=2, seed=5)
    training = run.config["training"]
    assert (training["seed"], training["epochs_done"], training["steps_done"]) == (5, 2.0, 8)
    assert training["stopped_by"] == "epochs"
    assert run.config["threshold"]["count"] == 4
    assert run.config["data"]["kind"] == "arrays"
    files = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*") if path.is_file()}
    assert files == {"model.safetensors", "config.json", "log/metrics.csv"}
    for file in files:
        assert not (run.folder / file).read_bytes().startswith((b"\x80", b"PK"))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(run_fit: Make) -> None:
    first, again, other = run_fit("a"), run_fit("b"), run_fit("c", seed=1)
    assert same_weights(first, again)
    assert first.config["threshold"] == again.config["threshold"]
    assert not same_weights(first, other)


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 11])
def test_a_training_interrupted_at_any_step_ends_like_one_that_was_not(
    run_fit: Make, stop_after: Callable[[int | None], None], tmp_path: Path, steps: int
) -> None:
    whole = run_fit("whole")
    stop_after(steps)
    with pytest.raises(InterruptedError):
        run_fit("parts", checkpoint_seconds=0.0)
    assert not (tmp_path / "parts" / "config.json").exists()
    stop_after(None)
    torch.rand(7)  # whatever else drew random numbers meanwhile
    parts = run_fit("parts", checkpoint_seconds=0.0)
    assert same_weights(whole, parts)
    assert whole.config["threshold"] == parts.config["threshold"]
    without_time = [{key: value for key, value in row.items() if key != "seconds"} for row in read_log(whole.folder)]
    assert [{key: value for key, value in row.items() if key != "seconds"} for row in read_log(parts.folder)] == (
        without_time
    )
    assert not (parts.folder / "resume.safetensors").exists()


def test_an_interruption_by_hand_is_a_keyboard_interrupt_and_leaves_the_handler(
    run_fit: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_fit("whole")
    original = Recorder.on_train_batch_end

    def press(self: Recorder, *arguments: Any) -> None:
        original(self, *arguments)
        if self.progress.step == 6:
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Recorder, "on_train_batch_end", press)
    with pytest.raises(KeyboardInterrupt):
        run_fit("parts", checkpoint_seconds=0.0)
    monkeypatch.setattr(Recorder, "on_train_batch_end", original)
    assert signal.getsignal(signal.SIGINT) is handler
    assert same_weights(whole, run_fit("parts"))


def test_steps_after_the_last_checkpoint_are_done_again(
    run_fit: Make, stop_after: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_fit("whole")
    save = Recorder.save
    monkeypatch.setattr(
        Recorder, "save", lambda self, trainer: save(self, trainer) if self.progress.step in (3, 12) else None
    )
    stop_after(7)
    with pytest.raises(InterruptedError):
        run_fit("parts", checkpoint_seconds=0.0)
    stop_after(None)
    parts = run_fit("parts")
    assert same_weights(whole, parts)
    assert [row["epoch"] for row in read_log(parts.folder)] == ["1", "2", "3"]


def test_without_resume_training_starts_anew(run_fit: Make, stop_after: Callable[[int | None], None]) -> None:
    whole = run_fit("whole")
    stop_after(5)
    with pytest.raises(InterruptedError):
        run_fit("parts", checkpoint_seconds=0.0)
    stop_after(None)
    assert same_weights(whole, run_fit("parts", resume=False))


def test_a_time_limit_stops_at_a_step_and_the_run_is_usable_and_can_go_on(run_fit: Make) -> None:
    run = run_fit(epochs=100_000, max_minutes=0.01)
    training = run.config["training"]
    assert training["stopped_by"] == "max_minutes"
    assert 1 <= training["steps_done"] < 400_000
    assert math.isfinite(run.threshold)
    assert (run.folder / "resume.safetensors").exists()
    longer = run_fit(epochs=100_000, max_minutes=0.01)
    assert longer.config["training"]["steps_done"] > training["steps_done"]


def test_stopping_by_time_and_going_on_ends_like_one_sitting(run_fit: Make) -> None:
    whole = run_fit("whole", epochs=5)
    stopped = run_fit("parts", epochs=5, max_minutes=1e-9)
    assert stopped.config["training"]["stopped_by"] == "max_minutes"
    parts = run_fit("parts", epochs=5)
    assert same_weights(whole, parts)


def test_more_epochs_may_be_asked_for_when_going_on(run_fit: Make) -> None:
    whole = run_fit("whole", epochs=4)
    run_fit("parts", epochs=3, max_minutes=1e-9)
    assert same_weights(whole, run_fit("parts", epochs=4))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"precision": "bf16-mixed"}, "precision"),
        ({"settings": TrainingSettings(0.5, 8, 3)}, "learning rate"),
        ({"validation_fraction": 0.3}, "training images"),
    ],
)
def test_going_on_with_another_training_is_refused(run_fit: Make, change: dict[str, Any], named: str) -> None:
    run_fit(max_minutes=1e-9)
    with pytest.raises(RunError, match=rf"resume\.safetensors: belongs to another training.*{named}"):
        run_fit(**change)


def test_a_checkpoint_of_another_architecture_is_refused(run_fit: Make, make_toy: Make) -> None:
    run_fit(max_minutes=1e-9)
    with pytest.raises(RunError, match="model config"):
        run_fit(model=make_toy(noise=0.5))


@pytest.mark.parametrize("place", ["cut", "empty", "header", "middle", "end"])
def test_a_damaged_checkpoint_is_refused_by_name(run_fit: Make, tmp_path: Path, place: str) -> None:
    run_fit(max_minutes=1e-9)
    path = tmp_path / "run" / "resume.safetensors"
    data = bytearray(path.read_bytes())
    if place in ("cut", "empty"):
        data = data[: len(data) - 9] if place == "cut" else bytearray()
    else:
        data[{"header": 40, "middle": len(data) // 2, "end": len(data) - 1}[place]] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match=r"resume\.safetensors: .*resume=False"):
        run_fit()


def test_a_loss_that_is_not_finite_stops_and_leaves_the_old_run_as_it_was(
    run_fit: Make, make_toy: Make, tmp_path: Path
) -> None:
    run_fit()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    with pytest.raises(TrainingError, match="nan in epoch 2, step 3 of 4"):
        run_fit(model=make_toy(poison_at=6), checkpoint_seconds=1000.0)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before
    assert load_run(tmp_path / "run", "cpu").threshold > 0


def test_a_checkpoint_never_holds_a_state_after_a_loss_that_is_not_finite(
    run_fit: Make, make_toy: Make, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError):
        run_fit(model=make_toy(poison_at=6), checkpoint_seconds=0.0)
    with pytest.raises(TrainingError, match="epoch 2, step 3"):
        run_fit(model=make_toy(poison_at=6))


@pytest.mark.parametrize("count", [1, 2, 9])
def test_too_few_images_to_hold_any_out_are_used_for_both_and_the_run_says_so(
    run_fit: Make, make_stripes: Make, count: int
) -> None:
    run = run_fit(data=make_stripes(train=count))
    assert run.config["threshold"]["images"] == "training images"
    assert run.config["threshold"]["count"] == count
    assert "No normal image was held out" in run.warnings[0]


def test_with_enough_images_the_threshold_is_from_held_out_ones(run_fit: Make, make_stripes: Make) -> None:
    data = make_stripes(train=150)
    run = run_fit(data=data, epochs=1)
    assert run.config["threshold"]["images"] == "held-out normal images"
    assert run.warnings == []
    _, held_out = split_normals(150, 0.15, 0)
    scores = run.model.score(torch.stack([data.train[index].image for index in held_out])).image_score
    assert run.threshold == scores.max().item()
    assert run.config["threshold"]["count"] == len(held_out)


def test_every_image_but_a_last_single_one_is_seen_once_an_epoch() -> None:
    for images, batch_size, drop, seen in [(26, 8, True, 26), (25, 8, True, 24), (25, 8, False, 25), (1, 8, True, 1)]:
        plan = Plan(images, batch_size, epochs=3, seed=0, drop_single=drop)
        batches = list(Batches(plan, 0))
        assert len(batches) == plan.steps
        epoch = list(chain(*batches[: plan.epoch_steps]))
        assert len(epoch) == len(set(epoch)) == seen
        assert list(Batches(plan, 2)) == batches[2:]
        if images > 1:
            assert epoch != list(chain(*batches[plan.epoch_steps : 2 * plan.epoch_steps]))


def test_images_that_do_not_fit_into_the_cache_give_the_same_training(
    run_fit: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = run_fit("cached")
    monkeypatch.setattr("memad_fast.scoring.training.CACHE_BYTES", 0)
    assert same_weights(cached, run_fit("decoded"))


def test_each_training_image_is_decoded_once(make_stripes: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_stripes().train
    decoded: list[int] = []
    original = images.image
    monkeypatch.setattr(images, "image", lambda index: (decoded.append(index), original(index))[1])
    training = TrainingImages(images, range(10))
    for _ in range(3):
        assert training.__getitems__([0, 3]).shape == (2, 1, 8, 8)
    assert sorted(decoded) == list(range(10))


def test_bfloat16_training_on_a_cpu_saves_float32_weights(run_fit: Make) -> None:
    run = run_fit(precision="bf16-mixed", epochs=10)
    assert all(value.dtype == torch.float32 for value in run.model.parameters())
    assert run.config["training"]["precision"] == "bf16-mixed"
    assert math.isfinite(run.threshold)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"max_minutes": 0.0}, "max_minutes: expected more than 0"),
        ({"max_minutes": math.nan}, "max_minutes"),
        ({"precision": "bf16-true"}, "precision: expected one of 32-true"),
        ({"validation_fraction": 1.0}, "fraction: expected 0 to below 1"),
        ({"quantile": 0.0}, "quantile"),
        ({"device": "cuda:99"}, "device: cuda:99 is not available here"),
        ({"trainer_options": {"max_epochs": 3}}, "trainer_options: fit sets max_epochs itself"),
        ({"settings": TrainingSettings(0.1, 0, 3)}, "batch_size"),
    ],
)
def test_an_argument_out_of_range_is_named(run_fit: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_fit(**options)


def test_a_model_of_another_size_is_refused(run_fit: Make, make_stripes: Make) -> None:
    with pytest.raises(ValueError, match="the model takes 1 channels at 8 pixels, the data gives 1 at 16"):
        run_fit(data=make_stripes(image_size=16))


def test_an_unreadable_training_image_is_named_before_training(run_fit: Make, tmp_path: Path) -> None:
    good = tmp_path / "data" / "train" / "good"
    good.mkdir(parents=True)
    for index in range(12):
        Image.fromarray(np.full((8, 8), 10 * index, np.uint8)).save(good / f"{index}.png")
    (good / "7.png").write_bytes((good / "7.png").read_bytes()[:40])
    with pytest.raises(ImageError, match=r"7\.png: not a readable image"):
        run_fit(data=open_data(tmp_path / "data", image_size=8, channels=1))
    assert not (tmp_path / "run" / "config.json").exists()


def test_digits_are_fitted_for_real(make_toy: Make, settings: TrainingSettings, tmp_path: Path) -> None:
    data = open_data("digits", image_size=8, normal_class=1)
    run = fit(make_toy(), data, tmp_path / "run", settings=settings, epochs=5, device="cpu", quiet=True)
    assert run.config["data"] == {"name": "digits", "kind": "digits", "normal_class": 1}
    assert json.loads((run.folder / "config.json").read_text()) == run.config
    assert from_arrays(torch.rand(3, 8, 8)).train[0].image.shape == (1, 8, 8)
