"""diffusers' stream blocks that a cached step composes from the ops: FLUX, SD3, HunyuanVideo, Qwen.

Their modulation is one linear of the conditioning for each stream; a cached step reads only the
rows of it that belong to the attention's gate and to the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import linear
from ..blocks.block import Block
from ..blocks.double_stream import DoubleParts, DoubleStream, Modulation, StreamParts
from ..blocks.row_mlp import MLPParts, Norm
from ..blocks.single_stream import SingleParts, SingleStream
from ..blocks.taps import Tap
from .feed_forward import feed_forward_linears

Made = Callable[[Any, Mapping[str, int], list[Tap]], Block]

_DOUBLE = ("hidden_states", "encoder_hidden_states", "temb")


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that these blocks share, by name: some models pass them by position."""
    return dict(zip(_DOUBLE, args, strict=False)) | dict(kwargs)


def _only_streams(*args: Any, **kwargs: Any) -> bool:
    """Whether nothing else is added to a stream (IP-adapters) and one modulation serves all."""
    given = _named(args, kwargs)
    others = given.get("joint_attention_kwargs") or {}
    return not any(name.startswith("ip_") for name in others) and (
        given.get("modulate_index") is None
    )


def _in_range(x: Tensor) -> Tensor:
    """As these blocks do, lest float16 overflows."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def double_stream(*, text_first_out: bool) -> Made:
    """Of blocks with AdaLayerNormZero and FeedForward; what they return differs in its order."""

    def make(block: Any, layers: Mapping[str, int], taps: list[Tap]) -> Block:
        if "txt_mlp" not in layers or "dual_attn" in layers:
            return Block(block, layers, taps)  # SD3's last block, and those with two attentions
        streams = (
            _stream("img", 0, block.ff, lambda: block.norm2, lambda t: _ada(block.norm1, t)),
            _stream(
                "txt",
                1,
                block.ff_context,
                lambda: block.norm2_context,
                lambda t: _ada(block.norm1_context, t),
            ),
        )
        return _double(block, layers, taps, streams, text_first_out=text_first_out)

    return make


def qwen_double_stream(block: Any, layers: Mapping[str, int], taps: list[Tap]) -> Block:
    def of(name: str) -> Callable[[Tensor], Modulation]:
        silu, fused = getattr(block, f"{name}_mod")
        return lambda temb: _four(linear.outputs_from(fused, silu(temb), fused.out_features // 3))

    streams = (
        _stream("img", 0, block.img_mlp, lambda: block.img_norm2, of("img")),
        _stream("txt", 1, block.txt_mlp, lambda: block.txt_norm2, of("txt")),
    )
    return _double(block, layers, taps, streams, text_first_out=True)


def _ada(norm: Any, temb: Tensor) -> Modulation:
    """AdaLayerNormZero: shift, scale, gate of the attention, then of the MLP."""
    fused = norm.linear
    return _four(linear.outputs_from(fused, norm.silu(temb), fused.out_features // 3))


def _four(rows: Tensor) -> Modulation:
    gate_a, shift, scale, gate = rows.chunk(4, dim=1)
    return gate_a, shift, scale, gate


def _stream(
    name: str,
    position: int,
    mlp: nn.Module,
    norm: Callable[[], nn.Module],
    modulation: Callable[[Tensor], Modulation],
) -> StreamParts:
    return StreamParts(
        name,
        hidden=lambda *args, **kwargs: _named(args, kwargs)[_DOUBLE[position]],
        modulation=lambda *args, **kwargs: modulation(_named(args, kwargs)["temb"]),
        mlp=MLPParts(mlp, lambda: Norm.of(norm()), lambda: feed_forward_linears(mlp)),
    )


def _double(
    block: Any,
    layers: Mapping[str, int],
    taps: list[Tap],
    streams: tuple[StreamParts, StreamParts],
    *,
    text_first_out: bool,
) -> Block:
    def pack(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        text = _in_range(text)
        return (text, image) if text_first_out else (image, text)

    return DoubleStream(DoubleParts(block, streams, pack, _only_streams), layers, taps)


def single_stream(*, text_first: bool, attention: tuple[str, ...] = ("single_attn",)) -> Made:
    """Of blocks that take and return both streams and put them together in between."""

    def make(block: Any, layers: Mapping[str, int], taps: list[Tap]) -> Block:
        def streams(args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
            given = _named(args, kwargs)
            image, text = given["hidden_states"], given["encoder_hidden_states"]
            return (text, image) if text_first else (image, text)

        def modulation(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
            temb = _named(args, kwargs)["temb"]
            shift, scale, gate = block.norm.linear(block.norm.silu(temb)).chunk(3, dim=1)
            return shift, scale, gate

        def pack(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            first = streams(args, kwargs)[0].shape[1]
            x = _in_range(x)
            return x[:, :first], x[:, first:]

        parts = SingleParts(
            block,
            hidden=lambda *args, **kwargs: torch.cat(streams(args, kwargs), dim=1),
            modulation=modulation,
            norm=lambda: Norm.of(block.norm.norm),
            expand=lambda rows: block.act_mlp(block.proj_mlp(rows)),
            contract=block.proj_out,
            attention=attention,
            pack=pack,
            plain=_only_streams,
        )
        return SingleStream(parts, layers, taps)

    return make
