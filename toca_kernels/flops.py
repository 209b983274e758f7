"""FLOPs of a plan, counted as the published figures are.

Two conventions, for the two tools behind the published numbers:

* DiT (and PixArt, Open-Sora): the counter inside the published DiT code. 2 per multiply-add,
  softmax 5 and GELU 6 per element, 1 per element for scaling q and for each norm; the adaLN linear
  1 per multiply-add; both norms over all tokens on cached steps too; nothing outside the blocks.
* FLUX (double and single stream): what `calflops` sees. 2 per multiply-add, GELU and SiLU 1 and
  LayerNorm 4 per element, softmax 0; embedders and final layer included (`flux_outside`).

Selecting, gathering and scattering tokens is counted by neither.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from .plan import IntTable, Plan, check_integer

Family = Literal["self_mlp", "self_cross_mlp", "double_stream", "single_stream"]


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """The shape of one list of equal blocks; layers, N and k come from the plan.

    Attributes:
        family: the block's structure: self_mlp (DiT), self_cross_mlp (PixArt, Open-Sora),
            double_stream and single_stream (FLUX).
        prefix: what precedes this list's module names in the plan, such as "spatial_". None takes
            "single_" for single_stream and nothing for the rest.
        batch: B, samples per model call; guidance that batches both halves counts twice.
        channels: C.
        heads: H; C divisible by H.
        mlp_ratio: width of the MLP over C.
        mlp_matrices: 2, or 3 for a gated MLP (SwiGLU).
        attn_length: keys each query of self-attention sees; None = all N. In Open-Sora S tokens of
            a frame in the spatial blocks and T frames in the temporal ones.
        context_tokens: L, keys of the cross-attention. Their K and V count whenever it runs.
        block_modulation: whether each block has its own adaLN linear. None takes False for
            self_cross_mlp, whose blocks share one, and True for the rest.
        reproject: the attention is cached before its output projection, which then runs over all
            tokens on cached steps too: the double stream blocks of the published FLUX code.
    """

    batch: int
    channels: int
    heads: int
    family: Family = "self_mlp"
    prefix: str | None = None
    mlp_ratio: float = 4.0
    mlp_matrices: int = 2
    attn_length: int | None = None
    context_tokens: int = 0
    block_modulation: bool | None = None
    reproject: bool = False

    def __post_init__(self) -> None:
        if self.family not in get_args(Family):
            raise ValueError(
                f"family: expected one of {list(get_args(Family))}, got {self.family!r}"
            )
        for name in ("batch", "channels", "heads"):
            check_integer(name, getattr(self, name), low=1)
        if self.channels % self.heads:
            raise ValueError(
                f"heads: expected a divisor of channels={self.channels}, got {self.heads}"
            )
        ratio = self.mlp_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, numbers.Real) or not 0 < ratio < 1e6:
            raise ValueError(f"mlp_ratio: expected a number > 0, got {ratio!r}")
        if self.mlp_matrices not in (2, 3):
            raise ValueError(f"mlp_matrices: expected 2 or 3, got {self.mlp_matrices!r}")
        if self.attn_length is not None:
            check_integer("attn_length", self.attn_length, low=1)
        crosses = self.family == "self_cross_mlp"
        check_integer("context_tokens", self.context_tokens, low=1 if crosses else 0)
        if self.reproject and self.family != "double_stream":
            raise ValueError(f"reproject: expected False for {self.family}, got True")

    @property
    def hidden(self) -> int:
        """M, the width of the MLP."""
        return round(self.channels * self.mlp_ratio)

    def module(self, name: str) -> str:
        """The plan's name of this list's module."""
        prefix = self.prefix
        if prefix is None:
            prefix = "single_" if self.family == "single_stream" else ""
        return prefix + name

    def modules(self) -> tuple[str, ...]:
        """The plan's names of all modules of this list."""
        kinds = {
            "self_mlp": ("attn", "mlp"),
            "self_cross_mlp": ("attn", "cross_attn", "mlp"),
            "double_stream": ("attn", "img_mlp", "txt_mlp"),
            "single_stream": ("attn", "mlp"),
        }[self.family]
        return tuple(self.module(kind) for kind in kinds)


@dataclass(frozen=True, eq=False)
class Flops:
    """FLOPs of one run.

    Attributes:
        steps: (num_steps,) int64, read-only; done in each step.
        full_step: FLOPs of a step in which everything is computed.
    """

    steps: IntTable
    full_step: int

    @property
    def full(self) -> int:
        """FLOPs of the run with every step in full: the untouched model."""
        return self.full_step * len(self.steps)

    @property
    def done(self) -> int:
        """FLOPs of the run as planned."""
        return sum(self.steps.tolist())

    @property
    def ratio(self) -> float:
        """full / done, the ideal speed-up."""
        return self.full / self.done

    def __str__(self) -> str:
        done, full = self.done * 1e-12, self.full * 1e-12
        return f"{done:.4g} of {full:.4g} TFLOPs ({self.ratio:.2f}x less)"


def count_flops(plan: Plan, blocks: Sequence[BlockShape], *, outside: int = 0) -> Flops:
    """FLOPs of `plan` for the given lists of blocks (`Plan.flops` documents the arguments)."""
    if not blocks:
        raise ValueError("blocks: expected at least one BlockShape, got none")
    outside = check_integer("outside", outside, low=0)
    steps = np.full(plan.num_steps, outside, dtype=np.int64)
    full_step = outside
    for shape in blocks:
        missing = [name for name in shape.modules() if name not in plan.modules]
        if missing:
            raise ValueError(
                f"blocks: a {shape.family} block has the modules {list(shape.modules())}, "
                f"the plan has {list(plan.modules)}"
            )
        layers = {plan.num_layers[name] for name in shape.modules()}
        if len(layers) > 1:
            raise ValueError(
                f"blocks: expected one number of layers for {list(shape.modules())}, "
                f"got {sorted(layers)}"
            )
        done = {name: plan.k[name] for name in shape.modules()}
        every = {name: np.full((1, 1), plan.num_tokens[name]) for name in shape.modules()}
        steps += _block(shape, plan, done).sum(axis=1)
        full_step += int(_block(shape, plan, every).sum()) * layers.pop()
    steps.setflags(write=False)
    return Flops(steps=steps, full_step=full_step)


def _block(shape: BlockShape, plan: Plan, rows: dict[str, IntTable]) -> IntTable:
    """FLOPs of one block for `rows[module]` computed tokens, elementwise over the tables."""
    attn = shape.module("attn")
    num_tokens = plan.num_tokens[attn]
    cost = np.full_like(rows[attn], _fixed(shape, num_tokens)) + _self_attention(
        shape, rows[attn], num_tokens
    )
    for name in shape.modules():
        if name.endswith("cross_attn"):
            cost += _cross_attention(shape, rows[name])
        elif name.endswith("mlp"):
            cost += _mlp(shape, rows[name])
    return cost * shape.batch


def _counted_like_dit(shape: BlockShape) -> bool:
    """Which of the two conventions (see the top of the file) counts this family."""
    return shape.family in ("self_mlp", "self_cross_mlp")


def _fixed(shape: BlockShape, num_tokens: int) -> int:
    """What a block does for every sample on full and cached steps alike."""
    channels = shape.channels
    modulated = shape.block_modulation
    if modulated is None:
        modulated = shape.family != "self_cross_mlp"
    if _counted_like_dit(shape):
        norms = 2 * num_tokens * channels
        return norms + modulated * (channels + 6 * channels * channels)
    chunks, streams = (6, 2) if shape.family == "double_stream" else (3, 1)
    modulation = streams * (channels + 2 * chunks * channels * channels)
    projection = shape.reproject * 2 * num_tokens * channels * channels
    return modulated * modulation + projection


def _self_attention(shape: BlockShape, rows: IntTable, num_tokens: int) -> IntTable:
    """qkv and output projection of the rows, and their attention over all keys."""
    channels, keys = shape.channels, shape.attn_length or num_tokens
    # The output projection of a single stream block is part of its second linear (_mlp); one that
    # runs over all tokens on every step is part of _fixed.
    projections = 3 if shape.reproject or shape.family == "single_stream" else 4
    per_row = 2 * projections * channels * channels + 4 * keys * channels
    if _counted_like_dit(shape):
        per_row += channels + 5 * shape.heads * keys
    elif shape.family == "double_stream":
        per_row += 4 * channels
    return rows * per_row


def _cross_attention(shape: BlockShape, rows: IntTable) -> IntTable:
    """q and output projection of the rows, K and V of the text, and the attention between them."""
    channels, keys = shape.channels, shape.context_tokens
    per_row = 4 * channels * channels + channels + 4 * keys * channels + 5 * shape.heads * keys
    return rows * per_row + (rows > 0) * (4 * keys * channels * channels)


def _mlp(shape: BlockShape, rows: IntTable) -> IntTable:
    """The MLP of the rows; with its norm in the FLUX families, where only the rows are normed."""
    channels, hidden = shape.channels, shape.hidden
    per_row = 2 * shape.mlp_matrices * channels * hidden
    if _counted_like_dit(shape):
        return rows * (per_row + 6 * hidden)
    per_row += hidden + 4 * channels
    if shape.family == "single_stream":
        # The second linear takes [attention | MLP]: C more inputs, for every row recomputed.
        per_row += 2 * channels * channels
    return rows * per_row


def flux_outside(
    *,
    batch: int,
    img_tokens: int,
    txt_tokens: int,
    channels: int,
    in_channels: int = 64,
    context_channels: int = 4096,
    vector_channels: int = 768,
    time_channels: int = 256,
    guidance: bool = True,
) -> int:
    """FLOPs of one FLUX step outside its blocks, as `calflops` counts them; defaults: FLUX.1-dev.

    Args:
        batch: B.
        img_tokens: N of the image.
        txt_tokens: N of the text.
        channels: C.
        in_channels: channels of one packed latent token, in and out.
        context_channels: width of the text encoder's tokens.
        vector_channels: width of the pooled text embedding.
        time_channels: width of the sinusoidal embedding of timestep and guidance.
        guidance: whether the model embeds the guidance strength (dev does, schnell does not).
    """
    widths = [time_channels, vector_channels] + [time_channels] * guidance
    square = 2 * channels * channels
    embedders = sum(2 * width * channels + channels + square for width in widths)
    tokens_in = 2 * channels * (img_tokens * in_channels + txt_tokens * context_channels)
    final_modulation = channels + 2 * square
    final = img_tokens * channels * (4 + 2 * in_channels)
    return batch * (embedders + tokens_in + final_modulation + final)
