"""Tiles of a (rows, channels) matrix whose number of channels need not be a power of two.

A head dimension D is cut into a power of two and a rest, 72 = 64 + 16 with half of the rest
masked: 80 columns of tensor-core work where one tile would have 128.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MAX_HEAD_DIM = 256
_LEAST = 16  # the shortest dimension of a matrix product

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


def head_blocks(D: int) -> dict[str, int]:
    """The constexprs of a head dimension: D, BLOCK_D and BLOCK_REST (0: no second tile)."""
    if D > MAX_HEAD_DIM:
        raise ValueError(f"head dim: expected <= {MAX_HEAD_DIM} for backend 'triton', got {D}")
    whole = max(_LEAST, triton.next_power_of_2(max(D, 1)))
    main = whole // 2
    rest = max(_LEAST, triton.next_power_of_2(max(D - main, 1)))
    if main < _LEAST or main >= D or main + rest >= whole:
        return {"D": D, "BLOCK_D": whole, "BLOCK_REST": 0}
    return {"D": D, "BLOCK_D": main, "BLOCK_REST": rest}


def strides_in_units(*tensors: Tensor) -> tuple[int, list[int]]:
    """(unit, strides of all dimensions but the last of each tensor, in that unit).

    Triton learns of an argument only whether it is a multiple of 16, and a head of 72 channels is
    not; times a constant 8 it is known to keep 16-bit elements 16 bytes apart, which is what an
    asynchronous copy needs.
    """
    strides = [stride for tensor in tensors for stride in tensor.stride()[:-1]]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return unit, [stride // unit for stride in strides]


@triton.jit
def load_tile(
    ptr,
    stride,
    valid,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Channels FIRST..FIRST+BLOCK-1 of the rows from `ptr` on; 0 beyond D and where not valid."""
    rows = tl.arange(0, valid.shape[0]).to(tl.int64)
    cols = FIRST + tl.arange(0, BLOCK)
    at = ptr + rows[:, None] * stride * UNIT + cols[None, :]
    if FIRST + BLOCK <= D:
        tile = tl.load(at, mask=valid[:, None], other=0.0)
    else:
        tile = tl.load(at, mask=valid[:, None] & (cols < D)[None, :], other=0.0)
    return tile


@triton.jit
def load_head(
    ptr,
    stride,
    valid,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rows of a head in its two parts; with BLOCK_REST 0 nobody reads the second."""
    main = load_tile(ptr, stride, valid, UNIT, D, 0, BLOCK_D)
    rest = main
    if BLOCK_REST > 0:
        rest = load_tile(ptr, stride, valid, UNIT, D, BLOCK_D, BLOCK_REST)
    return main, rest


@triton.jit
def head_product(a, b, BLOCK_REST: tl.constexpr):
    """a @ b.T in float32; TF32 would not be the float32 that the contracts promise."""
    a_main, a_rest = a
    b_main, b_rest = b
    zero = tl.zeros([a_main.shape[0], b_main.shape[0]], tl.float32)
    total = tl.dot(a_main, tl.trans(b_main), zero, input_precision="ieee")
    if BLOCK_REST > 0:
        total = tl.dot(a_rest, tl.trans(b_rest), total, input_precision="ieee")
    return total
