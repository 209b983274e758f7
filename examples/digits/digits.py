"""A class-conditional diffusion transformer for handwritten digits: data, model, sampler, judge.

Everything here is what a user of diffusers would write; nothing knows about token caching.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

WEIGHTS = Path(__file__).parent / "weights"
MODEL_FILE = "digits_dit.safetensors"
JUDGE_FILE = "judge.safetensors"

IMAGE_SIZE = 32
NUM_CLASSES = 10
NULL_CLASS = NUM_CLASSES  # the extra row of the label embedding, for classifier-free guidance
GUIDANCE = 2.0

MODEL_CONFIG = {
    "sample_size": IMAGE_SIZE,
    "patch_size": 2,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "num_embeds_ada_norm": NUM_CLASSES,
}


def build_model() -> DiTTransformer2DModel:
    """The untrained transformer: 256 tokens, width 256, 4 blocks, 5.4 million parameters."""
    return DiTTransformer2DModel(**MODEL_CONFIG)


def load_model(
    dtype: torch.dtype = torch.float32, folder: Path | str = WEIGHTS
) -> DiTTransformer2DModel:
    """The trained transformer, ready for sampling."""
    model = build_model()
    model.load_state_dict(load_file(Path(folder) / MODEL_FILE))
    nn.Module.to(model, dtype)  # the model's own to() warns about a list of layers that is empty
    return model.eval().requires_grad_(False)


class Judge(nn.Sequential):
    """A small convolutional digit classifier: images (B, 1, 32, 32) in [-1, 1] to 10 logits."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 4 * 4, NUM_CLASSES),
        )


def load_judge(folder: Path | str = WEIGHTS) -> Judge:
    """The trained classifier that grades samples."""
    judge = Judge()
    judge.load_state_dict(load_file(Path(folder) / JUDGE_FILE))
    return judge.float().eval().requires_grad_(False)


def scheduler() -> DDIMScheduler:
    """The noise schedule of training and sampling: DiT's linear one; the model predicts x0."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        prediction_type="sample",
        timestep_spacing="trailing",
        clip_sample=False,  # step() would clip x0 but not the noise: wrong under strong guidance
    )


def load_images(split: str = "all") -> tuple[Tensor, Tensor]:
    """Real digits (n, 1, 32, 32) in [-1, 1] and their labels; split: all, train or held-out."""
    pixels, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    small = F.pad(small, (1, 1, 1, 1))  # the originals touch the edge
    large = F.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic")
    images, labels = large.clamp(0, 1) * 2 - 1, torch.from_numpy(labels)
    if split == "all":
        return images, labels
    train, held_out = train_test_split(
        torch.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels
    )
    chosen = {"train": train, "held-out": held_out}[split]
    return images[chosen], labels[chosen]


@torch.no_grad()
def sample(
    model: DiTTransformer2DModel,
    labels: Tensor,
    *,
    num_steps: int = 50,
    guidance: float = GUIDANCE,
    seed: int = 0,
    noise: Tensor | None = None,
    progress: bool = True,
    desc: str = "sampling",
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draws one digit per label with DDIM and classifier-free guidance; (B, 1, 32, 32).

    It starts from `noise` of that shape, on the labels' device; None draws it from the seed.
    on_step(step, x) is called with the noisy image that each step leaves.
    """
    ddim = scheduler()
    ddim.set_timesteps(num_steps)
    if noise is None:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(labels), 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    x = noise.to(labels.device)
    guided = guidance != 1
    classes = torch.cat([labels, torch.full_like(labels, NULL_CLASS)]) if guided else labels

    for step, t in enumerate(tqdm(ddim.timesteps, desc=desc, disable=not progress)):
        # One forward for both halves of the guidance: [conditional, unconditional].
        batch = (torch.cat([x, x]) if guided else x).to(model.dtype)
        output = model(batch, timestep=t.expand(len(batch)), class_labels=classes).sample.float()
        if guided:
            cond, uncond = output.chunk(2)
            output = uncond + guidance * (cond - uncond)
        x = ddim.step(output, t, x).prev_sample
        if on_step is not None:
            on_step(step, x)
    return x


@torch.no_grad()
def accuracy(judge: Judge, images: Tensor, labels: Tensor) -> float:
    """The share of images that the judge reads as their label."""
    return (judge(images.float()).argmax(1) == labels).float().mean().item()
