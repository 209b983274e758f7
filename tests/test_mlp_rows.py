"""mlp_rows: the library's GEMMs, from plain weights and from weights that oneDNN packed."""

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import oracle
from toca_kernels import mlp_rows
from toca_kernels.native import PackedLinear, packing_unavailable
from tolerance import (
    assert_backend_within_budget,
    assert_reference_within_bound,
    assert_same_bits,
    exact_values,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("gelu", "gelu_tanh", "silu")

# B, k, C, F, biases
CASES = [
    pytest.param(1, 26, 1152, 512, True, id="dit-xl-cut-in-hidden"),
    pytest.param(2, 5, 37, 61, True, id="odd"),
    pytest.param(2, 5, 37, 61, False, id="no-bias"),
    pytest.param(1, 1, 8, 32, True, id="one-row"),
    pytest.param(3, 2, 1, 1, True, id="one-channel"),
    pytest.param(2, 0, 16, 64, True, id="no-row"),
    pytest.param(0, 5, 16, 64, True, id="no-sample"),
]

# The hidden rows are stored in the dtype before and after the activation, and so is the result.
STORED = 3


@functools.cache
def problem(B, k, C, hidden, biases, activation, dtype):
    torch.manual_seed(1)
    rows = torch.randn(B, k, C).to(dtype)
    fc1 = ((torch.randn(hidden, C) / C**0.5).to(dtype), torch.randn(hidden).to(dtype))
    fc2 = ((torch.randn(C, hidden) / hidden**0.5).to(dtype), torch.randn(C).to(dtype))
    if not biases:
        fc1, fc2 = (fc1[0], None), (fc2[0], None)
    exact = oracle.mlp_rows(*map(exact_values, (rows, *fc1, *fc2)), activation)
    return rows, fc1, fc2, exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("B", "k", "C", "hidden", "biases"), CASES)
def test_matches_oracle(B, k, C, hidden, biases, activation, dtype, backend):
    rows, fc1, fc2, exact = problem(B, k, C, hidden, biases, activation, dtype)
    result = mlp_rows(rows, fc1, fc2, activation=activation, backend=backend)
    assert result.dtype == dtype
    assert_reference_within_bound(result, exact, roundings_in_dtype=STORED)


def need_packing(dtype):
    reason = packing_unavailable(dtype, torch.device("cpu"))
    if reason:
        pytest.skip(f"no prepacked linear: {reason}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("B", "k", "C", "hidden", "biases"), CASES)
def test_packed_matches_plain(B, k, C, hidden, biases, activation, dtype):
    need_packing(dtype)
    rows, fc1, fc2, exact = problem(B, k, C, hidden, biases, activation, dtype)
    result = mlp_rows(rows, PackedLinear(*fc1), PackedLinear(*fc2), activation=activation)
    plain = mlp_rows(rows, fc1, fc2, activation=activation)
    assert result.dtype == dtype
    assert_backend_within_budget(result, plain, exact)


def linears(C=16, hidden=24, bias=True):
    return nn.Linear(C, hidden, bias), nn.Linear(hidden, C, bias)


@pytest.mark.parametrize("bias", [True, False])
def test_modules_equal_their_weights(bias, backend):
    rows, (fc1, fc2) = torch.randn(2, 5, 16), linears(bias=bias)
    with torch.no_grad():
        assert_same_bits(
            mlp_rows(rows, fc1, fc2, backend=backend),
            mlp_rows(rows, (fc1.weight, fc1.bias), (fc2.weight, fc2.bias), backend=backend),
        )


@pytest.mark.parametrize("bias", [True, False])
def test_packed_from_a_module(bias):
    need_packing(torch.float32)
    fc1, fc2 = linears(bias=bias)
    packed = PackedLinear.from_linear(fc1)
    assert (packed.in_features, packed.out_features, packed.dtype) == (16, 24, torch.float32)
    assert packed.nbytes == 24 * 16 * 4
    rows = torch.randn(3, 16)
    torch.testing.assert_close(packed(rows), fc1(rows).detach())
    result = mlp_rows(rows[None], packed, PackedLinear.from_linear(fc2))
    assert not result.requires_grad


def test_packed_does_not_follow_the_weight():
    """It is a copy: whoever changes the weight packs again."""
    need_packing(torch.float32)
    fc1, _ = linears()
    rows = torch.randn(3, 16)
    packed = PackedLinear.from_linear(fc1)
    before = packed(rows)
    with torch.no_grad():
        fc1.weight.zero_()
    assert_same_bits(packed(rows), before)


def test_one_row_does_not_depend_on_the_others(backend):
    rows, (fc1, fc2) = torch.randn(2, 5, 16), linears()
    spoiled = rows.clone()
    spoiled[1, 3] = torch.nan
    with torch.no_grad():
        result = mlp_rows(spoiled, fc1, fc2, backend=backend)
    assert result[1, 3].isnan().all()
    assert result.isnan().sum() == 16


# --- the probe of oneDNN ---


@pytest.fixture
def fresh_probe():
    packing_unavailable.cache_clear()
    yield
    packing_unavailable.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "device", "reason"),
    [
        (torch.float16, "cpu", "oneDNN has no fast torch.float16 linear here"),
        (torch.int8, "cpu", "oneDNN has no fast torch.int8 linear here"),
        (torch.float32, "meta", "oneDNN packs for the CPU, the weight is on meta"),
    ],
)
def test_packing_says_why_not(dtype, device, reason):
    assert packing_unavailable(dtype, torch.device(device)) == reason
    weight = torch.ones(4, 4, dtype=dtype, device=device)
    with pytest.raises(RuntimeError, match=f"prepacked linear: not available: {reason}"):
        PackedLinear(weight, None)


def raises(error):
    def fails(*_):
        raise error

    return fails


@pytest.mark.parametrize(
    ("linear_pointwise", "reason"),
    [
        pytest.param(raises(RuntimeError("no primitive")), "no primitive", id="fails"),
        pytest.param(raises(NotImplementedError()), "NotImplementedError", id="fails-silently"),
        pytest.param(raises(AttributeError("renamed")), "renamed", id="is-gone"),
        pytest.param(lambda rows, *_: torch.zeros(3, 16), "gave a wrong product", id="is-wrong"),
    ],
)
def test_a_failing_probe_is_a_reason(linear_pointwise, reason, monkeypatch, fresh_probe):
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", linear_pointwise)
    assert reason in packing_unavailable(torch.float32, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=f"prepacked linear: not available: .*{reason}"):
        PackedLinear(torch.ones(4, 4), None)


# --- refusals ---

META = torch.device("meta")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param(
            {"rows": torch.randn(5, 16)},
            "rows: expected shape (B, k, C), got (5, 16)",
            id="rank-of-rows",
        ),
        pytest.param(
            {"rows": torch.randn(2, 5, 16).double()},
            "rows: expected dtype float32 or bfloat16 or float16, got float64",
            id="dtype-of-rows",
        ),
        pytest.param(
            {"rows": torch.randn(2, 16, 5).transpose(1, 2)},
            "rows: expected a contiguous tensor, got strides (80, 1, 5)",
            id="layout-of-rows",
        ),
        pytest.param(
            {"fc1": (torch.randn(24, 17), None)},
            "fc1 weight: expected shape (F, 16), got (24, 17)",
            id="channels-of-fc1",
        ),
        pytest.param(
            {"fc2": (torch.randn(16, 25), None)},
            "fc2 weight: expected shape (16, 24), got (16, 25)",
            id="hidden-of-fc2",
        ),
        pytest.param(
            {"fc1": (torch.randn(24, 16), torch.randn(16))},
            "fc1 bias: expected shape (24), got (16)",
            id="shape-of-bias",
        ),
        pytest.param(
            {"fc2": nn.Linear(24, 16).bfloat16()},
            "fc2 weight: expected dtype float32, got bfloat16",
            id="dtype-of-weight",
        ),
        pytest.param(
            {"fc1": nn.Linear(16, 24, device=META)},
            "fc1 weight: expected device cpu, got meta",
            id="device-of-weight",
        ),
        pytest.param(
            {"fc1": (torch.randn(16, 24).t(), None)},
            "fc1 weight: expected a contiguous tensor, got strides (1, 24)",
            id="layout-of-weight",
        ),
        pytest.param(
            {"activation": "relu"},
            "activation: expected one of gelu, gelu_tanh, silu, got 'relu'",
            id="unknown-activation",
        ),
        pytest.param({"backend": "numpy"}, "backend: expected one of", id="unknown-backend"),
    ],
)
def test_refuses(changed, message):
    fc1, fc2 = linears()
    given = {"rows": torch.randn(2, 5, 16), "fc1": fc1, "fc2": fc2}
    with pytest.raises(ValueError, match=re.escape(message)):
        mlp_rows(**(given | changed))


def test_refuses_packed_with_plain():
    need_packing(torch.float32)
    rows, (fc1, fc2) = torch.randn(2, 5, 16), linears()
    for mixed, name in (
        ((PackedLinear.from_linear(fc1), fc2), "fc1"),
        ((fc1, PackedLinear.from_linear(fc2)), "fc2"),
    ):
        message = f"{name}: expected both of fc1 and fc2 to be packed, or neither"
        with pytest.raises(ValueError, match=message):
            mlp_rows(rows, *mixed)


@pytest.mark.parametrize(
    ("rows", "hidden", "options", "message"),
    [
        pytest.param(
            torch.randn(2, 5, 17),
            24,
            {},
            "fc1: expected a weight (24, 17) of torch.float32, got (24, 16) of torch.float32",
            id="channels",
        ),
        pytest.param(
            torch.randn(2, 5, 16),
            25,
            {},
            "fc2: expected a weight (16, 24) of torch.float32, got (16, 25) of torch.float32",
            id="hidden",
        ),
        pytest.param(
            torch.randn(2, 5, 16).bfloat16(),
            24,
            {},
            "fc1: expected a weight (24, 16) of torch.bfloat16, got (24, 16) of torch.float32",
            id="dtype",
        ),
        pytest.param(
            torch.randn(2, 5, 16),
            24,
            {"backend": "reference"},
            "backend of packed weights: expected one of native, got 'reference'",
            id="backend",
        ),
    ],
)
def test_refuses_packed(rows, hidden, options, message):
    need_packing(torch.float32)
    fc1, fc2 = PackedLinear(torch.randn(24, 16), None), PackedLinear(torch.randn(16, hidden), None)
    with pytest.raises(ValueError, match=re.escape(message)):
        mlp_rows(rows, fc1, fc2, **options)


def test_activations_are_those_of_torch(backend):
    """Identity weights leave the activation."""
    rows, eye = torch.linspace(-6, 6, 48).view(1, 3, 16), (torch.eye(16), None)
    for name, want in (
        ("gelu", F.gelu(rows)),
        ("gelu_tanh", F.gelu(rows, approximate="tanh")),
        ("silu", F.silu(rows)),
    ):
        result = mlp_rows(rows, eye, eye, activation=name, backend=backend)
        torch.testing.assert_close(result, want)
