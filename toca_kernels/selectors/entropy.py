"""The entropy of a token's cross-attention: s2 of ToCa, section 3.2."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import attention_entropy, attention_with_lse
from .selector import AttentionCall, Selector, maps


class Entropy(Selector):
    """s_i = - sum over keys j of p_ij ln(p_ij + 1e-7), p the mean of the heads' maps."""

    name = "entropy"
    source = "queries"

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        return call.out(), entropy(call.q, call.keys(), call.mask, call.scale)


def entropy(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """attention_entropy, also under a mask that differs between queries, or of one sample."""
    if q.ndim == 3:
        q, k = q[None], k[None]
    if mask is None and q.shape[1] == k.shape[1]:
        lse = None
        if q.device.type != "cpu":  # there a flash kernel has it sooner
            _, lse = attention_with_lse(q, k, k, scale=scale)
        return attention_entropy(q, k, lse, scale=scale)
    mean = q.new_zeros((), dtype=torch.float32)
    for one in maps(q, k, mask, scale):
        mean = mean + one / q.shape[1]
    return -(mean * (mean + 1e-7).log()).sum(dim=-1)
