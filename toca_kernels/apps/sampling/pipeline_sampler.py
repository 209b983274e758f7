"""Samples of a diffusers pipeline: prompts, or classes for DiTPipeline."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from . import pipelines
from .generators import generators, seed_of
from .own_noise import OwnNoise, watched
from .sampler import Request

_OURS = {
    "class_labels": "classes are given for each sample",
    "generator": "every sample has its own",
    "latents": "every sample has its own",
    "num_images_per_prompt": "each request is one sample",
    "num_inference_steps": "use the number of steps",
    "num_videos_per_prompt": "each request is one sample",
    "output_type": "use the format",
    "prompt": "prompts are given for each sample",
    "return_dict": "the sampler reads what is returned",
}
_STEPS = 50  # where the pipeline has no default


def load(
    name: str, device: torch.device, dtype: torch.dtype, arguments: Mapping[str, Any]
) -> PipelineSampler:
    """The sampler of a folder or of a name on the hub; see `pipelines.load`."""
    return PipelineSampler(pipelines.load(name, device, dtype), arguments)


class PipelineSampler:
    """A pipeline as a sampler.

    Args:
        pipe: a pipeline around a transformer, on its device.
        arguments: of every call of it.

    Raises:
        ValueError: arguments that it does not take or that are not the caller's to give; a
            pipeline for prompts without a text encoder.
    """

    def __init__(self, pipe: Any, arguments: Mapping[str, Any]) -> None:
        self.target = pipe
        self._arguments = dict(arguments)
        self._name = type(pipe).__name__
        takes = inspect.signature(type(pipe).__call__).parameters
        self._by_class = "class_labels" in takes
        for name in arguments:
            if name in _OURS:
                raise ValueError(f"{name}: expected to be left out: {_OURS[name]}")
            if name not in takes:
                raise ValueError(f"{name}: {self._name} does not take it; it takes {list(takes)}")
        if not self._by_class and getattr(pipe, "text_encoder", None) is None:
            raise ValueError(f"{self._name}: expected a text encoder for the prompts, it has none")
        default = takes["num_inference_steps"].default if "num_inference_steps" in takes else None
        self.num_steps = default if isinstance(default, int) else _STEPS
        self._noise: OwnNoise | None = None
        pipe.set_progress_bar_config(disable=True)
        self._lead(pipe.scheduler)

    def timesteps(self, steps: int) -> list[float] | None:
        """None: the pipeline's scheduler announces them."""
        return None

    def sample(self, requests: Sequence[Request], *, seed: int, steps: int) -> Tensor:
        if getattr(self.target, "vae", None) is None:
            raise ValueError(f"{self._name}: expected a decoder, it has none; sample its latents")
        pixels = self._draw(requests, seed, steps, "pt")
        if pixels.ndim not in (4, 5):
            raise ValueError(
                f"{self._name}: expected pictures (B, C, H, W) or videos (B, F, C, H, W), got the "
                f"shape {tuple(pixels.shape)}"
            )
        return pixels.float().clamp(0, 1)

    def latents(self, requests: Sequence[Request], *, seed: int, steps: int) -> Tensor:
        if self._by_class:
            raise ValueError(f"{self._name}: expected one that returns latents, it always decodes")
        return self._draw(requests, seed, steps, "latent")

    def _draw(self, requests: Sequence[Request], seed: int, steps: int, kind: str) -> Tensor:
        indices = [request.index for request in requests]
        own = generators(seed, indices)
        pipe = self.target
        device = torch.device(pipe._execution_device)
        self._noise = OwnNoise(own)
        try:
            with watched(device, seed_of(seed, indices[0]), len(own), self._name):
                out = pipe(
                    **self._conditions(requests),
                    **self._arguments,
                    num_inference_steps=steps,
                    generator=own,
                    output_type=kind,
                    return_dict=False,
                )[0]
        finally:
            self._noise = None
        rows = torch.as_tensor(out).detach().cpu()
        if len(rows) != len(requests):
            raise ValueError(
                f"{self._name}: expected {len(requests)} samples, got {len(rows)} for as many "
                "conditions"
            )
        return rows

    def _conditions(self, requests: Sequence[Request]) -> dict[str, Any]:
        conditions = [request.condition for request in requests]
        if not self._by_class:
            wrong = next((one for one in conditions if not isinstance(one, str)), None)
            if wrong is not None:
                raise ValueError(f"{self._name}: expected prompts, got the class {wrong}")
            return {"prompt": conditions}
        known = self.target.transformer.config.num_embeds_ada_norm
        for one in conditions:
            if not isinstance(one, int) or not 0 <= one < known:
                raise ValueError(
                    f"{self._name}: expected classes from 0 to {known - 1}, got {one!r}"
                )
        return {"class_labels": conditions}

    def _lead(self, scheduler: Any) -> None:
        """The scheduler's steps draw each sample's noise from its own generator.

        Some pipelines hand their scheduler no generator (DiTPipeline with DDPM).
        """
        own: Callable[..., Any] = type(scheduler).step
        sampler = self

        @functools.wraps(own)  # pipelines read its signature
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if sampler._noise is None:
                return own(self, *args, **kwargs)
            with sampler._noise:
                return own(self, *args, **kwargs)

        vars(scheduler)["step"] = MethodType(step, scheduler)
