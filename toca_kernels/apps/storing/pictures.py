"""Pictures as files of them hold them: bytes, colour last; and many of them in one .npz."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .whole import whole_file


def rgb(images: Tensor) -> Tensor:
    """(…, 3, H, W): grey pictures in three channels.

    Raises:
        ValueError: pictures of neither 1 nor 3 channels.
    """
    channels = images.shape[-3]
    if channels not in (1, 3):
        raise ValueError(f"pictures: expected 1 or 3 channels, got {channels}")
    return images.expand(*images.shape[:-3], 3, *images.shape[-2:])


def to_bytes(rows: Tensor) -> NDArray[np.uint8]:
    """(B, …, C, H, W) in [0, 1] to (B, …, H, W, C) uint8, rounded; halves are rounded up."""
    pixels = (rows.movedim(-3, -1) * 255 + 0.5).clamp(0, 255).to(torch.uint8)
    found: NDArray[np.uint8] = pixels.contiguous().numpy()
    return found


def save_npz(path: Path, shape: Sequence[int], parts: Iterable[NDArray[Any]]) -> None:
    """Pictures as the ImageNet evaluators read them: `arr_0` of an .npz, uint8 (N, H, W, 3).

    Args:
        path: the file, written whole or not at all.
        shape: of `arr_0`; of videos (N, F, H, W, 3).
        parts: its rows, in their order; one part is in memory at a time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
    with (
        whole_file(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as entry,
    ):
        np.lib.format.write_array_header_1_0(entry, header)
        for part in parts:
            entry.write(part.tobytes())


def save_samples(path: Path, parts: Sequence[Callable[[], Tensor]]) -> None:
    """Write what the parts make, as `save_npz` does.

    Args:
        path: the file.
        parts: each makes some of the pictures (B, C, H, W) in [0, 1]; one part is in memory at a
            time.

    Raises:
        ValueError: parts of different sizes, or pictures of neither 1 nor 3 channels.
    """
    sizes = [tuple(part().shape) for part in parts]
    if len({size[1:] for size in sizes}) != 1:
        raise ValueError(f"pictures: expected all of one size, got {sorted(set(sizes))}")
    _, _, H, W = sizes[0]
    shape = (sum(size[0] for size in sizes), H, W, 3)
    save_npz(path, shape, (to_bytes(rgb(part().float())) for part in parts))
