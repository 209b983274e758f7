"""Cached steps of the families' blocks in plain torch: the peers that families.py times.

As one would write them with care and without kernels: what is reused is not computed, norms run on
the selected rows only, keys and values of the text are kept, torch.topk instead of a sort, no sync.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import naive

Kept = list[tuple[nn.Module, tuple[str, ...]]]  # a module, and the names of what it returns


@dataclass
class Cache:
    """What one layer keeps.

    Attributes:
        out: outputs of the modules, (B, N, C).
        k: tokens that a module recomputes, of those that select.
        score, age: of their tokens, (rows, N); both guidance halves share a row where `halves`.
        age_step, grid, bonus: as in naive.select; no bonus where there is no grid.
        chosen: module -> (B, k), taken instead of a selection of one's own.
    """

    out: dict[str, Tensor]
    k: dict[str, int]
    age_step: float
    grid: tuple[int, int, int] | None
    bonus: float
    halves: bool
    score: dict[str, Tensor] = field(default_factory=dict)
    age: dict[str, Tensor] = field(default_factory=dict)
    chosen: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Scores are random numbers: a full step's are compared nowhere, only sorting them is."""
        for name in self.k:
            B, N, _ = self.out[name].shape
            device = self.out[name].device
            self.score[name] = torch.rand(B // (1 + self.halves), N, device=device)
            self.age[name] = torch.zeros_like(self.score[name], dtype=torch.int32)

    def select(self, name: str) -> Tensor:
        """(B, k, 1) tokens of a module."""
        if name in self.chosen:
            return self.chosen[name][:, :, None]
        score, age, k = self.score[name], self.age[name], self.k[name]
        if self.grid:
            index, older = naive.select(score, age, k, self.age_step, self.grid, self.bonus)
            age.copy_(older)
        else:
            index = (score + self.age_step * age).topk(k, dim=-1).indices
            age.add_(1).scatter_(1, index, 0)
        return (index.repeat(2, 1) if self.halves else index)[:, :, None]

    def write(self, name: str, index: Tensor, rows: Tensor) -> Tensor:
        """The output of a module, after these rows of it are fresh."""
        return self.out[name].scatter_(1, index.expand_as(rows), rows)

    def rank(self, index: Tensor, entropy: Tensor) -> None:
        """New scores of these tokens."""
        if self.halves:
            index, entropy = index[: len(index) // 2], entropy.unflatten(0, (2, -1)).mean(dim=0)
        for score in self.score.values():
            score.scatter_(1, index[:, :, 0], 1 + entropy)


def taken(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.expand(-1, -1, x.shape[-1]))


# --- a cached step of each kind of block: what the block returns ----------------------------------


def double(
    block: Any, cache: Cache, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor
) -> tuple[Tensor, Tensor]:
    """FLUX, SD3 and Qwen-Image: two streams."""
    if hasattr(block, "img_mod"):
        fused = (block.img_mod(temb), block.txt_mod(temb))
        parts = ((block.img_norm2, block.img_mlp), (block.txt_norm2, block.txt_mlp))
    else:
        norms = (block.norm1, block.norm1_context)
        fused = tuple(norm.linear(norm.silu(temb)) for norm in norms)
        parts = ((block.norm2, block.ff), (block.norm2_context, block.ff_context))
    streams = {"txt": encoder_hidden_states, "img": hidden_states}
    for name, modulation, (norm, mlp) in zip(("img", "txt"), fused, parts, strict=True):
        _, _, gate_a, shift, scale, gate = modulation[:, None].chunk(6, dim=-1)
        x = streams[name] + gate_a * cache.out[f"{name}_attn"]
        index = cache.select(f"{name}_mlp")
        rows = norm(taken(x, index)) * (1 + scale) + shift
        streams[name] = x + gate * cache.write(f"{name}_mlp", index, mlp(rows))
    return streams["txt"], streams["img"]


def single(
    block: Any, cache: Cache, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor
) -> tuple[Tensor, Tensor]:
    """FLUX: one stream, attention and MLP side by side."""
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    modulation = block.norm.linear(block.norm.silu(temb))
    shift, scale, gate = modulation[:, None].chunk(3, dim=-1)
    index = cache.select("single_mlp")
    rows = block.norm.norm(taken(x, index)) * (1 + scale) + shift
    rows = torch.cat(
        [taken(cache.out["single_attn"], index), block.act_mlp(block.proj_mlp(rows))], dim=2
    )
    x = x + gate * cache.write("single_mlp", index, block.proj_out(rows))
    text = encoder_hidden_states.shape[1]
    return x[:, :text], x[:, text:]


def pixart(
    block: Any,
    cache: Cache,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    B = len(hidden_states)
    modulation = block.scale_shift_table[None] + timestep.reshape(B, 6, -1)
    _, _, gate_a, shift, scale, gate = modulation.chunk(6, dim=1)
    x = hidden_states + gate_a * cache.out["attn"]
    index = cache.select("cross_attn")
    rows, entropy = _cross_attention(block.attn2, taken(x, index), cache, encoder_attention_mask)
    x = x + cache.write("cross_attn", index, rows)
    cache.rank(index, entropy)
    index = cache.select("mlp")
    rows = block.norm2(taken(x, index)) * (1 + scale) + shift
    return x + gate * cache.write("mlp", index, block.ff(rows))


def _cross_attention(
    attn: Any, rows: Tensor, cache: Cache, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(output, entropy of each row's attention), from one map."""

    def by_heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    q, k, v = map(by_heads, (attn.to_q(rows), cache.out["text_k"], cache.out["text_v"]))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    attention = (logits if bias is None else logits + bias[:, None]).softmax(dim=-1)
    mean = attention.mean(dim=1, dtype=torch.float32)
    out = attn.to_out[0]((attention @ v).transpose(1, 2).flatten(2))
    return out, -(mean * (mean + 1e-7).log()).sum(dim=-1)


def wan(block: Any, cache: Cache, hidden_states: Tensor, temb: Tensor) -> Tensor:
    """Its cross-attention is reused whole."""
    modulation = block.scale_shift_table + temb.float()
    _, _, gate_a, shift, scale, gate = modulation.chunk(6, dim=1)
    x = (hidden_states.float() + cache.out["attn"] * gate_a).type_as(hidden_states)
    x = x + cache.out["cross_attn"]
    index = cache.select("mlp")
    rows = (block.norm3(taken(x, index).float()) * (1 + scale) + shift).type_as(x)
    mlp = cache.write("mlp", index, block.ffn(rows))
    return (x.float() + mlp.float() * gate).type_as(x)


def stdit3(block: Any, cache: Cache, x: Tensor, t: Tensor, T: int, S: int) -> Tensor:
    """Open-Sora: spatial or temporal attention and cross-attention are reused whole."""
    kind = _kind(block)
    modulation = block.scale_shift_table + t.unflatten(1, (6, -1))
    _, _, gate_a, shift, scale, gate = modulation.chunk(6, dim=1)
    attn = cache.out[f"{kind}_attn"]  # (B T, S, C), or (B S, T, C), which is read as it lies
    if block.temporal:
        attn = attn.unflatten(0, (-1, S)).transpose(1, 2)
    else:
        attn = attn.unflatten(0, (-1, T))
    x = (x.unflatten(1, (T, S)) + gate_a[:, None] * attn).flatten(1, 2)
    x = x + cache.out[f"{kind}_cross_attn"]
    index = cache.select(f"{kind}_mlp")
    rows = block.norm2(taken(x, index)) * (1 + scale) + shift
    return x + gate * cache.write(f"{kind}_mlp", index, block.mlp(rows))


# --- which modules of a block leave what ----------------------------------------------------------


def _double_kept(block: Any) -> Kept:
    names = ("img_mlp", "txt_mlp") if hasattr(block, "img_mlp") else ("ff", "ff_context")
    mlps = (getattr(block, name) for name in names)
    kept = [(mlp, (name,)) for mlp, name in zip(mlps, ("img_mlp", "txt_mlp"), strict=True)]
    return [(block.attn, ("img_attn", "txt_attn")), *kept]


def _kind(block: Any) -> str:
    return "temporal" if block.temporal else "spatial"


def _stdit3_kept(block: Any) -> Kept:
    names = ("attn", "cross_attn", "mlp")
    return [(getattr(block, name), (f"{_kind(block)}_{name}",)) for name in names]


@dataclass(frozen=True)
class Peer:
    """A cached step of a kind of block, the arguments of the block that it reads, what it keeps."""

    step: Callable[..., Any]
    reads: tuple[str, ...]
    kept: Callable[[Any], Kept]


_STREAMS = ("hidden_states", "encoder_hidden_states", "temb")
PEERS = {
    "double": Peer(double, _STREAMS, _double_kept),
    "single": Peer(
        single, _STREAMS, lambda b: [(b.attn, ("single_attn",)), (b.proj_out, ("single_mlp",))]
    ),
    "pixart": Peer(
        pixart,
        ("hidden_states", "timestep", "encoder_attention_mask"),
        lambda b: [
            (b.attn1, ("attn",)),
            (b.attn2, ("cross_attn",)),
            (b.attn2.to_k, ("text_k",)),
            (b.attn2.to_v, ("text_v",)),
            (b.ff, ("mlp",)),
        ],
    ),
    "wan": Peer(
        wan,
        ("hidden_states", "temb"),
        lambda b: [(b.attn1, ("attn",)), (b.attn2, ("cross_attn",)), (b.ffn, ("mlp",))],
    ),
    "stdit3": Peer(stdit3, ("x", "t", "T", "S"), _stdit3_kept),
}


def outputs_of(run: Callable[[], object], kept: Sequence[Kept]) -> list[dict[str, Tensor]]:
    """What the modules of each block return while `run` runs."""
    found: list[dict[str, Tensor]] = [{} for _ in kept]

    def keeping(out: dict[str, Tensor], names: tuple[str, ...]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            results = result if isinstance(result, tuple) else (result,)
            out.update((n, r.clone()) for n, r in zip(names, results, strict=True))

        return hook

    handles = [
        module.register_forward_hook(keeping(out, names))
        for out, modules in zip(found, kept, strict=True)
        for module, names in modules
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def indices(mask: Tensor, device: torch.device | str) -> Tensor:
    """(B, k) of a (B, N) mask with as many tokens in every sample."""
    return mask.nonzero()[:, 1].view(len(mask), -1).to(device)


def grid_of(sides: Sequence[int], cell: int, bonus: float) -> tuple[int, int, int] | None:
    """The grid of naive.select, of an image whose sides the cells divide."""
    if not bonus or len(sides) != 2 or any(side % cell for side in sides):
        return None
    return sides[0], sides[1], cell


def tokens_of(out: Mapping[str, Tensor]) -> dict[str, int]:
    """N of the modules that may select."""
    kinds = ("mlp", "cross_attn")
    return {name: x.shape[1] for name, x in out.items() if name.endswith(kinds)}


def image_side(tokens: int) -> int:
    return max(1, math.isqrt(tokens))
