"""gather_modulate in Triton's interpreter."""

import pytest
import torch

import interpreter
import oracle
from interpreter import needs_triton
from toca_kernels import gather_modulate
from tolerance import assert_backend_within_budget, assert_same_bits, exact_values

pytestmark = needs_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def chunk(B, N, C, dtype, per_token):
    """The second of three chunks of a modulation, as an adaLN layer hands it over."""
    size = (B, N, 3 * C) if per_token else (B, 3 * C)
    return torch.randn(size).to(dtype)[..., C : 2 * C]


def inputs(B, N, C, k, dtype, *, per_token=False, residual="gated", affine=False):
    """(positional arguments, options)."""
    x = torch.randn(B, N, C).to(dtype)
    index = None
    if k is not None:
        index = torch.rand(B, N).argsort(dim=1)[:, :k].sort(dim=1).values
    shift, scale, gate = (chunk(B, N, C, dtype, per_token) for _ in range(3))
    options = {}
    if residual is not None:
        cache = torch.randn(B, N, C).to(dtype)
        options["residual"] = (gate if residual == "gated" else None, cache)
    if affine:
        options |= {"weight": torch.randn(C).to(dtype), "bias": torch.randn(C).to(dtype)}
    return (x, index, shift, scale), options


def check(arguments, options):
    result = interpreter.call("gather_modulate", *arguments, **options)
    reference = gather_modulate(*arguments, **options, backend="reference")
    x, index, shift, scale = arguments
    given = {
        name: value
        if not isinstance(value, torch.Tensor | tuple)
        else tuple(map(exact_values, value))
        if isinstance(value, tuple)
        else exact_values(value)
        for name, value in options.items()
    }
    exact = oracle.gather_modulate(
        exact_values(x),
        None if index is None else index.numpy(),
        exact_values(shift),
        exact_values(scale),
        **given,
    )
    assert result.dtype == x.dtype
    assert_backend_within_budget(result, reference, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("per_token", [False, True], ids=["per-sample", "per-token"])
def test_matches_reference(per_token, affine, norm, dtype):
    arguments, options = inputs(2, 7, 35, 4, dtype, per_token=per_token, affine=affine)
    check(arguments, options | {"norm": norm})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [None, "ungated", "gated"])
def test_residual(residual, dtype):
    check(*inputs(2, 5, 33, 3, dtype, residual=residual))


@pytest.mark.parametrize(
    ("B", "N", "C", "k"),
    [
        pytest.param(2, 16, 1152, 3, id="dit-xl-width"),
        pytest.param(1, 3, 3072, 2, id="flux-width"),
        pytest.param(2, 9, 64, None, id="every-token"),
        pytest.param(2, 9, 64, 9, id="all-selected"),
        pytest.param(1, 4, 1, 2, id="one-channel"),
        pytest.param(2, 4, 8, 0, id="none-selected"),
        pytest.param(0, 4, 8, 2, id="no-sample"),
        pytest.param(2, 0, 8, None, id="no-token"),
        pytest.param(2, 4, 0, 2, id="no-channel"),
    ],
)
def test_shapes(B, N, C, k):
    arguments, options = inputs(B, N, C, k, torch.float32)
    if B * N * C == 0 or k == 0:
        result = interpreter.call("gather_modulate", *arguments, **options)
        assert result.shape == (B, N if k is None else k, C)
    else:
        check(arguments, options)


def test_repeated_index():
    arguments, options = inputs(1, 5, 24, 2, torch.float32)
    index = torch.tensor([[3, 3, 0]])
    result = interpreter.call("gather_modulate", arguments[0], index, *arguments[2:], **options)
    assert_same_bits(result[:, 0], result[:, 1])


def test_eps():
    arguments, options = inputs(1, 3, 24, 2, torch.float32, residual=None)
    check((torch.ones_like(arguments[0]), *arguments[1:]), options | {"eps": 0.5})
