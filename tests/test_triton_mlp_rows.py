"""mlp_rows in Triton's interpreter."""

import pytest
import torch

import interpreter
import oracle
from interpreter import needs_triton
from toca_kernels import mlp_rows
from tolerance import assert_backend_within_budget, assert_same_bits, exact_values

pytestmark = needs_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(B, k, C, F, dtype, bias=True):
    rows = torch.randn(B, k, C).to(dtype)
    weight1, weight2 = torch.randn(F, C).to(dtype) / C**0.5, torch.randn(C, F).to(dtype) / F**0.5
    bias1, bias2 = (torch.randn(F).to(dtype), torch.randn(C).to(dtype)) if bias else (None, None)
    return rows, (weight1, bias1), (weight2, bias2)


def check(rows, fc1, fc2, activation="gelu_tanh"):
    result = interpreter.call("mlp_rows", rows, fc1, fc2, activation=activation)
    reference = mlp_rows(rows, fc1, fc2, activation=activation, backend="reference")
    exact = oracle.mlp_rows(*map(exact_values, (rows, *fc1, *fc2)), activation)
    assert_backend_within_budget(result, reference, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_matches_reference(activation, dtype):
    check(*inputs(2, 5, 48, 100, dtype), activation)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    ("B", "k", "C", "F", "bias"),
    [
        pytest.param(2, 9, 72, 1100, True, id="split-sum"),
        pytest.param(1, 33, 72, 1100, False, id="split-sum-without-bias"),
        pytest.param(1, 33, 35, 77, True, id="odd"),
        pytest.param(1, 1, 16, 64, False, id="one-row"),
        pytest.param(1, 100, 64, 64, True, id="128-rows"),
        pytest.param(1, 150, 64, 64, True, id="too-many-rows"),
    ],
)
def test_shapes(B, k, C, F, bias, dtype):
    check(*inputs(B, k, C, F, dtype, bias))


@pytest.mark.parametrize(("B", "k"), [(2, 0), (0, 3)], ids=["no-row", "no-sample"])
def test_empty(B, k):
    rows, fc1, fc2 = inputs(B, k, 16, 32, torch.float16)
    assert interpreter.call("mlp_rows", rows, fc1, fc2).shape == (B, k, 16)


def test_same_bits_in_every_run():
    arguments = inputs(2, 9, 72, 1100, torch.float16)
    first = interpreter.call("mlp_rows", *arguments)
    assert_same_bits(interpreter.call("mlp_rows", *arguments), first)
