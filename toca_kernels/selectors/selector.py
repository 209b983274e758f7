"""Selector: where a selector's scores come from, and the call of an attention that yields some."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# "keys": a full step's self-attention, scored by its keys.  "queries": a cross-attention, scored by
# its queries.  "output": what a module returned in a full step.  "drawn": anew in each cached step.
# "given": by the user.
Source = Literal["keys", "queries", "output", "drawn", "given"]


@dataclass(frozen=True)
class AttentionCall:
    """Arguments of a scaled_dot_product_attention: q (B, H, Nq, D), k and v (B, H, N, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    dropout_p: float
    scale: float
    enable_gqa: bool

    @property
    def plain(self) -> bool:
        """No mask, no shared heads, no text that serves the whole batch."""
        return self.mask is None and not self.enable_gqa and len(self.q) == len(self.k)

    def out(self) -> Tensor:
        """The attention itself."""
        return F.scaled_dot_product_attention(
            self.q,
            self.k,
            self.v,
            self.mask,
            self.dropout_p,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )

    def keys(self) -> Tensor:
        return self.k.expand(len(self.q), *self.k.shape[1:])

    def values(self) -> Tensor:
        return self.v.expand(len(self.q), *self.v.shape[1:])


class Selector:
    """What says how much a token matters; a subclass overrides what its source needs.

    Attributes:
        name: as a config names it.
        source: where its scores come from.
    """

    name: ClassVar[str]
    source: ClassVar[Source]

    @property
    def left_by_full_steps(self) -> bool:
        """Whether a full step leaves the scores behind."""
        return self.source in ("keys", "queries", "output")

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """(the call's own result, bit for bit; scores (B, N) or (B, Nq)).  "keys", "queries"."""
        raise NotImplementedError

    def of_map(self, attention: Tensor) -> Tensor | None:
        """Scores of an explicit map, (B, H, Nq, N) or (B * H, Nq, N); None if it yields none."""
        return None

    def changed(self, new: Tensor, old: Tensor) -> Tensor:
        """Scores (B, N) of an output (B, N, C) and the one before.  "output"."""
        raise NotImplementedError

    def draw(self, score: Tensor, generator: torch.Generator) -> None:
        """Fill the scores of a step, any shape.  "drawn"."""
        raise NotImplementedError


def maps(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Iterator[Tensor]:
    """The attention map of each head, (B, Nq, N) in float32: those of all heads need not fit."""
    for h in range(q.shape[1]):
        keys = k[:, h * k.shape[1] // q.shape[1]]  # grouped queries share a head of keys
        logits = q[:, h].float() @ keys.float().mT * scale
        if mask is not None:
            one = mask[:, min(h, mask.shape[1] - 1)] if mask.ndim == 4 else mask
            logits = (
                logits.masked_fill(~one, -torch.inf) if one.dtype == torch.bool else logits + one
            )
        yield torch.softmax(logits, dim=-1).nan_to_num(0.0)  # a query without any key
