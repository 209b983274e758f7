"""Where the cache was worst when a full step came ranks high."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .selector import Selector


class Similarity(Selector):
    """s_n = 1 - cos(new_n, old_n): what the module returned, and what was cached until then.

    Rows that were recomputed since, or are extrapolated well, rank low.  After the first full step
    all tokens are alike.
    """

    name = "similarity"
    source = "output"

    def changed(self, new: Tensor, old: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(new.float(), old.float(), dim=-1)
