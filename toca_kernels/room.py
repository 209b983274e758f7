"""Whether a run's caches fit: said with numbers, before they are allocated.

After the first block of each kind it is known what the caches of all layers will take.  Where a
device has less left, the step is refused instead of running out of memory somewhere in its middle.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .cache import TokenCache, Track
from .config import ToCaConfig
from .plan import MODULES, module_kind

if TYPE_CHECKING:
    from .run import Run

_MEMINFO = Path("/proc/meminfo")


class CacheTooLarge(torch.OutOfMemoryError):
    """A guidance branch's caches are larger than what is free.

    Attributes:
        needed: bytes of the branch's caches, as far as the step has shown them.
        missing: those of them that are not allocated yet.
        free: bytes that the device had left.
    """

    def __init__(self, message: str, needed: int, missing: int, free: int) -> None:
        super().__init__(message)
        self.needed, self.missing, self.free = needed, missing, free


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated on a device; None where nobody tells.

    On a GPU what the driver has free and what torch's allocator holds unused (in pieces, so not all
    of it need serve); on a CPU what Linux says is available without swapping.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + unused)
    if device.type != "cpu" or not _MEMINFO.exists():
        return None
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def require(run: Run, cache: TokenCache, device: torch.device) -> None:
    """Refuse caches that do not fit, as far as their layouts are known.

    Raises:
        CacheTooLarge: it says what is needed, what is free, and what other settings would need.
    """
    tracks = [track for track in cache.tracks.values() if any(track.layouts)]
    missing = sum(track.to_come() for track in tracks)
    free = free_bytes(device) if missing else None
    lacks = free is not None and missing > free
    if run.ranks is not None and run.ranks.any(lacks) and not lacks:
        # The others would wait for a process that gives up: so all of them do.
        raise CacheTooLarge(
            f"caches of one guidance branch: another process has too little memory for its part; "
            f"here {readable(missing)} are still to be allocated",
            missing + cache.nbytes,
            missing,
            free or 0,
        )
    if free is None or not lacks:
        return
    needed = missing + cache.nbytes + sum(track.score_nbytes for track in tracks)
    held = needed - missing
    shown = ", ".join(track.name for track in tracks if track.name in run.layers)
    lines = [
        f"caches of one guidance branch: {readable(needed)} needed for {shown}, "
        f"{readable(missing)} of it still to be allocated; {readable(free)} free on {device}. "
        "It would take"
    ]
    lines += [f"  {readable(size):>10}  with {said}" for said, size in _others(run, tracks)]
    for said, eight in (("", False), ("cache_dtype='int8', ", True)):
        if eight and not _can_be_eight(run.config):
            continue
        layers = _most_layers(tracks, free + held, eight)
        if layers:
            most = max(track.layers for track in tracks)
            size = _total(tracks, eight=eight, layers=layers)
            lines.append(
                f"  {readable(size):>10}  with {said}layers=range({layers}) of {most}: fits"
            )
    if len(lines) == 1:
        lines = [lines[0].removesuffix(" It would take")]
    lines.append("or fewer samples at once. config.memory(model, ...) tells it before a run.")
    raise CacheTooLarge("\n".join(lines), needed, missing, free)


def _others(run: Run, tracks: list[Track]) -> Iterator[tuple[str, int]]:
    """(settings, bytes) of what needs less, one change at a time."""
    config = run.config
    if _can_be_eight(config):
        yield "cache_dtype='int8'", _total(tracks, eight=True)
    if config.forecast:
        yield "forecast=0", _total(tracks, forecast=0)
    kinds = [kind for kind in MODULES if any(_is(track, run, kind) for track in tracks)]
    for kind in kinds if len(kinds) > 1 else ():
        if config.modules is None and run.allows(config.replace(modules=(kind,))):
            some = [track for track in tracks if _is(track, run, kind)]
            # With an attention go its keys, with a cross-attention those of the text.
            if kind != "mlp":
                beside = (track for track in tracks if not track.planned)
                some += [t for t in beside if ("_kept_" in t.name) == (kind == "attn")]
            yield f"modules=({kind!r},)", _total(some)


def _is(track: Track, run: Run, kind: str) -> bool:
    return track.name in run.layers and module_kind(track.name) == kind


def _can_be_eight(config: ToCaConfig) -> bool:
    return config.cache_dtype is None and config.forecast == 0


def _total(
    tracks: list[Track],
    *,
    eight: bool = False,
    forecast: int | None = None,
    layers: int | None = None,
) -> int:
    """Bytes of these tracks' caches and scores under other settings."""
    total = 0
    for track in tracks:
        kept = sum(track.keeps if layers is None else track.keeps[:layers])
        if not kept:
            continue
        total += kept * track.layer_nbytes(track.layout, eight=eight, forecast=forecast)
        total += track.all_scores_nbytes(track.layout, forecast=forecast)
    return total


def _most_layers(tracks: list[Track], room: int, eight: bool) -> int:
    """How many of the first layers' caches would fit; 0 where none do."""
    most = max(track.layers for track in tracks)
    fitting = (n for n in range(most - 1, 0, -1) if _total(tracks, eight=eight, layers=n) <= room)
    return next(fitting, 0)


def readable(nbytes: int) -> str:
    """In MiB, or in GiB from one on."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.2f} MiB"
