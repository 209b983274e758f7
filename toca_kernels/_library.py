"""torch.library schemas of the ops, their fakes, and one body per op that calls the backend.

Registered by define/impl: `torch.library.custom_op` would add 10 us to every call.  The schema
carries the backend's name, so a compiled graph keeps the choice that was made when it was traced.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import native, reference


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
    q: Tensor, k: Tensor, lse: Tensor, scale: float, mask: Tensor | None, backend: str
) -> Tensor:
    return _BODIES[backend].attention_entropy(q, k, lse, scale, mask)


def _attention_entropy_fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2]), dtype=torch.float32)


attention_entropy = _define(
    "attention_entropy(Tensor q, Tensor k, Tensor lse, float scale, Tensor? mask, str backend) "
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
) -> Tensor:
    return _BODIES[backend].gather_modulate(
        x, index, shift, scale, gate, cache, weight, bias, norm, eps, cache_scale
    )


def _gather_modulate_fake(x: Tensor, index: Tensor | None, *_: object) -> Tensor:
    k = x.shape[1] if index is None else index.shape[1]
    return x.new_empty((x.shape[0], k, x.shape[2]))


gather_modulate = _define(
    "gather_modulate(Tensor x, Tensor? index, Tensor shift, Tensor scale, Tensor? gate, "
    "Tensor? cache, Tensor? weight, Tensor? bias, str norm, float eps, str backend, "
    "Tensor? cache_scale=None) -> Tensor",
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


def _split_scales(
    tensors: Sequence[Tensor], updates: int
) -> tuple[Sequence[Tensor], Sequence[Tensor | None] | None]:
    """The cache and the scale of every update; no scales at all where no cache is in 8 bits.

    A schema cannot mutate a list with gaps, so the scales of the 8-bit caches follow the caches.
    """
    if len(tensors) == updates:
        return tensors, None
    caches, scales = tensors[:updates], iter(tensors[updates:])
    return caches, [next(scales) if cache.dtype.itemsize == 1 else None for cache in caches]


def _scatter_residual(
    x: Tensor,
    gates: Sequence[Tensor | None],
    caches: Sequence[Tensor],
    fresh: Sequence[Tensor | None],
    inverse: Sequence[Tensor | None],
    backend: str,
) -> Tensor:
    out = torch.empty_like(x)
    caches, scales = _split_scales(caches, len(gates))
    _BODIES[backend].scatter_residual(x, gates, caches, fresh, inverse, out, scales)
    return out


def _scatter_residual_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


scatter_residual = _define(
    "scatter_residual(Tensor x, Tensor?[] gates, Tensor(a!)[] caches, Tensor?[] fresh, "
    "Tensor?[] inverse, str backend) -> Tensor",
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
) -> None:
    caches, scales = _split_scales(caches, len(gates))
    _BODIES[backend].scatter_residual(x, gates, caches, fresh, inverse, x, scales)


def _scatter_residual_inplace_fake(x: Tensor, *_: object) -> None:
    return None


_scatter_residual_inplace_op = _define(
    "scatter_residual_(Tensor(a!) x, Tensor?[] gates, Tensor(b!)[] caches, Tensor?[] fresh, "
    "Tensor?[] inverse, str backend) -> ()",
    _scatter_residual_inplace,
    _scatter_residual_inplace_fake,
)


def scatter_residual_inplace(x: Tensor, *arguments: Any) -> Tensor:
    _scatter_residual_inplace_op(x, *arguments)
    return x


def _store_rows(values: Tensor, scale: Tensor, rows: Tensor, backend: str) -> None:
    _BODIES[backend].store_rows(values, scale, rows)


def _store_rows_fake(values: Tensor, *_: object) -> None:
    return None


store_rows = _define(
    "store_rows(Tensor(a!) values, Tensor(b!) scale, Tensor rows, str backend) -> ()",
    _store_rows,
    _store_rows_fake,
)
