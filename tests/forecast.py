"""What the tests of forecast caches share: how a cache is made, copied, read and compared."""

import pytest
import torch

import interpreter
import oracle
import toca_kernels as toca
from eight_bit import DTYPES, every_body, every_dtype, selected
from tolerance import assert_same_bits, exact_values

__all__ = ["DTYPES", "every_body", "every_dtype", "selected"]

# How many slopes, how often all tokens have been computed: every way of reading and of writing.
STAGES = [(1, 0), (1, 1), (1, 2), (1, 7), (2, 0), (2, 1), (2, 2), (2, 3), (2, 9)]
every_stage = pytest.mark.parametrize(
    ("slopes", "computed"), STAGES, ids=[f"{s}-slopes-{c}-computed" for s, c in STAGES]
)


def new_cache(B, N, C, dtype, slopes, computed):
    """A cache after that many full steps; what was not computed by then is NaN."""

    def tokens(known, scale=1.0):
        return (torch.randn(B, N, C) * scale if known else torch.full((B, N, C), torch.nan)).to(
            dtype
        )

    steps = torch.randint(1, 6, (B, N)) + torch.randint(0, 2, (B, N)) / 2
    differences = tuple(tokens(computed > order + 1, 0.3) for order in range(slopes))
    return toca.ForecastCache(tokens(computed > 0), differences, steps.float(), computed)


def clone(cache):
    if isinstance(cache, torch.Tensor):
        return cache.clone()
    return cache._replace(
        values=cache.values.clone(), slopes=tuple(slope.clone() for slope in cache.slopes)
    )


def exact(cache):
    """What the oracles take."""
    if isinstance(cache, torch.Tensor):
        return exact_values(cache)
    values, slopes, distance, computed = cache
    return oracle.Forecast(
        exact_values(values), [*map(exact_values, slopes)], exact_values(distance), computed
    )


def assert_same_cache(have, want):
    if isinstance(want, torch.Tensor):
        assert_same_bits(have, want)
        return
    assert_same_bits(have.values, want.values)
    for slope, wanted in zip(have.slopes, want.slopes, strict=True):
        assert_same_bits(slope, wanted)
    assert_same_bits(have.distance, want.distance)


def call(op, *arguments, backend, **options):
    if backend == "triton":
        return interpreter.call(op, *arguments, **options)
    return getattr(toca, op)(*arguments, backend=backend, **options)
