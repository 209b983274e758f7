"""diffusers' FeedForward, the MLP of most of its blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..blocks.linear import hooked, plain


def feed_forward_linears(ff: Any) -> tuple[nn.Linear, nn.Linear, str] | None:
    """(fc1, fc2, activation) of a FeedForward if it is GELU(linear), dropout, linear."""
    net = getattr(ff, "net", None)
    if net is None or len(net) != 3:
        return None
    gelu = net[0]
    if (
        type(gelu).__name__ != "GELU"
        or not isinstance(net[1], nn.Dropout)
        or any(hooked(module) for module in net)
        or not plain(gelu.proj)
        or not plain(net[2])
    ):
        return None
    return gelu.proj, net[2], "gelu_tanh" if gelu.approximate == "tanh" else "gelu"
