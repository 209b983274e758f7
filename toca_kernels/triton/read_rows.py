"""read_rows: what a cache stands for, in the features' dtype.

Fused: gather, scale or extrapolation, rounding.  One program is one row.  Limited by memory
bandwidth: one read of the rows (and of their slopes), one write.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._eight_bit import as_bytes, dequantized
from ._forecast import extrapolated, two_slopes
from ._launch import launch


@triton.jit
def _read_rows_kernel(
    values_ptr,
    index_ptr,
    scale_ptr,
    slope1_ptr,
    slope2_ptr,
    distance_ptr,
    out_ptr,
    N,
    k,
    C,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b = row // k
    n = row - b * k
    if index_ptr is not None:
        n = tl.load(index_ptr + row)
        tl.device_assert((n >= 0) & (n < N), "index: expected values in [0, N)")
    token = b * N + n
    cols = tl.arange(0, BLOCK_C)
    inside = cols < C
    at = token * C + cols
    value = tl.load(values_ptr + at, mask=inside, other=0)
    if scale_ptr is not None:
        value = dequantized(value, tl.load(scale_ptr + token))
    if distance_ptr is not None:
        d = tl.load(distance_ptr + token)
        value = extrapolated(value.to(tl.float32), slope1_ptr, slope2_ptr, d, at, inside)
    tl.store(out_ptr + row * C + cols, value.to(out_ptr.dtype.element_ty), mask=inside)


def read_rows(
    values: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    slopes: Sequence[Tensor],
    distance: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    B, N, C = values.shape
    k = N if index is None else index.shape[1]
    out = torch.empty((B, k, C), dtype=dtype, device=values.device)
    if out.numel() == 0:
        return out
    launch(
        _read_rows_kernel,
        B * k,
        as_bytes(values),
        index,
        scale,
        *two_slopes(slopes),
        distance,
        out,
        N,
        k,
        C,
        **configs.gather_modulate(C),
    )
    return out
