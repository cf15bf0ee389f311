"""Structural similarity (Wang et al. 2004; PMB eq. 8, 9): the map of all windows, the loss, and their gradients.

With u = x + y, v = x - y and E the Gaussian-weighted mean over a window (csrc/cpu/ssim.h derives it):

    1 - luminance = E[v]^2 / ((E[u]^2 + E[v]^2) / 2 + C1)
    1 - structure = V[v]   / ((V[u]   + V[v]  ) / 2 + C2),      V[q] = E[q^2] - E[q]^2
    SSIM = luminance * structure

One filter serves all passes. A program is one warp; it walks down a strip of an image, and each lane owns COLS
neighbouring columns. Nothing is exchanged between lanes:

      | lane 0  | lane 1  | ...          one row:  u, v, u^2, v^2 of COLS + TAPS - 1 columns (loads overlap, L1 serves)
      | 0 1 2 3 | 4 5 6 7 |                        -> filtered across, COLS values for each of the four
    a row down: every window that sees it gains weight * value; the TAPS - 1 unfinished sums of each column stay
    in registers and move up by one; the window that is complete goes on to the formula.

Backward is the forward's filter, the four derivatives of each window (with respect to E[u], E[v], E[u^2], E[v^2]),
and the same filter over those, in a second launch. For reflected borders the filter F is its own adjoint where border
rows and columns count half: F' = M F / M with M = 1/2 there and 1 elsewhere, exact in floating point.

Counted for 11 taps, a pixel: 88 multiply-adds of the filters, 21 to make u, v, u^2, v^2 (4 columns a lane), 40 for the
formula: 1.16 times that, as 10 of 74 rows are another tile's too. float32: loss 8 bytes, map 12, backward 56 (16 are
the derivatives, written and read). On an H200 arithmetic is the limit, not memory: README_ssim.md predicts.
"""

from __future__ import annotations

import functools
import math
from array import array

import torch
import triton
import triton.language as tl
from torch import Tensor

from memad_fast.kernels import architecture

# Rows of windows of one program. Each recomputes TAPS - 1 rows of its neighbour, so more is less work; but an image
# of fewer pixels than this would then not occupy the processor. Never chosen by the batch: tiles decide rounding.
_ROWS, _ROWS_OF_SMALL, _SMALL = 64, 32, 512 * 512
# Columns of one lane, by the taps up to which 4 * COLS * (TAPS - 1) unfinished sums and the row at hand fit 255
# registers. Beyond 33 taps they spill: slower (and minutes to compile from 63), still right.
_COLUMNS = ((11, 4), (17, 2))
_COLUMNS_REFLECTED_BACK = ((7, 4), (15, 2))  # reflected columns of four derivatives take registers, too
_BLOCK = 1024  # partial sums that are added at a time
# Derivatives take 16 bytes a window: of as many images at a time as fit this, of one at least.
_WORKSPACE = 256 << 20
_SAMPLE = 1024  # pixels of an image that its reference value is chosen from


# --- addresses and borders ------------------------------------------------------------------------------------------


@triton.jit
def _tile(rows, cols, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """This program's plane, first row and first column."""
    across = tl.cdiv(cols, WIDTH)
    down = tl.cdiv(rows, ROWS)
    tile = tl.program_id(0)
    return (tile // (across * down)).to(tl.int64), (tile // across) % down * ROWS, tile % across * WIDTH


@triton.jit
def _plane(images, strides, plane, channels):
    return images + (plane // channels) * strides[0] + (plane % channels) * strides[1]


@triton.jit
def _reflected(position, size):
    """Mirrors a position outside [0, size) at the border pixel, as torch's "reflect" does."""
    position = tl.abs(position)
    return tl.where(position < size, position, 2 * (size - 1) - position)


@triton.jit
def _columns(first, LANES: tl.constexpr, COLS: tl.constexpr):
    """[LANES, COLS]: the columns that each lane owns, from ``first`` on."""
    return first + tl.arange(0, LANES)[:, None] * COLS + tl.arange(0, COLS)[None, :]


@triton.jit
def _apart(block, LANES: tl.constexpr, COLS: tl.constexpr):
    """[LANES, COLS] as COLS tensors [LANES]."""
    if COLS == 1:
        return (tl.reshape(block, [LANES]),)
    elif COLS == 2:
        return tl.split(block)
    else:
        even, odd = tl.split(tl.reshape(block, [LANES, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth


@triton.jit
def _together(columns, LANES: tl.constexpr, COLS: tl.constexpr):
    """COLS tensors [LANES] as [LANES, COLS]."""
    if COLS == 1:
        return tl.reshape(columns[0], [LANES, 1])
    elif COLS == 2:
        return tl.join(columns[0], columns[1])
    else:
        even, odd = tl.join(columns[0], columns[2]), tl.join(columns[1], columns[3])
        return tl.reshape(tl.join(even, odd), [LANES, 4])


@triton.jit
def _reach(first, cols, GROUPS: tl.constexpr, LANES: tl.constexpr, COLS: tl.constexpr, REFLECT: tl.constexpr):
    """The columns that each lane loads: GROUPS times COLS, from ``first`` on."""
    columns = ()
    for group in tl.static_range(GROUPS):
        at = _columns(first + group * COLS, LANES, COLS)
        if REFLECT:  # what no window sees may be any pixel
            at = tl.maximum(tl.minimum(_reflected(at, cols), cols - 1), 0)
        columns = columns + (at,)
    return columns


@triton.jit
def _row(plane, stride, row, rows, cols, columns, LANES: tl.constexpr, COLS: tl.constexpr, REFLECT: tl.constexpr):
    """The tensors [LANES] of all columns of a row; beyond the image, its reflection or 0."""
    if REFLECT:
        row = _reflected(row, rows)
    start = plane + row.to(tl.int64) * stride
    values = ()
    for group in tl.static_range(len(columns)):
        at = columns[group]
        if REFLECT:
            block = tl.load(start + at)
        else:
            inside = (at >= 0) & (at < cols) & (row >= 0) & (row < rows)
            block = tl.load(start + at, mask=inside, other=0.0)
        values = values + _apart(block.to(tl.float32), LANES, COLS)
    return values


# --- the filter -----------------------------------------------------------------------------------------------------


@triton.jit
def _no_sums(TAPS: tl.constexpr, LANES: tl.constexpr, COLS: tl.constexpr):
    sums = ()
    for _ in tl.static_range(4 * COLS * (TAPS - 1)):
        sums = sums + (tl.zeros([LANES], tl.float32),)
    return sums


@triton.jit
def _filter(values, sums, weights, SKEW: tl.constexpr, TAPS: tl.constexpr, COLS: tl.constexpr):
    """Add one row to the windows that see it.

    Args:
        values: 4 tuples (a quantity each) of columns; a lane's first window begins at column SKEW.
        sums: of the windows that have seen 1, 2, ..., TAPS - 1 rows; for each column, for each quantity.

    Returns:
        4 * COLS means, of the windows that are complete, and the sums with this row.
    """
    means = ()
    longer = ()
    for quantity in tl.static_range(4):
        for column in tl.static_range(COLS):
            across = weights[0] * values[quantity][SKEW + column]
            for tap in tl.static_range(1, TAPS):
                across += weights[tap] * values[quantity][SKEW + column + tap]
            if TAPS == 1:
                means = means + (weights[0] * across,)
            else:
                # The oldest sum first: each then has the register of the one that it follows.
                means = means + (sums[(quantity * COLS + column + 1) * (TAPS - 1) - 1] + weights[TAPS - 1] * across,)
                moved = ()
                for newer in tl.static_range(TAPS - 2):
                    moved = (
                        sums[(quantity * COLS + column + 1) * (TAPS - 1) - 2 - newer]
                        + weights[TAPS - 2 - newer] * across,
                    ) + moved
                longer = longer + (weights[0] * across,) + moved
    return means, longer


# --- windows --------------------------------------------------------------------------------------------------------


@triton.jit
def _centre_from(low, high):
    """The value of smallest magnitude between low and high if they have one sign, else 0; 0 if it is infinite."""
    centre = tl.where(low > 0.0, low, tl.where(high < 0.0, high, 0.0))
    return tl.where(tl.abs(centre) < float("inf"), centre, 0.0)


@triton.jit
def _centre(
    x, y, x_stride, y_stride, row, end_row, col, rows, cols, TAPS: tl.constexpr, WIDTH: tl.constexpr,
    HALO: tl.constexpr
):  # fmt: skip
    """A value to subtract from the pixels of a tile before squaring, so that an offset costs no accuracy.

    The pixel of smallest magnitude if all have one sign, else 0: it makes no pixel larger. NaN is passed over. This
    also brings the tile into the caches.
    """
    at_once: tl.constexpr = 4  # independent loads hide the memory's latency
    low = tl.full([at_once, WIDTH], float("inf"), tl.float32)
    low_halo = tl.full([at_once, HALO], float("inf"), tl.float32)
    high, high_halo = -low, -low_halo
    main, halo = col + tl.arange(0, WIDTH)[None, :], col + WIDTH + tl.arange(0, HALO)[None, :]
    end_col = tl.minimum(cols, col + WIDTH + TAPS - 1)
    for first in range(tl.maximum(row, 0), tl.minimum(end_row, rows), at_once):
        at = first + tl.arange(0, at_once)[:, None]
        row_inside = at < tl.minimum(end_row, rows)
        inside, inside_halo = row_inside & (main >= 0) & (main < end_col), row_inside & (halo < end_col)
        for image in tl.static_range(2):
            start = (x + at.to(tl.int64) * x_stride) if image == 0 else (y + at.to(tl.int64) * y_stride)
            pixels = tl.load(start + main, mask=inside, other=float("nan")).to(tl.float32)
            low, high = tl.where(pixels < low, pixels, low), tl.where(pixels > high, pixels, high)
            pixels = tl.load(start + halo, mask=inside_halo, other=float("nan")).to(tl.float32)
            low_halo = tl.where(pixels < low_halo, pixels, low_halo)
            high_halo = tl.where(pixels > high_halo, pixels, high_halo)
    return _centre_from(tl.minimum(tl.min(low), tl.min(low_halo)), tl.maximum(tl.max(high), tl.max(high_halo)))


@triton.jit
def _quantities(a, b, centre):
    """u, v, u^2, v^2 of two rows of pixels, each a tuple of columns."""
    u = ()
    v = ()
    uu = ()
    vv = ()
    for column in tl.static_range(len(a)):
        total = (a[column] - centre) + (b[column] - centre)
        difference = a[column] - b[column]
        u = u + (total,)
        v = v + (difference,)
        uu = uu + (total * total,)
        vv = vv + (difference * difference,)
    return u, v, uu, vv


@triton.jit
def _window(centred_u, mean_v, mean_uu, mean_vv, centre, c1, c2):
    """E[u]; 1 - luminance and 1 - structure of windows; 1 / their denominators."""
    mean_u = centred_u + 2.0 * centre
    variance_u = mean_uu - centred_u * centred_u
    variance_v = mean_vv - mean_v * mean_v
    # Rounding must not make a variance negative; NaN stays.
    variance_u = tl.where(variance_u < 0.0, 0.0, variance_u)
    variance_v = tl.where(variance_v < 0.0, 0.0, variance_v)
    square_v = mean_v * mean_v
    inverse_luminance = 1.0 / (0.5 * (mean_u * mean_u + square_v) + c1)
    inverse_structure = 1.0 / (0.5 * (variance_u + variance_v) + c2)
    return mean_u, square_v * inverse_luminance, variance_v * inverse_structure, inverse_luminance, inverse_structure


@triton.jit
def _dissimilarities(means, centre, c1, c2, COLS: tl.constexpr):
    """1 - SSIM of the windows of each column."""
    columns = ()
    for i in tl.static_range(COLS):
        _, dark, rough, _, _ = _window(
            means[i], means[COLS + i], means[2 * COLS + i], means[3 * COLS + i], centre, c1, c2
        )
        columns = columns + (dark + rough - dark * rough,)
    return columns


@triton.jit(do_not_specialize=["channels", "height", "rows"])
def _loss_kernel(
    x, y, partial, x_strides, y_strides, channels, height, width, rows, cols, weights, c1, c2, TAPS: tl.constexpr,
    PAD: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, COLS: tl.constexpr, GROUPS: tl.constexpr,
    HALO: tl.constexpr
):  # fmt: skip
    """partial[tile] = the sum of 1 - SSIM over the windows of a tile."""
    reach: tl.constexpr = (PAD + COLS - 1) // COLS * COLS  # loads begin at a multiple of COLS
    plane, row, col = _tile(rows, cols, ROWS, LANES * COLS)
    x, y = _plane(x, x_strides, plane, channels), _plane(y, y_strides, plane, channels)
    count = tl.minimum(ROWS, rows - row) + TAPS - 1
    row -= PAD
    centre = _centre(
        x, y, x_strides[2], y_strides[2], row, row + count, col - PAD, height, width, TAPS, LANES * COLS, HALO
    )
    columns = _reach(col - reach, width, GROUPS, LANES, COLS, PAD > 0)
    sums = _no_sums(TAPS, LANES, COLS)
    counts = _apart(_columns(col, LANES, COLS) < cols, LANES, COLS)
    total = tl.zeros([LANES], tl.float64)
    for i in range(0, count):
        a = _row(x, x_strides[2], row + i, height, width, columns, LANES, COLS, PAD > 0)
        b = _row(y, y_strides[2], row + i, height, width, columns, LANES, COLS, PAD > 0)
        means, sums = _filter(_quantities(a, b, centre), sums, weights, reach - PAD, TAPS, COLS)
        if i >= TAPS - 1:
            parts = _dissimilarities(means, centre, c1, c2, COLS)
            for j in tl.static_range(COLS):
                total += tl.where(counts[j], parts[j], 0.0).to(tl.float64)
    tl.store(partial + tl.program_id(0), tl.sum(total))


@triton.jit(do_not_specialize=["count", "windows"])
def _mean_kernel(partial, loss, count, windows, BLOCK: tl.constexpr):
    """loss = sum of partial[:count] / windows, in one order."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        total += tl.load(partial + first + lanes, mask=first + lanes < count, other=0.0)
    tl.store(loss, (tl.sum(total) / windows.to(tl.float64)).to(tl.float32))


@triton.jit(do_not_specialize=["channels", "height", "rows"])
def _map_kernel(
    x, y, map_, x_strides, y_strides, channels, height, width, rows, cols, weights, c1, c2, TAPS: tl.constexpr,
    PAD: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, COLS: tl.constexpr, GROUPS: tl.constexpr,
    HALO: tl.constexpr
):  # fmt: skip
    reach: tl.constexpr = (PAD + COLS - 1) // COLS * COLS
    plane, row, col = _tile(rows, cols, ROWS, LANES * COLS)
    x, y = _plane(x, x_strides, plane, channels), _plane(y, y_strides, plane, channels)
    count = tl.minimum(ROWS, rows - row) + TAPS - 1
    out = map_ + (plane * rows + row) * cols
    row -= PAD
    centre = _centre(
        x, y, x_strides[2], y_strides[2], row, row + count, col - PAD, height, width, TAPS, LANES * COLS, HALO
    )
    columns = _reach(col - reach, width, GROUPS, LANES, COLS, PAD > 0)
    sums = _no_sums(TAPS, LANES, COLS)
    at = _columns(col, LANES, COLS)
    for i in range(0, count):
        a = _row(x, x_strides[2], row + i, height, width, columns, LANES, COLS, PAD > 0)
        b = _row(y, y_strides[2], row + i, height, width, columns, LANES, COLS, PAD > 0)
        means, sums = _filter(_quantities(a, b, centre), sums, weights, reach - PAD, TAPS, COLS)
        if i >= TAPS - 1:
            ssim = 1.0 - _together(_dissimilarities(means, centre, c1, c2, COLS), LANES, COLS)
            tl.store(out + at, ssim.to(map_.dtype.element_ty), mask=at < cols)
            out += cols


# --- backward -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["channels", "height"])
def _reference_kernel(x, y, references, x_strides, y_strides, channels, height, width, SAMPLE: tl.constexpr):
    """references[image] = a value to subtract from pixels that are multiplied by derivatives of other tiles.

    As ``_centre``, of a sample: one pixel in each of SAMPLE stretches of rows, at columns that wander.
    """
    plane = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SAMPLE).to(tl.int64)
    row, col = i * height // SAMPLE, (i * 40503 & 65535) * width >> 16
    a = tl.load(_plane(x, x_strides, plane, channels) + row * x_strides[2] + col).to(tl.float32)
    b = tl.load(_plane(y, y_strides, plane, channels) + row * y_strides[2] + col).to(tl.float32)
    low = tl.minimum(tl.where(a == a, a, float("inf")), tl.where(b == b, b, float("inf")))
    high = tl.maximum(tl.where(a == a, a, -float("inf")), tl.where(b == b, b, -float("inf")))
    tl.store(references + plane, _centre_from(tl.min(low), tl.max(high)))


@triton.jit
def _is_border(position, size):
    return (position == 0) | (position == size - 1)


@triton.jit(do_not_specialize=["channels", "height", "rows", "first_plane"])
def _derivatives_kernel(
    x, y, grad, references, derivatives, x_strides, y_strides, grad_strides, channels, height, width, rows, cols, pitch,
    first_plane, weights, c1, c2, scale, TAPS: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, COLS: tl.constexpr, GROUPS: tl.constexpr, HALO: tl.constexpr
):  # fmt: skip
    """derivatives[plane, 4, rows, pitch]: of scale * grad * SSIM, for E[u], E[v], E[u^2], E[v^2] of each window.

    The last two are doubled, because d(u^2) = 2 u du; where borders reflect, those of border windows are doubled (1/M).
    Columns from cols to pitch are 0.
    """
    reach: tl.constexpr = (PAD + COLS - 1) // COLS * COLS
    plane, row, col = _tile(rows, pitch, ROWS, LANES * COLS)
    out = derivatives + (plane * 4 * rows + row) * pitch
    size = rows.to(tl.int64) * pitch
    plane += first_plane
    x, y = _plane(x, x_strides, plane, channels), _plane(y, y_strides, plane, channels)
    grad = _plane(grad, grad_strides, plane, channels)
    count = tl.minimum(ROWS, rows - row) + TAPS - 1
    row -= PAD
    centre = _centre(
        x, y, x_strides[2], y_strides[2], row, row + count, col - PAD, height, width, TAPS, LANES * COLS, HALO
    )
    shift = 2.0 * (centre - tl.load(references + plane))
    columns = _reach(col - reach, width, GROUPS, LANES, COLS, PAD > 0)
    sums = _no_sums(TAPS, LANES, COLS)
    at = _columns(col, LANES, COLS)
    for i in range(0, count):
        a = _row(x, x_strides[2], row + i, height, width, columns, LANES, COLS, PAD > 0)
        b = _row(y, y_strides[2], row + i, height, width, columns, LANES, COLS, PAD > 0)
        means, sums = _filter(_quantities(a, b, centre), sums, weights, reach - PAD, TAPS, COLS)
        if i >= TAPS - 1:
            window_row = row + i + PAD - (TAPS - 1)
            start = grad + window_row.to(tl.int64) * grad_strides[2]
            g = tl.load(start + at.to(tl.int64) * grad_strides[3], mask=at < cols, other=0.0).to(tl.float32) * scale
            if PAD > 0:
                g *= tl.where(_is_border(at, cols), 2.0, 1.0) * tl.where(_is_border(window_row, rows), 2.0, 1.0)
            g = _apart(g, LANES, COLS)
            of_u = ()
            of_v = ()
            of_uu = ()
            of_vv = ()
            for j in tl.static_range(COLS):
                centred_u, mean_v = means[j], means[COLS + j]
                mean_u, dark, rough, inverse_luminance, inverse_structure = _window(
                    centred_u, mean_v, means[2 * COLS + j], means[3 * COLS + j], centre, c1, c2
                )
                luminance = g[j] * (1.0 - rough) * inverse_luminance
                structure = g[j] * (1.0 - dark) * inverse_structure
                square_u, square_v = structure * rough, structure * (rough - 2.0)
                of_u = of_u + (mean_u * (luminance * dark) - (centred_u + shift) * square_u,)
                of_v = of_v + (mean_v * (luminance * (dark - 2.0)) - mean_v * square_v,)
                of_uu = of_uu + (square_u,)
                of_vv = of_vv + (square_v,)
            of_all = (of_u, of_v, of_uu, of_vv)
            for quantity in tl.static_range(4):
                block = tl.where(at < cols, _together(of_all[quantity], LANES, COLS), 0.0)
                tl.store(out + quantity * size + at, block, mask=at < pitch)
            out += pitch


@triton.jit(do_not_specialize=["channels", "height", "rows", "first_plane"])
def _gradients_kernel(
    x, y, references, derivatives, grad_x, grad_y, x_strides, y_strides, channels, height, width, rows, cols, pitch,
    first_plane, weights, TAPS: tl.constexpr, PAD: tl.constexpr, REFLECT: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, COLS: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """Derivatives filtered back to pixels: du = F(d E[u]) + u F(2 d E[u^2]), dv alike; dx, dy = du + dv, du - dv."""
    reach: tl.constexpr = (PAD + COLS - 1) // COLS * COLS
    plane, row, col = _tile(height, width, ROWS, LANES * COLS)
    size = rows.to(tl.int64) * pitch
    derivatives += plane * 4 * size
    plane += first_plane
    x, y = _plane(x, x_strides, plane, channels), _plane(y, y_strides, plane, channels)
    reference = tl.load(references + plane)
    count = tl.minimum(ROWS, height - row) + TAPS - 1
    out = (plane * height + row) * width
    row -= PAD
    wide = cols if REFLECT else pitch  # zeros stand beyond the columns
    columns = _reach(col - reach, wide, GROUPS, LANES, COLS, REFLECT)
    sums = _no_sums(TAPS, LANES, COLS)
    at = _columns(col, LANES, COLS)
    for i in range(0, count):
        values = ()
        for quantity in tl.static_range(4):
            image = derivatives + quantity * size
            values = values + (_row(image, pitch, row + i, rows, wide, columns, LANES, COLS, REFLECT),)
        means, sums = _filter(values, sums, weights, reach - PAD, TAPS, COLS)
        if i >= TAPS - 1:
            pixel_row = row + i + PAD - (TAPS - 1)
            a = tl.load(x + pixel_row.to(tl.int64) * x_strides[2] + at, mask=at < width, other=0.0).to(tl.float32)
            b = tl.load(y + pixel_row.to(tl.int64) * y_strides[2] + at, mask=at < width, other=0.0).to(tl.float32)
            a, b = _apart(a, LANES, COLS), _apart(b, LANES, COLS)
            of_x = ()
            of_y = ()
            for j in tl.static_range(COLS):
                u, v = (a[j] - reference) + (b[j] - reference), a[j] - b[j]
                grad_u, grad_v = means[j] + u * means[2 * COLS + j], means[COLS + j] + v * means[3 * COLS + j]
                of_x = of_x + (grad_u + grad_v,)
                of_y = of_y + (grad_u - grad_v,)
            of_x, of_y = _together(of_x, LANES, COLS), _together(of_y, LANES, COLS)
            if REFLECT:
                half = tl.where(_is_border(at, width), 0.5, 1.0) * tl.where(_is_border(pixel_row, height), 0.5, 1.0)
                of_x, of_y = of_x * half, of_y * half
            tl.store(grad_x + out + at, of_x.to(grad_x.dtype.element_ty), mask=at < width)
            tl.store(grad_y + out + at, of_y.to(grad_y.dtype.element_ty), mask=at < width)
            out += width


# --- launches -------------------------------------------------------------------------------------------------------


@functools.cache
def _weights(window_size: int, sigma: float) -> tuple[float, ...]:
    """The normalised Gaussian in one dimension, in float32.

    The middle tap takes up the rounding of the others: a sum other than 1 would show as variance in flat areas.
    """
    radius = window_size // 2
    taps = [math.exp(-0.5 * ((i - radius) / sigma) ** 2) for i in range(window_size)]
    total = math.fsum(taps)
    rounded = array("f", [tap / total for tap in taps])
    rounded[radius] = 1.0 - math.fsum(rounded[:radius] + rounded[radius + 1 :])
    return tuple(rounded)


def _lanes(x: Tensor) -> int:
    """How many lanes a warp has."""
    return 64 if architecture.architecture(x).name.startswith("gfx") else 32


class _Windows:
    """The windows of a batch, and the arguments that every kernel takes for them."""

    def __init__(
        self, x: Tensor, y: Tensor, window_size: int, sigma: float, data_range: float, reflect: bool,
        backward: bool = False
    ) -> None:  # fmt: skip
        self.x, self.y = (image if image.stride(3) == 1 else image.contiguous() for image in (x, y))
        self.batch, self.channels, self.height, self.width = x.shape
        margin = 0 if reflect else window_size - 1
        self.rows, self.cols = self.height - margin, self.width - margin
        self.planes = self.batch * self.channels
        self.count = self.planes * self.rows * self.cols
        self.taps = window_size
        self.pad = window_size // 2 if reflect else 0
        self.reflect = self.pad > 0
        self.weights = _weights(window_size, sigma)
        self.constants = ((0.01 * data_range) ** 2, (0.03 * data_range) ** 2)
        self.lanes = _lanes(x)
        fitting = _COLUMNS_REFLECTED_BACK if reflect and backward else _COLUMNS
        self.columns = next((columns for taps, columns in fitting if window_size <= taps), 1)
        self.tile_rows = _ROWS if self.height * self.width >= _SMALL else _ROWS_OF_SMALL

    def tiles(self, planes: int, rows: int, cols: int) -> int:
        return planes * triton.cdiv(rows, self.tile_rows) * triton.cdiv(cols, self.lanes * self.columns)

    def images(self) -> tuple[object, ...]:
        return self.x.stride()[:3], self.y.stride()[:3], self.channels, self.height, self.width, self.rows, self.cols

    def options(self, pad: int) -> dict[str, int]:
        """Compile-time constants for a filter whose first window begins ``pad`` before the first value."""
        reach = triton.cdiv(pad, self.columns) * self.columns
        return {
            "TAPS": self.taps,
            "PAD": pad,
            "ROWS": self.tile_rows,
            "LANES": self.lanes,
            "COLS": self.columns,
            "GROUPS": triton.cdiv(reach - pad + self.columns + self.taps - 1, self.columns),
            "num_warps": 1,
        }


def ssim_loss(x: Tensor, y: Tensor, window_size: int, sigma: float, data_range: float, reflect: bool) -> Tensor:
    """Serves ``memad_fast::ssim_loss``."""
    windows = _Windows(x, y, window_size, sigma, data_range, reflect)
    tiles = windows.tiles(windows.planes, windows.rows, windows.cols)
    partial = x.new_empty(tiles, dtype=torch.float64)
    loss = x.new_empty((), dtype=torch.float32)
    if tiles:
        _loss_kernel[(tiles,)](
            windows.x, windows.y, partial, *windows.images(), windows.weights, *windows.constants,
            HALO=triton.next_power_of_2(window_size), **windows.options(windows.pad)
        )  # fmt: skip
    _mean_kernel[(1,)](partial, loss, tiles, windows.count, BLOCK=_BLOCK)
    return loss


def ssim_map(x: Tensor, y: Tensor, window_size: int, sigma: float, data_range: float, reflect: bool) -> Tensor:
    """Serves ``memad_fast::ssim_map``."""
    windows = _Windows(x, y, window_size, sigma, data_range, reflect)
    map_ = x.new_empty(windows.batch, windows.channels, windows.rows, windows.cols)
    tiles = windows.tiles(windows.planes, windows.rows, windows.cols)
    if tiles:
        _map_kernel[(tiles,)](
            windows.x, windows.y, map_, *windows.images(), windows.weights, *windows.constants,
            HALO=triton.next_power_of_2(window_size), **windows.options(windows.pad)
        )  # fmt: skip
    return map_


def _gradients(windows: _Windows, grad: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of the sum of scale * grad * SSIM over all windows."""
    x, y = windows.x, windows.y
    grad_x, grad_y = x.new_empty(x.shape), y.new_empty(y.shape)
    if windows.count == 0:
        return grad_x, grad_y
    references = x.new_empty(windows.planes, dtype=torch.float32)
    strides = (x.stride()[:3], y.stride()[:3])
    _reference_kernel[(windows.planes,)](
        x, y, references, *strides, windows.channels, windows.height, windows.width, SAMPLE=_SAMPLE
    )
    pitch = triton.cdiv(windows.cols, 16) * 16  # of rows of derivatives: they then begin where vectors may
    at_once = min(windows.planes, max(1, _WORKSPACE // (16 * windows.rows * pitch)))
    derivatives = x.new_empty(at_once, 4, windows.rows, pitch, dtype=torch.float32)
    sizes = (windows.channels, windows.height, windows.width, windows.rows, windows.cols, pitch)
    back = windows.pad if windows.reflect else windows.taps - 1
    for first in range(0, windows.planes, at_once):
        planes = min(at_once, windows.planes - first)
        _derivatives_kernel[(windows.tiles(planes, windows.rows, pitch),)](
            x, y, grad, references, derivatives, *strides, grad.stride(), *sizes, first, windows.weights,
            *windows.constants, scale, HALO=triton.next_power_of_2(windows.taps), **windows.options(windows.pad)
        )  # fmt: skip
        _gradients_kernel[(windows.tiles(planes, windows.height, windows.width),)](
            x, y, references, derivatives, grad_x, grad_y, *strides, *sizes, first, windows.weights,
            REFLECT=windows.reflect, **windows.options(back)
        )  # fmt: skip
    return grad_x, grad_y


def ssim_map_backward(
    grad: Tensor, x: Tensor, y: Tensor, window_size: int, sigma: float, data_range: float, reflect: bool
) -> tuple[Tensor, Tensor]:
    """Serves ``memad_fast::ssim_map_backward``."""
    return _gradients(_Windows(x, y, window_size, sigma, data_range, reflect, backward=True), grad, 1.0)


def ssim_loss_backward(
    grad: Tensor, x: Tensor, y: Tensor, window_size: int, sigma: float, data_range: float, reflect: bool
) -> tuple[Tensor, Tensor]:
    """Serves ``memad_fast::ssim_loss_backward``: every window has the same gradient."""
    windows = _Windows(x, y, window_size, sigma, data_range, reflect, backward=True)
    each = grad.expand(windows.batch, windows.channels, windows.rows, windows.cols)
    return _gradients(windows, each, -1.0 / max(windows.count, 1))
