"""Values that are small rank high: the value norm of DuCa's first version, arXiv 2412.18911v1."""

from __future__ import annotations

import torch
from torch import Tensor

from .selector import AttentionCall, Selector


class Norm(Selector):
    """s_j = max over tokens of n - n_j, with n_j the sum over heads of |v_j|."""

    name = "norm"
    source = "keys"

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        values = call.values()
        length = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32).sum(dim=1)
        return call.out(), length.amax(dim=-1, keepdim=True) - length
