"""What a sampler is, and what it is asked for.

A sample is a `Request`: its number and what it shows.  All of its noise comes from one generator,
made from (seed, number), so it does not matter which process draws it, in which order, or after
how many others.

Its last bits may still depend on how many samples are drawn in one call: the libraries choose
another order of summation for matrices of other shapes.  See docs/scale.md for what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Request:
    """One sample to draw.

    Attributes:
        index: its number in the list; its noise comes from (seed, index) alone.
        condition: what it shows: a class label or a prompt.
    """

    index: int
    condition: int | str


@runtime_checkable
class Sampler(Protocol):
    """A model with the loop that samples from it.

    Attributes:
        target: what `toca_kernels.enable` takes, a model or a pipeline.
        num_steps: steps of a run where nobody asks for another number.
    """

    target: Any
    num_steps: int

    def timesteps(self, steps: int) -> list[float] | None:
        """Those of a run, for `enable(..., timesteps=)`; None where a scheduler announces them."""
        ...

    def sample(self, requests: Sequence[Request], *, seed: int, steps: int) -> Tensor:
        """(B, C, H, W), of videos (B, F, C, H, W): float32 in [0, 1], on the CPU.

        The rows are in the order of the requests, and each depends on its own request and the
        seed only, up to rounding.
        """
        ...


@runtime_checkable
class LatentSampler(Sampler, Protocol):
    """A sampler that can also hand out what it decodes."""

    def latents(self, requests: Sequence[Request], *, seed: int, steps: int) -> Tensor:
        """(B, ...): what `sample` decodes, in the model's own range and dtype, on the CPU."""
        ...
