"""The digits model for `toca sample`, `toca eval` and `toca tune`.

toca sample examples/digits/sampler.py --classes 0-9 --count 100 --preset dit-ddim50 --out digits
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digits import GUIDANCE, IMAGE_SIZE, NUM_CLASSES, WEIGHTS, load_model, sample, scheduler
from toca_kernels.apps.sampling import Request, noise


class DigitsSampler:
    """Draws digits with DDIM and guidance; their classes are 0 to 9."""

    num_steps = 50

    def __init__(self, model: torch.nn.Module, guidance: float) -> None:
        self.target = model
        self._guidance = guidance

    def timesteps(self, steps: int) -> list[float]:
        ddim = scheduler()
        ddim.set_timesteps(steps)
        return ddim.timesteps.tolist()

    def sample(self, requests: Sequence[Request], *, seed: int, steps: int) -> Tensor:
        """(B, 1, 32, 32) in [0, 1]."""
        return (self.latents(requests, seed=seed, steps=steps) / 2 + 0.5).clamp(0, 1)

    def latents(self, requests: Sequence[Request], *, seed: int, steps: int) -> Tensor:
        """(B, 1, 32, 32): the same, in the range that the model paints in, about [-1, 1]."""
        device = next(self.target.parameters()).device
        x = noise(seed, [one.index for one in requests], (1, IMAGE_SIZE, IMAGE_SIZE), device=device)
        return sample(
            self.target,
            torch.tensor([_label(one.condition) for one in requests], device=device),
            num_steps=steps,
            guidance=self._guidance,
            noise=x,
            progress=False,
        ).cpu()


def _label(condition: int | str) -> int:
    if not isinstance(condition, int) or not 0 <= condition < NUM_CLASSES:
        raise ValueError(f"digits: expected classes from 0 to {NUM_CLASSES - 1}, got {condition!r}")
    return condition


def sampler(
    *,
    device: torch.device,
    dtype: torch.dtype,
    guidance: float = GUIDANCE,
    weights: str | Path = WEIGHTS,
) -> DigitsSampler:
    """Loads the trained model; `weights` is the folder that train.py wrote."""
    model: Any = load_model(dtype, weights)
    torch.nn.Module.to(model, device)
    return DigitsSampler(model, guidance)
