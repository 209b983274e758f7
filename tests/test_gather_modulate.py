"""gather_modulate: residual, norm and modulation of the selected rows."""

import functools
import math
import re

import pytest
import torch

import oracle
from toca_kernels import gather_modulate
from tolerance import (
    assert_backend_within_budget,
    assert_reference_within_bound,
    assert_same_bits,
    exact_values,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# B, N, C, k (None: no index), options of `problem`
CASES = [
    pytest.param(1, 256, 1152, 26, {"residual": "gated"}, id="dit-xl"),
    pytest.param(2, 13, 37, 5, {"residual": "gated"}, id="odd-n-and-c"),
    pytest.param(2, 13, 37, 13, {"residual": "gated"}, id="all"),
    pytest.param(2, 13, 37, None, {"residual": "gated"}, id="no-index"),
    pytest.param(2, 13, 37, 0, {}, id="none"),
    pytest.param(1, 9, 3, 4, {}, id="fewer-channels-than-lanes"),
    pytest.param(2, 9, 16, 4, {}, id="one-vector"),
    pytest.param(2, 9, 31, 4, {}, id="one-vector-and-a-tail"),
    pytest.param(3, 5, 1, 2, {"residual": "gated"}, id="one-channel"),
    pytest.param(2, 1, 24, 1, {}, id="one-token"),
    pytest.param(0, 9, 24, 4, {}, id="no-sample"),
    pytest.param(2, 0, 24, 0, {}, id="no-token"),
    pytest.param(2, 9, 0, 4, {}, id="no-channel"),
    pytest.param(2, 9, 40, 20, {"repeats": True}, id="repeated-tokens-out-of-order"),
    pytest.param(2, 13, 40, 5, {"modulation": "chunks"}, id="chunks-of-one-tensor"),
    pytest.param(
        2, 13, 40, 5, {"modulation": "per-token", "residual": "gated"}, id="per-token-modulation"
    ),
    pytest.param(
        2, 13, 40, None, {"modulation": "per-token chunks", "residual": "gated"}, id="per-token-all"
    ),
    pytest.param(2, 13, 40, 5, {"residual": "ungated"}, id="no-gate"),
    pytest.param(2, 13, 40, 5, {"affine": "both"}, id="affine"),
    pytest.param(2, 13, 37, 5, {"affine": "weight"}, id="weight-without-bias"),
    pytest.param(2, 13, 37, 5, {"affine": "bias"}, id="bias-without-weight"),
    pytest.param(2, 13, 37, 5, {"norm": "rms", "residual": "gated"}, id="rms"),
    pytest.param(2, 13, 37, 5, {"norm": "rms", "affine": "weight"}, id="rms-affine"),
    pytest.param(2, 13, 37, 5, {"eps": 0.1}, id="large-eps"),
    pytest.param(2, 13, 200, 5, {"offset": 100.0}, id="mean-far-from-zero"),
]


def modulations(B, N, C, dtype, kind):
    """shift, scale and gate as models hand them over."""
    if kind == "vectors":
        return [torch.randn(B, C).to(dtype) for _ in range(3)]
    if kind == "chunks":  # of DiT's adaLN_modulation(c), (B, 6 C)
        return torch.randn(B, 6 * C).to(dtype).chunk(6, dim=1)[3:]
    if kind == "per-token":
        return [torch.randn(B, N, C).to(dtype) for _ in range(3)]
    return torch.randn(B, N, 3 * C).to(dtype).chunk(3, dim=2)


@functools.cache
def _problem(B, N, C, k, dtype, options):
    options = dict(options)
    torch.manual_seed(1)
    x = (torch.randn(B, N, C) + options.pop("offset", 0.0)).to(dtype)
    shift, scale, gate = modulations(B, N, C, dtype, options.pop("modulation", "vectors"))
    index = None
    if k is not None:
        shuffled = torch.rand(B, N).argsort(dim=1)
        index = shuffled[:, :k].sort(dim=1).values
        if options.pop("repeats", False):
            index = torch.randint(0, N, (B, k))
    residual = options.pop("residual", None)
    if residual:
        options["residual"] = (
            gate if residual == "gated" else None,
            torch.randn(B, N, C).to(dtype),
        )
    affine = options.pop("affine", "")
    if affine in ("both", "weight"):
        options["weight"] = torch.randn(C).to(dtype)
    if affine in ("both", "bias"):
        options["bias"] = torch.randn(C).to(dtype)
    exact = oracle.gather_modulate(
        *map(exact_values, (x, index, shift, scale)), **as_float64(options)
    )
    reference = gather_modulate(x, index, shift, scale, **options, backend="reference")
    return (x, index, shift, scale), options, reference, exact


def as_float64(options):
    def convert(value):
        if isinstance(value, tuple):
            return tuple(map(convert, value))
        return exact_values(value) if isinstance(value, torch.Tensor) else value

    return {name: convert(value) for name, value in options.items()}


def problem(B, N, C, k, options, dtype):
    return _problem(B, N, C, k, dtype, tuple(options.items()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "N", "C", "k", "options"), CASES)
def test_reference_matches_oracle(B, N, C, k, options, dtype):
    _, _, result, exact = problem(B, N, C, k, options, dtype)
    assert result.dtype == dtype
    assert_reference_within_bound(result, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "N", "C", "k", "options"), CASES)
def test_native_matches_reference(B, N, C, k, options, dtype, isa):
    tensors, options, reference, exact = problem(B, N, C, k, options, dtype)
    result = gather_modulate(*tensors, **options, backend="native")
    assert result.dtype == dtype
    assert_backend_within_budget(result, reference, exact)


def inputs(B=2, N=13, C=37, dtype=torch.float32):
    x, cache = torch.randn(B, N, C).to(dtype), torch.randn(B, N, C).to(dtype)
    shift, scale, gate = modulations(B, N, C, dtype, "vectors")
    return x, shift, scale, (gate, cache)


def test_every_index_equals_no_index(backend):
    x, shift, scale, residual = inputs()
    every = torch.arange(13).expand(2, 13).contiguous()
    assert_same_bits(
        gather_modulate(x, every, shift, scale, residual=residual, backend=backend),
        gather_modulate(x, None, shift, scale, residual=residual, backend=backend),
    )


def test_a_row_does_not_depend_on_the_others(isa):
    x, shift, scale, residual = inputs()
    index = torch.tensor([[11, 4, 4], [0, 12, 7]])
    dense = gather_modulate(x, None, shift, scale, residual=residual, backend="native")
    result = gather_modulate(x, index, shift, scale, residual=residual, backend="native")
    assert_same_bits(result, torch.stack([dense[b, index[b]] for b in range(2)]))


def test_permuting_tokens_permutes_the_result(backend):
    x, shift, scale, (gate, cache) = inputs()
    order = torch.randperm(13)
    result = gather_modulate(x, None, shift, scale, residual=(gate, cache), backend=backend)
    permuted = gather_modulate(
        x[:, order].contiguous(),
        None,
        shift,
        scale,
        residual=(gate, cache[:, order].contiguous()),
        backend=backend,
    )
    assert_same_bits(permuted, result[:, order])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(
    "special",
    [math.nan, math.inf, -math.inf, 3e38, 1e-40, -0.0],
    ids=["nan", "inf", "-inf", "largest", "subnormal", "-0"],
)
def test_special_values_stay_in_their_row(special, norm, dtype, isa):
    """What one row becomes is the reference's; the rows round it do not notice."""
    x, shift, scale, _ = inputs(dtype=dtype)
    special = min(special, torch.finfo(dtype).max) if special < math.inf else special
    marked = x.clone()
    marked[1, 6] = special
    result, reference, clean = (
        gather_modulate(tokens, None, shift, scale, norm=norm, backend=name)
        for tokens, name in ((marked, "native"), (marked, "reference"), (x, "native"))
    )
    torch.testing.assert_close(result[1, 6], reference[1, 6], equal_nan=True)
    result[1, 6] = clean[1, 6]
    assert_same_bits(result, clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_row_is_the_shift(dtype, backend):
    _, shift, scale, _ = inputs(dtype=dtype)
    x = torch.full((2, 13, 37), 0.75, dtype=dtype)
    result = gather_modulate(x, None, shift, scale, backend=backend)
    assert_same_bits(result, shift[:, None].expand(2, 13, 37))


def test_constant_row_without_eps_is_nan(isa):
    _, shift, scale, _ = inputs()
    x = torch.full((2, 13, 37), 0.75)
    assert gather_modulate(x, None, shift, scale, eps=0.0, backend="native").isnan().all()


def test_overflow_of_the_output_is_infinity(isa):
    """65504 is the largest float16; a sum that rounds beyond it is infinite, not wrapped."""
    x, shift, scale, _ = inputs(dtype=torch.float16)
    scale.fill_(60000.0)
    result = gather_modulate(x, None, shift, scale, backend="native")
    reference = gather_modulate(x, None, shift, scale, backend="reference")
    assert result.isinf().any()
    assert torch.equal(result.isinf(), reference.isinf())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_read_outside_the_inputs(dtype, isa):
    """x, cache, index and modulation lie between NaNs and indices out of range."""

    def framed(values, outside):
        wide = torch.full((values.shape[0] + 2, *values.shape[1:]), outside, dtype=values.dtype)
        wide[1:-1] = values
        return wide[1:-1]

    x, shift, scale, (gate, cache) = inputs(dtype=dtype)
    index = torch.tensor([[0, 5, 12], [0, 1, 12]])
    plain = gather_modulate(x, index, shift, scale, residual=(gate, cache), backend="native")
    x, shift, scale, gate, cache = (
        framed(value, torch.nan) for value in (x, shift, scale, gate, cache)
    )
    index = framed(index, 2**40)
    result = gather_modulate(x, index, shift, scale, residual=(gate, cache), backend="native")
    assert_same_bits(result, plain)


def test_same_bits_for_any_number_of_threads(isa, with_threads):
    x, shift, scale, residual = inputs(N=101)

    def run():
        return gather_modulate(x, None, shift, scale, residual=residual, backend="native")

    assert_same_bits(with_threads(2, run), with_threads(1, run))


# --- refusals ---

META = torch.device("meta")


@pytest.mark.parametrize("bad", [-1, 13, 2**40, -(2**62)])
@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
def test_refuses_an_index_out_of_range(bad, place, backend):
    x, shift, scale, _ = inputs()
    index = torch.tensor([[0, 5, 12], [0, 1, 12]])
    index[place] = bad
    with pytest.raises(ValueError, match=rf"index: expected values in \[0, 13\), got .*{bad}"):
        gather_modulate(x, index, shift, scale, backend=backend)


def test_refuses_every_index_where_there_is_no_token(backend):
    with pytest.raises(ValueError, match=r"index: expected values in \[0, 0\), got 0"):
        gather_modulate(
            torch.randn(1, 0, 4),
            torch.zeros(1, 1, dtype=torch.int64),
            *torch.randn(2, 1, 4),
            backend=backend,
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param({"x": 1.0}, "x: expected a tensor, got float", id="no-tensor"),
        pytest.param(
            {"x": torch.randn(13, 8)}, "x: expected shape (B, N, C), got (13, 8)", id="rank-of-x"
        ),
        pytest.param(
            {"x": torch.randn(2, 13, 8).double()},
            "x: expected dtype float32 or bfloat16 or float16, got float64",
            id="dtype-of-x",
        ),
        pytest.param(
            {"x": torch.randn(2, 8, 13).transpose(1, 2)},
            "x: expected a contiguous tensor, got strides (104, 1, 13)",
            id="layout-of-x",
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
        pytest.param(
            {"index": torch.zeros(4, 2, dtype=torch.int64).t()},
            "index: expected a contiguous tensor, got strides (1, 2)",
            id="layout-of-index",
        ),
        pytest.param(
            {"index": torch.zeros(2, 4, dtype=torch.int64, device=META)},
            "index: expected device cpu, got meta",
            id="device-of-index",
        ),
        pytest.param(
            {"shift": torch.randn(2, 9)},
            "shift: expected shape (2, 8), got (2, 9)",
            id="shape-of-shift",
        ),
        pytest.param(
            {"scale": torch.randn(2, 12, 8)},
            "scale: expected shape (2, 13, 8), got (2, 12, 8)",
            id="shape-of-scale-per-token",
        ),
        pytest.param(
            {"shift": torch.randn(2, 8).half()},
            "shift: expected dtype float32, got float16",
            id="dtype-of-shift",
        ),
        pytest.param(
            {"scale": torch.randn(8, 2).t()},
            "scale: expected a contiguous last dimension, got strides (1, 2)",
            id="layout-of-scale",
        ),
        pytest.param(
            {"residual": (None, None)},
            "residual cache: expected a tensor, got NoneType",
            id="no-cache",
        ),
        pytest.param(
            {"residual": (None, torch.randn(2, 12, 8))},
            "residual cache: expected shape (2, 13, 8), got (2, 12, 8)",
            id="shape-of-cache",
        ),
        pytest.param(
            {"residual": (torch.randn(3, 8), torch.randn(2, 13, 8))},
            "residual gate: expected shape (2, 8), got (3, 8)",
            id="shape-of-gate",
        ),
        pytest.param(
            {"weight": torch.randn(9)}, "weight: expected shape (8), got (9)", id="shape-of-weight"
        ),
        pytest.param(
            {"bias": torch.randn(8).bfloat16()},
            "bias: expected dtype float32, got bfloat16",
            id="dtype-of-bias",
        ),
        pytest.param(
            {"bias": torch.randn(16)[::2]},
            "bias: expected a contiguous tensor, got strides (2,)",
            id="layout-of-bias",
        ),
        pytest.param(
            {"norm": "batch"}, "norm: expected one of layer, rms, got 'batch'", id="unknown-norm"
        ),
        pytest.param({"backend": "numpy"}, "backend: expected one of", id="unknown-backend"),
    ],
)
def test_refuses(changed, message):
    given = {
        "x": torch.randn(2, 13, 8),
        "index": None,
        "shift": torch.randn(2, 8),
        "scale": torch.randn(2, 8),
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        gather_modulate(**(given | changed))
