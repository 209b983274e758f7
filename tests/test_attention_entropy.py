"""attention_entropy: entropy of the head-averaged cross-attention of each query."""

import functools
import math
import re

import pytest
import torch

import interpreter
import oracle
import toca_kernels as toca
from interpreter import needs_triton
from test_attention_scores import DTYPES, laid_out
from toca_kernels import attention_entropy
from tolerance import (
    assert_backend_within_budget,
    assert_reference_within_bound,
    assert_same_bits,
    exact_values,
)

# B, H, N, L, D, layout, texts of different lengths
CASES = [
    pytest.param(2, 3, 40, 77, 72, "fused", True, id="pixart-head"),
    pytest.param(1, 2, 17, 130, 64, "contiguous", True, id="more-keys-than-a-tile"),
    pytest.param(2, 2, 33, 20, 80, "padded", False, id="head-dim-64-and-16"),
    pytest.param(1, 1, 20, 19, 96, "fused", False, id="head-dim-64-and-32"),
    pytest.param(1, 2, 19, 33, 128, "fused", True, id="head-dim-128"),
    pytest.param(1, 1, 9, 33, 256, "contiguous", True, id="longest-head"),
    pytest.param(3, 1, 13, 19, 17, "padded", True, id="head-dim-odd"),
    pytest.param(1, 3, 1, 1, 8, "contiguous", False, id="one-token"),
    pytest.param(2, 1, 7, 11, 8, "broadcast", True, id="one-text-for-all-samples"),
    pytest.param(0, 2, 5, 5, 8, "contiguous", True, id="no-sample"),
    pytest.param(2, 2, 0, 5, 8, "contiguous", True, id="no-query"),
    pytest.param(2, 2, 5, 0, 8, "contiguous", True, id="no-key"),
    pytest.param(2, 0, 5, 5, 8, "contiguous", True, id="no-head"),
]


def text_mask(B, L):
    """Texts of different lengths: 1 to L keys."""
    lengths = torch.randint(1, max(L, 1) + 1, (B, 1))
    return torch.arange(L) < lengths


def log_sum_exp(q, k, scale, mask):
    logits = q.float() @ k.float().transpose(-1, -2) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], -math.inf)
    return torch.logsumexp(logits, dim=-1)


@functools.cache
def problem(B, H, N, L, D, layout, masked, dtype):
    torch.manual_seed(1)
    q, k = laid_out(B, H, N, D, dtype, layout), laid_out(B, H, L, D, dtype, layout)
    mask = text_mask(B, L) if masked else None
    scale = D**-0.5
    lse = log_sum_exp(q, k, scale, mask) if L else torch.zeros(B, H, N)
    exact = oracle.attention_entropy(
        *map(exact_values, (q, k, lse)), scale, None if mask is None else mask.numpy()
    )
    return (q, k, lse), {"scale": scale, "mask": mask}, exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "H", "N", "L", "D", "layout", "masked"), CASES)
def test_reference_matches_oracle(B, H, N, L, D, layout, masked, dtype):
    tensors, options, exact = problem(B, H, N, L, D, layout, masked, dtype)
    result = attention_entropy(*tensors, **options, backend="reference")
    assert result.dtype == torch.float32
    assert_reference_within_bound(result, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "H", "N", "L", "D", "layout", "masked"), CASES)
def test_native_matches_reference(B, H, N, L, D, layout, masked, dtype, isa):
    tensors, options, exact = problem(B, H, N, L, D, layout, masked, dtype)
    reference = attention_entropy(*tensors, **options, backend="reference")
    for lse in (tensors[2], None):
        result = attention_entropy(*tensors[:2], lse, **options, backend="native")
        assert result.dtype == torch.float32
        assert_backend_within_budget(result, reference, exact)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "H", "N", "L", "D", "layout", "masked"), CASES)
def test_triton_matches_reference(B, H, N, L, D, layout, masked, dtype):
    tensors, options, exact = problem(B, H, N, L, D, layout, masked, dtype)
    result = interpreter.call("attention_entropy", *tensors, **options)
    assert result.dtype == torch.float32
    reference = attention_entropy(*tensors, **options, backend="reference")
    assert_backend_within_budget(result, reference, exact)


@pytest.fixture(params=["reference", "native", pytest.param("triton", marks=needs_triton)])
def run(request):
    """attention_entropy by each backend that has a body."""
    if request.param == "triton":
        return functools.partial(interpreter.call, "attention_entropy")
    status = toca.backends()[request.param]
    if not status.available:
        pytest.skip(f"backend {request.param!r} is not available: {status.reason}")
    return functools.partial(attention_entropy, backend=request.param)


@pytest.mark.parametrize("masked", [False, True])
def test_without_a_log_sum_exp(run, masked):
    q, k = torch.randn(2, 3, 21, 24), torch.randn(2, 3, 70, 24)
    mask = text_mask(2, 70) if masked else None
    expected = run(q, k, log_sum_exp(q, k, 0.4, mask), scale=0.4, mask=mask)
    torch.testing.assert_close(run(q, k, None, scale=0.4, mask=mask), expected)


def test_same_bits_for_any_number_of_threads(isa, with_threads):
    q, k = torch.randn(2, 3, 100, 24), torch.randn(2, 3, 70, 24)

    def entropy():
        return attention_entropy(q, k, scale=0.4, backend="native")

    for threads in (2, 3):
        assert_same_bits(with_threads(threads, entropy), with_threads(1, entropy))


def test_equal_weights_have_the_largest_entropy(run):
    q, k = torch.zeros(1, 2, 3, 8), torch.randn(1, 2, 50, 8)
    result = run(q, k, log_sum_exp(q, k, 1.0, None), scale=1.0)
    torch.testing.assert_close(result, torch.full((1, 3), math.log(50)), rtol=1e-4, atol=0)


def test_heads_are_averaged_before_the_logarithm(run):
    """Two heads that are sure of different keys: together they are as unsure as a coin."""
    q = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]]) * 50
    k = torch.eye(2).expand(1, 2, 2, 2)
    result = run(q, k, log_sum_exp(q, k, 1.0, None), scale=1.0)
    torch.testing.assert_close(result, torch.full((1, 1), math.log(2)), rtol=1e-4, atol=0)


def test_masked_keys_are_not_read(run):
    q, k = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 12, 8)
    mask = text_mask(2, 12)
    lse = log_sum_exp(q, k, 0.3, mask)
    expected = run(q, k, lse, scale=0.3, mask=mask)
    k[(~mask)[:, None].expand(2, 2, 12)] = torch.nan
    assert_same_bits(run(q, k, lse, scale=0.3, mask=mask), expected)


def test_a_text_without_any_key_has_no_entropy(run):
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    mask = torch.zeros(1, 5, dtype=torch.bool)
    result = run(q, k, log_sum_exp(q, k, 1.0, mask), scale=1.0, mask=mask)
    assert torch.equal(result.abs(), torch.zeros(1, 3))
    assert torch.equal(run(q, k, None, scale=1.0, mask=mask).abs(), torch.zeros(1, 3))


def test_opcheck():
    tensors, options, _ = problem(2, 3, 40, 77, 72, "fused", True, torch.float32)
    operator = torch.ops.toca.attention_entropy.default
    torch.library.opcheck(operator, (*tensors, options["scale"], options["mask"], "reference"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.randn(3, 4, 8)}, "q: expected shape (B, H, N, D), got (3, 4, 8)"),
        ({"k": torch.randn(2, 3, 5, 9)}, "k: expected shape (2, 3, L, 8), got (2, 3, 5, 9)"),
        ({"k": torch.randn(2, 3, 5, 8).half()}, "k: expected dtype float32, got float16"),
        ({"lse": torch.randn(2, 3, 5)}, "lse: expected shape (2, 3, 4), got (2, 3, 5)"),
        ({"mask": torch.ones(2, 4).bool()}, "mask: expected shape (2, 5), got (2, 4)"),
        ({"mask": torch.ones(2, 5)}, "mask: expected dtype bool, got float32"),
    ],
    ids=["rank-of-q", "shape-of-k", "dtype-of-k", "shape-of-lse", "shape-of-mask", "dtype-of-mask"],
)
def test_refuses(changed, message):
    given = {
        "q": torch.randn(2, 3, 4, 8),
        "k": torch.randn(2, 3, 5, 8),
        "lse": torch.randn(2, 3, 4),
        **changed,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        attention_entropy(**given, scale=1.0)
