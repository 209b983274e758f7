"""Family single_stream: x += gate * W2 [attention(M(x)) | act(W1 M(x))], of all tokens together.

Members: FLUX and HunyuanVideo (single stream blocks), Chroma.  What is cached is the output of W2
and, as an input of it, the attention.  A cached step recomputes W1 and W2 of the selected tokens:

    rows  = gather_modulate(x, index, shift, scale)
    fresh = W2 [attention rows (from the cache) | act(W1 rows)]
    x     = scatter_residual(x, [(gate, cache, fresh, inverse)])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import scatter_residual
from .block import Block, BlockState
from .row_mlp import Norm, normed_rows
from .taps import Tap


@dataclass(frozen=True)
class SingleParts:
    """How a concrete block maps onto the family; the adapters in models/ fill it.

    Attributes:
        hidden: (block's arguments) -> the hidden states of all tokens, (B, N, C).
        modulation: (block's arguments) -> shift, scale, gate, each (B, C).
        norm: () -> the norm in front; read anew in each run, in case it was replaced.
        expand: (B, k, C) rows -> act(W1 rows), (B, k, F).
        contract: W2, (B, k, C + F) -> (B, k, C).
        attention: the modules whose outputs are the attention, in the order of the tokens.
        pack: (hidden states, block's arguments) -> what the block returns.
        plain: (block's arguments) -> whether they ask for nothing else of the block.
    """

    block: nn.Module
    hidden: Callable[..., Tensor]
    modulation: Callable[..., tuple[Tensor, Tensor, Tensor]]
    norm: Callable[[], Norm]
    expand: Callable[[Tensor], Tensor]
    contract: Callable[[Tensor], Tensor]
    attention: tuple[str, ...]
    pack: Callable[..., Any]
    plain: Callable[..., bool] = lambda *args, **kwargs: True


class SingleStream(Block):
    def __init__(
        self,
        parts: SingleParts,
        layers: Mapping[str, int],
        taps: Sequence[Tap],
        attends: Any = (),
    ) -> None:
        super().__init__(parts.block, layers, taps, attends=attends)
        self.parts = parts
        self._norm = parts.norm()

    def prepare(self, *, prepack: bool) -> None:
        super().prepare(prepack=prepack)
        self._norm = self.parts.norm()

    def composes(self, state: BlockState, args: Any, kwargs: Any) -> bool:
        return self.only_cached(state) and self.parts.plain(*args, **kwargs)

    def compose(self, state: BlockState, args: Any, kwargs: Any) -> Any:
        parts = self.parts
        x = parts.hidden(*args, **kwargs).contiguous()
        shift, scale, gate = parts.modulation(*args, **kwargs)
        index, inverse = state.index["single_mlp"], state.inverse["single_mlp"]
        cache = state.features["single_mlp"]
        if index.shape[1] == 0:
            return parts.pack(scatter_residual(x, [(gate, cache)]), *args, **kwargs)
        rows = normed_rows(self._norm, x, index, shift, scale)
        attention = self.read_rows(state, parts.attention, index)
        fresh = parts.contract(torch.cat([attention, parts.expand(rows)], dim=2))
        x = scatter_residual(x, [(gate, cache, fresh.contiguous(), inverse)])
        return parts.pack(x, *args, **kwargs)
