"""The ops, and their contracts.  Read this file first.

A ToCa step that recomputes k of N tokens is four memory-bound ops around two library GEMMs:

    selection = select_tokens(score, age, k, ...)                       which tokens, all layers
    rows  = gather_modulate(x, selection.index, shift, scale, ...)      only those rows, normalised
    fresh = mlp_rows(rows, fc1, fc2)                                    the MLP of those rows
    x     = scatter_residual(x, [(gate, cache, fresh, inverse), ...])   the rest: from the cache

Letters: B samples, N tokens, k selected tokens, C channels, H heads, D channels of a head,
F hidden channels of the MLP, R rows of a selection (layers x samples).  What a cache can be is said
in features.py.

Every op takes `backend=None`: None is the fastest body for the tensors' device, a name
("reference", "native", "triton") is used or refused.  All bodies compute the same function:
arithmetic in float32, rounded once to the tensors' dtype.  Nothing here is differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from . import _checks, _library
from ._backends import resolve
from .features import (
    Cache,
    ForecastCache,
    QuantizedCache,
    Residual,
    Update,
    checked,
    checked_update,
    read_by,
    with_slopes,
)
from .native import PackedLinear, packed_mlp_rows, packing_unavailable

# Caches, and how blocks lay out a linear's weights.
__all__ = [
    "Cache",
    "ForecastCache",
    "PackedLinear",
    "QuantizedCache",
    "Residual",
    "Update",
    "packing_unavailable",
]

ACTIVATIONS = ("gelu", "gelu_tanh", "silu")
NORMS = ("layer", "rms")
MAX_UPDATES = 4
MAX_EXPONENT = 4.0  # of a weight in scored_attention
_NO_NATIVE_BODY = ("reference", "triton")
# Rows up to which a 16-bit MLP takes as long as for one row, because reading its weights is what
# takes the time: below 137 on an A100 and 151 on an H200 by the roofline (docs/gpu.md; not measured
# yet).  On a CPU time grows with the rows from the first one on (docs/speed.md).
_FREE_ROWS = {"cuda": 128}

Linear: TypeAlias = nn.Linear | PackedLinear | tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Selection:
    """Which tokens a step recomputes.

    Attributes:
        index: selected tokens, ascending in every row, int64; (R, k), or (sum of k,) row after
            row where the rows have different k.
        inverse: (R, N), int32; the slot of a token in its row of `index`, -1 where not selected.
        nan: (R,), int32; how many scores of the row were NaN (they rank last).
        k: tokens selected in each row.
    """

    index: Tensor
    inverse: Tensor
    nan: Tensor
    k: tuple[int, ...]

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(index, inverse) of rows start..stop-1, which must have one k: ((n, k), (n, N))."""
        if not 0 <= start <= stop <= len(self.k):
            raise ValueError(f"rows: expected a range in 0..{len(self.k)}, got {start}..{stop}")
        counts = self.k[start:stop]
        if len(set(counts)) > 1:
            raise ValueError(f"rows {start}..{stop - 1}: expected one k, got {sorted(set(counts))}")
        if self.index.ndim == 2:
            return self.index[start:stop], self.inverse[start:stop]
        first = sum(self.k[:start])
        flat = self.index[first : first + sum(counts)]
        return flat.view(len(counts), counts[0] if counts else 0), self.inverse[start:stop]


def attention_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float,
    query_stride: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Attention that each token receives, without ever storing the N x N map.

        out[b, j] = sum_i mean_h exp(scale * q[b, h, i] . k[b, h, j] - lse[b, h, i])

    The self-attention influence of ToCa (ICLR 2025, section 3.2, score s1).  Exact: a flash
    kernel already returns the log-sum-exp of every query, so one more pass over q k^T is enough.

    Args:
        q: (B, H, Nq, D), float32 | bfloat16 | float16, last dimension contiguous.
        k: (B, H, N, D), dtype of q, last dimension contiguous.
        lse: (B, H, Nq), float32, natural logarithm of sum_j exp(scale * q_i . k_j).
        scale: the softmax scale, usually D ** -0.5.
        query_stride: sum over the queries 0, s, 2 s, ... only and multiply by s: an estimate at
            1 / s of the cost, for the lengths of video.
        backend: None chooses by device; a name is used or refused.

    Returns:
        (B, N), float32.  Summed in a fixed order: the same bits whatever the number of threads.

    Raises:
        ValueError: a shape, dtype, device or layout differs; the message gives both.
        RuntimeError: the named backend is not available here; the message says why.
    """
    _checks.tensor("q", q, ("B", "H", "Nq", "D"), dtype=_checks.FLOATS, layout="rows")
    B, H, Nq, D = q.shape
    _checks.tensor("k", k, (B, H, "N", D), dtype=q.dtype, device=q.device, layout="rows")
    _checks.tensor("lse", lse, (B, H, Nq), dtype=torch.float32, device=q.device)
    _checks.count("query_stride", query_stride, 1, max(Nq, 1))
    backend = resolve(backend, q.device, op="attention_scores")
    if query_stride == 1:
        return _library.attention_scores(q, k, lse, float(scale), backend)
    q, lse = q[:, :, ::query_stride], lse[:, :, ::query_stride].contiguous()
    return _library.attention_scores(q, k, lse, float(scale), backend) * query_stride


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """What scaled_dot_product_attention returns, bit for bit, and its log-sum-exp.

        logit[b, h, i, j] = scale * q[b, h, i] . k[b, h, j]
        lse[b, h, i]      = ln sum_j exp(logit[b, h, i, j])
        out[b, h, i]      = sum_j exp(logit[b, h, i, j] - lse[b, h, i]) * v[b, h, j]

    The kernel is the one that torch would choose: a flash kernel has the log-sum-exp at hand; for
    any other it is computed beside, one head at a time.

    Args:
        q: (B, H, Nq, D), float32 | bfloat16 | float16.
        k, v: (B, H, N, D), dtype of q.
        scale: the softmax scale, usually D ** -0.5.
        dropout_p: as of scaled_dot_product_attention.

    Returns:
        out: (B, H, Nq, D), dtype of q.
        lse: (B, H, Nq), float32, contiguous: what `attention_scores` takes.

    Raises:
        ValueError: a shape, dtype or device differs; the message gives both.
    """
    _checks.tensor("q", q, ("B", "H", "Nq", "D"), dtype=_checks.FLOATS, layout="any")
    B, H, _, D = q.shape
    _checks.tensor("k", k, (B, H, "N", D), dtype=q.dtype, device=q.device, layout="any")
    _checks.tensor("v", v, k.shape, dtype=q.dtype, device=q.device, layout="any")
    out, lse = _library.attention_with_lse(q, k, v, float(dropout_p), float(scale))
    return out.transpose(1, 2), lse


def attention_entropy(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    scale: float,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Entropy of each query's cross-attention, without ever storing the N x L map.

        p[b, i, j] = mean_h exp(scale * q[b, h, i] . k[b, h, j] - lse[b, h, i])
        out[b, i]  = -sum_j p[b, i, j] * ln(p[b, i, j] + 1e-7)

    The cross-attention influence of ToCa (ICLR 2025, section 3.2, score s2): the mean over heads
    comes before the logarithm.  Sums run over the keys that the mask admits.

    Args:
        q: (B, H, N, D), float32 | bfloat16 | float16, last dimension contiguous.
        k: (B, H, L, D), dtype of q, last dimension contiguous: the keys of the text.
        lse: (B, H, N), float32, natural logarithm of sum_j exp(scale * q_i . k_j) over the keys
            that the mask admits; None: it is computed on the way.
        scale: the softmax scale, usually D ** -0.5.
        mask: (B, L), bool, contiguous: which keys there are; None for all.
        backend: None chooses by device; a name is used or refused.  The native body is the CPU's.

    Returns:
        (B, N), float32; 0 where the mask admits no key.

    Raises:
        ValueError: a shape, dtype, device or layout differs; the message gives both.
        RuntimeError: the named backend is not available here; the message says why.
    """
    _checks.tensor("q", q, ("B", "H", "N", "D"), dtype=_checks.FLOATS, layout="rows")
    B, H, N, D = q.shape
    _checks.tensor("k", k, (B, H, "L", D), dtype=q.dtype, device=q.device, layout="rows")
    if lse is not None:
        _checks.tensor("lse", lse, (B, H, N), dtype=torch.float32, device=q.device)
    _key_mask(mask, k)
    backend = resolve(backend, q.device, op="attention_entropy")
    return _library.attention_entropy(q, k, lse, float(scale), mask, backend)


def partial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the selected queries over all keys.

        logit[b, h, i, j] = scale * q[b, h, i] . k[b, h, j]
        lse[b, h, i]      = ln sum_j exp(logit[b, h, i, j])
        out[b, i, head h] = sum_j exp(logit[b, h, i, j] - lse[b, h, i]) * v[b, h, j]

    Sums run over the keys that the mask admits; a query without any gets 0, and -inf as its lse.
    A backend may round the weights to the dtype of v before it multiplies, as flash attention does.

    Args:
        q: (B, H, k, D), float32 | bfloat16 | float16, last dimension contiguous.
        k, v: (B, H, N, D), dtype of q, last dimension contiguous.
        scale: the softmax scale, usually D ** -0.5.
        mask: (B, N), bool, contiguous: which keys there are (text of different lengths); None for
            all.
        backend: None chooses by device; a name is used or refused.  No native body.

    Returns:
        out: (B, k, H * D), dtype of q: what the output projection takes.
        lse: (B, H, k), float32: what `attention_scores` and `attention_entropy` take.

    Raises:
        ValueError: a shape, dtype, device or layout differs; the message gives both.
        RuntimeError: the named backend is not available here; the message says why.
    """
    _checks.tensor("q", q, ("B", "H", "k", "D"), dtype=_checks.FLOATS, layout="rows")
    B, H, _, D = q.shape
    _checks.tensor("k", k, (B, H, "N", D), dtype=q.dtype, device=q.device, layout="rows")
    _checks.tensor("v", v, k.shape, dtype=q.dtype, device=q.device, layout="rows")
    _key_mask(mask, k)
    backend = resolve(backend, q.device, _NO_NATIVE_BODY)
    return _library.partial_attention(q, k, v, float(scale), mask, backend)


def scored_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    *,
    scale: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention whose one pass over q k^T also sums what every key receives.

        out[b, i, head h], new_lse[b, h, i]   as `partial_attention` of q over all keys: exact
        score[b, j] = sum_i mean_h exp(min(scale * q[b, h, i] . k[b, h, j] - lse[b, h, i], 4))

    A query's log-sum-exp is known when its last key has passed, too late for that pass to weight
    the keys.  So the score takes the `lse` of an earlier full step (as Chipmunk does, arXiv
    2506.03275), and only the score does.  With lse equal to new_lse it is `attention_scores`, up to
    rounding; q k^T is multiplied once instead of twice.

    The exponent is at most 4.  With its own lse a query gives a key at most 1; by a drifted lse it
    gives at most e ** 4 = 55, so that no query decides a score alone and no sum overflows, while
    keys keep their order until the drift exceeds 4.  Where a logit exceeds the lse by more than 60
    (no lse of that query), a backend may give any weight in [0, e ** 4].

    Args:
        q: (B, H, Nq, D), float32 | bfloat16 | float16, last dimension contiguous.
        k, v: (B, H, N, D), dtype of q, last dimension contiguous.
        lse: (B, H, Nq), float32: new_lse of an earlier step, or any that `attention_scores` takes.
        scale: the softmax scale, usually D ** -0.5.
        backend: None chooses by device; a name is used or refused.  No native body.

    Returns:
        out: (B, Nq, H * D), dtype of q.
        new_lse: (B, H, Nq), float32.
        score: (B, N), float32.  Summed in a fixed order: the same bits in every run.

    Raises:
        ValueError: a shape, dtype, device or layout differs; the message gives both.
        RuntimeError: the named backend is not available here; the message says why.
    """
    _checks.tensor("q", q, ("B", "H", "Nq", "D"), dtype=_checks.FLOATS, layout="rows")
    B, H, Nq, D = q.shape
    _checks.tensor("k", k, (B, H, "N", D), dtype=q.dtype, device=q.device, layout="rows")
    _checks.tensor("v", v, k.shape, dtype=q.dtype, device=q.device, layout="rows")
    _checks.tensor("lse", lse, (B, H, Nq), dtype=torch.float32, device=q.device)
    backend = resolve(backend, q.device, _NO_NATIVE_BODY)
    return _library.scored_attention(q, k, v, lse, float(scale), MAX_EXPONENT, backend)


def _key_mask(mask: Tensor | None, k: Tensor) -> None:
    if mask is not None:
        shape = (k.shape[0], k.shape[2])
        _checks.tensor("mask", mask, shape, dtype=torch.bool, device=k.device)


def select_tokens(
    score: Tensor,
    age: Tensor,
    k: int | Sequence[int],
    *,
    age_weight: float = 0.0,
    grid: Sequence[int] | None = None,
    cell: int = 1,
    bonus: float = 0.0,
    tie: str = "low-index",
    backend: str | None = None,
) -> Selection:
    """The k tokens of every row that matter most; ages are updated in the same pass.

        S[r, n]   = score[r, n] + age_weight * age[r, n]
        S[r, n]  *= 1 + bonus      where n is the first maximum of its cell x cell tile of the grid
        index[r]  = the k[r] largest of S[r], ascending; equal S: the lower index wins
        age[r, n] = 0 where selected, else age[r, n] + 1

    ToCa (ICLR 2025, section 3.2): s1 or s2 is `score`, s3 the age term, s4 the bonus.  One call
    serves all layers and samples of a step.

    Args:
        score: (R, N), float32.  NaN ranks with minus infinity and is counted in the result.
        age: (R, N), int32, steps since a token was recomputed.  Updated in place.
        k: tokens to select, 0 <= k <= N: one number, or one for each row.
        age_weight: weight of one unit of age, in units of the score.
        grid: (rows, cols) or (frames, rows, cols) of the tokens, row after row; needed for a bonus.
        cell: side of a tile, in tokens; tiles at the border are cut short.
        bonus: relative bonus of the best token of each tile, finite and >= 0.
        tie: "low-index", the only rule: selections compare exactly between backends.
        backend: None chooses by device; a name is used or refused.

    Returns:
        Selection.

    Raises:
        ValueError: a shape, dtype, device or layout differs, k or bonus is out of range, or the
            grid does not hold N tokens; nothing was changed.
        RuntimeError: the named backend is not available here.
    """
    _checks.tensor("score", score, ("R", "N"), dtype=torch.float32)
    R, N = score.shape
    _checks.tensor("age", age, (R, N), dtype=torch.int32, device=score.device)
    _checks.choice("tie", tie, ("low-index",))
    ragged = not isinstance(k, int)
    counts = tuple(k) if isinstance(k, Sequence) else (k,) * R
    if len(counts) != R:
        raise ValueError(f"k: expected {R} numbers, one for each row, got {len(counts)}")
    for value in counts if ragged else (k,):  # with R = 0 there is a k too
        _checks.count("k", value, 0, N)
    _checks.count("cell", cell, 1, max(N, 1))
    if not 0.0 <= bonus < math.inf:
        raise ValueError(f"bonus: expected a finite number >= 0, got {bonus!r}")
    frames, rows, cols = _grid(grid, N, needed=cell > 1 and bonus != 0.0)
    index, inverse, nan = _library.select_tokens(
        score,
        age,
        counts,
        float(age_weight),
        (frames, rows, cols),
        cell,
        float(bonus),
        resolve(backend, score.device, op="select_tokens"),
    )
    if not ragged:
        index = index.view(R, k)
    return Selection(index, inverse, nan, counts)


def _grid(grid: Sequence[int] | None, N: int, *, needed: bool) -> tuple[int, int, int]:
    if grid is None:
        if needed:
            raise ValueError("grid: expected (rows, cols) or (frames, rows, cols), got None")
        return (1, 1, N)
    sizes = tuple(grid)
    if len(sizes) not in (2, 3) or any(not isinstance(size, int) or size < 0 for size in sizes):
        raise ValueError(f"grid: expected (rows, cols) or (frames, rows, cols), got {grid!r}")
    frames, rows, cols = (1, *sizes) if len(sizes) == 2 else sizes
    if frames * rows * cols != N:
        raise ValueError(
            f"grid: expected a grid of {N} tokens, got {sizes} = {frames * rows * cols}"
        )
    return frames, rows, cols


def gather_modulate(
    x: Tensor,
    index: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    *,
    residual: Residual | None = None,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Normalise and modulate the selected rows, and only those.

        row = x[b, index[b, j]] + gate[b] * cache[b, index[b, j]]      (with residual=(gate, cache))
        out[b, j] = norm(row) * (1 + scale[b]) + shift[b]

    norm is LayerNorm or RMSNorm over C: row - mean(row) ("layer" only), divided by
    sqrt(mean(row**2) + eps), then * weight + bias where given.  (adaLN of DiT, Peebles & Xie 2023;
    the residual term is the cached attention that the untouched block would have added before.)

    Args:
        x: (B, N, C), float32 | bfloat16 | float16, contiguous.
        index: (B, k), int64, in [0, N); None takes every token (k = N).
        shift, scale: (B, C), or (B, N, C) for a modulation of each token; dtype of x, last
            dimension contiguous.
        residual: (gate, cache): gate as shift, or None for 1; cache (B, N, C), dtype of x,
            contiguous, or a QuantizedCache or ForecastCache of that size.
        norm: "layer" or "rms".
        weight, bias: (C,), dtype of x, the norm's own affine parameters.
        eps: added to the variance.
        backend: None chooses by device; a name is used or refused.

    Returns:
        (B, k, C), dtype of x.

    Raises:
        ValueError: a shape, dtype, device or layout differs, or an index is out of [0, N).
        RuntimeError: the named backend is not available here.
    """
    _checks.tensor("x", x, ("B", "N", "C"), dtype=_checks.FLOATS)
    B, _, C = x.shape
    if index is not None:
        _checks.tensor("index", index, (B, "k"), dtype=torch.int64, device=x.device)
    _checks.modulation("shift", shift, x)
    _checks.modulation("scale", scale, x)
    gate, cache, cache_scale, forecast = None, None, None, None
    if residual is not None:
        gate, cache = residual
        cache, cache_scale, forecast = checked("residual cache", cache, x)
        if gate is not None:
            _checks.modulation("residual gate", gate, x)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _checks.tensor(name, value, (C,), dtype=x.dtype, device=x.device)
    _checks.choice("norm", norm, NORMS)
    slopes, distance = read_by(forecast)
    return _library.gather_modulate(
        x,
        index,
        shift,
        scale,
        gate,
        cache,
        weight,
        bias,
        norm,
        float(eps),
        resolve(backend, x.device, op="gather_modulate"),
        cache_scale,
        slopes,
        distance,
    )


def free_rows(device: torch.device) -> int:
    """Rows of an MLP, over all samples, up to which recomputing every one costs no more than some.

    A step that would select among so few tokens recomputes them all: never slower than dense.
    """
    return _FREE_ROWS.get(device.type, 0)


def mlp_rows(
    rows: Tensor,
    fc1: Linear,
    fc2: Linear,
    *,
    activation: str = "gelu_tanh",
    backend: str | None = None,
) -> Tensor:
    """The MLP of the selected rows.

        out = fc2(activation(fc1(rows)))

    The GEMMs are the library's (oneDNN, MKL, cuBLAS), and Triton's for few rows on a GPU.  A
    `PackedLinear` holds a weight in the order in which oneDNN reads it, with the activation fused
    into the first GEMM.

    Args:
        rows: (B, k, C), float32 | bfloat16 | float16, contiguous.
        fc1: C -> F: an nn.Linear, a (weight, bias) pair with weight (F, C), or a PackedLinear.
        fc2: F -> C, of the same kind.
        activation: "gelu", "gelu_tanh" or "silu".
        backend: None chooses by device; a name is used or refused.  Packed weights are native.

    Returns:
        (B, k, C), dtype of rows.

    Raises:
        ValueError: a shape, dtype, device or layout differs, or only one of the two is packed.
        RuntimeError: the named backend is not available here.
    """
    _checks.tensor("rows", rows, ("B", "k", "C"), dtype=_checks.FLOATS)
    _checks.choice("activation", activation, ACTIVATIONS)
    C = rows.shape[2]
    if isinstance(fc1, PackedLinear) and isinstance(fc2, PackedLinear):
        _checks.choice("backend of packed weights", backend or "native", ("native",))
        resolve("native", rows.device, op="mlp_rows of packed weights")
        F = fc1.out_features
        _packed("fc1", fc1, rows, (F, C))
        _packed("fc2", fc2, rows, (C, F))
        return packed_mlp_rows(rows, fc1, fc2, activation)
    weight1, bias1 = _linear("fc1", fc1, rows, ("F", C))
    weight2, bias2 = _linear("fc2", fc2, rows, (C, weight1.shape[0]))
    return _library.mlp_rows(
        rows,
        weight1,
        bias1,
        weight2,
        bias2,
        activation,
        resolve(backend, rows.device, op="mlp_rows"),
    )


def _packed(name: str, linear: PackedLinear, rows: Tensor, shape: tuple[int, int]) -> None:
    have = (linear.out_features, linear.in_features)
    if have != shape or linear.dtype != rows.dtype:
        raise ValueError(
            f"{name}: expected a weight {shape} of {rows.dtype}, got {have} of {linear.dtype}"
        )


def _linear(
    name: str, linear: Linear, rows: Tensor, shape: tuple[int | str, int]
) -> tuple[Tensor, Tensor | None]:
    if isinstance(linear, PackedLinear):
        raise ValueError(f"{name}: expected both of fc1 and fc2 to be packed, or neither")
    weight, bias = (linear.weight, linear.bias) if isinstance(linear, nn.Linear) else linear
    _checks.tensor(f"{name} weight", weight, shape, dtype=rows.dtype, device=rows.device)
    if bias is not None:
        _checks.tensor(
            f"{name} bias", bias, (weight.shape[0],), dtype=rows.dtype, device=rows.device
        )
    return weight, bias


def scatter_residual(
    x: Tensor, updates: Sequence[Update], *, inplace: bool = False, backend: str | None = None
) -> Tensor:
    """Write fresh rows into their caches and add every gated cache to the residual: one pass.

        cache_u[b, n] = fresh_u[b, inverse_u[b, n]]     where inverse_u[b, n] >= 0
        out[b, n] = x[b, n] + sum_u gate_u[b] * cache_u[b, n]

    An 8-bit cache rounds the fresh rows that it gets, and a ForecastCache takes its differences
    with them; the sum takes them as they came.
    (ToCa, ICLR 2025, section 3.1: cached features are ungated; the gate of the current timestep
    is applied to every token, selected or not.)

    Args:
        x: (B, N, C), float32 | bfloat16 | float16, contiguous.
        updates: 1 to 4 of (gate, cache) or (gate, cache, fresh, inverse):
            gate: (B, C), or (B, N, C) for each token, last dimension contiguous; None for 1.
            cache: (B, N, C), dtype of x, contiguous, or a QuantizedCache or ForecastCache of that
                size, but not both in one call.  Modified in place where there is a fresh.
            fresh: (B, k, C), dtype of x, contiguous.
            inverse: (B, N), int32, in [-1, k): the row of `fresh` for each token, -1 for none.
        inplace: write the sum into x instead of a new tensor.
        backend: None chooses by device; a name is used or refused.

    Returns:
        (B, N, C), dtype of x: a new tensor, or x.

    Raises:
        ValueError: a shape, dtype, device or layout differs, or a slot is out of [-1, k).
        RuntimeError: the named backend is not available here.
    """
    _checks.tensor("x", x, ("B", "N", "C"), dtype=_checks.FLOATS)
    if not 1 <= len(updates) <= MAX_UPDATES:
        raise ValueError(f"updates: expected 1 to {MAX_UPDATES}, got {len(updates)}")
    gates, caches, scales, forecasts, fresh, inverse = zip(
        *(checked_update(f"updates[{u}]", update, x) for u, update in enumerate(updates)),
        strict=True,
    )
    body = _library.scatter_residual_inplace if inplace else _library.scatter_residual
    backend = resolve(backend, x.device, op="scatter_residual")
    if any(forecast is not None for forecast in forecasts):
        written, *rest = with_slopes(caches, scales, forecasts, fresh)
        return body(x, gates, written, fresh, inverse, backend, *rest)
    caches += tuple(scale for scale in scales if scale is not None)
    return body(x, gates, caches, fresh, inverse, backend)


def store_rows(cache: Cache, rows: Tensor, *, backend: str | None = None) -> None:
    """Write every row of a cache: what a full step does.

        cache[b, n] = rows[b, n]      (by the rules of QuantizedCache and ForecastCache)

    Args:
        cache: (B, N, C), dtype of rows, contiguous, or a QuantizedCache or ForecastCache of that
            size.  Modified in place.
        rows: (B, N, C), float32 | bfloat16 | float16, contiguous.
        backend: None chooses by device; a name is used or refused.

    Raises:
        ValueError: a shape, dtype, device or layout differs; the message gives both.
        RuntimeError: the named backend is not available here.
    """
    _checks.tensor("rows", rows, ("B", "N", "C"), dtype=_checks.FLOATS)
    values, scale, forecast = checked("cache", cache, rows)
    backend = resolve(backend, rows.device, op="store_rows")
    if forecast is not None:
        _, slopes, distance, computed = forecast
        _library.store_rows(values, None, slopes, distance, computed, rows, backend)
    elif scale is not None:
        _library.store_rows(values, scale, (), None, 0, rows, backend)
    else:
        values.copy_(rows)


def read_rows(
    cache: Cache,
    index: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """What a cache stands for, all rows or the selected ones: for code that takes a plain tensor.

        out[b, j] = cache[b, index[b, j]]      (by the rules of QuantizedCache and ForecastCache)

    Args:
        cache: (B, N, C), float32 | bfloat16 | float16, contiguous, or a QuantizedCache or
            ForecastCache of that size.
        index: (B, k), int64, in [0, N); None takes every token (k = N).
        dtype: float32 | bfloat16 | float16, of the rows of a QuantizedCache, which does not know
            it; any other cache has its own.
        backend: None chooses by device; a name is used or refused.

    Returns:
        (B, k, C), a new tensor.

    Raises:
        ValueError: a shape, dtype, device or layout differs, or an index is out of [0, N).
        RuntimeError: the named backend is not available here.
    """
    eight_bit, shape = isinstance(cache, QuantizedCache), ("B", "N", "C")
    if isinstance(cache, QuantizedCache | ForecastCache):
        floats = None if eight_bit else _checks.FLOATS
        like = _checks.tensor("cache values", cache.values, shape, dtype=floats)
    else:
        like = _checks.tensor("cache", cache, shape, dtype=_checks.FLOATS)
    values, scale, forecast = checked("cache", cache, like)
    if dtype is None and not eight_bit:
        dtype = values.dtype
    dtype = _checks.dtype("dtype", dtype, _checks.FLOATS if eight_bit else (values.dtype,))
    if index is not None:
        rows = (values.shape[0], "k")
        _checks.tensor("index", index, rows, dtype=torch.int64, device=values.device)
    slopes, distance = read_by(forecast)
    backend = resolve(backend, values.device, op="read_rows")
    return _library.read_rows(values, index, scale, slopes, distance, dtype, backend)


def partial_mlp(
    x: Tensor,
    selection: tuple[Tensor, Tensor],
    modulation: tuple[Tensor, Tensor, Tensor],
    cache: Cache,
    fc1: Linear,
    fc2: Linear,
    *,
    residual: Residual | None = None,
    activation: str = "gelu_tanh",
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A cached step of a block: reuse the attention, recompute the MLP of the selected tokens.

        rows  = gather_modulate(x, index, shift, scale, residual=residual)
        cache[index] = mlp_rows(rows, fc1, fc2)
        out   = x + gate_a * cache_a + gate * cache             (residual = (gate_a, cache_a))

    Args:
        x: (B, N, C), contiguous.
        selection: (index, inverse) of this layer, see `Selection.rows`.
        modulation: (shift, scale, gate) of the MLP, as in `gather_modulate`.
        cache: (B, N, C), or a QuantizedCache or ForecastCache: the MLP's cached output.  Modified
            in place.
        fc1, fc2, activation: as in `mlp_rows`.
        residual: (gate, cache) of the reused attention, added to every token.
        norm, weight, bias, eps: as in `gather_modulate`.
        inplace, backend: as in `scatter_residual`.

    Returns:
        (B, N, C), dtype of x.

    Raises:
        ValueError, RuntimeError: as the three ops it is made of.
    """
    index, inverse = selection
    _checks.tensor("index", index, ("B", "k"), dtype=torch.int64, device=x.device)
    shift, scale, gate = modulation
    updates: list[Update] = [] if residual is None else [residual]
    if index.shape[1] == 0:
        updates.append((gate, cache))
        return scatter_residual(x, updates, inplace=inplace, backend=backend)
    rows = gather_modulate(
        x,
        index,
        shift,
        scale,
        residual=residual,
        norm=norm,
        weight=weight,
        bias=bias,
        eps=eps,
        backend=backend,
    )
    fresh = mlp_rows(rows, fc1, fc2, activation=activation, backend=backend)
    updates.append((gate, cache, fresh, inverse))
    return scatter_residual(x, updates, inplace=inplace, backend=backend)
