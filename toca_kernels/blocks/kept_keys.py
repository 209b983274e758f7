"""Self-attention of the selected tokens, over the keys and values of all.

The module's own forward runs on the selected rows; where it calls scaled_dot_product_attention,
their keys and values take their places among those of the last full step.  Nothing is assumed about
projections and norms; a rotary embedding would turn the rows as if they were the first tokens, so
blocks that have one are not served like this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class KeptKeys(TorchFunctionMode):
    """Context in which an attention module runs: `exchange` sees its keys and values.

    Args:
        exchange: (key, value), each (B, N, H D) -> the keys and values to attend to instead.
    """

    def __init__(self, exchange: Callable[[Tensor, Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self.exchange = exchange

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attention(*args, **(kwargs or {}))

    def _attention(
        self,
        query: Tensor,  # named as scaled_dot_product_attention names them
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if attn_mask is not None or key.shape[1] != query.shape[1]:
            raise RuntimeError(
                "self_attention='partial': expected plain attention, got a mask or grouped queries"
            )
        H = key.shape[1]
        pair = self.exchange(*(one.transpose(1, 2).flatten(2) for one in (key, value)))
        key, value = (one.unflatten(2, (H, -1)).transpose(1, 2) for one in pair)
        return F.scaled_dot_product_attention(query, key, value, None, *args, **kwargs)
