"""FLUX's structure: the model and its loop; the blocks are in published.flux_layers.

Mirrors flux.model.Flux and flux.sampling.denoise of black-forest-labs/flux: everything by keyword,
times from 1 to 0, Euler steps, guidance as an input of the model and so one call a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from published import noise, randomize, waves
from published.flux_layers import (
    DoubleStreamBlock,
    EmbedND,
    LastLayer,
    MLPEmbedder,
    SingleStreamBlock,
)


@dataclass
class FluxParams:
    in_channels: int = 64
    out_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = True


class Flux(nn.Module):
    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        self.params, width = params, params.hidden_size
        self.hidden_size, self.num_heads = width, params.num_heads
        self.pe_embedder = EmbedND(width // params.num_heads, params.theta, [*params.axes_dim])
        self.img_in = nn.Linear(params.in_channels, width)
        self.time_in = MLPEmbedder(256, width)
        self.vector_in = MLPEmbedder(params.vec_in_dim, width)
        self.guidance_in = MLPEmbedder(256, width) if params.guidance_embed else nn.Identity()
        self.txt_in = nn.Linear(params.context_in_dim, width)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(width, params.num_heads, params.mlp_ratio, params.qkv_bias)
            for _ in range(params.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(width, params.num_heads, params.mlp_ratio)
            for _ in range(params.depth_single_blocks)
        )
        self.final_layer = LastLayer(width, params.out_channels)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        img, txt = self.img_in(img), self.txt_in(txt)
        vec = self.time_in(waves(1000 * timesteps, 256).to(img)) + self.vector_in(y)
        if self.params.guidance_embed:
            vec = vec + self.guidance_in(waves(1000 * guidance, 256).to(img))
        pe = self.pe_embedder(torch.cat([txt_ids, img_ids], dim=1))
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
        x = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            x = block(x, vec=vec, pe=pe)
        return self.final_layer(x[:, txt.shape[1] :], vec)


def tiny(*, seed: int = 0, **params: Any) -> Flux:
    """2 double and 3 single blocks of 4 heads of 16."""
    defaults = {
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 32,
        "context_in_dim": 32,
        "hidden_size": 64,
        "num_heads": 4,
        "depth": 2,
        "depth_single_blocks": 3,
        "axes_dim": (4, 6, 6),
    }
    return randomize(Flux(FluxParams(**(defaults | params))), seed)


def get_schedule(num_steps: int, image_seq_len: int) -> list[float]:
    """Times from 1 to 0, more of them early the larger the image."""
    shift = math.exp(0.5 + (1.15 - 0.5) * (image_seq_len - 256) / (4096 - 256))
    return [shift * t / (shift * t + 1 - t) for t in torch.linspace(1, 0, num_steps + 1).tolist()]


def denoise(
    model: Flux,
    img: Tensor,
    img_ids: Tensor,
    txt: Tensor,
    txt_ids: Tensor,
    vec: Tensor,
    timesteps: list[float],
    guidance: float = 4.0,
) -> Tensor:
    strength = img.new_full((len(img),), guidance)
    for now, then in pairwise(timesteps):
        velocity = model(
            img=img,
            img_ids=img_ids,
            txt=txt,
            txt_ids=txt_ids,
            y=vec,
            timesteps=img.new_full((len(img),), now),
            guidance=strength,
        )
        img = img + (then - now) * velocity
    return img


def sample(
    model: Flux, steps: int, seed: int = 0, *, samples: int = 1, grid: tuple[int, int] = (8, 8)
) -> Tensor:
    rows, cols = grid
    ids = torch.zeros(rows, cols, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(cols)
    params = model.params
    return denoise(
        model,
        img=noise(samples, rows * cols, params.in_channels, seed=seed),
        img_ids=ids.view(1, -1, 3).repeat(samples, 1, 1),
        txt=noise(samples, 8, params.context_in_dim, seed=1),
        txt_ids=torch.zeros(samples, 8, 3),
        vec=noise(samples, params.vec_in_dim, seed=2),
        timesteps=get_schedule(steps, rows * cols),
    )
