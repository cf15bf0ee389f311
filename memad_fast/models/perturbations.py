"""The three perturbations that SALAD learns to undo (section III-C), over whole batches on the images' device.

    in-painting              5 tiles of area WH/64 to WH/25 are filled with uniform noise
    local pixel shuffling    the pixels of 300 tiles of area 1 to WH/100 change places, each within its tile
    non-linear intensity     every value goes through one random Bézier curve from (0, 0) to (1, 1)

The paper gives areas. A tile's height and width are drawn independently and uniformly from whole numbers of pixels, H/8
to H/5 by W/8 to W/5, and 1 to H/10 by 1 to W/10, which gives those areas and is how the work that the paper follows
(Models Genesis) draws them. Where tiles overlap, a pixel belongs to the last of them: then no value is lost or doubled
by the shuffling, and all tiles of all images can be shuffled at once.

Source: H. Zhao et al., "Anomaly Detection for Medical Images Using Self-Supervised and Translation-Consistent
Features"; Z. Zhou et al., "Models Genesis", MICCAI 2019, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PAINTED_TILES = 5
SHUFFLED_TILES = 300
# Where a Bézier curve is evaluated; between two of these points it is read linearly.
_CURVE_POINTS = 256


class Tiles(NamedTuple):
    """Rectangles in each image of a batch: first row and column, height and width, all ``[B, tiles]`` int64."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def in_painting(images: Tensor) -> Tensor:
    """``images`` ``[B, C, H, W]`` with five tiles of noise each, drawn for every channel uniformly from [0, 1]."""
    rows, columns = images.shape[2:]
    tiles = _draw_tiles(images, PAINTED_TILES, (math.ceil(rows / 8), rows // 5), (math.ceil(columns / 8), columns // 5))
    in_rows, in_columns = _within(tiles.top, tiles.height, rows), _within(tiles.left, tiles.width, columns)
    painted = (in_rows[..., :, None] & in_columns[..., None, :]).any(dim=1, keepdim=True)
    return torch.where(painted, torch.rand_like(images), images)


def local_pixel_shuffling(images: Tensor) -> Tensor:
    """``images`` ``[B, C, H, W]`` with their pixels shuffled within 300 tiles each; channels stay together."""
    rows, columns = images.shape[2:]
    tiles = _draw_tiles(images, SHUFFLED_TILES, (1, rows // 10), (1, columns // 10))
    tile = _last_tile(tiles, rows, columns)
    # Sorted by tile, once with each tile's pixels as they are and once in random order: the n-th value goes to the n-th
    # of the places.
    places = tile.argsort(dim=1, stable=True)
    values = (tile * (1 << 32) + torch.randint(1 << 32, tile.shape, device=tile.device)).argsort(dim=1)
    source = torch.zeros_like(places).scatter_(1, places, values)
    source = torch.where(tile == 0, torch.arange(rows * columns, device=tile.device), source)
    flat = images.flatten(2)
    return flat.gather(2, source[:, None].expand_as(flat)).reshape(images.shape)


def non_linear_intensity(images: Tensor, *, control_points: int = 2) -> Tensor:
    """``images`` ``[B, C, H, W]`` in [0, 1], each through a Bézier curve of its own; the same for all channels.

    The curve runs from (0, 0) to (1, 1), with ``control_points`` free points between, drawn uniformly from the unit
    square. Its points are put in ascending order of both coordinates, as Models Genesis does (with two they are in
    order as they come): so a brighter pixel never becomes the darker one.
    """
    grey = images.float().clamp(0, 1).flatten(1).contiguous()
    curve = _bezier(torch.rand(len(images), control_points, 2, device=images.device)).sort(dim=1).values
    knots, heights = curve.unbind(dim=2)
    right = torch.searchsorted(knots.contiguous(), grey).clamp(1, _CURVE_POINTS - 1)
    start, end = knots.gather(1, right - 1), knots.gather(1, right)
    share = ((grey - start) / (end - start).clamp(min=1e-12)).clamp(0, 1)
    values = torch.lerp(heights.gather(1, right - 1), heights.gather(1, right), share)
    return values.clamp(0, 1).reshape(images.shape).to(images.dtype)


PERTURBATIONS: dict[str, Callable[..., Tensor]] = {
    "inpainting": in_painting,
    "shuffling": local_pixel_shuffling,
    "intensity": non_linear_intensity,
}


def perturb(images: Tensor, *, control_points: int = 2) -> Tensor:
    """Each image of a batch with one of the three perturbations, drawn for it with equal chances.

    Args:
        images: ``[B, C, H, W]`` floats in [0, 1], with sides of at least 10 pixels for what the areas above say;
            smaller ones get tiles of the nearest size, one pixel at least.
        control_points: see ``non_linear_intensity``.

    Returns:
        New images of the same shape, dtype and device, in [0, 1]. Everything is drawn from torch's global generators:
        the kinds from the CPU's, so that no device is waited for, the rest from that of the images' device.

    Cost: O(B·H·W·log(H·W)) time, for the sorts behind the shuffling.

    Example:
        >>> import torch
        >>> images = torch.rand(4, 1, 32, 32)
        >>> perturb(images).shape
        torch.Size([4, 1, 32, 32])
    """
    kinds = torch.randint(len(PERTURBATIONS), (len(images),)).numpy()
    perturbed = torch.empty_like(images)
    for number, kind in enumerate(PERTURBATIONS):
        chosen = torch.from_numpy(np.flatnonzero(kinds == number)).to(images.device, non_blocking=True)
        options = {"control_points": control_points} if kind == "intensity" else {}
        perturbed[chosen] = PERTURBATIONS[kind](images[chosen], **options)
    return perturbed


def _draw_tiles(images: Tensor, count: int, heights: tuple[int, int], widths: tuple[int, int]) -> Tiles:
    """``count`` tiles in each image, whose sides lie in these ranges, ends included, and anywhere in the image."""

    def sides(least: int, most: int) -> Tensor:
        return torch.randint(least, max(least, most) + 1, (len(images), count), device=images.device)

    def starts(side: Tensor, whole: int) -> Tensor:
        return (torch.rand(side.shape, device=images.device) * (whole - side + 1)).long()

    height, width = sides(*heights), sides(*widths)
    return Tiles(starts(height, images.shape[2]), starts(width, images.shape[3]), height, width)


def _within(start: Tensor, length: Tensor, whole: int) -> Tensor:
    """Which of ``whole`` places lie in each range: ``[B, tiles, whole]`` bool."""
    place = torch.arange(whole, device=start.device)
    return (place >= start[..., None]) & (place < (start + length)[..., None])


def _last_tile(tiles: Tiles, rows: int, columns: int) -> Tensor:
    """The number (from 1) of the last tile that covers each pixel, 0 where there is none: ``[B, rows·columns]``."""
    batch, count = tiles.top.shape
    # Every tile's pixels in a square that holds the largest tile; those beyond a tile write the 0 that is there.
    side = max(1, rows // 10), max(1, columns // 10)
    down = torch.arange(side[0], device=tiles.top.device)[:, None]
    across = torch.arange(side[1], device=tiles.top.device)
    inside = (down < tiles.height[..., None, None]) & (across < tiles.width[..., None, None])
    pixel = (tiles.top[..., None, None] + down) * columns + tiles.left[..., None, None] + across
    number = torch.arange(1, count + 1, device=tiles.top.device)[:, None, None]
    pixel, number = torch.where(inside, pixel, 0), torch.where(inside, number, 0)
    last = torch.zeros(batch, rows * columns, dtype=torch.int64, device=tiles.top.device)
    return last.scatter_reduce_(1, pixel.flatten(1), number.flatten(1), "amax")


def _bezier(free: Tensor) -> Tensor:
    """Points ``[B, points, 2]`` of the curves from (0, 0) to (1, 1) with the free control points ``[B, n, 2]``."""
    free = torch.cat((torch.zeros_like(free[:, :1]), free, torch.ones_like(free[:, :1])), dim=1)
    degree = free.shape[1] - 1
    at = torch.linspace(0, 1, _CURVE_POINTS, device=free.device)
    weights = torch.stack([math.comb(degree, i) * at**i * (1 - at) ** (degree - i) for i in range(degree + 1)], dim=1)
    # Not a matrix product: autocast would give it 16 bits.
    return (weights[None, :, :, None] * free[:, None]).sum(dim=2)
