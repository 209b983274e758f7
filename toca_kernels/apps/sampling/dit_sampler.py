"""Samples of a facebookresearch/DiT checkpoint, with the model and the diffusion of a checkout.

    toca sample DiT-XL-2-256x256.pt --checkout ~/DiT --classes 0-999 --count 50000 --out samples

Of the checkout are used `DiT_models` of models.py and `create_diffusion` of the package diffusion,
as its sample_ddp.py uses them; noise of later steps is each sample's own as well (own_noise).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .generators import generators, seed_of
from .own_noise import OuterCall, OwnNoise, watched
from .sampler import Request

_DOWN = 8  # pixels for each latent, of the autoencoder
_MODULES = ("models", "diffusion")
_STEPS = {"ddim": 50, "ddpm": 250}


def sampler(
    *,
    device: torch.device,
    dtype: torch.dtype,
    weights: str,
    checkout: str,
    model: str = "DiT-XL/2",
    image_size: int = 256,
    num_classes: int = 1000,
    guidance: float = 1.5,
    method: Literal["ddim", "ddpm"] = "ddim",
    vae: str | None = "stabilityai/sd-vae-ft-mse",
) -> DiTSampler:
    """Loads a checkpoint.

    Args:
        device, dtype: of the model; the diffusion around it is in float32.
        weights: the checkpoint, as published or as its train.py saves it (the averaged weights).
        checkout: folder of the user's clone of the repository.
        model: its name in `DiT_models`.
        image_size, num_classes: what it was trained with.
        guidance: scale; 1 runs without.
        method: "ddim" (eta 0) or "ddpm".
        vae: folder or name of the autoencoder; None: latents only.

    Raises:
        ValueError: no working checkout, or weights of another model.
        OSError: there are no such weights or no such autoencoder.
    """
    if method not in _STEPS:
        raise ValueError(f"method: expected one of {', '.join(_STEPS)}, got {method!r}")
    models, diffusion = _import(Path(checkout).expanduser())
    known = models.DiT_models
    if model not in known:
        raise ValueError(f"model: expected one of {', '.join(known)}, got {model!r}")
    net = known[model](input_size=image_size // _DOWN, num_classes=num_classes)
    _load(net, Path(weights))
    decoder = None if vae is None else _decoder(vae).to(device)
    net = net.to(device, dtype).eval().requires_grad_(False)
    _cast_waves(net)
    side = image_size // _DOWN
    return DiTSampler(net, diffusion.create_diffusion, decoder, side, num_classes, guidance, method)


class DiTSampler:
    """A DiT with its checkout's diffusion; see `sampler`."""

    def __init__(
        self,
        model: Any,
        create_diffusion: Any,
        vae: Any,
        side: int,
        num_classes: int,
        guidance: float,
        method: str,
    ) -> None:
        self.target = model
        self.num_steps = _STEPS[method]
        self._create, self._vae, self._side = create_diffusion, vae, side
        self._num_classes, self._guidance, self._method = num_classes, guidance, method
        weight: Tensor = next(model.parameters())
        self._device, self._dtype = weight.device, weight.dtype

    def timesteps(self, steps: int) -> list[float] | None:
        """Those of the diffusion, from the noisiest; None where it does not tell."""
        kept = getattr(self._create(str(steps)), "use_timesteps", None)
        return None if kept is None else [float(t) for t in sorted(kept, reverse=True)]

    def sample(self, requests: Sequence[Request], *, seed: int, steps: int) -> Tensor:
        if self._vae is None:
            raise ValueError("vae: expected an autoencoder to decode with, got none")
        latents = self._draw(requests, seed, steps)
        with torch.no_grad():
            pixels = self._vae.decode(latents / self._vae.config.scaling_factor).sample
        return (pixels / 2 + 0.5).clamp(0, 1).float().cpu()

    def latents(self, requests: Sequence[Request], *, seed: int, steps: int) -> Tensor:
        """(B, 4, H/8, W/8), float32."""
        return self._draw(requests, seed, steps).cpu()

    def _draw(self, requests: Sequence[Request], seed: int, steps: int) -> Tensor:
        labels = [self._label(request.condition) for request in requests]
        y = torch.tensor(labels, device=self._device)
        noise = OwnNoise(generators(seed, [request.index for request in requests]))
        diffusion = self._create(str(steps))
        loop = diffusion.ddim_sample_loop if self._method == "ddim" else diffusion.p_sample_loop
        guided = self._guidance > 1
        call, given = self.target.forward, {}
        if guided:
            call, given = self.target.forward_with_cfg, {"cfg_scale": self._guidance}
            y = torch.cat([y, torch.full_like(y, self._num_classes)])
        shape = (len(y), self.target.in_channels, self._side, self._side)
        first = seed_of(seed, requests[0].index)
        with torch.no_grad(), watched(self._device, first, len(requests), "diffusion"), noise:
            z = torch.randn(len(requests), *shape[1:], device=self._device)
            x = loop(
                OuterCall(noise, functools.partial(self._model, call)),
                shape,
                torch.cat([z, z]) if guided else z,
                clip_denoised=False,
                model_kwargs={"y": y, **given},
                progress=False,
                device=self._device,
            )
        return x[: len(requests)].float()

    def _model(self, call: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = call(x.to(self._dtype), *args, **kwargs)
        return out.float()

    def _label(self, condition: int | str) -> int:
        if not isinstance(condition, int) or not 0 <= condition < self._num_classes:
            raise ValueError(
                f"DiT: expected classes from 0 to {self._num_classes - 1}, got {condition!r}"
            )
        return condition


# --- loading -------------------------------------------------------------------------------------


def _import(checkout: Path) -> list[ModuleType]:
    """The modules of a checkout; those of the same names from elsewhere are left as they were."""
    if not (checkout / "models.py").is_file() or not (checkout / "diffusion").is_dir():
        raise ValueError(
            f"checkout: expected a clone of facebookresearch/DiT, with models.py and diffusion/, "
            f"got {checkout}"
        )
    with _apart(checkout):
        try:
            return [importlib.import_module(name) for name in _MODULES]
        except ImportError as error:
            raise ValueError(f"checkout {checkout}: {error}; install what it needs") from error


@contextlib.contextmanager
def _apart(checkout: Path) -> Iterator[None]:
    def ours() -> dict[str, ModuleType]:
        found = dict(sys.modules)
        return {name: found[name] for name in found if name.split(".")[0] in _MODULES}

    others = ours()
    for name in others:
        del sys.modules[name]
    sys.path.insert(0, str(checkout))
    try:
        yield
    finally:
        sys.path.remove(str(checkout))
        for name in ours():
            del sys.modules[name]
        sys.modules.update(others)


def _load(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state: Any = load_file(path)
    else:
        with torch.serialization.safe_globals([argparse.Namespace]):  # train.py keeps its options
            state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("ema", state)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: expected the weights of this model: {reason:.300}") from None


def _cast_waves(model: Any) -> None:
    """The published timestep embedding is computed in float32, whatever dtype its MLP has."""
    mlp = model.t_embedder.mlp
    mlp.register_forward_pre_hook(lambda mlp, given: (given[0].to(mlp[0].weight.dtype),))


def _decoder(name: str) -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ValueError(
            "diffusers is missing, for its autoencoder: pip install diffusers"
        ) from None
    return AutoencoderKL.from_pretrained(name).eval().requires_grad_(False)
