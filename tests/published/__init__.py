"""Tiny models of the structure of published repositories, own code, for the tests of adapters.

What an adapter can see is theirs: names of modules and arguments, what blocks are called with and
what they compute.  Parts that PixArt-alpha and Open-Sora share are here; xformers and timm are not
needed, so packed text is attended to one sample after the other.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def t2i_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return scale * x + x + shift


class Mlp(nn.Module):
    """timm's, as far as these models use it."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int | None = None):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = nn.GELU(approximate="tanh")
        self.drop1 = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))


class MultiHeadCrossAttention(nn.Module):
    """Image tokens (B, N, C) attend to packed text (1, sum of lengths, C), each to its sample's."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.d_model, self.num_heads = d_model, num_heads
        self.head_dim = d_model // num_heads
        self.q_linear = nn.Linear(d_model, d_model)
        self.kv_linear = nn.Linear(d_model, 2 * d_model)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(d_model, d_model)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, cond: Tensor, mask: list[int] | None = None) -> Tensor:
        heads = (self.num_heads, self.head_dim)
        lengths = [cond.shape[1] // len(x)] * len(x) if mask is None else mask
        q = self.q_linear(x).unflatten(2, heads).transpose(1, 2)
        kv = self.kv_linear(cond)[0].unflatten(1, (2, *heads))
        rows = []
        for query, text in zip(q, kv.split(lengths), strict=True):
            k, v = text.permute(1, 2, 0, 3)
            rows.append(F.scaled_dot_product_attention(query, k, v))
        out = torch.stack(rows).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(out))


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
