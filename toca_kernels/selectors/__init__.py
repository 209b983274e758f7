"""Selectors: what says how much a token matters.  One small file each.

To add one: a subclass of `Selector` in a file of its own, a line here, its name in config.py's
`Selector`, and a case in tests/test_selectors.py.
"""

from .attention import Attention
from .entropy import Entropy
from .mask import Mask
from .norm import Norm
from .random import Random
from .selector import AttentionCall, Selector
from .similarity import Similarity

SELECTORS: dict[str, Selector] = {
    one.name: one for one in (Attention(), Entropy(), Norm(), Similarity(), Random(), Mask())
}

__all__ = ["SELECTORS", "AttentionCall", "Selector"]
