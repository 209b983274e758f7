"""Scores of an attention whose tokens are split among processes: diffusers' context parallelism.

All of its backends go through one function, which is handed the process's own q, k and v and calls
the backend's kernel: once for all tokens and a share of the heads (Ulysses), or for each process's
keys in turn (ring).  That function is intercepted, and the kernel's arguments are looked at.  What
a process's queries, or heads, give to other processes' tokens is added up among them: one number
for each token and sample, against q, k and v that the attention itself exchanges.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import attention_scores
from ..parallel import Ranks
from ..selectors import SELECTORS, AttentionCall

_WHERE = "diffusers.models.attention_dispatch"
_NAME = "_templated_context_parallel_attention"


class SplitAttention:
    """Stands in the place of diffusers' function while an attention module runs.

    Args:
        selector: the name of a selector whose source is an attention.
        found: where the scores of this process's tokens go, (B, N).
    """

    def __init__(self, selector: str, found: list[Tensor]) -> None:
        self.selector = selector
        self.found = found
        self._dispatch: Any = None
        self._own: Callable[..., Any]

    def put_in(self) -> None:
        module = sys.modules.get(_WHERE)
        self._dispatch = module if hasattr(module, _NAME) else None
        if self._dispatch is not None:
            self._own = getattr(self._dispatch, _NAME)
            setattr(self._dispatch, _NAME, self._attention)

    def take_out(self) -> None:
        if self._dispatch is not None:
            setattr(self._dispatch, _NAME, self._own)

    def _attention(
        self,
        query: Tensor,  # named as diffusers names them; (B, N here, H, D)
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        *args: Any,
        forward_op: Callable[..., Any],
        _parallel_config: Any = None,
        **kwargs: Any,
    ) -> Any:
        if SELECTORS[self.selector].source == "queries":
            raise RuntimeError(
                f"selector {self.selector!r}: expected a cross-attention of each process's own "
                "tokens to a whole text, got one whose heads or text are split; use "
                "selector='attention' or 'random'"
            )
        config = _parallel_config.context_parallel_config
        if attn_mask is not None and config.ring_degree > 1 and self.selector == "attention":
            raise RuntimeError(
                f"selector {self.selector!r}: expected ring attention without a mask, got one; "
                "use selector='random'"
            )
        before = len(self.found)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        calls = _Calls(forward_op, self.found, scale)
        out = self._own(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            *args,
            forward_op=forward_op if self.selector == "norm" else calls,
            _parallel_config=_parallel_config,
            **kwargs,
        )
        with torch.autocast(query.device.type, enabled=False):
            if self.selector == "norm":
                score = _norm(value, config)
            else:
                score = _received(calls, config, query)
        self.found[before:] = [score]  # instead of what was seen of other heads and tokens
        return out


class _Calls:
    """A backend's kernel; keeps what scores follow from.

    Attributes:
        chunks: (q, k, ln sum exp) of each call of a ring, the process's own keys first.
        whole: (B, N) of a call for all keys: what they receive, the mean of its heads.
        heads: of the last call.
    """

    def __init__(self, own: Callable[..., Any], found: list[Tensor], scale: float) -> None:
        self.chunks: list[tuple[Tensor, Tensor, Tensor]] = []
        self.whole: Tensor | None = None
        self.heads = 0
        self._own, self._found, self.scale = own, found, scale

    def __call__(
        self,
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        **kwargs: Any,
    ) -> Any:
        before = len(self._found)
        given = (attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse)
        out = self._own(ctx, query, key, value, *given, **kwargs)
        self.heads = query.shape[2]
        if return_lse:
            lse = out[1] if out[1].ndim == 3 else out[1].squeeze(-1)
            self.chunks.append((query, key, lse))
        elif len(self._found) > before:  # it called what CapturedScores intercepts
            self.whole = self._found[-1]
        else:
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            call = AttentionCall(q, k, v, attn_mask, dropout_p, self.scale, enable_gqa)
            _, self.whole = SELECTORS["attention"].attend(call)
        return out


def _norm(value: Tensor, config: Any) -> Tensor:
    """The selector "norm": every process has all heads of its tokens, only the largest is asked."""
    length = torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32).sum(dim=2)
    ranks = Ranks(config._flattened_mesh.get_group(), together=True)
    return ranks.most(length.amax(dim=1, keepdim=True)) - length


def _received(calls: _Calls, config: Any, query: Tensor) -> Tensor:
    """The selector "attention": what the process's tokens receive from all queries and heads."""
    if calls.chunks:
        total = _of_ring(calls, Ranks(config._ring_mesh.get_group(), together=True))
    else:
        assert calls.whole is not None
        total = calls.whole * calls.heads
    _, N, H, _ = query.shape
    if config.ulysses_degree > 1:
        ranks = Ranks(config._ulysses_mesh.get_group(), together=True)
        sizes = [N] * ranks.size
        if config.ulysses_anything:
            sizes = ranks.gather(torch.tensor(N, device=query.device)).tolist()
        total = _own_part(ranks, total, sizes)
    return total / H


def _of_ring(calls: _Calls, ranks: Ranks) -> Tensor:
    """The sum over heads of what the keys of this process receive from queries of all of them."""
    lse = torch.stack([one.float() for _, _, one in calls.chunks]).logsumexp(dim=0)
    lse = lse.transpose(1, 2).contiguous()  # (B, heads, queries here), of all keys
    parts = [torch.empty(0)] * ranks.size
    for step, (q, k, _) in enumerate(calls.chunks):
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        parts[(ranks.rank + step) % ranks.size] = attention_scores(q, k, lse, scale=calls.scale)
    sizes = [part.shape[1] for part in parts]
    return _own_part(ranks, torch.cat(parts, dim=1) * calls.heads, sizes)


def _own_part(ranks: Ranks, total: Tensor, sizes: list[int]) -> Tensor:
    """Of the sum over processes of (B, N of all), what is about the tokens of this one."""
    return ranks.sum(total.contiguous()).split(sizes, dim=1)[ranks.rank]
