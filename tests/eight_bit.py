"""What the tests of 8-bit caches share: how a cache is made, copied, read and compared."""

import pytest
import torch

import interpreter
import toca_kernels as toca
from interpreter import needs_triton
from tolerance import assert_same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_body = pytest.mark.parametrize(
    "body", ["reference", "native", pytest.param("triton", marks=needs_triton)]
)
every_kind = pytest.mark.parametrize("kind", [INT8, FLOAT8], ids=str)


def new_cache(B, N, C, kind):
    """A cache whose bytes say that nobody wrote them."""
    return toca.QuantizedCache(torch.full((B, N, C), 55).to(kind), torch.full((B, N), 5.0))


def written(rows, kind, backend="reference"):
    cache = new_cache(*rows.shape, kind)
    if backend == "triton":
        interpreter.call("store_rows", cache, rows)
    else:
        toca.store_rows(cache, rows, backend=backend)
    return cache


def clone(cache):
    if isinstance(cache, torch.Tensor):
        return cache.clone()
    return toca.QuantizedCache(cache.values.clone(), cache.scale.clone())


def read(cache):
    """The rows in float64: exact, 8 bits times 24."""
    if isinstance(cache, torch.Tensor):
        return cache.double()
    return cache.values.float().double() * cache.scale.double()[:, :, None]


def assert_same_cache(have, want):
    if isinstance(want, torch.Tensor):
        assert_same_bits(have, want)
        return
    assert have.values.dtype == want.values.dtype
    assert torch.equal(have.values.view(torch.int8), want.values.view(torch.int8))
    assert_same_bits(have.scale, want.scale)


def selected(B, N, k):
    age = torch.zeros(B, N, dtype=torch.int32)
    return toca.select_tokens(torch.rand(B, N), age, k, backend="reference").rows(0, B)
