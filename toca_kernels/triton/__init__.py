"""The Triton backend: one kernel (or few) and its launcher for each op, imported on first use.

Every launcher has the signature of its op's body in reference.py.
"""

from ._launch import INTERPRETED, Launch, recording
from .attention_entropy import attention_entropy
from .attention_scores import attention_scores
from .gather_modulate import gather_modulate
from .mlp_rows import mlp_rows
from .partial_attention import partial_attention
from .read_rows import read_rows
from .scatter_residual import scatter_residual
from .scored_attention import scored_attention
from .select_tokens import select_tokens
from .store_rows import store_rows

__all__ = [
    "INTERPRETED",
    "Launch",
    "attention_entropy",
    "attention_scores",
    "gather_modulate",
    "mlp_rows",
    "partial_attention",
    "read_rows",
    "recording",
    "scatter_residual",
    "scored_attention",
    "select_tokens",
    "store_rows",
]
