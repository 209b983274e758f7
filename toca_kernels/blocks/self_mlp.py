"""Family self_mlp: x += gate_a * attn(M(x)); x += gate_m * mlp(M(x)).

Members: DiT (Peebles & Xie 2023) in facebookresearch's code and in diffusers'.  A cached step
reuses the attention whole and recomputes the MLP of the selected tokens (ToCa, ICLR 2025, 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..plan import Plan
from ..track import Layout
from . import linear
from .block import Block, BlockState
from .row_mlp import MLPParts, Norm, RowMLP, normed_rows
from .taps import Tap, write_rows

SHIFT_A, SCALE_A, GATE_A, SHIFT_M, SCALE_M, GATE_M = range(6)
CACHED_CHUNKS = slice(GATE_A, GATE_M + 1)  # what a cached step reads of the six


@dataclass(frozen=True)
class BlockParts:
    """How a concrete block maps onto the family; the adapters in models/ fill it.

    Attributes:
        block: the block whose forward is replaced; its hidden states are the first argument,
            or the keyword `hidden`.
        hidden: name of that argument.
        attn: module with (B, N, C) in and out, called whole on full steps.
        norm: () -> the norm in front of it; read anew in each run, in case it was replaced.
        mlp: the MLP and its norm.
        modulation: the linear whose output is (B, 6 C): shift, scale, gate of the attention, then
            of the MLP.
        condition: (block's arguments) -> the input of `modulation`, (B, C).
    """

    block: nn.Module
    hidden: str
    attn: nn.Module
    norm: Callable[[], Norm]
    mlp: MLPParts
    modulation: Callable[[], nn.Module]
    condition: Callable[..., Tensor]


class SelfMLP(Block):
    fuses = True

    def __init__(self, parts: BlockParts, layer: int) -> None:
        attn = Tap(parts.attn, ("attn",), keys=((("mlp",), (0,)),), rowwise=True)
        mlp = Tap(parts.mlp.module, ("mlp",), cached="rows")
        layers = dict.fromkeys((*attn.names, *mlp.names), layer)
        super().__init__(parts.block, layers, (attn, mlp))
        self.parts = parts
        self.mlps = (RowMLP(parts.mlp),)
        self._norm = parts.norm()
        self._x: Tensor | None = None

    def check(self, plan: Plan, *, partial: bool) -> None:
        super().check(plan, partial=partial)
        if not self.never:  # else the block runs through taps
            self._check_together(plan, "attn", "mlp")

    def prepare(self, *, prepack: bool) -> None:
        super().prepare(prepack=prepack)
        self._norm = self.parts.norm()

    def place(self, state: BlockState | None) -> None:
        super().place(state)
        self._x = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.state is not None and self.state.holder is not None:
            self._x = self._hidden(args, kwargs)
        return super().forward(*args, **kwargs)

    def layout(self, name: str, out: Tensor) -> Layout:
        if name not in self.modules:
            return super().layout(name, out)
        assert self._x is not None
        return Layout.of(self._x)  # under autocast a module's output differs from what it adds to

    def _hidden(self, args: Any, kwargs: Any) -> Tensor:
        x: Tensor = args[0] if args else kwargs[self.parts.hidden]
        return x

    def composes(self, state: BlockState, args: Any, kwargs: Any) -> bool:
        return state.fused or not state.full["attn"]

    def compose(self, state: BlockState, args: Any, kwargs: Any) -> Tensor:
        x = self._hidden(args, kwargs)
        if state.full["attn"]:
            return self._fused(state, x, args, kwargs)
        if state.partial:
            self._attend(state, x, args, kwargs)
        gate_a, shift, scale, gate = self._modulation(state, x, args, kwargs, CACHED_CHUNKS)
        selection = (state.index["mlp"], state.inverse["mlp"])
        reused = [(gate_a, state.features["attn"])]
        modulation = (shift, scale, gate)
        return self.mlps[0].cached(x, selection, modulation, state.features["mlp"], reused)

    def _attend(self, state: BlockState, x: Tensor, args: Any, kwargs: Any) -> None:
        """The attention of the selected tokens, into its cache."""
        index = state.index["attn"]
        if index.shape[1] == 0:
            return
        shift, scale, *_ = self._modulation(state, x, args, kwargs, slice(None))
        rows = normed_rows(self._norm, x.contiguous(), index, shift, scale)
        write_rows(state.features["attn"], self.parts.attn(rows).to(x.dtype), index)

    def _fused(self, state: BlockState, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        """A full step through the ops of a cached one, with every token selected."""
        shift_a, scale_a, gate_a, shift, scale, gate = self._modulation(
            state, x, args, kwargs, slice(None)
        )
        x = x.contiguous()
        attn = self.parts.attn(normed_rows(self._norm, x, None, shift_a, scale_a))
        self.write(state, "attn", attn)
        mlp = self.hold(state, "mlp", x)
        reuse = (gate_a, state.features["attn"])
        return self.mlps[0].full(x, state.every["mlp"], (shift, scale, gate), mlp, reuse)

    # --- modulation -------------------------------------------------------------------------

    def _modulation(
        self, state: BlockState, x: Tensor, args: Any, kwargs: Any, chunks: slice
    ) -> tuple[Tensor, ...]:
        table = state.modulation
        if table is None:
            table = self.modulate(self.parts.condition(*args, **kwargs), chunks)
        elif table.shape[1] == 6 * x.shape[2]:
            first = (chunks.start or 0) * x.shape[2]
            table = table[:, first:]
        table = table.to(x.dtype).expand(x.shape[0], -1)  # one label may serve the whole batch
        return tuple(table.split(x.shape[2], dim=1))

    def modulate(self, condition: Tensor, chunks: slice) -> Tensor:
        """The chosen ones of the six (B, C) chunks, side by side."""
        module = self.parts.modulation()
        first = chunks.start or 0
        if linear.plain(module) and not torch.is_autocast_enabled(condition.device.type):
            C = module.out_features // 6
            bias = module.bias
            return F.linear(
                condition,
                module.weight[first * C :],
                None if bias is None else bias[first * C :],
            )
        out: Tensor = module(condition)
        return out[:, first * (out.shape[1] // 6) :]
