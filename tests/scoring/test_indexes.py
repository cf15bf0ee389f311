"""Runs and trainings on an index: nothing lost and nothing doubled, whenever they end; a run that can be moved."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from trainings import ended_after, fit_tiny, parts, run_together, tiny_model, unplug
from typer.testing import CliRunner

from memad_fast.cli import app
from memad_fast.index import ExactIndex, FaissIndex, FolderInUseError, IndexFileError, ShardedIndex
from memad_fast.index.stored import StoredIndex
from memad_fast.models import PatchCore
from memad_fast.scoring import Run, RunError, evaluate, load_run, resume, save_run
from memad_fast.scoring.training import Recorder

pytestmark = pytest.mark.usefixtures("one_thread")

BACKBONE_STEPS, BANK_STEPS = 4, 2  # of fit_tiny
STEPS = range(1, BACKBONE_STEPS + BANK_STEPS + 1)
STREAMED = {"coreset": 1.0}
CHOSEN = {"coreset": 40}


def fit_on_index(out: Path, **options: Any) -> Run:
    """A training with a checkpoint after every step, however long it took to write the last."""
    changes = options.pop("changes", STREAMED)
    model = options.pop("model", None) or tiny_model("patchcore", **changes)
    save = Recorder.save

    def save_every_time(self: Recorder, *arguments: Any) -> None:
        save(self, *arguments)
        self.pause = 0.0

    with mock.patch.object(Recorder, "save", save_every_time):
        return fit_tiny("patchcore", out, model=model, **{"index": "exact", "checkpoint_seconds": 0.0, **options})


def patches(run: Run) -> Tensor:
    assert isinstance(run.model, PatchCore)
    assert isinstance(run.model.index, StoredIndex)
    return torch.cat([piece.keys for piece in run.model.index.pieces()])


def index_folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("index-*"))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 1, 16, 16)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trainings without interruption: folders to copy, never to write to."""
    folder = tmp_path_factory.mktemp("fitted")
    torch.set_num_threads(1)
    for name, changes in (("streamed", STREAMED), ("chosen", CHOSEN)):
        fit_on_index(folder / name, changes=changes)
    return {"streamed": folder / "streamed", "chosen": folder / "chosen"}


@pytest.fixture
def copied(fitted: dict[str, Path], tmp_path: Path) -> Path:
    """A run, elsewhere than where it was made."""
    return Path(shutil.copytree(fitted["streamed"], tmp_path / "moved" / "run"))


@pytest.mark.parametrize(("name", "changes"), [("streamed", STREAMED), ("chosen", CHOSEN)])
def test_a_run_on_an_index_scores_as_one_on_a_tensor(
    name: str, changes: dict[str, Any], fitted: dict[str, Path], images: Tensor, tmp_path: Path
) -> None:
    run, tensor = (
        load_run(fitted[name], "cpu"),
        fit_tiny("patchcore", tmp_path, model=tiny_model("patchcore", **changes)),
    )
    assert torch.equal(patches(run), tensor.model.bank)
    assert torch.equal(run.model.score(images).anomaly_map, tensor.model.score(images).anomaly_map)
    assert run.config["threshold"] == tensor.config["threshold"]
    assert not (fitted[name] / resume.RESUME_FILE).exists()
    assert [folder.name for folder in index_folders(fitted[name])] == [run.config["indexes"]["bank"]["folder"]]
    assert evaluate(run, parts(16))["image_auroc"] == evaluate(tensor, parts(16))["image_auroc"]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("name", "changes"), [("streamed", STREAMED), ("chosen", CHOSEN)])
def test_a_training_interrupted_at_any_step_has_each_patch_once(
    name: str, changes: dict[str, Any], steps: int, fitted: dict[str, Path], tmp_path: Path
) -> None:
    with ended_after(steps, unplug), pytest.raises(InterruptedError):
        fit_on_index(tmp_path, changes=changes)
    assert not (tmp_path / "config.json").exists()
    run = fit_on_index(tmp_path, changes=changes)
    expected = load_run(fitted[name], "cpu")
    assert torch.equal(patches(run), patches(expected))
    assert run.config["threshold"] == expected.config["threshold"]
    assert len(index_folders(tmp_path)) == 1


@contextlib.contextmanager
def crash_at(target: str, call: int) -> Iterator[None]:
    """The call-th time that a function is called, nothing is done and the program ends."""
    module, name = target.rsplit(".", 1)
    original, calls = getattr(__import__(module, fromlist=[name]), name), [0]

    def crash(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise InterruptedError
        return original(*arguments, **options)

    with mock.patch(target, crash), pytest.raises(InterruptedError):
        yield


@pytest.mark.parametrize("call", STEPS)
def test_an_index_that_is_ahead_of_its_checkpoint_gets_no_patch_twice(
    call: int, fitted: dict[str, Path], tmp_path: Path
) -> None:
    """It was saved, and the checkpoint of the same step was not written any more."""
    with crash_at("memad_fast.scoring.resume.write_bytes", call):
        fit_on_index(tmp_path)
    run = fit_on_index(tmp_path)
    assert torch.equal(patches(run), patches(load_run(fitted["streamed"], "cpu")))


@pytest.mark.parametrize(
    "target",
    ["memad_fast.scoring.run.write_bytes", "memad_fast.scoring.run.write_json", "memad_fast.scoring.fit.save_run"],
)
def test_a_crash_while_the_run_is_written_loses_nothing(target: str, fitted: dict[str, Path], tmp_path: Path) -> None:
    with crash_at(target, 1):
        fit_on_index(tmp_path)
    run = fit_on_index(tmp_path)
    assert torch.equal(patches(run), patches(load_run(fitted["streamed"], "cpu")))


def _fit_and_die(out: Path, steps: int) -> None:
    import os
    import signal

    torch.set_num_threads(1)
    with ended_after(steps, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        fit_on_index(out)


def test_a_killed_training_goes_on(fitted: dict[str, Path], tmp_path: Path) -> None:
    assert run_together([(_fit_and_die, (tmp_path, STEPS[-1]))]) == [-9]
    run = fit_on_index(tmp_path)
    assert torch.equal(patches(run), patches(load_run(fitted["streamed"], "cpu")))


def test_what_an_earlier_training_saw_is_forgotten_by_one_that_begins_anew(
    fitted: dict[str, Path], tmp_path: Path
) -> None:
    """In one process, with one model; on a tensor too."""
    for index in ("exact", None):
        model = tiny_model("patchcore", **STREAMED)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with ended_after(STEPS[-1], unplug), pytest.raises(InterruptedError):
            fit_on_index(tmp_path / str(index), model=model, index=index)
        ids = {} if index is None else {"index_ids": model.state_dict()["index_ids"]}
        model.load_state_dict(before | ids)
        run = fit_on_index(tmp_path / str(index), model=model, index=index, resume=False)
        kept = run.model.bank if index is None else patches(run)
        assert torch.equal(kept, patches(load_run(fitted["streamed"], "cpu")))


def test_a_run_stays_as_it_is_while_its_training_goes_on(
    fitted: dict[str, Path], tmp_path: Path, images: Tensor
) -> None:
    """A training that ran out of time leaves a run; going on, it ends before its next run is whole."""
    short = fit_on_index(tmp_path, max_minutes=1e-9)
    assert len(patches(short)) < len(patches(load_run(fitted["streamed"], "cpu")))
    before = short.model.score(images)
    with ended_after(BACKBONE_STEPS, unplug), pytest.raises(InterruptedError):
        fit_on_index(tmp_path)
    between = load_run(tmp_path, "cpu")
    assert torch.equal(between.model.score(images).anomaly_map, before.anomaly_map)
    assert len(patches(between)) == len(patches(short))
    run = fit_on_index(tmp_path)
    assert torch.equal(patches(run), patches(load_run(fitted["streamed"], "cpu")))
    assert len(index_folders(tmp_path)) == 1


def test_a_bank_cut_short_goes_on_where_it_was(fitted: dict[str, Path], tmp_path: Path) -> None:
    """The stage of the backbone is over: the bank's own patches, of which a run has the first, are completed."""
    with ended_after(BACKBONE_STEPS, unplug), pytest.raises(InterruptedError):
        fit_on_index(tmp_path)
    short = fit_on_index(tmp_path, max_minutes=1e-9)
    assert 0 < len(patches(short)) < len(patches(load_run(fitted["streamed"], "cpu")))
    run = fit_on_index(tmp_path)
    assert torch.equal(patches(run), patches(load_run(fitted["streamed"], "cpu")))


def test_a_run_that_was_moved_opens_and_grows(copied: Path, fitted: dict[str, Path], images: Tensor) -> None:
    run = load_run(copied, "cpu")
    assert isinstance(run.model, PatchCore)
    assert run.model.index is not None
    assert run.model.index.path is not None
    assert run.model.index.path.parent == copied
    assert torch.equal(
        run.model.score(images).anomaly_map, load_run(fitted["streamed"], "cpu").model.score(images).anomaly_map
    )
    run.model.remember(images)
    run.model.index.save()
    again = load_run(copied, "cpu")
    assert float(again.model.score(images).image_score.max()) == 0.0


def test_two_runs_read_one_index_and_one_writes_it(copied: Path, images: Tensor) -> None:
    first, second = load_run(copied, "cpu").model, load_run(copied, "cpu").model
    assert isinstance(first, PatchCore)
    assert isinstance(second, PatchCore)
    first.remember(images)
    with pytest.raises(FolderInUseError):
        second.remember(images)
    assert torch.isfinite(second.score(images).image_score).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"config\.json: names an index that cannot be used: .*manifest\.json: no such file"),
        (lambda folder: next(folder.glob("part-*")).write_bytes(b"torn"), r"part-.*: expected \d+ bytes, got 4: torn"),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"manifest\.json: not valid JSON"),
    ],
)
def test_a_missing_or_torn_index_is_named(copied: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(index_folders(copied)[0])
    with pytest.raises(RunError, match=message):
        load_run(copied, "cpu")


def test_the_index_of_another_run_is_refused(copied: Path, tmp_path: Path) -> None:
    (folder,) = index_folders(copied)
    shutil.rmtree(folder)
    ExactIndex(16).save(folder)
    with pytest.raises(RunError, match=r"index: 0 patches were ever added to it, 1024 to that of the state: an older"):
        load_run(copied, "cpu")
    ExactIndex(3).save(shutil.rmtree(folder) or folder)
    with pytest.raises(RunError, match=r"index: expected dim 16, got 3"):
        load_run(copied, "cpu")


def test_an_unfinished_training_whose_index_is_gone_is_refused(tmp_path: Path) -> None:
    with ended_after(STEPS[-1], unplug), pytest.raises(InterruptedError):
        fit_on_index(tmp_path)
    shutil.rmtree(index_folders(tmp_path)[0])
    with pytest.raises(
        RunError, match=r"resume\.safetensors: names an index that cannot be used.*fit with resume=False"
    ):
        fit_on_index(tmp_path)
    fit_on_index(tmp_path, resume=False)


def test_an_unfinished_training_goes_on_with_the_same_kind_of_index(tmp_path: Path) -> None:
    with ended_after(STEPS[-1], unplug), pytest.raises(InterruptedError):
        fit_on_index(tmp_path)
    with pytest.raises(RunError, match="belongs to another training, its index was exact and is now None"):
        fit_tiny("patchcore", tmp_path, model=tiny_model("patchcore", **STREAMED))


def test_a_function_makes_the_index(tmp_path: Path) -> None:
    run = fit_on_index(tmp_path, index=lambda dim, path: ExactIndex(dim, dtype=torch.float16, capacity=100, path=path))
    assert patches(run).dtype == torch.float16
    assert len(patches(run)) == 100
    with pytest.raises(ValueError, match="index: expected a function that makes an empty index with path="):
        fit_on_index(tmp_path / "other", index=lambda dim, path: ExactIndex(dim))


@pytest.mark.parametrize("steps", STEPS)
def test_a_ring_that_is_interrupted_holds_the_newest(steps: int, tmp_path: Path) -> None:
    def ring(dim: int, path: Path) -> ExactIndex:
        return ExactIndex(dim, capacity=700, path=path)

    whole = fit_on_index(tmp_path / "whole", index=ring)
    with crash_at("memad_fast.scoring.resume.write_bytes", steps):
        fit_on_index(tmp_path / "parts", index=ring)
    assert torch.equal(patches(fit_on_index(tmp_path / "parts", index=ring)), patches(whole))


@pytest.mark.parametrize("steps", STEPS)
def test_faiss_has_each_patch_once_too(steps: int, fitted: dict[str, Path], images: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    with crash_at("memad_fast.scoring.resume.write_bytes", steps):
        fit_on_index(tmp_path, index="IVF2,Flat")
    run, exact = fit_on_index(tmp_path, index="IVF2,Flat"), load_run(fitted["streamed"], "cpu")
    assert isinstance(run.model, PatchCore)
    assert isinstance(run.model.index, FaissIndex)
    assert torch.equal(patches(run), patches(exact))
    run.model.index.set(nprobe=2)  # all lists
    expected = exact.model.score(images).anomaly_map
    torch.testing.assert_close(run.model.score(images).anomaly_map, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_a_given_index_is_copied_into_the_run_and_stays_as_it_is(where: str, tmp_path: Path) -> None:
    index = ExactIndex(16, path=tmp_path / "mine" if where == "disk" else None)
    index.add(torch.rand(500, 16))
    if where == "disk":
        index.save()
    model = PatchCore(tiny_model("patchcore").config, index=index)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with ended_after(1, unplug), pytest.raises(InterruptedError):
        fit_on_index(tmp_path / "run", model=model, index=None)
    if where == "disk":
        model.use_indexes({"bank": index})
    run = fit_on_index(tmp_path / "run", model=model, index=None)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items()), "nothing to fit"
    with pytest.raises(ValueError, match=r"index: that of the model is part of the run in .*; fit a new model"):
        fit_on_index(tmp_path / "run", model=run.model, index=None)
    assert torch.equal(patches(run), torch.cat([piece.keys for piece in index.pieces()]))
    assert len(index_folders(tmp_path / "run")) == 1
    if where == "disk":
        index.add(torch.rand(1, 16))
        index.save()
    else:
        with pytest.raises(IndexFileError, match="closed; open it again"):
            index.add(torch.rand(1, 16))
    assert len(patches(load_run(tmp_path / "run", "cpu"))) == 500


def test_what_no_training_can_keep_is_refused_before_it_begins(tmp_path: Path) -> None:
    empty = PatchCore(tiny_model("patchcore").config, index=ExactIndex(16))
    with pytest.raises(ValueError, match="index: that of the model is empty; let the training make it"):
        fit_on_index(tmp_path / "run", model=empty, index=None)
    with pytest.raises(ValueError, match="index: expected none, since the model has one already"):
        fit_on_index(tmp_path / "run", model=empty)
    with pytest.raises(ValueError, match="index: pmb has no memory that a training could fill an index for"):
        fit_tiny("pmb", tmp_path / "run", index="exact")
    with pytest.raises(ValueError, match=r"index: expected one process.* got devices=2"):
        fit_on_index(tmp_path / "run", trainer_options={"devices": 2})
    assert not (tmp_path / "run").exists()
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="index: expected 'exact' or a factory string of FAISS, got 'nothing'"):
        fit_on_index(tmp_path / "run", index="nothing")


def test_a_saved_run_replaces_the_indexes_of_the_one_before_and_nothing_else(copied: Path, tmp_path: Path) -> None:
    (copied / "index-mine").mkdir()
    model = load_run(copied, "cpu").model
    config = load_run(copied, "cpu").config
    described = {"preprocessing": config["preprocessing"], "training": {}, "threshold": config["threshold"]}
    model.use_indexes({"bank": ShardedIndex(16)})
    with pytest.raises(ValueError, match="index: expected one of a single process to keep"):
        save_run(tmp_path / "copy", model, **described)
    model = load_run(copied, "cpu").model
    save_run(tmp_path / "copy", model, **described)
    assert len(patches(load_run(tmp_path / "copy", "cpu"))) == 1024
    save_run(copied, tiny_model("patchcore"), **described)
    assert [folder.name for folder in index_folders(copied)] == ["index-mine"]


def test_the_command_takes_an_index(tmp_path: Path) -> None:
    words = ["fit", "--data", "digits", "--normal-class", "0", "--model", "patchcore", "--out", str(tmp_path / "run")]
    small = ["--size", "16", "--epochs", "1", "--set", "widths=4,8,8", "--set", "coreset=1.0", "--device", "cpu"]
    result = CliRunner().invoke(app, [*words, *small, "--index", "exact"])
    assert result.exit_code == 0, result.output
    assert len(patches(load_run(tmp_path / "run", "cpu"))) > 1000
    words[words.index("patchcore")] = "pmb"
    result = CliRunner().invoke(app, [*words[:-1], str(tmp_path / "other"), "--index", "exact"])
    assert result.exit_code == 2
    assert "index: pmb has no memory" in result.stderr
