"""Token-wise feature caching (ToCa) for diffusion transformers, at the speed of its FLOPs."""

from ._backends import BackendStatus, backends
from .config import ToCaConfig
from .ops import (
    ForecastCache,
    QuantizedCache,
    Selection,
    attention_entropy,
    attention_scores,
    attention_with_lse,
    gather_modulate,
    mlp_rows,
    partial_attention,
    partial_mlp,
    read_rows,
    scatter_residual,
    scored_attention,
    select_tokens,
    store_rows,
)
from .plan import Plan
from .requests import Request
from .room import CacheTooLarge
from .session import Session, disable, enable, enabled
from .summary import Summary

__version__ = "0.1.0"

__all__ = [
    "BackendStatus",
    "CacheTooLarge",
    "ForecastCache",
    "Plan",
    "QuantizedCache",
    "Request",
    "Selection",
    "Session",
    "Summary",
    "ToCaConfig",
    "__version__",
    "attention_entropy",
    "attention_scores",
    "attention_with_lse",
    "backends",
    "disable",
    "enable",
    "enabled",
    "gather_modulate",
    "mlp_rows",
    "partial_attention",
    "partial_mlp",
    "read_rows",
    "scatter_residual",
    "scored_attention",
    "select_tokens",
    "store_rows",
]
