"""partial_attention: the selected queries over all keys.

Fused: q k^T, online softmax and the product with v (flash attention, Dao et al. 2022).  Queries are
stationary; where the selected ones are too few to fill the GPU, the keys are split as well (flash
decoding) and a second kernel combines the parts in their order: the same bits in every run.
Limited by the tensor cores for many queries, by reading k and v once for few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._launch import arch_of, launch
from ._softmax import add_values, begin, store_result, store_rows, weigh
from ._tile import LN2, LOG2E, head_blocks, head_product, load_head, load_tile, strides_in_units


@triton.jit
def _attend(
    q,
    k_ptr,
    stride_kn,
    v_ptr,
    stride_vn,
    mask_ptr,
    first_key,
    end_key,
    scale,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(out, largest, total) of a tile of queries over the keys from first_key to end_key.

    k_ptr and v_ptr are at the first of these keys, mask_ptr at the first key of the sample.
    """
    out, largest, total = begin(BLOCK_Q, BLOCK_D, BLOCK_REST)
    for start in range(first_key, end_key, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        present = keys < end_key
        admitted = present
        if mask_ptr is not None:
            admitted = tl.load(mask_ptr + keys, mask=present, other=0) != 0
        k = load_head(k_ptr, stride_kn, present, UNIT, D, BLOCK_D, BLOCK_REST)
        logits = head_product(q, k, BLOCK_REST) * (scale * LOG2E)
        logits = tl.where(admitted[None, :], logits, -float("inf"))
        weights, shrink, largest, total = weigh(logits, largest, total)
        v = load_head(v_ptr, stride_vn, admitted, UNIT, D, BLOCK_D, BLOCK_REST)
        out = add_values(out, shrink, weights, v, BLOCK_REST)
        k_ptr += tl.cast(BLOCK_K * UNIT, tl.int64) * stride_kn
        v_ptr += tl.cast(BLOCK_K * UNIT, tl.int64) * stride_vn
    return out, largest, total


@triton.jit
def _partial_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_on,
    B,
    H,
    Nq,
    N,
    keys_per_split,
    scale,
    UNIT: tl.constexpr,  # of the strides of q, k and v
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of queries of one head over one split of the keys.

    Split s writes rows (s * B + b) of out and lse: with one split these are the results.
    """
    tiles = tl.cdiv(Nq, BLOCK_Q)
    program = tl.program_id(0).to(tl.int64)
    first = program % tiles * BLOCK_Q
    sbh = program // tiles
    h = sbh % H
    b = (sbh // H) % B
    split = sbh // (B * H)
    row = split * B + b
    first_key = split * keys_per_split
    end_key = tl.minimum(first_key + keys_per_split, N).to(tl.int32)
    q_ptr += (b * stride_qb + h * stride_qh + first * stride_qn) * UNIT
    k_ptr += (b * stride_kb + h * stride_kh + first_key * stride_kn) * UNIT
    v_ptr += (b * stride_vb + h * stride_vh + first_key * stride_vn) * UNIT
    if mask_ptr is not None:
        mask_ptr += b * N
    out_ptr += row * stride_ob + h * stride_oh + first * stride_on
    lse_ptr += (row * H + h) * Nq + first

    valid = first + tl.arange(0, BLOCK_Q) < Nq
    q = load_head(q_ptr, stride_qn, valid, UNIT, D, BLOCK_D, BLOCK_REST)
    out, largest, total = _attend(
        q, k_ptr, stride_kn, v_ptr, stride_vn, mask_ptr, first_key.to(tl.int32), end_key, scale,
        UNIT, D, BLOCK_Q, BLOCK_D, BLOCK_REST, BLOCK_K,
    )  # fmt: skip
    store_result(out_ptr, stride_on, lse_ptr, valid, out, largest, total, D, BLOCK_D, BLOCK_REST)


@triton.jit
def _combine_splits_kernel(
    part_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    stride_ob,
    stride_oh,
    stride_on,
    H,
    Nq,
    splits,
    split_rows,  # B * H * Nq: rows from one split to the next
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """out = sum_s exp(lse_s - lse) * part_s, in the order of s."""
    tiles = tl.cdiv(Nq, BLOCK_Q)
    program = tl.program_id(0).to(tl.int64)
    first = program % tiles * BLOCK_Q
    bh = program // tiles
    valid = first + tl.arange(0, BLOCK_Q) < Nq
    row = bh * Nq + first
    rows = tl.arange(0, BLOCK_Q)

    largest = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    for _ in range(splits):
        lse = tl.load(part_lse_ptr + row + rows, mask=valid, other=-float("inf"))
        largest = tl.maximum(largest, lse)
        part_lse_ptr += split_rows
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    total = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    part_lse_ptr -= splits * split_rows
    for _ in range(splits):
        lse = tl.load(part_lse_ptr + row + rows, mask=valid, other=-float("inf"))
        weight = tl.math.exp2((lse - shift) * LOG2E)
        total += weight
        out += weight[:, None] * load_tile(part_ptr + row * D, D, valid, 1, D, 0, BLOCK_D)
        part_lse_ptr += split_rows
        part_ptr += split_rows * D
    norm = tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]
    out_ptr += bh // H * stride_ob + bh % H * stride_oh + first * stride_on
    store_rows(out_ptr, stride_on, valid, out * norm, D, 0)
    lse = tl.where(total == 0.0, -float("inf"), shift + tl.math.log2(total) * LN2)
    tl.store(lse_ptr + row + rows, lse, mask=valid)


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    arch = arch_of(q)
    B, H, Nq, D = q.shape
    blocks = head_blocks(D)
    N = k.shape[2]
    out = torch.empty((B, Nq, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Nq), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or N == 0:
        return out.zero_().flatten(2), lse.fill_(-torch.inf)
    tile = configs.partial_attention(arch, D, q.element_size(), Nq)
    programs = triton.cdiv(Nq, tile["BLOCK_Q"]) * B * H
    splits, keys_per_split = configs.key_splits(arch, programs, N, tile["BLOCK_K"])
    part, part_lse = out.transpose(1, 2), lse
    if splits > 1:
        part = torch.empty((splits * B, H, Nq, D), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((splits * B, H, Nq), dtype=torch.float32, device=q.device)
    unit, strides = strides_in_units(q, k, v)
    launch(
        _partial_attention_kernel,
        programs * splits,
        q,
        k,
        v,
        None if mask is None else mask.view(torch.uint8),
        part,
        part_lse,
        *strides,
        *part.stride()[:3],
        B,
        H,
        Nq,
        N,
        keys_per_split,
        scale,
        UNIT=unit,
        **blocks,
        **tile,
    )
    if splits > 1:
        launch(
            _combine_splits_kernel,
            triton.cdiv(Nq, configs.COMBINED_QUERIES) * B * H,
            part,
            part_lse,
            out,
            lse,
            out.stride(0),
            out.stride(2),
            out.stride(1),
            H,
            Nq,
            splits,
            B * H * Nq,
            D=D,
            BLOCK_D=triton.next_power_of_2(D),
            BLOCK_Q=configs.COMBINED_QUERIES,
            num_warps=4,
        )
    return out.flatten(2), lse
