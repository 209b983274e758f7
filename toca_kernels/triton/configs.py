"""Tile sizes of every kernel, and where the Triton GEMM takes over: static, no autotuning.

Tables are chosen by architecture, channels and rows, so a call never measures anything and the same
shapes always run the same code, also under a CUDA graph.  No table was measured on a GPU yet: tiles
are the largest that neither spill nor exceed shared memory on sm_80 and sm_90 (apps/aot.py checks
each of them), the choice between GEMMs is the roofline model's (docs/gpu.md).
"""

from __future__ import annotations

from typing import NamedTuple

# Streaming multiprocessors: A100 and A800; H100 SXM and H200.
_MULTIPROCESSORS = {80: 108, 90: 132}


def _generation(arch: int) -> int:
    return 90 if arch >= 90 else 80


def _power_of_two(value: int, least: int, most: int) -> int:
    """The smallest power of two >= value, within [least, most]."""
    return min(most, max(least, 1 << max(value - 1, 0).bit_length()))


# --- memory-bound kernels ------------------------------------------------------------------------


def gather_modulate(C: int) -> dict[str, int]:
    """One program normalises one row; a thread holds 8 of its channels, 16 bytes of bfloat16."""
    block = _power_of_two(C, 32, 1 << 20)
    return {"BLOCK_C": block, "num_warps": _power_of_two(block // 256, 1, 16)}


def scatter_residual(tokens: int) -> dict[str, int]:
    """128 channels are full 32-byte sectors in any dtype and divide 1152 and 3072."""
    rows = 16 if tokens >= 8192 else 8
    return {"BLOCK_N": rows, "BLOCK_C": 128, "num_warps": 4}


def select_tokens(N: int) -> dict[str, int]:
    """A row is read in chunks of BLOCK_N tokens."""
    block = _power_of_two(N, 32, 4096)
    return {"BLOCK_N": block, "num_warps": _power_of_two(block // 256, 1, 16)}


# --- attention -----------------------------------------------------------------------------------


class AttentionTile(NamedTuple):
    """Tile of the logits: the stationary rows stay, the streamed ones pass by."""

    stationary: int
    streamed: int
    warps: int
    stages: int


# (head dimensions up to .., AttentionTiles in the order of their stationary rows)
_Table = tuple[tuple[int, tuple[tuple[int, int, int, int], ...]], ...]
_ATTENTION_SCORES: _Table = (
    (128, ((64, 64, 4, 3), (128, 64, 8, 3))),
    (256, ((64, 32, 4, 2), (64, 64, 4, 2))),
)
_ATTENTION_ENTROPY: _Table = (
    (96, ((16, 64, 4, 3), (64, 64, 4, 3))),
    (128, ((16, 64, 4, 3), (64, 64, 8, 3))),
    (256, ((16, 32, 8, 2), (64, 32, 8, 3))),
)
# By generation.  On sm_80 the logits of 64 keys beside the output take up to 255 registers, the
# most there are; 32 keys take 128 to 220, for about 15 % more instructions to a logit.  On sm_90 a
# product of 64 columns is the better instruction, and its operands need no registers.
_PARTIAL_ATTENTION: dict[int, _Table] = {
    80: (
        (80, ((16, 64, 4, 3), (64, 32, 4, 3), (128, 32, 8, 3))),
        (96, ((16, 64, 4, 3), (64, 32, 4, 2), (128, 32, 8, 3))),
        (128, ((16, 64, 4, 3), (64, 32, 4, 3), (128, 32, 8, 3))),
        (256, ((16, 32, 4, 2), (64, 32, 8, 2))),
    ),
    90: (
        (96, ((16, 64, 4, 3), (64, 32, 4, 3), (128, 64, 8, 3))),
        (128, ((16, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3))),
        (256, ((16, 32, 4, 2), (64, 32, 8, 2))),
    ),
}
_SCORED_ATTENTION: dict[int, _Table] = {
    80: ((128, ((64, 32, 4, 3), (128, 32, 8, 3))), (256, ((64, 32, 8, 2),))),
    90: ((128, ((64, 64, 4, 3), (128, 64, 8, 3))), (256, ((64, 32, 8, 2),))),
}
# float32 products run on the ordinary units, from registers: only small tiles do not spill.
_FLOAT32: _Table = ((96, ((16, 32, 4, 2),)), (256, ((16, 32, 8, 2),)))


def attention_scores(arch: int, D: int, itemsize: int, keys: int, heads: int) -> dict[str, int]:
    tile = _filling(_tiles(_ATTENTION_SCORES, D, itemsize), arch, keys, heads)
    return _named(tile, "BLOCK_K", "BLOCK_Q")


def attention_entropy(
    arch: int, D: int, itemsize: int, queries: int, samples: int
) -> dict[str, int]:
    tile = _filling(_tiles(_ATTENTION_ENTROPY, D, itemsize), arch, queries, samples)
    return _named(tile, "BLOCK_Q", "BLOCK_K")


def partial_attention(arch: int, D: int, itemsize: int, queries: int) -> dict[str, int]:
    """Keys are read once a tile of queries, so one tile holds them all if it can."""
    tiles = _tiles(_PARTIAL_ATTENTION[_generation(arch)], D, itemsize)
    tile = next((tile for tile in tiles if tile.stationary >= queries), tiles[-1])
    return _named(tile, "BLOCK_Q", "BLOCK_K")


def scored_attention(arch: int, D: int, itemsize: int, queries: int, heads: int) -> dict[str, int]:
    tile = _filling(_tiles(_SCORED_ATTENTION[_generation(arch)], D, itemsize), arch, queries, heads)
    return _named(tile, "BLOCK_Q", "BLOCK_K")


def _tiles(table: _Table, D: int, itemsize: int) -> tuple[AttentionTile, ...]:
    tiles = next(tiles for most, tiles in (_FLOAT32 if itemsize == 4 else table) if most >= D)
    return tuple(AttentionTile(*tile) for tile in tiles)


def _filling(
    tiles: tuple[AttentionTile, ...], arch: int, rows: int, problems: int
) -> AttentionTile:
    """The largest tile with which `problems` times `rows` rows occupy every multiprocessor."""
    least = _MULTIPROCESSORS[_generation(arch)]
    enough = [tile for tile in tiles if -(-rows // tile.stationary) * problems >= least]
    return enough[-1] if enough else tiles[0]


def _named(tile: AttentionTile, stationary: str, streamed: str) -> dict[str, int]:
    return {
        stationary: tile.stationary,
        streamed: tile.streamed,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


_LEAST_KEY_TILES = 4  # of one split: below, starting and combining it costs more than it gains
COMBINED_QUERIES = 16  # of one program that combines splits


def key_splits(arch: int, programs: int, keys: int, block: int) -> tuple[int, int]:
    """(splits, keys of each): enough for every multiprocessor to have a program."""
    wanted = _MULTIPROCESSORS[_generation(arch)] // programs
    return _split(keys, block, max(1, min(wanted, keys // (_LEAST_KEY_TILES * block))))


def _split(length: int, block: int, parts: int) -> tuple[int, int]:
    """(parts, length of each): whole blocks, and no part empty."""
    each = -(-length // (parts * block)) * block
    return -(-length // each), each


# --- the GEMMs of few rows -----------------------------------------------------------------------


class LinearTile(NamedTuple):
    """Tile of a product; the sum is cut into `splits` parts of `terms_per_split`."""

    rows: int
    columns: int
    terms: int
    warps: int
    stages: int
    splits: int = 1
    terms_per_split: int = 0


# Rows up to ..: one tile holds them all, so that every weight is read once.
_LINEAR = (
    (16, LinearTile(16, 64, 64, 4, 4)),
    (32, LinearTile(32, 64, 64, 4, 4)),
    (64, LinearTile(64, 64, 64, 4, 4)),
    (128, LinearTile(128, 64, 64, 8, 4)),
)

# Rows up to which the Triton GEMMs run, by generation, for C < 2048 and for wider layers.  Not
# measured yet, from the roofline model: below 137 rows on an A100 and 151 on an H200 a 16-bit GEMM
# is limited by reading its weights; wide layers fill the GPU with the library's own tiles.
_TRITON_ROWS = {80: (128, 64), 90: (128, 64)}
_WIDE = 2048
_MOST_SPLITS = 8
_LEAST_TERM_TILES = 8  # of one split


def mlp_rows(
    arch: int, itemsize: int, rows: int, C: int, F: int
) -> tuple[LinearTile, LinearTile] | None:
    """The tiles of both GEMMs, or None where the library's are expected to be faster."""
    narrow, wide = _TRITON_ROWS[_generation(arch)]
    if itemsize == 4 or rows > (narrow if C < _WIDE else wide):
        return None
    tile = next(tile for most, tile in _LINEAR if most >= rows)
    programs = -(-C // tile.columns)
    wanted = -(-_MULTIPROCESSORS[_generation(arch)] // programs)
    most = max(1, min(_MOST_SPLITS, F // (_LEAST_TERM_TILES * tile.terms)))
    splits, terms = _split(F, tile.terms, min(wanted, most))
    return (
        tile._replace(terms_per_split=_split(C, tile.terms, 1)[1]),
        tile._replace(splits=splits, terms_per_split=terms),
    )


def add_splits() -> dict[str, int]:
    return {"BLOCK_N": 512, "num_warps": 2}
