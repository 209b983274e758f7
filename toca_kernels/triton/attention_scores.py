"""attention_scores: column means of softmax(q k^T) from the log-sum-exp of each query.

Fused: q k^T, exp and the sum over the queries; the N x N map exists one tile at a time.  Keys are
stationary: a program owns a tile of keys of one head and every query passes by, so sums need
neither atomics nor a second tile, and their order is fixed.  Keys are the rows of the product,
which makes the sum one over the columns of an accumulator: registers of four neighbouring threads.
Limited by the tensor cores and by one exp2 per pair: about half of attention itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._launch import arch_of, launch
from ._tile import LOG2E, head_blocks, head_product, load_head, strides_in_units


@triton.jit
def _attention_scores_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    partial_ptr,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    H,
    Nq,
    N,
    scale,
    UNIT: tl.constexpr,  # of the strides
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    tiles = tl.cdiv(N, BLOCK_K)
    program = tl.program_id(0).to(tl.int64)
    first = program % tiles * BLOCK_K
    bh = program // tiles
    b = bh // H
    h = bh % H
    k_ptr += (b * stride_kb + h * stride_kh + first * stride_kn) * UNIT
    q_ptr += (b * stride_qb + h * stride_qh) * UNIT
    lse_ptr += bh * Nq
    keys = first + tl.arange(0, BLOCK_K)

    k = load_head(k_ptr, stride_kn, keys < N, UNIT, D, BLOCK_D, BLOCK_REST)
    column = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, Nq, BLOCK_Q):
        queries = start + tl.arange(0, BLOCK_Q)
        valid = queries < Nq
        q = load_head(q_ptr, stride_qn, valid, UNIT, D, BLOCK_D, BLOCK_REST)
        logits = head_product(k, q, BLOCK_REST)
        lse = tl.load(lse_ptr + queries, mask=valid, other=0.0)
        p = tl.math.exp2(logits * (scale * LOG2E) - (lse * LOG2E)[None, :])
        column += tl.sum(tl.where(valid[None, :], p, 0.0), 1)
        q_ptr += tl.cast(BLOCK_Q * UNIT, tl.int64) * stride_qn
    tl.store(partial_ptr + bh * N + keys, column, mask=keys < N)


def attention_scores(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> Tensor:
    arch = arch_of(q)
    B, H, Nq, D = q.shape
    blocks = head_blocks(D)
    N = k.shape[2]
    if B * H * N * Nq == 0:
        return torch.zeros((B, N), dtype=torch.float32, device=q.device)
    partial = torch.empty((B, H, N), dtype=torch.float32, device=q.device)
    tile = configs.attention_scores(arch, D, q.element_size(), N, B * H)
    unit, strides = strides_in_units(q, k)
    launch(
        _attention_scores_kernel,
        triton.cdiv(N, tile["BLOCK_K"]) * B * H,
        q,
        k,
        lse,
        partial,
        *strides,
        H,
        Nq,
        N,
        scale,
        UNIT=unit,
        **blocks,
        **tile,
    )
    return partial.mean(dim=1)
