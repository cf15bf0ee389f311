"""Rows as int8 codes with the numbers that bound the error of a score: prepare_keys, and the queries of nearest_keys.

A row x is staged, x' = fl(x - centre) (cosine: x / |x| - centre; queries of ip and cosine without the centre), then
written x' = scale * codes + r with |codes| <= 127. What is stored beside the codes are the norms and errors of
csrc/cpu/README_nearest_keys.md, whose letters and proof these are. All that differs here is the order of the float32
sums, which depends on the processor: gamma_{D+16} holds for every order and takes the place of sigma.

Packed keys, the same bytes for Triton and CUDA C++ (Mp = M rounded up to 128, Dp = D rounded up to 64, at least 64):

    codes    int8    [Mp][Dp]   row after row, zeros in the padding
    numbers  float32 [5][Mp]    base, scale, residual, norm, slack (csrc/cpu/nearest_keys.h); padding: base +inf, else 0
    centre   float32 [Dp]

No header: nothing on a GPU can be checked without waiting for it, but the size.

One program takes ROWS rows and walks over them in steps of BLOCK dimensions, twice (cosine: three times, the first for
the length); the second time they come from the L1 cache. Bytes: keys once, M (Dp + 20) written. Operations: about 12 a
value, so it is bound by memory: M D 5 bytes at 4.3 TB/s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from memad_fast.kernels import interpreted

_KEY_ALIGNMENT = 128
_WIDTH_ALIGNMENT = 64
_NUMBERS = 5
# Rows that make the centre, spread over the keys: the mean of few is as good a shift as the mean of all.
_CENTRE_ROWS = 256

UNIT32 = 2.0**-24
UNIT64 = 2.0**-53
TINY = 2.0**-126
"""What a float32 operation that underflows errs by at most, also where it is flushed to zero."""
# As kernels see them.
UNIT32_ = tl.constexpr(UNIT32)
TINY_ = tl.constexpr(TINY)
LARGEST_NORM = tl.constexpr(2.0**60)
"""Squares and products of norms below it stay finite in float32."""
SMALLEST_CODED = tl.constexpr(2.0**-60)
"""Rows below it are all residual: their scale could underflow."""

# What becomes of a query.
NOT_FINITE = tl.constexpr(0)
SCREENED = tl.constexpr(1)
ALL_KEYS = tl.constexpr(2)


@dataclass(frozen=True)
class Errors:
    """Bounds that hold for all rows of D dimensions; the names are those of csrc/cpu/nearest_keys_rows.h."""

    square: float
    """Of a squared norm, float32, relative, whatever the order of summation."""
    exact: float
    """Of the float64 stage, relative."""
    element: float
    """Of a row, from elements that underflow."""
    underflow: float
    """Of a norm, from squares that underflow."""
    absolute: float
    """Of a score."""

    @classmethod
    def of(cls, dim: int) -> Errors:
        """For rows of ``dim`` dimensions."""
        return cls(
            square=1.01 * _rounding(dim + 16, UNIT32),
            exact=_rounding(dim / 8 + 16, UNIT64),
            element=math.sqrt(dim) * 4 * TINY,
            underflow=math.sqrt(dim * TINY) * 2,
            absolute=(4 * dim + 64) * TINY,
        )


def _rounding(count: float, unit: float) -> float:
    """gamma_n: the relative error of n roundings; infinite where it says nothing."""
    return count * unit / (1 - count * unit) if count * unit < 0.25 else math.inf


@dataclass(frozen=True)
class Layout:
    """Where the parts of packed keys are."""

    rows: int
    """Mp."""
    width: int
    """Dp."""

    @classmethod
    def of(cls, rows: int, dim: int) -> Layout:
        """For keys [rows, dim]."""
        return cls(_round_up(rows, _KEY_ALIGNMENT), max(_round_up(dim, _WIDTH_ALIGNMENT), _WIDTH_ALIGNMENT))

    @property
    def bytes(self) -> int:
        """The size of the whole."""
        return self.rows * (self.width + 4 * _NUMBERS) + 4 * self.width

    def parts(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, numbers and centre: views of the packed bytes."""
        codes, numbers, centre = packed.split([self.rows * self.width, 4 * _NUMBERS * self.rows, 4 * self.width])
        return codes.view(torch.int8), numbers.view(torch.float32), centre.view(torch.float32)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class Config:
    """How the rows of one program are walked over."""

    rows: int
    block: int
    num_warps: int

    @classmethod
    def of(cls, tensor: Tensor, width: int) -> Config:
        """4,096 values a step: two 16-byte loads a thread, few enough that all of them stay in registers."""
        block = min(triton.next_power_of_2(width), 1024)
        values = 1 << 16 if interpreted() else 4096
        return cls(values // block, block, 4)


@triton.jit
def round_up(x):
    """A float32 at or above a float64 within its range."""
    return (x + tl.abs(x) * 2.0**-23 + 2.0**-149).to(tl.float32)


@triton.jit
def staged(x, centre, unit, UNIT: tl.constexpr, CENTRED: tl.constexpr):
    """Values of rows as the screen sees them: scaled to length 1 for cosine, shifted by the centre, rounded once."""
    if UNIT:
        row = x.to(tl.float64) * unit[:, None]
        if CENTRED:
            row = row - centre[None, :].to(tl.float64)
        return row.to(tl.float32)
    row = x.to(tl.float32)
    if CENTRED:
        row = row - centre[None, :]
    return row


@triton.jit
def quantise_rows(
    row_pointers,  # [ROWS], to the first value of each row
    present,  # [ROWS], else a row of zeros
    centre_pointer,
    code_pointers,  # [ROWS], to where its codes go
    written,  # [ROWS], whether they do
    SQUARE_ERROR: tl.constexpr,
    UNDERFLOW: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    UNIT: tl.constexpr,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the codes of rows, zeros for one that no screen can hold.

    Returns per row: whether its values are finite; whether it is screened; the scale of its codes; the square of the
    staged row, an upper end of its norm and one of the norm of what the codes leave out; the factor to length 1.
    """
    columns = tl.arange(0, BLOCK)
    unit = tl.zeros([ROWS], tl.float64)
    if UNIT:
        sums = tl.zeros([ROWS, BLOCK], tl.float64)
        for start in range(0, D, BLOCK):
            inside = present[:, None] & (start + columns < D)[None, :]
            x = tl.load(row_pointers[:, None] + (start + columns)[None, :], mask=inside, other=0.0).to(tl.float64)
            sums += x * x
        row_square = tl.sum(sums, axis=1)
        unit = tl.where((row_square > 0.0) & (row_square < float("inf")), 1.0 / tl.sqrt(row_square), 0.0)

    largest = tl.zeros([ROWS, BLOCK], tl.float32)
    largest_given = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        inside = present[:, None] & (start + columns < D)[None, :]
        x = tl.load(row_pointers[:, None] + (start + columns)[None, :], mask=inside, other=0.0).to(tl.float32)
        centre = tl.load(centre_pointer + start + columns, mask=start + columns < D, other=0.0)
        row = tl.where(inside, staged(x, centre, unit, UNIT, CENTRED), 0.0)
        largest = tl.maximum(largest, tl.abs(row))
        # Infinity stands for a NaN too, which a maximum may ignore.
        largest_given = tl.maximum(largest_given, tl.where(tl.abs(x) < float("inf"), 0.0, float("inf")))
        squares += row * row
    finite = tl.max(largest_given, axis=1) == 0.0
    most = tl.max(largest, axis=1)
    square = tl.sum(squares, axis=1).to(tl.float64)
    norm = tl.sqrt(square) * (1.0 + SQUARE_ERROR) + UNDERFLOW
    screened = finite & (norm < LARGEST_NORM)

    coded = screened & (most >= SMALLEST_CODED)
    most = tl.where(coded, most, 1.0)
    scale = tl.where(coded, most / 127.0, 0.0)
    inverse = tl.where(coded, 127.0 / most, 0.0)
    lost = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, DP, BLOCK):
        inside = (present & screened)[:, None] & (start + columns < D)[None, :]
        x = tl.load(row_pointers[:, None] + (start + columns)[None, :], mask=inside, other=0.0).to(tl.float32)
        centre = tl.load(centre_pointer + start + columns, mask=start + columns < D, other=0.0)
        row = tl.where(inside, staged(x, centre, unit, UNIT, CENTRED), 0.0)
        # Any integer will do, the residual is that of the one which is taken; the nearest makes it small.
        code = tl.minimum(tl.maximum(tl.floor(row * inverse[:, None] + 0.5), -127.0), 127.0)
        rest = row - code * scale[:, None]
        lost += rest * rest
        here = written[:, None] & (start + columns < DP)[None, :]
        tl.store(code_pointers[:, None] + (start + columns)[None, :], code.to(tl.int32).to(tl.int8), mask=here)
    lost_square = tl.sum(lost, axis=1).to(tl.float64)
    residual = tl.sqrt(lost_square) * (1.0 + SQUARE_ERROR) + UNDERFLOW + 4.0 * UNIT32_ * norm
    return finite, screened, scale, square, norm, residual, unit


@triton.jit(do_not_specialize=["count", "key_count"])
def _pack(
    keys,
    row_stride,
    rows,  # which rows to pack; null for all of them and the padding
    count,
    key_count,
    codes,
    numbers,
    centre,
    centre_norm,  # only for ip
    padded,
    METRIC: tl.constexpr,
    SQUARE_ERROR: tl.constexpr,
    EXACT_ERROR: tl.constexpr,
    ELEMENT: tl.constexpr,
    UNDERFLOW: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    CHOSEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if CHOSEN:
        key = tl.load(rows + place, mask=place < count, other=-1)
        present = (key >= 0) & (key < key_count)
        written = present
    else:
        key = place
        present = key < key_count
        written = key < padded
    finite, screened, scale, square, norm, residual, _ = quantise_rows(
        keys + key * row_stride,
        present,
        centre,
        codes + key * DP,
        written,
        SQUARE_ERROR,
        UNDERFLOW,
        D,
        DP,
        METRIC == "cosine",
        True,
        ROWS,
        BLOCK,
    )
    slope = tl.zeros_like(norm) + ELEMENT
    slack = ABSOLUTE + norm * ELEMENT
    height = tl.zeros_like(norm)
    if METRIC == "l2":
        height = 0.5 * square
        slack += (32.0 * UNIT32_ + 2.0 * SQUARE_ERROR + 16.0 * EXACT_ERROR) * height
    elif METRIC == "ip":
        slope += 4.0 * EXACT_ERROR * (tl.load(centre_norm) + norm)
    else:
        slack += 16.0 * EXACT_ERROR
    # 32 u: the rounding of the two rows, and of the few float32 operations that make the score of the product.
    residual += slope + 32.0 * UNIT32_ * norm
    held = present & screened
    # What no screen can hold is never returned (not finite, padding) or left to the exact stage (a huge norm).
    instead = tl.where(present & finite, float("-inf"), float("inf"))
    numbers += key
    padded = padded.to(tl.int64)
    tl.store(numbers, tl.where(held, -round_up(slack - height), instead), mask=written)
    tl.store(numbers + padded, scale, mask=written)
    tl.store(numbers + 2 * padded, tl.where(held, round_up(residual * (1.0 + 32.0 * UNIT32_)), 0.0), mask=written)
    tl.store(
        numbers + 3 * padded, tl.where(held, round_up((norm + residual) * (1.0 + 32.0 * UNIT32_)), 0.0), mask=written
    )
    left_to_exact = tl.where(present & finite, float("inf"), 0.0)
    tl.store(numbers + 4 * padded, tl.where(held, round_up(slack), left_to_exact), mask=written)


def prepare_keys(keys: Tensor, metric: str) -> Tensor:
    """The op ``prepare_keys``."""
    layout = Layout.of(*keys.shape)
    packed = torch.empty(layout.bytes, dtype=torch.uint8, device=keys.device)
    centre = layout.parts(packed)[2]
    centre[keys.shape[1] :] = 0
    centre[: keys.shape[1]] = _mean(keys, metric)
    _launch(packed, keys, None, metric)
    return packed


def prepare_keys_rows_(packed: Tensor, keys: Tensor, rows: Tensor, metric: str) -> None:
    """The op ``prepare_keys_rows_``: packs these rows again, around the old centre; skips a row that is not there."""
    check_packed(packed, keys)
    if rows.shape[0]:
        _launch(packed, keys, rows.contiguous(), metric)


def check_packed(packed: Tensor, keys: Tensor) -> None:
    """The only thing that can be known of packed bytes without reading them."""
    expected = Layout.of(*keys.shape).bytes
    if packed.shape != (expected,) or packed.dtype != torch.uint8 or not packed.is_contiguous():
        raise ValueError(
            f"packed: expected the packed form of keys {list(keys.shape)} on this device, {expected} bytes, "
            f"got {packed.numel()} x {packed.dtype}"
        )


def with_unit_columns(rows: Tensor) -> Tensor:
    """The same rows, with the values of each next to each other, as the kernels read them."""
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def _mean(keys: Tensor, metric: str) -> Tensor:
    """Mean of a spread of rows that can be screened (scaled to length 1 for cosine), in float64; zeros if none can."""
    count = min(keys.shape[0], _CENTRE_ROWS)
    sample = keys[: keys.shape[0] // count * count : keys.shape[0] // count].double()
    square = sample.square().sum(dim=1, keepdim=True)
    usable = square.isfinite() if metric == "cosine" else square < LARGEST_NORM.value**2
    if metric == "cosine":
        sample = sample * torch.where(square > 0, square.rsqrt(), 0.0)
    return torch.where(usable, sample, 0.0).sum(dim=0) / usable.sum().clamp(min=1)


def _launch(packed: Tensor, keys: Tensor, rows: Tensor | None, metric: str) -> None:
    key_count, dim = keys.shape
    keys = with_unit_columns(keys)
    layout, error = Layout.of(key_count, dim), Errors.of(dim)
    codes, numbers, centre = layout.parts(packed)
    config = Config.of(keys, layout.width)
    count = layout.rows if rows is None else rows.shape[0]
    _pack[(triton.cdiv(count, config.rows),)](
        keys,
        keys.stride(0),
        rows,
        count,
        key_count,
        codes,
        numbers,
        centre,
        torch.linalg.vector_norm(centre, dtype=torch.float64) if metric == "ip" else None,
        layout.rows,
        metric,
        error.square,
        error.exact,
        error.element,
        error.underflow,
        error.absolute,
        D=dim,
        DP=layout.width,
        CHOSEN=rows is not None,
        ROWS=config.rows,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
