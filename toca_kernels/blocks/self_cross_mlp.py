"""Family self_cross_mlp: x += gate_a * attn(M(x)); x += cross(x, text); x += gate_m * mlp(M(x)).

Members: PixArt in its own code and in diffusers', Wan, Open-Sora, whose attentions are spatial and
temporal.  A full step is the block's own forward.  A cached step reads the residual twice: once to
add the reused attention and the cross-attention with its fresh rows, once for the MLP (ToCa, ICLR
2025, 3.1); once for both where no row of the cross-attention is fresh.  Norms touch selected rows
only.  Modulation is rounded to the dtype of the residual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..features import ForecastCache, QuantizedCache
from ..ops import Residual, scatter_residual
from ..track import Features
from .block import Block, BlockState
from .row_mlp import MLPParts, RowMLP, residual_rows
from .taps import Tap

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
        prefix: what the plan's names of the cross-attention and the MLP begin with.
        attentions: the plan's names of the attentions, which all have the same gate.
    """

    block: nn.Module
    hidden: Callable[..., Tensor]
    modulation: Callable[..., Modulation]
    cross: Callable[..., Tensor]
    mlp: MLPParts
    plain: Callable[..., bool] = lambda *args, **kwargs: True
    prefix: str = ""
    attentions: tuple[str, ...] = ("attn",)


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

    def attention(self, state: BlockState, name: str) -> Features:
        """What is cached of an attention, (B, N, C)."""
        return state.features[name]

    def compose(self, state: BlockState, args: Any, kwargs: Any) -> Any:
        parts = self.parts
        cross_attn, mlp = f"{parts.prefix}cross_attn", f"{parts.prefix}mlp"
        x = parts.hidden(*args, **kwargs).contiguous()
        gate_a, shift, scale, gate = parts.modulation(*args, **kwargs)
        reused: list[Residual] = [
            (gate_a, self.attention(state, name)) for name in parts.attentions
        ]
        cross, index = state.features[cross_attn], state.index[cross_attn]
        if index.shape[1] == 0:
            reused.append((None, cross))
        else:
            fresh = parts.cross(residual_rows(x, index, reused), *args, **kwargs)
            fresh = fresh.to(x.dtype).contiguous()
            x = scatter_residual(x, [*reused, (None, cross, fresh, state.inverse[cross_attn])])
            reused = []
        selection = (state.index[mlp], state.inverse[mlp])  # known after the cross-attention
        modulation = (shift, scale, gate)
        return self.mlps[0].cached(x, selection, modulation, state.features[mlp], reused)


_TEMPORAL = "temporal_attn"  # the plan's name of attention along time, in whatever block


class SpatialTemporal(SelfCrossMLP):
    """A block that attends within each frame, (B T, S, C), along time, (B S, T, C), or both.

    Both are cached in the order of the tokens, (B, T S, C), frames outermost, under the shape that
    the module has returned: so a cached step adds them as they lie.
    """

    _samples = 0  # B, of the call at hand

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.state is not None:
            self._samples = len(self.parts.hidden(*args, **kwargs))
        return super().forward(*args, **kwargs)

    def write(self, state: BlockState, name: str, out: Tensor) -> None:
        if name == _TEMPORAL:
            tracks = out.unflatten(0, (self._samples, -1))  # (B, S, T, C)
            out = tracks.transpose(1, 2).reshape(out.shape)
        super().write(state, name, out)

    def read(self, state: BlockState, name: str) -> Tensor:
        kept = super().read(state, name)
        if name != _TEMPORAL:
            return kept
        frames = kept.view(self._samples, kept.shape[1], -1, kept.shape[2])  # (B, T, S, C)
        return frames.transpose(1, 2).reshape(kept.shape)

    def attention(self, state: BlockState, name: str) -> Features:
        kept, B = state.features[name], self._samples
        if isinstance(kept, Tensor):
            return kept.view(B, -1, kept.shape[2])
        values = kept.values.view(B, -1, kept.values.shape[2])
        if isinstance(kept, QuantizedCache):
            return QuantizedCache(values, kept.scale.view(B, -1))
        slopes = tuple(slope.view(values.shape) for slope in kept.slopes)
        return ForecastCache(values, slopes, kept.distance.view(B, -1), kept.computed)
