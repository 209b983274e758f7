"""scatter_residual: fresh rows into their caches, every gated cache into the residual, one pass.

Fused: scatter, gates and residual adds of up to four caches.  A program owns a tile of tokens and
channels; the row of each token comes from `fresh` where the inverse map says so (and goes into the
cache while it is in registers), else from the cache: masks instead of branches, no byte read twice.
Limited by memory bandwidth: one read of x and of each cache or its fresh row, one write of x and of
the fresh rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._launch import launch, row_strides

_MAX_UPDATES = 4
_NO_UPDATE: tuple[Any, ...] = (None,) * 7


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
        value = tl.load(cache_ptr + at, mask=inside, other=0.0)
    else:
        slot = tl.load(inverse_ptr + b * N + token, mask=valid, other=-1).to(tl.int64)
        tl.device_assert((slot >= -1) & (slot < k), "inverse: expected values in [-1, k)")
        fresh_row = fresh_ptr + (b * k + slot)[:, None] * C + cols[None, :]
        moved = inside & (slot >= 0)[:, None]
        kept = inside & (slot < 0)[:, None]
        fresh = tl.load(fresh_row, mask=moved, other=0.0)
        value = tl.where(moved, fresh, tl.load(cache_ptr + at, mask=kept, other=0.0))
        tl.store(cache_ptr + at, fresh, mask=moved)
    value = value.to(tl.float32)
    if gate_ptr is not None:
        gate_ptr += b * stride_gate_b
        if stride_gate_n is None:
            gate = tl.load(gate_ptr + cols, mask=cols < C, other=0.0)[None, :]
        else:
            gate_row = gate_ptr + token[:, None] * stride_gate_n + cols[None, :]
            gate = tl.load(gate_row, mask=inside, other=0.0)
        value *= gate.to(tl.float32)
    return total + value


@triton.jit
def _scatter_residual_kernel(
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
    gate1_ptr,
    cache1_ptr,
    fresh1_ptr,
    inverse1_ptr,
    stride_gate1_b,
    stride_gate1_n,
    k1,
    gate2_ptr,
    cache2_ptr,
    fresh2_ptr,
    inverse2_ptr,
    stride_gate2_b,
    stride_gate2_n,
    k2,
    gate3_ptr,
    cache3_ptr,
    fresh3_ptr,
    inverse3_ptr,
    stride_gate3_b,
    stride_gate3_n,
    k3,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    channel_tiles = tl.cdiv(C, BLOCK_C)
    token_tiles = tl.cdiv(N, BLOCK_N)
    b = program // (token_tiles * channel_tiles)
    token = (program // channel_tiles) % token_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (program % channel_tiles).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = token < N

    at = (b * N + token)[:, None] * C + cols[None, :]
    inside = valid[:, None] & (cols < C)[None, :]
    total = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total = _add_update(
        total, gate0_ptr, cache0_ptr, fresh0_ptr, inverse0_ptr,
        stride_gate0_b, stride_gate0_n, k0, b, token, valid, cols, N, C,
    )  # fmt: skip
    if cache1_ptr is not None:
        total = _add_update(
            total, gate1_ptr, cache1_ptr, fresh1_ptr, inverse1_ptr,
            stride_gate1_b, stride_gate1_n, k1, b, token, valid, cols, N, C,
        )  # fmt: skip
    if cache2_ptr is not None:
        total = _add_update(
            total, gate2_ptr, cache2_ptr, fresh2_ptr, inverse2_ptr,
            stride_gate2_b, stride_gate2_n, k2, b, token, valid, cols, N, C,
        )  # fmt: skip
    if cache3_ptr is not None:
        total = _add_update(
            total, gate3_ptr, cache3_ptr, fresh3_ptr, inverse3_ptr,
            stride_gate3_b, stride_gate3_n, k3, b, token, valid, cols, N, C,
        )  # fmt: skip
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def _update(
    gate: Tensor | None, cache: Tensor, fresh: Tensor | None, inverse: Tensor | None
) -> tuple[Any, ...]:
    """The seven arguments of one update; None where there is nothing."""
    stride_b, stride_n = (None, None) if gate is None else row_strides(gate)
    per_token = gate is not None and gate.ndim == 3
    if fresh is None or fresh.shape[1] == 0:
        fresh, inverse, k = None, None, None
    else:
        k = fresh.shape[1]
    return gate, cache, fresh, inverse, stride_b, stride_n if per_token else None, k


def scatter_residual(
    x: Tensor,
    gates: Sequence[Tensor | None],
    caches: Sequence[Tensor],
    fresh: Sequence[Tensor | None],
    inverse: Sequence[Tensor | None],
    out: Tensor,
) -> None:
    B, N, C = x.shape
    if x.numel() == 0:
        return
    tile = configs.scatter_residual(B * N)
    updates = [_update(*update) for update in zip(gates, caches, fresh, inverse, strict=True)]
    updates += [_NO_UPDATE] * (_MAX_UPDATES - len(updates))
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
