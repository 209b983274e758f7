"""attention_entropy: entropy of the head-averaged cross-attention row of each query.

Fused: q k^T, exp, the mean over heads, p ln p and its sum; the map of a query exists one tile of
keys at a time.  The mean comes before the logarithm, so all heads of a tile are looped before it is
left; nothing is stationary, but the text is short and q stays in L2.
Limited by the tensor cores for many queries, by latency for the few of a cached step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._launch import arch_of, launch
from ._tile import LOG2E, head_blocks, head_product, load_head, strides_in_units
from .partial_attention import partial_attention


@triton.jit
def _attention_entropy_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    mask_ptr,
    out_ptr,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    H,
    N,
    L,
    scale,
    UNIT: tl.constexpr,  # of the strides
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(N, BLOCK_Q)
    program = tl.program_id(0).to(tl.int64)
    first = program % tiles * BLOCK_Q
    b = program // tiles
    q_ptr += (b * stride_qb + first * stride_qn) * UNIT
    k_ptr += b * stride_kb * UNIT
    queries = first + tl.arange(0, BLOCK_Q)
    valid = queries < N

    entropy = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, L, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        admitted = keys < L
        if mask_ptr is not None:
            admitted = tl.load(mask_ptr + b * L + keys, mask=admitted, other=0) != 0
        q_head_ptr = q_ptr
        k_head_ptr = k_ptr
        lse_head_ptr = lse_ptr + b * H * N
        p = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        for _ in range(H):
            q = load_head(q_head_ptr, stride_qn, valid, UNIT, D, BLOCK_D, BLOCK_REST)
            k = load_head(k_head_ptr, stride_kn, keys < L, UNIT, D, BLOCK_D, BLOCK_REST)
            logits = head_product(q, k, BLOCK_REST)
            lse = tl.load(lse_head_ptr + queries, mask=valid, other=0.0)
            p += tl.math.exp2(logits * (scale * LOG2E) - (lse * LOG2E)[:, None])
            q_head_ptr += tl.cast(UNIT, tl.int64) * stride_qh
            k_head_ptr += tl.cast(UNIT, tl.int64) * stride_kh
            lse_head_ptr += N
        p = tl.where(admitted[None, :], p / H, 0.0)
        entropy -= tl.sum(p * tl.log(p + 1e-7), 1)
        k_ptr += tl.cast(BLOCK_K * UNIT, tl.int64) * stride_kn
    tl.store(out_ptr + b * N + queries, entropy, mask=valid)


def attention_entropy(
    q: Tensor, k: Tensor, lse: Tensor | None, scale: float, mask: Tensor | None
) -> Tensor:
    if lse is None:
        _, lse = partial_attention(q, k, k, scale, mask)
    arch = arch_of(q)
    B, H, N, D = q.shape
    blocks = head_blocks(D)
    L = k.shape[2]
    if B * H * N * L == 0:
        return torch.zeros((B, N), dtype=torch.float32, device=q.device)
    out = torch.empty((B, N), dtype=torch.float32, device=q.device)
    tile = configs.attention_entropy(arch, D, q.element_size(), N, B)
    unit, strides = strides_in_units(q, k)
    launch(
        _attention_entropy_kernel,
        triton.cdiv(N, tile["BLOCK_Q"]) * B,
        q,
        k,
        lse,
        None if mask is None else mask.view(torch.uint8),
        out,
        *strides,
        H,
        N,
        L,
        scale,
        UNIT=unit,
        **blocks,
        **tile,
    )
    return out
