"""select_tokens: exact, so every comparison here is of equality."""

import math
import re

import pytest
import torch

import oracle
from toca_kernels import select_tokens
from tolerance import assert_same_bits


def normal(R, N):
    return torch.randn(R, N)


def few_levels(R, N):
    """Most scores are equal to others."""
    return torch.randint(-2, 3, (R, N)) / 4


def all_equal(R, N):
    return torch.full((R, N), 0.25)


def signed_zeros(R, N):
    return torch.zeros(R, N).copysign(torch.randn(R, N))


def with_specials(R, N):
    score = torch.randn(R, N)
    kind = torch.randint(0, 6, (R, N))
    for value, special in enumerate([math.nan, math.inf, -math.inf]):
        score[kind == value] = special
    return score


def all_nan(R, N):
    return torch.full((R, N), math.nan)


def any_bits(R, N):
    """Every kind of float32: subnormals, NaNs of all payloads, both infinities."""
    return torch.randint(-(2**31), 2**31, (R, N)).to(torch.int32).view(torch.float32)


def huge(R, N):
    return torch.randn(R, N) * 2e38


SCORES = [normal, few_levels, all_equal, signed_zeros, with_specials, all_nan, any_bits, huge]
TOCA = {"age_weight": 0.25, "grid": (16, 16), "cell": 4, "bonus": 0.6}

CASES = [
    pytest.param(4, 256, 26, TOCA, id="dit-xl"),
    pytest.param(3, 37, 5, {}, id="odd-n"),
    pytest.param(3, 37, 0, {"age_weight": 1.0}, id="none"),
    pytest.param(3, 37, 37, {"age_weight": 1.0}, id="all"),
    pytest.param(3, 37, 36, {}, id="all-but-one"),
    pytest.param(1, 1, 1, {"grid": (1, 1), "bonus": 1.0}, id="one-token"),
    pytest.param(0, 9, 4, {}, id="no-row"),
    pytest.param(2, 0, 0, {"grid": (0, 5), "bonus": 1.0}, id="no-token"),
    pytest.param(3, 20, (0, 20, 7), {"age_weight": 0.5}, id="ragged"),
    pytest.param(3, 20, (7, 7, 7), {}, id="one-number-for-each-row"),
    pytest.param(2, 35, 9, {"grid": (5, 7), "cell": 2, "bonus": 0.4}, id="grid-cut-by-2"),
    pytest.param(2, 35, 9, {"grid": (5, 7), "cell": 3, "bonus": 0.4}, id="grid-cut-by-3"),
    pytest.param(2, 105, 9, {"grid": (3, 5, 7), "cell": 4, "bonus": 0.4}, id="frames"),
    pytest.param(2, 12, 3, {"grid": (3, 4), "cell": 12, "bonus": 9.0}, id="tile-beyond-the-grid"),
    pytest.param(2, 35, 9, {"grid": (5, 7), "cell": 2, "bonus": 0.0}, id="no-bonus"),
    pytest.param(2, 35, 9, {"bonus": 0.5}, id="bonus-without-tiles"),
    pytest.param(2, 30, 8, {"age_weight": -0.125}, id="the-young-first"),
    pytest.param(70, 33, 8, {"age_weight": 0.1}, id="more-rows-than-threads"),
]


def random_age(R, N):
    return torch.randint(0, 50, (R, N), dtype=torch.int32)


def old_age(R, N):
    """Beyond 2**24 the float32 of an age is rounded."""
    return torch.randint(2**24, 2**31 - 1, (R, N), dtype=torch.int32)


def check_against_oracle(score, age, k, options, backend):
    R = score.shape[0]
    counts = [k] * R if isinstance(k, int) else list(k)
    new_age = age.clone()
    selection = select_tokens(score, new_age, k, **options, backend=backend)
    index, inverse, nan, oracle_age = oracle.select_tokens(
        score.numpy(), age.long().numpy(), counts, **options
    )
    shape = (R, k) if isinstance(k, int) else (sum(counts),)
    want = torch.tensor([n for row in index for n in row], dtype=torch.int64).view(shape)
    assert_same_bits(selection.index, want)
    assert_same_bits(selection.inverse, torch.from_numpy(inverse).int())
    assert_same_bits(selection.nan, torch.from_numpy(nan).int())
    assert_same_bits(new_age, torch.from_numpy(oracle_age).int())
    assert selection.k == tuple(counts)


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize(("R", "N", "k", "options"), CASES)
def test_reference_matches_oracle(R, N, k, options, scores):
    check_against_oracle(scores(R, N), random_age(R, N), k, options, "reference")


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize(("R", "N", "k", "options"), CASES)
def test_native_matches_oracle(R, N, k, options, scores, isa):
    check_against_oracle(scores(R, N), random_age(R, N), k, options, "native")


@pytest.mark.parametrize("age_weight", [1e-9, 3.0, -math.inf, math.nan])
def test_old_age(age_weight, backend):
    options = {"age_weight": age_weight}
    check_against_oracle(few_levels(3, 50), old_age(3, 50), 20, options, backend)


@pytest.mark.parametrize("threads", [1, 2])
def test_larger_than_a_digit_of_the_radix(threads, isa, with_threads):
    """Long rows, whose scores share their leading bits."""
    score = 1 + torch.rand(3, 5000) * 2.0**-12
    with_threads(
        threads, lambda: check_against_oracle(score, random_age(3, 5000), 1234, {}, "native")
    )


def test_low_index_wins_among_equals(backend):
    age = torch.zeros(1, 6, dtype=torch.int32)
    score = torch.tensor([[-0.0, 1.0, -0.0, 0.0, 1.0, 0.0]])
    # -0 + -1 * 0 is still -0, and equal to 0.
    selection = select_tokens(score, age, 4, age_weight=-1.0, backend=backend)
    assert selection.index.tolist() == [[0, 1, 2, 4]]


def test_bonus_is_exact(backend):
    """Token 1, without a bonus, is as good as token 2 with it, or one unit worse."""
    rewarded = torch.tensor(1.0) * (1 + torch.tensor(0.6))
    below = torch.nextafter(rewarded, torch.tensor(0.0))
    for value, chosen in ((rewarded, 1), (below, 2)):
        score = torch.tensor([[10.0, value, 1.0, 0.0]])
        age = torch.zeros(1, 4, dtype=torch.int32)
        selection = select_tokens(score, age, 2, grid=(1, 4), cell=2, bonus=0.6, backend=backend)
        assert selection.index.tolist() == [[0, chosen]]


def test_nan_is_counted_and_ranks_with_minus_infinity(backend):
    age = torch.zeros(1, 5, dtype=torch.int32)
    score = torch.tensor([[math.nan, -math.inf, 0.0, math.nan, -math.inf]])
    selection = select_tokens(score, age, 2, backend=backend)
    assert selection.index.tolist() == [[0, 2]]
    assert selection.nan.tolist() == [2]


def test_permuting_tokens_permutes_the_selection(backend):
    score, age, order = torch.randn(3, 41), random_age(3, 41), torch.randperm(41)
    first, second = age.clone(), age[:, order].contiguous()
    selection = select_tokens(score, first, 7, age_weight=0.3, backend=backend)
    permuted = select_tokens(
        score[:, order].contiguous(), second, 7, age_weight=0.3, backend=backend
    )
    assert torch.equal(order[permuted.index].sort().values, selection.index)
    assert torch.equal(second, first[:, order])


def test_age_brings_every_token_in_turn(backend):
    """With nothing but age, k of N tokens at a time, all are taken after N / k steps."""
    score, age = torch.zeros(1, 12), torch.zeros(1, 12, dtype=torch.int32)
    taken = [
        select_tokens(score, age, 3, age_weight=1.0, backend=backend).index.flatten().tolist()
        for _ in range(8)
    ]
    assert taken == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]] * 2


def test_same_bits_for_any_number_of_threads(isa, with_threads):
    score, start = with_specials(64, 300), random_age(64, 300)

    def run():
        age = start.clone()
        chosen = select_tokens(
            score, age, 31, age_weight=0.1, grid=(15, 20), cell=4, bonus=0.5, backend="native"
        )
        return chosen.index, chosen.inverse, chosen.nan, age

    for two, one in zip(with_threads(2, run), with_threads(1, run), strict=True):
        assert torch.equal(two, one)


def test_memory_round_the_ages_is_untouched(isa):
    wide = torch.full((5, 33), 77, dtype=torch.int32)
    select_tokens(torch.randn(3, 33), wide[1:-1], 9, backend="native")
    assert (wide[[0, -1]] == 77).all()


# --- Selection.rows ---


def test_rows_of_a_uniform_selection(backend):
    selection = select_tokens(torch.randn(6, 9), random_age(6, 9), 4, backend=backend)
    index, inverse = selection.rows(2, 4)
    assert torch.equal(index, selection.index[2:4])
    assert torch.equal(inverse, selection.inverse[2:4])


def test_rows_of_a_ragged_selection(backend):
    score, k = torch.randn(6, 9), (4, 4, 0, 0, 9, 9)
    selection = select_tokens(score, random_age(6, 9), k, backend=backend)
    for start in (0, 2, 4):
        index, inverse = selection.rows(start, start + 2)
        assert index.shape == (2, k[start])
        assert torch.equal(inverse, selection.inverse[start : start + 2])
        for row in range(2):
            assert (inverse[row] >= 0).nonzero().flatten().tolist() == index[row].tolist()
    assert selection.rows(3, 3)[0].shape == (0, 0)


def test_rows_refuses():
    selection = select_tokens(torch.randn(3, 9), random_age(3, 9), (1, 2, 2))
    with pytest.raises(ValueError, match=re.escape("rows 0..2: expected one k, got [1, 2]")):
        selection.rows(0, 3)
    for start, stop in ((2, 4), (-1, 2), (2, 1)):
        message = f"rows: expected a range in 0..3, got {start}..{stop}"
        with pytest.raises(ValueError, match=re.escape(message)):
            selection.rows(start, stop)


# --- refusals ---

META = torch.device("meta")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param({"score": None}, "score: expected a tensor, got NoneType", id="no-tensor"),
        pytest.param(
            {"score": torch.randn(12)},
            "score: expected shape (R, N), got (12)",
            id="rank-of-score",
        ),
        pytest.param(
            {"score": torch.randn(2, 12).bfloat16()},
            "score: expected dtype float32, got bfloat16",
            id="dtype-of-score",
        ),
        pytest.param(
            {"score": torch.randn(12, 2).t()},
            "score: expected a contiguous tensor, got strides (1, 2)",
            id="layout-of-score",
        ),
        pytest.param(
            {"score": torch.randn(2, 12, device=META)},
            "age: expected device meta, got cpu",
            id="device",
        ),
        pytest.param(
            {"score": torch.randn(2, 13)},
            "age: expected shape (2, 13), got (2, 12)",
            id="shape-of-age",
        ),
        pytest.param({"k": 13}, "k: expected 0 <= k <= 12, got 13", id="k-above-n"),
        pytest.param({"k": -1}, "k: expected 0 <= k <= 12, got -1", id="negative-k"),
        pytest.param({"k": (3, 13)}, "k: expected 0 <= k <= 12, got 13", id="k-of-one-row"),
        pytest.param({"k": True}, "k: expected an integer, got True", id="bool-k"),
        pytest.param({"k": (1, True)}, "k: expected an integer, got True", id="bool-in-k"),
        pytest.param({"k": 2.0}, "k: expected an integer, got 2.0", id="float-k"),
        pytest.param({"k": None}, "k: expected an integer, got None", id="no-k"),
        pytest.param(
            {"k": (1, 2, 3)}, "k: expected 2 numbers, one for each row, got 3", id="number-of-k"
        ),
        pytest.param({"cell": 0}, "cell: expected 1 <= cell <= 12, got 0", id="cell-0"),
        pytest.param({"cell": 13}, "cell: expected 1 <= cell <= 12, got 13", id="cell-above-n"),
        pytest.param({"cell": 2.0}, "cell: expected an integer, got 2.0", id="float-cell"),
        pytest.param(
            {"bonus": -0.5}, "bonus: expected a finite number >= 0, got -0.5", id="negative-bonus"
        ),
        pytest.param(
            {"bonus": math.nan}, "bonus: expected a finite number >= 0, got nan", id="nan-bonus"
        ),
        pytest.param(
            {"bonus": math.inf}, "bonus: expected a finite number >= 0, got inf", id="inf-bonus"
        ),
        pytest.param(
            {"grid": None},
            "grid: expected (rows, cols) or (frames, rows, cols), got None",
            id="bonus-without-grid",
        ),
        pytest.param(
            {"grid": (3, 5)},
            "grid: expected a grid of 12 tokens, got (3, 5) = 15",
            id="size-of-grid",
        ),
        pytest.param(
            {"grid": (12,)},
            "grid: expected (rows, cols) or (frames, rows, cols), got (12,)",
            id="rank-of-grid",
        ),
        pytest.param(
            {"grid": (-3, -4)},
            "grid: expected (rows, cols) or (frames, rows, cols), got (-3, -4)",
            id="negative-grid",
        ),
        pytest.param(
            {"tie": "random"}, "tie: expected one of low-index, got 'random'", id="unknown-tie"
        ),
        pytest.param({"backend": "numpy"}, "backend: expected one of", id="unknown-backend"),
    ],
)
def test_refuses_and_changes_nothing(changed, message):
    age = torch.arange(24, dtype=torch.int32).view(2, 12)
    given = {"score": torch.randn(2, 12), "k": 3, "grid": (3, 4), "cell": 2, "bonus": 0.5}
    given |= changed
    with pytest.raises(ValueError, match=re.escape(message)):
        select_tokens(given.pop("score"), age, given.pop("k"), **given)
    assert torch.equal(age, torch.arange(24, dtype=torch.int32).view(2, 12))


@pytest.mark.parametrize(
    ("age", "message"),
    [
        pytest.param(torch.zeros(2, 12), "expected dtype int32, got float32", id="dtype"),
        pytest.param(
            torch.zeros(12, 2, dtype=torch.int32).t(), "expected a contiguous tensor", id="layout"
        ),
        pytest.param(
            torch.zeros(1, 12, dtype=torch.int32).expand(2, 12),
            "expected a contiguous tensor",
            id="one-row-for-all",
        ),
    ],
)
def test_refuses_ages(age, message):
    with pytest.raises(ValueError, match=f"age: {message}"):
        select_tokens(torch.randn(2, 12), age, 3)


def test_k_is_checked_without_rows():
    with pytest.raises(ValueError, match="k: expected 0 <= k <= 12, got 13"):
        select_tokens(torch.randn(0, 12), torch.zeros(0, 12, dtype=torch.int32), 13)
