"""Tiny models of the structure of published repositories, own code, for the tests of adapters.

What an adapter can see is theirs: names of modules and arguments, what blocks are called with and
what they compute.  Parts that PixArt-alpha and Open-Sora share are here, but for those of a block,
which are in benchmarks/stdit3.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stdit3 import Mlp, t2i_modulate


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, in which no gate is zero and no norm silences its input.

    A projection keeps the size of what it projects; the weight of a norm, a vector, is near one.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.normal_(std=0.1, generator=generator)
                parameter.add_(float(not name.endswith("bias")))
    return model.requires_grad_(False).eval()


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def waves(positions: Tensor, channels: int) -> Tensor:
    """(..., channels): cosines, then sines, of falling frequency."""
    half = channels // 2
    rate = torch.exp(-math.log(10000) * torch.arange(half, device=positions.device) / half)
    angle = positions[..., None].float() * rate
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def positions_2d(rows: int, cols: int, channels: int) -> Tensor:
    """(1, rows * cols, channels): half of the channels for the row, half for the column."""
    row = waves(torch.arange(rows), channels // 2)[:, None].expand(-1, cols, -1)
    col = waves(torch.arange(cols), channels // 2)[None].expand(rows, -1, -1)
    return torch.cat([row, col], dim=-1).reshape(1, rows * cols, channels)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )
        self.frequency_embedding_size = frequency_embedding_size

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(waves(t, self.frequency_embedding_size).to(self.mlp[0].weight.dtype))


class SizeEmbedder(TimestepEmbedder):
    """A size of several numbers, each embedded, side by side."""

    def forward(self, s: Tensor, bs: int) -> Tensor:
        s = s[:, None] if s.ndim == 1 else s
        s = s.repeat(bs // len(s), 1)
        return super().forward(s.flatten()).view(bs, -1)


class CaptionEmbedder(nn.Module):
    """Prompt embeddings (B, 1, L, channels); `y_embedding` is the empty prompt."""

    def __init__(self, in_channels: int, hidden_size: int, token_num: int) -> None:
        super().__init__()
        self.y_proj = Mlp(in_channels, hidden_size, hidden_size)
        self.register_buffer("y_embedding", noise(token_num, in_channels, seed=9))

    def forward(self, caption: Tensor, train: bool) -> Tensor:
        return self.y_proj(caption)


def pack_text(y: Tensor, mask: Tensor | None) -> tuple[Tensor, list[int]]:
    """(1, sum of lengths, C) and the lengths, of (B, 1, L, C) and a mask of B rows or fewer.

    Where the mask has fewer rows, both guidance halves have those of the prompts.
    """
    y = y.squeeze(1)
    if mask is None:
        return y.flatten(0, 1)[None], [y.shape[1]] * len(y)
    mask = mask.reshape(-1, y.shape[1]).repeat(len(y) // len(mask), 1)
    return y[mask != 0][None], mask.sum(dim=1).tolist()


class T2IFinalLayer(nn.Module):
    def __init__(self, hidden_size: int, num_patch: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, num_patch * out_channels)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, hidden_size))
        self.out_channels = out_channels

    def modulated(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + t[:, None]).chunk(2, dim=1)
        return t2i_modulate(self.norm_final(x), shift, scale)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.linear(self.modulated(x, t))
