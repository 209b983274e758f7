"""attention_scores in Triton's interpreter."""

import math

import pytest
import torch

import interpreter
from interpreter import needs_triton
from test_attention_scores import DTYPES, laid_out, log_sum_exp, problem
from toca_kernels import attention_scores
from tolerance import assert_backend_within_budget, assert_same_bits

pytestmark = needs_triton

CASES = [
    pytest.param(2, 2, 75, 75, 72, "fused", id="dit-head"),
    pytest.param(1, 2, 65, 130, 64, "contiguous", id="more-keys-than-a-tile"),
    pytest.param(1, 1, 33, 40, 80, "padded", id="head-dim-64-and-16"),
    pytest.param(1, 1, 20, 19, 96, "fused", id="head-dim-64-and-32"),
    pytest.param(1, 2, 37, 65, 128, "fused", id="flux-head"),
    pytest.param(1, 1, 17, 9, 256, "contiguous", id="longest-head"),
    pytest.param(2, 1, 6, 64, 1, "contiguous", id="head-dim-1"),
    pytest.param(2, 1, 13, 19, 17, "padded", id="head-dim-odd"),
    pytest.param(1, 3, 1, 1, 8, "contiguous", id="one-token"),
    pytest.param(2, 1, 7, 11, 8, "broadcast", id="one-key-for-all-samples"),
    pytest.param(0, 2, 5, 5, 8, "contiguous", id="no-sample"),
    pytest.param(2, 2, 0, 5, 8, "contiguous", id="no-query"),
    pytest.param(2, 2, 5, 0, 8, "contiguous", id="no-key"),
    pytest.param(2, 0, 5, 5, 8, "contiguous", id="no-head"),
    pytest.param(1, 2, 5, 5, 0, "contiguous", id="no-channel"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "H", "Nq", "N", "D", "layout"), CASES)
def test_matches_reference(B, H, Nq, N, D, layout, dtype):
    tensors, scale, reference, exact = problem(B, H, Nq, N, D, layout, dtype)
    result = interpreter.call("attention_scores", *tensors, scale=scale)
    assert result.dtype == torch.float32
    assert_backend_within_budget(result, reference, exact)


def test_large_tile():
    """Enough heads for the tile of 128 keys that a full GPU gets."""
    tensors, scale, reference, exact = problem(2, 54, 9, 130, 16, "contiguous", torch.float16)
    result = interpreter.call("attention_scores", *tensors, scale=scale)
    assert_backend_within_budget(result, reference, exact)


@pytest.mark.parametrize("lse", [math.inf, -math.inf, math.nan])
def test_infinite_log_sum_exp(lse):
    q = torch.randn(1, 1, 3, 4)
    result = interpreter.call("attention_scores", q, q, torch.full((1, 1, 3), lse), scale=1.0)
    assert_same_bits(result, torch.full((1, 3), -lse).exp())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_where_it_belongs(dtype):
    q, k = torch.randn(2, 2, 9, 8).to(dtype), torch.randn(2, 2, 40, 8).to(dtype)
    lse = log_sum_exp(q, k, 1.0)
    q[0, 1, 4, 2] = torch.nan
    k[1, 0, 33, 7] = torch.nan
    k[1, 0, 11, 3] = torch.inf
    result = interpreter.call("attention_scores", q, k, lse, scale=1.0)
    reference = attention_scores(q, k, lse, scale=1.0, backend="reference")
    assert result[0].isnan().all()
    assert result[1].isnan().nonzero().flatten().tolist() == [33]
    assert torch.equal(result.isinf(), reference.isinf())


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize("stride", [2, 8, 33])
def test_query_stride_sums_every_sth_query(stride, backend):
    q = laid_out(2, 2, 33, 24, torch.float32, "fused")
    k = laid_out(2, 2, 20, 24, torch.float32, "fused")
    lse = log_sum_exp(q, k, 0.2)
    if backend == "triton":
        result = interpreter.call("attention_scores", q, k, lse, scale=0.2, query_stride=stride)
    else:
        result = attention_scores(q, k, lse, scale=0.2, query_stride=stride, backend=backend)
    kept = torch.arange(0, 33, stride)
    parts = q[:, :, kept], k, lse[:, :, kept]
    expected = stride * attention_scores(*parts, scale=0.2, backend="reference")
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=0)


def test_same_bits_in_every_run():
    tensors, scale, *_ = problem(2, 2, 75, 75, 72, "fused", torch.float16)
    first = interpreter.call("attention_scores", *tensors, scale=scale)
    assert_same_bits(interpreter.call("attention_scores", *tensors, scale=scale), first)


def test_refuses_a_head_that_is_too_long():
    q = torch.randn(1, 1, 3, 257)
    with pytest.raises(ValueError, match=r"head dim: expected <= 256 .* got 257"):
        interpreter.call("attention_scores", q, q, torch.zeros(1, 1, 3), scale=1.0)
