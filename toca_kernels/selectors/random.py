"""Every token alike: the random selection of DuCa's second version, arXiv 2412.18911v2."""

from __future__ import annotations

import torch
from torch import Tensor

from .selector import Selector


class Random(Selector):
    """s uniform in [0, 1), drawn anew in each cached step."""

    name = "random"
    source = "drawn"

    def draw(self, score: Tensor, generator: torch.Generator) -> None:
        score.uniform_(generator=generator)
