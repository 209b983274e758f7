"""store_rows: the rows of a full step into an 8-bit cache, or one that is extrapolated.

Fused: the largest magnitude of a row, its scale, rounding; or its differences and the copy.  One
program is one row, held in registers from its load to its store.  Limited by memory bandwidth: one
read, one write.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..features import ForecastCache
from . import configs
from ._eight_bit import as_bytes, quantized
from ._forecast import store_differences, two_slopes
from ._launch import launch


@triton.jit
def _store_rows_kernel(rows_ptr, values_ptr, scale_ptr, C, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)[None, :]
    inside = cols < C
    value = tl.load(rows_ptr + row * C + cols, mask=inside, other=0.0).to(tl.float32)
    values, scale = quantized(value, values_ptr.dtype.element_ty)
    tl.store(values_ptr + row * C + cols, values, mask=inside)
    tl.store(scale_ptr + row + tl.arange(0, 1), scale)


@triton.jit
def _store_forecast_kernel(
    rows_ptr,
    values_ptr,
    slope1_ptr,
    slope2_ptr,
    distance_ptr,
    C,
    COMPUTED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    inside = cols < C
    at = row * C + cols
    value = tl.load(rows_ptr + at, mask=inside, other=0.0)
    d = tl.load(distance_ptr + row)
    store_differences(
        value.to(tl.float32), values_ptr, slope1_ptr, slope2_ptr, d, at, inside, COMPUTED
    )
    tl.store(values_ptr + at, value, mask=inside)


def store_rows(
    values: Tensor, scale: Tensor | None, rows: Tensor, forecast: ForecastCache | None = None
) -> None:
    B, N, C = rows.shape
    if B * N == 0:
        return
    tile = configs.gather_modulate(C)  # one program for each row there, too
    if forecast is not None:
        _, slopes, distance, computed = forecast
        given = rows, values, *two_slopes(slopes), distance, C
        launch(_store_forecast_kernel, B * N, *given, COMPUTED=computed, **tile)
        return
    launch(_store_rows_kernel, B * N, rows, as_bytes(values), scale, C, **tile)
