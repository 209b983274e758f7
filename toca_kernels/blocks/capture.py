"""Scores from an attention module that is not ours.

While the module's own forward runs, its call of scaled_dot_product_attention (or its softmax) is
intercepted: the same flash kernel is called, which also returns the log-sum-exp, and the scores
follow from q, k and that.  The module's output keeps its bits and nothing is assumed about
projections, norms or rotary embeddings before the call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..ops import attention_entropy, attention_scores, attention_with_lse

_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)


class CapturedScores(TorchFunctionMode):
    """Context in which an attention module runs; `found` holds its scores afterwards.

    Args:
        selector: "attention" (attention that each key received, ToCa section 3.2), "entropy" (of
            each query's attention, the same section) or "norm" (values that are small rank high:
            the value norm of DuCa, arXiv 2412.18911).
        found: where the scores go: (B, N), or (rows, 1, N) of some of the B * H heads, float32, or
            the entropies of one sample after the other.  A list, because torch.compile reads no
            attributes of a mode.
    """

    def __init__(self, selector: str, found: list[Tensor]) -> None:
        super().__init__()
        self.selector = selector
        self.found = found
        self._xformers: Any = None

    def __enter__(self) -> CapturedScores:
        self._xformers = sys.modules.get("xformers.ops")
        if self._xformers is not None and self.selector == "entropy":
            self._own = self._xformers.memory_efficient_attention
            self._xformers.memory_efficient_attention = self._packed
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._xformers is not None and self.selector == "entropy":
            self._xformers.memory_efficient_attention = self._own

    def _packed(self, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        """xformers' attention of samples of different lengths, packed into (1, sum, H, D)."""
        out = self._own(query, key, *args, **kwargs)
        bias = kwargs.get("attn_bias")
        ends: list[Any] = [getattr(bias, name, None) for name in ("q_seqinfo", "k_seqinfo")]
        if None in ends:
            raise RuntimeError(
                "selector 'entropy': expected a block-diagonal attn_bias of xformers, got "
                f"{type(bias).__name__}; use selector='random'"
            )
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        starts = [pairwise(info.seqstart_py) for info in ends]
        for (q0, q1), (k0, k1) in zip(*starts, strict=True):
            q, k = query[0, q0:q1].transpose(0, 1), key[0, k0:k1].transpose(0, 1)
            self.found.append(_entropy(q, k, None, scale))
        return out

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.unflatten:  # the compiler cannot trace the super() call in it
            return torch.unflatten(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in _SOFTMAX and self.selector == "attention" and out.ndim in (3, 4):
            # An explicit map, (B, H, N, N) or (B * H, N, N): its column sums are the scores.
            received = out.sum(dim=-2, dtype=torch.float32)
            self.found.append(received[:, None] if out.ndim == 3 else received.mean(dim=1))
        return out

    def _attention(
        self,
        query: Tensor,  # named as scaled_dot_product_attention names them
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if is_causal:
            raise RuntimeError(
                f"selector {self.selector!r}: expected attention among all tokens, got a causal "
                "call; use selector='random'"
            )
        q, k, v = query, key, value
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        plain = self.selector == "attention" and attn_mask is None and not enable_gqa
        plain = plain and len(q) == len(k)
        device = q.device.type
        if plain and torch.is_autocast_enabled(device):  # casts inside the call, taken apart here
            dtype = torch.get_autocast_dtype(device)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if plain:
            with torch.autocast(device, enabled=False):
                out, lse = attention_with_lse(q, k, v, scale=scale, dropout_p=dropout_p)
                self.found.append(attention_scores(q, k, lse, scale=scale))
            return out
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask, dropout_p, scale=scale, enable_gqa=enable_gqa
        )
        if len(q) != len(k):  # one text serves the whole batch
            k, v = (one.expand(len(q), *one.shape[1:]) for one in (k, v))
        if self.selector == "norm":
            length = torch.linalg.vector_norm(v, dim=-1, dtype=torch.float32).sum(dim=1)
            score = length.amax(dim=-1, keepdim=True) - length
        elif self.selector == "entropy":
            score = _entropy(q, k, attn_mask, scale)
        else:
            score = _received(q, k, attn_mask, scale)
        self.found.append(score)
        return out


def _maps(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Iterator[Tensor]:
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


def _received(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """attention_scores under a mask, or with grouped queries."""
    received = [one.sum(dim=1) for one in _maps(q, k, mask, scale)]
    return torch.stack(received).mean(dim=0)


def _entropy(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """attention_entropy, also under a mask that differs between queries, or of one sample."""
    if q.ndim == 3:
        q, k = q[None], k[None]
    if mask is None and q.shape[1] == k.shape[1]:
        _, lse = attention_with_lse(q, k, k, scale=scale)
        return attention_entropy(q, k, lse, scale=scale)
    mean = q.new_zeros((), dtype=torch.float32)
    for one in _maps(q, k, mask, scale):
        mean = mean + one / q.shape[1]
    return -(mean * (mean + 1e-7).log()).sum(dim=-1)
