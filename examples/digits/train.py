"""Trains the digit diffusion transformer and its judge on scikit-learn's handwritten digits.

    python examples/digits/train.py

Saves the model every 200 iterations, so an interrupted run leaves a usable one.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm, trange

from digits import (
    JUDGE_FILE,
    MODEL_FILE,
    NULL_CLASS,
    WEIGHTS,
    Judge,
    accuracy,
    build_model,
    load_images,
    scheduler,
)

LABEL_DROPOUT = 0.15
EMA_DECAY = 0.995
MIN_VARIANCE = 0.05  # weighs timesteps with little noise no higher than this
WARMUP_ITERATIONS = 100


def augment(images: Tensor) -> Tensor:
    """Slightly rotates, scales and shifts every image, so the model cannot just recite."""
    n = len(images)
    angle = torch.empty(n).uniform_(-0.12, 0.12)
    zoom = torch.empty(n).uniform_(0.95, 1.1)  # > 1 shrinks the digit
    shift = torch.empty(n, 2).uniform_(-0.06, 0.06)
    theta = torch.stack(
        [
            torch.stack([zoom * angle.cos(), -zoom * angle.sin(), shift[:, 0]], dim=1),
            torch.stack([zoom * angle.sin(), zoom * angle.cos(), shift[:, 1]], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # grid_sample pads with zeros, so the background has to be zero while it works.
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def draw_batch(images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A random augmented batch."""
    index = torch.randint(len(images), (size,))
    return augment(images[index]), labels[index]


def save(module: nn.Module, path: Path) -> None:
    """Writes the weights in half precision."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half() for name, value in module.state_dict().items()}, path)


def train_judge(out: Path, iterations: int = 1500, batch_size: int = 128) -> None:
    """Trains the classifier on the training split and prints its held-out accuracy."""
    images, labels = load_images("train")
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in trange(iterations, desc="judge"):
        batch, target = draw_batch(images, labels, batch_size)
        loss = F.cross_entropy(judge(batch), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    judge.eval()
    save(judge, out / JUDGE_FILE)
    print(f"judge: {accuracy(judge, *load_images('held-out')):.2%} of held-out digits read right")


def initialise(model: nn.Module) -> None:
    """DiT's start: every block is the identity and the prediction is zero."""
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    nn.init.zeros_(model.proj_out_2.weight)
    nn.init.zeros_(model.proj_out_2.bias)


def diffusion_loss(
    model: nn.Module, noise_schedule: DDIMScheduler, images: Tensor, labels: Tensor
) -> Tensor:
    """Squared error of the predicted digit over the noise variance; some labels are dropped.

    That is the usual loss on the velocity, but the network puts out a smooth digit instead of
    noise, which a short training learns much sooner.  Dropping labels is for guidance.
    """
    n = len(images)
    # Stratified timesteps: every batch covers all noise levels, which calms the gradient.
    t = ((torch.arange(n) + torch.rand(n)) / n * len(noise_schedule.betas)).long()
    labels = torch.where(torch.rand(n) < LABEL_DROPOUT, NULL_CLASS, labels)
    noise = torch.randn_like(images)
    noisy = noise_schedule.add_noise(images, noise, t)
    with torch.autocast("cpu", torch.bfloat16):  # 1.7 times as fast as float32
        predicted = model(noisy, timestep=t, class_labels=labels).sample
    error = (predicted.float() - images).square().mean(dim=(1, 2, 3))
    return (error / (1 - noise_schedule.alphas_cumprod[t]).clamp(min=MIN_VARIANCE)).mean()


def learning_rate(iteration: int, progress: float, peak: float) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * min(1.0, (iteration + 1) / WARMUP_ITERATIONS) * cosine


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, iteration: int) -> None:
    """Moves the averaged weights towards the current ones, fast at first."""
    decay = min(EMA_DECAY, (1 + iteration) / (10 + iteration))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    """One step of the optimizer at this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def train_model(args: argparse.Namespace) -> None:
    """Trains the transformer until the iterations or minutes are used up."""
    images, labels = load_images("train")
    noise_schedule = scheduler()
    # eval(): each block of diffusers' DiT drops labels by itself in training mode, so one
    # sample would be conditional in one block and unconditional in the next. diffusion_loss
    # drops them once for all blocks instead; the model has no other dropout.
    model = build_model().eval()
    initialise(model)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), weight_decay=0.01, betas=(0.9, 0.98), fused=True
    )

    start, iteration, progress = time.monotonic(), 0, 0.0
    with tqdm(total=1.0, desc="model", bar_format="{l_bar}{bar}| {elapsed}{postfix}") as bar:
        while progress < 1:
            batch = draw_batch(images, labels, args.batch_size)
            loss = diffusion_loss(model, noise_schedule, *batch)
            take_step(model, optimizer, loss, learning_rate(iteration, progress, args.lr))
            update_average(average, model, iteration)

            iteration += 1
            minutes = (time.monotonic() - start) / 60
            done = minutes / args.minutes if args.minutes else iteration / args.iterations
            bar.set_postfix_str(f"iteration {iteration}, loss {loss.item():.3f}")
            bar.update(min(done, 1.0) - progress)
            progress = min(done, 1.0)
            if iteration % args.save_every == 0 or progress == 1:
                save(average, args.out / MODEL_FILE)
    print(f"model: {iteration} iterations in {minutes:.1f} minutes")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=2400, help="length of the training")
    parser.add_argument("--minutes", type=float, help="length in minutes, instead of iterations")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--save-every", type=int, default=200, help="iterations between saves")
    parser.add_argument("--only", choices=["judge", "model"], help="train just one of the two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder for the weights")
    return parser.parse_args()


def main() -> None:
    """Trains what the command line asks for."""
    args = parse_arguments()
    if args.only != "model":
        torch.manual_seed(args.seed)
        train_judge(args.out)
    if args.only != "judge":
        torch.manual_seed(args.seed)
        train_model(args)


if __name__ == "__main__":
    main()
