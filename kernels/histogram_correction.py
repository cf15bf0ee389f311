"""Histogram error estimation (PMB, section III-C, eq. 6): mu = the mean of the ``count`` smallest values of an image,
corrected = max(error - mu, 0), score = sum of corrected.

The count-th smallest value t is found digit by digit, by counting, without a sort. The bits of a float, ordered so
that they compare like the values, are four digits of eight bits (two for float16 and bfloat16):

    digits found      |0x3f|0xa1|  ? |  ? |
    _count   each part of an image counts, in 256 bins, the next digit of its values that begin with the digits found
    _pick    adds up the bins of an image's parts; the bin that holds the rank is the next digit
    ...      the last _count also sums, in float64, what lies below the first three digits; the last bins tell the rest
    _mean    mu = (sum of values < t + remaining * t) / count
    _correct, _total    the result, and its sum in float64

Only integers are counted, and sums have one order that depends on the size of an image alone: results are the same for
any batch. Images of any size are cut into parts of 16,384 pixels, a program each.

Bytes of device memory a pixel of float32: 16 for the four digits, 8 for the result: 24, where the formula needs 8
(for 16-bit values: 4 + 4 = 8, where it needs 4). README_histogram_correction.md counts and predicts. On NVIDIA GPUs the
CUDA C++ kernel reads an image once; this one is for where it is not compiled, and for AMD.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Pixels of a program. A part's bins (1 KiB, written and read once a digit) are a sixteenth of its pixels in float32,
# and one image of 2,048 x 2,048 still makes 256 programs.
_PART = 16384
_BLOCK = 2048  # pixels at a time: with four warps, 16 a lane
_BINS = 256  # tl.histogram takes a population count for 32 bins and 32 values: more bins cost as many times more
_PARTS_AT_ONCE = 16  # whose bins are added up at a time
_SUMS = 256  # parts whose sums are added at a time


# --- floats as ordered integers -------------------------------------------------------------------------------------


@triton.jit
def _ordered(values):
    """Unsigned integers that compare like the values and are equal where these are; 16 bits are the upper ones."""
    if values.dtype.primitive_bitwidth == 16:
        bits = values.to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        bits = values.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -0x80000000, 0, bits)  # -0 is +0
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def _value(ordered, dtype: tl.constexpr):
    """The float32 value, of type ``dtype``, that ``_ordered`` made it from."""
    bits = ordered.to(tl.uint32).to(tl.int32, bitcast=True)
    bits = bits ^ tl.where(bits < 0, -0x80000000, -1)
    if dtype.primitive_bitwidth == 16:
        return (bits >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    else:
        return bits.to(tl.float32, bitcast=True)


# --- the value of a rank --------------------------------------------------------------------------------------------


@triton.jit
def _part(parts, PART: tl.constexpr):
    """This program's image and the first of its PART pixels."""
    return (tl.program_id(0) // parts).to(tl.int64), (tl.program_id(0) % parts).to(tl.int64) * PART


@triton.jit(do_not_specialize=["parts"])
def _count_kernel(
    error, found, bins, nans, below, image_stride, pixels, parts, SHIFT: tl.constexpr, LAST: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr
):  # fmt: skip
    """bins[image, part] = how many values with the digits found so far have each next digit, the one at SHIFT.

    The first call counts NaN, too, and the last one sums what lies below the digits found.
    """
    image, first = _part(parts, PART)
    start = error + image * image_stride
    counts = tl.zeros([BINS], tl.int32)
    nan = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(first, tl.minimum(first + PART, pixels), BLOCK):
        at = begin + tl.arange(0, BLOCK)
        counted = at < pixels
        values = tl.load(start + at, mask=counted, other=0.0)
        ordered = _ordered(values)
        if SHIFT == 24:
            nan += tl.where(values != values, 1, 0)
        else:
            digits = tl.load(found + image).to(tl.uint32)
            if LAST:
                is_below = counted & ((ordered >> (SHIFT + 8)) < digits)
                total += tl.where(is_below, values.to(tl.float32), 0.0).to(tl.float64)
            counted &= (ordered >> (SHIFT + 8)) == digits
        counts += tl.histogram(((ordered >> SHIFT) & (BINS - 1)).to(tl.int32), BINS, mask=counted)
    tl.store(bins + tl.program_id(0).to(tl.int64) * BINS + tl.arange(0, BINS), counts)
    if SHIFT == 24:
        tl.store(nans + tl.program_id(0), tl.sum(nan))
    if LAST:
        tl.store(below + tl.program_id(0), tl.sum(total))


@triton.jit
def _image_bins(bins, image, parts, AT_ONCE: tl.constexpr, BINS: tl.constexpr):
    """The bins of all parts of an image, added up."""
    counts = tl.zeros([BINS], tl.int64)
    for first in range(0, parts, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)[:, None]
        at = (image * parts + part) * BINS + tl.arange(0, BINS)[None, :]
        counts += tl.sum(tl.load(bins + at, mask=part < parts, other=0).to(tl.int64), axis=0)
    return counts


@triton.jit
def _next_digit(counts, rank):
    """The digit of the value of a rank, and how many values have a lower one."""
    is_lower = tl.cumsum(counts, 0) <= rank
    return tl.sum(is_lower.to(tl.int64)), tl.sum(tl.where(is_lower, counts, 0))


@triton.jit(do_not_specialize=["parts", "rank"])
def _pick_kernel(
    bins, found, ranks, parts, rank, SHIFT: tl.constexpr, AT_ONCE: tl.constexpr, BINS: tl.constexpr
):  # fmt: skip
    """found = the digits found so far and the next; ranks = the rank among the values that begin so."""
    image = tl.program_id(0).to(tl.int64)
    digits = image * 0
    if SHIFT < 24:
        digits = tl.load(found + image)
        rank = tl.load(ranks + image)
    digit, lower = _next_digit(_image_bins(bins, image, parts, AT_ONCE, BINS), rank)
    tl.store(found + image, digits * BINS + digit)
    tl.store(ranks + image, rank - lower)


@triton.jit(do_not_specialize=["parts"])
def _threshold_kernel(
    error, bins, found, ranks, nans, below, thresholds, sums, ties, parts, SHIFT: tl.constexpr, AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr, BINS: tl.constexpr
):  # fmt: skip
    """The last digit: thresholds = the value t of the rank; sums = the sum of all values < t, NaN if the image has one.

    ties[image] = how many values equal t, and how many of those have a rank up to the one that was asked for.
    """
    image = tl.program_id(0).to(tl.int64)
    counts = _image_bins(bins, image, parts, AT_ONCE, BINS)
    bin_ = tl.arange(0, BINS)
    digits = tl.load(found + image) * BINS
    rank = tl.load(ranks + image)
    digit, lower = _next_digit(counts, rank)
    dtype: tl.constexpr = error.dtype.element_ty
    values = _value((digits + bin_) << SHIFT, dtype).to(tl.float64)
    total = tl.sum(tl.where((bin_ < digit) & (counts > 0), counts.to(tl.float64) * values, 0.0))
    partial = tl.zeros([BLOCK], tl.float64)
    nan = tl.zeros([BLOCK], tl.int32)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        partial += tl.load(below + image * parts + part, mask=part < parts, other=0.0)
        nan += tl.load(nans + image * parts + part, mask=part < parts, other=0)
    total = tl.where(tl.max(nan) > 0, float("nan"), total + tl.sum(partial))
    tl.store(thresholds + image, _value((digits + digit) << SHIFT, dtype))
    tl.store(sums + image, total)
    tl.store(ties + 2 * image, tl.sum(tl.where(bin_ == digit, counts, 0)))
    tl.store(ties + 2 * image + 1, rank - lower + 1)


# --- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _mean_of_smallest(image, thresholds, sums, ties, count):
    """mu: 0 of nothing; NaN if the image has a NaN."""
    total = tl.load(sums + image)
    tied = tl.load(ties + 2 * image + 1).to(tl.float64) * tl.load(thresholds + image).to(tl.float64)
    mean = tl.where(count > 0, (total + tied) / tl.maximum(count, 1).to(tl.float64), 0.0)
    return tl.where(total == total, mean, total).to(tl.float32)


@triton.jit(do_not_specialize=["parts", "count"])
def _correct_kernel(
    error, thresholds, sums, ties, corrected, mu, partial, image_stride, pixels, parts, count, PART: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    """corrected = max(error - mu, 0); partial[image, part] = the sum of what was stored."""
    image, first = _part(parts, PART)
    mean = _mean_of_smallest(image, thresholds, sums, ties, count)
    tl.store(mu + image, mean, mask=first == 0)
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(first, tl.minimum(first + PART, pixels), BLOCK):
        at = begin + tl.arange(0, BLOCK)
        excess = tl.load(error + image * image_stride + at, mask=at < pixels, other=0.0).to(tl.float32) - mean
        stored = tl.where(excess < 0.0, 0.0, excess).to(corrected.dtype.element_ty)  # NaN stays
        tl.store(corrected + image * pixels + at, stored, mask=at < pixels)
        total += tl.where(at < pixels, stored.to(tl.float32), 0.0).to(tl.float64)
    tl.store(partial + tl.program_id(0), tl.sum(total))


@triton.jit
def _total(partial, image, parts, BLOCK: tl.constexpr):
    """The sum of an image's parts."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        total += tl.load(partial + image * parts + part, mask=part < parts, other=0.0)
    return tl.sum(total)


@triton.jit(do_not_specialize=["parts"])
def _score_kernel(partial, score, parts, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    tl.store(score + image, _total(partial, image, parts, BLOCK).to(tl.float32))


# --- backward -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["parts"])
def _above_kernel(
    grad_corrected, grad_score, error, mu, partial, grad_strides, image_stride, pixels, parts, PART: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    """partial[image, part] = the gradients of corrected and score, summed over the pixels above mu."""
    image, first = _part(parts, PART)
    mean = tl.load(mu + image)
    total = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int32)
    for begin in range(first, tl.minimum(first + PART, pixels), BLOCK):
        at = begin + tl.arange(0, BLOCK)
        values = tl.load(error + image * image_stride + at, mask=at < pixels, other=0.0).to(tl.float32)
        is_above = (at < pixels) & (values > mean)
        grad = tl.load(grad_corrected + image * grad_strides[0] + at * grad_strides[1], mask=is_above, other=0.0)
        total += grad.to(tl.float64)
        count += is_above.to(tl.int32)
    above = tl.sum(count)
    score = tl.where(above > 0, above.to(tl.float64) * tl.load(grad_score + image).to(tl.float64), 0.0)
    tl.store(partial + tl.program_id(0), tl.sum(total) + score)


@triton.jit(do_not_specialize=["parts", "count"])
def _gradient_kernel(
    grad_corrected, grad_mu, grad_score, error, mu, thresholds, sums, ties, partial, grad_error, grad_strides,
    image_stride, pixels, parts, count, PART: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The gradient of a pixel: of corrected and score where it lies above mu, of mu where it is one of the smallest.

    Values equal to the threshold share what those among them have that are of the smallest.
    """
    image, first = _part(parts, PART)
    mean, threshold = tl.load(mu + image), tl.load(thresholds + image)
    score = tl.load(grad_score + image)
    has_nan = tl.load(sums + image) != tl.load(sums + image)
    through_mu = tl.load(grad_mu + image).to(tl.float64) - _total(partial, image, parts, BLOCK)
    share = tl.where(count > 0, through_mu / tl.maximum(count, 1).to(tl.float64), 0.0)
    tied, selected = tl.load(ties + 2 * image), tl.load(ties + 2 * image + 1)
    tie_share = (share * selected.to(tl.float64) / tied.to(tl.float64)).to(tl.float32)
    share = share.to(tl.float32)
    for begin in range(first, tl.minimum(first + PART, pixels), BLOCK):
        at = begin + tl.arange(0, BLOCK)
        values = tl.load(error + image * image_stride + at, mask=at < pixels, other=0.0).to(tl.float32)
        is_above = (at < pixels) & (values > mean)
        grad = tl.load(grad_corrected + image * grad_strides[0] + at * grad_strides[1], mask=is_above, other=0.0)
        direct = tl.where(is_above, grad.to(tl.float32) + score, 0.0)
        through = tl.where(values < threshold, share, tl.where(values == threshold, tie_share, 0.0))
        result = tl.where(has_nan, float("nan"), direct + through)
        tl.store(grad_error + image * pixels + at, result.to(grad_error.dtype.element_ty), mask=at < pixels)


# --- launches -------------------------------------------------------------------------------------------------------


class _Images:
    """A batch of images as rows, and the ``count``-th smallest value of each with what lies below it."""

    def __init__(self, error: Tensor, fraction: float) -> None:
        rows = _rows(error)
        self.error = rows if rows.stride(1) == 1 else rows.contiguous()
        self.images, self.pixels = self.error.shape
        self.count = math.floor(fraction * self.pixels)
        self.parts = triton.cdiv(self.pixels, _PART)

    def by_part(self, dtype: torch.dtype, *more: int) -> Tensor:
        """An uninitialised value, or ``more`` of them, for each part of each image."""
        return self.error.new_empty(self.images, self.parts, *more, dtype=dtype)

    def by_image(self, dtype: torch.dtype, *more: int) -> Tensor:
        """The same for each image."""
        return self.error.new_empty(self.images, *more, dtype=dtype)

    @property
    def grid(self) -> tuple[int]:
        """A program for each part."""
        return (self.images * self.parts,)

    def select(self) -> tuple[Tensor, Tensor, Tensor]:
        """Thresholds, sums of what lies below, and ties: see ``_threshold_kernel``. For images of a pixel or more."""
        bins, nans = self.by_part(torch.int32, _BINS), self.by_part(torch.int32)
        below = self.by_part(torch.float64)
        found, ranks = self.by_image(torch.int64), self.by_image(torch.int64)
        last = 32 - 8 * self.error.element_size()
        for shift in range(24, last - 1, -8):
            _count_kernel[self.grid](
                self.error, found, bins, nans, below, self.error.stride(0), self.pixels, self.parts,
                SHIFT=shift, LAST=shift == last, PART=_PART, BLOCK=_BLOCK, BINS=_BINS
            )  # fmt: skip
            if shift > last:
                _pick_kernel[(self.images,)](
                    bins, found, ranks, self.parts, max(self.count - 1, 0),
                    SHIFT=shift, AT_ONCE=_PARTS_AT_ONCE, BINS=_BINS
                )  # fmt: skip
        thresholds, sums = self.by_image(torch.float32), self.by_image(torch.float64)
        ties = self.by_image(torch.int64, 2)
        _threshold_kernel[(self.images,)](
            self.error, bins, found, ranks, nans, below, thresholds, sums, ties, self.parts,
            SHIFT=last, AT_ONCE=_PARTS_AT_ONCE, BLOCK=_SUMS, BINS=_BINS
        )  # fmt: skip
        return thresholds, sums, ties


def _rows(images: Tensor) -> Tensor:
    """[B, ...] as [B, pixels]: in place where the strides allow it."""
    return images.flatten(1) if images.dim() > 1 else images[:, None]


def histogram_correction(error: Tensor, fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    """Serves ``memad_fast::histogram_correction``."""
    images = _Images(error, fraction)
    corrected = torch.empty_like(error, memory_format=torch.contiguous_format)
    if images.pixels == 0:
        nothing = error.new_zeros(images.images, dtype=torch.float32)
        return corrected, nothing, nothing.clone()
    mu, score = images.by_image(torch.float32), images.by_image(torch.float32)
    if images.images == 0:
        return corrected, mu, score
    partial = images.by_part(torch.float64)
    _correct_kernel[images.grid](
        images.error, *images.select(), corrected, mu, partial, images.error.stride(0), images.pixels, images.parts,
        images.count, PART=_PART, BLOCK=_BLOCK
    )  # fmt: skip
    _score_kernel[(images.images,)](partial, score, images.parts, BLOCK=_SUMS)
    return corrected, mu, score


def histogram_correction_backward(
    grad_corrected: Tensor, grad_mu: Tensor, grad_score: Tensor, error: Tensor, mu: Tensor, fraction: float
) -> Tensor:
    """Serves ``memad_fast::histogram_correction_backward``."""
    images = _Images(error, fraction)
    grad_error = torch.empty_like(error, memory_format=torch.contiguous_format)
    if grad_error.numel() == 0:
        return grad_error
    grad, grad_mu, grad_score = _rows(grad_corrected), grad_mu.contiguous(), grad_score.contiguous()
    partial = images.by_part(torch.float64)
    mu = mu.contiguous()
    _above_kernel[images.grid](
        grad, grad_score, images.error, mu, partial, grad.stride(), images.error.stride(0), images.pixels, images.parts,
        PART=_PART, BLOCK=_BLOCK
    )  # fmt: skip
    _gradient_kernel[images.grid](
        grad, grad_mu, grad_score, images.error, mu, *images.select(), partial, grad_error, grad.stride(),
        images.error.stride(0), images.pixels, images.parts, images.count, PART=_PART, BLOCK=_BLOCK
    )  # fmt: skip
    return grad_error
