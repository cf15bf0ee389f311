"""A campaign loses nothing, does nothing twice, and outlives its experiments."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import experiment as experiments
from benchmarks.accuracy.campaign import Budget, Campaign, plan
from benchmarks.accuracy.contenders import CONTENDERS, STATISTICS, Contender
from benchmarks.accuracy.experiment import KEY, Experiment, Row, epochs, identity, run_experiment
from benchmarks.accuracy.results import Store
from benchmarks.accuracy.sets import ImageSet
from memad_fast.models import MODELS, PMB
from memad_fast.models.base import Preset
from memad_fast.scoring import set_up

PMB_ROW = Contender("pmb", "", "pmb", {"widths": (4, 4), "items": (3,), "partitions": (2,)})
PIXELS = Contender("patchcore", "of raw pixels", "patchcore", {"backbone": "pixels"})
SIMPLE = Contender("image statistics", "", STATISTICS, is_seeded=False)
BUDGET = Budget(images=24)


@pytest.fixture
def image_set(parts: Path) -> ImageSet:
    return ImageSet("parts", str(parts))


@pytest.fixture
def three(image_set: ImageSet) -> list[Experiment]:
    return plan([image_set], [Contender(name, "", name) for name in "abc"], [0], BUDGET, "cpu")


@pytest.fixture
def make_campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Campaign]:
    """Campaigns over the same files; their experiments are played in this process, and noted."""

    def make(play: Callable[[Path], str], jobs: int = 1) -> Campaign:
        monkeypatch.setattr(Campaign, "_process", lambda self, folder: play(folder))
        store = Store(tmp_path / "results.csv", Row, KEY)
        return Campaign(store, tmp_path / "runs", jobs, tell=lambda line: None)

    return make


def write_row(folder: Path) -> str:
    experiment = Experiment(**json.loads((folder / "experiment.json").read_text()))
    row = Row(**identity(experiment), image_auroc=0.5)
    (folder / "row.json").write_text(json.dumps(dataclasses.asdict(row)))
    return ""


def test_all_rows_of_a_seed_come_before_the_next(image_set: ImageSet) -> None:
    other = dataclasses.replace(image_set, name="others")
    planned = plan([image_set, other], [PIXELS, SIMPLE], [5, 6], BUDGET, "cpu")
    assert [(each.seed, each.set, each.system) for each in planned] == [
        (5, "parts", "patchcore"), (5, "parts", "image statistics"),
        (5, "others", "patchcore"), (5, "others", "image statistics"),
        (6, "parts", "patchcore"), (6, "others", "patchcore"),
    ]  # fmt: skip
    assert [each.sheet for each in planned] == [True] * 4 + [False] * 2


def test_every_option_of_every_contender_is_one_of_its_model(image_set: ImageSet) -> None:
    for contender in CONTENDERS:
        if contender.model in MODELS:
            set_up(contender.model, image_set.place, size=64, options=contender.options)
            assert contender.published in ("", *MODELS[contender.model].presets())
    systems = [contender.system for contender in CONTENDERS if contender.variant]
    assert len(systems) == len(set(systems)), "one ablation a system"


def test_another_budget_or_preset_is_another_experiment(image_set: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(budget: Budget = BUDGET) -> str:
        return plan([image_set], [PMB_ROW], [0], budget, "cpu")[0].fingerprint

    before = fingerprint()
    assert fingerprint() == before
    assert fingerprint(Budget(images=25)) != before
    presets = PMB.presets()
    changed = dataclasses.replace(presets["small"].training, learning_rate=0.5)
    monkeypatch.setattr(PMB, "presets", lambda: presets | {"small": Preset(presets["small"].config, changed)})
    assert fingerprint() != before


def test_the_digits_preset_is_for_one_class_sets_and_the_published_one_where_asked_for(image_set: ImageSet) -> None:
    digits = dataclasses.replace(image_set, classes=(0, 1))
    assert plan([image_set], [PMB_ROW], [0], BUDGET, "cpu")[0].preset == "small"
    assert plan([digits], [PMB_ROW], [0], BUDGET, "cpu")[0].preset == "digits"
    published = Budget(None, is_published=True)
    contenders = [dataclasses.replace(PMB_ROW, published="mnist"), PIXELS]
    assert [each.preset for each in plan([digits], contenders, [0], published, "cpu")] == ["mnist", "digits"]


def test_the_budget_is_rounded_up_to_epochs_and_shared_by_open_stages(image_set: ImageSet) -> None:
    setup = set_up("pmb", image_set.place, options={"memory": "none"}, size=32)
    assert epochs(24, setup, 0.15) == 2  # 12 of 14 images are trained on
    assert epochs(25, setup, 0.15) == 3
    assert epochs(None, setup, 0.15) == setup.settings.epochs
    pixels = set_up("patchcore", image_set.place, options={"backbone": "pixels"}, size=32)
    assert epochs(24, pixels, 0.15) >= 1  # has no stage whose length is open


@pytest.mark.parametrize("after", [1, 2])
def test_what_is_interrupted_between_rows_goes_on_there(
    make_campaign: Callable[..., Campaign], three: list[Experiment], after: int
) -> None:
    played: list[Path] = []

    def play(folder: Path) -> str:
        played.append(folder)
        return write_row(folder)

    campaign = make_campaign(play)

    def interrupt() -> None:
        if len(campaign.store.load()) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        campaign.run(three, after_each=interrupt)
    assert len(campaign.store.load()) == after
    make_campaign(play).run(three, after_each=lambda: None)
    assert [row.system for row in campaign.store.load()] == ["a", "b", "c"]
    assert len(played) == len(set(played)), "a row that was there was made again"


def test_a_row_that_was_made_but_not_stored_is_not_made_again(
    make_campaign: Callable[..., Campaign], three: list[Experiment]
) -> None:
    campaign = make_campaign(write_row)
    campaign.run(three, after_each=lambda: None)
    campaign.store.path.unlink()

    def refuse(folder: Path) -> str:
        raise AssertionError(folder)

    make_campaign(refuse).run(three, after_each=lambda: None)
    assert len(campaign.store.load()) == 3


def test_a_torn_file_of_results_is_made_whole_again(
    make_campaign: Callable[..., Campaign], three: list[Experiment]
) -> None:
    campaign = make_campaign(write_row)
    campaign.run(three, after_each=lambda: None)
    whole = campaign.store.path.read_bytes()
    campaign.store.path.write_bytes(whole[:-30])
    campaign.run(three, after_each=lambda: None)
    assert campaign.store.path.read_bytes() == whole


def test_a_failure_is_a_row_and_is_tried_again_on_request_only(
    make_campaign: Callable[..., Campaign], three: list[Experiment]
) -> None:
    def fail_b(folder: Path) -> str:
        return f"ValueError: no {three[1].place}/x.png" if folder.name.startswith("b-") else write_row(folder)

    campaign = make_campaign(fail_b, jobs=2)
    campaign.run(three, after_each=lambda: None)
    assert [(row.system, row.error) for row in campaign.store.load()] == [
        ("a", ""), ("b", "ValueError: no parts/x.png"), ("c", ""),
    ]  # fmt: skip
    again = make_campaign(write_row)
    again.run(three, after_each=lambda: None)
    assert again.store.load()[1].error
    (again.folder(three[1]) / "half").touch()
    again.forget(three, only_failed=True)
    assert not again.folder(three[1]).exists()
    assert (again.folder(three[0]) / "row.json").exists()
    again.run(three, after_each=lambda: None)
    assert [row.error for row in again.store.load()] == ["", "", ""]


def test_what_is_forgotten_is_done_again(make_campaign: Callable[..., Campaign], three: list[Experiment]) -> None:
    played: list[str] = []

    def play(folder: Path) -> str:
        played.append(folder.name[0])
        return write_row(folder)

    campaign = make_campaign(play)
    campaign.run(three, after_each=lambda: None)
    campaign.forget(three[1:], only_failed=False)
    assert [row.system for row in campaign.store.load()] == ["a"]
    campaign.run(three, after_each=lambda: None)
    assert played == ["a", "b", "c", "b", "c"]


def test_an_experiment_gives_all_figures_that_its_set_allows(image_set: ImageSet, tmp_path: Path) -> None:
    (planned,) = plan([image_set], [PMB_ROW], [0], BUDGET, "cpu")
    row = run_experiment(planned, tmp_path)
    assert (row.trained_on, row.normal, row.abnormal, row.masks) == (12, 6, 9, 5)
    assert (row.epochs, row.seen) == (2.0, 24)
    assert set(row.types) == {"square", "bright"}
    assert all(value is not None for value in (row.image_auroc, row.pixel_auroc, row.pixel_aupro, row.dead_rows))
    assert (tmp_path / "sheet.png").stat().st_size > 0
    store = Store(tmp_path / "rows.csv", Row, KEY)
    store.put(row)
    assert store.load() == [row]
    (simple,) = plan([image_set], [SIMPLE], [0], BUDGET, "cpu")
    assert run_experiment(simple, tmp_path / "simple").types["bright"] == 1.0


def test_a_one_class_set_goes_on_with_the_class_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = ImageSet("digits", "digits", (0, 1, 2))
    (planned,) = plan([digits], [PMB_ROW], [0], Budget(40), "cpu")
    trained: list[Any] = []
    fit, evaluate = experiments.fit, experiments.evaluate

    def counted(*arguments: Any, **options: Any) -> Any:
        trained.append(arguments[1].source["normal_class"])
        return fit(*arguments, **options)

    def unplugged(run: Any, data: Any) -> Any:
        if len(trained) == 2:
            raise InterruptedError
        return evaluate(run, data)

    monkeypatch.setattr(experiments, "fit", counted)
    monkeypatch.setattr(experiments, "evaluate", unplugged)
    with pytest.raises(InterruptedError):
        run_experiment(planned, tmp_path)
    monkeypatch.setattr(experiments, "evaluate", evaluate)
    row = run_experiment(planned, tmp_path)
    assert trained == [0, 1, 2], "class 1 was trained already when its test was interrupted"
    assert list(row.types) == ["0", "1", "2"]
    assert row.image_auroc == pytest.approx(sum(row.types.values()) / 3)
    assert row.seen is not None
    assert row.seen >= 3 * 40
    store = Store(tmp_path / "rows.csv", Row, KEY)
    store.put(row)
    assert store.load() == [row]


@pytest.fixture
def started(parts: Path, tmp_path: Path) -> list[str]:
    return [
        "sets", "--data", str(parts.parent), "--only", "parts", "--images", "12", "--seeds", "0",
        f"--results={tmp_path / 'results'}", "--runs", str(tmp_path / "runs"),
    ]  # fmt: skip


def test_the_command_makes_a_table_and_survives_a_system_that_fails(
    started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In processes of their own, as for real."""
    broken = Contender("simsid", "", "none such")
    monkeypatch.setattr(command, "CONTENDERS", (SIMPLE, broken))
    command.main(started)
    text = (tmp_path / "results" / "sets.md").read_text()
    assert "**1.000**" in text
    assert "sets --data DATA --only parts --images 12 --seeds 0 --results=RESULTS --runs RUNS" in text
    assert str(tmp_path) not in text, "a table is for others too"
    assert "Failed: simsid, seed 0: ValueError: model: expected one of" in text
    assert "2 rows, 0 of them there already" in capsys.readouterr().out
    command.main(started)
    assert "2 rows, 2 of them there already" in capsys.readouterr().out


WAITING = """
import threading, time
from benchmarks.accuracy.experiment import _end_with_stdin
threading.Thread(target=_end_with_stdin, daemon=True).start()
print("up", flush=True)
time.sleep(60)
"""


def test_an_experiment_ends_with_the_process_that_started_it() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", WAITING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == b"up\n"
    child.stdin.close()
    assert child.wait(timeout=120) == 1
    child.stdout.close()
