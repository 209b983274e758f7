"""Open-Sora's own code: STDiT (1.0) and STDiT3 (1.2), spatial and temporal attention.

Their attentions see the tokens in another order than the MLP does, so tokens are ranked by the
entropy of the cross-attention, as published, or at random.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..blocks.block import Block
from ..blocks.taps import Tap
from ..flops import Flops
from ..plan import Plan, module_kind
from .adapter import Adapter, ModelCall, lacking, positional
from .crossing import open_sora
from .families import numbered, serial
from .linear_flops import linear_flops

_BLOCK = ("attn.qkv", "cross_attn.kv_linear", "mlp", "norm1", "norm2", "scale_shift_table")


class OpenSora(Adapter):
    """What both versions share."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._served: Sequence[Block] = ()

    def call(self, *args: Any, **kwargs: Any) -> ModelCall:
        x, t, _ = positional(("x", "timestep", "y"), args, kwargs)
        sizes = zip(x.shape[-3:], self.model.patch_size, strict=True)
        grid = tuple(size // patch for size, patch in sizes)
        names = ("mlp", "cross_attn", *(f"{p}_{m}" for p in _LISTS for m in ("mlp", "cross_attn")))
        # Its samplers put both guidance halves into one batch.
        return ModelCall(t, None, dict.fromkeys(names, grid), ())

    def parts(
        self, tokens: Mapping[str, int], grids: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        """Its sequence parallelism shares every frame, so what attends along time has all of it."""
        frames = next(iter(grids.values()))[0]
        split = {name: N for name, N in tokens.items() if not name.endswith("temporal_attn")}
        return {
            name: (N,) if module_kind(name) == "attn" else (N // frames,) * frames
            for name, N in split.items()
        }

    def flops(self, done: Plan, batch: Mapping[str, int]) -> Flops:
        return linear_flops(done, self._served, batch)


class STDiT(OpenSora):
    name = "Open-Sora 1.0 (STDiT)"

    @classmethod
    def missing(cls, model: nn.Module) -> str:
        names = lacking(model, ("blocks", "x_embedder", "y_embedder"))
        if names:
            return ", ".join(names)
        if len(model.blocks) == 0:  # type: ignore[arg-type]  # a list
            return "blocks as a ModuleList that is not empty"
        for layer, block in enumerate(model.blocks):  # type: ignore[arg-type]  # a list
            names = lacking(block, (*_BLOCK, "attn_temp.qkv"))
            if names:
                return ", ".join(f"blocks.{layer}.{name}" for name in names)
        return ""

    def blocks(self) -> Sequence[Block]:
        self._served = numbered(
            (
                _serial("", block, [Tap(block.attn_temp, ("temporal_attn",))]),
                functools.partial(open_sora, block, attentions=("attn", "temporal_attn")),
            )
            for block in self.model.blocks
        )
        return self._served


_LISTS = ("spatial", "temporal")


class STDiT3(OpenSora):
    name = "Open-Sora 1.2 (STDiT3)"

    @classmethod
    def missing(cls, model: nn.Module) -> str:
        names = lacking(model, ("spatial_blocks", "temporal_blocks"))
        if names:
            return ", ".join(names)
        for kind in _LISTS:
            if len(getattr(model, f"{kind}_blocks")) == 0:
                return f"{kind}_blocks as a ModuleList that is not empty"
            for layer, block in enumerate(getattr(model, f"{kind}_blocks")):
                names = lacking(block, _BLOCK)
                if names:
                    return ", ".join(f"{kind}_blocks.{layer}.{name}" for name in names)
        return ""

    def blocks(self) -> Sequence[Block]:
        self._served = numbered(
            (
                _serial(f"{kind}_", block),
                functools.partial(
                    open_sora,
                    block,
                    attentions=(f"{kind}_attn",),
                    prefix=f"{kind}_",
                    plain=_no_given_frames,
                ),
            )
            for kind in _LISTS
            for block in getattr(self.model, f"{kind}_blocks")
        )
        return self._served


def _no_given_frames(
    x: Tensor, y: Tensor, t: Tensor, mask: Any = None, x_mask: Any = None, *args: Any, **_: Any
) -> bool:
    """Given frames have a modulation of their own: such steps run through taps."""
    return x_mask is None


def _serial(prefix: str, block: Any, others: Sequence[Tap] = ()) -> list[Tap]:
    taps = serial(
        prefix, block.attn, block.mlp, block.cross_attn, text=("kv_linear",), ranked=False
    )
    return [*taps, *others]
