"""Token-wise feature caching (ToCa) for diffusion transformers, at the speed of its FLOPs."""

from ._backends import BackendStatus, backends
from .config import ToCaConfig
from .ops import (
    Selection,
    attention_entropy,
    attention_scores,
    gather_modulate,
    mlp_rows,
    partial_attention,
    partial_mlp,
    scatter_residual,
    select_tokens,
)
from .plan import Plan
from .session import Session, Summary, disable, enable, enabled

__version__ = "0.1.0"

__all__ = [
    "BackendStatus",
    "Plan",
    "Selection",
    "Session",
    "Summary",
    "ToCaConfig",
    "__version__",
    "attention_entropy",
    "attention_scores",
    "backends",
    "disable",
    "enable",
    "enabled",
    "gather_modulate",
    "mlp_rows",
    "partial_attention",
    "partial_mlp",
    "scatter_residual",
    "select_tokens",
]
