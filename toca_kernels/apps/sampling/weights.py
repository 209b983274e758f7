"""Which weights a model has."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_PROBED = 64  # values of each weight that tell checkpoints apart


def fingerprint(target: Any) -> str:
    """Tells the weights of a model, or of all of a pipeline's, from others.

    A hash of names, shapes, dtypes and a few values spread over each weight: quick for any size,
    and another training, or one step more of it, changes it.
    """
    found = hashlib.sha256()
    for part, module in _modules(target):
        for key, weight in module.state_dict().items():
            found.update(f"{part}.{key}".encode())
            if type(weight) is Tensor and weight.device.type != "meta":
                flat = weight.reshape(-1)
                some = flat[:: max(1, len(flat) // _PROBED)][:_PROBED]
                found.update(f"{tuple(weight.shape)} {weight.dtype}".encode())
                found.update(some.to("cpu", torch.float64).numpy().tobytes())
    return found.hexdigest()


def _modules(target: Any) -> list[tuple[str, nn.Module]]:
    if isinstance(target, nn.Module):
        return [("", target)]
    parts: Mapping[str, Any] = getattr(target, "components", None) or vars(target)
    return [(name, part) for name, part in sorted(parts.items()) if isinstance(part, nn.Module)]
