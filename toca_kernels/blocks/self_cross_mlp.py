"""Family self_cross_mlp: x += gate_a * attn(M(x)); x += cross(x, text); x += gate_m * mlp(M(x)).

Members: PixArt in its own code and in diffusers', Wan.  A full step is the block's own forward.  A
cached step reads the residual twice: once to add the reused attention and the cross-attention with
its fresh rows, once for the MLP (ToCa, ICLR 2025, 3.1); norms touch selected rows only.  Modulation
is rounded to the dtype of the residual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..ops import scatter_residual
from .block import Block, BlockState
from .row_mlp import MLPParts, RowMLP
from .taps import Tap, taken_rows

# gate of the attention; shift, scale and gate of the MLP; each (B, C)
Modulation = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class SelfCrossParts:
    """How a concrete block maps onto the family; the adapters in models/ fill it.

    Attributes:
        hidden: (block's arguments) -> the hidden states, (B, N, C).
        modulation: (block's arguments) -> what a cached step needs of its modulation.
        cross: (rows, block's arguments) -> the cross-attention of these rows, norm included.
        mlp: the MLP and the norm in front.
        plain: (block's arguments) -> whether they ask for nothing else of the block.
    """

    block: nn.Module
    hidden: Callable[..., Tensor]
    modulation: Callable[..., Modulation]
    cross: Callable[..., Tensor]
    mlp: MLPParts
    plain: Callable[..., bool] = lambda *args, **kwargs: True


class SelfCrossMLP(Block):
    def __init__(
        self, parts: SelfCrossParts, layers: Mapping[str, int], taps: Sequence[Tap]
    ) -> None:
        super().__init__(parts.block, layers, taps)
        self.parts = parts
        self.mlps = (RowMLP(parts.mlp),)

    def composes(self, state: BlockState, args: Any, kwargs: Any) -> bool:
        plain = not state.partial and self.parts.plain(*args, **kwargs)
        return self.only_cached(state) and plain

    def compose(self, state: BlockState, args: Any, kwargs: Any) -> Any:
        parts = self.parts
        x = parts.hidden(*args, **kwargs).contiguous()
        gate_a, shift, scale, gate = parts.modulation(*args, **kwargs)
        cross, index = state.features["cross_attn"], state.index["cross_attn"]
        reuse = (gate_a, state.features["attn"])
        if index.shape[1] == 0:
            x = scatter_residual(x, [reuse, (None, cross)])
        else:
            attention = self.read_rows(state, ("attn",), index)
            rows = taken_rows(x, index) + gate_a[:, None] * attention
            fresh = parts.cross(rows, *args, **kwargs).to(x.dtype).contiguous()
            inverse = state.inverse["cross_attn"]
            x = scatter_residual(x, [reuse, (None, cross, fresh, inverse)])
        selection = (state.index["mlp"], state.inverse["mlp"])  # known after the cross-attention
        return self.mlps[0].cached(x, selection, (shift, scale, gate), state.features["mlp"], None)
