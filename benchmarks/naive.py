"""The cached step in plain torch, as one would write it without kernels: the peer to beat.

Better than the published code: torch.topk instead of a full sort, no attention map, no sync.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit import DiTBlock, modulate


@dataclass
class LayerCache:
    """What one layer keeps between steps: outputs (B, N, C), score and age (B, N)."""

    attn: Tensor
    mlp: Tensor
    score: Tensor
    age: Tensor


def full_block(block: DiTBlock, x: Tensor, c: Tensor, cache: LayerCache) -> Tensor:
    """A full step that leaves its outputs behind; one attention map serves output and scores."""
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(c).chunk(6, dim=1)
    cache.attn, cache.score = _attention(block, modulate(block.norm1(x), shift_a, scale_a))
    cache.age = torch.zeros_like(cache.age)
    x = x + gate_a.unsqueeze(1) * cache.attn
    cache.mlp = block.mlp(modulate(block.norm2(x), shift_m, scale_m))
    return x + gate_m.unsqueeze(1) * cache.mlp


def _attention(block: DiTBlock, x: Tensor) -> tuple[Tensor, Tensor]:
    """(output (B, N, C), score (B, N)); q, k and v are projected once."""
    B, N, C = x.shape
    H = block.attn.num_heads
    q, k, v = block.attn.qkv(x).view(B, N, 3, H, C // H).permute(2, 0, 3, 1, 4).unbind(0)
    attention = (q @ k.transpose(-1, -2) * (C // H) ** -0.5).softmax(dim=-1)
    score = F.normalize(attention.mean(dim=1, dtype=torch.float32).sum(dim=1), dim=-1)
    return block.attn.proj((attention @ v).transpose(1, 2).reshape(B, N, C)), score


def select(
    score: Tensor, age: Tensor, k: int, age_step: float, grid: tuple[int, int, int], bonus: float
):
    """(index (B, k), new ages): age term, bonus for the best token of each tile, top k."""
    rows, cols, cell = grid
    total = score + age_step * age
    tiles = total.view(-1, rows // cell, cell, cols // cell, cell).transpose(2, 3).flatten(3)
    best = tiles.argmax(dim=-1, keepdim=True)
    tiles = tiles.scatter(-1, best, tiles.gather(-1, best) * (1 + bonus))
    total = tiles.unflatten(-1, (cell, cell)).transpose(2, 3).reshape(total.shape)
    index = total.topk(k, dim=-1).indices
    return index, (age + 1).scatter(1, index, 0)


def cached_block(
    block: DiTBlock,
    x: Tensor,
    c: Tensor,
    cache: LayerCache,
    k: int,
    age_step: float,
    grid: tuple[int, int, int],
    bonus: float,
) -> Tensor:
    """A cached step: attention reused, MLP of k tokens recomputed."""
    _, _, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(c).chunk(6, dim=1)
    x = x + gate_a.unsqueeze(1) * cache.attn
    index, cache.age = select(cache.score, cache.age, k, age_step, grid, bonus)
    index = index.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    rows = modulate(block.norm2(x.gather(1, index)), shift_m, scale_m)
    cache.mlp = cache.mlp.scatter(1, index, block.mlp(rows))
    return x + gate_m.unsqueeze(1) * cache.mlp
