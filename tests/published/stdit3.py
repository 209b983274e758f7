"""Open-Sora 1.2's structure: pairs of a spatial and a temporal block, each with cross-attention.

Mirrors `STDiT3` and `STDiT3Block` of hpcaitech/Open-Sora v1.2.  Blocks are called `block(x, y,
t_mlp, y_lens, x_mask, t0_mlp, T, S)`: x (B, T S, C), frames outermost; y packed text; t_mlp and
t0_mlp (B, 6 C).  Where `x_mask` (B, T) is False, a frame is given and not made: its modulation is
that of timestep 0, t0_mlp.  Queries and keys are normalised, and rotated along time in temporal
blocks only.  `sample` is its rectified flow: the batch [conditional, unconditional], one mask for
both halves, and an x_mask that changes from step to step if frames are given.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from published import (
    CaptionEmbedder,
    SizeEmbedder,
    T2IFinalLayer,
    TimestepEmbedder,
    noise,
    pack_text,
    positions_2d,
    randomize,
)
from published.stdit import PatchEmbed3D, unpatchify
from stdit3 import RotaryEmbedding, STDiT3Block


class FinalLayer(T2IFinalLayer):
    """Frames that are given are normalised and modulated again, by timestep 0: as published."""

    def forward(self, x: Tensor, t: Tensor, x_mask: Any, t0: Any, T: int, S: int) -> Tensor:
        x = self.modulated(x, t)
        if x_mask is not None:
            made = x_mask.repeat_interleave(S, dim=1)[..., None]
            x = torch.where(made, x, self.modulated(x, t0))
        return self.linear(x)


class STDiT3(nn.Module):
    def __init__(
        self,
        in_channels: int = 4,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        caption_channels: int = 4096,
        model_max_length: int = 300,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, 2 * in_channels
        self.hidden_size, self.num_heads, self.depth = hidden_size, num_heads, depth
        self.patch_size = patch_size
        self.rope = RotaryEmbedding(hidden_size // num_heads)
        self.x_embedder = PatchEmbed3D(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.fps_embedder = SizeEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size, model_max_length)
        self.spatial_blocks = nn.ModuleList(
            STDiT3Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth)
        )
        turn = self.rope.rotate_queries_or_keys
        self.temporal_blocks = nn.ModuleList(
            STDiT3Block(hidden_size, num_heads, mlp_ratio, rope=turn, temporal=True)
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, math.prod(patch_size), self.out_channels)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
    ) -> Tensor:
        """x (B, 4, frames, rows, cols), y (B, 1, L, channels), mask (B or fewer, L)."""
        T, rows, cols = (n // p for n, p in zip(x.shape[2:], self.patch_size, strict=True))
        S = rows * cols
        rate = self.fps_embedder(fps.unsqueeze(1), len(x))
        t = self.t_embedder(timestep) + rate
        t_mlp, t0, t0_mlp = self.t_block(t), None, None
        if x_mask is not None:
            t0 = self.t_embedder(torch.zeros_like(timestep)) + rate
            t0_mlp = self.t_block(t0)
        y, y_lens = pack_text(self.y_embedder(y, self.training), mask)
        where = positions_2d(rows, cols, self.hidden_size).to(x)
        x = (self.x_embedder(x).unflatten(1, (T, S)) + where).flatten(1, 2)
        for spatial_block, temporal_block in zip(
            self.spatial_blocks, self.temporal_blocks, strict=True
        ):
            x = spatial_block(x, y, t_mlp, y_lens, x_mask, t0_mlp, T, S)
            x = temporal_block(x, y, t_mlp, y_lens, x_mask, t0_mlp, T, S)
        x = self.final_layer(x, t, x_mask, t0, T, S)
        return unpatchify(x, (T, rows, cols), self.patch_size).float()


def tiny(*, seed: int = 0, **shape: Any) -> STDiT3:
    """2 spatial and 2 temporal blocks of 4 heads of 12; text of 10 tokens."""
    defaults = {
        "hidden_size": 48,
        "depth": 2,
        "num_heads": 4,
        "caption_channels": 32,
        "model_max_length": 10,
    }
    return randomize(STDiT3(**(defaults | shape)), seed)


def sample(
    model: STDiT3,
    steps: int,
    seed: int = 0,
    *,
    samples: int = 2,
    cfg_scale: float = 4.0,
    size: tuple[int, int, int] = (3, 8, 8),
    strength: Tensor | None = None,
) -> Tensor:
    """The final latents.

    `strength` (samples, frames), from 0 to 1, conditions on frames: one of strength 0 is given, one
    of strength s is made, from noise on top of what it was, in the steps whose time is at most s.
    """
    null = model.y_embedder.y_embedding
    y = torch.cat([noise(samples, 1, *null.shape, seed=1), null.expand(samples, 1, -1, -1)])
    lengths = torch.arange(samples)[:, None] + len(null) // 2
    text = {"y": y, "mask": (torch.arange(len(null)) < lengths).long()}
    video = {"fps": torch.full((1,), 24.0), "height": torch.full((1,), 64.0)}
    video["width"] = video["height"]
    times = [1 - step / steps for step in range(steps)] + [0.0]
    z = noise(samples, model.in_channels, *size, seed=seed)
    started = None if strength is None else strength == 1
    for now, then in pairwise(times):
        x_mask, given = None, z
        if strength is not None:
            made = strength >= now
            fresh = (made & ~started)[:, None, :, None, None]
            started = made
            z = torch.where(fresh, (1 - now) * z + now * noise(*z.shape, seed=seed + 1), z)
            x_mask = made.repeat(2, 1)
        timestep = torch.full((2 * samples,), 1000 * now)
        out = model(torch.cat([z, z]), timestep, x_mask=x_mask, **text, **video)
        cond, uncond = out[:, : model.in_channels].chunk(2)
        z = z + (now - then) * (uncond + cfg_scale * (cond - uncond))
        if strength is not None:
            z = torch.where(made[:, None, :, None, None], z, given)
    return z
