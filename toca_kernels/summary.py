"""Summary: what a run did, in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass


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
