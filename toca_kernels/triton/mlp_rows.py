"""mlp_rows: the MLP of a few rows in two Triton GEMMs, of many rows in the library's.

Fused: GEMM 1 + bias + activation, GEMM 2 + bias.  With few rows both are limited by reading the
weights once, so one tile holds all rows and the grid must come from elsewhere: narrow tiles of
output channels, and for GEMM 2 (short output, long sum) a split of the sum whose parts a third
kernel adds in their order: the same bits in every run.  Programs are ordered in groups that share
their weight tile in L2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._launch import arch_of, launch
from ._tile import LOG2E

INV_SQRT2: tl.constexpr = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI: tl.constexpr = tl.constexpr(0.7978845608028654)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.math.erf(x * INV_SQRT2))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh u) = sigmoid(2 u), which does not cancel where x is negative
        u = (x + 0.044715 * x * x * x) * SQRT_2_OVER_PI
        y = x / (1.0 + tl.math.exp2(u * (-2.0 * LOG2E)))
    elif ACTIVATION == "silu":
        y = x / (1.0 + tl.math.exp2(x * -LOG2E))
    else:
        tl.static_assert(ACTIVATION is None)
        y = x
    return y


@triton.jit
def _linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    K_split,  # terms of the sum that one program adds, a multiple of BLOCK_K
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[split] = activation(x @ weight.T + bias) over the split's terms; x (M, K), weight (N, K).

    Row tiles are the fastest in the order of programs: those that share a tile of weights run
    together, and there are few row tiles.
    """
    program = tl.program_id(0).to(tl.int64)
    row_tiles = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    first_row = program % row_tiles * BLOCK_M
    first_column = program // row_tiles % column_tiles * BLOCK_N
    split = program // (row_tiles * column_tiles)
    first_term = split * K_split
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    x_ptr += first_row * K + first_term
    weight_ptr += first_column * K + first_term
    x_at = x_ptr + tl.arange(0, BLOCK_M)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    weight_at = weight_ptr + tl.arange(0, BLOCK_N)[None, :] * K + tl.arange(0, BLOCK_K)[:, None]

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    terms = tl.minimum(K - first_term, K_split).to(tl.int32)
    for start in range(0, terms, BLOCK_K):
        inside = start + tl.arange(0, BLOCK_K) < terms
        x = tl.load(x_at, mask=(rows < M)[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weight_at, mask=(columns < N)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(x, weight, total)
        x_at += BLOCK_K
        weight_at += BLOCK_K
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
        total += bias.to(tl.float32)[None, :]
    out = _activate(total, ACTIVATION)
    out_ptr += split * M * N
    at = out_ptr + rows[:, None] * N + columns[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_splits_kernel(part_ptr, bias_ptr, out_ptr, M, N, splits, BLOCK_N: tl.constexpr):
    """out = bias + sum_s part[s], in the order of s."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(N, BLOCK_N)
    row = program // tiles
    columns = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < N
    total = tl.zeros([BLOCK_N], tl.float32)
    for s in range(splits):
        total += tl.load(part_ptr + (s * M + row) * N + columns, mask=inside, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


def mlp_rows(
    rows: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
) -> Tensor:
    arch = arch_of(rows)
    B, k, C = rows.shape
    F_hidden = weight1.shape[0]
    if B * k * C * F_hidden == 0:
        return _library_mlp(rows, weight1, bias1, weight2, bias2, activation)
    tiles = configs.mlp_rows(arch, rows.element_size(), B * k, C, F_hidden)
    if tiles is None:
        return _library_mlp(rows, weight1, bias1, weight2, bias2, activation)
    hidden = _linear(rows.flatten(0, 1), weight1, bias1, tiles[0], activation)
    return _linear(hidden, weight2, bias2, tiles[1], None).view(B, k, C)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tile: configs.LinearTile, activation: str | None
) -> Tensor:
    """activation(x @ weight.T + bias) of a (M, K) matrix; no activation where the sum is split."""
    (M, K), N = x.shape, weight.shape[0]
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    part = out
    if tile.splits > 1:
        part = torch.empty((tile.splits, M, N), dtype=torch.float32, device=x.device)
    launch(
        _linear_kernel,
        triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns) * tile.splits,
        x,
        weight,
        bias if tile.splits == 1 else None,
        part,
        M,
        N,
        K,
        tile.terms_per_split,
        ACTIVATION=activation,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.terms,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if tile.splits > 1:
        adding = configs.add_splits()
        programs = M * triton.cdiv(N, adding["BLOCK_N"])
        launch(_add_splits_kernel, programs, part, bias, out, M, N, tile.splits, **adding)
    return out


def _library_mlp(
    rows: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
) -> Tensor:
    fused = activation == "gelu_tanh" and bias1 is not None and rows.numel() > 0
    if fused and rows.device.type == "cuda":
        # cuBLASLt applies its GELU, the tanh form, to the float32 sum before it is rounded.
        hidden = torch.ops.aten._addmm_activation(
            bias1, rows.flatten(0, 1), weight1.t(), use_gelu=True
        ).view(*rows.shape[:2], -1)
    else:
        hidden = F.linear(rows, weight1, bias1)
        if activation == "silu":
            hidden = F.silu(hidden)
        else:
            hidden = F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")
    return F.linear(hidden, weight2, bias2)
