"""store_rows: the rows of a full step into an 8-bit cache.

Fused: the largest magnitude of a row, its scale, rounding.  One program is one row, held in
registers from its load to its store.  Limited by memory bandwidth: one read, one write.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._eight_bit import as_bytes, quantized
from ._launch import launch


@triton.jit
def _store_rows_kernel(rows_ptr, values_ptr, scale_ptr, C, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)[None, :]
    inside = cols < C
    value = tl.load(rows_ptr + row * C + cols, mask=inside, other=0.0).to(tl.float32)
    values, scale = quantized(value, values_ptr.dtype.element_ty)
    tl.store(values_ptr + row * C + cols, values, mask=inside)
    tl.store(scale_ptr + row + tl.arange(0, 1), scale)


def store_rows(values: Tensor, scale: Tensor, rows: Tensor) -> None:
    B, N, C = rows.shape
    if B * N == 0:
        return
    tile = configs.gather_modulate(C)  # one program for each row there, too
    launch(_store_rows_kernel, B * N, rows, as_bytes(values), scale, C, **tile)
