"""The MLP of one residual stream, with its norm and gate: all rows of it, or the selected ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..ops import (
    Residual,
    gather_modulate,
    mlp_rows,
    partial_mlp,
    scatter_residual,
)
from ..track import Features
from . import linear
from .taps import cached_rows, taken_rows

Modulation = tuple[Tensor, Tensor, Tensor]  # shift, scale, gate


@dataclass(frozen=True)
class Norm:
    """A norm in front of a module.

    Attributes:
        kind, eps, weight, bias: of a LayerNorm or RMSNorm; its affine parameters if it has any.
        module: called instead where it is anything else, or has hooks.
    """

    kind: str = "layer"
    eps: float = 0.0
    weight: Tensor | None = None
    bias: Tensor | None = None
    module: nn.Module | None = None

    @classmethod
    def of(cls, module: nn.Module) -> Norm:
        if type(module) is nn.LayerNorm and linear.unhooked(module):
            return cls("layer", module.eps, module.weight, module.bias)
        return cls(module=module)


@dataclass(frozen=True)
class MLPParts:
    """How a concrete MLP maps onto `RowMLP`.

    Attributes:
        module: (B, k, C) in and out, row by row.
        norm: () -> the norm in front; read anew in each run, in case it was replaced.
        linears: () -> (fc1, fc2, activation) if the module is exactly fc2(activation(fc1(x))), else
            None, and then the module is called.
    """

    module: nn.Module
    norm: Callable[[], Norm]
    linears: Callable[[], tuple[nn.Linear, nn.Linear, str] | None]


class Tapped(Protocol):
    """The forward that a block has put on a module; `plain` if there was none but its class's."""

    plain: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any: ...


class RowMLP:
    """norm, modulation, MLP, cache, gate and residual of one stream."""

    def __init__(self, parts: MLPParts) -> None:
        self.parts = parts
        self._norm = parts.norm()
        self._linears: tuple[nn.Linear, nn.Linear, str] | None = None
        self._packed = linear.PackedMLP()

    @property
    def packed_nbytes(self) -> int:
        return self._packed.nbytes

    def release(self) -> None:
        self._packed.release()

    def prepare(self, tapped: Tapped, *, prepack: bool) -> None:
        """Look at the module again, on which the block has put a forward of its own."""
        self._norm = self.parts.norm()
        unhooked = tapped.plain and linear.unhooked(self.parts.module, tapped.forward)
        self._linears = self.parts.linears() if unhooked else None
        pack = self._linears[:2] if prepack and self._linears else (None, None)
        self._packed.refresh(*pack)

    def cached(
        self,
        x: Tensor,
        selection: tuple[Tensor, Tensor],
        modulation: Modulation,
        cache: Features,
        reused: Sequence[Residual],
    ) -> Tensor:
        """x + reused residuals + gate * cache, after the selected rows of the cache are fresh."""
        index, inverse = selection
        shift, scale, gate = modulation
        norm = self._norm
        x = x.contiguous()
        if index.shape[1] == 0:
            return scatter_residual(x, [*reused, (gate, cache)])
        if len(reused) < 2 and norm.module is None and self._readable(x):
            fc1, fc2, activation = self._weights()
            return partial_mlp(
                x,
                (index, inverse),
                modulation,
                cache,
                fc1,
                fc2,
                residual=reused[0] if reused else None,
                activation=activation,
                norm=norm.kind,
                weight=norm.weight,
                bias=norm.bias,
                eps=norm.eps,
            )
        fresh = self._mlp(normed_rows(norm, x, index, shift, scale, reused))
        return scatter_residual(x, [*reused, (gate, cache, fresh, inverse)])

    def full(
        self, x: Tensor, every: Tensor, modulation: Modulation, cache: Features, reuse: Residual
    ) -> Tensor:
        """The same with every token fresh."""
        shift, scale, gate = modulation
        fresh = self._mlp(normed_rows(self._norm, x, None, shift, scale, [reuse]))
        return scatter_residual(x, [reuse, (gate, cache, fresh, every)])

    def _mlp(self, rows: Tensor) -> Tensor:
        if self._readable(rows):
            fc1, fc2, activation = self._weights()
            return mlp_rows(rows, fc1, fc2, activation=activation)
        out: Tensor = self.parts.module(rows)
        return out.to(rows.dtype).contiguous()

    def _readable(self, x: Tensor) -> bool:
        """Whether the MLP's weights may be read: plain linears, and no autocast to obey."""
        if self._linears is None:
            return False
        weights = [one.weight for one in self._linears[:2]]
        return (
            weights[0].dtype == x.dtype
            and linear.dense(*weights)  # they may have been quantised in place since the run began
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _weights(self) -> tuple[Any, Any, str]:
        assert self._linears is not None
        fc1, fc2, activation = self._linears
        # Inductor lowers packed products of weights that it packed itself only.
        packed = None if torch.compiler.is_compiling() else self._packed.linears()
        return (*packed, activation) if packed else (fc1, fc2, activation)


def normed_rows(
    norm: Norm,
    x: Tensor,
    index: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    reused: Sequence[Residual] = (),
) -> Tensor:
    """gather_modulate of x + what is reused; through the norm's own module where its parameters
    may not be read."""
    residual = None
    if norm.module is None and len(reused) < 2:  # as many as the op takes
        residual = reused[0] if reused else None
    else:
        x = residual_rows(x, index, reused)
        shift, scale = (_picked(m, index) for m in (shift, scale))
        index = None
    if norm.module is None:
        return gather_modulate(
            x,
            index,
            shift,
            scale,
            residual=residual,
            norm=norm.kind,
            weight=norm.weight,
            bias=norm.bias,
            eps=norm.eps,
        )
    rows = norm.module(x) * (1 + _per_token(scale)) + _per_token(shift)
    return rows.to(x.dtype).contiguous()


def residual_rows(x: Tensor, index: Tensor | None, reused: Sequence[Residual]) -> Tensor:
    """The selected rows of x + what is reused, (B, k, C), rounded once; None selects all."""
    rows = x if index is None else taken_rows(x, index)
    if not reused:
        return rows
    rows = rows.float()
    for gate, cache in reused:
        added = cached_rows(cache, index, x.dtype)
        rows = rows + added if gate is None else rows + _per_token(_picked(gate, index)) * added
    return rows.to(x.dtype)


def _picked(modulation: Tensor, index: Tensor | None) -> Tensor:
    """(B, C) as it is; of (B, N, C) the selected rows."""
    if index is None or modulation.ndim == 2:
        return modulation
    return taken_rows(modulation, index)


def _per_token(modulation: Tensor) -> Tensor:
    """(B, C) as (B, 1, C); (B, N, C) as it is."""
    return modulation if modulation.ndim == 3 else modulation[:, None]
