"""A generator for each sample, from the seed and its number, and the noise to start from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """A generator for each sample, on the CPU: the same numbers whatever the device is."""
    return [torch.Generator().manual_seed(seed_of(seed, index)) for index in indices]


def seed_of(seed: int, index: int) -> int:
    """The 64-bit seed of a sample's generator.

    torch's CPU generator reads the low 32 bits only.  A hash of (seed, index) would soon repeat
    there, among 50,000 samples with a probability of 1/4; so the seed is hashed and the index
    added, and samples of a seed differ up to index 2^32.
    """
    for name, value in (("seed", seed), ("index", index)):
        if value < 0:
            raise ValueError(f"{name}: expected a number >= 0, got {value}")
    start = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "little")
    return (start + index) % 2**64


def noise(
    seed: int,
    indices: Sequence[int],
    shape: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise (B, *shape): the first numbers of each sample's generator.

    They are drawn on the CPU in float32, then moved and cast.
    """
    drawn = [torch.randn(*shape, generator=one) for one in generators(seed, indices)]
    rows = torch.stack(drawn) if drawn else torch.empty(0, *shape)
    return rows.to(device, dtype)
