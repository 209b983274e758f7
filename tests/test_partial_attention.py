"""partial_attention: the selected queries over all keys, and their log-sum-exp."""

import functools
import math
import re

import pytest
import torch
import torch.nn.functional as F

import interpreter
import oracle
from interpreter import needs_triton
from test_attention_entropy import text_mask
from test_attention_scores import DTYPES, laid_out
from toca_kernels import attention_scores, partial_attention
from tolerance import (
    assert_backend_within_budget,
    assert_reference_within_bound,
    assert_same_bits,
    exact_values,
)

# B, H, k, N, D, layout, keys of different lengths
CASES = [
    pytest.param(2, 3, 18, 75, 72, "fused", False, id="dit-head"),
    pytest.param(2, 2, 40, 77, 72, "fused", True, id="pixart-head"),
    pytest.param(1, 2, 130, 70, 64, "contiguous", False, id="more-queries-than-a-tile"),
    pytest.param(1, 2, 5, 600, 64, "contiguous", False, id="split-over-keys"),
    pytest.param(2, 1, 5, 600, 64, "contiguous", True, id="split-over-keys-with-a-mask"),
    pytest.param(1, 1, 20, 600, 80, "padded", False, id="head-dim-64-and-16"),
    pytest.param(1, 1, 20, 19, 96, "fused", True, id="head-dim-64-and-32"),
    pytest.param(1, 2, 19, 65, 128, "fused", False, id="flux-head"),
    pytest.param(1, 1, 17, 40, 256, "contiguous", False, id="longest-head"),
    pytest.param(3, 1, 13, 19, 17, "padded", True, id="head-dim-odd"),
    pytest.param(2, 3, 1, 1, 8, "contiguous", False, id="one-token"),
    pytest.param(2, 1, 7, 11, 8, "broadcast", True, id="one-text-for-all-samples"),
    pytest.param(0, 2, 5, 5, 8, "contiguous", True, id="no-sample"),
    pytest.param(2, 2, 0, 5, 8, "contiguous", True, id="no-query"),
    pytest.param(2, 2, 5, 0, 8, "contiguous", True, id="no-key"),
    pytest.param(2, 0, 5, 5, 8, "contiguous", True, id="no-head"),
]


@functools.cache
def problem(B, H, k, N, D, layout, masked, dtype):
    torch.manual_seed(1)
    q = laid_out(B, H, k, D, dtype, layout)
    key, value = (laid_out(B, H, N, D, dtype, layout) for _ in range(2))
    mask = text_mask(B, N) if masked else None
    options = {"scale": D**-0.5, "mask": mask}
    exact = oracle.partial_attention(
        *map(exact_values, (q, key, value)), D**-0.5, None if mask is None else mask.numpy()
    )
    return (q, key, value), options, exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "H", "k", "N", "D", "layout", "masked"), CASES)
def test_reference_matches_oracle(B, H, k, N, D, layout, masked, dtype):
    tensors, options, exact = problem(B, H, k, N, D, layout, masked, dtype)
    result = partial_attention(*tensors, **options, backend="reference")
    assert [part.dtype for part in result] == [dtype, torch.float32]
    for part, exact_part in zip(result, exact, strict=True):
        assert_reference_within_bound(part, exact_part)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "H", "k", "N", "D", "layout", "masked"), CASES)
def test_triton_matches_reference(B, H, k, N, D, layout, masked, dtype):
    tensors, options, exact = problem(B, H, k, N, D, layout, masked, dtype)
    result = interpreter.call("partial_attention", *tensors, **options)
    reference = partial_attention(*tensors, **options, backend="reference")
    assert [part.dtype for part in result] == [dtype, torch.float32]
    for parts in zip(result, reference, exact, strict=True):
        assert_backend_within_budget(*parts)


@pytest.fixture(params=["reference", pytest.param("triton", marks=needs_triton)])
def run(request):
    """partial_attention by each backend that has a body."""
    if request.param == "triton":
        return functools.partial(interpreter.call, "partial_attention")
    return functools.partial(partial_attention, backend="reference")


def test_equals_torch(run):
    (q, key, value), options, _ = problem(2, 2, 40, 77, 72, "fused", True, torch.float32)
    out, _ = run(q, key, value, **options)
    expected = F.scaled_dot_product_attention(
        q, key, value, attn_mask=options["mask"][:, None, None], scale=options["scale"]
    )
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-6)


def test_log_sum_exp_is_what_attention_scores_takes(run):
    (q, key, value), options, _ = problem(2, 3, 18, 75, 72, "fused", False, torch.float32)
    _, lse = run(q, key, value, **options)
    score = attention_scores(q, key, lse, scale=options["scale"])
    torch.testing.assert_close(score.sum(dim=1), torch.full((2,), 18.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("keys", [20, 600], ids=["whole", "split-over-keys"])
def test_masked_keys_are_not_read(keys, run):
    q, key, value = (torch.randn(2, 2, n, 8) for n in (5, keys, keys))
    mask = text_mask(2, keys)
    mask[:, :300] &= torch.rand(2, min(keys, 300)) < 0.7
    mask[0, 0] = True
    expected = run(q, key, value, scale=0.3, mask=mask)
    for tensor in (key, value):
        tensor[(~mask)[:, None].expand(2, 2, keys)] = torch.nan
    for part, before in zip(run(q, key, value, scale=0.3, mask=mask), expected, strict=True):
        assert_same_bits(part, before)


@pytest.mark.parametrize("keys", [20, 600], ids=["whole", "split-over-keys"])
def test_a_query_without_any_key(keys, run):
    q, key, value = (torch.randn(1, 2, n, 8) for n in (5, keys, keys))
    mask = torch.zeros(1, keys, dtype=torch.bool)
    out, lse = run(q, key, value, scale=0.3, mask=mask)
    assert torch.equal(out, torch.zeros(1, 5, 16))
    assert torch.equal(lse, torch.full((1, 2, 5), -math.inf))


@pytest.mark.parametrize("keys", [20, 600], ids=["whole", "split-over-keys"])
def test_nan_stays_where_it_belongs(keys, run):
    q, key, value = (torch.randn(1, 2, n, 8) for n in (5, keys, keys))
    q[0, 1, 3, 0] = torch.nan
    value[0, 0, 7, 2] = torch.nan
    out, lse = run(q, key, value, scale=0.3)
    expected = torch.zeros(1, 5, 2, 8, dtype=torch.bool)
    expected[0, 3, 1] = True
    expected[0, :, 0, 2] = True
    assert torch.equal(out.isnan(), expected.flatten(2))
    assert lse.isnan().nonzero().tolist() == [[0, 1, 3]]


def test_large_logits_do_not_overflow(run):
    q = torch.full((1, 1, 2, 8), 100.0)
    key = torch.randn(1, 1, 30, 8)
    value = torch.randn(1, 1, 30, 8)
    out, lse = run(q, key, value, scale=10.0)
    best = key.sum(dim=-1).argmax()
    torch.testing.assert_close(out[0, 0], value[0, 0, best])
    assert lse.isfinite().all()


def test_same_bits_in_every_run(run):
    tensors, options, _ = problem(1, 2, 5, 600, 64, "contiguous", False, torch.float16)
    for pair in zip(run(*tensors, **options), run(*tensors, **options), strict=True):
        assert_same_bits(*pair)


def test_opcheck():
    tensors, options, _ = problem(2, 2, 40, 77, 72, "fused", True, torch.float32)
    operator = torch.ops.toca.partial_attention.default
    torch.library.opcheck(operator, (*tensors, options["scale"], options["mask"], "reference"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.randn(3, 4, 8)}, "q: expected shape (B, H, k, D), got (3, 4, 8)"),
        ({"k": torch.randn(2, 3, 5, 9)}, "k: expected shape (2, 3, N, 8), got (2, 3, 5, 9)"),
        ({"v": torch.randn(2, 3, 6, 8)}, "v: expected shape (2, 3, 5, 8), got (2, 3, 6, 8)"),
        ({"v": torch.randn(2, 3, 5, 8).half()}, "v: expected dtype float32, got float16"),
        (
            {"v": torch.randn(2, 3, 8, 5).transpose(2, 3)},
            "v: expected a contiguous last dimension, got strides (120, 40, 1, 5)",
        ),
        ({"mask": torch.ones(2, 4).bool()}, "mask: expected shape (2, 5), got (2, 4)"),
    ],
    ids=["rank-of-q", "shape-of-k", "shape-of-v", "dtype-of-v", "layout-of-v", "shape-of-mask"],
)
def test_refuses(changed, message):
    given = {
        "q": torch.randn(2, 3, 4, 8),
        "k": torch.randn(2, 3, 5, 8),
        "v": torch.randn(2, 3, 5, 8),
        **changed,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        partial_attention(**given, scale=1.0)
