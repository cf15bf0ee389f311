"""Anomaly maps as colours, on one scale for every image of a run.

A map is shown against what good parts reach: the colours up to ``NORMAL_MARK`` of the scale (blue) occur on good
parts, yellow to red do not. A scale per image would paint the loudest noise of a good part red.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Where on the scale (0 to 1) the highest value that good parts reach lies.
NORMAL_MARK = 0.4

# Position on the scale -> colour: dark and blue for the usual, yellow to red beyond what good parts reach.
_ANCHORS = (
    (0.0, (16, 23, 74)),
    (0.25, (43, 108, 176)),
    (NORMAL_MARK, (127, 205, 187)),
    (0.6, (254, 224, 120)),
    (0.8, (244, 109, 67)),
    (1.0, (200, 0, 32)),
)

# An overlay hides the image nowhere completely, and shows it unchanged where the map is 0.
_MOST_OPAQUE = 0.75


def _colour_table() -> NDArray[np.uint8]:
    positions = np.linspace(0.0, 1.0, 256)
    anchors = [position for position, _ in _ANCHORS]
    channels = [np.interp(positions, anchors, [colour[i] for _, colour in _ANCHORS]) for i in range(3)]
    return np.stack(channels, axis=1).round().astype(np.uint8)


COLOURS = _colour_table()  # [256, 3]
_OPACITY = np.clip(np.linspace(0.0, 1.0, 256) / 0.6, 0.0, 1.0) ** 1.5 * _MOST_OPAQUE  # [256]


def levels(anomaly_map: NDArray[np.float32], map_level: float, size: tuple[int, int]) -> NDArray[np.uint8]:
    """An anomaly map ``[H, W]`` resized to ``size`` (width, height), as places 0 to 255 on the colour scale.

    ``map_level`` is the value that good parts reach: it lands on ``NORMAL_MARK`` of the scale.
    """
    finite = np.nan_to_num(np.asarray(anomaly_map, dtype=np.float32))
    resized = np.asarray(Image.fromarray(finite).resize(size, Image.Resampling.BILINEAR))
    top = map_level / NORMAL_MARK
    if top <= 0.0:  # good parts were reconstructed without any error: whatever differs is beyond them
        return np.where(resized > 0.0, np.uint8(255), np.uint8(0))
    return (np.clip(resized, 0.0, top) * (255.0 / top) + 0.5).astype(np.uint8)


def save(path: Path, places: NDArray[np.uint8]) -> None:
    """Write places on the scale as a palette PNG: it shows their colours, and its values are the places 0 to 255."""
    image = Image.fromarray(places, mode="L")
    image.putpalette(COLOURS.tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG", compress_level=3)


def overlay(image: NDArray[np.uint8], places: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An RGB image ``[H, W, 3]`` with the map's colours over it, the more opaque the higher the map."""
    opacity = _OPACITY[places][..., None]
    return (image * (1.0 - opacity) + COLOURS[places] * opacity).round().astype(np.uint8)
