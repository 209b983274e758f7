"""The attention that a token received in the last full step: s1 of ToCa, section 3.2."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import attention_scores, attention_with_lse
from .selector import AttentionCall, Selector, maps


class Attention(Selector):
    """s_j = sum over queries i of the mean over heads of softmax(q_i k_j * scale)."""

    name = "attention"
    source = "keys"

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        if not call.plain:
            received = [one.sum(dim=1) for one in maps(call.q, call.keys(), call.mask, call.scale)]
            return call.out(), torch.stack(received).mean(dim=0)
        q, k, v = call.q, call.k, call.v
        device = q.device.type
        if torch.is_autocast_enabled(device):  # casts inside the call, taken apart here
            dtype = torch.get_autocast_dtype(device)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        with torch.autocast(device, enabled=False):
            out, lse = attention_with_lse(q, k, v, scale=call.scale, dropout_p=call.dropout_p)
            return out, attention_scores(q, k, lse, scale=call.scale)

    def of_map(self, attention: Tensor) -> Tensor:
        received = attention.sum(dim=-2, dtype=torch.float32)
        return received[:, None] if attention.ndim == 3 else received.mean(dim=1)
