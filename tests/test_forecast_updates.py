"""scatter_residual, gather_modulate and partial_mlp with forecast caches.

What is written is equal to the bit in every body, sums are within the budget.
"""

import functools

import pytest
import torch

import oracle
import toca_kernels as toca
from forecast import (
    assert_same_cache,
    call,
    clone,
    every_dtype,
    every_stage,
    exact,
    new_cache,
    selected,
)
from interpreter import needs_triton
from test_eight_bit_updates import make_gate
from tolerance import (
    assert_backend_within_budget,
    assert_reference_within_bound,
    assert_same_bits,
    exact_values,
)

# B, N, C, k, one word for each update: how many slopes @ how often all tokens have been computed
# (or "plain"), "+" where it has fresh rows, its gate
CASES = [
    pytest.param(1, 64, 1152, 7, "1@2:sample 1@2+:sample", id="dit-xl"),
    pytest.param(1, 64, 1152, 7, "2@3:sample 2@3+:sample", id="dit-xl-second-order"),
    pytest.param(2, 13, 37, 5, "1@6:sample 1@6+:sample", id="odd"),
    pytest.param(2, 13, 37, 5, "2@5:sample 2@5+:sample", id="odd-second-order"),
    pytest.param(2, 13, 37, 5, "1@1:sample 1@1+:sample", id="computed-once"),
    pytest.param(2, 13, 37, 5, "2@1:sample 2@1+:sample", id="computed-once-second-order"),
    pytest.param(2, 13, 37, 5, "2@2:sample 2@2+:sample", id="computed-twice"),
    pytest.param(2, 13, 37, 13, "1@0+:sample 2@0+:sample", id="never-computed"),
    pytest.param(2, 13, 37, 0, "1@2:sample 2@3+:sample", id="no-fresh-row"),
    pytest.param(2, 13, 37, 13, "1@2+:sample 2@3+:sample", id="all-fresh"),
    pytest.param(2, 13, 37, 5, "plain:sample 1@2+:sample", id="plain-then-forecast"),
    pytest.param(2, 13, 37, 5, "2@3+:sample plain:sample", id="forecast-then-plain"),
    pytest.param(2, 13, 37, 5, "1@2+:sample plain+:sample", id="both-fresh"),
    pytest.param(2, 13, 37, 5, "1@2:none", id="one-without-gate"),
    pytest.param(2, 13, 37, 5, "2@3+:token", id="one-by-token"),
    pytest.param(2, 13, 40, 5, "1@2:token plain+:none 2@4+:sample", id="three"),
    pytest.param(2, 13, 37, 5, "2@3+:token 1@1:none 2@2:sample plain+:token", id="four"),
    pytest.param(3, 5, 1, 2, "1@2:sample 2@3+:sample", id="one-channel"),
    pytest.param(1, 9, 3, 4, "1@2:sample 2@3+:sample", id="fewer-channels-than-lanes"),
    pytest.param(0, 9, 24, 4, "1@2:sample 1@2+:sample", id="no-sample"),
    pytest.param(2, 0, 24, 0, "1@2:sample 1@2+:sample", id="no-token"),
    pytest.param(2, 9, 0, 4, "1@2:sample 2@3+:sample", id="no-channel"),
]


def make_cache(name, B, N, C, dtype):
    if name == "plain":
        return torch.randn(B, N, C).to(dtype)
    return new_cache(B, N, C, dtype, *map(int, name.split("@")))


def make_updates(B, N, C, k, words, dtype):
    updates = []
    for word in words.split():
        name, gate = word.split(":")
        update = (make_gate(gate, B, N, C, dtype), make_cache(name.rstrip("+"), B, N, C, dtype))
        if name.endswith("+"):
            update += (torch.randn(B, k, C).to(dtype), selected(B, N, k)[1])
        updates.append(update)
    return updates


@functools.cache
def problem(B, N, C, k, words, dtype):
    torch.manual_seed(1)
    updates = make_updates(B, N, C, k, words, dtype)
    x = torch.randn(B, N, C).to(dtype)
    wanted, _ = oracle.scatter_residual(
        exact_values(x),
        [
            (exact_values(gate), exact(cache), *map(exact_values, moved))
            for gate, cache, *moved in updates
        ],
    )
    return x, updates, *run(x, updates, "reference"), wanted


def run(x, updates, backend, **options):
    """(result, caches afterwards) of copies."""
    copies = [(gate, clone(cache), *moved) for gate, cache, *moved in updates]
    result = call("scatter_residual", x.clone(), copies, backend=backend, **options)
    return result, [copy[1] for copy in copies]


def rows_of(fresh, inverse):
    """The fresh row of every token, and which tokens have one."""
    source = inverse.clamp(min=0).long()[:, :, None].expand(*inverse.shape, fresh.shape[2])
    return fresh.gather(1, source), inverse >= 0


@every_dtype
@pytest.mark.parametrize(("B", "N", "C", "k", "words"), CASES)
def test_scatter_reference_matches_oracle(B, N, C, k, words, dtype):
    _, updates, result, caches, wanted = problem(B, N, C, k, words, dtype)
    assert_reference_within_bound(result, wanted)
    for (_, before, *moved), after in zip(updates, caches, strict=True):
        want = clone(before)
        if moved and k > 0:
            rows, chosen = rows_of(*moved)
            if isinstance(want, torch.Tensor):
                want[chosen] = rows[chosen]
            else:
                # A fresh row is written as a full step writes it, and that is tested.
                whole = clone(before)
                toca.store_rows(whole, rows, backend="reference")
                for kept, new in zip(
                    (want.values, *want.slopes), (whole.values, *whole.slopes), strict=True
                ):
                    kept[chosen] = new[chosen]
        assert_same_cache(after, want)


@every_dtype
@pytest.mark.parametrize(("B", "N", "C", "k", "words"), CASES)
def test_scatter_native_matches_reference(B, N, C, k, words, dtype, isa):
    x, updates, reference, caches, wanted = problem(B, N, C, k, words, dtype)
    result, have = run(x, updates, "native")
    assert_backend_within_budget(result, reference, wanted)
    for cache, want in zip(have, caches, strict=True):
        assert_same_cache(cache, want)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "N", "C", "k", "words"), CASES)
def test_scatter_triton_matches_reference(B, N, C, k, words, dtype):
    x, updates, reference, caches, wanted = problem(B, N, C, k, words, dtype)
    result, have = run(x, updates, "triton")
    assert_backend_within_budget(result, reference, wanted)
    for cache, want in zip(have, caches, strict=True):
        assert_same_cache(cache, want)


def test_inplace_writes_the_same_into_x(backend):
    x, updates, *_ = problem(2, 13, 40, 5, "1@2:token plain+:none 2@4+:sample", torch.float32)
    want, want_caches = run(x, updates, backend)
    have, caches = run(x, updates, backend, inplace=True)
    assert_same_bits(have, want)
    for cache, wanted in zip(caches, want_caches, strict=True):
        assert_same_cache(cache, wanted)


def test_a_fresh_row_is_added_as_it_is(backend):
    """Whatever was there: a NaN of a replaced row is gone, and one of another stays."""
    inverse = torch.tensor([[-1, 0, -1, -1, 1, -1]], dtype=torch.int32)
    nan = torch.full((1, 6, 8), torch.nan)
    cache = toca.ForecastCache(nan.clone(), (nan.clone(),), torch.full((1, 6), 2.0), 2)
    fresh = torch.randn(1, 2, 8)
    result = toca.scatter_residual(
        torch.zeros(1, 6, 8), [(None, cache, fresh, inverse)], backend=backend
    )
    assert_same_bits(result[:, [1, 4]], fresh)
    assert result[:, [0, 2, 3, 5]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_bit_pattern_is_moved_as_it_is(dtype, isa):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    fresh = bits.view(1, 64, 1024).view(dtype)
    zeros, inverse = torch.zeros_like(fresh), torch.arange(64, dtype=torch.int32)[None]
    cache = toca.ForecastCache(zeros.clone(), (zeros.clone(),), torch.ones(1, 64), 2)
    toca.scatter_residual(zeros, [(None, cache, fresh, inverse)], backend="native")
    assert torch.equal(cache.values.view(torch.int16), bits.view(1, 64, 1024))
    toca.store_rows(cache, fresh.roll(1, dims=1), backend="native")
    assert torch.equal(cache.values.view(torch.int16), bits.view(1, 64, 1024).roll(1, dims=1))


@every_dtype
def test_memory_round_a_cache_is_untouched(dtype, isa):
    x, updates, *_ = problem(2, 13, 37, 5, "1@2:sample 2@3+:sample", dtype)
    (gate, cache, fresh, inverse) = updates[1]
    want, (_, want_cache) = run(x, updates, "native")
    frames = [torch.full((4, 13, 37), 123.0, dtype=dtype) for _ in range(3)]
    for frame, inside in zip(frames, (cache.values, *cache.slopes), strict=True):
        frame[1:-1] = inside
    values, *slopes = (frame[1:-1] for frame in frames)
    framed = cache._replace(values=values, slopes=tuple(slopes))
    result = toca.scatter_residual(
        x, [updates[0], (gate, framed, fresh, inverse)], backend="native"
    )
    assert_same_bits(result, want)
    assert_same_cache(framed, want_cache)
    for frame in frames:
        assert (frame[[0, -1]] == 123.0).all()


def test_same_bits_for_any_number_of_threads(isa, with_threads):
    words = "2@3+:token 1@1:none 2@2:sample plain+:token"
    x, updates, *_ = problem(2, 13, 37, 5, words, torch.bfloat16)
    two, caches_of_two = with_threads(2, lambda: run(x, updates, "native"))
    one, caches_of_one = with_threads(1, lambda: run(x, updates, "native"))
    assert_same_bits(two, one)
    for a, b in zip(caches_of_two, caches_of_one, strict=True):
        assert_same_cache(a, b)


# --- gather_modulate ---

GATHER = [
    pytest.param(2, 13, 37, 5, "sample", id="odd"),
    pytest.param(2, 13, 37, 5, "token", id="by-token"),
    pytest.param(2, 13, 37, 5, "none", id="without-gate"),
    pytest.param(2, 13, 40, None, "sample", id="every-token"),
    pytest.param(2, 13, 40, 0, "sample", id="none-selected"),
    pytest.param(0, 13, 40, 5, "sample", id="no-sample"),
    pytest.param(1, 16, 1152, 3, "sample", id="dit-xl"),
]
READ = ["1@1", "1@2", "2@2", "2@3"]


@functools.cache
def gather_problem(B, N, C, k, gate, kind, dtype):
    torch.manual_seed(2)
    x, shift, scale = (torch.randn(size).to(dtype) for size in ((B, N, C), (B, C), (B, C)))
    index = None if k is None else selected(B, N, k)[0]
    residual = (make_gate(gate, B, N, C, dtype), make_cache(kind, B, N, C, dtype))
    given = (x, index, shift, scale)
    wanted = oracle.gather_modulate(
        *map(exact_values, given), residual=(exact_values(residual[0]), exact(residual[1]))
    )
    reference = toca.gather_modulate(*given, residual=residual, backend="reference")
    return given, residual, reference, wanted


@every_dtype
@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize(("B", "N", "C", "k", "gate"), GATHER)
def test_gather_reference_matches_oracle(B, N, C, k, gate, kind, dtype):
    _, _, reference, wanted = gather_problem(B, N, C, k, gate, kind, dtype)
    assert_reference_within_bound(reference, wanted)


@every_dtype
@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize(("B", "N", "C", "k", "gate"), GATHER)
def test_gather_native_matches_reference(B, N, C, k, gate, kind, dtype, isa):
    given, residual, reference, wanted = gather_problem(B, N, C, k, gate, kind, dtype)
    result = toca.gather_modulate(*given, residual=residual, backend="native")
    assert_backend_within_budget(result, reference, wanted)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize(("B", "N", "C", "k", "gate"), GATHER)
def test_gather_triton_matches_reference(B, N, C, k, gate, kind, dtype):
    given, residual, reference, wanted = gather_problem(B, N, C, k, gate, kind, dtype)
    result = call("gather_modulate", *given, residual=residual, backend="triton")
    assert_backend_within_budget(result, reference, wanted)


# --- partial_mlp ---


@every_stage
@pytest.mark.parametrize("k", [0, 5, 13])
def test_partial_mlp_is_its_parts(k, slopes, computed, backend):
    B, N, C = 2, 13, 24
    x = torch.randn(B, N, C)
    attn, mlp = (new_cache(B, N, C, torch.float32, slopes, computed) for _ in range(2))
    gate_a, shift, scale, gate = torch.randn(4, B, C)
    fc1, fc2 = (torch.randn(48, C), None), (torch.randn(C, 48), None)
    index, inverse = selected(B, N, k)
    have, want = clone(mlp), clone(mlp)
    options = {"residual": (gate_a, attn), "backend": backend}
    result = toca.partial_mlp(x, (index, inverse), (shift, scale, gate), have, fc1, fc2, **options)
    rows = toca.gather_modulate(x, index, shift, scale, **options)
    fresh = toca.mlp_rows(rows, fc1, fc2, backend=backend)
    updates = [(gate_a, attn), (gate, want, fresh, inverse)]
    assert_same_bits(result, toca.scatter_residual(x, updates, backend=backend))
    assert_same_cache(have, want)
