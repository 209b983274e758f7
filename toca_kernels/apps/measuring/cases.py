"""What `toca bench` times: every op on tensors of one shape, and its peers on the same tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops, reference
from ...native import PackedLinear, packing_unavailable
from .roofline import Work, work
from .shapes import Shape
from .timing import Runs


@dataclass(frozen=True)
class Case:
    """One op on tensors of one shape.

    Attributes:
        call: (backend, what the op writes to) -> result; can be repeated.
        written: what the op writes to, where it writes to something.
        plain: the same in plain PyTorch without a dispatcher: what torch.compile is given.
        work: bytes and FLOPs.
        peers: name -> call of a library, or the way of published code.
        adds_to: the peer whose time this op comes on top of.
        memory_of: the peer whose memory is printed beside the op's.
        eager_only: runs that a CUDA graph cannot hold, since they copy from the host.
    """

    call: Callable[[str, Any], Any]
    plain: Callable[[], Any]
    work: Work
    written: Tensor | ops.ForecastCache | None = None
    peers: Runs = field(default_factory=dict)
    adds_to: str | None = None
    memory_of: str | None = None
    eager_only: frozenset[str] = frozenset()

    def result(self, backend: str) -> list[Tensor]:
        """Everything that a call returns or writes; inputs stay as they are."""
        copy = _copy(self.written)
        return [*_tensors(self.call(backend, copy)), *_tensors(copy)]

    def run(self, backend: str) -> Callable[[], Any]:
        return functools.partial(self.call, backend, self.written)


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, ops.Selection):
        value = (value.index, value.inverse, value.nan)
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value] if isinstance(value, Tensor) else []


def _copy(written: Tensor | ops.ForecastCache | None) -> Tensor | ops.ForecastCache | None:
    if isinstance(written, ops.ForecastCache):
        slopes = tuple(slope.clone() for slope in written.slopes)
        return written._replace(values=written.values.clone(), slopes=slopes)
    return None if written is None else written.clone()


class Inputs:
    """Random tensors of a shape, the same in every run."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self._generator = torch.Generator(device).manual_seed(0)

    def new(self, *size: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(size, generator=self._generator, device=self.device)
        return (scale * values).to(self.shape.dtype)

    def tokens(self) -> Tensor:
        return self.new(self.shape.B, self.shape.N, self.shape.C)

    def forecast(self) -> ops.ForecastCache:
        """A cache with one slope, of tokens that were computed three steps ago."""
        steps = torch.full((self.shape.B, self.shape.N), 3.0, device=self.device)
        return ops.ForecastCache(self.tokens(), (self.tokens(),), steps, 2)

    def heads(self, tokens: int, parts: int) -> tuple[Tensor, ...]:
        """`parts` tensors (B, H, tokens, D), cut out of one projection as models do."""
        s = self.shape
        fused = self.new(s.B, tokens, parts, s.H, s.D)
        return fused.permute(2, 0, 3, 1, 4).unbind(0)

    def modulation(self) -> tuple[Tensor, ...]:
        """The (shift, scale, gate) of attention and MLP, cut out of one projection."""
        return self.new(self.shape.B, 6 * self.shape.C).chunk(6, dim=1)

    def selection(self) -> tuple[Tensor, Tensor]:
        """(index, inverse) of k tokens of every sample."""
        B, N = self.shape.B, self.shape.N
        score = torch.rand((B, N), generator=self._generator, device=self.device)
        age = torch.zeros((B, N), dtype=torch.int32, device=self.device)
        return ops.select_tokens(score, age, self.shape.k, backend="reference").rows(0, B)

    def linears(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        C, hidden = self.shape.C, 4 * self.shape.C
        return (
            (self.new(hidden, C, scale=C**-0.5), self.new(hidden)),
            (self.new(C, hidden, scale=hidden**-0.5), self.new(C)),
        )


def _attention_scores(inputs: Inputs) -> Case:
    s = inputs.shape
    q, k, v = inputs.heads(s.N, 3)
    scale = s.D**-0.5
    _, lse = ops.attention_with_lse(q, k, v, scale=scale)

    def stored_map() -> Tensor:
        attention = (q @ k.transpose(-1, -2) * scale).softmax(dim=-1)
        return attention.mean(dim=1).sum(dim=1)

    return Case(
        call=lambda backend, _: ops.attention_scores(q, k, lse, scale=scale, backend=backend),
        plain=lambda: reference.attention_scores(q, k, lse, scale),
        work=work(s)["attention_scores"],
        peers={
            "SDPA": lambda: F.scaled_dot_product_attention(q, k, v, scale=scale),
            "stored map": stored_map,
        },
        adds_to="SDPA",
        memory_of="stored map",
    )


def _scored_attention(inputs: Inputs) -> Case:
    """Attention and scores in one pass; the log-sum-exp is that of a run before."""
    s = inputs.shape
    q, k, v = inputs.heads(s.N, 3)
    scale = s.D**-0.5
    _, lse = ops.attention_with_lse(q, k, v, scale=scale)

    def two_passes() -> Tensor:
        _, lse = ops.attention_with_lse(q, k, v, scale=scale)
        return ops.attention_scores(q, k, lse, scale=scale)

    return Case(
        call=lambda backend, _: ops.scored_attention(q, k, v, lse, scale=scale, backend=backend),
        plain=lambda: reference.scored_attention(q, k, v, lse, scale, ops.MAX_EXPONENT),
        work=work(s)["scored_attention"],
        peers={
            "SDPA": lambda: F.scaled_dot_product_attention(q, k, v, scale=scale),
            "two passes": two_passes,
        },
    )


def _attention_entropy(inputs: Inputs) -> Case | None:
    s = inputs.shape
    if s.text == 0:
        return None
    (q,), (k,) = inputs.heads(s.k, 1), inputs.heads(s.text, 1)
    mask = torch.ones((s.B, s.text), dtype=torch.bool, device=inputs.device)
    scale = s.D**-0.5
    _, lse = reference.partial_attention(q, k, k, scale, mask)
    return Case(
        call=lambda backend, _: ops.attention_entropy(
            q, k, lse, scale=scale, mask=mask, backend=backend
        ),
        plain=lambda: reference.attention_entropy(q, k, lse, scale, mask),
        work=work(s)["attention_entropy"],
    )


def _partial_attention(inputs: Inputs) -> Case:
    """The selected queries over the text, or over all tokens where there is no text."""
    s = inputs.shape
    keys = s.text or s.N
    (q,), (k, v) = inputs.heads(s.k, 1), inputs.heads(keys, 2)
    scale = s.D**-0.5
    return Case(
        call=lambda backend, _: ops.partial_attention(q, k, v, scale=scale, backend=backend),
        plain=lambda: reference.partial_attention(q, k, v, scale, None),
        work=work(s)["partial_attention"],
        peers={"SDPA": lambda: F.scaled_dot_product_attention(q, k, v, scale=scale)},
    )


def _select_tokens(inputs: Inputs) -> Case:
    """All layers and samples in one call."""
    s = inputs.shape
    bonus, age_weight = 0.6 if s.cell > 1 else 0.0, 0.1
    score = inputs.new(s.rows, s.N).float()
    ages = torch.arange(s.N, dtype=torch.int32, device=inputs.device).remainder(5)
    ages = ages.repeat(s.rows, 1)
    grid = _grid(s.N)
    return Case(
        call=lambda backend, age: ops.select_tokens(
            score,
            ages if age is None else age,
            s.counts if s.ragged else s.k,
            age_weight=age_weight,
            grid=grid,
            cell=s.cell,
            bonus=bonus,
            backend=backend,
        ),
        written=ages,
        plain=lambda: reference.select_tokens(
            score, ages, s.counts, age_weight, (1, *grid), s.cell, bonus
        ),
        work=work(s)["select_tokens"],
        peers={"torch.topk": lambda: torch.topk(score, s.k)},
        eager_only=frozenset({"reference", "compiled"}),
    )


def _grid(tokens: int) -> tuple[int, int]:
    """The most square grid of that many tokens."""
    rows = next(rows for rows in range(int(tokens**0.5), 0, -1) if tokens % rows == 0)
    return rows, tokens // rows


def _gather_modulate(inputs: Inputs) -> Case:
    s = inputs.shape
    x, cache = inputs.tokens(), inputs.tokens()
    index, _ = inputs.selection()
    _, _, gate, shift, scale, _ = inputs.modulation()
    return Case(
        call=lambda backend, _: ops.gather_modulate(
            x, index, shift, scale, residual=(gate, cache), backend=backend
        ),
        plain=lambda: reference.gather_modulate(
            x, index, shift, scale, gate, cache, None, None, "layer", 1e-6
        ),
        work=work(s)["gather_modulate"],
    )


def _mlp_rows(inputs: Inputs) -> Case:
    s = inputs.shape
    rows = inputs.new(s.B, s.k, s.C)
    fc1, fc2 = inputs.linears()
    packed = _packed(fc1, fc2)
    peers: Runs = {"F.linear": lambda: reference.mlp_rows(rows, *fc1, *fc2, "gelu_tanh")}
    if inputs.device.type == "cuda":
        peers["cuBLASLt GELU"] = lambda: _gelu_in_the_gemm(rows, fc1, fc2)
    return Case(
        call=lambda backend, _: ops.mlp_rows(
            rows, *(packed if backend == "native" else (fc1, fc2)), backend=backend
        ),
        plain=lambda: reference.mlp_rows(rows, *fc1, *fc2, "gelu_tanh"),
        work=work(s)["mlp_rows"],
        peers=peers,
    )


def _packed(
    fc1: tuple[Tensor, Tensor], fc2: tuple[Tensor, Tensor]
) -> tuple[ops.Linear, ops.Linear]:
    """The linears as a run hands them to the native backend: prepacked where that is possible."""
    if packing_unavailable(fc1[0].dtype, fc1[0].device):
        return fc1, fc2
    return PackedLinear(*fc1), PackedLinear(*fc2)


def _gelu_in_the_gemm(
    rows: Tensor, fc1: tuple[Tensor, Tensor], fc2: tuple[Tensor, Tensor]
) -> Tensor:
    hidden = torch.ops.aten._addmm_activation(fc1[1], rows.flatten(0, 1), fc1[0].t(), use_gelu=True)
    return F.linear(hidden, *fc2)


def _scatter_residual(inputs: Inputs) -> Case:
    """A cached step's: the attention from its cache, the MLP from its cache and k fresh rows."""
    s = inputs.shape
    x, attn, mlp = inputs.tokens(), inputs.tokens(), inputs.tokens()
    fresh = inputs.new(s.B, s.k, s.C)
    _, inverse = inputs.selection()
    _, _, gate_a, _, _, gate_m = inputs.modulation()
    gates = [gate_a, gate_m]

    def call(backend: str, cache: Tensor | None) -> Tensor:
        cache = mlp if cache is None else cache
        updates: list[ops.Update] = [(gate_a, attn), (gate_m, cache, fresh, inverse)]
        return ops.scatter_residual(x, updates, backend=backend)

    def plain() -> Tensor:
        out = torch.empty_like(x)
        reference.scatter_residual(x, gates, [attn, mlp], [None, fresh], [None, inverse], out)
        return out

    return Case(
        call=call,
        written=mlp,
        plain=plain,
        work=work(s)["scatter_residual"],
    )


def _scatter_residual_forecast(inputs: Inputs) -> Case:
    """The same with caches that are extrapolated by one slope."""
    s = inputs.shape
    x = inputs.tokens()
    attn, mlp = (inputs.forecast() for _ in range(2))
    fresh = inputs.new(s.B, s.k, s.C)
    _, inverse = inputs.selection()
    _, _, gate_a, _, _, gate_m = inputs.modulation()

    def call(backend: str, cache: ops.ForecastCache | None) -> Tensor:
        updates: list[ops.Update] = [(gate_a, attn), (gate_m, cache or mlp, fresh, inverse)]
        return ops.scatter_residual(x, updates, backend=backend)

    def plain() -> Tensor:
        out = torch.empty_like(x)
        caches, forecasts = [attn.values, mlp.values], [attn, mlp]
        reference.scatter_residual(
            x, [gate_a, gate_m], caches, [None, fresh], [None, inverse], out, None, forecasts
        )
        return out

    return Case(
        call=call,
        written=mlp,
        plain=plain,
        work=work(s)["scatter_residual_forecast"],
    )


def _partial_mlp(inputs: Inputs) -> Case:
    """gather_modulate, mlp_rows and scatter_residual: all of a DiT block's cached step."""
    s = inputs.shape
    x, attn, mlp = inputs.tokens(), inputs.tokens(), inputs.tokens()
    index, inverse = inputs.selection()
    _, _, gate_a, shift, scale, gate_m = inputs.modulation()
    fc1, fc2 = inputs.linears()
    packed = _packed(fc1, fc2)

    def call(backend: str, cache: Tensor | None) -> Tensor:
        return ops.partial_mlp(
            x,
            (index, inverse),
            (shift, scale, gate_m),
            mlp if cache is None else cache,
            *(packed if backend == "native" else (fc1, fc2)),
            residual=(gate_a, attn),
            backend=backend,
        )

    def plain() -> Tensor:
        rows = reference.gather_modulate(
            x, index, shift, scale, gate_a, attn, None, None, "layer", 1e-6
        )
        fresh = reference.mlp_rows(rows, *fc1, *fc2, "gelu_tanh")
        out = torch.empty_like(x)
        reference.scatter_residual(
            x, [gate_a, gate_m], [attn, mlp], [None, fresh], [None, inverse], out
        )
        return out

    parts = work(s)
    return Case(
        call=call,
        written=mlp,
        plain=plain,
        work=parts["gather_modulate"] + parts["mlp_rows"] + parts["scatter_residual"],
    )


CASES: dict[str, Callable[[Inputs], Case | None]] = {
    "attention_scores": _attention_scores,
    "scored_attention": _scored_attention,
    "attention_entropy": _attention_entropy,
    "partial_attention": _partial_attention,
    "select_tokens": _select_tokens,
    "gather_modulate": _gather_modulate,
    "mlp_rows": _mlp_rows,
    "scatter_residual": _scatter_residual,
    "scatter_residual_forecast": _scatter_residual_forecast,
    "partial_mlp": _partial_mlp,
}
