"""facebookresearch/DiT and what is built like it (timm attention and MLP, adaLN-Zero per block)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..blocks.linear import activation_of, plain, unhooked
from ..blocks.row_mlp import MLPParts, Norm
from ..blocks.self_mlp import BlockParts, SelfMLP
from ..flops import BlockShape, Flops
from ..plan import Plan
from .adapter import Adapter, ModelCall, find_attribute, lacking, width

_MODEL = ("blocks", "t_embedder", "y_embedder", "x_embedder")
_BLOCK = (
    "norm1",
    "attn.qkv",
    "attn.proj",
    "attn.num_heads",
    "norm2",
    "mlp.fc1",
    "mlp.act",
    "mlp.fc2",
    "adaLN_modulation",
)
# Parts of timm's Mlp that do nothing in inference.
_INERT = (nn.Dropout, nn.Identity)


class FacebookDiT(Adapter):
    name = "facebookresearch/DiT"

    @classmethod
    def missing(cls, model: nn.Module) -> str:
        names = lacking(model, _MODEL)
        if names:
            return ", ".join(names)
        blocks: Any = model.blocks
        if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
            return "blocks as a ModuleList that is not empty"
        for layer, block in enumerate(blocks):
            names = lacking(block, _BLOCK)
            if names:
                return ", ".join(f"blocks.{layer}.{name}" for name in names)
            if not isinstance(block.norm1, nn.LayerNorm) or not isinstance(
                block.norm2, nn.LayerNorm
            ):
                return f"LayerNorm as norm1 and norm2 of blocks.{layer}"
            if not isinstance(block.adaLN_modulation, nn.Sequential):
                return f"blocks.{layer}.adaLN_modulation as a Sequential"
        return ""

    def blocks(self) -> list[SelfMLP]:
        return [SelfMLP(_parts(block), layer) for layer, block in enumerate(self.model.blocks)]

    def call(self, *args: Any, **kwargs: Any) -> ModelCall:
        x, t, y = (
            args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("x", "t", "y"))
        )
        patch = find_attribute(self.model, "x_embedder.patch_size")
        rows, cols = patch if isinstance(patch, (tuple, list)) else (patch, patch)
        return ModelCall(t, y, {"mlp": (x.shape[-2] // rows, x.shape[-1] // cols)})

    def conditions(self, timesteps: Tensor, labels: Tensor, like: Tensor) -> Iterator[Tensor]:
        model = self.model
        c = model.t_embedder(timesteps) + model.y_embedder(labels, False)
        for block in model.blocks:
            yield _condition(block, c)

    def flops(self, done: Plan, batch: Mapping[str, int]) -> Flops:
        block = self.model.blocks[0]
        C = int(block.norm1.normalized_shape[0])
        ratio = width(block.mlp.fc1, default=4 * C) / C
        heads = int(block.attn.num_heads)
        shape = BlockShape(batch=batch["mlp"], channels=C, heads=heads, mlp_ratio=ratio)
        return done.flops(shape)


def _condition(block: Any, c: Tensor) -> Tensor:
    """The input of `_modulation`: of the last linear, or of the Sequential if that has hooks."""
    adaln = block.adaLN_modulation
    return adaln[:-1](c) if unhooked(adaln) else c


def _modulation(block: Any) -> nn.Module:
    adaln = block.adaLN_modulation
    return adaln[-1] if unhooked(adaln) else adaln


def _parts(block: Any) -> BlockParts:
    return BlockParts(
        block=block,
        hidden="x",
        attn=block.attn,
        norm=lambda: Norm.of(block.norm1),
        mlp=MLPParts(block.mlp, lambda: Norm.of(block.norm2), lambda: mlp_linears(block.mlp)),
        modulation=lambda: _modulation(block),
        condition=lambda x=None, c=None: _condition(block, c),
    )


def mlp_linears(mlp: Any) -> tuple[nn.Linear, nn.Linear, str] | None:
    """(fc1, fc2, activation) of timm's Mlp if it is just that."""
    activation = activation_of(mlp.act)
    for name, module in mlp.named_children():
        if name not in ("fc1", "act", "fc2") and not isinstance(module, _INERT):
            return None
    if activation is None or not plain(mlp.fc1) or not plain(mlp.fc2):
        return None
    return mlp.fc1, mlp.fc2, activation
