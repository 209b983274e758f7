"""select_tokens in Triton's interpreter: equal to the reference, bit for bit."""

import pytest
import torch

import interpreter
from interpreter import needs_triton
from toca_kernels import select_tokens

pytestmark = needs_triton

NONE = {}
BONUS = {"cell": 2, "bonus": 0.6}

CASES = [
    pytest.param(4, 256, 18, {"grid": (16, 16), **BONUS, "age_weight": 0.0625}, id="dit-xl"),
    pytest.param(3, 256, [0, 256, 17], {"grid": (16, 16), **BONUS}, id="ragged"),
    pytest.param(2, 35, 7, {"grid": (5, 7), "cell": 3, "bonus": 0.4}, id="border-tiles-cut-short"),
    pytest.param(2, 60, 9, {"grid": (3, 4, 5), **BONUS}, id="frames"),
    pytest.param(2, 24, 5, {"grid": (4, 6), "cell": 24, "bonus": 1.0}, id="one-tile"),
    pytest.param(2, 20, 6, {"grid": (20, 1, 1), **BONUS}, id="a-tile-for-each-token"),
    pytest.param(2, 33, 1, NONE, id="best-only"),
    pytest.param(2, 33, 33, NONE, id="all"),
    pytest.param(2, 33, 0, NONE, id="none"),
    pytest.param(1, 1, 1, NONE, id="one-token"),
    pytest.param(0, 5, 2, NONE, id="no-row"),
    pytest.param(2, 0, 0, NONE, id="no-token"),
    pytest.param(1, 9001, 900, {"age_weight": 0.1}, id="three-chunks"),
    pytest.param(1, 131072, 13107, {"grid": (32, 64, 64), **BONUS}, id="video"),
    pytest.param(1, 9000, 900, {"grid": (90, 100), **BONUS}, id="tiles-across-chunks"),
]


def compare(score, age, k, **options):
    """The selection of both backends is the same, and so are the ages."""
    expected_age = age.clone()
    result = interpreter.call("select_tokens", score, age, k, **options)
    expected = select_tokens(score, expected_age, k, **options, backend="reference")
    assert torch.equal(result.index, expected.index)
    assert torch.equal(result.inverse, expected.inverse)
    assert torch.equal(result.nan, expected.nan)
    assert torch.equal(age, expected_age)
    assert result.k == expected.k
    return result


def ages(R, N):
    return torch.randint(0, 9, (R, N), dtype=torch.int32)


@pytest.mark.parametrize(("R", "N", "k", "options"), CASES)
def test_equals_reference(R, N, k, options):
    compare(torch.randn(R, N), ages(R, N), k, **options)


@pytest.mark.parametrize("k", [1, 5, 20, 39])
def test_ties_go_to_the_lower_index(k):
    compare(torch.randint(0, 3, (3, 40)).float(), ages(3, 40) % 2, k, age_weight=1.0)
    compare(torch.zeros(1, 40), ages(1, 40), k, grid=(5, 8), **BONUS)


def test_signed_zeros_are_equal():
    score = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0]])
    assert compare(score, torch.zeros(1, 5, dtype=torch.int32), 3).index.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("k", [0, 1, 3, 6])
def test_nan_ranks_with_minus_infinity_and_is_counted(k):
    nan, inf = torch.nan, torch.inf
    score = torch.tensor([[nan, 1.0, -inf, nan, inf, 0.0], [nan] * 6])
    compare(score, ages(2, 6), k, age_weight=0.5)
    compare(score, ages(2, 6), k, age_weight=0.5, grid=(2, 3), **BONUS)


def test_extremes():
    tiny, huge = 1e-45, 3.4028235e38
    score = torch.tensor([[tiny, -tiny, huge, -huge, 1.1754944e-38, 0.0, torch.inf, -torch.inf]])
    for k in range(9):
        compare(score, torch.zeros(1, 8, dtype=torch.int32), k)
        compare(score, torch.zeros(1, 8, dtype=torch.int32), k, grid=(2, 4), **BONUS)


def test_age_counts_as_in_the_reference():
    """Sums that a fused multiply-add would round to another float32."""
    score = torch.rand(4, 300) * 1e-3
    age = torch.randint(0, 1 << 30, (4, 300), dtype=torch.int32)
    compare(score, age, 30, age_weight=1e-9 / 3)


def test_ages_over_many_steps():
    age = torch.zeros(2, 50, dtype=torch.int32)
    for _ in range(6):
        compare(torch.randn(2, 50), age, 11, age_weight=0.3)
