"""One command a table:

    python -m benchmarks.accuracy sets --data FOLDER_OF_SETS [--only cookies,digits] [--systems pmb,salad]
    python -m benchmarks.accuracy mnist --data FOLDER_OF_IDX_FILES [--full]
    python -m benchmarks.accuracy.retina_vessels --help

Results go to ``benchmarks/results/accuracy``, everything else (checkpoints, logs, sheets of pictures and their
``index.html``) to ``runs/accuracy``. A command that was stopped goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accuracy.campaign import Budget, Campaign, plan
from benchmarks.accuracy.contenders import CONTENDERS, SYSTEMS, Contender
from benchmarks.accuracy.experiment import KEY, Experiment, Row
from benchmarks.accuracy.index import save_index
from benchmarks.accuracy.results import RESULTS, Store, write_page
from benchmarks.accuracy.sets import ImageSet, find_sets, mnist
from benchmarks.accuracy.tables import REFERENCE, page
from memad_fast._atomic import write_bytes

IMAGES = 3000
MNIST_TRAIN, MNIST_TEST = 1000, 1000


@dataclass(frozen=True)
class Table:
    """What is asked for."""

    name: str
    """Of its files."""
    title: str
    head: Sequence[str]
    sets: Sequence[ImageSet]
    budget: Budget


def main(arguments: Sequence[str] | None = None) -> None:
    """Make a table."""
    options = _parser().parse_args(arguments)
    table: Table = options.table(options)
    store = Store(options.results / f"{table.name}.csv", Row, KEY)
    campaign = Campaign(store, options.runs / table.name, options.jobs)
    experiments = plan(table.sets, _contenders(options.systems), options.seeds, table.budget, options.device)
    if options.list:
        for experiment in experiments:
            print(campaign.folder(experiment))
        return
    for image_set in table.sets:
        for method, (image, pixel) in image_set.references().items():
            store.put(Row(image_set.name, REFERENCE, method, 0, None, "", image, pixel))
    command = _told(sys.argv[1:] if arguments is None else arguments, options)

    def write() -> None:
        rows = store.load()
        head = [*table.head, f"Last command: `{command}`."]
        write_page(options.results / f"{table.name}.md", page(table.title, head, rows))
        save_index(options.runs / table.name, table.title, rows)

    if options.forget:
        campaign.forget(experiments, only_failed=options.forget == "failed")
    write()
    try:
        campaign.run(experiments, after_each=write)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command, without --forget, goes on from here") from None
    _publish(experiments, table.sets, campaign, options.results)
    print(f"wrote {options.results / table.name}.md; pictures: {options.runs / table.name / 'index.html'}")


def _told(arguments: Sequence[str], options: argparse.Namespace) -> str:
    """The command as others can give it: without places of this machine."""
    words = ["python", "-m", "benchmarks.accuracy", *arguments]
    for name in ("data", "results", "runs"):
        place: Path = getattr(options, name)
        if place.is_absolute():
            words = [word.replace(str(place), name.upper()) for word in words]
    return shlex.join(words)


def _publish(experiments: Sequence[Experiment], sets: Sequence[ImageSet], campaign: Campaign, folder: Path) -> None:
    """Copy the sheets of whole systems that may be shown to everybody beside the table."""
    shown = {image_set.name for image_set in sets if image_set.is_free}
    for experiment in experiments:
        sheet = campaign.folder(experiment) / "sheet.png"
        if experiment.set in shown and not experiment.variant and sheet.exists():
            write_bytes(folder / f"{experiment.set}-{experiment.system}.png", sheet.read_bytes())


def _of_sets(options: argparse.Namespace) -> Table:
    sets = _named(find_sets(options.data), options.only)
    return Table("sets", "Accuracy on image sets", [], sets, Budget(options.images or IMAGES))


def _of_mnist(options: argparse.Namespace) -> Table:
    title, sets = "MNIST, one class normal", [mnist(options.data)]
    head = ["PMB's table II, where PMB comes to 0.981 by the full protocol.", ""]
    if options.full:
        head += ["Full protocol: all training images of a class, all 10,000 test images, published presets.", ""]
        return Table("mnist-full", title, head, sets, Budget(options.images, is_published=True))
    head += [
        f"**Reduced protocol**, for two cores: {MNIST_TRAIN:,} normal training images of a class, {MNIST_TEST:,} test"
        " images (as many of each digit), drawn once and the same for every row; small presets. `--full` is the full"
        " protocol.",
        "",
    ]
    return Table("mnist", title, head, sets, Budget(options.images or IMAGES, MNIST_TRAIN, MNIST_TEST))


def _contenders(systems: Sequence[str] | None) -> list[Contender]:
    if unknown := sorted(set(systems or ()) - set(SYSTEMS)):
        raise SystemExit(f"--systems: expected some of {', '.join(SYSTEMS)}, got {', '.join(unknown)}")
    return [contender for contender in CONTENDERS if systems is None or contender.system in systems]


def _named(sets: Sequence[ImageSet], names: Sequence[str] | None) -> list[ImageSet]:
    known = [image_set.name for image_set in sets]
    if unknown := sorted(set(names or ()) - set(known)):
        raise SystemExit(f"--only: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return [image_set for image_set in sets if names is None or image_set.name in names]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description="What the systems achieve on real images."
    )
    tables = parser.add_subparsers(required=True)
    for name, table, words, data in (
        ("sets", _of_sets, "every folder in MVTec layout, and the digits", "a folder of folders in MVTec layout"),
        ("mnist", _of_mnist, "one digit is normal, all others are not", "a folder of MNIST's idx files"),
    ):
        command = tables.add_parser(name, help=words, description=words)
        command.set_defaults(table=table)
        command.add_argument("--data", type=Path, required=True, help=data)
        command.add_argument("--systems", type=_words, help=f"of {', '.join(SYSTEMS)}; default: all")
        command.add_argument("--seeds", type=_numbers, default=[0, 1, 2], help="default: 0,1,2")
        command.add_argument(
            "--images", type=int, help=f"training images that a training sees; default: {IMAGES}, or a preset's epochs"
        )
        command.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each; default: 2")
        command.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:1; default: cpu")
        command.add_argument(
            "--forget", choices=("failed", "all"), help="first remove such rows and runs, to do them from the start"
        )
        command.add_argument("--list", action="store_true", help="only show the folders of the runs")
        command.add_argument("--results", type=Path, default=RESULTS, help="where the tables go")
        command.add_argument("--runs", type=Path, default=Path("runs/accuracy"), help="where everything else goes")
    tables.choices["sets"].add_argument("--only", type=_words, help="names of sets; default: all that are there")
    tables.choices["mnist"].add_argument(
        "--full", action="store_true", help="all images, published presets: for a GPU (--device cuda --jobs 1)"
    )
    return parser


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


if __name__ == "__main__":
    main()
