from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from memad_fast.scoring import Result, Run, score
from memad_fast.scoring.report import Facts, Report

FACTS = Facts("pmb", "runs/x", "From 19 held-out images.", 123.4, "0.1.0")
# Elements that have no end tag.
VOID = {"meta", "img", "br", "rect", "line"}


class Page(HTMLParser):
    """The text, images and open elements of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.images: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "srcset", "action")]
        if tag == "img":
            self.images.append(values["src"] or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _result(path: str, value: float, size: tuple[int, int] = (40, 20), channels: int = 1) -> Result:
    image = np.full((channels, 16, 16), 0.5, dtype=np.float32)
    return Result(path, value, 1.0, 2.0, "", size, {}, image, np.full((16, 16), 0.1, dtype=np.float32), image)


def _page(*results: Result, threshold: float = 1.0, worst: int = 200) -> tuple[Page, str]:
    report = Report(threshold, 0.2, worst)
    for result in results:
        report.add(result)
    html = report.html(FACTS)
    page = Page(html)
    assert page.open == []
    return page, html


def test_a_page_of_a_scoring_is_whole_and_asks_for_nothing(toy_run: Run, parts: Path, tmp_path: Path) -> None:
    (parts / "bad.png").write_text("no image")
    summary = score(toy_run, parts, tmp_path / "out", report=True)
    assert summary.report is not None
    html = summary.report.read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert "script" not in page.tags
    assert "http" not in html.lower()
    assert all(link.startswith("data:image/") for link in page.links)
    assert "url(" not in html
    assert len(page.images) == 3 * 10
    text = " ".join(page.text)
    assert "It is the 0.99 quantile of the scores of 19 held-out normal images. About 5 % of good parts" in text
    assert "not scored" in text
    assert "bad.png" in text
    assert "threshold 0.35" in text


def test_the_worst_comes_first_and_equals_keep_their_order() -> None:
    results = [_result(f"{index}.png", value) for index, value in enumerate([0.5, 3.0, 1.5, 3.0, 0.1])]
    _, html = _page(*results)
    names = re.findall(r"<bdi>(\d)\.png</bdi>", html)
    assert names == ["1", "3", "2", "0", "4"]


def test_only_the_worst_are_shown_and_the_others_counted() -> None:
    rng = np.random.default_rng(0)
    values = rng.permutation(1000) / 1000
    page, html = _page(*(_result(f"p{index}.png", float(value)) for index, value in enumerate(values)), worst=7)
    shown = [int(name) for name in re.findall(r"<bdi>p(\d+)\.png</bdi>", html)]
    assert shown == np.argsort(-values)[:7].tolist()
    assert "993 more are in" in " ".join(page.text)
    assert "Scores of 1,000 images" in html


def test_a_nasty_file_name_is_text_and_nothing_else() -> None:
    name = "<script>alert('x')</script>\"&amp;\u202egnp.png"
    page, html = _page(_result(f"dir/{name}", 2.0), Result("bad" + name, float("nan"), 1.0, 0.0, "<b>odd</b>"))
    assert "script" not in page.tags
    assert "b>odd" not in html
    assert "<b>odd</b>" in page.text
    assert "\u202e" not in html
    assert any(text.startswith("<script>alert('x')") or "alert" in text for text in page.text)


def test_a_file_name_of_odd_bytes_can_be_written(tmp_path: Path) -> None:
    report = Report(1.0, 0.2)
    report.add(_result(b"caf\xe9.png".decode("utf-8", "surrogateescape"), 2.0))
    report.write(tmp_path / "report.html", FACTS)
    assert "caf" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_pictures_keep_the_shape_of_the_file() -> None:
    page, _ = _page(_result("wide.png", 2.0, (400, 100), channels=3))
    for source in page.images:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            assert image.size == (192, 48)
            assert image.mode == "RGB"


def test_anomalies_are_those_above_the_threshold() -> None:
    page, html = _page(_result("a.png", 1.0), _result("b.png", 1.0000001), _result("c.png", 0.2))
    assert html.count(">anomaly</span>") == 1
    assert html.count(">good</span>") == 2
    assert "above the threshold, 33.3%" in " ".join(page.text)


@pytest.mark.parametrize(
    ("scores", "threshold"),
    [
        ([], 1.0),
        ([0.0], 0.0),
        ([0.0, 0.0], 1.0),
        ([5.0], 1.0),
        ([-3.0, -1.0], -2.0),
        ([1e-30, 1e30], 1.0),
        ([1e12], 1e3),
    ],
)
def test_any_scores_make_a_page(scores: list[float], threshold: float) -> None:
    _, html = _page(*(_result(f"{index}.png", value) for index, value in enumerate(scores)), threshold=threshold)
    assert "nan" not in html.replace("</span>", "").lower().split("</style>")[1].split("base64")[0]


def test_every_image_is_in_the_histogram_and_its_colour_says_its_side() -> None:
    rng = np.random.default_rng(0)
    values = [*rng.normal(0.6, 0.2, 300).clip(0), *rng.normal(2, 0.5, 40), 40.0]
    _, html = _page(*(_result(f"{index}.png", float(value)) for index, value in enumerate(values)))
    bars = re.findall(r'fill="(#\w+)"><title>([\d,]+) images? from', html)
    counted = {colour: sum(int(count) for c, count in bars if c == colour) for colour, _ in bars}
    above = sum(value > 1.0 for value in values)
    assert counted == {"#7c93ab": len(values) - above, "#c1121f": above}
    assert "The last bar holds all scores from" in html
