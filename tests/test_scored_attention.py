"""scored_attention: dense attention and, under an earlier log-sum-exp, what every key receives."""

import functools
import math
import re

import numpy as np
import pytest
import torch

import interpreter
import oracle
from interpreter import needs_triton
from oracle import Exact
from test_attention_scores import DTYPES, laid_out, log_sum_exp
from toca_kernels.ops import MAX_EXPONENT, attention_scores, partial_attention, scored_attention
from tolerance import (
    assert_backend_within_budget,
    assert_reference_within_bound,
    assert_same_bits,
    exact_values,
)

# B, H, Nq, N, D, layout, how far the log-sum-exp has drifted since the earlier step
CASES = [
    pytest.param(2, 2, 75, 75, 72, "fused", 0.0, id="dit-head"),
    pytest.param(2, 2, 75, 75, 72, "fused", 1.0, id="drifted"),
    pytest.param(1, 2, 37, 41, 72, "padded", 8.0, id="drifted-beyond-the-limit"),
    pytest.param(1, 2, 65, 130, 64, "contiguous", 0.3, id="more-queries-and-keys-than-a-tile"),
    pytest.param(1, 1, 33, 40, 80, "padded", 0.3, id="head-dim-64-and-16"),
    pytest.param(1, 1, 20, 19, 96, "fused", 0.3, id="head-dim-64-and-32"),
    pytest.param(1, 2, 37, 65, 128, "fused", 0.3, id="flux-head"),
    pytest.param(1, 1, 17, 9, 256, "contiguous", 0.3, id="longest-head"),
    pytest.param(3, 1, 13, 19, 17, "padded", 0.3, id="head-dim-odd"),
    pytest.param(1, 3, 1, 1, 8, "contiguous", 0.3, id="one-token"),
    pytest.param(2, 1, 7, 11, 8, "broadcast", 0.3, id="one-key-for-all-samples"),
    pytest.param(0, 2, 5, 5, 8, "contiguous", 0.3, id="no-sample"),
    pytest.param(2, 2, 0, 5, 8, "contiguous", 0.3, id="no-query"),
    pytest.param(2, 2, 5, 0, 8, "contiguous", 0.3, id="no-key"),
    pytest.param(2, 0, 5, 5, 8, "contiguous", 0.3, id="no-head"),
]
cases = pytest.mark.parametrize(("B", "H", "Nq", "N", "D", "layout", "drift"), CASES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def exact_score(q, k, lse, scale):
    """As the oracle of attention_scores, with the exponents cut off."""
    B, H, Nq, D = q.shape
    value, magnitude = np.zeros((B, k.shape[2])), np.zeros((B, k.shape[2]))
    for b in range(B):
        for h in range(H):
            exponent = scale * q[b, h] @ k[b, h].T - lse[b, h, :, None]
            amplified = 1 + abs(scale) * (abs(q[b, h]) @ abs(k[b, h]).T) + abs(lse[b, h, :, None])
            term = np.exp(np.minimum(exponent, MAX_EXPONENT)) / H
            value[b] += term.sum(axis=0)
            magnitude[b] += (term * amplified).sum(axis=0)
    return Exact(value, magnitude, roundings=D + Nq + H + 8)


@functools.cache
def problem(B, H, Nq, N, D, layout, drift, dtype):
    torch.manual_seed(1)
    q = laid_out(B, H, Nq, D, dtype, layout)
    k, v = (laid_out(B, H, N, D, dtype, layout) for _ in range(2))
    scale = D**-0.5
    lse = (log_sum_exp(q, k, scale) if N else torch.zeros(B, H, Nq)) + drift * torch.randn(B, H, Nq)
    values = [exact_values(tensor) for tensor in (q, k, v)]
    exact = (
        *oracle.partial_attention(*values, scale),
        exact_score(*values[:2], exact_values(lse), scale),
    )
    return (q, k, v, lse), scale, exact


@dtypes
@cases
def test_reference_matches_oracle(B, H, Nq, N, D, layout, drift, dtype):
    tensors, scale, exact = problem(B, H, Nq, N, D, layout, drift, dtype)
    result = scored_attention(*tensors, scale=scale, backend="reference")
    assert [part.dtype for part in result] == [dtype, torch.float32, torch.float32]
    for part, exact_part in zip(result, exact, strict=True):
        assert_reference_within_bound(part, exact_part)


@needs_triton
@dtypes
@cases
def test_triton_matches_reference(B, H, Nq, N, D, layout, drift, dtype):
    check(interpreter.call, B, H, Nq, N, D, layout, drift, dtype)


def check(call, B, H, Nq, N, D, layout, drift, dtype):
    tensors, scale, exact = problem(B, H, Nq, N, D, layout, drift, dtype)
    result = call("scored_attention", *tensors, scale=scale)
    reference = scored_attention(*tensors, scale=scale, backend="reference")
    assert [part.dtype for part in result] == [dtype, torch.float32, torch.float32]
    for parts in zip(result, reference, exact, strict=True):
        assert_backend_within_budget(*parts)


@pytest.fixture(params=["reference", pytest.param("triton", marks=needs_triton)])
def run(request):
    """scored_attention by each backend that has a body."""
    if request.param == "triton":
        return functools.partial(interpreter.call, "scored_attention")
    return functools.partial(scored_attention, backend="reference")


def heads(*tokens, scale=1.0):
    return [scale * torch.randn(2, 2, n, 24) for n in tokens]


def test_with_its_own_log_sum_exp_it_is_attention_scores(run):
    q, k, v = heads(50, 75, 75)
    _, lse, _ = run(q, k, v, torch.zeros(2, 2, 50), scale=0.2)
    out, same_lse, score = run(q, k, v, lse, scale=0.2)
    assert_same_bits(same_lse, lse)
    torch.testing.assert_close(score, attention_scores(q, k, lse, scale=0.2), rtol=1e-5, atol=0)
    torch.testing.assert_close(score.sum(dim=1), torch.full((2,), 50.0), rtol=1e-5, atol=0)
    expected = partial_attention(q, k, v, scale=0.2, backend="reference")
    torch.testing.assert_close((out, lse), expected, rtol=1e-5, atol=1e-6)


def test_a_log_sum_exp_over_several_steps(run):
    """The scores of a slow drift rank the keys as the exact ones do."""
    q, k, v = heads(60, 40, 40)
    _, lse, _ = run(q, k, v, torch.zeros(2, 2, 60), scale=0.2)
    for _ in range(3):
        q, k = q + 0.1 * torch.randn_like(q), k + 0.1 * torch.randn_like(k)
        exact = attention_scores(q, k, log_sum_exp(q, k, 0.2), scale=0.2)
        _, lse, score = run(q, k, v, lse, scale=0.2)
        have, want = (s.topk(10).indices.sort().values for s in (score, exact))
        overlap = [len(set(a) & set(b)) for a, b in zip(have.tolist(), want.tolist(), strict=True)]
        assert min(overlap) >= 8


@pytest.mark.parametrize("drift", [0.5, 3.0, 50.0, 1e4, math.inf])
def test_a_drifted_log_sum_exp_does_not_overflow(drift, run):
    q, k, v = heads(20, 33, 33, scale=3.0)
    own = log_sum_exp(q, k, 0.2)
    out, lse, score = run(q, k, v, own - drift, scale=0.2)
    assert score.isfinite().all()
    assert ((score >= 0) & (score <= 20 * math.exp(MAX_EXPONENT) * (1 + 1e-6))).all()
    if drift <= 50:
        q64, k64 = q.double(), k.double()
        exponent = q64 @ k64.mT * 0.2 - (own - drift)[..., None]
        exact = exponent.clamp(max=MAX_EXPONENT).exp().sum(dim=2).mean(dim=1)
        torch.testing.assert_close(score.double(), exact, rtol=2e-5, atol=0)
    exact_out, exact_lse, _ = run(q, k, v, own, scale=0.2)
    assert_same_bits(out, exact_out)
    assert_same_bits(lse, exact_lse)


def test_no_log_sum_exp_leaves_no_score(run):
    q, k, v = heads(9, 20, 20)
    lse = log_sum_exp(q, k, 0.2)
    lse[0] = math.inf
    lse[1, 1, 4] = math.nan
    out, _, score = run(q, k, v, lse, scale=0.2)
    assert torch.equal(score[0], torch.zeros(20))
    assert score[1].isnan().all()
    assert out.isfinite().all()


def test_nan_stays_where_it_belongs(run):
    q, k, v = heads(9, 75, 75)
    lse = log_sum_exp(q, k, 0.2)
    k[1, 0, 33, 7] = torch.nan
    v[0, 1, 5, 2] = torch.nan
    out, new_lse, score = run(q, k, v, lse, scale=0.2)
    assert score.isnan().nonzero().tolist() == [[1, 33]]
    assert new_lse.isnan().nonzero()[:, :2].unique(dim=0).tolist() == [[1, 0]]
    assert out[1, :, :24].isnan().all()
    assert out[0].isnan().nonzero()[:, 1].unique().tolist() == [24 + 2]


def test_large_logits_do_not_overflow(run):
    q = torch.full((1, 1, 2, 8), 100.0)
    k, v = torch.randn(2, 1, 1, 70, 8)
    lse = torch.logsumexp((q.double() @ k.double().mT) * 10, dim=-1).float()
    out, new_lse, score = run(q, k, v, lse, scale=10.0)
    best = k.sum(dim=-1).argmax()
    torch.testing.assert_close(out[0, 0], v[0, 0, best])
    torch.testing.assert_close(new_lse, lse)
    assert score.argmax() == best


def test_same_bits_in_every_run(run):
    tensors, scale, _ = problem(2, 2, 75, 75, 72, "fused", 1.0, torch.float16)
    for pair in zip(run(*tensors, scale=scale), run(*tensors, scale=scale), strict=True):
        assert_same_bits(*pair)


@needs_triton
def test_large_tile():
    """Enough heads for the tile of 128 queries that a full GPU gets."""
    check(interpreter.call, 1, 54, 130, 9, 16, "contiguous", 0.3, torch.float16)


@needs_triton
def test_refuses_a_head_that_is_too_long():
    q = torch.randn(1, 1, 3, 257)
    with pytest.raises(ValueError, match=r"head dim: expected <= 256 .* got 257"):
        interpreter.call("scored_attention", q, q, q, torch.zeros(1, 1, 3), scale=1.0)


def test_opcheck():
    tensors, scale, _ = problem(2, 2, 75, 75, 72, "fused", 1.0, torch.float32)
    operator = torch.ops.toca.scored_attention.default
    torch.library.opcheck(operator, (*tensors, scale, MAX_EXPONENT, "reference"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.randn(3, 4, 8)}, "q: expected shape (B, H, Nq, D), got (3, 4, 8)"),
        ({"k": torch.randn(2, 3, 5, 9)}, "k: expected shape (2, 3, N, 8), got (2, 3, 5, 9)"),
        ({"v": torch.randn(2, 3, 6, 8)}, "v: expected shape (2, 3, 5, 8), got (2, 3, 6, 8)"),
        ({"v": torch.randn(2, 3, 5, 8).half()}, "v: expected dtype float32, got float16"),
        ({"lse": torch.randn(2, 3, 5)}, "lse: expected shape (2, 3, 4), got (2, 3, 5)"),
        ({"lse": torch.randn(2, 3, 4).half()}, "lse: expected dtype float32, got float16"),
        (
            {"lse": torch.randn(2, 4, 3).transpose(1, 2)},
            "lse: expected a contiguous tensor, got strides (12, 1, 3)",
        ),
    ],
    ids=[
        "rank-of-q",
        "shape-of-k",
        "shape-of-v",
        "dtype-of-v",
        "shape-of-lse",
        "dtype-of-lse",
        "layout-of-lse",
    ],
)
def test_refuses(changed, message):
    given = {
        "q": torch.randn(2, 3, 4, 8),
        "k": torch.randn(2, 3, 5, 8),
        "v": torch.randn(2, 3, 5, 8),
        "lse": torch.randn(2, 3, 4),
        **changed,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        scored_attention(**given, scale=1.0)


def test_there_is_no_native_body():
    q = torch.randn(1, 1, 2, 8)
    with pytest.raises(RuntimeError, match="native"):
        scored_attention(q, q, q, torch.zeros(1, 1, 2), scale=1.0, backend="native")


# --- on a GPU ------------------------------------------------------------------------------------

on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


class TestOnGPU:
    pytestmark = on_a_gpu

    @staticmethod
    def call(op, *tensors, **options):
        result = scored_attention(*(t.cuda() for t in tensors), **options, backend="triton")
        return [part.cpu() for part in result]

    @cases
    def test_cases(self, B, H, Nq, N, D, layout, drift):
        check(self.call, B, H, Nq, N, D, layout, drift, torch.bfloat16)

    @dtypes
    @pytest.mark.parametrize(
        ("B", "H", "N", "D"),
        [
            pytest.param(2, 16, 256, 72, id="dit-xl"),
            pytest.param(1, 2, 4096, 72, id="pixart-two-heads"),
            pytest.param(1, 2, 4608, 128, id="flux-two-heads"),
        ],
    )
    def test_real(self, B, H, N, D, dtype):
        check(self.call, B, H, N, N, D, "contiguous", 0.3, dtype)

    def test_same_bits_in_every_run(self):
        tensors, scale, _ = problem(1, 2, 4608, 4608, 128, "contiguous", 0.3, torch.bfloat16)
        first = self.call("scored_attention", *tensors, scale=scale)
        for _ in range(5):
            for pair in zip(self.call("", *tensors, scale=scale), first, strict=True):
                assert_same_bits(*pair)
