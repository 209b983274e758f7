"""NumPy float64 oracles of the ops: explicit loops, no torch, nothing shared with the package.

Inputs are the float64 values of the tensors that the op got.  Every oracle of a floating-point op
says how far float32 arithmetic may stray from it, so that no test needs a tolerance of its own.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

erf = np.vectorize(math.erf, otypes=[np.float64])


class Exact(NamedTuple):
    """An exact result, and what the rounding of a float32 evaluation is relative to.

    Attributes:
        value: the result.
        magnitude: of its shape; the sum of the absolute values of the terms that `value` is the sum
            of, each weighted by how much it amplifies the error of its own inputs.
        roundings: float32 roundings on the longest path from an input to `value`.
    """

    value: np.ndarray
    magnitude: np.ndarray
    roundings: int


def attention_scores(q: np.ndarray, k: np.ndarray, lse: np.ndarray, scale: float) -> Exact:
    B, H, Nq, D = q.shape
    N = k.shape[2]
    value, magnitude = np.zeros((B, N)), np.zeros((B, N))
    for b in range(B):
        for h in range(H):
            logit = scale * q[b, h] @ k[b, h].T
            # exp turns an absolute error of the exponent into a relative one of the term.
            amplified = 1 + abs(scale) * (abs(q[b, h]) @ abs(k[b, h]).T) + abs(lse[b, h, :, None])
            term = np.exp(logit - lse[b, h, :, None]) / H
            value[b] += term.sum(axis=0)
            magnitude[b] += (term * amplified).sum(axis=0)
    return Exact(value, magnitude, roundings=D + Nq + H + 8)


def attention_entropy(
    q: np.ndarray, k: np.ndarray, lse: np.ndarray, scale: float, mask: np.ndarray | None = None
) -> Exact:
    B, H, N, D = q.shape
    L = k.shape[2]
    mask = np.ones((B, L), dtype=bool) if mask is None else mask
    value, magnitude = np.zeros((B, N)), np.zeros((B, N))
    for b in range(B):
        p, size = np.zeros((N, mask[b].sum())), np.zeros((N, mask[b].sum()))
        for h in range(H):
            key = k[b, h][mask[b]]
            term = np.exp(scale * q[b, h] @ key.T - lse[b, h, :, None]) / H
            amplified = 1 + abs(scale) * (abs(q[b, h]) @ abs(key).T) + abs(lse[b, h, :, None])
            p += term
            size += term * amplified
        log = np.log(p + 1e-7)
        value[b] = -(p * log).sum(axis=1)
        # An error of p enters the sum by the derivative ln(p + e) + p / (p + e).
        magnitude[b] = (abs(p * log) + (abs(log) + 1) * size).sum(axis=1)
    return Exact(value, magnitude, roundings=D + L + H + 12)


def partial_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    mask: np.ndarray | None = None,
) -> tuple[Exact, Exact]:
    """(out, log-sum-exp)."""
    B, H, Nq, D = q.shape
    N = k.shape[2]
    mask = np.ones((B, N), dtype=bool) if mask is None else mask
    out, out_size = np.zeros((B, Nq, H, D)), np.zeros((B, Nq, H, D))
    lse, lse_size = np.full((B, H, Nq), -np.inf), np.zeros((B, H, Nq))
    for b in range(B):
        for h in range(H):
            key, value = k[b, h][mask[b]], v[b, h][mask[b]]
            if len(key) == 0:
                continue
            logit = scale * q[b, h] @ key.T
            peak = logit.max(axis=1, keepdims=True)
            weight = np.exp(logit - peak)
            total = weight.sum(axis=1, keepdims=True)
            weight /= total
            lse[b, h] = (peak + np.log(total))[:, 0]
            # Errors of the logits move every weight: those of a key, and those of the sum.
            amplified = 1 + abs(scale) * (abs(q[b, h]) @ abs(key).T) + abs(peak)
            common = (weight * amplified).sum(axis=1, keepdims=True)
            lse_size[b, h] = (abs(lse[b, h, :, None]) + common)[:, 0]
            out[b, :, h] = weight @ value
            out_size[b, :, h] = (weight * (amplified + common)) @ abs(value)
    shape = (B, Nq, H * D)
    roundings = D + N + 12
    return (
        Exact(out.reshape(shape), out_size.reshape(shape), roundings),
        Exact(lse, lse_size, roundings),
    )


@np.errstate(over="ignore", invalid="ignore")
def select_tokens(
    score: np.ndarray,
    age: np.ndarray,
    k: Sequence[int],
    age_weight: float = 0.0,
    grid: Sequence[int] | None = None,
    cell: int = 1,
    bonus: float = 0.0,
) -> tuple[list[list[int]], np.ndarray, np.ndarray, np.ndarray]:
    """(index of every row, inverse, nan, new age).

    Scores are float32 here: their rounding decides which of them are equal, and so who is selected.
    """
    R, N = score.shape
    one = np.float32(1)
    inverse, new_age = np.full((R, N), -1), age + 1
    index, nan = [], []
    for r in range(R):
        total = [
            np.float32(s) + np.float32(age_weight) * np.float32(a)
            for s, a in zip(score[r], age[r], strict=True)
        ]
        nan.append(sum(bool(np.isnan(value)) for value in total))
        total = [np.float32(-np.inf) if np.isnan(value) else value for value in total]
        for tile in tiles(grid, cell) if cell > 1 and bonus else []:
            best = max(tile, key=lambda n: (total[n], -n))
            total[best] = total[best] * (one + np.float32(bonus))
        ranked = sorted(range(N), key=lambda n: (-total[n], n))
        index.append(sorted(ranked[: k[r]]))
        for slot, n in enumerate(index[r]):
            inverse[r, n] = slot
            new_age[r, n] = 0
    return index, inverse, np.array(nan, dtype=np.int64), new_age


def tiles(grid: Sequence[int], cell: int) -> list[list[int]]:
    """The tokens of every cell x cell tile of a grid (rows, cols) or (frames, rows, cols)."""
    frames, rows, cols = grid if len(grid) == 3 else (1, *grid)
    found: dict[tuple[int, int, int], list[int]] = {}
    for f in range(frames):
        for y in range(rows):
            for x in range(cols):
                found.setdefault((f, y // cell, x // cell), []).append((f * rows + y) * cols + x)
    return list(found.values())


def gather_modulate(
    x: np.ndarray,
    index: np.ndarray | None,
    shift: np.ndarray,
    scale: np.ndarray,
    residual: tuple[np.ndarray | None, "np.ndarray | Forecast"] | None = None,
    norm: str = "layer",
    weight: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    eps: float = 1e-6,
) -> Exact:
    B, N, C = x.shape
    index = np.tile(np.arange(N), (B, 1)) if index is None else index
    weight = np.ones(C) if weight is None else weight
    bias = np.zeros(C) if bias is None else bias
    value = np.zeros((B, index.shape[1], C))
    magnitude = np.zeros_like(value)
    gate, cache = residual or (None, np.zeros_like(x))
    for b in range(B if C else 0):
        for j, n in enumerate(index[b]):
            cached, reach = read(cache, b, n)
            factor = 1.0 if gate is None else at(gate, b, n)
            row, size = x[b, n] + factor * cached, abs(x[b, n]) + abs(factor) * reach
            mean = row.mean() if norm == "layer" else 0.0
            std = math.sqrt(((row - mean) ** 2).mean() + eps)
            normal = (row - mean) / std
            # An error of the mean moves every channel; one of the deviation scales them.
            size = (size + size.mean()) / std + abs(normal) * (1 + size.mean() / std)
            factor = 1 + at(scale, b, n)
            value[b, j] = (normal * weight + bias) * factor + at(shift, b, n)
            reach = 1 + abs(at(scale, b, n))
            magnitude[b, j] = (size * abs(weight) + abs(bias)) * reach + abs(at(shift, b, n))
    return Exact(value, magnitude, roundings=C + 12 + FORECAST_ROUNDINGS * is_forecast(cache))


def mlp_rows(
    rows: np.ndarray,
    weight1: np.ndarray,
    bias1: np.ndarray | None,
    weight2: np.ndarray,
    bias2: np.ndarray | None,
    activation: str,
) -> Exact:
    bias1 = np.zeros(len(weight1)) if bias1 is None else bias1
    bias2 = np.zeros(len(weight2)) if bias2 is None else bias2
    hidden = rows @ weight1.T + bias1
    size = abs(rows) @ abs(weight1).T + abs(bias1)
    value = ACTIVATIONS[activation](hidden) @ weight2.T + bias2
    # No activation here is steeper than 1.2, and none exceeds its argument.
    magnitude = 1.2 * size @ abs(weight2).T + abs(bias2)
    return Exact(value, magnitude, roundings=len(weight1) + rows.shape[2] + 20)


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": lambda h: 0.5 * h * (1 + erf(h / math.sqrt(2))),
    "gelu_tanh": lambda h: 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
    "silu": lambda h: h / (1 + np.exp(-h)),
}


def scatter_residual(
    x: np.ndarray, updates: Sequence[tuple["np.ndarray | Forecast | None", ...]]
) -> tuple[Exact, list[np.ndarray]]:
    """The sum, and every cache as it is afterwards: of a forecast, its values."""
    B, N, _ = x.shape
    value, magnitude, caches = x.copy(), abs(x), []
    for gate, cache, *moved in updates:
        after = (cache.values if is_forecast(cache) else cache).copy()
        for b in range(B):
            for n in range(N):
                added, size = read(cache, b, n)
                if moved and moved[1][b, n] >= 0:
                    added = after[b, n] = moved[0][b, moved[1][b, n]]
                    size = abs(added)
                factor = 1.0 if gate is None else at(gate, b, n)
                value[b, n] += factor * added
                magnitude[b, n] += abs(factor) * size
        caches.append(after)
    roundings = sum(2 + FORECAST_ROUNDINGS * is_forecast(cache) for _, cache, *_ in updates)
    return Exact(value, magnitude, roundings), caches


class Forecast(NamedTuple):
    """A cache that is extrapolated: (B, N, C), one or two of (B, N, C), (B, N), a count."""

    values: np.ndarray
    slopes: Sequence[np.ndarray]
    distance: np.ndarray
    computed: int


FORECAST_ROUNDINGS = 6  # of a forecast: d**2 / 2, two products, two sums, the product with a gate


def is_forecast(cache: object) -> bool:
    return isinstance(cache, Forecast)


def read(cache: np.ndarray | Forecast, b: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, magnitude) that a cache stands for."""
    if not isinstance(cache, Forecast):
        return cache[b, n], abs(cache[b, n])
    values, slopes, distance, computed = cache
    row, size, d = values[b, n].copy(), abs(values[b, n]), distance[b, n]
    for m, slope in enumerate(slopes, start=1):
        if computed > m:  # m differences are known after m + 1 full steps
            row += d**m / math.factorial(m) * slope[b, n]
            size += d**m / math.factorial(m) * abs(slope[b, n])
    return row, size


def differences(cache: Forecast, rows: np.ndarray) -> list[Exact]:
    """The slopes of a cache after every token was computed anew, as `rows`."""
    values, slopes, distance, computed = cache
    first, second = (np.zeros_like(rows) for _ in range(2))
    first_size, second_size = (np.zeros_like(rows) for _ in range(2))
    for b, n in np.ndindex(*distance.shape):
        d = distance[b, n]
        if computed >= 1:
            first[b, n] = (rows[b, n] - values[b, n]) / d
            first_size[b, n] = (abs(rows[b, n]) + abs(values[b, n])) / d
        if computed >= 2:
            second[b, n] = (first[b, n] - slopes[0][b, n]) / d
            second_size[b, n] = (first_size[b, n] + abs(slopes[0][b, n])) / d
    return [Exact(first, first_size, 2), Exact(second, second_size, 4)][: len(slopes)]


E4M3 = np.array(
    [m * 2.0**-9 for m in range(8)]
    + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
)  # the values >= 0 of float8_e4m3fn, by their code


def store_rows(rows: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """(values, scale) of the rows in 8 bits, "int8" or "float8_e4m3fn"."""
    values, scale = np.zeros(rows.shape), np.zeros(rows.shape[:-1])
    grid = np.arange(128.0) if dtype == "int8" else E4M3
    for at_row in np.ndindex(*rows.shape[:-1]):
        row = rows[at_row]
        if not np.isfinite(row).all():
            scale[at_row] = np.nan
            continue
        unit = abs(row).max(initial=0.0) / grid[-1]
        if unit < 2.0**-126:
            continue
        scale[at_row] = unit
        for c, value in enumerate(row):
            distance = abs(grid - abs(value) / unit)
            nearest = np.flatnonzero(distance == distance.min())
            code = min(nearest, key=lambda code: code % 2)  # of two, the even one
            values[at_row][c] = np.copysign(grid[code], value)
    return values, scale


def at(modulation: np.ndarray, b: int, n: int) -> np.ndarray:
    """The row of token n: of its sample where the modulation is (B, C), its own where (B, N, C)."""
    return modulation[b] if modulation.ndim == 2 else modulation[b, n]
