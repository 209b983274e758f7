"""Rows of a cache that is extrapolated to the step that reads it, from its finite differences."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor


def two_slopes(slopes: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """What a kernel is given for them: None where there is no such slope."""
    first, second, *_ = (*slopes, None, None)
    return first, second


@triton.jit
def extrapolated(value, slope1_ptr, slope2_ptr, d, at, mask):
    """value + d * slope1 + d**2 / 2 * slope2 in float32; None where there is no such slope."""
    if slope1_ptr is not None:
        value += d * tl.load(slope1_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if slope2_ptr is not None:
        half = 0.5 * d * d
        value += half * tl.load(slope2_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def store_differences(
    fresh, values_ptr, slope1_ptr, slope2_ptr, d, at, mask, COMPUTED: tl.constexpr
):
    """The slopes of rows that were computed anew, before they go into the cache themselves.

    `fresh` in float32; COMPUTED: how often all tokens were computed before, at most 3.
    """
    dtype: tl.constexpr = slope1_ptr.dtype.element_ty
    slope1 = tl.zeros_like(fresh)
    slope2 = tl.zeros_like(fresh)
    if COMPUTED > 0:
        before = tl.load(values_ptr + at, mask=mask, other=0.0).to(tl.float32)
        slope1 = tl.div_rn(fresh - before, d)
    if COMPUTED > 1 and slope2_ptr is not None:
        before = tl.load(slope1_ptr + at, mask=mask, other=0.0).to(tl.float32)
        slope2 = tl.div_rn(slope1 - before, d)
    # What one thread loaded, another may be about to overwrite.
    tl.debug_barrier()
    tl.store(slope1_ptr + at, slope1.to(dtype), mask=mask)
    if slope2_ptr is not None:
        tl.store(slope2_ptr + at, slope2.to(dtype), mask=mask)
