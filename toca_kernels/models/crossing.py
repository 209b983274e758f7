"""Blocks with a cross-attention that a cached step composes from the ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..blocks import linear
from ..blocks.block import Block
from ..blocks.row_mlp import MLPParts, Norm
from ..blocks.self_cross_mlp import Modulation, SelfCrossMLP, SelfCrossParts, SpatialTemporal
from ..blocks.taps import Tap
from .facebook_dit import mlp_linears
from .feed_forward import feed_forward_linears


def _four(six: Tensor, x: Tensor) -> Modulation:
    """Of (B, 6, C): gate of the attention; shift, scale, gate of the MLP."""
    _, _, gate_a, shift, scale, gate = six.to(x.dtype).unbind(dim=1)
    return gate_a, shift, scale, gate


def pixart(block: Any, layers: Mapping[str, int], taps: list[Tap]) -> Block:
    """BasicTransformerBlock with ada_norm_single, of PixArt; Latte's lists go through taps."""
    if getattr(block, "norm_type", None) != "ada_norm_single" or "cross_attn" not in layers:
        return Block(block, layers, taps)

    def modulation(hidden_states: Tensor, *args: Any, timestep: Tensor, **_: Any) -> Modulation:
        six = block.scale_shift_table + timestep.unflatten(1, (6, -1))
        return _four(six, hidden_states)

    def cross(rows: Tensor, hidden_states: Tensor, *args: Any, **given: Any) -> Tensor:
        out: Tensor = block.attn2(
            rows,
            encoder_hidden_states=given["encoder_hidden_states"],
            attention_mask=given.get("encoder_attention_mask"),
            **(given.get("cross_attention_kwargs") or {}),
        )
        return out

    def linears() -> tuple[nn.Linear, nn.Linear, str] | None:
        chunked = getattr(block, "_chunk_size", None) is not None
        return None if chunked else feed_forward_linears(block.ff)

    parts = SelfCrossParts(
        block,
        hidden=lambda hidden_states, *args, **_: hidden_states,
        modulation=modulation,
        cross=cross,
        mlp=MLPParts(block.ff, lambda: Norm.of(block.norm2), linears),
    )
    return SelfCrossMLP(parts, layers, taps)


def pixart_alpha(block: Any, layers: Mapping[str, int], taps: list[Tap]) -> Block:
    """PixArtBlock and PixArtMSBlock of PixArt-alpha's own code."""
    return SelfCrossMLP(_packed_text(block), layers, taps)


def open_sora(block: Any, layers: Mapping[str, int], taps: list[Tap], **others: Any) -> Block:
    """STDiTBlock and STDiT3Block; `others` are of SelfCrossParts."""
    return SpatialTemporal(_packed_text(block, **others), layers, taps)


def _packed_text(block: Any, **others: Any) -> SelfCrossParts:
    """What the blocks share that read a packed text."""

    def modulation(x: Tensor, y: Tensor, t: Tensor, *args: Any, **_: Any) -> Modulation:
        return _four(block.scale_shift_table + t.unflatten(1, (6, -1)), x)

    def cross(
        rows: Tensor, x: Tensor, y: Tensor, t: Tensor, mask: Any = None, *args: Any, **_: Any
    ) -> Tensor:
        out: Tensor = block.cross_attn(rows, y, mask)
        return out

    return SelfCrossParts(
        block,
        hidden=lambda x, *args, **_: x,
        modulation=modulation,
        cross=cross,
        mlp=MLPParts(block.mlp, lambda: Norm.of(block.norm2), lambda: mlp_linears(block.mlp)),
        **others,
    )


_WAN = ("hidden_states", "encoder_hidden_states", "temb", "rotary_emb")


def wan(block: Any, layers: Mapping[str, int], taps: list[Tap]) -> Block:
    """WanTransformerBlock; one with a modulation for each token goes through taps."""

    def named(args: Any, kwargs: Any) -> dict[str, Any]:
        return dict(zip(_WAN, args, strict=False)) | dict(kwargs)

    def modulation(*args: Any, **kwargs: Any) -> Modulation:
        given = named(args, kwargs)
        return _four(block.scale_shift_table + given["temb"].float(), given["hidden_states"])

    def cross(rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        normed = block.norm2(rows.float()).type_as(rows)
        out: Tensor = block.attn2(normed, named(args, kwargs)["encoder_hidden_states"], None, None)
        return out

    parts = SelfCrossParts(
        block,
        hidden=_argument(named, "hidden_states"),
        modulation=modulation,
        cross=cross,
        mlp=MLPParts(
            block.ffn, lambda: _norm(block.norm3), lambda: feed_forward_linears(block.ffn)
        ),
        plain=lambda *args, **kwargs: named(args, kwargs)["temb"].ndim == 3,
    )
    return SelfCrossMLP(parts, layers, taps)


def _argument(named: Callable[[Any, Any], dict[str, Any]], name: str) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: named(args, kwargs)[name]


def _norm(module: Any) -> Norm:
    """A LayerNorm that computes in float32, as the ops do."""
    if type(module).__name__ == "FP32LayerNorm" and linear.unhooked(module):
        return Norm("layer", module.eps, module.weight, module.bias)
    return Norm.of(module)
