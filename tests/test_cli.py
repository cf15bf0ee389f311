"""The command as a user types it, on a small PMB and the built-in digits."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from memad_fast import __version__
from memad_fast.cli import app
from memad_fast.scoring import load_run

COMMANDS = ("fit", "fit-edges", "fit-semantic", "evaluate", "evaluate-semantic", "score", "perturb", "demo", "doctor")
SMALL = [
    "--size",
    "16",
    "--set",
    "widths=4,8",
    "--set",
    "items=4,4",
    "--set",
    "partitions=2,1",
    "--set",
    "ssim_weight=0",
]


def _call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def _error(result: Result) -> str:
    """The one line that a wrong input gives."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted") / "run"
    result = _call("fit", "--data", "digits", "--normal-class", 0, "--out", folder, "--epochs", 2, *SMALL)
    assert result.exit_code == 0, result.output
    assert "threshold" in result.stdout
    assert str(folder) in result.stdout
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for name in ("a/0.png", "b/0.png"):
        (folder / name).parent.mkdir(parents=True)
        Image.new("L", (20, 10), 200).save(folder / name)
    return folder


def _rows(path: Path) -> Sequence[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = _call(command, "--help")
    assert result.exit_code == 0
    assert f"Example: memad-fast {command}" in result.stdout


def test_help_loads_neither_torch_nor_lightning() -> None:
    program = (
        "import sys\nsys.argv = ['memad-fast', '--help']\n"
        "from memad_fast.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    assert not {'torch', 'lightning', 'numpy', 'PIL'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "memad_fast", "--version"], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == __version__


def test_a_fit_writes_a_run_with_what_was_asked_for(run: Path) -> None:
    loaded = load_run(run, "cpu")
    assert loaded.image_size == 16
    assert loaded.model.config.widths == (4, 8)
    assert loaded.config["training"]["epochs"] == 2
    assert loaded.config["data"]["normal_class"] == 0


def test_an_evaluation_writes_its_figures_and_prints_them_per_defect_type(run: Path, tmp_path: Path) -> None:
    result = _call("evaluate", "--run", run, "--data", "digits", "--out", tmp_path / "sub" / "metrics.json")
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "sub" / "metrics.json").read_text())
    assert 0 <= metrics["image_auroc"] <= 1
    assert f"{metrics['image_auroc']:.3f}" in result.stdout
    assert f"F1 {metrics['f1']:.3f} at the run's threshold" in result.stdout
    assert f"F1 {metrics['best_f1']:.3f} at the best of all thresholds" in result.stdout
    assert "chosen with the test labels" in result.stdout
    assert set(metrics["per_defect"]) == set("123456789")
    assert _call("evaluate", "--run", run, "--data", "digits").exit_code == 0
    assert json.loads((run / "metrics.json").read_text()) == metrics


def test_a_picture_of_the_perturbations_is_written(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "sub" / "picture.png"
    result = _call("perturb", "--input", images, "--out", out, "--size", 40, "--kind", "shuffling")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"2 images in {out}\n"
    assert Image.open(out).format == "PNG"
    assert "no such file or folder" in _error(_call("perturb", "--input", tmp_path / "nowhere", "--out", out))
    (images / "a" / "1.jpg").write_text("no image")
    assert "1.jpg: not a readable image" in _error(_call("perturb", "--input", images, "--out", out))
    assert "kind: expected one of inpainting, shuffling, intensity, all, got 'blur'" in _error(
        _call("perturb", "--input", images, "--out", out, "--kind", "blur")
    )


def test_a_scoring_writes_table_heat_maps_and_report(run: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = _call("score", "--run", run, "--input", images, "--out", out, "--heatmaps", "--report")
    assert result.exit_code == 0, result.output
    assert [Path(row["path"]).relative_to(images).as_posix() for row in _rows(out / "scores.csv")] == [
        "a/0.png",
        "b/0.png",
    ]
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png")) == [
        "heatmaps/a/0.png.png",
        "heatmaps/b/0.png.png",
    ]
    assert (out / "report.html").exists()
    assert "images per second" in result.stdout
    assert "waiting for decoding" in result.stdout


def test_unreadable_images_are_counted_and_end_with_exit_code_1(run: Path, images: Path, tmp_path: Path) -> None:
    (images / "a" / "1.jpg").write_text("no image")
    result = _call("score", "--run", run, "--input", images, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "not read" in result.stdout
    rows = _rows(tmp_path / "out" / "scores.csv")
    assert [bool(row["error"]) for row in rows] == [False, True, False]


def test_inputs_may_be_files_patterns_and_what_the_shell_makes_of_them(run: Path, images: Path, tmp_path: Path) -> None:
    one, two = images / "a" / "0.png", images / "b" / "0.png"
    for inputs in (["--input", f"{images}/*/0.png"], ["--input", one, "--input", two], ["--input", one, two]):
        result = _call("score", "--run", run, *inputs, "--out", tmp_path / "out")
        assert result.exit_code == 0, result.output
        assert [row["path"] for row in _rows(tmp_path / "out" / "scores.csv")] == [str(one), str(two)]


def test_a_threshold_given_is_the_one_used(run: Path, images: Path, tmp_path: Path) -> None:
    for threshold, verdict in (("-1", "true"), ("1e9", "false")):
        _call("score", "--run", run, "--input", images, "--out", tmp_path, "--threshold", threshold)
        assert {row["is_anomaly"] for row in _rows(tmp_path / "scores.csv")} == {verdict}


def test_wrong_input_is_one_line_and_exit_code_2(run: Path, images: Path, tmp_path: Path) -> None:
    scoring = ["score", "--run", run, "--out", tmp_path / "out", "--input"]
    (tmp_path / "empty").mkdir()
    assert "no images found in" in _error(_call(*scoring, tmp_path / "empty"))
    assert "no such file or folder" in _error(_call(*scoring, tmp_path / "nowhere"))
    assert "no file matches" in _error(_call(*scoring, f"{tmp_path}/*.bmp"))
    assert "batch_size" in _error(_call(*scoring, images, "--batch-size", 0))
    assert "not available" in _error(_call(*scoring, images, "--device", "cuda:99"))
    fitting = ["fit", "--out", tmp_path / "out", "--data"]
    assert "normal_class" in _error(_call(*fitting, "digits"))
    assert "model: expected" in _error(_call(*fitting, "digits", "--normal-class", 0, "--model", "none"))
    assert "image_size" in _error(_call(*fitting, "digits", "--normal-class", 0, "--size", 33))
    assert "--set" in _error(_call(*fitting, "digits", "--normal-class", 0, "--set", "memory"))
    assert "no normal training images" in _error(_call(*fitting, _without_normals(tmp_path)))
    assert "no such run folder" in _error(_call("evaluate", "--run", tmp_path / "nowhere", "--data", "digits"))
    assert not (tmp_path / "out").exists()


def _without_normals(root: Path) -> Path:
    (root / "data" / "train" / "good").mkdir(parents=True)
    (root / "data" / "test" / "good").mkdir(parents=True)
    Image.new("L", (16, 16)).save(root / "data" / "test" / "good" / "0.png")
    return root / "data"


def test_a_torn_or_altered_run_is_one_line(run: Path, images: Path, tmp_path: Path) -> None:
    config = (run / "config.json").read_text()
    weights = (run / "model.safetensors").read_bytes()
    for name, content, message in (
        ("model.safetensors", weights[:-100], "truncated"),
        ("model.safetensors", weights[:-4] + b"0000", "altered"),
        ("config.json", config[:100].encode(), "not valid JSON"),
        ("config.json", config.replace('"quantile": 0.99', '"quantile": 0.98').encode(), "altered"),
    ):
        torn = tmp_path / "torn"
        torn.mkdir(exist_ok=True)
        (torn / "config.json").write_text(config)
        (torn / "model.safetensors").write_bytes(weights)
        (torn / name).write_bytes(content)
        line = _error(_call("score", "--run", torn, "--input", images, "--out", tmp_path / "out"))
        assert name in line
        assert message in line


def test_a_training_that_diverges_is_one_line(tmp_path: Path) -> None:
    arguments = ("--data", "digits", "--normal-class", 0, "--epochs", 3, "--lr", "1e30", *SMALL)
    assert "epoch" in _error(_call("fit", "--out", tmp_path / "run", *arguments))


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    result = _call("evaluate", "--run", tmp_path, "--data", "digits", "--debug")
    assert result.exception is not None
    assert "config.json" in str(result.exception)


def test_a_markup_in_a_name_is_printed_as_it_is(run: Path, tmp_path: Path) -> None:
    line = _error(_call("score", "--run", run, "--input", tmp_path / "[red]x", "--out", tmp_path / "out"))
    assert "[red]x" in line


def test_half_precision_on_a_processor_is_refused_by_name(tmp_path: Path) -> None:
    arguments = ("--data", "digits", "--normal-class", 0, "--device", "cpu", *SMALL)
    assert "bf16-mixed" in _error(_call("fit", "--out", tmp_path / "run", "--precision", "16-mixed", *arguments))
    assert "precision: expected one of" in _error(
        _call("fit", "--out", tmp_path / "run", "--precision", "half", *arguments)
    )
    assert "devices: expected at least 1" in _error(_call("fit", "--out", tmp_path / "run", "--devices", 0, *arguments))


@pytest.mark.slow
def test_two_devices_train_one_run_and_the_first_tells_of_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "memad_fast", "fit", "--data", "digits", "--normal-class", "0", "--epochs", "2"]
    options = ["--device", "cpu", "--devices", "2", "--precision", "bf16-mixed", "--out", str(tmp_path / "run"), *SMALL]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("preset digits") == done.stdout.count("threshold  ") == 1
    run = load_run(tmp_path / "run", "cpu")
    assert f"{run.threshold:.6g}" in done.stdout
    assert run.config["training"]["epochs_done"] == 2
    assert run.config["training"]["precision"] == "bf16-mixed"


@pytest.mark.slow
def test_the_demo_ends_with_its_figures_and_a_report(tmp_path: Path) -> None:
    result = _call("demo", "--out", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    assert "AUROC" in result.stdout
    assert "images per second" in result.stdout
    report = result.stdout.strip().splitlines()[-1]
    assert Path(report) == (tmp_path / "demo" / "scores" / "report.html")
    assert "runs/demo/scores/report.html" in (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "demo" / "metrics.json").read_text())["image_auroc"] > 0.9
    assert len(_rows(tmp_path / "demo" / "scores" / "scores.csv")) > 100


@pytest.fixture(scope="module")
def vessels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled set of two images."""
    folder = tmp_path_factory.mktemp("vessels")
    for kind in ("image", "vessel"):
        (folder / kind).mkdir()
        for index in range(2):
            Image.linear_gradient("L").point(lambda value: 255 * (value > 128)).save(folder / kind / f"{index}.png")
    return folder


def _fit_semantic(vessels: Path, out: Path, *more: object) -> Result:
    small = ["--size", 32, "--set", "width=2", "--set", "critic_width=2", "--epochs", 2, "--out", out]
    return _call("fit-semantic", "--source", vessels, *small, *more)


def test_extractors_are_fitted_evaluated_and_kept_from_scoring(vessels: Path, tmp_path: Path) -> None:
    fitted = _fit_semantic(vessels, tmp_path / "fs", "--target", vessels, "--max-minutes", 5)
    assert fitted.exit_code == 0, fitted.output
    assert "extractor.target" in fitted.stdout
    assert "threshold" not in fitted.stdout
    evaluated = _call("evaluate-semantic", "--run", tmp_path / "fs", "--data", vessels)
    assert evaluated.exit_code == 0, evaluated.output
    assert set(json.loads((tmp_path / "fs" / "metrics.json").read_text())["per_class"]) == {"0", "255"}
    edges = _call(
        "fit-edges",
        "--data",
        "digits",
        "--normal-class",
        0,
        "--set",
        "width=2",
        "--epochs",
        1,
        "--out",
        tmp_path / "fe",
    )
    assert edges.exit_code == 0, edges.output
    assert "threshold" not in edges.stdout
    assert "which scores nothing" in _error(
        _call("score", "--run", tmp_path / "fe", "--input", vessels, "--out", tmp_path / "scored")
    )
    assert "expected one of semantic-extractor" in _error(
        _call("evaluate-semantic", "--run", tmp_path / "fe", "--data", vessels)
    )


def test_no_adaptation_leaves_the_target_out(vessels: Path, tmp_path: Path) -> None:
    fitted = _fit_semantic(vessels, tmp_path / "fs", "--target", tmp_path / "unread", "--no-adaptation")
    assert fitted.exit_code == 0, fitted.output
    assert "extractor.target" not in fitted.stdout
    assert json.loads((tmp_path / "fs" / "config.json").read_text())["data"]["target"] is None


def test_wrong_input_of_extractors_is_told_in_one_line(vessels: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "fs"
    assert "--target: expected a folder of images to adapt to" in _error(_fit_semantic(vessels, out))
    assert "no such folder" in _error(_fit_semantic(vessels, out, "--target", tmp_path / "nowhere"))
    assert "multiple of 16" in _error(_fit_semantic(vessels, out, "--no-adaptation", "--size", 40))
    assert "expected 0, 1: say with values" in _error(
        _fit_semantic(vessels, out, "--no-adaptation", "--set", "values=0,1")
    )
    assert "a run of the detector pmb" in _error(_call("evaluate-semantic", "--run", run, "--data", vessels))
    digits = ["fit", "--data", "digits", "--normal-class", 0, "--out", out]
    assert "expected NAME=RUN" in _error(_call(*digits, "--part", "edges"))
    assert "model pmb takes none, not 'edges'" in _error(_call(*digits, "--part", f"edges={run}"))
    assert not out.exists()


def test_a_missing_package_comes_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    command = ["fit", "--model", "patchcore", "--data", "digits", "--normal-class", "0", "--index", "IVF16,Flat"]
    result = _call(*command, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "memad_fast[faiss]" in result.output
    assert "memad_fast[app]" not in result.output
    assert not (tmp_path / "run" / "config.json").exists()
