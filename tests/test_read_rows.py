"""read_rows: what a cache of each kind stands for."""

import re

import numpy as np
import pytest
import torch

import oracle
import toca_kernels as toca
from eight_bit import FLOAT8, INT8, every_dtype, selected, written
from eight_bit import read as read_in_8_bits
from forecast import call, exact, new_cache
from interpreter import needs_triton
from tolerance import (
    assert_backend_within_budget,
    assert_reference_within_bound,
    assert_same_bits,
)

KINDS = {"int8": INT8, "float8": FLOAT8}
EVERY_KIND = ["plain", *KINDS, "1@0", "1@1", "1@2", "2@2", "2@3"]
CASES = [
    pytest.param(2, 13, 37, 5, id="odd"),
    pytest.param(2, 13, 37, None, id="every-token"),
    pytest.param(1, 16, 1152, 3, id="dit-xl"),
    pytest.param(1, 5, 1, 2, id="one-channel"),
    pytest.param(2, 13, 40, 0, id="none-selected"),
    pytest.param(0, 13, 40, 5, id="no-sample"),
    pytest.param(2, 0, 40, None, id="no-token"),
    pytest.param(2, 9, 0, 3, id="no-channel"),
]


def problem(B, N, C, k, kind, dtype):
    """(cache, index, options, Exact)"""
    index = None if k is None else selected(B, N, k)[0]
    options = {}
    if kind == "plain":
        cache = torch.randn(B, N, C).to(dtype)
        given = exact(cache)
    elif kind in KINDS:
        cache = written(torch.randn(B, N, C).to(dtype), KINDS[kind])
        given, options = read_in_8_bits(cache).numpy(), {"dtype": dtype}
    else:
        cache = new_cache(B, N, C, dtype, *map(int, kind.split("@")))
        given = exact(cache)
    places = np.tile(np.arange(N), (B, 1)) if index is None else index.numpy()
    value, magnitude = (np.zeros((*places.shape, C)) for _ in range(2))
    for b, j in np.ndindex(*places.shape):
        value[b, j], magnitude[b, j] = oracle.read(given, b, places[b, j])
    return cache, index, options, oracle.Exact(value, magnitude, oracle.FORECAST_ROUNDINGS)


@every_dtype
@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize(("B", "N", "C", "k"), CASES)
def test_reference_matches_oracle(B, N, C, k, kind, dtype):
    cache, index, options, wanted = problem(B, N, C, k, kind, dtype)
    result = toca.read_rows(cache, index, **options, backend="reference")
    assert result.dtype == dtype
    assert_reference_within_bound(result, wanted)


@every_dtype
@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize(("B", "N", "C", "k"), CASES)
def test_native_matches_reference(B, N, C, k, kind, dtype, isa):
    cache, index, options, wanted = problem(B, N, C, k, kind, dtype)
    reference = toca.read_rows(cache, index, **options, backend="reference")
    result = toca.read_rows(cache, index, **options, backend="native")
    assert result.dtype == dtype
    assert_backend_within_budget(result, reference, wanted)
    if "@" not in kind or kind.endswith("@1"):  # nothing is added up
        assert_same_bits(result, reference)


@needs_triton
@every_dtype
@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize(("B", "N", "C", "k"), CASES)
def test_triton_matches_reference(B, N, C, k, kind, dtype):
    cache, index, options, wanted = problem(B, N, C, k, kind, dtype)
    reference = toca.read_rows(cache, index, **options, backend="reference")
    result = call("read_rows", cache, index, **options, backend="triton")
    assert result.dtype == dtype
    assert_backend_within_budget(result, reference, wanted)


@pytest.mark.parametrize("kind", ["plain", "1@1", "2@3"])
def test_rows_are_new(kind, backend):
    """Writing to them leaves the cache as it is."""
    cache, *_ = problem(1, 3, 8, None, kind, torch.float32)
    values = cache if kind == "plain" else cache.values
    before = values.clone()
    call("read_rows", cache, backend=backend).zero_()
    assert_same_bits(values, before)


def test_scatter_residual_adds_what_is_read(backend):
    for kind in ("1@2", "2@3"):
        cache, *_ = problem(2, 9, 37, None, kind, torch.bfloat16)
        zero = torch.zeros(2, 9, 37, dtype=torch.bfloat16)
        added = toca.scatter_residual(zero, [(None, cache)], backend=backend)
        assert_same_bits(toca.read_rows(cache, backend=backend), added)


@pytest.mark.parametrize("bad", [-1, 13, 2**40])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_refuses_an_index_out_of_range(kind, bad, backend):
    cache, index, options, _ = problem(2, 13, 8, 3, kind, torch.float32)
    index[1, 2] = bad
    with pytest.raises(ValueError, match=rf"index: expected values in \[0, 13\), got .*{bad}"):
        toca.read_rows(cache, index, **options, backend=backend)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param({"cache": None}, "cache: expected a tensor, got NoneType", id="no-cache"),
        pytest.param(
            {"cache": torch.randn(13, 8)}, "cache: expected shape (B, N, C), got (13, 8)", id="rank"
        ),
        pytest.param(
            {"cache": torch.zeros(2, 13, 8, dtype=INT8)},
            "cache: expected dtype float32 or bfloat16 or float16, got int8",
            id="bare-8-bit",
        ),
        pytest.param(
            {"dtype": torch.bfloat16}, "dtype: expected float32, got bfloat16", id="other-dtype"
        ),
        pytest.param(
            {"cache": written(torch.randn(2, 13, 8), INT8)},
            "dtype: expected float32 or bfloat16 or float16, got None",
            id="8-bit-without-dtype",
        ),
        pytest.param(
            {"cache": written(torch.randn(2, 13, 8), INT8), "dtype": INT8},
            "dtype: expected float32 or bfloat16 or float16, got int8",
            id="8-bit-as-8-bit",
        ),
        pytest.param(
            {"cache": new_cache(2, 13, 8, torch.float64, 1, 2)},
            "cache values: expected dtype float32 or bfloat16 or float16, got float64",
            id="dtype-of-values",
        ),
        pytest.param(
            {"cache": new_cache(2, 13, 8, torch.float32, 1, 2)._replace(distance=None)},
            "cache distance: expected a tensor, got NoneType",
            id="no-distance",
        ),
        pytest.param(
            {"index": torch.zeros(3, 4, dtype=torch.int64)},
            "index: expected shape (2, k), got (3, 4)",
            id="shape-of-index",
        ),
        pytest.param(
            {"index": torch.zeros(2, 4, dtype=torch.int32)},
            "index: expected dtype int64, got int32",
            id="dtype-of-index",
        ),
    ],
)
def test_refuses(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        toca.read_rows(**{"cache": torch.randn(2, 13, 8)} | given)


@pytest.mark.parametrize("kind", ["plain", *KINDS, "1@2", "2@3"])
def test_opcheck(kind, backend):
    cache, index, _, _ = problem(2, 9, 8, 3, kind, torch.float32)
    scale, slopes, distance = None, (), None
    values = cache
    if kind in KINDS:
        values, scale = cache.values, cache.scale
    elif "@" in kind:
        values, slopes, distance, _ = cache
    given = values, index, scale, slopes, distance, torch.float32, backend
    # test_schema compares what a call was given before and after, which torch cannot do for float8.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.toca.read_rows.default,
        given,
        test_utils=checks if kind == "float8" else ("test_schema", *checks),
    )
