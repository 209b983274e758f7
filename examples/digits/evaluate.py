"""Measures the untouched model: does the judge read its samples, and are they varied?

python examples/digits/evaluate.py --guidance 1 2 3 4
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from digits import (
    GUIDANCE,
    NUM_CLASSES,
    WEIGHTS,
    accuracy,
    load_images,
    load_judge,
    load_model,
    sample,
)


def spread(images: Tensor, labels: Tensor) -> float:
    """How far images of one class lie from each other: their mean pixel standard deviation."""
    per_class = [images[labels == digit].std(dim=0).mean() for digit in range(NUM_CLASSES)]
    return torch.stack(per_class).mean().item()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=260, help="samples per guidance")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--guidance", type=float, nargs="+", default=[GUIDANCE])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder with the weights")
    return parser.parse_args()


def main() -> None:
    """Samples at every guidance and prints one line for each."""
    args = parse_arguments()
    model, judge = load_model(getattr(torch, args.dtype), args.weights), load_judge(args.weights)
    real, real_labels = load_images("held-out")
    real_spread = spread(real, real_labels)
    print(f"held-out digits: judge {accuracy(judge, real, real_labels):.2%}")

    labels = torch.arange(args.images) % NUM_CLASSES
    for guidance in args.guidance:
        start = time.perf_counter()
        images = sample(model, labels, num_steps=args.steps, guidance=guidance, seed=args.seed)
        print(
            f"guidance {guidance:g}: judge {accuracy(judge, images, labels):.2%} "
            f"of {args.images} samples, spread {spread(images, labels) / real_spread:.2f} "
            f"of real digits', {time.perf_counter() - start:.0f} s"
        )


if __name__ == "__main__":
    main()
