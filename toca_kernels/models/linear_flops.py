"""FLOPs of models that are served through taps, counted from their modules.

2 per multiply-add of the linears, and 4 C per pair of tokens that attend to each other; norms,
activations, modulation and the text's keys and values are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from ..blocks.block import Block
from ..blocks.taps import Tap
from ..flops import Flops
from ..plan import Plan, module_kind


def linear_flops(done: Plan, blocks: Sequence[Block], batch: Mapping[str, int]) -> Flops:
    """FLOPs of a plan for these blocks; `batch` is B of each module."""
    steps = np.zeros(done.num_steps, dtype=np.int64)
    full_step = 0
    for block in blocks:
        apart = {id(one.tap.module) for one in block.taps if one.tap.follows}
        for tap in (one.tap for one in block.taps):
            for name, cost in _per_row(tap, done, apart).items():
                cost *= batch[name]
                steps += cost * done.k[name][:, block.layers[name]]
                full_step += cost * done.num_tokens[name]
    steps.setflags(write=False)
    return Flops(steps=steps, full_step=full_step)


def _per_row(tap: Tap, done: Plan, apart: set[int]) -> dict[str, int]:
    """What a token costs, of each module of the plan that the tap's linears compute.

    Modules that are `apart` have taps of their own, or read the text alone.
    """
    if tap.cached == "seen":
        return {}
    names = [name for name in tap.outputs if name in done.k] or (
        [tap.decides] if tap.cached == "rows_in" else []
    )
    weights = sum(
        m.in_features * m.out_features
        for m in linears_of(tap.module)
        if m is tap.module or id(m) not in apart
    )
    cost = {name: 2 * weights // len(names) for name in names}
    for name in names:
        if module_kind(name) == "attn":
            keys = sum(done.num_tokens[other] for other in names)
            cost[name] += 4 * keys * _width(tap.module)
    return cost


def _width(attn: nn.Module) -> int:
    """C, the width of an attention's queries."""
    return max((m.in_features for m in linears_of(attn)), default=0)


def linears_of(module: nn.Module) -> list[Any]:
    """The linears of a module, of whatever class: quantised ones need not be an nn.Linear, and
    their weights may have any shape.  Of a linear in another (LoRA) only the inner one counts."""
    sized = [
        m
        for m in module.modules()
        if isinstance(getattr(m, "in_features", None), int)
        and isinstance(getattr(m, "out_features", None), int)
    ]
    outer = {id(m) for m in sized if sum(inner in sized for inner in m.modules()) > 1}
    return [m for m in sized if id(m) not in outer]
