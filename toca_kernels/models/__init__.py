"""Adapters: how a concrete model class maps onto a block family.

One module per source.  Models are recognised by structure, not by where their class was imported
from, so a fork or a copy works as the original does.
"""

from __future__ import annotations

from torch import nn

from . import diffusers_blocks, diffusers_dit, facebook_dit, flux, opensora, pixart
from .adapter import Adapter

ADAPTERS: tuple[type[Adapter], ...] = (
    facebook_dit.FacebookDiT,
    diffusers_dit.DiffusersDiT,
    diffusers_blocks.DiffusersTransformer,
    pixart.PixArt,
    opensora.STDiT,
    opensora.STDiT3,
    flux.Flux,
)


def find(model: nn.Module) -> Adapter:
    """The adapter of a model; ValueError names what is supported and what this model lacks."""
    missing = {adapter.name: adapter.missing(model) for adapter in ADAPTERS}
    for adapter in ADAPTERS:
        if not missing[adapter.name]:
            return adapter(model)
    lines = [f"  {name}: {what}" for name, what in missing.items()]
    raise ValueError(
        f"model: expected one of the supported families, got {type(model).__name__}, which lacks\n"
        + "\n".join(lines)
    )
