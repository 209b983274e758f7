"""scored_attention: all queries over all keys, and what every key receives, in one pass.

Fused: q k^T, online softmax, the product with v, and for every key the sum over the queries of its
weights under the normaliser of an earlier step (one pass as in Chipmunk, arXiv 2506.03275).  The
weight under another normaliser is the weight at hand times a factor of its query: one product for
each pair, where attention_scores multiplies q k^T and takes the exponentials a second time.
Queries are stationary, so a tile of them writes its part of every key's sum and no atomics are
needed: the parts, (B, H, tiles of queries, N), are added in a fixed order.
Limited by the tensor cores; the sums over the rows of an accumulator cross warps and are the price.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._launch import arch_of, launch
from ._softmax import add_values, begin, store_result, weigh
from ._tile import LOG2E, head_blocks, head_product, load_head, strides_in_units

# Log2 of what a weight, at most 1, is multiplied by at most: the product stays finite.
MAX_FACTOR: tl.constexpr = tl.constexpr(96.0)


@triton.jit
def _received(weights, largest, lse, max_exponent):
    """Of each key: the sum over the queries of min(exp(logit - lse), exp(max_exponent)).

    exp(logit - lse) = weight * factor of the query.  NaN stays NaN.
    """
    exponent = tl.minimum(largest - lse, MAX_FACTOR, propagate_nan=tl.PropagateNan.ALL)
    term = weights * tl.math.exp2(exponent)[:, None]
    most = tl.math.exp2(max_exponent * LOG2E)
    return tl.sum(tl.minimum(term, most, propagate_nan=tl.PropagateNan.ALL), 0)


@triton.jit
def _scored_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    out_ptr,
    new_lse_ptr,
    partial_ptr,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    H,
    Nq,
    N,
    scale,
    max_exponent,
    UNIT: tl.constexpr,  # of the strides
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of queries of one head over all keys."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(Nq, BLOCK_Q)
    first = program % tiles * BLOCK_Q
    bh = program // tiles
    b = bh // H
    h = bh % H
    q_ptr += (b * stride_qb + h * stride_qh + first * stride_qn) * UNIT
    k_ptr += (b * stride_kb + h * stride_kh) * UNIT
    v_ptr += (b * stride_vb + h * stride_vh) * UNIT
    partial_ptr += program * N
    rows = tl.arange(0, BLOCK_Q)
    valid = first + rows < Nq
    # A query that does not exist gives nothing: exp(0 - inf) = 0.
    lse = tl.load(lse_ptr + bh * Nq + first + rows, mask=valid, other=float("inf")) * LOG2E

    q = load_head(q_ptr, stride_qn, valid, UNIT, D, BLOCK_D, BLOCK_REST)
    out, largest, total = begin(BLOCK_Q, BLOCK_D, BLOCK_REST)
    for start in range(0, N, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        present = keys < N
        k = load_head(k_ptr, stride_kn, present, UNIT, D, BLOCK_D, BLOCK_REST)
        logits = head_product(q, k, BLOCK_REST) * (scale * LOG2E)
        logits = tl.where(present[None, :], logits, -float("inf"))
        weights, shrink, largest, total = weigh(logits, largest, total)
        received = _received(weights, largest, lse, max_exponent)
        tl.store(partial_ptr + keys, received, mask=present)
        v = load_head(v_ptr, stride_vn, present, UNIT, D, BLOCK_D, BLOCK_REST)
        out = add_values(out, shrink, weights, v, BLOCK_REST)
        k_ptr += tl.cast(BLOCK_K * UNIT, tl.int64) * stride_kn
        v_ptr += tl.cast(BLOCK_K * UNIT, tl.int64) * stride_vn

    stride_on = H * D
    out_ptr += (b * Nq + first) * stride_on + h * D
    new_lse_ptr += bh * Nq + first
    store_result(
        out_ptr, stride_on, new_lse_ptr, valid, out, largest, total, D, BLOCK_D, BLOCK_REST
    )


def scored_attention(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float, max_exponent: float
) -> tuple[Tensor, Tensor, Tensor]:
    arch = arch_of(q)
    B, H, Nq, D = q.shape
    blocks = head_blocks(D)
    N = k.shape[2]
    out = torch.empty((B, Nq, H * D), dtype=q.dtype, device=q.device)
    new_lse = torch.empty((B, H, Nq), dtype=torch.float32, device=q.device)
    if B * H * Nq * N == 0:
        score = torch.zeros((B, N), dtype=torch.float32, device=q.device)
        return out.zero_(), new_lse.fill_(-torch.inf), score
    tile = configs.scored_attention(arch, D, q.element_size(), Nq, B * H)
    tiles = triton.cdiv(Nq, tile["BLOCK_Q"])
    partial = torch.empty((B, H * tiles, N), dtype=torch.float32, device=q.device)
    unit, strides = strides_in_units(q, k, v)
    launch(
        _scored_attention_kernel,
        B * H * tiles,
        q,
        k,
        v,
        lse,
        out,
        new_lse,
        partial,
        *strides,
        H,
        Nq,
        N,
        scale,
        max_exponent,
        UNIT=unit,
        **blocks,
        **tile,
    )
    return out, new_lse, partial.sum(dim=1) / H
