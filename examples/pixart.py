"""Draws a picture with PixArt-alpha in its own code (DPM-Solver++), with ToCa.

    python examples/pixart.py --repo ~/PixArt-alpha --weights ~/weights/PixArt-XL-2-512x512.pth

`--repo` is a checkout of PixArt-alpha/PixArt-alpha whose requirements are installed.  Beside the
weights lie `sd-vae-ft-ema` and `t5_ckpts/t5-v1_1-xxl`, as its tools/download.py leaves them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import toca_kernels as toca


def load(args: argparse.Namespace) -> SimpleNamespace:
    """What the checkout has: the model, its inputs, the sampler, and what saves its latents."""
    vae, t5 = (args.weights.parent / name for name in ("sd-vae-ft-ema", "t5_ckpts"))
    for path in (args.weights, vae, t5):
        if not path.exists():
            raise SystemExit(f"--weights: expected {path}, there is none")
    sys.path.insert(0, str(args.repo))
    try:
        from diffusers.models import AutoencoderKL
        from diffusion import DPMS
        from diffusion.model.nets import PixArt_XL_2, PixArtMS_XL_2
        from diffusion.model.t5 import T5Embedder
        from torchvision.utils import save_image
    except ImportError as error:
        raise SystemExit(f"--repo {args.repo}: no working checkout of PixArt: {error}") from None
    device, side = args.device, args.size // 8
    build = PixArtMS_XL_2 if args.size == 1024 else PixArt_XL_2  # as in its script
    model = build(input_size=side, lewei_scale=max(args.size // 512, 1))
    state = torch.load(args.weights, map_location="cpu")["state_dict"]
    state.pop("pos_embed", None)  # the model computes its own
    if model.load_state_dict(state, strict=False).missing_keys not in ([], ["pos_embed"]):
        raise SystemExit(f"--weights: expected those of a model of size {args.size}")
    model = model.to(device, torch.float32 if device == "cpu" else torch.float16).eval()
    encoder = T5Embedder(device, local_cache=True, cache_dir=str(t5), torch_dtype=torch.float)
    text, mask = encoder.get_text_embeddings([args.prompt])
    data = {"img_hw": torch.full((1, 2), float(args.size), device=device)}
    data["aspect_ratio"] = torch.ones(1, 1, device=device)
    inputs = {"condition": text[:, None], "uncondition": model.y_embedder.y_embedding[None, None]}
    inputs["model_kwargs"] = {"data_info": data, "mask": mask}
    noise = torch.randn(1, 4, side, side, device=device)

    def save(latents: Tensor) -> None:
        decode = AutoencoderKL.from_pretrained(vae).to(device).decode
        picture = decode(latents.float() / 0.18215).sample
        save_image(picture, args.out, normalize=True, value_range=(-1, 1))

    return SimpleNamespace(model=model, noise=noise, inputs=inputs, solver=DPMS, save=save)


def sample(pixart: SimpleNamespace, args: argparse.Namespace) -> Tensor:
    """The latents, by the DPM-Solver++ of its script, order 2: one evaluation a step."""
    config = toca.ToCaConfig.preset("pixart-dpm20")
    session = toca.enable(pixart.model, config, num_steps=args.steps)
    solver = pixart.solver(pixart.model.forward_with_dpmsolver, **pixart.inputs, cfg_scale=4.5)
    latents = solver.sample(pixart.noise, steps=args.steps)
    print(session.summary())
    return latents


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Load, sample and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo", type=Path, required=True, help="checkout of PixArt-alpha")
    parser.add_argument("--weights", type=Path, required=True, help="PixArt-XL-2-*.pth")
    parser.add_argument("--prompt", default="a lighthouse on a cliff at dusk, waves breaking")
    parser.add_argument("--size", type=int, choices=(256, 512, 1024), default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("pixart.png"))
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    pixart = load(args)
    pixart.save(sample(pixart, args))


if __name__ == "__main__":
    main()
