"""What the page of `toca report` draws on: pictures as PNG in data URIs, and masks as bytes."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from ...plan import module_kind
from ...trace import Part, Trace

Pixels = NDArray[Any]

LARGEST = 512  # pixels of a picture's longer side on the page
VIEWED = 8  # samples whose tokens the page can show
_FRAMES = 24  # of a video
_LAYER_BYTES = 3 << 20  # of one module's masks, layer by layer; beyond it some layers are left out


# --- pictures ------------------------------------------------------------------------------------


def png(pixels: Pixels) -> bytes:
    """(H, W), (H, W, 3) or (H, W, 4) uint8 as a PNG file: https://www.w3.org/TR/png-3/."""
    H, W = pixels.shape[:2]
    colour = {1: 0, 3: 2, 4: 6}[pixels.size // (H * W)]
    rows = np.ascontiguousarray(pixels).reshape(H, -1)
    unfiltered = np.concatenate([np.zeros((H, 1), np.uint8), rows], axis=1)

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", W, H, 8, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(unfiltered.tobytes(), 9))
        + chunk(b"IEND", b"")
    )


def data_uri(pixels: Pixels) -> str:
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def picture(sample: Pixels, largest: int = LARGEST) -> str:
    """Data URI of (C, H, W): uint8, or float in [0, 1], NaN black.  Of many channels the first
    three."""
    C, H, W = sample.shape
    x = torch.as_tensor(np.ascontiguousarray(sample[: 3 if C >= 3 else 1]))
    x = x.float() / 255 if sample.dtype == np.uint8 else x.float().nan_to_num(0).clamp(0, 1)
    if max(H, W) > largest:
        scale = largest / max(H, W)
        size = (max(1, round(H * scale)), max(1, round(W * scale)))
        x = F.interpolate(x[None], size=size, mode="area")[0]
    pixels = x.mul(255).round().to(torch.uint8).movedim(0, -1).numpy()
    return data_uri(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def frames(sample: Pixels) -> list[Pixels]:
    """(C, H, W) or (F, C, H, W) as a list of pictures, of a long video some of them."""
    if sample.ndim == 3:
        return [sample]
    shown = np.linspace(0, len(sample) - 1, min(len(sample), _FRAMES)).round().astype(int)
    return [sample[frame] for frame in shown]


def difference_scale(one: Pixels, other: Pixels) -> int:
    """The factor, a power of two, that makes the largest difference of a pixel nearly white."""
    largest = float(np.abs(one - other).max())
    return 2 ** max(0, math.floor(math.log2(1 / largest))) if largest > 0 else 1


# --- tokens --------------------------------------------------------------------------------------


def packed(values: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def viewed_modules(part: Part) -> list[str]:
    """The modules whose tokens are worth a look: those that select, else all MLPs."""
    selecting = [name for name in part.plan.modules if name in part.selections]
    return selecting or [name for name in part.plan.modules if module_kind(name) == "mlp"]


def tokens(part: Part, trace: Trace) -> list[dict[str, Any]]:
    """What the page's script draws of a part: see `token_masks`."""
    sizes = trace.result.shape[-2:] if trace.result is not None else None
    count = len(trace.result) if trace.result is not None else None
    return [token_masks(part, name, sizes, count) for name in viewed_modules(part)]


def token_masks(
    part: Part, module: str, sizes: Sequence[int] | None, samples: int | None
) -> dict[str, Any]:
    """Which tokens of a module were recomputed, for the page's script.

    Args:
        part: of the trace.
        module: its name in the plan.
        sizes: (H, W) of the pictures, for a grid that nobody told.
        samples: how many there are; the rows of the model's batch are taken to be these, once or
            several times over.

    Returns:
        `counts`: (steps, rows, N) uint8, in how many of the `shown` layers the token was
        recomputed, and `bits`: (steps, shown, rows, N), packed 8 to a byte, the first in the
        highest bit.  Both in base64.
    """
    fresh = part.fresh(module)
    S, L, B, N = fresh.shape
    halves = B // samples if samples and B % samples == 0 else 1
    per_half = min(B // halves, VIEWED)
    rows = [half * (B // halves) + row for half in range(halves) for row in range(per_half)]
    most = max(1, min(L, 255, _LAYER_BYTES * 8 // max(1, S * len(rows) * N)))
    shown = np.linspace(0, L - 1, most).round().astype(int) if most < L else np.arange(L)
    chosen = fresh[:, shown][:, :, rows]
    return {
        "module": module,
        "layers": [int(layer) for layer in shown],
        "all": L,
        "tokens": N,
        "grid": _grid(part, module, sizes),
        "rows": [
            {
                "sample": row % (B // halves),
                "half": row // (B // halves) + 1 if halves > 1 else 0,
            }
            for row in rows
        ],
        "full": part.plan.full[module][:, shown].tolist(),
        "counts": packed(chosen.sum(axis=1).astype(np.uint8)),
        "bits": packed(np.packbits(chosen)),
    }


def _grid(part: Part, module: str, sizes: Sequence[int] | None) -> list[int] | None:
    """The grid of a module's tokens: as the model's call told it, as a module with as many tokens
    has it, or the one of the picture's proportions; None for text and where nothing fits."""
    N = part.plan.num_tokens[module]
    if module in part.grids:
        return list(part.grids[module])
    if module.startswith("txt_"):
        return None
    for grid in part.grids.values():
        if math.prod(grid) == N:
            return list(grid)
    if sizes is None:
        return None
    H, W = sizes
    rows = math.isqrt(max(0, N * H // W))
    fits = rows > 0 and N % rows == 0 and rows * W == N // rows * H
    return [rows, N // rows] if fits else None
