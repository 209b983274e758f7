"""What a module's features are cached as, and the checks of it.

A cache holds (B, N, C): as a plain tensor, in 8 bits, or with the finite differences by which a
stale token is extrapolated to the step that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import _checks

MAX_SLOPES = 2
_EIGHT_BIT = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True)
class QuantizedCache:
    """A cache in 8 bits: row[b, n] = values[b, n] * scale[b, n].

    A row is written, and rounded once, as

        scale  = max |row| / m                          m = 127 for int8, 448 for float8_e4m3fn
        values = round(row / scale)                     to the nearest; ties to even

    so it is read back to within scale / 2 (int8), or 1/16 of each value or scale / 1024 where that
    is more (float8).  The divisions are products with 1 / m and 1 / scale in float32, rounded, so
    that every body writes the same bits.  A row whose scale would be below 2**-126, such as one of
    zeros, gets scale 0 and values 0; one with a NaN or an infinity gets scale NaN and values 0, so
    all of it reads as NaN.

    Attributes:
        values: (B, N, C), int8 | float8_e4m3fn, contiguous.
        scale: (B, N), float32, contiguous.
    """

    values: Tensor
    scale: Tensor


class ForecastCache(NamedTuple):
    """A cache that is extrapolated to the step that reads it.

    With v = values, d = distance and s1, s2 = slopes, in float32, a token is read as

        v + d * s1 + d**2 / 2 * s2      its first m slopes only: m = min(len(slopes), computed - 1)

    that is the value itself until all tokens were computed twice.  When a token is computed anew,
    as f, its finite differences are taken over the d steps since it was computed last,

        computed >= 2:  s = (f - v) / d,  s2 = (s - s1) / d,  s1 = s
        computed == 1:  s1 = (f - v) / d,  s2 = 0
        computed == 0:  s1 = s2 = 0         (nothing is read: the tensors may be uninitialised)

    each rounded once to the dtype of the cache, and then v = f to the bit.  (TaylorSeer, Liu et
    al., ICCV 2025, arXiv 2503.06923, where all tokens are computed in the same steps and d is the
    number of steps since; here d is each token's own.)

    Attributes:
        values: (B, N, C), float32 | bfloat16 | float16, contiguous: every token as it was computed.
        slopes: one or two tensors like `values`: the first and the second difference per step.
        distance: (B, N), float32, contiguous, >= 1: steps since each token was computed.
        computed: how many times all tokens have been computed so far.
    """

    values: Tensor
    slopes: tuple[Tensor, ...]
    distance: Tensor
    computed: int


Cache: TypeAlias = Tensor | QuantizedCache | ForecastCache
Residual: TypeAlias = tuple[Tensor | None, Cache]
Update: TypeAlias = tuple[Tensor | None, Cache] | tuple[Tensor | None, Cache, Tensor, Tensor]


def forecast_order(cache: ForecastCache) -> int:
    """How many of its slopes a cache is read with."""
    if cache.computed <= 1:
        return 0
    return 1 if cache.computed == 2 else len(cache.slopes)


def read_by(forecast: ForecastCache | None) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The slopes that a cache is read with, and the distance where there are any."""
    if forecast is None:
        return (), None
    slopes = forecast.slopes[: forecast_order(forecast)]
    return slopes, forecast.distance if slopes else None


def checked(
    name: str, cache: Cache, x: Tensor
) -> tuple[Tensor, Tensor | None, ForecastCache | None]:
    """(values, scale, forecast) of a cache of x, (B, N, C).

    No scale where it is held in the dtype of x, no forecast where it is not extrapolated.
    """
    B, N, C = x.shape
    if isinstance(cache, ForecastCache):
        return cache.values, None, _checked_forecast(name, cache, x)
    if not isinstance(cache, QuantizedCache):
        _checks.tensor(name, cache, (B, N, C), dtype=x.dtype, device=x.device)
        return cache, None, None
    values, scale = cache.values, cache.scale
    _checks.tensor(f"{name} values", values, (B, N, C), dtype=_EIGHT_BIT, device=x.device)
    _checks.tensor(f"{name} scale", scale, (B, N), dtype=torch.float32, device=x.device)
    return values, scale, None


def _checked_forecast(name: str, cache: ForecastCache, x: Tensor) -> ForecastCache:
    """The cache, with a `computed` of at most 3: from there on it makes no difference.

    So that a compiled step has one graph for each of 0, 1, 2 and 3, not one for each full step.
    """
    values, slopes, distance, computed = cache
    size = x.shape
    if isinstance(values, Tensor) and values.dtype in _EIGHT_BIT:
        raise ValueError(
            f"{name} values: a ForecastCache is not held in 8 bits: expected dtype float32, "
            f"bfloat16 or float16, got {_checks.dtype_text(values.dtype)}"
        )
    _checks.tensor(f"{name} values", values, size, dtype=x.dtype, device=x.device)
    if not isinstance(slopes, tuple) or not 1 <= len(slopes) <= MAX_SLOPES:
        have = len(slopes) if isinstance(slopes, tuple) else type(slopes).__name__
        raise ValueError(f"{name} slopes: expected a tuple of 1 or {MAX_SLOPES}, got {have}")
    for order, slope in enumerate(slopes):
        _checks.tensor(f"{name} slopes[{order}]", slope, size, dtype=x.dtype, device=x.device)
    _checks.tensor(f"{name} distance", distance, size[:2], dtype=torch.float32, device=x.device)
    _checks.at_least(f"{name} computed", computed, 0)
    for known in (0, 1, 2):
        if computed == known:
            return ForecastCache(values, slopes, distance, known)
    return ForecastCache(values, slopes, distance, 3)


def checked_update(
    name: str, update: Update, x: Tensor
) -> tuple[
    Tensor | None,
    Tensor,
    Tensor | None,
    ForecastCache | None,
    Tensor | None,
    Tensor | None,
]:
    """(gate, values, scale, forecast, fresh, inverse) of an update of scatter_residual."""
    B, N, C = x.shape
    if len(update) not in (2, 4):
        raise ValueError(
            f"{name}: expected (gate, cache) or (gate, cache, fresh, inverse), "
            f"got {len(update)} values"
        )
    gate, cache = update[:2]
    if gate is not None:
        _checks.modulation(f"{name} gate", gate, x)
    values, scale, forecast = checked(f"{name} cache", cache, x)
    if len(update) == 2:
        return gate, values, scale, forecast, None, None
    fresh, inverse = update[2:]
    _checks.tensor(f"{name} fresh", fresh, (B, "k", C), dtype=x.dtype, device=x.device)
    _checks.tensor(f"{name} inverse", inverse, (B, N), dtype=torch.int32, device=x.device)
    return gate, values, scale, forecast, fresh, inverse


def with_slopes(
    values: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    forecasts: Sequence[ForecastCache | None],
    fresh: Sequence[Tensor | None],
) -> tuple[list[Tensor], list[Tensor], list[int], list[int]]:
    """(values and all slopes, distances, number of slopes, computed) of the updates of a call.

    Of a cache that gets nothing fresh, only the slopes that it is read with.
    """
    if any(scale is not None for scale in scales):
        raise ValueError(
            "updates: expected no QuantizedCache beside a ForecastCache, got both in one call"
        )
    slopes = [
        () if forecast is None else read_by(forecast)[0] if rows is None else forecast.slopes
        for forecast, rows in zip(forecasts, fresh, strict=True)
    ]
    return (
        [*values, *(slope for given in slopes for slope in given)],
        [f.distance for f, given in zip(forecasts, slopes, strict=True) if f is not None and given],
        [len(given) for given in slopes],
        [0 if forecast is None else forecast.computed for forecast in forecasts],
    )
