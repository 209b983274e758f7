"""What the kernels of scatter_residual share: tiles of programs, and gates."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._launch import row_strides

MAX_UPDATES = 4


@triton.jit
def tile_of_program(N, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """(sample, tokens, channels) of a program."""
    program = tl.program_id(0).to(tl.int64)
    channel_tiles = tl.cdiv(C, BLOCK_C)
    token_tiles = tl.cdiv(N, BLOCK_N)
    b = program // (token_tiles * channel_tiles)
    token = (program // channel_tiles) % token_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (program % channel_tiles).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    return b, token, cols


@triton.jit
def gated(value, gate_ptr, stride_gate_b, stride_gate_n, b, token, cols, inside, C):
    """gate * value of a tile; stride_gate_n None: one gate serves all tokens of a sample."""
    if gate_ptr is not None:
        gate_ptr += b * stride_gate_b
        if stride_gate_n is None:
            gate = tl.load(gate_ptr + cols, mask=cols < C, other=0.0)[None, :]
        else:
            gate_row = gate_ptr + token[:, None] * stride_gate_n + cols[None, :]
            gate = tl.load(gate_row, mask=inside, other=0.0)
        value *= gate.to(tl.float32)
    return value


def fresh_arguments(
    gate: Tensor | None, fresh: Tensor | None, inverse: Tensor | None
) -> tuple[Any, ...]:
    """(fresh, inverse, strides of the gate, k) for a kernel; None where there is nothing."""
    stride_b, stride_n = (None, None) if gate is None else row_strides(gate)
    if gate is None or gate.ndim == 2:
        stride_n = None
    if fresh is None or fresh.shape[1] == 0:
        return None, None, stride_b, stride_n, None
    return fresh, inverse, stride_b, stride_n, fresh.shape[1]
