"""A diffusion transformer of the shape of DiT (Peebles & Xie 2023), random weights, own code.

What benchmarks and tests run where a checkpoint is not at hand: the module names and the forward
signature are those that published DiT checkpoints and loops use.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# width, heads, blocks of the published sizes
SIZES = {"S": (384, 6, 12), "B": (768, 12, 12), "L": (1024, 16, 24), "XL": (1152, 16, 28)}


class Attention(nn.Module):
    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    def __init__(self, channels: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(channels, int(channels * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class TimestepEmbedder(nn.Module):
    def __init__(self, channels: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(
            nn.Linear(frequencies, channels), nn.SiLU(), nn.Linear(channels, channels)
        )

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        rate = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        angle = t[:, None].float() * rate
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.mlp(wave.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """The class embedding; label `num_classes` is the null class of guidance."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, channels)

    def forward(self, labels: Tensor, train: bool) -> Tensor:
        return self.embedding_table(labels)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_channels: int, channels: int) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.proj = nn.Conv2d(in_channels, channels, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class FinalLayer(nn.Module):
    def __init__(self, channels: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(channels, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 2 * channels))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        channels: int = 1152,
        num_heads: int = 16,
        depth: int = 28,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.out_channels = 2 * in_channels  # with the learned variance
        self.x_embedder = PatchEmbed(patch_size, in_channels, channels)
        self.t_embedder = TimestepEmbedder(channels)
        self.y_embedder = LabelEmbedder(num_classes, channels)
        tokens = (input_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, channels), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(channels, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(channels, patch_size, self.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        rows, cols = (size // self.patch_size for size in x.shape[-2:])
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)
        p = self.patch_size
        x = x.view(len(x), rows, cols, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.out_channels, rows * p, cols * p)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Guidance on a batch [cond, uncond] of one latent; as the published loop calls it."""
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        noise, rest = out[:, :3], out[:, 3:]
        cond, uncond = noise.chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


def random_dit(
    size: str = "XL", *, dtype: torch.dtype = torch.float32, seed: int = 0, **shape: int
) -> DiT:
    """A DiT of a published size in which every weight matters (adaLN-Zero starts with gates 0)."""
    channels, num_heads, depth = SIZES[size]
    defaults = {"channels": channels, "num_heads": num_heads, "depth": depth}
    return randomize(DiT(**(defaults | shape)), seed).to(dtype).eval()


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill weights and biases so that activations stay near unit size and gates are not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            std = parameter[0].numel() ** -0.5 if parameter.ndim >= 2 else 0.05
            parameter.normal_(std=std, generator=generator)
    return model.requires_grad_(False)
