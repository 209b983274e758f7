"""Memory: what enabling a model will hold beside it, told before the first step.

Nothing is run: the modules' widths and the numbers of tokens say what every cache will look like,
and the caches are made on the meta device, by the code that makes them in a run.  So a model on the
meta device will do, and a laptop can tell what a video model needs:

    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=40, ...)
    print(config.memory(model, batch=1, tokens=(21, 45, 80), text_tokens=512, branches=2))
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .blocks.block import Block
from .blocks.self_mlp import CACHED_CHUNKS, SelfMLP
from .blocks.taps import Tap
from .cache import TokenCache
from .config import ToCaConfig
from .models.linear_flops import linears_of
from .ops import packing_unavailable
from .plan import Plan, check_integer, module_kind
from .room import readable, working_nbytes
from .run import Run
from .track import Layout

_META = torch.device("meta")
_STEPS = 50  # of a run whose length nobody says: the selection's size hardly depends on it


@dataclass(frozen=True)
class Kept:
    """What is kept of one module, of all guidance branches.

    Attributes:
        module: its name in the plan, or that of a text's keys and values.
        layers: how many are kept; tokens, channels: of each, for all samples of a call.
        nbytes: all of it, scales and slopes included.
    """

    module: str
    layers: int
    tokens: int
    channels: int
    nbytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes that an enabled model will hold beside its own, at the most.

    The four sums bear the names that `Summary` has for them.

    Attributes:
        modules: the caches, by module.
        cache_bytes: their sum.
        other_bytes: scores, ages, and the selections of a step.
        modulation_bytes: table of gates, shifts and scales, where the timesteps are announced.
        packed_bytes: second copies of MLP weights, on a CPU.
        branches: guidance branches that the caches are for.
        host_bytes: pinned host memory that the caches lie in, what is wasted between them included
            (cache_device="cpu"); 0 where they lie on the device.
        working_bytes: buffers on the device that they are then brought to.
    """

    modules: tuple[Kept, ...]
    cache_bytes: int
    other_bytes: int
    modulation_bytes: int
    packed_bytes: int
    branches: int
    host_bytes: int = 0
    working_bytes: int = 0

    @property
    def total(self) -> int:
        """Of the device: without caches that lie in host memory."""
        caches = self.working_bytes if self.host_bytes else self.cache_bytes
        return caches + self.other_bytes + self.modulation_bytes + self.packed_bytes

    def __str__(self) -> str:
        width = max(20, *(len(kept.module) for kept in self.modules))
        lines = [f"{'module':{width}} layers    tokens channels      memory"]
        lines += [
            f"{kept.module:{width}} {kept.layers:6} {kept.tokens:9} {kept.channels:8} "
            f"{readable(kept.nbytes):>11}"
            for kept in self.modules
        ]
        caches = f"caches ({self.branches} branch{'es' if self.branches > 1 else ''})"
        sums = {caches: self.cache_bytes}
        if self.host_bytes:
            sums = {caches + ", pinned on the host": self.host_bytes}
            sums["working buffers"] = self.working_bytes
        sums |= {
            "scores, ages, selections": self.other_bytes,
            "modulation table": self.modulation_bytes,
            "packed weights": self.packed_bytes,
            "total on the device" if self.host_bytes else "total": self.total,
        }
        lines += [f"{name:{width + 26}} {readable(sum_):>11}" for name, sum_ in sums.items()]
        return "\n".join(lines)


def estimate(
    config: ToCaConfig,
    model: nn.Module,
    *,
    batch: int,
    tokens: int | Sequence[int],
    text_tokens: float,
    num_steps: int | None,
    dtype: torch.dtype | None,
    branches: int,
    device: torch.device | str | None,
) -> Memory:
    """What `ToCaConfig.memory` returns; it documents the arguments."""
    batch = check_integer("batch", batch, low=1)
    branches = check_integer("branches", branches, low=1)
    if num_steps is None:
        num_steps = len(config.step_ratio or ()) or max(_STEPS, *(config.full_at or ()), 0) + 1
    if not isinstance(text_tokens, numbers.Real) or not 0 <= text_tokens < math.inf:
        raise ValueError(f"text_tokens: expected a number >= 0, got {text_tokens!r}")
    where = torch.device(device) if device is not None else next(model.parameters()).device
    if where.type == "cpu":
        config = config.replace(cache_device=None)  # there it is all the same
    adapter = models.find(model)
    blocks = adapter.blocks()
    sizes = _Sizes(batch, tokens, text_tokens, blocks)
    mask = torch.ones(1) if config.selector == "mask" else None
    run = Run(adapter, blocks, config, num_steps, None, mask)
    layouts = _layouts(run, sizes, dtype or _dtype(model, blocks))
    run.remember(_META, layouts)
    cache = run.cache_for(_META, _META)
    plan = run.plan({name: cache.tracks[name].layout.shape[1] for name in run.layers})
    modules = tuple(
        Kept(
            name,
            sum(one is not None for one in track.features),
            track.layout.shape[0] * track.layout.shape[1],
            track.layout.shape[2],
            track.nbytes * branches,
        )
        for name, track in cache.tracks.items()
        if track.nbytes
    )
    home = cache.home
    return Memory(
        modules=modules,
        cache_bytes=cache.nbytes * branches,
        other_bytes=_other(run, cache, plan) * branches,
        modulation_bytes=_modulation(run, plan, batch, layouts["mlp"][0].dtype) * branches
        if "mlp" in layouts
        else 0,
        packed_bytes=_packed(blocks, config, where),
        branches=branches,
        host_bytes=0 if home is None else home.nbytes * branches,
        working_bytes=0 if home is None else working_nbytes(run, list(cache.tracks.values())),
    )


# --- what the modules' outputs will look like ----------------------------------------------------


class _Sizes:
    """Samples and tokens of each module, by what it is and what stands beside it."""

    def __init__(
        self, batch: int, tokens: int | Sequence[int], text: float, blocks: Sequence[Block]
    ) -> None:
        sizes = (tokens,) if isinstance(tokens, numbers.Integral) else tokens
        if not isinstance(sizes, Sequence) or isinstance(sizes, str) or not sizes:
            raise ValueError(
                "tokens: expected their number, or (rows, columns), or (frames, rows, columns), "
                f"got {tokens!r}"
            )
        grid = [check_integer("tokens", size, low=1) for size in sizes]
        self.batch, self.tokens, self.text = batch, math.prod(grid), text
        names = {name for block in blocks for name in block.layers}
        self.apart = any(name.startswith("temporal_") for name in names)  # attention in time
        self.frames = grid[0] if len(grid) == 3 else 0
        self.packed = any("text_kv_linear" in name for name in names)
        if self.apart and not self.frames:
            raise ValueError(
                "tokens: expected (frames, rows, columns) for a model that attends in space and "
                f"in time by turns, got {tokens!r}"
            )

    def of(self, block: Block, name: str) -> tuple[int, int]:
        """(B, N) of a module; `name` without the suffix of what is kept beside it."""
        if "text_" in name:
            if self.packed:  # the texts of all samples in one row
                return 1, round(self.batch * self.text)
            # Each frame reads its sample's text, where frames are samples.
            return self.batch * (self.frames if self.apart else 1), round(self.text)
        if name.startswith(("txt_", "single_txt_")):
            return self.batch, round(self.text)
        if self._joins(block, name):
            return self.batch, self.tokens + round(self.text)
        # Latte folds frames into samples, Open-Sora (of packed texts) in its attentions only.
        if self.apart and (not self.packed or module_kind(name) == "attn"):
            other = self.tokens // self.frames
            if name.startswith("temporal_"):
                return self.batch * other, self.frames
            return self.batch * self.frames, other
        return self.batch, self.tokens

    def _joins(self, block: Block, name: str) -> bool:
        """Whether the module's tokens are the image's and the text's."""
        if block.joint:
            return True
        if name.startswith("single_"):
            return module_kind(name) == "mlp" or "single_txt_attn" not in block.layers
        return name == "mlp" and "txt_attn" in block.layers


def _layouts(run: Run, sizes: _Sizes, dtype: torch.dtype) -> dict[str, list[Layout]]:
    """What the first step of a run would find."""
    found: dict[str, dict[int, Layout]] = {}
    for block in run.blocks:
        for tap in (one.tap for one in block.taps):
            for name, base, channels in _kept(tap):
                if name not in run.kept_layers:
                    continue
                shape = (*sizes.of(block, base), channels)
                found.setdefault(name, {})[block.layers[name]] = Layout(shape, dtype, _META)
    return {name: [layers[layer] for layer in sorted(layers)] for name, layers in found.items()}


def _kept(tap: Tap) -> Iterator[tuple[str, str, int]]:
    """(name, the module whose tokens it has, channels) of all that may be kept for a tap."""
    for name in tap.outputs:
        yield name, name, _width(tap, name)
    if tap.queries:
        yield tap.entropy, tap.outputs[0], 1
    if tap.rowwise:
        for name in tap.kept_keys:
            yield name, tap.outputs[0], _width(tap, tap.outputs[0])


def _width(tap: Tap, name: str) -> int:
    """Channels of what a module returns.

    A linear says so itself; anything else adds to the residual that it reads, and so is as wide.
    Only a text that is projected on its own may be narrower.
    """
    linears = linears_of(tap.module)
    if not linears:
        raise ValueError(f"model: expected linears in the module {name!r}, found none")
    added = linears_of(getattr(tap.module, "to_add_out", None) or nn.Identity())
    if name.startswith("txt_") and added:
        return int(added[-1].out_features)
    alone = linears[0] if len(linears) == 1 else tap.module
    width = getattr(alone, "out_features", None)
    return int(linears[0].in_features) if width is None else int(width)


def _dtype(model: nn.Module, blocks: Sequence[Block]) -> torch.dtype:
    """Of the blocks' weights, of the model's where theirs are quantised."""
    module: Any = blocks[0].taps[0].tap.module
    for parameters in (module.parameters(), model.parameters()):
        for one in parameters:
            if one.dtype.is_floating_point and one.dtype.itemsize > 1:
                dtype: torch.dtype = one.dtype
                return dtype
    return torch.get_default_dtype()


# --- what is held beside caches ------------------------------------------------------------------


def _other(run: Run, cache: TokenCache, plan: Plan) -> int:
    """Scores and ages, and the largest selection of a step."""
    steps = [0] * plan.num_steps
    first = run.blocks[0]
    watched = run.config.residual_threshold is not None  # then the first block selects nothing
    for name in run.layers:
        track = cache.tracks[name]
        if track.nbytes:
            cache.every(*track.layout.shape[:2])
        B, N, _ = track.layout.shape
        if not track.selects:
            continue
        for step in range(plan.num_steps):
            cached = ~plan.full[name][step]
            if watched and name in first.layers:
                cached[first.layers[name]] = False
            k = plan.k[name][step][cached]
            steps[step] += B * (8 * int(k.sum()) + 4 * N * len(k))
    for name, track in cache.tracks.items():
        if name not in run.layers:
            cache.every(*track.layout.shape[:2])
    added = 0
    if watched:
        residual = cache.tracks[first.modules[0]].layout
        added = math.prod(residual.shape) * residual.dtype.itemsize
    return cache.other_nbytes + added + max(steps)


def _modulation(run: Run, plan: Plan, labels: int, dtype: torch.dtype) -> int:
    """Rows of all cached steps but the first, one for each sample of a step and each layer."""
    blocks = [block for block in run.blocks if isinstance(block, SelfMLP)]
    if len(blocks) < len(run.blocks) or not run.config.tabulate_modulation:
        return 0
    fused = run.config.full_steps == "fused"
    cached = [
        not all(full[step].all() for full in plan.full.values())
        for step in range(1, plan.num_steps)
    ]
    steps = len(cached) if fused else sum(cached)
    every = fused or run.config.self_attention == "partial"
    chunks = 6 if every else CACHED_CHUNKS.stop - CACHED_CHUNKS.start
    widths = [
        linears_of(block.parts.modulation())[-1].out_features for block in blocks if not block.never
    ]
    return steps * labels * sum(width // 6 * chunks for width in widths) * dtype.itemsize


def _packed(blocks: Sequence[Block], config: ToCaConfig, device: torch.device) -> int:
    """Weights that would be laid out a second time on this device."""
    if not config.prepack:
        return 0
    found = (mlp.parts.linears() for block in blocks if not block.never for mlp in block.mlps)
    weights: list[Tensor] = [
        linear.weight for parts in found if parts is not None for linear in parts[:2]
    ]
    return sum(one.nbytes for one in weights if not packing_unavailable(one.dtype, device))
