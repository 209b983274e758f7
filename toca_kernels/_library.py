"""torch.library schemas of the ops, their fakes, and one body per op that calls the backend.

Registered by define/impl: `torch.library.custom_op` would add 10 us to every call.  The schema
carries the backend's name, so a compiled graph keeps the choice that was made when it was traced.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from . import native, reference
from .features import ForecastCache


class _Bodies(dict[str, Any]):
    """Name of a backend -> the module with its bodies; what is not here is imported on first use.

    That is the package of the Triton kernels: importing it imports Triton.
    """

    def __missing__(self, backend: str) -> Any:
        self[backend] = importlib.import_module(f".{backend}", __package__)
        return self[backend]


_BODIES = _Bodies(reference=reference, native=native)

_library = torch.library.Library("toca", "DEF")


def _define(schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"toca::{name}", fake, lib=_library)
    return getattr(torch.ops.toca, name).default


def _attention_scores(q: Tensor, k: Tensor, lse: Tensor, scale: float, backend: str) -> Tensor:
    return _BODIES[backend].attention_scores(q, k, lse, scale)


def _attention_scores_fake(q: Tensor, k: Tensor, lse: Tensor, scale: float, backend: str) -> Tensor:
    return q.new_empty((k.shape[0], k.shape[2]), dtype=torch.float32)


attention_scores = _define(
    "attention_scores(Tensor q, Tensor k, Tensor lse, float scale, str backend) -> Tensor",
    _attention_scores,
    _attention_scores_fake,
)


def _attention_with_lse_fake(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, scale: float
) -> tuple[Tensor, Tensor]:
    B, H, N, D = q.shape
    return q.new_empty((B, N, H, D)), q.new_empty((B, H, N), dtype=torch.float32)


# One body for all backends: dense attention is the library's.
attention_with_lse = _define(
    "attention_with_lse(Tensor q, Tensor k, Tensor v, float dropout_p, float scale) "
    "-> (Tensor, Tensor)",
    reference.attention_with_lse,
    _attention_with_lse_fake,
)


def _attention_entropy(
    q: Tensor, k: Tensor, lse: Tensor | None, scale: float, mask: Tensor | None, backend: str
) -> Tensor:
    return _BODIES[backend].attention_entropy(q, k, lse, scale, mask)


def _attention_entropy_fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2]), dtype=torch.float32)


attention_entropy = _define(
    "attention_entropy(Tensor q, Tensor k, Tensor? lse, float scale, Tensor? mask, str backend) "
    "-> Tensor",
    _attention_entropy,
    _attention_entropy_fake,
)


def _partial_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return _BODIES[backend].partial_attention(q, k, v, scale, mask)


def _partial_attention_fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    B, H, Nq, D = q.shape
    return q.new_empty((B, Nq, H * D)), q.new_empty((B, H, Nq), dtype=torch.float32)


partial_attention = _define(
    "partial_attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? mask, str backend) "
    "-> (Tensor, Tensor)",
    _partial_attention,
    _partial_attention_fake,
)


def _scored_attention(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float, max_exponent: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _BODIES[backend].scored_attention(q, k, v, lse, scale, max_exponent)


def _scored_attention_fake(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = _partial_attention_fake(q)
    return out, lse, q.new_empty((k.shape[0], k.shape[2]), dtype=torch.float32)


scored_attention = _define(
    "scored_attention(Tensor q, Tensor k, Tensor v, Tensor lse, float scale, float max_exponent, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    _scored_attention,
    _scored_attention_fake,
)


def _select_tokens(
    score: Tensor,
    age: Tensor,
    k: Sequence[int],
    age_weight: float,
    grid: Sequence[int],
    cell: int,
    bonus: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _BODIES[backend].select_tokens(score, age, k, age_weight, grid, cell, bonus)


def _select_tokens_fake(
    score: Tensor, age: Tensor, k: Sequence[int], *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        score.new_empty((sum(k),), dtype=torch.int64),
        torch.empty_like(age),
        score.new_empty((score.shape[0],), dtype=torch.int32),
    )


select_tokens = _define(
    "select_tokens(Tensor score, Tensor(a!) age, SymInt[] k, float age_weight, SymInt[] grid, "
    "SymInt cell, float bonus, str backend) -> (Tensor, Tensor, Tensor)",
    _select_tokens,
    _select_tokens_fake,
)


def _gather_modulate(
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
    backend: str,
    cache_scale: Tensor | None = None,
    slopes: Sequence[Tensor] | None = None,
    distance: Tensor | None = None,
) -> Tensor:
    given = (x, index, shift, scale, gate, cache, weight, bias, norm, eps, cache_scale)
    if not slopes:
        return _BODIES[backend].gather_modulate(*given)
    return _BODIES[backend].gather_modulate(*given, slopes, distance)


def _gather_modulate_fake(x: Tensor, index: Tensor | None, *_: object) -> Tensor:
    k = x.shape[1] if index is None else index.shape[1]
    return x.new_empty((x.shape[0], k, x.shape[2]))


gather_modulate = _define(
    "gather_modulate(Tensor x, Tensor? index, Tensor shift, Tensor scale, Tensor? gate, "
    "Tensor? cache, Tensor? weight, Tensor? bias, str norm, float eps, str backend, "
    "Tensor? cache_scale=None, Tensor[]? slopes=None, Tensor? distance=None) -> Tensor",
    _gather_modulate,
    _gather_modulate_fake,
)


def _mlp_rows(
    rows: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    backend: str,
) -> Tensor:
    return _BODIES[backend].mlp_rows(rows, weight1, bias1, weight2, bias2, activation)


def _mlp_rows_fake(rows: Tensor, *_: object) -> Tensor:
    return torch.empty_like(rows)


mlp_rows = _define(
    "mlp_rows(Tensor rows, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, "
    "str activation, str backend) -> Tensor",
    _mlp_rows,
    _mlp_rows_fake,
)


def _split(
    tensors: Sequence[Tensor],
    distance: Sequence[Tensor] | None,
    slopes: Sequence[int],
    computed: Sequence[int],
    updates: int,
) -> tuple[Any, ...]:
    """The cache of every update; then, where any has one, the scales, and the forecasts.

    A schema cannot mutate a list with gaps, so what is written of 8-bit caches (scales) and of
    forecast caches (`slopes` of each update) follows the caches.
    """
    if len(tensors) == updates:
        return (tensors,)
    caches, rest = tensors[:updates], iter(tensors[updates:])
    if distance is None:
        return caches, [next(rest) if cache.dtype.itemsize == 1 else None for cache in caches]
    distances = iter(distance)
    return (
        caches,
        None,
        [
            ForecastCache(cache, tuple(islice(rest, count)), next(distances), known)
            if count
            else None
            for cache, count, known in zip(caches, slopes, computed, strict=True)
        ],
    )


def _scatter_residual(
    x: Tensor,
    gates: Sequence[Tensor | None],
    caches: Sequence[Tensor],
    fresh: Sequence[Tensor | None],
    inverse: Sequence[Tensor | None],
    backend: str,
    distance: Sequence[Tensor] | None = None,
    slopes: Sequence[int] = (),
    computed: Sequence[int] = (),
) -> Tensor:
    out = torch.empty_like(x)
    caches, *rest = _split(caches, distance, slopes, computed, len(gates))
    _BODIES[backend].scatter_residual(x, gates, caches, fresh, inverse, out, *rest)
    return out


def _scatter_residual_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


_UPDATES = (
    "Tensor?[] fresh, Tensor?[] inverse, str backend, Tensor[]? distance=None, int[] slopes=[], "
    "int[] computed=[]"
)

scatter_residual = _define(
    f"scatter_residual(Tensor x, Tensor?[] gates, Tensor(a!)[] caches, {_UPDATES}) -> Tensor",
    _scatter_residual,
    _scatter_residual_fake,
)


def _scatter_residual_inplace(
    x: Tensor,
    gates: Sequence[Tensor | None],
    caches: Sequence[Tensor],
    fresh: Sequence[Tensor | None],
    inverse: Sequence[Tensor | None],
    backend: str,
    distance: Sequence[Tensor] | None = None,
    slopes: Sequence[int] = (),
    computed: Sequence[int] = (),
) -> None:
    caches, *rest = _split(caches, distance, slopes, computed, len(gates))
    _BODIES[backend].scatter_residual(x, gates, caches, fresh, inverse, x, *rest)


def _scatter_residual_inplace_fake(x: Tensor, *_: object) -> None:
    return None


_scatter_residual_inplace_op = _define(
    f"scatter_residual_(Tensor(a!) x, Tensor?[] gates, Tensor(b!)[] caches, {_UPDATES}) -> ()",
    _scatter_residual_inplace,
    _scatter_residual_inplace_fake,
)


def scatter_residual_inplace(x: Tensor, *arguments: Any) -> Tensor:
    _scatter_residual_inplace_op(x, *arguments)
    return x


def _store_rows(
    values: Tensor,
    scale: Tensor | None,
    slopes: Sequence[Tensor],
    distance: Tensor | None,
    computed: int,
    rows: Tensor,
    backend: str,
) -> None:
    if distance is None:
        _BODIES[backend].store_rows(values, scale, rows)
    else:
        forecast = ForecastCache(values, tuple(slopes), distance, computed)
        _BODIES[backend].store_rows(values, scale, rows, forecast)


def _store_rows_fake(values: Tensor, *_: object) -> None:
    return None


# scale: of an 8-bit cache; slopes, distance, computed: of a ForecastCache.
store_rows = _define(
    "store_rows(Tensor(a!) values, Tensor(b!)? scale, Tensor(c!)[] slopes, Tensor? distance, "
    "int computed, Tensor rows, str backend) -> ()",
    _store_rows,
    _store_rows_fake,
)


def _read_rows(
    values: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    slopes: Sequence[Tensor],
    distance: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return _BODIES[backend].read_rows(values, index, scale, slopes, distance, dtype)


def _read_rows_fake(
    values: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    slopes: Sequence[Tensor],
    distance: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    k = values.shape[1] if index is None else index.shape[1]
    return values.new_empty((values.shape[0], k, values.shape[2]), dtype=dtype)


read_rows = _define(
    "read_rows(Tensor values, Tensor? index, Tensor? scale, Tensor[] slopes, Tensor? distance, "
    "ScalarType dtype, str backend) -> Tensor",
    _read_rows,
    _read_rows_fake,
)
