"""Online softmax: the steps that the attention kernels share (flash attention, Dao et al. 2022).

The state of a tile of queries is `out` (a head in its two parts, see `load_head`), `largest` (the
largest logit so far) and `total` (the sum of 2 ** (logit - largest)).  Logits are in base 2: times
log2(e).  Sums are float32; weights are rounded to the dtype of v for their product with it, as in
any flash attention.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._tile import LN2


@triton.jit
def begin(BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr):
    """(out, largest, total) before the first key."""
    main = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    rest = main
    if BLOCK_REST > 0:
        rest = tl.zeros([BLOCK_Q, BLOCK_REST], tl.float32)
    largest = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    return (main, rest), largest, tl.zeros([BLOCK_Q], tl.float32)


@triton.jit
def weigh(logits, largest, total):
    """(weights of the keys, what earlier weights shrink by, largest, total) with a tile of keys."""
    peak = tl.maximum(largest, tl.max(logits, 1))
    # Where no key was admitted yet, -inf - -inf would be NaN.
    shift = tl.where(peak == -float("inf"), 0.0, peak)
    shrink = tl.math.exp2(largest - shift)
    weights = tl.math.exp2(logits - shift[:, None])
    return weights, shrink, peak, total * shrink + tl.sum(weights, 1)


@triton.jit
def add_values(out, shrink, weights, v, BLOCK_REST: tl.constexpr):
    """shrink * out + weights @ v."""
    out_main, out_rest = out
    v_main, v_rest = v
    weights = weights.to(v_main.dtype)
    out_main = tl.dot(weights, v_main, out_main * shrink[:, None], input_precision="ieee")
    if BLOCK_REST > 0:
        out_rest = tl.dot(weights, v_rest, out_rest * shrink[:, None], input_precision="ieee")
    return out_main, out_rest


@triton.jit
def store_result(
    out_ptr,
    stride,
    lse_ptr,
    valid,
    out,
    largest,
    total,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rows of the output from `out_ptr` on, and their natural log-sum-exp from `lse_ptr` on."""
    out_main, out_rest = out
    norm = tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]
    store_rows(out_ptr, stride, valid, out_main * norm, D, 0)
    if BLOCK_REST > 0:
        store_rows(out_ptr, stride, valid, out_rest * norm, D, BLOCK_D)
    lse = tl.where(total == 0.0, -float("inf"), (largest + tl.math.log2(total)) * LN2)
    tl.store(lse_ptr + tl.arange(0, valid.shape[0]), lse, mask=valid)


@triton.jit
def store_rows(ptr, stride, valid, value, D: tl.constexpr, FIRST: tl.constexpr):
    """Channels from FIRST on; none beyond D and none where not valid."""
    rows = tl.arange(0, value.shape[0]).to(tl.int64)
    cols = FIRST + tl.arange(0, value.shape[1])
    at = ptr + rows[:, None] * stride + cols[None, :]
    inside = valid[:, None] & (cols < D)[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=inside)
