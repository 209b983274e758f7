"""scatter_residual in Triton's interpreter."""

import pytest
import torch

import interpreter
import oracle
from interpreter import needs_triton
from toca_kernels import scatter_residual
from tolerance import assert_backend_within_budget, assert_same_bits, exact_values

pytestmark = needs_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def update(B, N, C, k, dtype, *, gate="per-sample"):
    """One update; k = None: nothing fresh."""
    given = None
    if gate is not None:
        size = (B, N, 2 * C) if gate == "per-token" else (B, 2 * C)
        given = torch.randn(size).to(dtype)[..., C:]
    cache = torch.randn(B, N, C).to(dtype)
    if k is None:
        return given, cache
    inverse = torch.full((B, N), -1, dtype=torch.int32)
    for b in range(B):
        inverse[b, torch.randperm(N)[:k].sort().values] = torch.arange(k, dtype=torch.int32)
    return given, cache, torch.randn(B, k, C).to(dtype), inverse


def clones(updates):
    return [tuple(None if part is None else part.clone() for part in parts) for parts in updates]


def check(x, updates, *, inplace=False):
    exact, caches = oracle.scatter_residual(
        exact_values(x), [tuple(map(exact_values, parts)) for parts in updates]
    )
    reference = scatter_residual(x, clones(updates), backend="reference")
    before = x.clone()
    result = interpreter.call("scatter_residual", x, updates, inplace=inplace)
    assert_backend_within_budget(result, reference, exact)
    for (_, cache, *_), expected in zip(updates, caches, strict=True):
        assert torch.equal(cache.double(), torch.from_numpy(expected))
    assert_same_bits(x, result if inplace else before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [None, "per-sample", "per-token"])
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_matches_reference(inplace, gate, dtype):
    updates = [update(2, 11, 35, None, dtype, gate=gate), update(2, 11, 35, 4, dtype, gate=gate)]
    check(torch.randn(2, 11, 35).to(dtype), updates, inplace=inplace)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_up_to_four_updates(count, dtype):
    kinds = [(3, "per-sample"), (None, "per-token"), (5, None), (2, "per-token")]
    updates = [update(2, 6, 20, k, dtype, gate=gate) for k, gate in kinds[:count]]
    check(torch.randn(2, 6, 20).to(dtype), updates)


@pytest.mark.parametrize(
    ("B", "N", "C", "k"),
    [
        pytest.param(1, 9, 1152, 2, id="dit-xl-width"),
        pytest.param(1, 5, 129, 2, id="one-channel-beyond-a-tile"),
        pytest.param(2, 9, 1, 4, id="one-channel"),
        pytest.param(2, 7, 16, 7, id="all-fresh"),
        pytest.param(2, 7, 16, 0, id="none-fresh"),
        pytest.param(0, 7, 16, 2, id="no-sample"),
        pytest.param(2, 0, 16, 0, id="no-token"),
        pytest.param(2, 7, 0, 2, id="no-channel"),
    ],
)
def test_shapes(B, N, C, k):
    check(torch.randn(B, N, C), [update(B, N, C, k, torch.float32)])


def test_nan_of_a_replaced_row_is_gone():
    """What a fresh row replaces is not read; what is not selected stays."""
    gate, cache, fresh, inverse = update(1, 4, 8, 2, torch.float32)
    cache[inverse >= 0] = torch.nan
    result = interpreter.call(
        "scatter_residual", torch.zeros(1, 4, 8), [(gate, cache, fresh, inverse)]
    )
    assert not result.isnan().any()
    assert not cache.isnan().any()
