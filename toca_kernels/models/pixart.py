"""PixArt-alpha's own code: PixArt and PixArtMS, whose blocks read a packed text."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..blocks.block import Block
from ..blocks.taps import Tap
from ..flops import BlockShape, Flops
from ..plan import Plan
from .adapter import Adapter, ModelCall, find_attribute, lacking, positional, width
from .crossing import pixart_alpha
from .families import numbered, serial

_BLOCK = ("attn.qkv", "cross_attn.kv_linear", "mlp", "norm1", "norm2", "scale_shift_table")


class PixArt(Adapter):
    name = "PixArt-alpha"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._text_tokens = 1

    @classmethod
    def missing(cls, model: nn.Module) -> str:
        names = lacking(model, ("blocks", "x_embedder", "t_block", "y_embedder"))
        if names:
            return ", ".join(names)
        if len(model.blocks) == 0:  # type: ignore[arg-type]  # a list
            return "blocks as a ModuleList that is not empty"
        for layer, block in enumerate(model.blocks):  # type: ignore[arg-type]  # a list
            names = lacking(block, _BLOCK)
            if names:
                return ", ".join(f"blocks.{layer}.{name}" for name in names)
            if hasattr(block, "attn_temp"):
                return f"blocks.{layer} without attn_temp"
        return ""

    def blocks(self) -> Sequence[Block]:
        return numbered(
            (
                _taps(block),
                functools.partial(pixart_alpha, block),
            )
            for block in self.model.blocks
        )

    def call(self, *args: Any, **kwargs: Any) -> ModelCall:
        x, t, y = positional(("x", "timestep", "y"), args, kwargs)
        self._text_tokens = y.shape[-2]
        patch = find_attribute(self.model, "x_embedder.patch_size")
        rows, cols = patch if isinstance(patch, (tuple, list)) else (patch, patch)
        grid = (x.shape[-2] // rows, x.shape[-1] // cols)
        # Its samplers put both guidance halves into one batch, the text anew in every step.
        return ModelCall(t, None, {"mlp": grid, "cross_attn": grid}, ())

    def flops(self, done: Plan, batch: Mapping[str, int]) -> Flops:
        block = self.model.blocks[0]
        C = int(block.norm1.normalized_shape[0])
        shape = BlockShape(
            family="self_cross_mlp",
            batch=batch["mlp"],
            channels=C,
            heads=int(block.attn.num_heads),
            mlp_ratio=width(block.mlp.fc1, default=4 * C) / C,
            context_tokens=self._text_tokens,
        )
        return done.flops(shape)


def _taps(block: Any) -> list[Tap]:
    return serial("", block.attn, block.mlp, block.cross_attn, text=("kv_linear",), rowwise=True)
