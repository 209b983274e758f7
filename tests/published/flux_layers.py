"""FLUX's structure: double stream blocks for image and text, single stream blocks for both joined.

Mirrors flux.modules.layers of black-forest-labs/flux.  `DoubleStreamBlock` is called `block(img=,
txt=, vec=, pe=)`, by keyword, and returns (img, txt); it attends over [txt, img].  Its attention
modules are never called, only the parts `qkv`, `norm` and `proj` of them.  `SingleStreamBlock` is
called `block(x, vec=, pe=)` on [txt, img].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rope(positions: Tensor, dim: int, theta: int) -> Tensor:
    """(B, S, dim / 2, 2, 2): a rotation for each position and pair of channels."""
    rate = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = positions[..., None].double() * rate.to(positions.device)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1)
    return turn.unflatten(-1, (2, 2)).float()


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    """(B, S, heads * d) of q, k and v (B, heads, S, d)."""

    def turned(x: Tensor) -> Tensor:
        pairs = x.float().unflatten(-1, (-1, 2))
        return (pe * pairs[..., None, :]).sum(dim=-1).flatten(-2).type_as(x)

    out = F.scaled_dot_product_attention(turned(q), turned(k), v)
    return out.transpose(1, 2).flatten(2)


class EmbedND(nn.Module):
    def __init__(self, dim: int, theta: int, axes_dim: list[int]) -> None:
        super().__init__()
        self.dim, self.theta, self.axes_dim = dim, theta, axes_dim

    def forward(self, ids: Tensor) -> Tensor:
        axes = zip(ids.unbind(-1), self.axes_dim, strict=True)
        return torch.cat([rope(axis, dim, self.theta) for axis, dim in axes], dim=-3)[:, None]


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.silu = nn.SiLU()
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(self.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        power = x.float().square().mean(dim=-1, keepdim=True)
        return (x.float() * (power + 1e-6).rsqrt()).to(x.dtype) * self.scale


class QKNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(dim), RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


class SelfAttention(nn.Module):
    """Weights alone: the double stream block attends."""

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)


@dataclass
class ModulationOut:
    shift: Tensor
    scale: Tensor
    gate: Tensor


def modulated(x: Tensor, mod: ModulationOut) -> Tensor:
    return mod.shift + (mod.scale + 1) * x


class Modulation(nn.Module):
    def __init__(self, dim: int, double: bool) -> None:
        super().__init__()
        self.is_double = double
        self.multiplier = 6 if double else 3
        self.lin = nn.Linear(dim, self.multiplier * dim)

    def forward(self, vec: Tensor) -> tuple[ModulationOut, ModulationOut | None]:
        parts = self.lin(F.silu(vec))[:, None].chunk(self.multiplier, dim=-1)
        return ModulationOut(*parts[:3]), ModulationOut(*parts[3:]) if self.is_double else None


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """q, k and v, each (B, heads, S, d)."""
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class DoubleStreamBlock(nn.Module):
    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, qkv_bias: bool = False
    ) -> None:
        super().__init__()
        self.num_heads, self.hidden_size = num_heads, hidden_size
        hidden = int(hidden_size * mlp_ratio)
        for stream in ("img", "txt"):
            parts = {
                "mod": Modulation(hidden_size, double=True),
                "norm1": nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6),
                "attn": SelfAttention(hidden_size, num_heads, qkv_bias),
                "norm2": nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6),
                "mlp": nn.Sequential(
                    nn.Linear(hidden_size, hidden),
                    nn.GELU(approximate="tanh"),
                    nn.Linear(hidden, hidden_size),
                ),
            }
            for name, part in parts.items():
                self.add_module(f"{stream}_{name}", part)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        img_mod1, img_mod2 = self.img_mod(vec)
        txt_mod1, txt_mod2 = self.txt_mod(vec)
        streams = [
            split_heads(part.qkv(modulated(norm(x), mod)), self.num_heads)
            for x, norm, mod, part in (
                (txt, self.txt_norm1, txt_mod1, self.txt_attn),
                (img, self.img_norm1, img_mod1, self.img_attn),
            )
        ]
        txt_q, txt_k = self.txt_attn.norm(*streams[0])
        img_q, img_k = self.img_attn.norm(*streams[1])
        q, k = torch.cat([txt_q, img_q], dim=2), torch.cat([txt_k, img_k], dim=2)
        out = attention(q, k, torch.cat([streams[0][2], streams[1][2]], dim=2), pe=pe)
        txt_out, img_out = out[:, : txt.shape[1]], out[:, txt.shape[1] :]

        img = img + img_mod1.gate * self.img_attn.proj(img_out)
        img = img + img_mod2.gate * self.img_mlp(modulated(self.img_norm2(img), img_mod2))
        txt = txt + txt_mod1.gate * self.txt_attn.proj(txt_out)
        txt = txt + txt_mod2.gate * self.txt_mlp(modulated(self.txt_norm2(txt), txt_mod2))
        return img, txt


class SingleStreamBlock(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.hidden_dim = self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.mlp_hidden_dim = int(hidden_size * mlp_ratio)
        self.linear1 = nn.Linear(hidden_size, 3 * hidden_size + self.mlp_hidden_dim)
        self.linear2 = nn.Linear(hidden_size + self.mlp_hidden_dim, hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.pre_norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.modulation = Modulation(hidden_size, double=False)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        mod, _ = self.modulation(vec)
        wide = self.linear1(modulated(self.pre_norm(x), mod))
        qkv, hidden = wide.split([3 * self.hidden_size, self.mlp_hidden_dim], dim=-1)
        q, k, v = split_heads(qkv, self.num_heads)
        attended = attention(*self.norm(q, k, v), v, pe=pe)
        return x + mod.gate * self.linear2(torch.cat([attended, self.mlp_act(hidden)], dim=2))


class LastLayer(nn.Module):
    def __init__(self, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(shift + (scale + 1) * self.norm_final(x))
