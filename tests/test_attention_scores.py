"""attention_scores: column means of softmax(q k^T), exact, from the log-sum-exp of each query."""

import functools
import math
import re

import pytest
import torch

import oracle
from toca_kernels import attention_scores
from tolerance import (
    assert_backend_within_budget,
    assert_reference_within_bound,
    assert_same_bits,
    exact_values,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

CASES = [
    pytest.param(2, 3, 256, 256, 72, "fused", id="dit-xl-cut-in-heads"),
    pytest.param(2, 2, 37, 41, 64, "contiguous", id="odd-n"),
    pytest.param(1, 2, 65, 65, 128, "padded", id="flux-head"),
    pytest.param(2, 3, 6, 64, 1, "contiguous", id="head-dim-1"),
    pytest.param(3, 1, 13, 19, 17, "padded", id="head-dim-odd"),
    pytest.param(2, 2, 1, 1, 8, "contiguous", id="one-token"),
    pytest.param(1, 1, 5, 3, 8, "fused", id="fewer-keys-than-lanes"),
    pytest.param(1, 2, 7, 130, 8, "broadcast", id="one-key-for-all-samples"),
    pytest.param(0, 2, 5, 5, 8, "contiguous", id="no-sample"),
    pytest.param(2, 2, 0, 5, 8, "contiguous", id="no-query"),
    pytest.param(2, 2, 5, 0, 8, "contiguous", id="no-key"),
    pytest.param(2, 0, 5, 5, 8, "contiguous", id="no-head"),
    pytest.param(2, 2, 5, 5, 0, "contiguous", id="no-channel"),
]


def laid_out(B, H, N, D, dtype, layout):
    """(B, H, N, D) values in one of the layouts that models hand over."""
    values = torch.randn(B, H, N, D).to(dtype)
    if layout == "fused":  # a third of qkv, as DiT's attention cuts it
        qkv = torch.full((B, N, 3, H, D), torch.nan, dtype=dtype)
        view = qkv.permute(2, 0, 3, 1, 4)[1]
        view.copy_(values)
        return view
    if layout == "padded":  # whoever reads past a row reads NaN
        wide = torch.full((B, H + 1, N + 2, D + 3), torch.nan, dtype=dtype)
        view = wide[:, 1:, 1:-1, 1:-2]
        view.copy_(values)
        return view
    if layout == "broadcast":
        return values[:1].expand(B, H, N, D)
    return values


def log_sum_exp(q, k, scale):
    return torch.logsumexp(q.float() @ k.float().transpose(-1, -2) * scale, dim=-1)


@functools.cache
def problem(B, H, Nq, N, D, layout, dtype):
    torch.manual_seed(1)
    q, k = laid_out(B, H, Nq, D, dtype, layout), laid_out(B, H, N, D, dtype, layout)
    scale = D**-0.5 if D else 1.0
    lse = log_sum_exp(q, k, scale) if N else torch.zeros(B, H, Nq)
    exact = oracle.attention_scores(exact_values(q), exact_values(k), exact_values(lse), scale)
    reference = attention_scores(q, k, lse, scale=scale, backend="reference")
    return (q, k, lse), scale, reference, exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "H", "Nq", "N", "D", "layout"), CASES)
def test_reference_matches_oracle(B, H, Nq, N, D, layout, dtype):
    _, _, result, exact = problem(B, H, Nq, N, D, layout, dtype)
    assert result.dtype == torch.float32
    assert_reference_within_bound(result, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "H", "Nq", "N", "D", "layout"), CASES)
def test_native_matches_reference(B, H, Nq, N, D, layout, dtype, isa):
    tensors, scale, reference, exact = problem(B, H, Nq, N, D, layout, dtype)
    result = attention_scores(*tensors, scale=scale, backend="native")
    assert result.dtype == torch.float32
    assert_backend_within_budget(result, reference, exact)


def exp_of(exponent, backend, dtype=torch.float32):
    """exp of every exponent, as the score of a key under the one query 1."""
    k = exponent.to(dtype).view(1, 1, -1, 1)
    q, lse = torch.ones(1, 1, 1, 1, dtype=dtype), torch.zeros(1, 1, 1)
    return attention_scores(q, k, lse, scale=1.0, backend=backend)[0]


def test_exponential_over_its_whole_range(isa):
    """A log-sum-exp that is not the row's own shifts the exponents at will."""
    exponent = torch.cat([torch.linspace(-87.3, 87.3, 9001), torch.linspace(-1, 1, 1001)])
    result, exact = exp_of(exponent, "native").double(), exponent.double().exp()
    # 2 ulp of the polynomial, and the rounding of exponent * log2(e).
    bound = 2.0**-23 * (2 + exponent.double().abs())
    assert ((result - exact).abs() <= bound * exact).all()


def test_exponential_beyond_its_range(isa):
    result = exp_of(torch.tensor([-1e30, -math.inf, -104.0, 89.0, 1e30, math.inf]), "native")
    assert result.tolist() == [0, 0, 0, math.inf, math.inf, math.inf]
    subnormal = exp_of(torch.linspace(-104, -87.4, 500), "native")
    assert ((subnormal >= 0) & (subnormal < 2.0**-126)).all()
    assert exp_of(torch.tensor([math.nan]), "native").isnan().all()


@pytest.mark.parametrize("lse", [math.inf, -math.inf, math.nan])
def test_infinite_log_sum_exp(lse, backend):
    q = torch.randn(1, 1, 3, 4)
    result = attention_scores(q, q, torch.full((1, 1, 3), lse), scale=1.0, backend=backend)
    assert_same_bits(result, torch.full((1, 3), -lse).exp())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_where_it_belongs(dtype, isa):
    q, k = torch.randn(2, 2, 9, 8).to(dtype), torch.randn(2, 2, 40, 8).to(dtype)
    lse = log_sum_exp(q, k, 1.0)
    q[0, 1, 4, 2] = torch.nan  # every key of this sample is seen by that query
    k[1, 0, 33, 7] = torch.nan
    k[1, 0, 11, 3] = torch.inf
    result = attention_scores(q, k, lse, scale=1.0, backend="native")
    reference = attention_scores(q, k, lse, scale=1.0, backend="reference")
    assert result[0].isnan().all()
    assert result[1].isnan().nonzero().flatten().tolist() == [33]
    assert torch.equal(result.isinf(), reference.isinf())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [16, 17])
def test_scratch_memory_does_not_leak_in(D, dtype, isa, with_threads):
    """Five of six queries of the register tile are missing, and the scratch memory held NaN."""
    k = torch.randn(1, 1, 40, D).to(dtype)
    one, six = k[:, :, :1].contiguous(), torch.full((1, 1, 6, D + D % 2), torch.nan, dtype=dtype)

    def run():
        attention_scores(six, six, torch.zeros(1, 1, 6), scale=1.0, backend="native")
        return attention_scores(one, k, log_sum_exp(one, k, 1.0), scale=1.0, backend="native")

    for _ in range(20):
        result = with_threads(1, run)
        assert result.sum().item() == pytest.approx(1, rel=1e-5)


def test_rows_of_a_softmax_sum_to_one(backend):
    q, k = torch.randn(2, 4, 50, 24), torch.randn(2, 4, 33, 24)
    result = attention_scores(q, k, log_sum_exp(q, k, 0.2), scale=0.2, backend=backend)
    torch.testing.assert_close(result.sum(dim=1), torch.full((2,), 50.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_permuting_keys_permutes_the_scores(dtype, isa):
    q, k = torch.randn(2, 2, 21, 24).to(dtype), torch.randn(2, 2, 75, 24).to(dtype)
    lse, order = log_sum_exp(q, k, 0.2), torch.randperm(75)
    result = attention_scores(q, k, lse, scale=0.2, backend="native")
    permuted = attention_scores(q, k[:, :, order], lse, scale=0.2, backend="native")
    assert_same_bits(permuted, result[:, order])


@pytest.mark.parametrize("stride", [2, 3, 50])
def test_query_stride_sums_every_nth_query(stride, backend):
    q, k = torch.randn(2, 3, 50, 24), torch.randn(2, 3, 33, 24)
    lse = log_sum_exp(q, k, 0.2)
    some = attention_scores(
        q[:, :, ::stride], k, lse[:, :, ::stride].contiguous(), scale=0.2, backend=backend
    )
    result = attention_scores(q, k, lse, scale=0.2, query_stride=stride, backend=backend)
    assert_same_bits(result, some * stride)


@pytest.mark.parametrize("stride", [0, -1, 5, 2.0, True])
def test_refuses_a_query_stride(stride):
    message = f"query_stride: expected .*, got {stride}"
    with pytest.raises(ValueError, match=message):
        attention_scores(**tensors(), scale=1.0, query_stride=stride)


def test_same_bits_for_any_number_of_threads(isa, with_threads):
    q, k = torch.randn(3, 3, 50, 24), torch.randn(3, 3, 101, 24)
    lse = log_sum_exp(q, k, 0.2)

    def run():
        return attention_scores(q, k, lse, scale=0.2, backend="native")

    assert_same_bits(with_threads(2, run), with_threads(1, run))


def tensors(**changed):
    given = {
        "q": torch.randn(2, 3, 4, 8),
        "k": torch.randn(2, 3, 5, 8),
        "lse": torch.randn(2, 3, 4),
    }
    return given | changed


META = torch.device("meta")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param({"q": [1.0]}, "q: expected a tensor, got list", id="no-tensor"),
        pytest.param(
            {"q": torch.randn(3, 4, 8)},
            "q: expected shape (B, H, Nq, D), got (3, 4, 8)",
            id="rank-of-q",
        ),
        pytest.param(
            {"q": torch.randn(2, 3, 4, 8).double()},
            "q: expected dtype float32 or bfloat16 or float16, got float64",
            id="dtype-of-q",
        ),
        pytest.param(
            {"q": torch.randn(2, 3, 8, 4).transpose(2, 3)},
            "q: expected a contiguous last dimension, got strides (96, 32, 1, 4)",
            id="layout-of-q",
        ),
        pytest.param(
            {"k": torch.randn(2, 3, 5, 9)},
            "k: expected shape (2, 3, N, 8), got (2, 3, 5, 9)",
            id="shape-of-k",
        ),
        pytest.param(
            {"k": torch.randn(2, 3, 5, 8).bfloat16()},
            "k: expected dtype float32, got bfloat16",
            id="dtype-of-k",
        ),
        pytest.param(
            {"k": torch.randn(2, 3, 5, 8, device=META)},
            "k: expected device cpu, got meta",
            id="device-of-k",
        ),
        pytest.param(
            {"k": torch.randn(2, 3, 5, 16)[..., ::2]},
            "k: expected a contiguous last dimension, got strides (240, 80, 16, 2)",
            id="layout-of-k",
        ),
        pytest.param(
            {"lse": torch.randn(2, 3, 5)},
            "lse: expected shape (2, 3, 4), got (2, 3, 5)",
            id="shape-of-lse",
        ),
        pytest.param(
            {"lse": torch.randn(2, 3, 4).half()},
            "lse: expected dtype float32, got float16",
            id="dtype-of-lse",
        ),
        pytest.param(
            {"lse": torch.randn(2, 4, 3).transpose(1, 2)},
            "lse: expected a contiguous tensor, got strides (12, 1, 3)",
            id="layout-of-lse",
        ),
    ],
)
def test_refuses(changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attention_scores(**tensors(**changed), scale=1.0)
