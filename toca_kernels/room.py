"""Whether a run's caches fit: said with numbers, before they are allocated.

After the first block of each kind it is known what the caches of all layers will take.  Where a
device, or the host that they lie on, has less left, the step is refused instead of running out of
memory somewhere in its middle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from .cache import TokenCache
from .config import ToCaConfig
from .copies import aligned, meta_slabs
from .plan import MODULES, module_kind
from .track import Track

if TYPE_CHECKING:
    from .run import Run

_MEMINFO = Path("/proc/meminfo")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


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
    of it need serve); on a CPU what Linux says is available without swapping, or what the process's
    control groups (a container's, a batch job's) still allow, where that is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + unused)
    if device.type != "cpu" or not _MEMINFO.exists():
        return None
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, *_allowed())
    return None


def free_on_host() -> int | None:
    """What can still be pinned: what is free, and what torch holds pinned and unused."""
    free = free_bytes(torch.device("cpu"))
    if free is None or not torch.cuda.is_initialized():
        return free
    stats = torch.cuda.host_memory_stats()
    pinned, used = (stats.get(f"{kind}_bytes.current", 0) for kind in ("allocated", "active"))
    return free + int(pinned - used)


def _allowed() -> list[int]:
    """What each control group above the process still allows; infinity stands for no limit."""
    allowed = [2**63]
    if not _OWN_CGROUPS.exists():
        return allowed
    for line in _OWN_CGROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            top, names = _CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = _CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = top / path.lstrip("/")  # not there where a container sees its own group as the top
        for folder in (own, *(above for above in own.parents if above.is_relative_to(top))):
            allowed += _allowed_by(folder, *names)
    return allowed


def _allowed_by(folder: Path, limit: str, usage: str, inactive: str) -> list[int]:
    """A group's limit less its usage; pages of files that nobody has read lately count as free."""
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return [] if most == "max" else [max(0, int(most) - used + int(stat.get(inactive, 0)))]
    except (OSError, ValueError):  # no such group, or none that has limits
        return []


def require(run: Run, cache: TokenCache, device: torch.device) -> None:
    """Refuse caches that do not fit, as far as their layouts are known.

    Raises:
        CacheTooLarge: it says what is needed, what is free, and what other settings would need.
    """
    refused = None
    try:
        _require_here(run, cache, device)
    except CacheTooLarge as error:
        refused = error
    # Others would wait for a process that gives up: so all of them do.
    everywhere = refused is not None if run.ranks is None else run.ranks.any(refused is not None)
    if refused is not None:
        raise refused
    if everywhere:
        missing = sum(track.to_come() for track in cache.tracks.values() if any(track.layouts))
        raise CacheTooLarge(
            "caches of one guidance branch: another process has too little memory for its part; "
            f"here {readable(missing)} are still to be allocated",
            missing + cache.nbytes,
            missing,
            free_bytes(device) or 0,
        )


def _require_here(run: Run, cache: TokenCache, device: torch.device) -> None:
    tracks = [track for track in cache.tracks.values() if any(track.layouts)]
    if cache.home is not None:
        _require_apart(run, cache, tracks, device)
        return
    missing = sum(track.to_come() for track in tracks)
    free = free_bytes(device) if missing else None
    if free is not None and missing > free:
        held = cache.nbytes + sum(track.score_nbytes for track in tracks)
        _refuse(run, tracks, held, missing, free, device)


def _require_apart(run: Run, cache: TokenCache, tracks: list[Track], device: torch.device) -> None:
    """The same of caches that lie in host memory: room for them there, for two blocks' here."""
    if run.loan is None or not tracks:  # an estimate, or nothing known yet
        return
    buffers = working_nbytes(run, tracks)
    missing = sum(track.scores_to_come() for track in tracks)
    missing += max(0, buffers - run.loan.nbytes)
    free = free_bytes(device) if missing else None
    if free is not None and missing > free:
        needed = buffers + sum(t.all_scores_nbytes(t.layout) for t in tracks)
        raise CacheTooLarge(
            f"working buffers for the caches of two blocks, and scores: {readable(needed)} needed, "
            f"{readable(missing)} of it still to be allocated; {readable(free)} free on {device}. "
            "Cache less (modules, cache_dtype), or fewer samples at once.",
            needed,
            missing,
            free,
        )
    to_come = meta_slabs()
    for track in tracks:
        for layout in track.layers_to_come():
            for part in track.parts(layout):
                to_come.empty(*part)
    free = free_on_host() if to_come.nbytes else None
    if free is not None and to_come.nbytes > free:
        _refuse(run, tracks, cache.nbytes, to_come.nbytes, free, "the host")


def working_nbytes(run: Run, tracks: Sequence[Track]) -> int:
    """Bytes on the device that serve caches in host memory: those of two blocks."""
    named = {track.name: track for track in tracks}
    most = 0
    for block in run.blocks:
        kept = [(named[name], layer) for name, layer in block.layers.items() if name in named]
        parts = [
            part
            for track, layer in kept
            if track.keeps[layer]
            for part in track.parts(track.layouts[layer] or track.layout)
        ]
        most = max(most, sum(aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in parts))
    return 2 * most


def _refuse(
    run: Run, tracks: list[Track], held: int, missing: int, free: int, where: torch.device | str
) -> NoReturn:
    needed = held + missing
    shown = ", ".join(track.name for track in tracks if track.name in run.layers)
    lines = [
        f"caches of one guidance branch: {readable(needed)} needed for {shown}, "
        f"{readable(missing)} of it still to be allocated; {readable(free)} free on {where}. "
        "It would take"
    ]
    lines += [f"  {readable(size):>10}  with {said}" for said, size in _others(run, tracks)]
    if isinstance(where, torch.device) and where.type == "cuda" and run.graphs is None:
        here = working_nbytes(run, tracks)
        here += sum(track.all_scores_nbytes(track.layout) for track in tracks)
        lines.append(f"  {readable(here):>10}  with cache_device='cpu', the caches in host memory")
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
