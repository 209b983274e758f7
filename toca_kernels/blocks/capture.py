"""Scores from an attention module that is not ours.

While the module's own forward runs, its call of scaled_dot_product_attention (or its softmax) is
intercepted and left to the selector: the same flash kernel is called, and the scores follow from
its arguments.  The module's output keeps its bits and nothing is assumed about projections, norms
or rotary embeddings before the call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..selectors import SELECTORS, AttentionCall
from ..selectors.entropy import entropy
from .split_attention import SplitAttention

_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)


class CapturedScores(TorchFunctionMode):
    """Context in which an attention module runs; `found` holds its scores afterwards.

    Args:
        selector: the name of a selector whose source is an attention.
        found: where the scores go: (B, N), or (rows, 1, N) of some of the B * H heads, float32, or
            the entropies of one sample after the other.  A list, because torch.compile reads no
            attributes of a mode.
        split: whether the attention may be one that processes share.
    """

    def __init__(self, selector: str, found: list[Tensor], *, split: bool = False) -> None:
        super().__init__()
        self.selector = selector
        self.found = found
        self._xformers: Any = None
        self._split = SplitAttention(selector, found) if split else None

    def __enter__(self) -> CapturedScores:
        self._xformers = sys.modules.get("xformers.ops")
        if self._xformers is not None and self.selector == "entropy":
            self._own = self._xformers.memory_efficient_attention
            self._xformers.memory_efficient_attention = self._packed
        if self._split is not None:
            self._split.put_in()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._split is not None:
            self._split.take_out()
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
            self.found.append(entropy(q, k, None, scale))
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
        if func in _SOFTMAX and out.ndim in (3, 4):
            score = SELECTORS[self.selector].of_map(out)
            if score is not None:
                self.found.append(score)
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
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        call = AttentionCall(query, key, value, attn_mask, dropout_p, scale, enable_gqa)
        out, score = SELECTORS[self.selector].attend(call)
        self.found.append(score)
        return out
