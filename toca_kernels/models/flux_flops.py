"""FLOPs of FLUX by the convention of the published figures (flops.py)."""

from __future__ import annotations

from ..flops import BlockShape, Flops, flux_outside
from ..plan import Plan


def flux_flops(
    done: Plan,
    *,
    batch: int,
    channels: int,
    heads: int,
    mlp_ratio: float,
    in_channels: int,
    context_channels: int,
    vector_channels: int,
    guidance: bool,
) -> Flops:
    """FLOPs of what a FLUX model did, embedders and final layer included."""
    outside = flux_outside(
        batch=batch,
        img_tokens=done.num_tokens["img_mlp"],
        txt_tokens=done.num_tokens["txt_mlp"],
        channels=channels,
        in_channels=in_channels,
        context_channels=context_channels,
        vector_channels=vector_channels,
        guidance=guidance,
    )
    shape = {"batch": batch, "channels": channels, "heads": heads, "mlp_ratio": mlp_ratio}
    return _joined(done).flops(
        BlockShape(family="double_stream", **shape),  # type: ignore[arg-type]  # mixed numbers
        BlockShape(family="single_stream", **shape),  # type: ignore[arg-type]
        outside=outside,
    )


def _joined(done: Plan) -> Plan:
    """The plan with the two streams' attention as the one module that it is counted as."""
    streams = ("img_attn", "txt_attn")
    return Plan(
        num_steps=done.num_steps,
        num_layers={**done.num_layers, "attn": done.num_layers["img_attn"]},
        num_tokens={**done.num_tokens, "attn": sum(done.num_tokens[name] for name in streams)},
        full={**done.full, "attn": done.full["img_attn"]},
        k={**done.k, "attn": done.k["img_attn"] + done.k["txt_attn"]},
    )
