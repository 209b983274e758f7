"""Open-Sora 1.0's structure: blocks that attend within a frame, along time, to the text, then MLP.

Mirrors `STDiT` and `STDiTBlock` of hpcaitech/Open-Sora v1.0.  Blocks are called `block(x, y, t_mlp,
y_lens, tpe)`: x (B, T S, C), frames outermost; y packed text; t_mlp (B, 6 C); `tpe` (1, T, C) for
the first block, None for the others.  Temporal attention is neither normalised nor modulated and
has the gate of the spatial one.  `sample` is the loop's structure: the batch [conditional,
unconditional] with equal halves, guidance on three channels, as DiT has it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from published import (
    CaptionEmbedder,
    T2IFinalLayer,
    TimestepEmbedder,
    noise,
    pack_text,
    positions_2d,
    randomize,
    waves,
)
from stdit3 import Attention, Mlp, MultiHeadCrossAttention, t2i_modulate


class PatchEmbed3D(nn.Module):
    def __init__(self, patch_size: tuple[int, int, int], in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def unpatchify(x: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """(B, channels, frames, rows, cols) of (B, T S, values of a patch), channels innermost."""
    x = x.unflatten(2, (*patch, -1)).unflatten(1, grid)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


class STDiTBlock(nn.Module):
    def __init__(
        self, hidden_size: int, num_heads: int, d_s: int, d_t: int, mlp_ratio: float = 4.0
    ) -> None:
        super().__init__()
        self.hidden_size, self.d_s, self.d_t = hidden_size, d_s, d_t
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.cross_attn = MultiHeadCrossAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.drop_path = nn.Identity()
        self.scale_shift_table = nn.Parameter(torch.zeros(6, hidden_size))
        self.attn_temp = Attention(hidden_size, num_heads)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        t: Tensor,
        mask: list[int] | None = None,
        tpe: Tensor | None = None,
    ) -> Tensor:
        grid = (self.d_t, self.d_s)
        six = self.scale_shift_table + t.unflatten(1, (6, -1))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six.chunk(6, dim=1)

        frames = t2i_modulate(self.norm1(x), shift_a, scale_a).unflatten(1, grid)
        spatial = self.attn(frames.flatten(0, 1)).unflatten(0, (-1, self.d_t)).flatten(1, 2)
        x = x + self.drop_path(gate_a * spatial)

        tracks = x.unflatten(1, grid).transpose(1, 2).flatten(0, 1)
        tracks = self.attn_temp(tracks if tpe is None else tracks + tpe)
        temporal = tracks.unflatten(0, (-1, self.d_s)).transpose(1, 2).flatten(1, 2)
        x = x + self.drop_path(gate_a * temporal)

        x = x + self.cross_attn(x, y, mask)
        return x + self.drop_path(gate_m * self.mlp(t2i_modulate(self.norm2(x), shift_m, scale_m)))


class STDiT(nn.Module):
    def __init__(
        self,
        input_size: tuple[int, int, int] = (16, 32, 32),
        in_channels: int = 4,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        caption_channels: int = 4096,
        model_max_length: int = 120,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, 2 * in_channels
        self.hidden_size, self.num_heads, self.depth = hidden_size, num_heads, depth
        self.input_size, self.patch_size = input_size, patch_size
        frames, rows, cols = (n // p for n, p in zip(input_size, patch_size, strict=True))
        self.grid = (frames, rows, cols)
        self.num_temporal, self.num_spatial = frames, rows * cols
        self.register_buffer("pos_embed", positions_2d(rows, cols, hidden_size))
        self.register_buffer("pos_embed_temporal", waves(torch.arange(frames), hidden_size)[None])
        self.x_embedder = PatchEmbed3D(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size, model_max_length)
        self.blocks = nn.ModuleList(
            STDiTBlock(hidden_size, num_heads, rows * cols, frames, mlp_ratio) for _ in range(depth)
        )
        self.final_layer = T2IFinalLayer(hidden_size, math.prod(patch_size), self.out_channels)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, 4, frames, rows, cols), y (B, 1, L, channels), mask (B or fewer, L)."""
        x = self.x_embedder(x).unflatten(1, (self.num_temporal, self.num_spatial))
        x = (x + self.pos_embed).flatten(1, 2)
        t = self.t_embedder(timestep)
        t_mlp = self.t_block(t)
        y, y_lens = pack_text(self.y_embedder(y, self.training), mask)
        for index, block in enumerate(self.blocks):
            x = block(x, y, t_mlp, y_lens, self.pos_embed_temporal if index == 0 else None)
        return unpatchify(self.final_layer(x, t), self.grid, self.patch_size)


def tiny(*, seed: int = 0, **shape: Any) -> STDiT:
    """3 blocks of 4 heads of 12; 3 frames of 16 patches; text of 10 tokens."""
    defaults = {
        "input_size": (3, 8, 8),
        "hidden_size": 48,
        "depth": 3,
        "num_heads": 4,
        "caption_channels": 32,
        "model_max_length": 10,
    }
    return randomize(STDiT(**(defaults | shape)), seed)


def forward_with_cfg(
    model: STDiT, x: Tensor, timestep: Tensor, y: Tensor, cfg_scale: float, **kwargs: Any
) -> Tensor:
    """Guidance on a batch [cond, uncond] of one latent."""
    half = x[: len(x) // 2]
    out = model.forward(torch.cat([half, half]), timestep, y, **kwargs)
    cond, uncond = out[:, :3].chunk(2)
    guided = uncond + cfg_scale * (cond - uncond)
    return torch.cat([torch.cat([guided, guided]), out[:, 3:]], dim=1)


def sample(
    model: STDiT, steps: int, seed: int = 0, *, samples: int = 2, cfg_scale: float = 4.0
) -> Tensor:
    """The final latents, by DDIM (eta = 0) on a schedule milder than the published one."""
    null = model.y_embedder.y_embedding
    y = torch.cat([noise(samples, 1, *null.shape, seed=1), null.expand(samples, 1, -1, -1)])
    lengths = torch.arange(samples)[:, None] + len(null) // 2
    mask = (torch.arange(len(null)) < lengths).long()
    signal = torch.cumprod(1 - torch.linspace(1e-4, 2e-3, 1000, dtype=torch.float64), 0).tolist()
    times = torch.linspace(999, 0, steps).long().tolist()
    z = noise(samples, model.in_channels, *model.input_size, seed=seed)
    z = torch.cat([z, z])
    for step, t in enumerate(times):
        timestep = torch.full((2 * samples,), t)
        predicted = forward_with_cfg(model, z, timestep, y, cfg_scale, mask=mask)
        predicted = predicted[:, : model.in_channels]
        now, then = signal[t], signal[times[step + 1]] if step + 1 < steps else 1.0
        clean = (z - (1 - now) ** 0.5 * predicted) / now**0.5
        z = then**0.5 * clean + (1 - then) ** 0.5 * predicted
    return z[:samples]
