"""The sampler of a target: a Python file, a checkpoint of DiT, or a diffusers pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from . import dit_sampler, pipeline_sampler, python_file
from .sampler import Sampler

_CHECKPOINTS = (".pt", ".pth", ".safetensors")


def load(
    target: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    arguments: Mapping[str, Any],
) -> Sampler:
    """The sampler of a target.

    Args:
        target: a Python file that defines `sampler(*, device, dtype, **arguments) -> Sampler`; a
            checkpoint of facebookresearch/DiT (.pt, .pth, .safetensors); or a diffusers pipeline,
            a folder or a name on the hub.
        device, dtype: of the model.
        arguments: of the file's `sampler`; of the checkpoint (see `dit_sampler.sampler`); or of
            every call of the pipeline, {"guidance_scale": 4.0}.

    Raises:
        ValueError: arguments that the target does not take, or a file that makes no sampler.
        OSError: there is no such target.
    """
    device = torch.device(device)
    if target.endswith(".py"):
        return _call(target, _definition(Path(target)), device, dtype, arguments)
    if target.endswith(_CHECKPOINTS):
        weights = {"weights": target, **arguments}
        return _call(target, dit_sampler.sampler, device, dtype, weights)
    return pipeline_sampler.load(target, device, dtype, arguments)


def _definition(path: Path) -> Callable[..., Any]:
    """The function `sampler` of a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    make = getattr(python_file.module(path), "sampler", None)
    if not callable(make):
        raise ValueError(
            f"{path}: expected a function sampler(*, device, dtype, **arguments), there is none"
        )
    return make


def _call(
    target: str,
    make: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype,
    arguments: Mapping[str, Any],
) -> Sampler:
    given: dict[str, Any] = {"device": device, "dtype": dtype, **arguments}
    try:
        inspect.signature(make).bind(**given)
    except TypeError as error:
        taken = ", ".join(inspect.signature(make).parameters)
        raise ValueError(f"{target}: {error}; its sampler takes {taken}") from None
    made = make(**given)
    if not isinstance(made, Sampler):
        raise ValueError(
            f"{target}: expected sampler() to return an object with target, num_steps, timesteps "
            f"and sample, got {type(made).__name__}"
        )
    return made
