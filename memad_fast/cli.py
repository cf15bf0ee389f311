"""The ``memad-fast`` command: fit, fit-edges, fit-semantic, evaluate, evaluate-semantic, score, perturb, demo, doctor.

Each command is a few lines over ``memad_fast.scoring`` and loads what it needs when it runs, so that ``--help`` is
quick. Exit codes: 0 done; 1 done, but some images could not be scored; 2 wrong usage or input.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from memad_fast import __version__, doctor

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ImportError as missing:
    # This module is the command, so it ends here as a command does; the doctor works all the same.
    if sys.argv[1:] == ["doctor"]:
        print(doctor.as_text(doctor.examine()))
        sys.exit(0)
    package = (missing.name or str(missing)).partition(".")[0]
    sys.exit(f"memad-fast needs the package {package}. To get it: pip install 'memad_fast[app]'")

if TYPE_CHECKING:
    from memad_fast.models import TrainingSettings
    from memad_fast.scoring import ExtractorSetup, ScoreSummary, Setup, TrainedRun

# soft_wrap: a path in the output stays one path, however narrow the terminal.
_out = Console(soft_wrap=True, highlight=False)
_err = Console(stderr=True, soft_wrap=True, highlight=False)

app = typer.Typer(
    name="memad-fast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find what is not normal in images: fit a detector on good parts, then score a stream of images.\n\n"
    "A first look, on real images, in a minute: [bold]memad-fast demo[/]",
)

DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        help="A folder in MVTec layout (train/good, test/good, test/TYPE, ground_truth/TYPE), a folder of MNIST-style "
        "idx files, or the word digits.",
        show_default=False,
    ),
]
NormalClass = Annotated[
    int | None, typer.Option(help="The class that is normal, for digits and idx files.", show_default=False)
]
RunOption = Annotated[Path, typer.Option("--run", help="The run folder that fit wrote.", show_default=False)]
OutOption = Annotated[Path, typer.Option("--out", help="The run folder to write.", show_default=False)]
Size = Annotated[int | None, typer.Option(help="Side of the images in pixels. Default: the preset's.")]
Channels = Annotated[int | None, typer.Option(help="1 (grey) or 3 (colour). Default: as the images are.")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the images. Default: the preset's.")]
MaxMinutes = Annotated[float | None, typer.Option(help="Stop training after so many minutes.")]
BatchSize = Annotated[int | None, typer.Option(help="Images per training step. Default: the preset's.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Learning rate. Default: the preset's.")]
ConfigValues = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any value of the model's config, as memory=none. Repeatable."),
]
Restart = Annotated[bool, typer.Option("--restart", help="Begin anew where OUT holds an unfinished training.")]
Seed = Annotated[int, typer.Option(help="Of the weights, the split and the order of the images.")]
Labels = Annotated[
    str | None,
    typer.Option(help="Name of the folder with the label maps, where there are several.", show_default=False),
]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda, cuda:1.")]
Devices = Annotated[int, typer.Option(help="How many of them train together, each with its share of a batch.")]
Precision = Annotated[str, typer.Option(help="Of the training: 32-true, bf16-mixed or 16-mixed (on GPUs).")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error comes from (traceback).")]


def main() -> None:
    """Run the command line."""
    app(prog_name="memad-fast")


@contextmanager
def _told_in_one_line(debug: bool) -> Iterator[None]:
    """Wrong input ends the command with one line and exit code 2; a bug keeps its traceback."""
    try:
        yield
    except Exception as error:
        if debug or not isinstance(error, _expected_errors()):
            raise
        _err.print(f"[bold red]error:[/] {escape(_message(error))}")
        raise typer.Exit(2) from None


def _expected_errors() -> tuple[type[Exception], ...]:
    from memad_fast import BackendUnavailableError

    # Its module loads Lightning; where it is not loaded, no training has failed.
    training = sys.modules.get("memad_fast.scoring.training")
    failed_training = (training.TrainingError,) if training else ()
    return (ValueError, OSError, ModuleNotFoundError, BackendUnavailableError, *failed_training)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and "pip install" not in text:
        return f"{text}. To get it: pip install 'memad_fast[app]'"
    return text


def _print_version(wanted: bool) -> None:
    if wanted:
        _out.print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def fit(
    data: DataOption,
    out: OutOption,
    model: Annotated[str, typer.Option(help="The detector.")] = "pmb",
    normal_class: NormalClass = None,
    preset: Annotated[
        str | None,
        typer.Option(help="A setting of the model by name. Default: digits for digits and idx files, else the first."),
    ] = None,
    size: Size = None,
    channels: Channels = None,
    resize: Annotated[
        str | None,
        typer.Option(help="How images are brought to that size, bilinear or bicubic. Default: the preset's."),
    ] = None,
    epochs: Epochs = None,
    max_minutes: MaxMinutes = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    options: ConfigValues = None,
    parts: Annotated[
        list[str] | None,
        typer.Option(
            "--part",
            metavar="NAME=RUN",
            help="A part of the model that was trained beforehand, as edges=runs/fe. Repeatable.",
        ),
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(
            help="Keep a patchcore's bank in an index on disk: exact, or a factory string of FAISS, as IVF1024,Flat. "
            "With --set coreset=1.0 patches are streamed into it. Default: a tensor.",
            show_default=False,
        ),
    ] = None,
    quantile: Annotated[
        float, typer.Option(help="Share of held-out good images that stay below the threshold.")
    ] = 0.99,
    restart: Restart = False,
    device: Device = "auto",
    devices: Devices = 1,
    precision: Precision = "32-true",
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Train a detector on good images and write a run folder.

    The run holds the weights, the configuration, and a threshold from good images that were held out.

    Example: [bold]memad-fast fit --model pmb --data parts/bottle --out runs/bottle --max-minutes 10[/]

    Baseline: [bold]memad-fast fit --data digits --normal-class 0 --out runs/plain --set memory=none[/]
    """
    with _told_in_one_line(debug):
        from memad_fast import scoring
        from memad_fast.models import MODELS

        setup = scoring.set_up(
            model,
            data,
            normal_class=normal_class,
            preset=preset,
            size=size,
            channels=channels,
            resize=resize,
            options=scoring.parse_options(options or [], MODELS[model].Config) if model in MODELS else {},
            parts=scoring.parse_parts(parts or []),
            seed=seed,
        )
        settings = _with(setup.settings, learning_rate=lr, batch_size=batch_size)
        _print_once(f"[dim]{escape(_setup_words(model, setup))}[/]")
        run = scoring.fit(
            setup.model,
            setup.data,
            out,
            settings=settings,
            epochs=epochs,
            max_minutes=max_minutes,
            device=device,
            precision=precision,
            seed=seed,
            quantile=quantile,
            resume=not restart,
            trainer_options=_together(devices),
            index=index,
        )
        _print_fit(run)


@app.command()
def fit_edges(
    data: DataOption,
    out: OutOption,
    normal_class: NormalClass = None,
    preset: Annotated[
        str | None,
        typer.Option(help="A setting by name. Default: digits for digits and idx files, else the first."),
    ] = None,
    size: Size = None,
    channels: Channels = None,
    epochs: Epochs = None,
    max_minutes: MaxMinutes = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    options: ConfigValues = None,
    restart: Restart = False,
    device: Device = "auto",
    devices: Devices = 1,
    precision: Precision = "32-true",
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Train MemSTC-Net's edge extractor on good images: a network that predicts their Canny edges.

    Example: [bold]memad-fast fit-edges --data parts/bottle --out runs/edges[/]

    Then: [bold]memad-fast fit --model memstc --data parts/bottle --part edges=runs/edges --out runs/bottle[/]
    """
    with _told_in_one_line(debug):
        from memad_fast import scoring
        from memad_fast.models import EdgeExtractor

        setup = scoring.set_up_edges(
            data,
            normal_class=normal_class,
            preset=preset,
            size=size,
            channels=channels,
            options=scoring.parse_options(options or [], EdgeExtractor.Config),
            seed=seed,
        )
        _fit_extractor(
            setup,
            out,
            settings=_with(setup.settings, learning_rate=lr, batch_size=batch_size),
            epochs=epochs,
            max_minutes=max_minutes,
            device=device,
            precision=precision,
            seed=seed,
            resume=not restart,
            trainer_options=_together(devices),
        )


@app.command()
def fit_semantic(
    source: Annotated[
        Path,
        typer.Option(
            help="A folder with labels: image/STEM.png and LABELS/STEM.png, one integer a pixel.", show_default=False
        ),
    ],
    out: OutOption,
    target: Annotated[
        Path | None,
        typer.Option(
            help="Images to adapt to, without labels: a folder with image/, or train/good/, or images.",
            show_default=False,
        ),
    ] = None,
    adaptation: Annotated[
        bool, typer.Option("--adaptation/--no-adaptation", help="Adapt to the target's images, or leave it out.")
    ] = True,
    labels: Labels = None,
    preset: Annotated[str | None, typer.Option(help="A setting by name. Default: the first.")] = None,
    size: Size = None,
    channels: Channels = None,
    epochs: Epochs = None,
    max_minutes: MaxMinutes = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    options: ConfigValues = None,
    restart: Restart = False,
    device: Device = "auto",
    devices: Devices = 1,
    precision: Precision = "32-true",
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Train MemSTC-Net's semantic extractor on a labelled set, and adapt it to images that have no labels.

    A label map holds 0 and 255; for other classes say which integers they are: [bold]--set values=0,1,2[/].

    Example: [bold]memad-fast fit-semantic --source stare --target chasedb1 --out runs/vessels[/]
    """
    with _told_in_one_line(debug):
        from memad_fast import scoring
        from memad_fast.models import SemanticExtractor

        if adaptation and target is None:
            raise ValueError("--target: expected a folder of images to adapt to; --no-adaptation trains without")
        setup = scoring.set_up_semantic(
            source,
            target if adaptation else None,
            labels=labels,
            preset=preset,
            size=size,
            channels=channels,
            options=scoring.parse_options(options or [], SemanticExtractor.Config),
            seed=seed,
        )
        _fit_extractor(
            setup,
            out,
            settings=_with(setup.settings, learning_rate=lr, batch_size=batch_size),
            epochs=epochs,
            max_minutes=max_minutes,
            device=device,
            precision=precision,
            seed=seed,
            resume=not restart,
            trainer_options=_together(devices),
        )


@app.command()
def evaluate_semantic(
    run: Annotated[Path, typer.Option(help="The run folder that fit-semantic wrote.", show_default=False)],
    data: Annotated[Path, typer.Option(help="A folder with labels, as fit-semantic takes.", show_default=False)],
    labels: Labels = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the figures go. Default: metrics.json in the run folder.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per pass of the network.")] = 8,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Compare a semantic extractor's classes with label maps: Dice and AUC of each class.

    Where the folder has fov/STEM.png, only the pixels in that field of view count.

    Example: [bold]memad-fast evaluate-semantic --run runs/vessels --data chasedb1[/]
    """
    with _told_in_one_line(debug):
        from memad_fast import scoring

        loaded = scoring.load_extractor(run, device)
        metrics = scoring.evaluate_semantic(loaded, scoring.open_labels(loaded, data, labels), batch_size=batch_size)
        path = run / "metrics.json" if out is None else out
        scoring.save_metrics(metrics, path)
        table = Table("class", "pixels", "Dice", "AUC")
        for value, row in metrics["per_class"].items():
            table.add_row(value, f"{row['pixels']:,}", _figure(row["dice"]), _figure(row["auc"]))
        table.add_section()
        table.add_row("mean but for the first", "", _figure(metrics["dice"]), _figure(metrics["auc"]), style="bold")
        _out.print(table)
        _out.print(f"Written to {escape(str(path))}")


@app.command()
def evaluate(
    run: RunOption,
    data: DataOption,
    normal_class: NormalClass = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the figures go. Default: metrics.json in the run folder.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per pass of the network.")] = 32,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Compare a run's scores with known labels and masks: AUROC, AUPRO, per defect type.

    Without --normal-class, digits and idx files take the class that the run was fitted on.

    Example: [bold]memad-fast evaluate --run runs/bottle --data parts/bottle[/]
    """
    with _told_in_one_line(debug):
        from memad_fast import scoring

        loaded = scoring.load_run(run, device)
        metrics = scoring.evaluate(loaded, scoring.open_test_data(loaded, data, normal_class), batch_size=batch_size)
        path = run / "metrics.json" if out is None else out
        path.parent.mkdir(parents=True, exist_ok=True)
        scoring.save_metrics(metrics, path)
        _print_metrics(metrics)
        _out.print(f"Written to {escape(str(path))}")


@app.command()
def score(
    run: RunOption,
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input", help="An image, a folder (searched through) or a glob pattern. Repeatable.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder for what comes out.", show_default=False)],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[MORE IMAGES]", help="As the shell makes of --input *.png")
    ] = None,
    heatmaps: Annotated[bool, typer.Option("--heatmaps", help="Write a heat map for each image.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Write report.html, one page for people.")] = False,
    batch_size: Annotated[int, typer.Option(help="Images per pass of the network.")] = 32,
    threshold: Annotated[float | None, typer.Option(help="Instead of the run's own.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Threads that decode. Default: the cores, at most 8; with ray one for each actor."),
    ] = None,
    worst: Annotated[int, typer.Option(help="How many images the report shows.")] = 200,
    engine: Annotated[
        str,
        typer.Option(
            help="local: in this process. ray: on the Ray cluster of RAY_ADDRESS, whose nodes see RUN and the images "
            "under the same paths, else in several processes here. The same output."
        ),
    ] = "local",
    actors: Annotated[
        int | None,
        typer.Option(help="With ray: how many processes score. Default: what there are CPUs or GPUs for."),
    ] = None,
    actor_gpus: Annotated[
        float | None,
        typer.Option("--actor-gpus", help="With ray: GPUs for each of them, 0.5 for two on one. Default: 1 with CUDA."),
    ] = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Score images: scores.csv, and if wanted heat maps and a report.

    An image that cannot be read gets a row with its error, and the command ends with exit code 1.

    Example: [bold]memad-fast score --run runs/bottle --input camera/ --out today --heatmaps --report[/]

    Very many images: [bold]memad-fast score --engine ray --actors 8 --run runs/bottle --input archive/ --out scored[/]
    """
    with _told_in_one_line(debug):
        from memad_fast import scoring

        sources = [*inputs, *(more or [])]
        total = sum(1 for _ in scoring.find_images(sources, leave_out=out / "heatmaps"))
        with _progress("scoring", total) as advance:
            summary = scoring.score(
                run,
                sources,
                out,
                heatmaps=heatmaps,
                report=report,
                batch_size=batch_size,
                threshold=threshold,
                device=device,
                workers=workers,
                worst=worst,
                on_result=lambda _: advance(),
                engine=engine,
                actors=actors,
                actor_gpus=actor_gpus,
            )
        _print_score(summary)
    if summary.failures:
        raise typer.Exit(1)


@app.command()
def perturb(
    source: Annotated[
        str,
        typer.Option("--input", help="An image, a folder (searched through) or a glob pattern.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="The PNG file to write.", show_default=False)],
    kind: Annotated[str, typer.Option(help="inpainting, shuffling, intensity, or all of them side by side.")] = "all",
    size: Annotated[int, typer.Option(help="Side in pixels that the images are resized to first.")] = 256,
    most: Annotated[int, typer.Option(help="How many images, at most; evenly spaced ones are taken.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the tiles, the noise and the curves.")] = 0,
    debug: Debug = False,
) -> None:
    """Show the perturbations that SALAD learns to undo: each image beside what is made of it.

    Example: [bold]memad-fast perturb --input parts/bottle/train/good --out perturbed.png[/]
    """
    with _told_in_one_line(debug):
        from memad_fast import scoring

        count = scoring.write_perturbations(source, out, kind=kind, size=size, most=most, seed=seed)
        _out.print(f"{count} {'image' if count == 1 else 'images'} in {escape(str(out))}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder for the run, the images and the report.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of the training.")] = 0,
    debug: Debug = False,
) -> None:
    """Fit, evaluate and score on real handwritten digits, in a minute: one digit is normal, all others are not.

    Example: [bold]memad-fast demo --out runs/demo[/]
    """
    with _told_in_one_line(debug):
        from memad_fast.scoring.demo import NORMAL_DIGIT, run_demo

        _out.print(f"[bold]Fit[/] on good images: the digit {NORMAL_DIGIT}")
        result = run_demo(out, seed=seed)
        _print_fit(result.run)
        _out.print("\n[bold]Evaluate[/] on images that the training has not seen")
        _print_metrics(result.metrics)
        _out.print("\n[bold]Score[/] images, as files")
        _print_score(result.scores)
        _out.print(
            f"\nAUROC {result.metrics['image_auroc']:.3f}, {result.scores.images_per_second:.0f} images per second, "
            f"{result.seconds:.0f} s in all. Open the report in a browser:\n"
            f"[bold]{escape(str(result.scores.report))}[/]"
        )


@app.command("doctor")
def tell_what_is_missing() -> None:
    """Devices, instruction sets, backends, packages: what is here, and how to get what is missing.

    Example: [bold]memad-fast doctor[/]
    """
    for title, findings in doctor.examine().items():
        table = _plain_table()
        for finding in findings:
            mark = "[green]yes[/]" if finding.ok else "[yellow]no[/]"
            fix = f"\n[cyan]{escape(finding.fix)}[/]" if finding.fix else ""
            table.add_row(mark, escape(finding.name), escape(finding.detail) + fix)
        _out.print(f"[bold]{title}[/]", table, "", sep="\n")


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on the terminal; nothing where the output is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_err, disable=not _err.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def _plain_table() -> Table:
    return Table(show_header=False, box=None, padding=(0, 2, 0, 0))


def _setup_words(model: str, setup: Setup) -> str:
    config = setup.model.config
    colour = "grey" if config.channels == 1 else "colour"
    return (
        f"{model}, preset {setup.preset}, {config.image_size} x {config.image_size} {colour}; "
        f"{len(setup.data.train)} good images in {setup.data.name}"
    )


def _with(settings: TrainingSettings, **changes: Any) -> TrainingSettings:
    """The settings with those changes that are not None."""
    return dataclasses.replace(settings, **{name: value for name, value in changes.items() if value is not None})


def _fit_extractor(setup: ExtractorSetup, out: Path, **options: Any) -> None:
    from memad_fast import scoring

    config = setup.model.config
    colour = "grey" if config.channels == 1 else "colour"
    _print_once(
        f"[dim]{setup.model.name}, preset {setup.preset}, {config.image_size} x {config.image_size} {colour}; "
        f"{len(setup.data)} images[/]"
    )
    _print_fit(scoring.fit_extractor(setup.model, setup.data, out, source=setup.source, **options))


def _together(devices: int) -> dict[str, Any] | None:
    """What Lightning's Trainer is told of several devices. They run this command in as many processes."""
    return None if devices == 1 else {"devices": devices}


def _print_once(*lines: Any) -> None:
    """Print, in the first of several processes."""
    from lightning.pytorch.utilities import rank_zero_only

    rank_zero_only(_out.print)(*lines)


def _print_fit(run: TrainedRun) -> None:
    training, threshold = run.config["training"], run.config.get("threshold")
    table = _plain_table()
    table.add_row("trained on", f"{training['images']} images, {training['epochs_done']:g} epochs, "
                                f"{training['minutes']:.1f} minutes on {training['device']}")  # fmt: skip
    table.add_row("losses", ", ".join(f"{name} {value:.4g}" for name, value in training["losses"].items()))
    if threshold is not None:
        table.add_row("threshold", f"{threshold['value']:.6g}, from {threshold['count']} {threshold['images']}")
    table.add_row("run", escape(str(run.folder)))
    _print_once(table)
    if training["stopped_by"] == "max_minutes":
        _print_once("The time was up before the last epoch. The same command goes on from here.")
    for warning in run.warnings:
        _print_once(f"[yellow]warning:[/] {escape(warning)}")


def _print_metrics(metrics: Mapping[str, Any]) -> None:
    names = ["image_auroc", *(name for name in ("pixel_auroc", "pixel_aupro") if metrics.get(name) is not None)]
    table = Table("", "images", "above threshold")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    counts = metrics["counts"]
    table.add_row("good", str(counts["normal"]), _share(metrics["false_alarms"]))
    table.add_section()
    for defect, row in metrics["per_defect"].items():
        table.add_row(escape(defect), str(row["images"]), _share(row["detected"]), *(_figure(row[n]) for n in names))
    table.add_section()
    table.add_row(
        "all that is not good", str(counts["abnormal"]), _share(metrics["recall"]),
        *(_figure(metrics[name]) for name in names), style="bold",
    )  # fmt: skip
    _out.print(table)
    if metrics["best_f1"] is not None:
        _out.print(
            f"F1 {_figure(metrics['f1'])} at the run's threshold {metrics['threshold']:.6g}\n"
            f"[dim]F1 {_figure(metrics['best_f1'])} at the best of all thresholds, chosen with the test labels: only to"
            " compare with papers that do so[/]"
        )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _print_score(summary: ScoreSummary) -> None:
    table = _plain_table()
    table.add_row("images", f"{summary.images:,}, {summary.anomalies:,} above the threshold {summary.threshold:.6g}")
    if summary.failures:
        table.add_row("[red]not read[/]", f"[red]{summary.failures:,}[/], see the column error")
    waiting = f"{_share(summary.waiting / summary.seconds)} waiting for"
    spent = {
        "local": f"{_share(summary.network / summary.seconds)} of the time network, {waiting} decoding",
        "ray": f"on Ray, {waiting} its actors",
    }
    table.add_row(
        "speed",
        f"{summary.images_per_second:.1f} images per second: {spent[summary.engine]}, "
        f"{_share(summary.writing / summary.seconds)} writing",
    )
    for name, path in (("scores", summary.csv), ("heat maps", summary.heatmaps), ("report", summary.report)):
        if path is not None:
            table.add_row(name, escape(str(path)))
    _out.print(table)
