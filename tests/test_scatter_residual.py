"""scatter_residual: moved rows are equal to the bit, sums are within the budget."""

import functools
import re

import pytest
import torch

import oracle
from toca_kernels import gather_modulate, scatter_residual, select_tokens
from tolerance import (
    assert_backend_within_budget,
    assert_reference_within_bound,
    assert_same_bits,
    exact_values,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# B, N, C, k, one word for each update: its gate, "+" where it has fresh rows
CASES = [
    pytest.param(1, 256, 1152, 26, "chunk chunk+", id="dit-xl"),
    pytest.param(2, 13, 37, 5, "vector vector+", id="odd-n-and-c"),
    pytest.param(2, 13, 37, 0, "vector vector+", id="no-fresh-row"),
    pytest.param(2, 13, 37, 13, "vector vector+", id="all-fresh"),
    pytest.param(1, 9, 3, 4, "vector vector+", id="fewer-channels-than-lanes"),
    pytest.param(3, 5, 1, 2, "vector vector+", id="one-channel"),
    pytest.param(2, 1, 24, 1, "vector vector+", id="one-token"),
    pytest.param(0, 9, 24, 4, "vector vector+", id="no-sample"),
    pytest.param(2, 0, 24, 0, "vector vector+", id="no-token"),
    pytest.param(2, 9, 0, 4, "vector vector+", id="no-channel"),
    pytest.param(2, 13, 40, 5, "vector", id="one-cached"),
    pytest.param(2, 13, 40, 5, "none+", id="one-fresh-ungated"),
    pytest.param(2, 13, 40, 5, "vector vector", id="two-cached"),
    pytest.param(2, 13, 40, 5, "vector+ vector+", id="two-fresh"),
    pytest.param(2, 13, 40, 5, "vector+ vector", id="fresh-then-cached"),
    pytest.param(2, 13, 40, 5, "none vector+", id="ungated-then-fresh"),
    pytest.param(2, 13, 40, 5, "vector none+ token+", id="three"),
    pytest.param(2, 13, 37, 5, "token tokenchunk+ none chunk+", id="four"),
]


def make_gate(kind, B, N, C, dtype):
    if kind == "none":
        return None
    if kind == "vector":
        return torch.randn(B, C).to(dtype)
    if kind == "chunk":
        return torch.randn(B, 6 * C).to(dtype).chunk(6, dim=1)[2]
    if kind == "token":
        return torch.randn(B, N, C).to(dtype)
    return torch.randn(B, N, 3 * C).to(dtype).chunk(3, dim=2)[1]


def selected(B, N, k):
    """(index, inverse) of k tokens of every sample."""
    age = torch.zeros(B, N, dtype=torch.int32)
    return select_tokens(torch.rand(B, N), age, k, backend="reference").rows(0, B)


@functools.cache
def problem(B, N, C, k, gates, dtype):
    torch.manual_seed(1)
    updates = []
    for word in gates.split():
        update = (make_gate(word.rstrip("+"), B, N, C, dtype), torch.randn(B, N, C).to(dtype))
        if word.endswith("+"):
            update += (torch.randn(B, k, C).to(dtype), selected(B, N, k)[1])
        updates.append(update)
    x = torch.randn(B, N, C).to(dtype)
    exact, caches = oracle.scatter_residual(
        exact_values(x), [tuple(map(exact_values, update)) for update in updates]
    )
    reference = run(x, updates, "reference")
    return x, updates, reference, exact, [torch.from_numpy(cache).to(dtype) for cache in caches]


def run(x, updates, backend, **options):
    """(result, caches afterwards) of copies of x and of the caches."""
    copies = [(gate, cache.clone(), *moved) for gate, cache, *moved in updates]
    result = scatter_residual(x.clone(), copies, backend=backend, **options)
    return result, [copy[1] for copy in copies]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "N", "C", "k", "gates"), CASES)
def test_reference_matches_oracle(B, N, C, k, gates, dtype):
    _, _, (result, caches), exact, exact_caches = problem(B, N, C, k, gates, dtype)
    assert_reference_within_bound(result, exact)
    for cache, exact_cache in zip(caches, exact_caches, strict=True):
        assert_same_bits(cache, exact_cache)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "N", "C", "k", "gates"), CASES)
def test_native_matches_reference(B, N, C, k, gates, dtype, isa):
    x, updates, (reference, _), exact, exact_caches = problem(B, N, C, k, gates, dtype)
    result, caches = run(x, updates, "native")
    assert result.dtype == dtype
    assert_backend_within_budget(result, reference, exact)
    for cache, exact_cache in zip(caches, exact_caches, strict=True):
        assert_same_bits(cache, exact_cache)


@pytest.mark.parametrize("gates", ["vector vector+", "none token+ vector+"])
def test_inplace_writes_the_same_into_x(gates, backend):
    x, updates, *_ = problem(2, 13, 37, 5, gates, torch.float32)
    want, want_caches = run(x, updates, backend)
    x = x.clone()
    copies = [(gate, cache.clone(), *moved) for gate, cache, *moved in updates]
    result = scatter_residual(x, copies, inplace=True, backend=backend)
    assert result is x
    assert_same_bits(x, want)
    for copy, cache in zip(copies, want_caches, strict=True):
        assert_same_bits(copy[1], cache)


def test_only_caches_with_fresh_rows_and_x_in_place_are_written(backend):
    x, updates, *_ = problem(2, 13, 37, 5, "vector vector+", torch.float32)
    given = [x.clone(), *(value.clone() for update in updates for value in update)]
    tensors = [x, *(value for update in updates for value in update)]
    kept = updates[1][1].clone()
    result = scatter_residual(x, updates, backend=backend)
    updates[1][1].copy_(kept)
    assert result.data_ptr() != x.data_ptr()
    for tensor, before in zip(tensors, given, strict=True):
        assert_same_bits(tensor, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_bit_pattern_is_moved_as_it_is(dtype, isa):
    """Subnormals, infinities and NaNs too, which arithmetic could flush or quieten."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    fresh = bits.view(1, 64, 1024).view(dtype)
    cache, inverse = torch.zeros_like(fresh), torch.arange(64, dtype=torch.int32)[None]
    scatter_residual(torch.zeros_like(fresh), [(None, cache, fresh, inverse)], backend="native")
    assert torch.equal(cache.view(torch.int16), fresh.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_passes_through_float32(dtype, isa):
    """x + 0 is x.  Subnormal bfloat16 may become 0: AVX512-BF16 converts so."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(1, 64, 1024).view(dtype)
    result = scatter_residual(x, [(None, torch.full_like(x, -0.0))], backend="native")
    if dtype == torch.bfloat16:
        subnormal = x.abs() < torch.finfo(dtype).tiny
        assert ((result == x) | (result == 0))[subnormal].all()
        x, result = x[~subnormal], result[~subnormal]
    assert_same_bits(result, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_round_to_nearest_even(dtype, isa):
    """Sums of two values that lie on, just above and just below a tie."""
    x = torch.randn(2, 40, 100).to(dtype)
    half = x.float().abs().log2().floor().exp2() * torch.finfo(dtype).eps / 2
    tie = (half * torch.tensor([-1.0, 1.0, 1.01, 0.99]).repeat(25)).to(dtype)
    result = scatter_residual(x, [(None, tie)], backend="native")
    assert_same_bits(result, (x.float() + tie.float()).to(dtype))


def test_overflow_is_infinity(isa):
    x = torch.full((1, 1, 40), 60000.0, dtype=torch.float16)
    assert (scatter_residual(x, [(None, x.clone())], backend="native") == torch.inf).all()
    x = torch.full((1, 1, 40), 3.3e38)
    assert (scatter_residual(-x, [(None, -x)], backend="native") == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_round_the_tensors_is_untouched(dtype, isa):
    x, updates, *_ = problem(2, 13, 37, 5, "vector vector+", dtype)
    want, want_caches = run(x, updates, "native")
    (gate, cache), (gate2, cache2, fresh, inverse) = updates
    frames = [torch.full((4, 13, 37), 123.0, dtype=dtype) for _ in range(3)]
    for frame, inside in zip(frames, (x, cache, cache2), strict=True):
        frame[1:-1] = inside
    x, cache, cache2 = (frame[1:-1] for frame in frames)
    scatter_residual(
        x, [(gate, cache), (gate2, cache2, fresh, inverse)], inplace=True, backend="native"
    )
    for frame, inside in zip(frames, (want, *want_caches), strict=True):
        assert_same_bits(frame[1:-1], inside)
        assert (frame[[0, -1]] == 123.0).all()


def test_permuting_tokens_permutes_the_result(backend):
    x, updates, *_ = problem(2, 13, 37, 5, "vector vector+", torch.float32)
    order = torch.randperm(13)
    (gate, cache), (gate2, cache2, fresh, inverse) = updates
    moved = [
        (gate, cache[:, order].contiguous()),
        (gate2, cache2[:, order].contiguous(), fresh, inverse[:, order].contiguous()),
    ]
    result, caches = run(x, updates, backend)
    permuted, permuted_caches = run(x[:, order].contiguous(), moved, backend)
    assert_same_bits(permuted, result[:, order])
    assert_same_bits(permuted_caches[1], caches[1][:, order])


def test_index_and_scatter_round_trip(backend):
    """Rows that were taken out by an index come back to their places by its inverse."""
    index, inverse = selected(3, 20, 7)
    tokens = torch.randn(3, 20, 9)
    rows = tokens.gather(1, index[:, :, None].expand(-1, -1, 9))
    cache = torch.zeros(3, 20, 9)
    scatter_residual(torch.zeros_like(tokens), [(None, cache, rows, inverse)], backend=backend)
    chosen = torch.zeros(3, 20, dtype=torch.bool).scatter(1, index, True)
    assert_same_bits(cache, torch.where(chosen[:, :, None], tokens, 0.0))


def test_gather_takes_what_scatter_adds(backend):
    """Both ops add gate * cache; an identity norm shows that they add the same."""
    x, updates, *_ = problem(2, 13, 37, 5, "vector", torch.float32)
    zero = torch.zeros(2, 37)
    summed, _ = run(x, updates, backend)
    want = gather_modulate(summed, None, zero, zero, norm="rms", backend=backend)
    have = gather_modulate(x, None, zero, zero, residual=updates[0], norm="rms", backend=backend)
    torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-6)


def test_same_bits_for_any_number_of_threads(isa, with_threads):
    x, updates, *_ = problem(2, 13, 37, 5, "token tokenchunk+ none chunk+", torch.bfloat16)
    two, caches_of_two = with_threads(2, lambda: run(x, updates, "native"))
    one, caches_of_one = with_threads(1, lambda: run(x, updates, "native"))
    assert_same_bits(two, one)
    for a, b in zip(caches_of_two, caches_of_one, strict=True):
        assert_same_bits(a, b)


# --- refusals ---


def valid():
    x = torch.randn(2, 13, 8)
    _, inverse = selected(2, 13, 4)
    update = (torch.randn(2, 8), torch.randn(2, 13, 8), torch.randn(2, 4, 8), inverse)
    return x, update


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("k", "bad"), [(4, -2), (4, 4), (4, 2**31 - 1), (4, -(2**31)), (0, 0)])
def test_refuses_a_slot_out_of_range_and_changes_nothing(k, bad, inplace, backend):
    """Only the second update is wrong: the first must not have been written either."""
    x, (gate, cache, fresh, inverse) = valid()
    wrong = torch.full_like(inverse, -1)
    wrong[1, 12] = bad
    second = torch.randn(2, 13, 8)
    kept = [tensor.clone() for tensor in (x, cache, second)]
    updates = [(gate, cache, fresh, inverse), (gate, second, fresh[:, :k].contiguous(), wrong)]
    with pytest.raises(ValueError, match=rf"inverse: expected values in \[-1, {k}\), got .*{bad}"):
        scatter_residual(x, updates, inplace=inplace, backend=backend)
    for tensor, before in zip((x, cache, second), kept, strict=True):
        assert_same_bits(tensor, before)


GATE, CACHE, FRESH, INVERSE = range(4)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        pytest.param(
            GATE, torch.randn(8), "gate: expected shape (2, 8), got (8)", id="rank-of-gate"
        ),
        pytest.param(
            GATE,
            torch.randn(2, 8, 13).transpose(1, 2),
            "gate: expected a contiguous last dimension, got strides (104, 1, 13)",
            id="layout-of-gate",
        ),
        pytest.param(
            GATE,
            torch.randn(2, 8).half(),
            "gate: expected dtype float32, got float16",
            id="dtype-of-gate",
        ),
        pytest.param(CACHE, None, "cache: expected a tensor, got NoneType", id="no-cache"),
        pytest.param(
            CACHE,
            torch.randn(2, 12, 8),
            "cache: expected shape (2, 13, 8), got (2, 12, 8)",
            id="shape-of-cache",
        ),
        pytest.param(
            CACHE,
            torch.randn(1, 13, 8).expand(2, 13, 8),
            "cache: expected a contiguous tensor, got strides (0, 8, 1)",
            id="one-cache-for-all-samples",
        ),
        pytest.param(
            CACHE,
            torch.randn(2, 13, 8).bfloat16(),
            "cache: expected dtype float32, got bfloat16",
            id="dtype-of-cache",
        ),
        pytest.param(
            CACHE,
            torch.randn(2, 13, 8, device="meta"),
            "cache: expected device cpu, got meta",
            id="device-of-cache",
        ),
        pytest.param(
            FRESH,
            torch.randn(2, 4, 9),
            "fresh: expected shape (2, k, 8), got (2, 4, 9)",
            id="shape-of-fresh",
        ),
        pytest.param(
            FRESH,
            torch.randn(4, 2, 8).transpose(0, 1),
            "fresh: expected a contiguous tensor, got strides (8, 16, 1)",
            id="layout-of-fresh",
        ),
        pytest.param(
            FRESH,
            torch.randn(2, 4, 8).bfloat16(),
            "fresh: expected dtype float32, got bfloat16",
            id="dtype-of-fresh",
        ),
        pytest.param(
            INVERSE,
            torch.full((2, 12), -1, dtype=torch.int32),
            "inverse: expected shape (2, 13), got (2, 12)",
            id="shape-of-inverse",
        ),
        pytest.param(
            INVERSE,
            torch.full((2, 13), -1),
            "inverse: expected dtype int32, got int64",
            id="dtype-of-inverse",
        ),
        pytest.param(
            INVERSE,
            torch.full((13, 2), -1, dtype=torch.int32).t(),
            "inverse: expected a contiguous tensor, got strides (1, 2)",
            id="layout-of-inverse",
        ),
    ],
)
def test_refuses_an_update_and_changes_nothing(part, value, message):
    """The second update of two, which the message names."""
    x, update = valid()
    cache = update[CACHE].clone()
    wrong = list(update)
    wrong[part] = value
    with pytest.raises(ValueError, match=re.escape(f"updates[1] {message}")):
        scatter_residual(x, [update, tuple(wrong)], inplace=True)
    assert_same_bits(update[CACHE], cache)


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (0, "updates: expected 1 to 4, got 0"),
        (5, "updates: expected 1 to 4, got 5"),
    ],
)
def test_refuses_a_number_of_updates(count, message):
    x, update = valid()
    with pytest.raises(ValueError, match=message):
        scatter_residual(x, [update] * count)


@pytest.mark.parametrize("length", [1, 3])
def test_refuses_a_length_of_an_update(length):
    x, update = valid()
    message = "updates[0]: expected (gate, cache) or (gate, cache, fresh, inverse), got "
    with pytest.raises(ValueError, match=re.escape(f"{message}{length} values")):
        scatter_residual(x, [update[:length]])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        pytest.param(torch.randn(13, 8), "x: expected shape (B, N, C), got (13, 8)", id="rank"),
        pytest.param(
            torch.ones(2, 13, 8, dtype=torch.int32),
            "x: expected dtype float32 or bfloat16 or float16, got int32",
            id="dtype",
        ),
        pytest.param(
            torch.randn(13, 2, 8).transpose(0, 1),
            "x: expected a contiguous tensor, got strides (8, 16, 1)",
            id="layout",
        ),
    ],
)
def test_refuses_x(x, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        scatter_residual(x, [valid()[1]])
