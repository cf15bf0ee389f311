"""One command a table:

    python -m benchmarks.accuracy sets --data FOLDER_OF_SETS [--only cookies,digits] [--systems pmb,salad]
    python -m benchmarks.accuracy mnist --data FOLDER_OF_IDX_FILES [--full]

Results go to ``benchmarks/results/accuracy``, everything else (checkpoints, logs, sheets of pictures and their
``index.html``) to ``runs/accuracy``. A command that was stopped goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy.campaign import KEY, Budget, Campaign, plan
from benchmarks.accuracy.contenders import CONTENDERS, SYSTEMS, Contender
from benchmarks.accuracy.experiment import Experiment, Row
from benchmarks.accuracy.index import save_index
from benchmarks.accuracy.results import RESULTS, Store, write_page
from benchmarks.accuracy.sets import ImageSet, find_sets, mnist
from benchmarks.accuracy.tables import REFERENCE, page

IMAGES = 6000
MNIST_TRAIN, MNIST_TEST = 1000, 1000
# What a GPU trains at full length, and the published setting for 28 x 28 digits where there is one.
FULL = Budget(None, presets=("mnist", "paper"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Make a table."""
    options = _parser().parse_args(arguments)
    if options.table == "sets":
        sets = _named(find_sets(options.data), options.only)
        name, title, head = "sets", "Accuracy on image sets", []
        budget = Budget(options.images)
    else:
        sets = [mnist(options.data)]
        name, budget = (
            ("mnist-full", FULL) if options.full else ("mnist", Budget(options.images, MNIST_TRAIN, MNIST_TEST))
        )
        title = "MNIST, one class normal"
        head = ["PMB's table II; published there, with the full protocol: 0.981.", "", _protocol(options.full)]
    command = shlex.join(["python", "-m", "benchmarks.accuracy", *(sys.argv[1:] if arguments is None else arguments)])
    head = [*head, *([""] if head else []), f"Made by `{command}`."]
    experiments = plan(sets, _contenders(options.systems), options.seeds, budget, options.device)
    _make(name, title, head, sets, experiments, options)


def _make(
    name: str,
    title: str,
    head: Sequence[str],
    sets: Sequence[ImageSet],
    experiments: Sequence[Experiment],
    options: argparse.Namespace,
) -> None:
    store = Store(options.results / f"{name}.csv", Row, KEY)
    campaign = Campaign(store, options.runs / name, options.jobs)
    if options.list:
        for experiment in experiments:
            print(campaign.folder(experiment))
        return
    for image_set in sets:
        for method, (image, pixel) in image_set.references().items():
            store.put(Row(image_set.name, REFERENCE, method, 0, None, "", image, pixel))

    def write() -> None:
        write_page(options.results / f"{name}.md", page(title, head, store.load()))
        save_index(options.runs / name, title, store.load())

    write()
    campaign.run(experiments, retry=options.retry, after_each=write)
    print(f"wrote {options.results / name}.md, and pictures: {options.runs / name / 'index.html'}")


def _protocol(is_full: bool) -> str:
    if is_full:
        return "Full protocol: all training images of a class, all 10,000 test images, the published presets."
    return (
        f"**Reduced protocol**, for two cores: {MNIST_TRAIN:,} normal training images of a class, {MNIST_TEST:,} test"
        " images (as many of each digit), drawn once and the same for every row; small presets. `--full` is the full"
        " protocol."
    )


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
    tables = parser.add_subparsers(dest="table", required=True)
    for name, words, data in (
        ("sets", "every folder in MVTec layout, and the digits", "a folder of folders in MVTec layout"),
        ("mnist", "one digit is normal, all others are not", "a folder of MNIST's idx files"),
    ):
        command = tables.add_parser(name, help=words, description=words)
        command.add_argument("--data", type=Path, required=True, help=data)
        command.add_argument("--systems", type=_words, help=f"of {', '.join(SYSTEMS)}; default: all")
        command.add_argument("--seeds", type=_numbers, default=[0, 1, 2], help="default: 0,1,2")
        command.add_argument(
            "--images", type=int, default=IMAGES, help=f"training images that a training sees; default: {IMAGES}"
        )
        command.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each; default: 2")
        command.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:1; default: cpu")
        command.add_argument("--retry", action="store_true", help="do what failed again")
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
