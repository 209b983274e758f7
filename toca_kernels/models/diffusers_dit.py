"""diffusers' DiTTransformer2DModel: BasicTransformerBlock with norm_type="ada_norm_zero"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..blocks.row_mlp import MLPParts, Norm
from ..blocks.self_mlp import BlockParts, SelfMLP
from ..flops import BlockShape, Flops
from ..plan import Plan
from .adapter import Adapter, ModelCall, find_attribute, lacking, width
from .feed_forward import feed_forward_linears

_BLOCK = (
    "norm1.emb.timestep_embedder",
    "norm1.emb.class_embedder",
    "norm1.silu",
    "norm1.linear",
    "norm1.norm",
    "attn1.to_q",
    "attn1.heads",
    "norm3",
    "ff.net",
)


class DiffusersDiT(Adapter):
    name = "diffusers DiTTransformer2DModel"

    @classmethod
    def missing(cls, model: nn.Module) -> str:
        blocks = getattr(model, "transformer_blocks", None)
        if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
            return "transformer_blocks as a ModuleList that is not empty"
        for layer, block in enumerate(blocks):
            at = f"transformer_blocks.{layer}"
            names = lacking(block, _BLOCK)
            if names:
                return ", ".join(f"{at}.{name}" for name in names)
            kind = getattr(block, "norm_type", None)
            if kind != "ada_norm_zero":
                return f"norm_type='ada_norm_zero' of {at} (it is {kind!r})"
            extra = [name for name in ("attn2", "pos_embed") if getattr(block, name, None)]
            if extra:
                return f"{at} without {' and '.join(extra)}"
        return ""

    def blocks(self) -> list[SelfMLP]:
        blocks = self.model.transformer_blocks
        return [SelfMLP(_parts(block), layer) for layer, block in enumerate(blocks)]

    def call(self, *args: Any, **kwargs: Any) -> ModelCall:
        names = ("hidden_states", "timestep", "class_labels")
        x, t, y = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
        patch = int(find_attribute(self.model, "config.patch_size") or self.model.patch_size)
        return ModelCall(t, y, {"mlp": (x.shape[-2] // patch, x.shape[-1] // patch)})

    def conditions(self, timesteps: Tensor, labels: Tensor, like: Tensor) -> Iterator[Tensor]:
        for block in self.model.transformer_blocks:
            yield _condition(block, timesteps, labels, like)

    def flops(self, done: Plan, batch: Mapping[str, int]) -> Flops:
        block = self.model.transformer_blocks[0]
        C = int(block.attn1.query_dim)
        ratio = width(block.ff.net[0], default=4 * C) / C
        heads = int(block.attn1.heads)
        shape = BlockShape(batch=batch["mlp"], channels=C, heads=heads, mlp_ratio=ratio)
        return done.flops(shape)


def _condition(block: Any, timesteps: Tensor, labels: Tensor, like: Tensor) -> Tensor:
    norm = block.norm1
    return norm.silu(norm.emb(timesteps, labels, hidden_dtype=like.dtype))


def _parts(block: Any) -> BlockParts:
    def condition(
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        assert timestep is not None
        assert class_labels is not None
        return _condition(block, timestep, class_labels, hidden_states)

    return BlockParts(
        block=block,
        hidden="hidden_states",
        attn=block.attn1,
        norm=lambda: Norm.of(block.norm1.norm),
        mlp=MLPParts(block.ff, lambda: Norm.of(block.norm3), lambda: _mlp_linears(block)),
        modulation=lambda: block.norm1.linear,
        condition=condition,
    )


def _mlp_linears(block: Any) -> tuple[nn.Linear, nn.Linear, str] | None:
    """None where the block cuts its tokens into chunks."""
    chunked = getattr(block, "_chunk_size", None) is not None
    return None if chunked else feed_forward_linears(block.ff)
