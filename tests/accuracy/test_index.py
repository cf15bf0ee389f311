"""The page of all sheets: it shows those that belong to the rows, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.accuracy.experiment import Row
from benchmarks.accuracy.index import save_index


def test_the_page_shows_the_sheets_of_the_rows(make_row: Callable[..., Row], tmp_path: Path) -> None:
    for name in ("pmb-seed0-aa", "pmb-seed0-bb", "simsid-seed0-cc"):
        (tmp_path / "parts" / name).mkdir(parents=True)
        (tmp_path / "parts" / name / "sheet.png").touch()
    rows = [
        make_row("pmb", "", 0, 0.75, fingerprint="bb"),
        make_row("simsid", "<i>", 0, None, fingerprint="cc"),
        make_row("salad", "", 0, 0.5, fingerprint="dd"),
        make_row("reference", "image statistics", 0, 0.5, fingerprint=""),
    ]
    save_index(tmp_path, "Title", rows)
    text = (tmp_path / "index.html").read_text()
    assert text.count("<img") == 2
    assert 'src="parts/pmb-seed0-bb/sheet.png"' in text
    assert "image AUROC 0.750, seed 0" in text
    assert "simsid, &lt;i&gt;" in text
