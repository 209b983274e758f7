"""Summary: what a run did, in numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .done import Done
from .plan import module_kind

if TYPE_CHECKING:
    from .run import Run
    from .session import Session


@dataclass(frozen=True)
class Summary:
    """What the last run did, counted while it ran; since the last change of labels, batch or image
    size, where they changed in the middle of it.

    Attributes:
        steps: steps run; full_steps of them in full in every layer, cached_steps in some layer
            from the cache.
        tokens_recomputed, tokens_total: tokens that went through an MLP, summed over steps, layers
            and samples, and how many would have without ToCa.
        flops_full, flops_done, flops_ratio: by the convention of the paper's code (flops.py).
        seconds: in the model's forward.
        speedup_estimate: (mean seconds of a full step) * steps / seconds.  Full steps carry the
            scores, so measure the untouched model for the true figure.
        cache_bytes: cached features; modulation_bytes: table of gates, shifts and scales;
            packed_bytes: second copies of MLP weights; other_bytes: scores, ages, selections.
        host_bytes: pinned host memory that the cached features lie in (cache_device="cpu"), 0 where
            they are on the device; working_bytes: buffers on the device that they are brought to.
        cache_error: relative error (root mean square) of what 8-bit caches hold, sampled in the
            first layer of each module; 0 without them.
        nan_scores: scores that were NaN: the model's output is not to be trusted.
        graphs, graph_bytes: recorded steps, and the memory of their pool (cuda_graph=True).
        graph_fallback: why steps are not replayed although they should be; empty if they are.

    Where processes share the tokens, tokens and FLOPs are those of all of them together; seconds,
    bytes, errors and NaN are this one's.
    """

    steps: int
    full_steps: int
    cached_steps: int
    tokens_recomputed: int
    tokens_total: int
    flops_full: int
    flops_done: int
    flops_ratio: float
    seconds: float
    speedup_estimate: float
    cache_bytes: int
    modulation_bytes: int
    packed_bytes: int
    other_bytes: int
    nan_scores: int
    cache_error: float = 0.0
    graphs: int = 0
    graph_bytes: int = 0
    graph_fallback: str = ""
    host_bytes: int = 0
    working_bytes: int = 0

    def __str__(self) -> str:
        mib = 1 / 2**20
        share = self.tokens_recomputed / max(self.tokens_total, 1)
        efficiency = self.speedup_estimate / self.flops_ratio
        lines = [
            f"steps       {self.steps} ({self.full_steps} full, {self.cached_steps} cached)",
            f"tokens      {self.tokens_recomputed:,} of {self.tokens_total:,} recomputed "
            f"({share:.1%})",
            f"FLOPs       {self.flops_done * 1e-12:.4g} of {self.flops_full * 1e-12:.4g} TFLOPs, "
            f"{self.flops_ratio:.2f}x less",
            f"seconds     {self.seconds:.2f}, about {self.speedup_estimate:.2f}x faster than full "
            f"steps only: {efficiency:.0%} of the FLOPs ratio",
            f"memory      {self.cache_bytes * mib:.1f} MiB caches, "
            f"{self.modulation_bytes * mib:.1f} MiB modulation, "
            f"{self.packed_bytes * mib:.1f} MiB packed weights, "
            f"{self.other_bytes * mib:.2f} MiB other",
        ]
        if self.host_bytes:
            lines.append(
                f"offload     caches lie in {self.host_bytes * mib:.1f} MiB of pinned host memory, "
                f"{self.working_bytes * mib:.1f} MiB of working buffers"
            )
        if self.cache_error:
            lines.append(f"8 bits      cached outputs are {self.cache_error:.2%} off, rounded")
        if self.graphs:
            lines.append(
                f"graphs      {self.graphs} recorded, {self.graph_bytes * mib:.1f} MiB pool"
            )
        if self.graph_fallback:
            lines.append(f"no graphs   {self.graph_fallback}")
        if self.nan_scores:
            lines.append(f"WARNING     {self.nan_scores} scores were NaN")
        return "\n".join(lines)


def summarize(taken: Sequence[tuple[Session, Run]]) -> Summary:
    """What these runs did, one after the other.

    Raises:
        RuntimeError: no step has been run yet.
    """
    runs = [
        (session, [b for b in run.branches.values() if b.done.seconds]) for session, run in taken
    ]
    runs = [(session, branches) for session, branches in runs if branches]
    if not runs:
        raise RuntimeError("summary: no step has been run yet")
    branches = [branch for _, some in runs for branch in some]
    done = [branch.done for branch in branches]
    counts = [session._flops(branch.done) for session, some in runs for branch in some]
    graphs = [session._graphs for session, _ in runs if session._graphs is not None]
    seconds = sum(sum(d.seconds) for d in done)
    # Branches run side by side, models one after the other.
    steps = sum(max(len(b.done.seconds) for b in some) for _, some in runs)
    full_steps = sum(max(sum(b.done.full_steps()) for b in some) for _, some in runs)
    flops_full, flops_done = sum(c.full for c in counts), sum(c.done for c in counts)
    return Summary(
        steps=steps,
        full_steps=full_steps,
        cached_steps=steps - full_steps,
        tokens_recomputed=sum(_mlp_tokens(d, d.plan().k) for d in done),
        tokens_total=sum(_mlp_tokens(d, d.every()) for d in done),
        flops_full=flops_full,
        flops_done=flops_done,
        flops_ratio=flops_full / flops_done,
        seconds=seconds,
        speedup_estimate=_speedup(done, seconds),
        cache_bytes=sum(d.cache_bytes for d in done),
        modulation_bytes=sum(d.table_bytes for d in done),
        packed_bytes=sum(block.packed_nbytes for session, _ in runs for block in session._blocks),
        other_bytes=sum(d.other_bytes for d in done),
        nan_scores=sum(branch.nan_scores for branch in branches),
        cache_error=max(branch.cache_error for branch in branches),
        graphs=sum(map(len, graphs)),
        graph_bytes=sum(one.nbytes for one in graphs),
        graph_fallback="; ".join(one.fallback for one in graphs if one.fallback),
        host_bytes=sum(d.host_bytes for d in done),
        working_bytes=sum(run.loan.most for _, run in taken if run.loan is not None),
    )


def _mlp_tokens(done: Done, k: Mapping[str, Any]) -> int:
    """Tokens in the MLPs, of all samples, layers and steps."""
    return sum(done.batch[name] * int(k[name].sum()) for name in k if module_kind(name) == "mlp")


def _speedup(done: Sequence[Done], seconds: float) -> float:
    full = [s for d in done for s, f in zip(d.seconds, d.full_steps(), strict=True) if f]
    steps = sum(len(d.seconds) for d in done)
    return float(np.mean(full)) * steps / seconds if full and seconds > 0 else 1.0
