"""Makes a clip with Open-Sora 1.2 in its own code (rectified flow), with ToCa.

    python examples/open_sora.py --repo ~/Open-Sora --prompt "waves break at dusk"

`--repo` is a checkout of hpcaitech/Open-Sora at v1.2 whose requirements are installed.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import toca_kernels as toca


def load(args: argparse.Namespace) -> SimpleNamespace:
    """What the checkout has: the model, its inputs, the sampler, and what saves its latents."""
    path = args.repo / "configs" / "opensora-v1-2" / "inference" / "sample.py"
    if not path.is_file():
        raise SystemExit(f"--repo: expected {path}, there is none; check out v1.2")
    sys.path.insert(0, str(args.repo))
    try:
        from mmengine.config import Config
        from opensora.datasets import save_sample
        from opensora.datasets.aspect import get_image_size
        from opensora.models.text_encoder.t5 import text_preprocessing as clean
        from opensora.registry import MODELS, SCHEDULERS, build_module
        from opensora.utils.inference_utils import prepare_multi_resolution_info
    except ImportError as error:
        raise SystemExit(f"--repo {args.repo}: no working checkout: {error}") from None
    cfg = Config.fromfile(str(path))
    device, dtype = args.device, torch.bfloat16
    cfg.model.from_pretrained, cfg.scheduler.num_sampling_steps = args.weights, args.steps
    cfg.model.enable_flash_attn = find_spec("flash_attn") is not None  # both are optional there
    cfg.model.enable_layernorm_kernel = find_spec("apex") is not None
    encoder = build_module(cfg.text_encoder, MODELS, device=device)
    vae = build_module(cfg.vae, MODELS).to(device, dtype).eval()
    size = get_image_size(cfg.resolution, cfg.aspect_ratio)
    latent_size = vae.get_latent_size((cfg.num_frames, *size))
    text = {"caption_channels": encoder.output_dim, "model_max_length": encoder.model_max_length}
    shape = {"input_size": latent_size, "in_channels": vae.out_channels}
    model = build_module(cfg.model, MODELS, **text, **shape).to(device, dtype).eval()
    encoder.y_embedder = model.y_embedder  # where it finds the empty prompt
    info = (cfg.multi_resolution, 1, size, cfg.num_frames, cfg.fps, device, dtype)
    z = torch.randn(1, vae.out_channels, *latent_size, device=device)  # float32, as steps leave it
    inputs = {"text_encoder": encoder, "z": z, "prompts": [clean(args.prompt)], "device": device}
    inputs["additional_args"] = prepare_multi_resolution_info(*info)
    scheduler = build_module(cfg.scheduler, SCHEDULERS)

    def save(latents: Tensor) -> None:
        clip = vae.decode(latents.to(dtype), num_frames=cfg.num_frames)[0]
        save_sample(clip, fps=cfg.save_fps, save_path=str(args.out.with_suffix("")))

    return SimpleNamespace(model=model, inputs=inputs, scheduler=scheduler, save=save)


def sample(sora: SimpleNamespace, args: argparse.Namespace) -> Tensor:
    """The latents, by the repository's rectified flow."""
    config = toca.ToCaConfig.preset("opensora-rflow30")
    session = toca.enable(sora.model, config, num_steps=args.steps)
    latents = sora.scheduler.sample(sora.model, **sora.inputs)
    print(session.summary())
    return latents


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Load, sample and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo", type=Path, required=True, help="checkout of Open-Sora v1.2")
    parser.add_argument("--weights", default="hpcai-tech/OpenSora-STDiT-v3")
    parser.add_argument("--prompt", default="waves break at dusk. aesthetic score: 6.5.")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("open_sora.mp4"))
    args = parser.parse_args(argv)
    torch.manual_seed(42)
    sora = load(args)
    sora.save(sample(sora, args))


if __name__ == "__main__":
    main()
