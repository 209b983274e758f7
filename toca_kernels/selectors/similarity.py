"""What changed most between two full steps ranks high."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .selector import Selector


class Similarity(Selector):
    """s_n = 1 - cos(new_n, old_n), of what the module itself returned; alike after the first."""

    name = "similarity"
    source = "output"

    def changed(self, new: Tensor, old: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(new.float(), old.float(), dim=-1)
