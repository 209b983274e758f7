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
from typing import NamedTuple

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
def _write_keys(
    score_ptr,
    age_ptr,
    key_ptr,
    N,
    rows,
    cols,
    age_weight,
    bonus,
    BONUS: tl.constexpr,
    CELL_ROWS: tl.constexpr,
    CELL_COLS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The order keys of a row to `key_ptr`; how many of its scores are NaN."""
    factor = tl.full([], 1.0, tl.float32) + bonus
    nan = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, N, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
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
        tl.store(key_ptr + tokens, key.to(tl.int32, bitcast=True), mask=inside)
    return tl.sum(nan, 0)


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
def _compact(index_ptr, inverse_ptr, age_ptr, N, threshold, ties, BLOCK_N: tl.constexpr):
    """Index, inverse and ages of a row from its keys, which lie where the inverse goes.

    Selected are the keys above the threshold and the first `ties` of those equal to it.
    """
    greater_before = tl.full([], 0, tl.int32)
    equal_before = tl.full([], 0, tl.int32)
    for start in range(0, N, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
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

    nan = _write_keys(
        score_ptr, age_ptr, inverse_ptr, N, rows, cols, age_weight, bonus,
        BONUS, CELL_ROWS, CELL_COLS, BLOCK_N,
    )  # fmt: skip
    tl.store(nan_ptr + row, nan)
    tl.debug_barrier()  # the keys were written by other threads than those that read them
    threshold, ties = _threshold(inverse_ptr, N, k, BLOCK_N)
    _compact(index_ptr, inverse_ptr, age_ptr, N, threshold, ties, BLOCK_N)


class _Kept(NamedTuple):
    """Offsets on a GPU: the stream that copied them there, and the event behind the copy."""

    offsets: Tensor
    stream: int
    copied: torch.cuda.Event


_kept: dict[tuple[tuple[int, ...], torch.device], _Kept] = {}


@functools.cache
def _host_offsets(k: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(k)], dtype=torch.int64)


def _offsets(k: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each row's part of the index begins.

    The host never waits: a new k is copied from pinned memory, in the order of the stream, and
    kept.  Under the capture of a CUDA graph what is kept is there already, since torch.cuda.graph
    begins with a synchronisation; a new k becomes a copy from the host that the graph repeats.
    Nothing is dropped, because a graph reads it for as long as it lives: 8 bytes a row, for as
    many k as plans have.
    """
    if device.type != "cuda":
        return _host_offsets(k).to(device)
    kept = _kept.get((k, device))
    if torch.cuda.is_current_stream_capturing():
        return kept.offsets if kept else _host_offsets(k).to(device, non_blocking=True)
    stream = torch.cuda.current_stream(device)
    if kept is None:
        offsets = _host_offsets(k).pin_memory().to(device, non_blocking=True)
        kept = _kept[k, device] = _Kept(offsets, stream.cuda_stream, stream.record_event())
    elif kept.stream != stream.cuda_stream:
        stream.wait_event(kept.copied)
    return kept.offsets


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
