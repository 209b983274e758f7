"""The two pictures of the demo: sampled digits side by side, and where the work was done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no display

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from torch import Tensor

COLUMNS = 10  # digits or steps in a row
FULL_COLOUR = "#1f77b4"
TOKEN_COLOUR = "#ff7f0e"


def tile(images: Tensor, columns: int = COLUMNS) -> Tensor:
    """(B, 1, H, W) to one large (rows·H, columns·W) picture, row by row; gaps are NaN."""
    count, _, height, width = images.shape
    rows = math.ceil(count / columns)
    padded = torch.full((rows * columns, height, width), math.nan)
    padded[:count] = images[:, 0]
    return padded.view(rows, columns, height, width).transpose(1, 2).reshape(rows * height, -1)


def draw_samples(path: Path, untouched: Tensor, cached: Tensor, result: dict[str, Any]) -> None:
    """Untouched and cached samples and their difference, next to each other."""
    difference = (cached - untouched).abs()
    rows = math.ceil(len(untouched) / COLUMNS)
    columns = min(COLUMNS, len(untouched))
    figure, axes = plt.subplots(
        1, 3, figsize=(16.5, 1.3 + 5.3 * rows / columns), layout="constrained"
    )
    panels = [
        (untouched, "gray", (-1, 1), _title("Untouched", result, "untouched")),
        (cached, "gray", (-1, 1), _title("ToCa", result, "toca")),
        (difference, "magma", (0, 0.5), f"|Difference|, PSNR {result['psnr']:.1f} dB"),
    ]
    for axis, (images, colours, limits, title) in zip(axes, panels, strict=True):
        shown = axis.imshow(tile(images, columns), cmap=colours, vmin=limits[0], vmax=limits[1])
        axis.set_title(title, fontsize=13)
        axis.axis("off")
    figure.colorbar(shown, ax=axes[2], shrink=0.8, label="of a pixel range of 2")
    figure.suptitle(
        f"The same digits, {result['steps']} DDIM steps, preset {result['preset']}: "
        f"{result['speedup']:.2f}x faster at {result['flops_ratio']:.2f}x fewer FLOPs",
        fontsize=15,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _title(name: str, result: dict[str, Any], key: str) -> str:
    seconds, right = result[f"seconds_{key}"], result[f"accuracy_{key}"]
    return f"{name}: {seconds:.1f} s, judge reads {right:.1%} right"


def draw_tokens(
    path: Path, selections: Sequence[Tensor | None], noisy: Sequence[Tensor], preset: str
) -> None:
    """One digit through all steps, with the tokens that each step recomputed.

    selections holds, for every step, None (a full step) or a bool tensor (layers, N).
    """
    rows = math.ceil(len(noisy) / COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(16, 1.2 + 1.72 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for step, (axis, selection, image) in enumerate(
        zip(axes.flat, selections, noisy, strict=False)
    ):
        _draw_step(axis, step, selection, image)
    figure.suptitle(
        f"Which tokens of one digit were recomputed in each step (preset {preset})", fontsize=15
    )
    figure.legend(
        handles=[
            Patch(color=FULL_COLOUR, label="full step: every token, the cache is refreshed"),
            Patch(color=TOKEN_COLOUR, label="recomputed token; stronger: in more layers"),
            Patch(color="gray", label="taken from the cache"),
        ],
        loc="outside lower center",
        ncols=3,
        fontsize=12,
        frameon=False,
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_step(axis: plt.Axes, step: int, selection: Tensor | None, image: Tensor) -> None:
    """One cell of the strip: the noisy image, and the recomputed tokens painted over it."""
    size = image.shape[-1]
    axis.axis("on")
    axis.set(xticks=[], yticks=[])
    axis.imshow(image, cmap="gray", vmin=-2, vmax=2)
    if selection is None:
        axis.set_title(f"{step}: full", fontsize=10, color=FULL_COLOUR, fontweight="bold")
        for spine in axis.spines.values():
            spine.set(color=FULL_COLOUR, linewidth=4)
        return
    share = selection.float().mean(0)  # of the layers
    grid = share.view(math.isqrt(len(share)), -1)
    axis.imshow(
        torch.ones_like(grid),
        cmap=ListedColormap([TOKEN_COLOUR]),
        alpha=(0.75 * grid).numpy(),
        extent=(-0.5, size - 0.5, size - 0.5, -0.5),
        interpolation="nearest",
    )
    axis.set_title(f"{step}: {share.mean():.0%}", fontsize=10)
