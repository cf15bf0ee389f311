"""A picture of SALAD's perturbations: each image beside what is made of it, for eyes to judge whether they suit the
images at hand.

                original    in-painting    local pixel shuffling    non-linear intensity
    part.png    [      ]    [         ]    [                   ]    [                  ]
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from memad_fast._arguments import check_choice
from memad_fast._atomic import write_bytes
from memad_fast.data.images import grey_or_colour, read_pixels, to_tensor
from memad_fast.models.perturbations import PERTURBATIONS
from memad_fast.scoring.stream import find_images

ALL = "all"
_TITLES = {
    "inpainting": "in-painting",
    "shuffling": "local pixel shuffling",
    "intensity": "non-linear intensity",
}
_MARGIN, _LINE, _FONT_SIZE = 8, 22, 14


def write_perturbations(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    kind: str = ALL,
    size: int = 256,
    most: int = 8,
    seed: int = 0,
) -> int:
    """Write a picture of images and their perturbations; the number of images in it is returned.

    Args:
        source: an image, a folder (searched through), or a glob pattern. Of more than ``most`` images, evenly spaced
            ones are taken.
        out: the PNG file. One that is there is replaced, once the new one is whole.
        kind: "inpainting", "shuffling", "intensity" or "all".
        size: side in pixels that the images are resized to first, as for a model of this ``image_size``.
        most: images, at most.
        seed: of all that is drawn.

    Raises:
        ImageError: an image cannot be read; it is named. FileNotFoundError: there is no ``source``.
        ValueError: no image in ``source``, or an argument is out of its range.

    Example:
        >>> import numpy as np
        >>> from PIL import Image
        >>> from memad_fast.scoring import write_perturbations
        >>> Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64)).save("part.png")
        >>> write_perturbations("part.png", "perturbed.png", size=64)
        1
        >>> Image.open("perturbed.png").format
        'PNG'
    """
    check_choice("kind", kind, (*PERTURBATIONS, ALL))
    if size < 1:
        raise ValueError(f"size: expected at least 1 pixel, got {size}")
    if most < 1:
        raise ValueError(f"most: expected at least 1 image, got {most}")
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"out: expected a file that ends in .png, got {out}")
    paths = list(find_images([source]))
    if not paths:
        raise ValueError(f"{os.fspath(source)}: no images in it")
    paths = [paths[index] for index in np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int)]
    kinds = list(PERTURBATIONS) if kind == ALL else [kind]
    rows = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path in paths:
            pixels = read_pixels(path)
            image = to_tensor(pixels, size, grey_or_colour(pixels), name=os.fspath(path))
            rows.append([image, *(PERTURBATIONS[name](image[None])[0] for name in kinds)])
    buffer = io.BytesIO()
    _grid(rows, ["original", *(_TITLES[name] for name in kinds)], [path.name for path in paths], size).save(
        buffer, format="PNG"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, buffer.getvalue())
    return len(rows)


def _grid(rows: Sequence[Sequence[Tensor]], titles: Sequence[str], names: Sequence[str], size: int) -> Image.Image:
    """Images ``[C, size, size]`` in rows, the titles above the columns, the names below the rows."""
    font = ImageFont.load_default(_FONT_SIZE)
    step = max(size, round(max(font.getlength(title) for title in titles))) + _MARGIN
    height = _MARGIN + _LINE + len(rows) * (size + _LINE)
    picture = Image.new("RGB", (_MARGIN + len(titles) * step, height), "white")
    draw = ImageDraw.Draw(picture)
    for column, title in enumerate(titles):
        draw.text((_MARGIN + column * step, _MARGIN), title, "black", font)
    for row, (images, name) in enumerate(zip(rows, names, strict=True)):
        top = _MARGIN + _LINE + row * (size + _LINE)
        for column, image in enumerate(images):
            pixels = (image.expand(3, -1, -1).permute(1, 2, 0) * 255).round().clamp(0, 255).byte().numpy()
            picture.paste(Image.fromarray(pixels), (_MARGIN + column * step, top))
        draw.text((_MARGIN, top + size + 2), name.encode("ascii", "replace").decode(), "dimgrey", font)
    return picture
