"""PixArt-alpha's structure: adaLN-single blocks with self-attention, cross-attention and an MLP.

Mirrors `PixArt` (one resolution) with `PixArtBlock`, and `PixArtMS` (any size and aspect ratio)
with `PixArtMSBlock`, of PixArt-alpha/PixArt-alpha's diffusion/model/nets.  Blocks are called
`block(x, y, t0, y_lens)`: x (B, N, C); y (1, sum of text lengths, C), packed; t0 (B, 6 C), the same
for all blocks; y_lens a list of B lengths.  `sample` is its loop: DPM-Solver++(2M), one evaluation
a step of the batch [unconditional, conditional], with one row of mask for both.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
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
from stdit3 import Mlp, MultiHeadCrossAttention, t2i_modulate


class WindowAttention(nn.Module):
    """Self-attention over all tokens: published configurations leave the window out."""

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)
        self.use_rel_pos = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(B, N, C)))


class PixArtBlock(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = WindowAttention(hidden_size, num_heads=num_heads)
        self.cross_attn = MultiHeadCrossAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.drop_path = nn.Identity()
        self.window_size = 0
        self.scale_shift_table = nn.Parameter(torch.zeros(6, hidden_size))

    def forward(self, x: Tensor, y: Tensor, t: Tensor, mask: list[int] | None = None) -> Tensor:
        six = self.scale_shift_table + t.unflatten(1, (6, -1))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six.chunk(6, dim=1)
        attention = self.attn(t2i_modulate(self.norm1(x), shift_a, scale_a))
        x = x + self.drop_path(gate_a * attention)
        x = x + self.cross_attn(x, y, mask)
        return x + self.drop_path(gate_m * self.mlp(t2i_modulate(self.norm2(x), shift_m, scale_m)))


class PixArtMSBlock(PixArtBlock):
    """The multi-scale model's: a class of its own, the same arithmetic."""


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class PixArt(nn.Module):
    block: type[PixArtBlock] = PixArtBlock

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        caption_channels: int = 4096,
        model_max_length: int = 120,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, 2 * in_channels
        self.patch_size, self.num_heads = patch_size, num_heads
        self.base_size = input_size // patch_size
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.register_buffer("pos_embed", positions_2d(self.base_size, self.base_size, hidden_size))
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size, model_max_length)
        self.blocks = nn.ModuleList(
            self.block(hidden_size, num_heads, mlp_ratio) for _ in range(depth)
        )
        self.final_layer = T2IFinalLayer(hidden_size, patch_size**2, self.out_channels)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, mask: Tensor | None = None, data_info: Any = None
    ) -> Tensor:
        """x (B, 4, rows, cols), t (B,), y (B, 1, L, channels), mask (B or fewer, L)."""
        rows, cols = (size // self.patch_size for size in x.shape[-2:])
        self.h, self.w = rows, cols
        x = self.x_embedder(x) + self.positions(x)
        t = self.t_embedder(t) + self.sizes(data_info, len(x))
        t0 = self.t_block(t)
        y, y_lens = pack_text(self.y_embedder(y, self.training), mask)
        for block in self.blocks:
            x = block(x, y, t0, y_lens)
        return self.unpatchify(self.final_layer(x, t))

    def positions(self, x: Tensor) -> Tensor:
        return self.pos_embed

    def sizes(self, data_info: Any, batch: int) -> Tensor | float:
        return 0.0

    def unpatchify(self, x: Tensor) -> Tensor:
        p, c = self.patch_size, self.out_channels
        x = x.view(len(x), self.h, self.w, p, p, c)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), c, self.h * p, self.w * p)

    def forward_with_dpmsolver(self, x: Tensor, t: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
        """The predicted noise alone, without the learned variance."""
        return self.forward(x, t, y, **kwargs)[:, : self.in_channels]


class PixArtMS(PixArt):
    block = PixArtMSBlock

    def __init__(self, **shape: Any) -> None:
        super().__init__(**shape)
        width = self.pos_embed.shape[-1]
        self.csize_embedder = SizeEmbedder(width // 3)
        self.ar_embedder = SizeEmbedder(width // 3)

    def positions(self, x: Tensor) -> Tensor:
        return positions_2d(self.h, self.w, self.pos_embed.shape[-1]).to(x)

    def sizes(self, data_info: Any, batch: int) -> Tensor:
        size = self.csize_embedder(data_info["img_hw"], batch)
        return torch.cat([size, self.ar_embedder(data_info["aspect_ratio"], batch)], dim=1)


def tiny(*, multi_scale: bool = False, seed: int = 0, **shape: Any) -> PixArt:
    """3 blocks of 4 heads of 12; text of 10 tokens."""
    defaults = {
        "input_size": 16,
        "hidden_size": 48,
        "depth": 3,
        "num_heads": 4,
        "caption_channels": 32,
        "model_max_length": 10,
    }
    model = PixArtMS(**(defaults | shape)) if multi_scale else PixArt(**(defaults | shape))
    return randomize(model, seed)


def sample(
    model: PixArt, steps: int, seed: int = 0, *, samples: int = 2, cfg_scale: float = 4.5
) -> Tensor:
    """The final latents of prompts of different lengths, guided.

    The noise schedule ends at a signal of 0.6 and not of 0.007, whose first step would magnify what
    a random model predicts.
    """
    multi_scale = isinstance(model, PixArtMS)
    size = (16, 24) if multi_scale else (2 * model.base_size, 2 * model.base_size)
    null = model.y_embedder.y_embedding
    length, channels = null.shape
    condition = noise(samples, 1, length, channels, seed=1)
    uncondition = null.expand(samples, 1, -1, -1)
    lengths = torch.arange(samples)[:, None] + length // 2
    mask = (torch.arange(length) < lengths).long()
    info = {
        "img_hw": torch.tensor([[size[0] * 8.0, size[1] * 8.0]]).repeat(samples, 1),
        "aspect_ratio": torch.tensor([[size[0] / size[1]]]).repeat(samples, 1),
    }

    def level(t: float) -> tuple[float, float, float]:
        """Signal, noise and half the log of their squares' ratio, at a time from 1 to 0."""
        log_signal = -0.25 * t**2 * (2.0 - 0.1) - 0.5 * t * 0.1
        signal, rest = math.exp(log_signal), math.sqrt(-math.expm1(2 * log_signal))
        return signal, rest, log_signal - math.log(rest)

    times = torch.linspace(1.0, 1e-3, steps + 1).tolist()
    x = noise(samples, model.in_channels, *size, seed=seed)
    before: tuple[Tensor, float] | None = None
    for now, then in pairwise(times):
        signal, rest, log_ratio = level(now)
        predicted = model.forward_with_dpmsolver(
            torch.cat([x, x]),
            torch.full((2 * samples,), (now - 1e-3) * 1000),
            torch.cat([uncondition, condition]),
            mask=mask,
            data_info=info,
        )
        free, guided = predicted.chunk(2)
        clean = (x - rest * (free + cfg_scale * (guided - free))) / signal
        next_signal, next_rest, next_log_ratio = level(then)
        h = next_log_ratio - log_ratio
        slope = clean
        if before is not None and then > times[-1]:
            slope = clean + 0.5 * h / before[1] * (clean - before[0])
        x = next_rest / rest * x - next_signal * math.expm1(-h) * slope
        before = clean, h
    return x
