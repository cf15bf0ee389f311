"""The tables as text: a pure function of the rows.

What the columns and marks mean is said at the head of every page.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy.contenders import CONTENDERS
from benchmarks.accuracy.experiment import KEY, Row
from benchmarks.accuracy.published import PUBLISHED
from benchmarks.accuracy.results import Spread, Store
from benchmarks.report import table

REFERENCE = "reference"
"""The system of rows that repeat what a set's README says."""
SOLVED = 0.95
_DAGGER = "†"
_COLUMNS = (
    "system", "image AUROC", "gain", "pixel AUROC", "AUPRO", "seeds", "epochs", "images seen", "parameters", "CPU s",
)  # fmt: skip
_ORDER = {(each.system, each.variant): number for number, each in enumerate(CONTENDERS)}


class Entry:
    """The rows of one contender on one set: the seeds that succeeded, and those that did not."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.system, self.variant = rows[0].system, rows[0].variant
        self.rows = {row.seed: row for row in rows if not row.error}
        self.failed = [row for row in rows if row.error]

    @property
    def title(self) -> str:
        """As the tables call it."""
        return f"{self.system}, {self.variant}" if self.variant else self.system

    def spread(self, name: str) -> Spread | None:
        """Of a column over the seeds; None where it is not defined."""
        return Spread.of(value for row in self.rows.values() if (value := getattr(row, name)) is not None)

    def spread_of_type(self, kind: str) -> Spread | None:
        """Of the image AUROC of a defect type."""
        return Spread.of(value for row in self.rows.values() if (value := row.types.get(kind)) is not None)

    def gain_over(self, other: Entry | None) -> Spread | None:
        """Of the image AUROC, over the seeds that both have."""
        if other is None:
            return None
        pairs = [(self.rows[seed].image_auroc, other.rows[seed].image_auroc) for seed in self.rows.keys() & other.rows]
        return Spread.of(mine - its for mine, its in pairs if mine is not None and its is not None)


class SetTable:
    """All that is known of one set."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.name = rows[0].set
        self.references = {row.variant: row for row in rows if row.system == REFERENCE}
        grouped: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            if row.system != REFERENCE:
                grouped.setdefault((row.system, row.variant), []).append(row)
        keys = sorted(grouped, key=lambda key: (_ORDER.get(key, len(_ORDER)), key))
        self.entries = {key: Entry(sorted(grouped[key], key=lambda row: row.seed)) for key in keys}

    def ablation(self, entry: Entry) -> Entry | None:
        """The ablation of a system; None of an ablation."""
        if entry.variant:
            return None
        return next((each for each in self.entries.values() if each.system == entry.system and each.variant), None)

    @property
    def bar(self) -> float | None:
        """The best that image statistics reach: ours, or those of the set's README."""
        stated = self.references.get("image statistics")
        ours = self.entries.get(("image statistics", ""))
        spread = ours.spread("image_auroc") if ours else None
        found = [stated.image_auroc if stated else None, spread.mean if spread else None]
        return max((value for value in found if value is not None), default=None)

    @property
    def patch_neighbours(self) -> float | None:
        """The best that patches without learnt features reach."""
        stated = self.references.get("patch neighbours")
        ours = self.entries.get(("patchcore", "of raw pixels"))
        spread = ours.spread("image_auroc") if ours else None
        found = [stated.image_auroc if stated else None, spread.mean if spread else None]
        return max((value for value in found if value is not None), default=None)

    def lines(self) -> list[str]:
        """Its section of a page."""
        return [
            f"## {self.name}", "", *self._facts(), "",
            *table(_COLUMNS, [*map(self._cells, self.entries.values()), *self._reference_cells()]), "",
            *self._verdicts(), *self._types(), *self._failures(),
        ]  # fmt: skip

    def _facts(self) -> list[str]:
        rows = [row for entry in self.entries.values() for row in entry.rows.values() if row.trained_on and row.size]
        if not rows:
            return ["No row of this set succeeded."]
        row = next((row for row in rows if row.preset), rows[0])
        sizes = " and ".join(sorted({f"{row.size}" for row in rows if row.preset} or {f"{row.size}"}))
        presets = ", ".join(sorted({row.preset for row in rows if row.preset}))
        masks = f", {row.masks:.0f} masks" if row.masks else ", no masks"
        is_one_class = bool(row.types) and all(kind.isdigit() for kind in row.types)
        protocol = (
            f" Each of the {len(row.types)} classes is the normal one in turn: figures and counts are means over them,"
            " CPU seconds and images seen are sums."
            if is_one_class
            else ""
        )
        facts = (
            f"Trained on {row.trained_on:.0f} normal images (without those held out for the threshold), tested on"
            f" {row.normal:.0f} good and {row.abnormal:.0f} defective ones{masks}; {sizes} pixels,"
            f" {'grey' if row.channels == 1 else 'colour'}; presets: {presets}.{protocol}"
        )
        warning = []
        if self.patch_neighbours is not None and self.patch_neighbours >= SOLVED:
            warning = [
                "",
                f"**A smoke test**: patch neighbours without learnt features come to {self.patch_neighbours:.3f} here."
                " It shows that the programs work, not which system is better.",
            ]
        return [facts, *warning]

    def _cells(self, entry: Entry) -> tuple[str, ...]:
        title = f"- {entry.variant}" if entry.variant else entry.title
        first = next(iter(entry.rows.values()), None)
        if first is None:
            return (title, "failed", *[""] * (len(_COLUMNS) - 2))
        cost = entry.spread("cpu_seconds")
        gain = entry.gain_over(self.ablation(entry))
        return (
            title,
            self.image_auroc(entry),
            gain.text("+.3f") if gain else "",
            *(self._best_in_bold(entry, name) for name in ("pixel_auroc", "pixel_aupro")),
            f"{len(entry.rows)} of {len(entry.rows) + len(entry.failed)}" if entry.failed else f"{len(entry.rows)}",
            "" if first.epochs is None else f"{first.epochs:.4g}",
            "" if first.seen is None else f"{first.seen:,}",
            "" if first.parameters is None else f"{first.parameters:,}",
            "" if cost is None else f"{cost.mean:.0f}",
        )

    def image_auroc(self, entry: Entry, *, short: bool = False) -> str:
        """Over the seeds, with its marks; ``short``: the mean alone."""
        spread = entry.spread("image_auroc")
        is_beaten = spread is not None and self.bar is not None and spread.mean <= self.bar
        is_bar = entry.system == "image statistics"
        mark = f" {_DAGGER}" if is_beaten and not is_bar else ""
        return self._best_in_bold(entry, "image_auroc", short=short) + mark

    def _best_in_bold(self, entry: Entry, name: str, *, short: bool = False) -> str:
        spread = entry.spread(name)
        if spread is None:
            return "-"
        text = f"{spread.mean:.3f}" if short else spread.text()
        means = [found.mean for each in self.entries.values() if (found := each.spread(name)) is not None]
        return f"**{text}**" if spread.mean == max(means) else text

    def _reference_cells(self) -> list[tuple[str, ...]]:
        return [
            (
                f"{name}, as the set's README says",
                f"{row.image_auroc:.3f}",
                "",
                "-" if row.pixel_auroc is None else f"{row.pixel_auroc:.3f}",
                *[""] * (len(_COLUMNS) - 4),
            )
            for name, row in self.references.items()
        ]

    def _verdicts(self) -> list[str]:
        """In words: for which systems the ablation is worse with every seed, for which it is not; and dead reads."""
        helped: list[str] = []
        hurt: list[str] = []
        unclear: list[str] = []
        for entry in self.entries.values():
            gain = entry.gain_over(self.ablation(entry))
            if gain is None or gain.count < 2:
                continue
            kind = helped if gain.least > 0 else hurt if gain.most < 0 else unclear
            kind.append(f"{entry.system} ({gain.mean:+.3f})")
        sentences = [
            f"{words}: {', '.join(found)}."
            for words, found in (
                ("Better than its ablation with every seed", helped),
                ("Worse than its ablation with every seed", hurt),
                ("Neither", unclear),
            )
            if found
        ]
        dead = [
            f"{entry.title} {spread.mean:.0%}"
            for entry in self.entries.values()
            if (spread := entry.spread("dead_rows")) is not None
        ]
        if dead:
            sentences.append(f"Reads that give all zeros, in the memory with most of them: {', '.join(dead)}.")
        return [" ".join(sentences), ""] if sentences else []

    def _types(self) -> list[str]:
        kinds = sorted({kind for entry in self.entries.values() for row in entry.rows.values() for kind in row.types})
        if len(kinds) < 2:
            return []
        rows = [
            (
                entry.title,
                *("-" if (spread := entry.spread_of_type(kind)) is None else f"{spread.mean:.3f}" for kind in kinds),
            )
            for entry in self.entries.values()
            if entry.rows
        ]
        return ["Mean image AUROC of each:", "", *table(("system", *kinds), rows), ""]

    def _failures(self) -> list[str]:
        return [
            f"Failed: {entry.title}, seed {row.seed}: {row.error}"
            for entry in self.entries.values()
            for row in entry.failed
        ] + [""] * any(entry.failed for entry in self.entries.values())


def page(title: str, head: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """The lines of a page: a section a set, in alphabetical order. Nothing is averaged over sets."""
    compared = beside_published(rows)
    return [
        f"# {title}",
        "",
        *head,
        "",
        *_how_to_read(rows),
        "",
        *overview(rows),
        "",
        *(["Beside what the papers report, in their settings:", "", *compared, ""] if compared else []),
        *(line for each in _set_tables(rows) for line in each.lines()),
    ]


def overview(rows: Sequence[Row]) -> list[str]:
    """One table of the mean image AUROC of every contender on every set, marked as in the sets' own tables."""
    sets = [each for each in _set_tables(rows) if any(entry.rows for entry in each.entries.values())]
    keys = sorted({key for each in sets for key in each.entries}, key=lambda key: (_ORDER.get(key, len(_ORDER)), key))
    lines = [
        (
            f"- {variant}" if variant else system,
            *(each.image_auroc(each.entries[system, variant], short=True) if (system, variant) in each.entries else ""
              for each in sets),
        )
        for system, variant in keys
    ]  # fmt: skip
    seeds = [len({seed for entry in each.entries.values() for seed in entry.rows}) for each in sets]
    return table(("image AUROC", *(each.name for each in sets)), [*lines, ("seeds", *map(str, seeds))])


def beside_published(rows: Sequence[Row]) -> list[str]:
    """A table of the contenders that a paper has a figure for, on the same images or another split of them."""
    entries = {(each.name, *key): entry for each in _set_tables(rows) for key, entry in each.entries.items()}
    lines = []
    for paper in PUBLISHED:
        entry = entries.get((paper.set, paper.system, paper.variant))
        here = entry.spread("image_auroc") if entry else None
        if entry and here:
            gap = f"{here.mean - paper.image_auroc:+.3f}"
            lines.append((paper.set, entry.title, f"{paper.image_auroc:.3f}", f"{here.mean:.3f}", gap, paper.source))
    return table(("set", "system", "published", "here", "difference", "published in"), lines) if lines else []


_TABLES = {"accuracy of": overview, "published figures beside": beside_published}


def refreshed(text: str, root: Path) -> str:
    """``text`` with the tables of the results files that markers in it name: see the README."""

    def section(found: re.Match[str]) -> str:
        rows = [row for path in found["data"].split() for row in Store(root / path, Row, KEY).load()]
        return "\n".join([found["start"], "", *_TABLES[found["what"]](rows), "", found["end"]])

    return re.sub(
        rf"(?P<start><!-- (?P<what>{'|'.join(_TABLES)}) (?P<data>[^>]+?) -->).*?(?P<end><!-- end -->)",
        section, text, flags=re.DOTALL,
    )  # fmt: skip


def _set_tables(rows: Sequence[Row]) -> list[SetTable]:
    sets: dict[str, list[Row]] = {}
    for row in rows:
        sets.setdefault(row.set, []).append(row)
    return [SetTable(sets[name]) for name in sorted(sets)]


def _how_to_read(rows: Sequence[Row]) -> list[str]:
    made = [row for row in rows if row.system != REFERENCE]
    budgets = sorted({row.images for row in made if row.images is not None})
    spent = (
        f"{' or '.join(f'{budget:,}' for budget in budgets)} training images seen in one training, over all its stages,"
        " rounded up to whole epochs, the same for every row"
        if budgets
        else "the presets' epochs"
    )
    return [
        f"Budget: {spent}.",
        f"Seeds: {', '.join(map(str, sorted({row.seed for row in made})))}.",
        f"Hardware: {'; '.join(sorted({row.hardware for row in made if row.hardware}))}; one thread a training.",
        "",
        "A figure is the mean over the seeds, in brackets the least and the most of them; in bold the best of a set.",
        '"gain" is the image AUROC less that of the row below, seed by seed: of the system without its memory or,',
        "where it has none, without what it adds to a plain one.",
        f"{_DAGGER} marks what does not beat the image statistics (brightness, contrast, quantiles and roughness of",
        "the image as a whole): it has shown nothing.",
    ]


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(refreshed(path.read_text(), path.parent))
