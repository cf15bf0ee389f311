"""All sheets of a table on one page, to look at in a browser: ``index.html`` beside the folders of the sets."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from benchmarks.accuracy.experiment import Row
from benchmarks.accuracy.results import write_page

_STYLE = """
body { margin: 0 auto; max-width: 960px; padding: 20px; font: 15px/1.45 system-ui, Arial, sans-serif; color: #1c2733; }
img { max-width: 100%; border: 1px solid #dfe5ec; } .soft { color: #5d6b7a; }"""


def save_index(folder: Path, title: str, rows: Sequence[Row]) -> None:
    """Write ``folder/index.html`` with the sheets that are there."""
    sections: dict[str, list[str]] = {}
    for row in rows:
        for sheet in sorted(folder.glob(f"{row.set}/*-{row.fingerprint}/sheet.png")):
            name = f"{row.system}, {row.variant}" if row.variant else row.system
            figure = "failed" if row.image_auroc is None else f"image AUROC {row.image_auroc:.3f}, seed {row.seed}"
            sections.setdefault(row.set, []).append(
                f'<h3>{escape(name)} <span class="soft">{figure}</span></h3>'
                f'<img alt="{escape(name)}" src="{quote(sheet.relative_to(folder).as_posix())}">'
            )
    write_page(
        folder / "index.html",
        [
            f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>",
            '<p class="soft">Maps have one colour scale a sheet: up to light green is what good images reach, yellow to'
            " red is beyond. Under each image its score beside the threshold. A grey mask: none is known.</p>",
            *(line for name in sorted(sections) for line in [f"<h2>{escape(name)}</h2>", *sections[name]]),
            "</body></html>",
        ],
    )
