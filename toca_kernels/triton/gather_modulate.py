"""gather_modulate: residual + LayerNorm/RMSNorm + modulation of the selected rows.

Fused: gather, x + gate * cache (which may be held in 8 bits, or extrapolated), mean and variance,
affine, modulation; one read of the k rows, one write.  One program is one row, held in registers
from its load to its store.  Limited by latency for the few rows of a cached step, by memory
bandwidth for all tokens.
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
from ._launch import launch, row_strides


@triton.jit
def _gather_modulate_kernel(
    x_ptr,
    index_ptr,
    shift_ptr,
    scale_ptr,
    gate_ptr,
    cache_ptr,
    cache_scale_ptr,
    slope1_ptr,
    slope2_ptr,
    distance_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    N,
    k,
    C,
    stride_shift_b,
    stride_shift_n,
    stride_scale_b,
    stride_scale_n,
    stride_gate_b,
    stride_gate_n,
    eps,
    RMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b = row // k
    n = row - b * k
    if index_ptr is not None:
        n = tl.load(index_ptr + row)
        tl.device_assert((n >= 0) & (n < N), "index: expected values in [0, N)")
    at = (b * N + n) * C
    cols = tl.arange(0, BLOCK_C)
    inside = cols < C

    value = tl.load(x_ptr + at + cols, mask=inside, other=0.0).to(tl.float32)
    if cache_ptr is not None:
        cache = tl.load(cache_ptr + at + cols, mask=inside, other=0)
        if cache_scale_ptr is None:
            cache = cache.to(tl.float32)
        else:
            cache = dequantized(cache, tl.load(cache_scale_ptr + b * N + n))
        if distance_ptr is not None:
            d = tl.load(distance_ptr + b * N + n)
            cache = extrapolated(cache, slope1_ptr, slope2_ptr, d, at + cols, inside)
        if gate_ptr is not None:
            gate = gate_ptr + b * stride_gate_b + n * stride_gate_n
            cache *= tl.load(gate + cols, mask=inside, other=0.0).to(tl.float32)
        value += cache
    if not RMS:
        value = tl.where(inside, value - tl.sum(value, 0) / C, 0.0)
    value *= 1.0 / tl.sqrt_rn(tl.sum(value * value, 0) / C + eps)
    if weight_ptr is not None:
        value *= tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    scale = scale_ptr + b * stride_scale_b + n * stride_scale_n
    value *= 1.0 + tl.load(scale + cols, mask=inside, other=0.0).to(tl.float32)
    shift = shift_ptr + b * stride_shift_b + n * stride_shift_n
    value += tl.load(shift + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * C + cols, value.to(out_ptr.dtype.element_ty), mask=inside)


def gather_modulate(
    x: Tensor,
    index: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor | None,
    cache: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    cache_scale: Tensor | None = None,
    slopes: Sequence[Tensor] = (),
    distance: Tensor | None = None,
) -> Tensor:
    B, N, C = x.shape
    k = N if index is None else index.shape[1]
    out = torch.empty((B, k, C), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    launch(
        _gather_modulate_kernel,
        B * k,
        x,
        index,
        shift,
        scale,
        gate,
        None if cache is None else as_bytes(cache),
        cache_scale,
        *two_slopes(slopes),
        distance,
        weight,
        bias,
        out,
        N,
        k,
        C,
        *row_strides(shift),
        *row_strides(scale),
        *row_strides(gate),
        eps,
        RMS=norm == "rms",
        **configs.gather_modulate(C),
    )
    return out
