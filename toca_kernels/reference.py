"""Op bodies in plain PyTorch: the specification that every backend is tested against.

Written to be read.  Arithmetic is in float32 and rounded once, as the contracts in ops.py say;
inputs were checked there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import ForecastCache, forecast_order

EIGHT_BIT_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def attention_scores(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> Tensor:
    B, H, _, _ = q.shape
    score = q.new_zeros((B, k.shape[2]), dtype=torch.float32)
    for h in range(H):  # one head at a time: the map of all heads need not fit
        logits = torch.matmul(q[:, h].float(), k[:, h].float().transpose(-1, -2)) * scale
        score += torch.exp(logits - lse[:, h, :, None]).sum(dim=1)
    return score / max(H, 1)


def attention_entropy(
    q: Tensor, k: Tensor, lse: Tensor | None, scale: float, mask: Tensor | None
) -> Tensor:
    B, H, N, _ = q.shape
    if lse is None:
        _, lse = partial_attention(q, k, k, scale, mask)
    p = q.new_zeros((B, N, k.shape[2]), dtype=torch.float32)
    for h in range(H):
        logits = torch.matmul(q[:, h].float(), k[:, h].float().transpose(-1, -2)) * scale
        p += torch.exp(logits - lse[:, h, :, None])
    p /= max(H, 1)
    if mask is not None:
        p = p.masked_fill(~mask[:, None], 0.0)
    return -(p * torch.log(p + 1e-7)).sum(dim=-1)


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, H, Nq, D = q.shape
    out = q.new_empty((B, Nq, H, D))
    lse = q.new_empty((B, H, Nq), dtype=torch.float32)
    for h in range(H):  # one head at a time: the map of all heads need not fit
        logits = torch.matmul(q[:, h].float(), k[:, h].float().transpose(-1, -2)) * scale
        value = v[:, h].float()
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None], -torch.inf)
            value = value.masked_fill(~mask[:, :, None], 0.0)
        lse[:, h] = torch.logsumexp(logits, dim=-1)
        # No key at all: a log-sum-exp of -inf, and weights of 0.
        shift = lse[:, h, :, None].masked_fill(lse[:, h, :, None] == -torch.inf, 0.0)
        out[:, :, h] = torch.matmul(torch.exp(logits - shift), value).to(q.dtype)
    return out.flatten(2), lse


def scored_attention(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float, max_exponent: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, _, _ = q.shape
    score = q.new_zeros((B, k.shape[2]), dtype=torch.float32)
    for h in range(H):
        logits = torch.matmul(q[:, h].float(), k[:, h].float().transpose(-1, -2)) * scale
        score += torch.exp((logits - lse[:, h, :, None]).clamp(max=max_exponent)).sum(dim=1)
    return *partial_attention(q, k, v, scale, None), score / max(H, 1)


def select_tokens(
    score: Tensor,
    age: Tensor,
    k: Sequence[int],
    age_weight: float,
    grid: Sequence[int],
    cell: int,
    bonus: float,
) -> tuple[Tensor, Tensor, Tensor]:
    R, N = score.shape
    total = score + age_weight * age.float()
    nan = total.isnan()
    total = total.masked_fill(nan, -torch.inf)
    if cell > 1 and bonus != 0.0 and N > 0:
        best = _cell_maxima(total, grid, cell)
        total = torch.where(best, total * (1.0 + total.new_tensor(bonus)), total)
    # A stable sort keeps equal scores in index order: the lower index wins.
    order = torch.sort(total, dim=1, descending=True, stable=True).indices
    age += 1
    inverse = torch.full((R, N), -1, dtype=torch.int32, device=score.device)
    rows = []
    for r in range(R):
        index = order[r, : k[r]].sort().values
        inverse[r, index] = torch.arange(k[r], dtype=torch.int32, device=score.device)
        age[r, index] = 0
        rows.append(index)
    index = torch.cat(rows) if rows else score.new_zeros(0, dtype=torch.int64)
    return index, inverse, nan.sum(dim=1, dtype=torch.int32)


def _cell_maxima(total: Tensor, grid: Sequence[int], cell: int) -> Tensor:
    """(R, N) bool: the first maximum of every cell x cell tile of the token grid."""
    R, N = total.shape
    frames, rows, cols = grid
    pad_rows, pad_cols = -rows % cell, -cols % cell
    tiled = F.pad(total.view(R * frames, rows, cols), (0, pad_cols, 0, pad_rows), value=-torch.inf)
    tiled = tiled.unfold(1, cell, cell).unfold(2, cell, cell).flatten(3)
    position = torch.arange(N, device=total.device).view(1, frames, rows, cols)
    position = F.pad(position, (0, pad_cols, 0, pad_rows), value=N)
    position = position.unfold(2, cell, cell).unfold(3, cell, cell).flatten(4)
    # Among equal maxima the lowest token position, never a pad.
    position = position.expand(R, *position.shape[1:]).reshape(tiled.shape)
    is_max = tiled == tiled.amax(dim=-1, keepdim=True)
    first = torch.where(is_max, position, N).amin(dim=-1).view(R, -1)
    return torch.zeros_like(total, dtype=torch.bool).scatter_(1, first, True)


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
    if index is not None:
        _check_range("index", index, 0, x.shape[1])

    def rows(value: Tensor) -> Tensor:
        """The selected rows in float32; a (B, C) value serves every row of its sample."""
        return value[:, None].float() if value.ndim == 2 else _selected(value, index).float()

    row = rows(x)
    if cache is not None:
        cached = rows(_read(cache, cache_scale, slopes, distance))
        row = row + (cached if gate is None else rows(gate) * cached)
    if norm == "layer":
        row = row - row.mean(dim=-1, keepdim=True)
    row = row * torch.rsqrt(row.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        row = row * weight.float()
    if bias is not None:
        row = row + bias.float()
    return (row * (1.0 + rows(scale)) + rows(shift)).to(x.dtype)


def mlp_rows(
    rows: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
) -> Tensor:
    return F.linear(activate(F.linear(rows, weight1, bias1), activation), weight2, bias2)


def activate(hidden: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(hidden)
    return F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")


def scatter_residual(
    x: Tensor,
    gates: Sequence[Tensor | None],
    caches: Sequence[Tensor],
    fresh: Sequence[Tensor | None],
    inverse: Sequence[Tensor | None],
    out: Tensor,
    scales: Sequence[Tensor | None] | None = None,
    forecasts: Sequence[ForecastCache | None] | None = None,
) -> None:
    for rows, slot in zip(fresh, inverse, strict=True):  # all of them before a cache is written
        if rows is not None and slot is not None:
            _check_range("inverse", slot, -1, rows.shape[1])
    total = x.float()
    scales = scales or [None] * len(caches)
    forecasts = forecasts or [None] * len(caches)
    for gate, cache, scale, forecast, rows, slot in zip(
        gates, caches, scales, forecasts, fresh, inverse, strict=True
    ):
        if forecast is None:
            value = _read(cache, scale)
        else:
            slopes = forecast.slopes[: forecast_order(forecast)]
            value = _read(cache, None, slopes, forecast.distance)
        if rows is not None and slot is not None and rows.shape[1] > 0:
            selected = (slot >= 0)[:, :, None]
            moved = rows.gather(1, slot.clamp(min=0).long()[:, :, None].expand_as(cache))
            if forecast is not None:
                for slope, new in zip(forecast.slopes, _differences(forecast, moved), strict=True):
                    slope.copy_(torch.where(selected, new, slope))
            if scale is None:
                cache.copy_(torch.where(selected, moved, cache))
            else:
                values, row_scale = quantize(moved, cache.dtype)
                cache.copy_(torch.where(selected, values, cache))
                scale.copy_(torch.where(slot >= 0, row_scale, scale))
            value = torch.where(selected, moved.float(), value)
        if gate is not None:
            value = (gate[:, None] if gate.ndim == 2 else gate).float() * value
        total = total + value
    out.copy_(total)


def store_rows(
    values: Tensor, scale: Tensor | None, rows: Tensor, forecast: ForecastCache | None = None
) -> None:
    if forecast is not None:
        for slope, new in zip(forecast.slopes, _differences(forecast, rows), strict=True):
            slope.copy_(new)
        values.copy_(rows)
    elif scale is not None:
        rounded, row_scale = quantize(rows, values.dtype)
        values.copy_(rounded)
        scale.copy_(row_scale)


def read_rows(
    values: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    slopes: Sequence[Tensor],
    distance: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    if index is not None:
        _check_range("index", index, 0, values.shape[1])
    rows = _selected(_read(values, scale, slopes, distance), index)
    return rows.to(dtype, copy=True)


def _selected(value: Tensor, index: Tensor | None) -> Tensor:
    """(B, k, C): the rows of (B, N, C) that the index names; all of them without one."""
    if index is None:
        return value
    return value.gather(1, index[:, :, None].expand(-1, -1, value.shape[2]))


def _read(
    values: Tensor,
    scale: Tensor | None,
    slopes: Sequence[Tensor] = (),
    distance: Tensor | None = None,
) -> Tensor:
    """What a cache stands for, in float32: Taylor's polynomial in the distance, of these slopes."""
    read = values.float() if scale is None else values.float() * scale[:, :, None]
    if distance is None:
        return read
    factor = torch.ones_like(distance)
    for order, slope in enumerate(slopes, start=1):
        factor = factor * distance / order
        read = read + factor[:, :, None] * slope.float()
    return read


def _differences(forecast: ForecastCache, rows: Tensor) -> list[Tensor]:
    """The slopes of a cache after every token was computed anew, in float32."""
    values, slopes, distance, computed = forecast
    steps = distance[:, :, None]
    new: list[Tensor] = []
    latest, before = rows.float(), values
    for order, slope in enumerate(slopes):
        # The difference from what was not there before is 0, whatever is in that memory.
        known = computed > order
        latest = (latest - before.float()) / steps if known else torch.zeros_like(latest)
        new.append(latest)
        before = slope
    return new


def quantize(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(values, scale) of the rows in 8 bits; every operation rounds once, so all bodies agree."""
    rows = rows.float()
    largest = rows.abs().amax(dim=-1) if rows.shape[-1] else rows.new_zeros(rows.shape[:-1])
    scale = largest * (1.0 / EIGHT_BIT_MAX[dtype])
    scale = scale.masked_fill(scale < torch.finfo(torch.float32).tiny, 0.0)
    scale = scale.masked_fill(~largest.isfinite(), torch.nan)
    values = rows * scale.reciprocal()[..., None]
    values = values.masked_fill(~(scale > 0.0)[..., None], 0.0)
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale


def _check_range(name: str, index: Tensor, low: int, stop: int) -> None:
    """Refuse an index out of [low, stop).  On a GPU this would wait for the device: not there."""
    if index.device.type != "cpu" or index.numel() == 0:
        return
    least, most = index.aminmax()
    if least < low or most >= stop:
        raise ValueError(
            f"{name}: expected values in [{low}, {stop}), got {least.item()} to {most.item()}"
        )


# --- dense attention, which is the library's -----------------------------------------------------

_FLASH = 1  # SDPBackend.FLASH_ATTENTION, as _fused_sdp_choice numbers it


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, scale: float
) -> tuple[Tensor, Tensor]:
    """((B, Nq, H, D), lse): with heads behind queries, as flash kernels lay them out."""
    choice = torch._fused_sdp_choice(q, k, v, None, dropout_p, False, scale=scale)
    if choice == _FLASH and q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, dropout_p, False, scale=scale
        )
    elif choice == _FLASH and q.device.type == "cuda" and q.shape[-1] % 8 == 0:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, dropout_p, False, False, scale=scale
        )[:2]
    else:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
        lse = torch.stack(  # one head at a time: the map of all heads need not fit
            [
                torch.logsumexp(q[:, h].float() @ k[:, h].float().mT * scale, dim=-1)
                for h in range(q.shape[1])
            ],
            dim=1,
        )
    return out.transpose(1, 2).contiguous(), lse.contiguous()
