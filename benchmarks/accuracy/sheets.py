"""Pictures of what a run does: inputs, reconstructions, maps and masks, some at random and the worst mistakes.

One sheet is one PNG. Its maps have one colour scale: up to light green is what good images reach, yellow to red is
beyond (``memad_fast.scoring.heatmap``).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from memad_fast._atomic import write_bytes
from memad_fast.data import Dataset
from memad_fast.scoring import Run, heatmap

TILE = 96
COLUMNS = 8
_GAP = 4
_LABELS = ("input", "reconstruction", "map", "mask")
_MARGIN = 92
_TITLE = 20
_CAPTION = 26
_PAPER, _INK, _SOFT = (255, 255, 255), (28, 39, 51), (93, 107, 122)


@dataclass(frozen=True)
class Block:
    """Some test images that stand together, by their places in the set."""

    title: str
    images: Sequence[int]


def choose(scores: NDArray[np.float64], labels: NDArray[np.int64], seed: int, count: int = COLUMNS) -> list[Block]:
    """At random, good and defective; and the worst: good ones of the highest score, defective ones of the lowest.

    Those at random depend on the labels and the seed only, so that systems can be compared on the same images.
    """
    random = np.random.default_rng(seed)
    by_chance = [sorted(random.permutation(np.flatnonzero(labels == label))[:count].tolist()) for label in (0, 1)]
    ascending = np.argsort(scores, kind="stable")
    good, defective = (ascending[labels[ascending] == label] for label in (0, 1))
    return [
        Block("good, at random", by_chance[0]),
        Block("defective, at random", by_chance[1]),
        Block("the worst: good, with the highest scores", good[::-1][:count].tolist()),
        Block("the worst: defective, with the lowest scores", defective[:count].tolist()),
    ]


def save_sheet(run: Run, data: Dataset, path: Path, seed: int = 0) -> None:
    """Score the test images of ``data`` and write a sheet of some of them."""
    scores = np.concatenate(
        [
            run.model.score(batch.images.to(run.device)).image_score.double().cpu().numpy()
            for batch in data.test.batches(32)
        ]
    )
    picture = draw(run, data, scores, choose(scores, data.test.labels.numpy(), seed))
    buffer = io.BytesIO()
    picture.quantize(256).save(buffer, format="PNG", optimize=True)
    write_bytes(path, buffer.getvalue())


def draw(run: Run, data: Dataset, scores: NDArray[np.float64], blocks: Sequence[Block]) -> Image.Image:
    """The sheet: a block below the other, an image a column, its score beside the threshold under it."""
    blocks = [block for block in blocks if block.images]
    tall = _TITLE + len(_LABELS) * (TILE + _GAP) + _CAPTION
    sheet = Image.new("RGB", (_MARGIN + COLUMNS * (TILE + _GAP), len(blocks) * tall), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, block in enumerate(blocks):
        top = number * tall
        pen.text((4, top + 4), block.title, _INK)
        for row, label in enumerate(_LABELS):
            pen.text((4, top + _TITLE + row * (TILE + _GAP) + TILE // 2 - 5), label, _SOFT)
        for column, index in enumerate(block.images):
            left = _MARGIN + column * (TILE + _GAP)
            for row, tile in enumerate(tiles(run, data, index)):
                sheet.paste(tile, (left, top + _TITLE + row * (TILE + _GAP)))
            mark = ">" if scores[index] > run.threshold else "<="
            caption = f"{data.test.entries[index].defect[:15]}\n{scores[index]:.3g} {mark} {run.threshold:.3g}"
            pen.text((left, top + _TITLE + len(_LABELS) * (TILE + _GAP) - 2), caption, _INK, spacing=1)
    return sheet


def tiles(run: Run, data: Dataset, index: int) -> list[Image.Image]:
    """Input, reconstruction, map and mask of one test image; an empty tile where no mask is known."""
    item = data.test[index]
    result = run.model.score(item.image[None].to(run.device))
    side = (TILE, TILE)
    places = heatmap.levels(result.anomaly_map[0, 0].float().cpu().numpy(), run.map_level, side)
    if item.mask is None:
        mask = Image.new("RGB", side, (225, 230, 236))
    else:
        mask = Image.fromarray(item.mask[0].numpy()).convert("RGB").resize(side, Image.Resampling.NEAREST)
    return [
        _picture(item.image.numpy()),
        _picture(result.reconstruction[0].float().cpu().numpy()),
        Image.fromarray(heatmap.COLOURS[places]),
        mask,
    ]


def _picture(image: NDArray[np.float32]) -> Image.Image:
    """``[C, H, W]`` in [0, 1]; every pixel of it is to be seen."""
    pixels = (np.clip(np.nan_to_num(image), 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8).transpose(1, 2, 0)
    colour = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
    return Image.fromarray(colour).resize((TILE, TILE), Image.Resampling.NEAREST)
