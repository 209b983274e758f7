"""Family double_stream: two residual streams that attend to each other, each with its own MLP.

Members: FLUX (double stream blocks), HunyuanVideo, Qwen-Image, SD3 without dual attention.  A full
step is the block's own forward.  A cached step is, for either stream,

    x += gate_a * attention (from the cache);  x += gate_m * mlp(M(x))     of the selected tokens

which is a cached step of self_mlp: three small kernels round two GEMMs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .block import Block, BlockState
from .row_mlp import MLPParts, RowMLP
from .taps import Tap

# gate of the attention; shift, scale and gate of the MLP; each (B, C)
Modulation = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class StreamParts:
    """One stream of a concrete block.

    Attributes:
        name: "img" or "txt", the prefix of its modules in the plan.
        hidden: (block's arguments) -> its hidden states, (B, N, C).
        modulation: (block's arguments) -> what a cached step needs of its modulation.
        mlp: its MLP and the norm in front.
    """

    name: str
    hidden: Callable[..., Tensor]
    modulation: Callable[..., Modulation]
    mlp: MLPParts


@dataclass(frozen=True)
class DoubleParts:
    """How a concrete block maps onto the family; the adapters in models/ fill it.

    Attributes:
        streams: the image's, then the text's.
        pack: (image, text) -> what the block returns.
        plain: (block's arguments) -> whether they ask for nothing else of the block.
    """

    block: nn.Module
    streams: tuple[StreamParts, StreamParts]
    pack: Callable[[Tensor, Tensor], Any]
    plain: Callable[..., bool] = lambda *args, **kwargs: True


class DoubleStream(Block):
    def __init__(
        self,
        parts: DoubleParts,
        layers: Mapping[str, int],
        taps: Sequence[Tap],
        attends: Any = (),
    ) -> None:
        super().__init__(parts.block, layers, taps, attends=attends)
        self.parts = parts
        self.mlps = [RowMLP(stream.mlp) for stream in parts.streams]

    def composes(self, state: BlockState, args: Any, kwargs: Any) -> bool:
        return self.only_cached(state) and self.parts.plain(*args, **kwargs)

    def compose(self, state: BlockState, args: Any, kwargs: Any) -> Any:
        out = []
        for stream, mlp in zip(self.parts.streams, self.mlps, strict=True):
            name = f"{stream.name}_mlp"
            gate_a, shift, scale, gate = stream.modulation(*args, **kwargs)
            out.append(
                mlp.cached(
                    # One text may serve the whole batch until a block has modulated it.
                    stream.hidden(*args, **kwargs).expand(state.index[name].shape[0], -1, -1),
                    (state.index[name], state.inverse[name]),
                    (shift, scale, gate),
                    state.features[name],
                    [(gate_a, state.features[f"{stream.name}_attn"])],
                )
            )
        return self.parts.pack(*out)
