"""Drawing samples by number: what `toca sample`, `toca eval` and `toca tune` share.

A sample is a `Request`: its number and what it shows.  All of its noise comes from one generator,
made from (seed, number), so it does not matter which process draws it, in which order, or after
how many others.

Its last bits may still depend on how many samples are drawn in one call: the libraries choose
another order of summation for matrices of other shapes.  See docs/scale.md for what was measured.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

_PROBED = 64  # values of each weight that tell checkpoints apart
CHECKPOINTS = (".pt", ".pth", ".safetensors")


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


# --- noise ---------------------------------------------------------------------------------------


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


# --- weights -------------------------------------------------------------------------------------


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


# --- loading -------------------------------------------------------------------------------------


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
        arguments: of the file's `sampler`; of the checkpoint (see `sampling_dit.sampler`); or of
            every call of the pipeline, {"guidance_scale": 4.0}.

    Raises:
        ValueError: arguments that the target does not take, or a file that makes no sampler.
        OSError: there is no such target.
    """
    device = torch.device(device)
    if target.endswith(".py"):
        return _call(target, _definition(Path(target)), device, dtype, arguments)
    if target.endswith(CHECKPOINTS):
        from .sampling_dit import sampler

        return _call(target, sampler, device, dtype, {"weights": target, **arguments})
    from . import sampling_pipeline

    return sampling_pipeline.load(target, device, dtype, arguments)


def _definition(path: Path) -> Callable[..., Any]:
    """The function `sampler` of a file, which may import what lies beside it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # Its own name in sys.modules, which dataclasses and pickle look for.
    name = f"_toca_sampler_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ValueError(f"{path}: {error}") from error
    make = getattr(module, "sampler", None)
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
