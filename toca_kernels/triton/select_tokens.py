"""select_tokens: score + age, tile bonus, top k, compaction and ages, all rows in one launch.

Fused: everything from the scores to the inverse map.  One program is one row (a layer of a sample)
and reads it in chunks, so a row may have any length; radix select (four digits of 8 bits, because
`tl.histogram` costs time in proportion to its bins) sorts nothing and takes the same time for any
k.  The keys stay in the row of `inverse`, which is written last: there is no scratch memory.
Limited by latency: a short row is a chain of histograms, scans and barriers.

Compiled without fusion of a * b + c: scores must be the reference's, bit for bit.  Counts are
integers and slots come from a scan, so ties and the order of the index are exact as well.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._launch import launch

DIGITS: tl.constexpr = tl.constexpr(256)
HALF_WORD: tl.constexpr = tl.constexpr(65536)


@triton.jit
def _order_key(score):
    """A monotone map of float32 to uint32; NaN ranks with -infinity, -0 with +0 (csrc/order.h)."""
    score = tl.where(score == score, score, -float("inf"))
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _score(score_ptr, age_ptr, tokens, inside, age_weight):
    score = tl.load(score_ptr + tokens, mask=inside, other=0.0)
    age = tl.load(age_ptr + tokens, mask=inside, other=0)
    return score + age_weight * age.to(tl.float32)


@triton.jit
def _is_best(
    score_ptr,
    age_ptr,
    tokens,
    inside,
    age_weight,
    key,
    rows,
    cols,
    CELL_ROWS: tl.constexpr,
    CELL_COLS: tl.constexpr,
):
    """Which tokens are the first maximum of their tile; tiles at the border are cut short."""
    line = tokens // cols
    x = tokens % cols
    y = line % rows
    best = inside
    for i in range(CELL_ROWS * CELL_COLS):
        dy = i // CELL_COLS - y % CELL_ROWS
        dx = i % CELL_COLS - x % CELL_COLS
        rival = tokens + dy * cols + dx
        exists = inside & (y + dy < rows) & (x + dx < cols)
        rival_key = _order_key(_score(score_ptr, age_ptr, rival, exists, age_weight))
        beaten = (rival_key < key) | ((rival_key == key) & (rival >= tokens))
        best = best & (beaten | (exists == 0))
    return best


@triton.jit
def _threshold(key_ptr, N, k, BLOCK_N: tl.constexpr):
    """The k-th largest key, and how many of the keys equal to it belong to the k largest."""
    lanes = tl.arange(0, BLOCK_N)
    bins = tl.arange(0, DIGITS)
    threshold = tl.full([], 0, tl.uint32)
    known = tl.full([], 0, tl.uint32)
    need = k
    for digit in tl.static_range(4):
        histogram = tl.zeros([DIGITS], tl.int32)
        for start in range(0, N, BLOCK_N):
            tokens = start + lanes
            inside = tokens < N
            key = tl.load(key_ptr + tokens, mask=inside, other=0).to(tl.uint32, bitcast=True)
            value = ((key >> (24 - 8 * digit)) & 255).to(tl.int32)
            candidate = inside & ((key & known) == threshold)
            histogram += tl.histogram(value, DIGITS, mask=candidate)
        larger = tl.sum(histogram, 0) - tl.cumsum(histogram, 0)
        found = (larger < need) & (larger + histogram >= need)
        threshold |= tl.sum(tl.where(found, bins, 0), 0).to(tl.uint32) << (24 - 8 * digit)
        known |= tl.full([], 255, tl.uint32) << (24 - 8 * digit)
        need -= tl.sum(tl.where(found, larger, 0), 0)
    threshold = tl.where(k > 0, threshold, 0xFFFFFFFF)  # k = 0: above every key
    return threshold, need


@triton.jit
def _select_tokens_kernel(
    score_ptr,
    age_ptr,
    offsets_ptr,
    index_ptr,
    inverse_ptr,
    nan_ptr,
    N,
    k,
    rows,
    cols,
    age_weight,
    bonus,
    BONUS: tl.constexpr,
    CELL_ROWS: tl.constexpr,
    CELL_COLS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    score_ptr += row * N
    age_ptr += row * N
    inverse_ptr += row * N
    if offsets_ptr is None:
        index_ptr += row * k
    else:
        first = tl.load(offsets_ptr + row)
        k = (tl.load(offsets_ptr + row + 1) - first).to(tl.int32)
        index_ptr += first

    lanes = tl.arange(0, BLOCK_N)
    factor = tl.full([], 1.0, tl.float32) + bonus
    nan = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, N, BLOCK_N):
        tokens = start + lanes
        inside = tokens < N
        score = _score(score_ptr, age_ptr, tokens, inside, age_weight)
        nan += (inside & (score != score)).to(tl.int32)
        key = _order_key(score)
        if BONUS:
            best = _is_best(
                score_ptr, age_ptr, tokens, inside, age_weight, key, rows, cols,
                CELL_ROWS, CELL_COLS,
            )  # fmt: skip
            key = tl.where(best, _order_key(score * factor), key)
        tl.store(inverse_ptr + tokens, key.to(tl.int32, bitcast=True), mask=inside)
    tl.store(nan_ptr + row, tl.sum(nan, 0))
    tl.debug_barrier()  # the keys were written by other threads than those that read them

    threshold, ties = _threshold(inverse_ptr, N, k, BLOCK_N)
    greater_before = tl.full([], 0, tl.int32)
    equal_before = tl.full([], 0, tl.int32)
    for start in range(0, N, BLOCK_N):
        tokens = start + lanes
        inside = tokens < N
        key = tl.load(inverse_ptr + tokens, mask=inside, other=0).to(tl.uint32, bitcast=True)
        greater = inside & (key > threshold)
        equal = inside & (key == threshold)
        # One scan counts both: the greater in the high half of a word, the equal in the low.
        count = tl.where(greater, HALF_WORD, equal.to(tl.int32))
        before = tl.cumsum(count, 0) - count
        equal_rank = equal_before + before % HALF_WORD
        slot = greater_before + before // HALF_WORD + tl.minimum(equal_rank, ties)
        chosen = greater | (equal & (equal_rank < ties))
        tl.store(index_ptr + slot, tokens.to(tl.int64), mask=chosen)
        tl.store(inverse_ptr + tokens, tl.where(chosen, slot, -1), mask=inside)
        age = tl.load(age_ptr + tokens, mask=inside, other=0)
        tl.store(age_ptr + tokens, tl.where(chosen, 0, age + 1), mask=inside)
        total = tl.sum(count, 0)
        greater_before += total // HALF_WORD
        equal_before += total % HALF_WORD


@functools.lru_cache(maxsize=1024)
def _offsets(k: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each row's part of the index begins.

    Kept, because a copy from the host can be neither hidden nor captured in a CUDA graph.
    """
    return torch.tensor([0, *accumulate(k)], dtype=torch.int64, device=device)


def select_tokens(
    score: Tensor,
    age: Tensor,
    k: Sequence[int],
    age_weight: float,
    grid: Sequence[int],
    cell: int,
    bonus: float,
) -> tuple[Tensor, Tensor, Tensor]:
    R, N = score.shape
    index = torch.empty((sum(k),), dtype=torch.int64, device=score.device)
    inverse = torch.empty((R, N), dtype=torch.int32, device=score.device)
    nan = torch.empty((R,), dtype=torch.int32, device=score.device)
    if R == 0 or N == 0:
        return index, inverse, nan.zero_()
    ragged = len(set(k)) > 1
    _, rows, cols = grid
    launch(
        _select_tokens_kernel,
        R,
        score,
        age,
        _offsets(tuple(k), score.device) if ragged else None,
        index,
        inverse,
        nan,
        N,
        k[0],
        rows,
        cols,
        age_weight,
        bonus,
        BONUS=cell > 1 and bonus != 0.0,
        CELL_ROWS=min(cell, rows),
        CELL_COLS=min(cell, cols),
        enable_fp_fusion=False,
        **configs.select_tokens(N),
    )
    return index, inverse, nan
