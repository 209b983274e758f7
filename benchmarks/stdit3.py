"""The block of Open-Sora 1.2's STDiT3, own code: what benchmarks and tests share of its structure.

Names of modules and arguments, what the block computes and what it is called with are those of
hpcaitech/Open-Sora v1.2.  xformers and timm are not needed, so packed text is attended to one
sample after the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class LlamaRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.variance_epsilon).to(x)


class Attention(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        rope: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = LlamaRMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = LlamaRMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)
        self.rope = rope is not None
        if rope is not None:
            self.rotary_emb = rope

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = self.q_norm(qkv[0]), self.k_norm(qkv[1]), qkv[2]
        if self.rope:
            q, k = self.rotary_emb(q), self.rotary_emb(k)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class RotaryEmbedding(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 10000 ** -(torch.arange(0, dim, 2) / dim))

    def rotate_queries_or_keys(self, x: Tensor) -> Tensor:
        """Pairs of neighbouring channels of x (B, heads, T, d), by their time."""
        angle = torch.arange(x.shape[2], device=x.device)[:, None] * self.freqs
        even, odd = x.unflatten(3, (-1, 2)).unbind(4)
        cos, sin = angle.cos(), angle.sin()
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=4)
        return turned.flatten(3).to(x.dtype)


class STDiT3Block(nn.Module):
    """x (B, T S, C), frames outermost; y packed text, of lengths `mask`; t and t0 (B, 6 C).

    Where `x_mask` (B, T) is False, a frame is given and not made: its modulation is t0, that of
    timestep 0.  Queries and keys are normalised, and rotated along time by `rope`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        rope: Callable[[Tensor], Tensor] | None = None,
        qk_norm: bool = True,
        temporal: bool = False,
    ) -> None:
        super().__init__()
        self.temporal, self.hidden_size = temporal, hidden_size
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qk_norm=qk_norm, rope=rope)
        self.cross_attn = MultiHeadCrossAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.drop_path = nn.Identity()
        self.scale_shift_table = nn.Parameter(torch.zeros(6, hidden_size))

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        t: Tensor,
        mask: list[int] | None = None,
        x_mask: Tensor | None = None,
        t0: Tensor | None = None,
        T: int | None = None,
        S: int | None = None,
    ) -> Tensor:
        six = self.scale_shift_table + t.unflatten(1, (6, -1))
        if x_mask is not None:
            given = self.scale_shift_table + t0.unflatten(1, (6, -1))
            made = x_mask.repeat_interleave(S, dim=1)[:, :, None, None]
            six = torch.where(made, six[:, None], given[:, None])  # (B, T S, 6, C)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            part.squeeze(-2) if x_mask is not None else part for part in six.chunk(6, dim=-2)
        )
        grid = t2i_modulate(self.norm1(x), shift_a, scale_a).unflatten(1, (T, S))
        if self.temporal:
            tracks = self.attn(grid.transpose(1, 2).flatten(0, 1))
            attention = tracks.unflatten(0, (-1, S)).transpose(1, 2).flatten(1, 2)
        else:
            attention = self.attn(grid.flatten(0, 1)).unflatten(0, (-1, T)).flatten(1, 2)
        x = x + self.drop_path(gate_a * attention)
        x = x + self.cross_attn(x, y, mask)
        return x + self.drop_path(gate_m * self.mlp(t2i_modulate(self.norm2(x), shift_m, scale_m)))
