"""Input checks of the public ops: the only place that raises for a bad tensor.

Native bodies receive raw pointers, so whatever is not refused here would be a wrong read.
Every message says what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def shape_text(shape: Sequence[object]) -> str:
    return "(" + ", ".join(str(size) for size in shape) + ")"


def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fits(want: int | str, have: int) -> bool:
    return want == have or isinstance(want, str)


def tensor(
    name: str,
    value: object,
    shape: Sequence[int | str],
    *,
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
    layout: str = "contiguous",
) -> torch.Tensor:
    """Return `value` if it is a tensor of this shape, dtype, device and layout.

    `shape` mixes sizes with letters; a letter stands for any size.  `layout` is "contiguous",
    "rows" (last dimension contiguous, the others strided at will) or "any".
    """
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    have = value.shape
    if len(have) != len(shape) or not all(map(_fits, shape, have)):
        raise ValueError(f"{name}: expected shape {shape_text(shape)}, got {shape_text(have)}")
    if dtype is not None and value.dtype != dtype:
        dtypes = (dtype,) if isinstance(dtype, torch.dtype) else dtype
        if value.dtype not in dtypes:
            wanted = " or ".join(dtype_text(d) for d in dtypes)
            raise ValueError(f"{name}: expected dtype {wanted}, got {dtype_text(value.dtype)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")
    if layout == "contiguous" and not value.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {value.stride()}")
    if layout == "rows" and value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected a contiguous last dimension, got strides {value.stride()}"
        )
    return value


def modulation(name: str, value: object, x: torch.Tensor) -> torch.Tensor:
    """A shift, scale or gate: (B, C) for a whole sample, or (B, N, C) for each token."""
    B, N, C = x.shape
    per_token = isinstance(value, torch.Tensor) and value.ndim == 3
    shape = (B, N, C) if per_token else (B, C)
    return tensor(name, value, shape, dtype=x.dtype, device=x.device, layout="rows")


def count(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: expected an integer, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} <= {name} <= {high}, got {value}")
    return value


def dtype(name: str, value: object, known: Sequence[torch.dtype]) -> torch.dtype:
    if not isinstance(value, torch.dtype) or value not in known:
        wanted = " or ".join(dtype_text(d) for d in known)
        have = dtype_text(value) if isinstance(value, torch.dtype) else repr(value)
        raise ValueError(f"{name}: expected {wanted}, got {have}")
    return value


def at_least(name: str, value: object, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")
    return value


def choice(name: str, value: object, known: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    return value
