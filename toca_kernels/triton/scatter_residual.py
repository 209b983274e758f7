"""scatter_residual: fresh rows into their caches, every gated cache into the residual, one pass.

Fused: scatter, gates and residual adds of up to four caches.  A program owns a tile of tokens and
channels; the row of each token comes from `fresh` where the inverse map says so (and goes into the
cache while it is in registers), else from the cache: masks instead of branches, no byte read twice.
A fresh row of an 8-bit cache needs its largest magnitude, so the tile is then one whole row.
Limited by memory bandwidth: one read of x and of each cache or its fresh row, one write of x and of
the fresh rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..features import ForecastCache
from . import configs
from ._eight_bit import as_bytes, dequantized, quantized
from ._launch import launch
from ._scatter import MAX_UPDATES, fresh_arguments, gated, tile_of_program
from .scatter_forecast import scatter_forecast

_NO_UPDATE: tuple[Any, ...] = (None,) * 8


@triton.jit
def _cached(cache_ptr, scale_ptr, at, row, valid, inside):
    """The cache's values at `at`, in float32; `row`: of each token."""
    value = tl.load(cache_ptr + at, mask=inside, other=0)
    if scale_ptr is None:
        value = value.to(tl.float32)
    else:
        value = dequantized(value, tl.load(scale_ptr + row, mask=valid, other=0.0)[:, None])
    return value


@triton.jit
def _add_update(
    total,
    gate_ptr,
    cache_ptr,
    scale_ptr,  # None: a cache in the dtype of x
    fresh_ptr,
    inverse_ptr,
    stride_gate_b,
    stride_gate_n,  # None: one gate serves all tokens of a sample
    k,
    b,
    token,
    valid,
    cols,
    N,
    C,
):
    """total + gate * cache of a tile, after its fresh rows went into the cache."""
    inside = valid[:, None] & (cols < C)[None, :]
    at = (b * N + token)[:, None] * C + cols[None, :]
    if fresh_ptr is None:
        value = _cached(cache_ptr, scale_ptr, at, b * N + token, valid, inside)
    else:
        slot = tl.load(inverse_ptr + b * N + token, mask=valid, other=-1).to(tl.int64)
        tl.device_assert((slot >= -1) & (slot < k), "inverse: expected values in [-1, k)")
        fresh_row = fresh_ptr + (b * k + slot)[:, None] * C + cols[None, :]
        is_fresh = slot >= 0
        moved, kept = inside & is_fresh[:, None], inside & (slot < 0)[:, None]
        fresh = tl.load(fresh_row, mask=moved, other=0.0)
        value = _cached(cache_ptr, scale_ptr, at, b * N + token, valid & (slot < 0), kept)
        value = tl.where(moved, fresh.to(tl.float32), value)
        if scale_ptr is None:
            tl.store(cache_ptr + at, fresh, mask=moved)
        else:
            values, scale = quantized(fresh.to(tl.float32), cache_ptr.dtype.element_ty)
            tl.store(cache_ptr + at, values, mask=moved)
            tl.store(scale_ptr + b * N + token, scale, mask=is_fresh)
    return total + gated(value, gate_ptr, stride_gate_b, stride_gate_n, b, token, cols, inside, C)


@triton.jit
def _scatter_residual_kernel(
    x_ptr,
    out_ptr,
    N,
    C,
    gate0_ptr,
    cache0_ptr,
    scale0_ptr,
    fresh0_ptr,
    inverse0_ptr,
    stride_gate0_b,
    stride_gate0_n,
    k0,
    gate1_ptr,
    cache1_ptr,
    scale1_ptr,
    fresh1_ptr,
    inverse1_ptr,
    stride_gate1_b,
    stride_gate1_n,
    k1,
    gate2_ptr,
    cache2_ptr,
    scale2_ptr,
    fresh2_ptr,
    inverse2_ptr,
    stride_gate2_b,
    stride_gate2_n,
    k2,
    gate3_ptr,
    cache3_ptr,
    scale3_ptr,
    fresh3_ptr,
    inverse3_ptr,
    stride_gate3_b,
    stride_gate3_n,
    k3,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, token, cols = tile_of_program(N, C, BLOCK_N, BLOCK_C)
    valid = token < N

    at = (b * N + token)[:, None] * C + cols[None, :]
    inside = valid[:, None] & (cols < C)[None, :]
    total = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total = _add_update(
        total, gate0_ptr, cache0_ptr, scale0_ptr, fresh0_ptr, inverse0_ptr,
        stride_gate0_b, stride_gate0_n, k0, b, token, valid, cols, N, C,
    )  # fmt: skip
    if cache1_ptr is not None:
        total = _add_update(
            total, gate1_ptr, cache1_ptr, scale1_ptr, fresh1_ptr, inverse1_ptr,
            stride_gate1_b, stride_gate1_n, k1, b, token, valid, cols, N, C,
        )  # fmt: skip
    if cache2_ptr is not None:
        total = _add_update(
            total, gate2_ptr, cache2_ptr, scale2_ptr, fresh2_ptr, inverse2_ptr,
            stride_gate2_b, stride_gate2_n, k2, b, token, valid, cols, N, C,
        )  # fmt: skip
    if cache3_ptr is not None:
        total = _add_update(
            total, gate3_ptr, cache3_ptr, scale3_ptr, fresh3_ptr, inverse3_ptr,
            stride_gate3_b, stride_gate3_n, k3, b, token, valid, cols, N, C,
        )  # fmt: skip
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def _update(
    gate: Tensor | None,
    cache: Tensor,
    scale: Tensor | None,
    fresh: Tensor | None,
    inverse: Tensor | None,
) -> tuple[Any, ...]:
    """The eight arguments of one update; None where there is nothing."""
    return gate, as_bytes(cache), scale, *fresh_arguments(gate, fresh, inverse)


def scatter_residual(
    x: Tensor,
    gates: Sequence[Tensor | None],
    caches: Sequence[Tensor],
    fresh: Sequence[Tensor | None],
    inverse: Sequence[Tensor | None],
    out: Tensor,
    scales: Sequence[Tensor | None] | None = None,
    forecasts: Sequence[ForecastCache | None] | None = None,
) -> None:
    B, N, C = x.shape
    if x.numel() == 0:
        return
    if forecasts is not None:  # a kernel of its own: its arguments would slow every launch down
        scatter_forecast(x, gates, caches, fresh, inverse, out, forecasts)
        return
    scales = scales or [None] * len(caches)
    rounds = any(
        scale is not None and rows is not None for scale, rows in zip(scales, fresh, strict=True)
    )
    tile = configs.scatter_residual(B * N)
    if rounds:
        tile = {"BLOCK_N": 1, **configs.gather_modulate(C)}
    updates = [
        _update(*update) for update in zip(gates, caches, scales, fresh, inverse, strict=True)
    ]
    updates += [_NO_UPDATE] * (MAX_UPDATES - len(updates))
    launch(
        _scatter_residual_kernel,
        B * triton.cdiv(N, tile["BLOCK_N"]) * triton.cdiv(C, tile["BLOCK_C"]),
        x,
        out,
        N,
        C,
        *(argument for update in updates for argument in update),
        **tile,
    )
