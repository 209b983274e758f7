"""Scores from an attention module that is not ours.

While the module's own forward runs, its call of scaled_dot_product_attention (or its softmax) is
intercepted: the same flash kernel is called, which also returns the log-sum-exp, and the scores
follow from q, k and that.  The module's output keeps its bits and nothing is assumed about
projections, norms or rotary embeddings before the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..ops import attention_scores

_FLASH = 1  # SDPBackend.FLASH_ATTENTION, as _fused_sdp_choice numbers it
_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)


class CapturedScores(TorchFunctionMode):
    """Context in which an attention module runs; afterwards `score` is (B, N).

    Args:
        selector: "attention" (attention received, ToCa section 3.2) or "norm" (values that are
            small rank high: the value norm of DuCa, arXiv 2412.18911).
        batch: B.
    """

    def __init__(self, selector: str, batch: int) -> None:
        super().__init__()
        self.selector = selector
        self.batch = batch
        self.score: Tensor | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in _SOFTMAX and self.selector == "attention" and out.ndim in (3, 4):
            # An explicit map, (B, H, N, N) or (B * H, N, N): its column sums are the scores.
            weights = out if out.ndim == 4 else out.unflatten(0, (self.batch, -1))
            self.score = weights.sum(dim=2, dtype=torch.float32).mean(dim=1)
        return out

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if self.selector == "norm":
            length = torch.linalg.vector_norm(v, dim=-1, dtype=torch.float32).sum(dim=1)
            self.score = length.amax(dim=-1, keepdim=True) - length
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if attn_mask is not None or is_causal or enable_gqa:
            raise RuntimeError(
                "selector 'attention': expected plain self-attention, got a mask, a causal or a "
                "grouped-query call; use selector='norm' or 'random'"
            )
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        device = q.device.type
        if torch.is_autocast_enabled(device):  # casts inside the call, which is taken apart here
            dtype = torch.get_autocast_dtype(device)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        with torch.autocast(device, enabled=False):
            out, lse = attention_with_lse(q, k, v, dropout_p, scale)
            self.score = attention_scores(q, k, lse, scale=scale)
        return out


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, scale: float
) -> tuple[Tensor, Tensor]:
    """What scaled_dot_product_attention returns, bit for bit, and the (B, H, N) log-sum-exp."""
    choice = torch._fused_sdp_choice(q, k, v, None, dropout_p, False, scale=scale)
    if choice == _FLASH and q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, dropout_p, False, scale=scale
        )
        return out, lse.contiguous()
    if choice == _FLASH and q.device.type == "cuda" and q.shape[-1] % 8 == 0:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, dropout_p, False, False, scale=scale
        )[:2]
        return out, lse.contiguous()
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    lse = torch.stack(  # one head at a time: the map of all heads need not fit
        [
            torch.logsumexp(q[:, h].float() @ k[:, h].float().transpose(-1, -2) * scale, dim=-1)
            for h in range(q.shape[1])
        ],
        dim=1,
    )
    return out, lse
