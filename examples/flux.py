"""Draws a picture with FLUX.1-dev in its own code, with ToCa.

    python examples/flux.py --repo ~/flux --weights ~/FLUX.1-dev --prompt "a lighthouse at dusk"

`--repo` is a checkout of black-forest-labs/flux whose requirements are installed, `--weights` a
folder with flux1-dev.safetensors and ae.safetensors.  The text encoders come from the hub's cache.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import toca_kernels as toca


def load(args: argparse.Namespace) -> SimpleNamespace:
    """What the checkout has: the model, its inputs, the sampler, and what saves its latents."""
    for variables, name in ((("FLUX_MODEL", "FLUX_DEV"), "flux1-dev"), (("FLUX_AE", "AE"), "ae")):
        weights = args.weights / f"{name}.safetensors"
        if not weights.is_file():
            raise SystemExit(f"--weights: expected {weights}, there is none")
        os.environ.update(dict.fromkeys(variables, str(weights)))  # its loaders read these
    sys.path.insert(0, str(args.repo / "src"))
    try:
        from flux.sampling import denoise, get_noise, get_schedule, prepare, unpack
        from flux.util import load_ae, load_clip, load_flow_model, load_t5
        from PIL import Image
    except ImportError as error:
        raise SystemExit(f"--repo {args.repo}: no working checkout of flux: {error}") from None
    device, size = torch.device(args.device), (args.size, args.size)
    noise = get_noise(1, *size, device=device, dtype=torch.bfloat16, seed=args.seed)
    inputs = prepare(load_t5(device), load_clip(device), noise, prompt=args.prompt)

    def save(latents: Tensor) -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            picture = load_ae("flux-dev", device).decode(unpack(latents.float(), *size))[0]
        pixels = (127.5 * (picture.float().clamp(-1, 1) + 1)).byte().permute(1, 2, 0)
        Image.fromarray(pixels.cpu().numpy()).save(args.out)

    return SimpleNamespace(
        model=load_flow_model("flux-dev", device).eval(),
        inputs=inputs | {"timesteps": get_schedule(args.steps, inputs["img"].shape[1])},
        denoise=denoise,
        save=save,
    )


def sample(flux: SimpleNamespace, args: argparse.Namespace) -> Tensor:
    """The latents, by flux.sampling.denoise."""
    config = toca.ToCaConfig.preset("flux-50")
    session = toca.enable(flux.model, config, num_steps=args.steps)
    latents = flux.denoise(flux.model, **flux.inputs, guidance=args.guidance)
    print(session.summary())
    return latents


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Load, sample and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo", type=Path, required=True, help="checkout of flux")
    parser.add_argument("--weights", type=Path, required=True, help="folder of the weights")
    parser.add_argument("--prompt", default="a lighthouse on a cliff at dusk, waves breaking")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", type=int, default=1024, help="pixels, a multiple of 16")
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("flux.png"))
    args = parser.parse_args(argv)
    flux = load(args)
    flux.save(sample(flux, args))


if __name__ == "__main__":
    main()
