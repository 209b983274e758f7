"""Rows of an 8-bit cache: int8, or e4m3fn as uint8, with one float32 scale for each row.

Decoded and rounded with integers: e4m3fn then runs on sm_80 too, which has no conversion for it, a
rounding cannot be fused with the product before it, and the interpreter computes the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LEAST_SCALE: tl.constexpr = tl.constexpr(2.0**-126)


def as_bytes(values: Tensor) -> Tensor:
    """What a kernel is given for the values of a cache: e4m3fn as uint8."""
    return values.view(torch.uint8) if values.dtype == torch.float8_e4m3fn else values


@triton.jit
def dequantized(values, scale):
    """Values (int8 or uint8) times the scale of their row, in float32."""
    if values.dtype == tl.uint8:
        code = values.to(tl.int32)
        rest = code & 0x7F
        normal = (rest << 20) + (120 << 23)
        small = (2.0 * normal.to(tl.float32, bitcast=True) - 0.015625).to(tl.int32, bitcast=True)
        magnitude = tl.where(rest < 8, small, normal)
        magnitude = tl.where(rest == 0x7F, 0x7FC00000, magnitude)
        value = (magnitude | (code & 0x80) << 24).to(tl.float32, bitcast=True)
    else:
        value = values.to(tl.float32)
    return value * scale


@triton.jit
def quantized(rows, dtype: tl.constexpr):
    """(values, scale) of float32 rows (tokens, channels); 0 beyond the last channel."""
    largest = tl.max(rows.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    finite = largest < 0x7F800000  # NaN ranks above infinity
    unit: tl.constexpr = 1.0 / 127 if dtype == tl.int8 else 1.0 / 448
    scale = largest.to(tl.float32, bitcast=True) * unit
    usable = finite & (scale >= _LEAST_SCALE)
    inverse = tl.div_rn(1.0, tl.where(usable, scale, 1.0))
    scaled = tl.where(usable[:, None], rows * inverse[:, None], 0.0)
    scale = tl.where(usable, scale, tl.where(finite, 0.0, float("nan")))
    bits = scaled.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if dtype == tl.int8:
        whole = _nearest(magnitude, 150)
        values = tl.where(bits < 0, -whole, whole)
    else:
        normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1) - (120 << 23)) >> 20
        subnormal = _nearest(magnitude, 141)
        values = tl.where(magnitude < (121 << 23), subnormal, normal) | ((bits >> 24) & 0x80)
    return values.to(dtype), scale


@triton.jit
def _nearest(magnitude, EXPONENT: tl.constexpr):
    """A float32 >= 0, given by its bits, times 2**(150 - EXPONENT): to an integer, ties to even."""
    shift = tl.minimum(EXPONENT - (magnitude >> 23), 25)
    mantissa = (magnitude & 0x7FFFFF) | 0x800000
    half = (1 << (shift - 1)) - 1
    return (mantissa + half + ((mantissa >> shift) & 1)) >> shift
