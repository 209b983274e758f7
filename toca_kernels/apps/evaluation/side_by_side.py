"""The same samples under every setting, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .pareto import new_figure

_SIDE = 192  # pixels of a shown picture at most
SHOWN = 10
_INCH = 1.05  # of a picture on paper


def draw_side_by_side(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    images: Sequence[Tensor],
    *,
    captions: Sequence[str],
    title: str,
) -> None:
    """Draw the first samples of every setting, one row each, with what they cost and are worth.

    Args:
        path: of the picture.
        rows: of quality.rows.
        images: for each row (B, C, H, W) in [0, 1], or videos (B, F, C, H, W), of which the frame
            in the middle is shown.
        captions: what the samples show, above the first row.
        title: above all.
    """
    shown = [_small(one[:SHOWN]) for one in images]
    count = len(shown[0])
    height, width = shown[0].shape[1:3]
    tall = _INCH * height / width
    figure = new_figure(figsize=(3.2 + _INCH * count, 0.9 + tall * len(rows)))
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, row, pictures in zip(axes, rows, shown, strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture.squeeze(-1), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
        line[0].set_ylabel(_words(row), rotation=0, ha="right", va="center", fontsize=9)
    for axis, caption in zip(axes[0], captions, strict=False):
        axis.set_title(caption if len(caption) <= 14 else f"{caption[:13]}…", fontsize=8)
    figure.suptitle(title, fontsize=12)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _words(row: Mapping[str, Any]) -> str:
    """Name, cost and worth of a setting."""
    parts = [str(row["name"])]
    costs = [
        f"{row[name]:.2f}× {what}"
        for name, what in (("speedup", "as fast"), ("flops_ratio", "fewer FLOPs"))
        if row.get(name) not in (None, 1.0)
    ]
    worth = [
        f"{what} {row[name]:.4g}{unit}"
        for name, what, unit in (("psnr", "PSNR", " dB"), ("fid", "FID", ""))
        if row.get(name) is not None and row[name] != float("inf")
    ]
    return "\n".join([*parts, *costs, ", ".join(worth)]).rstrip()


def _small(images: Tensor) -> Tensor:
    """(B, H, W, C), no larger than what is shown."""
    if images.ndim == 5:
        images = images[:, images.shape[1] // 2]
    images = images.float()
    side = max(images.shape[-2:])
    if side > _SIDE:
        images = F.interpolate(images, scale_factor=_SIDE / side, mode="area")
    return images.permute(0, 2, 3, 1).clamp(0, 1)
