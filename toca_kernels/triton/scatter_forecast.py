"""scatter_residual where a cache is extrapolated: one pass, as without.

Fused: scatter, differences of the fresh rows, extrapolation of the others, gates and residual adds
of up to four caches, extrapolated or plain.  A program owns a tile of tokens and channels.  Limited
by memory bandwidth: one read of x, of each cache and of its slopes, one write of x, and of the
fresh rows and their slopes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..features import ForecastCache
from . import configs
from ._forecast import extrapolated, store_differences, two_slopes
from ._launch import launch
from ._scatter import MAX_UPDATES, fresh_arguments, gated, tile_of_program

_NO_UPDATE: tuple[Any, ...] = (*(None,) * 10, 0)


@triton.jit
def _cached(
    cache_ptr, slope1_ptr, slope2_ptr, distance_ptr, COMPUTED: tl.constexpr, at, row, inside
):
    """What the cache stands for at `at`, in float32; `row`: of each token."""
    value = tl.load(cache_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if distance_ptr is not None and COMPUTED > 1:
        d = tl.load(distance_ptr + row)[:, None]
        if COMPUTED == 2:
            value = extrapolated(value, slope1_ptr, None, d, at, inside)
        else:
            value = extrapolated(value, slope1_ptr, slope2_ptr, d, at, inside)
    return value


@triton.jit
def _add_update(
    total,
    gate_ptr,
    cache_ptr,
    fresh_ptr,
    inverse_ptr,
    stride_gate_b,
    stride_gate_n,  # None: one gate serves all tokens of a sample
    k,
    slope1_ptr,
    slope2_ptr,
    distance_ptr,  # None: a cache that is not extrapolated
    COMPUTED: tl.constexpr,
    b,
    token,
    valid,
    cols,
    N,
    C,
):
    """total + gate * cache of a tile, after its fresh rows went into the cache."""
    inside = valid[:, None] & (cols < C)[None, :]
    row = b * N + tl.where(valid, token, 0)
    at = (b * N + token)[:, None] * C + cols[None, :]
    if fresh_ptr is None:
        value = _cached(cache_ptr, slope1_ptr, slope2_ptr, distance_ptr, COMPUTED, at, row, inside)
    else:
        slot = tl.load(inverse_ptr + b * N + token, mask=valid, other=-1).to(tl.int64)
        tl.device_assert((slot >= -1) & (slot < k), "inverse: expected values in [-1, k)")
        fresh_row = fresh_ptr + (b * k + slot)[:, None] * C + cols[None, :]
        moved, kept = inside & (slot >= 0)[:, None], inside & (slot < 0)[:, None]
        fresh = tl.load(fresh_row, mask=moved, other=0.0)
        value = _cached(cache_ptr, slope1_ptr, slope2_ptr, distance_ptr, COMPUTED, at, row, kept)
        value = tl.where(moved, fresh.to(tl.float32), value)
        if distance_ptr is not None:
            d = tl.load(distance_ptr + row)[:, None]
            store_differences(
                fresh.to(tl.float32), cache_ptr, slope1_ptr, slope2_ptr, d, at, moved, COMPUTED
            )
        tl.store(cache_ptr + at, fresh, mask=moved)
    return total + gated(value, gate_ptr, stride_gate_b, stride_gate_n, b, token, cols, inside, C)


@triton.jit
def _scatter_forecast_kernel(
    x_ptr,
    out_ptr,
    N,
    C,
    gate0_ptr,
    cache0_ptr,
    fresh0_ptr,
    inverse0_ptr,
    stride_gate0_b,
    stride_gate0_n,
    k0,
    slope1_0_ptr,
    slope2_0_ptr,
    distance0_ptr,
    COMPUTED0: tl.constexpr,
    gate1_ptr,
    cache1_ptr,
    fresh1_ptr,
    inverse1_ptr,
    stride_gate1_b,
    stride_gate1_n,
    k1,
    slope1_1_ptr,
    slope2_1_ptr,
    distance1_ptr,
    COMPUTED1: tl.constexpr,
    gate2_ptr,
    cache2_ptr,
    fresh2_ptr,
    inverse2_ptr,
    stride_gate2_b,
    stride_gate2_n,
    k2,
    slope1_2_ptr,
    slope2_2_ptr,
    distance2_ptr,
    COMPUTED2: tl.constexpr,
    gate3_ptr,
    cache3_ptr,
    fresh3_ptr,
    inverse3_ptr,
    stride_gate3_b,
    stride_gate3_n,
    k3,
    slope1_3_ptr,
    slope2_3_ptr,
    distance3_ptr,
    COMPUTED3: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, token, cols = tile_of_program(N, C, BLOCK_N, BLOCK_C)
    valid = token < N

    at = (b * N + token)[:, None] * C + cols[None, :]
    inside = valid[:, None] & (cols < C)[None, :]
    total = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total = _add_update(
        total, gate0_ptr, cache0_ptr, fresh0_ptr, inverse0_ptr,
        stride_gate0_b, stride_gate0_n, k0, slope1_0_ptr, slope2_0_ptr, distance0_ptr,
        COMPUTED0, b, token, valid, cols, N, C,
    )  # fmt: skip
    if cache1_ptr is not None:
        total = _add_update(
            total, gate1_ptr, cache1_ptr, fresh1_ptr, inverse1_ptr,
            stride_gate1_b, stride_gate1_n, k1, slope1_1_ptr, slope2_1_ptr, distance1_ptr,
            COMPUTED1, b, token, valid, cols, N, C,
        )  # fmt: skip
    if cache2_ptr is not None:
        total = _add_update(
            total, gate2_ptr, cache2_ptr, fresh2_ptr, inverse2_ptr,
            stride_gate2_b, stride_gate2_n, k2, slope1_2_ptr, slope2_2_ptr, distance2_ptr,
            COMPUTED2, b, token, valid, cols, N, C,
        )  # fmt: skip
    if cache3_ptr is not None:
        total = _add_update(
            total, gate3_ptr, cache3_ptr, fresh3_ptr, inverse3_ptr,
            stride_gate3_b, stride_gate3_n, k3, slope1_3_ptr, slope2_3_ptr, distance3_ptr,
            COMPUTED3, b, token, valid, cols, N, C,
        )  # fmt: skip
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def _update(
    gate: Tensor | None,
    cache: Tensor,
    forecast: ForecastCache | None,
    fresh: Tensor | None,
    inverse: Tensor | None,
) -> tuple[Any, ...]:
    """The eleven arguments of one update; None where there is nothing."""
    given = gate, cache, *fresh_arguments(gate, fresh, inverse)
    if forecast is None:
        return *given, None, None, None, 0
    _, slopes, distance, computed = forecast
    return *given, *two_slopes(slopes), distance, computed


def scatter_forecast(
    x: Tensor,
    gates: Sequence[Tensor | None],
    caches: Sequence[Tensor],
    fresh: Sequence[Tensor | None],
    inverse: Sequence[Tensor | None],
    out: Tensor,
    forecasts: Sequence[ForecastCache | None],
) -> None:
    B, N, C = x.shape
    tile = configs.scatter_residual(B * N)
    updates = [
        _update(*update) for update in zip(gates, caches, forecasts, fresh, inverse, strict=True)
    ]
    updates += [_NO_UPDATE] * (MAX_UPDATES - len(updates))
    launch(
        _scatter_forecast_kernel,
        B * triton.cdiv(N, tile["BLOCK_N"]) * triton.cdiv(C, tile["BLOCK_C"]),
        x,
        out,
        N,
        C,
        *(argument for update in updates for argument in update),
        **tile,
    )
