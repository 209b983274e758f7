"""scatter_residual, gather_modulate and partial_mlp with 8-bit caches.

What is written is equal to the bit in every body, sums are within the budget.
"""

import functools

import pytest
import torch

import interpreter
import oracle
import toca_kernels as toca
from eight_bit import (
    FLOAT8,
    INT8,
    assert_same_cache,
    clone,
    every_body,
    every_dtype,
    every_kind,
    new_cache,
    read,
    selected,
    written,
)
from interpreter import needs_triton
from tolerance import (
    assert_backend_within_budget,
    assert_reference_within_bound,
    assert_same_bits,
    exact_values,
)

# B, N, C, k, one word for each update: its cache, "+" where it has fresh rows, its gate
CASES = [
    pytest.param(1, 64, 1152, 7, "int8:sample int8+:sample", id="dit-xl-int8"),
    pytest.param(1, 64, 1152, 7, "float8:sample float8+:sample", id="dit-xl-float8"),
    pytest.param(2, 13, 37, 5, "int8:sample int8+:sample", id="odd-int8"),
    pytest.param(2, 13, 37, 5, "float8:sample float8+:sample", id="odd-float8"),
    pytest.param(2, 13, 37, 0, "int8:sample float8+:sample", id="no-fresh-row"),
    pytest.param(2, 13, 37, 13, "int8:sample int8+:sample", id="all-fresh"),
    pytest.param(2, 13, 37, 5, "plain:sample int8+:sample", id="plain-then-int8"),
    pytest.param(2, 13, 37, 5, "float8+:sample plain:sample", id="float8-then-plain"),
    pytest.param(2, 13, 37, 5, "int8+:sample plain+:sample", id="both-fresh"),
    pytest.param(2, 13, 37, 5, "int8:none", id="one-without-gate"),
    pytest.param(2, 13, 37, 5, "float8+:token", id="one-by-token"),
    pytest.param(2, 13, 40, 5, "int8:token plain+:none float8+:sample", id="three"),
    pytest.param(2, 13, 37, 5, "int8+:token float8:none int8:sample plain+:token", id="four"),
    pytest.param(3, 5, 1, 2, "int8:sample float8+:sample", id="one-channel"),
    pytest.param(0, 9, 24, 4, "int8:sample int8+:sample", id="no-sample"),
    pytest.param(2, 0, 24, 0, "int8:sample int8+:sample", id="no-token"),
]
KINDS = {"int8": INT8, "float8": FLOAT8}


def make_gate(kind, B, N, C, dtype):
    if kind == "none":
        return None
    size = (B, N, 2 * C) if kind == "token" else (B, 2 * C)
    return torch.randn(size).to(dtype)[..., C:]


def make_cache(name, B, N, C, dtype):
    rows = torch.randn(B, N, C).to(dtype)
    return rows if name == "plain" else written(rows, KINDS[name])


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
    exact, _ = oracle.scatter_residual(
        exact_values(x),
        [
            (exact_values(gate), read(cache).numpy(), *map(exact_values, moved))
            for gate, cache, *moved in updates
        ],
    )
    # One more rounding: the product of a value and its scale.
    exact = exact._replace(roundings=exact.roundings + len(updates))
    return x, updates, *run(x, updates, "reference"), exact


def run(x, updates, backend, **options):
    """(result, caches afterwards) of copies."""
    copies = [(gate, clone(cache), *moved) for gate, cache, *moved in updates]
    if backend == "triton":
        result = interpreter.call("scatter_residual", x.clone(), copies, **options)
    else:
        result = toca.scatter_residual(x.clone(), copies, backend=backend, **options)
    return result, [copy[1] for copy in copies]


@every_dtype
@pytest.mark.parametrize(("B", "N", "C", "k", "words"), CASES)
def test_scatter_reference_matches_oracle(B, N, C, k, words, dtype):
    _, updates, result, caches, exact = problem(B, N, C, k, words, dtype)
    assert_reference_within_bound(result, exact)
    for (_, before, *moved), after in zip(updates, caches, strict=True):
        want = clone(before)
        if moved and k > 0:
            fresh, inverse = moved
            chosen = inverse >= 0
            source = inverse.clamp(min=0).long()[:, :, None].expand(B, N, C)
            rows = fresh.gather(1, source)
            if isinstance(want, torch.Tensor):
                want[chosen] = rows[chosen]
            else:
                rounded = written(rows, want.values.dtype)
                want.values.view(torch.int8)[chosen] = rounded.values.view(torch.int8)[chosen]
                want.scale[chosen] = rounded.scale[chosen]
        assert_same_cache(after, want)


@every_dtype
@pytest.mark.parametrize(("B", "N", "C", "k", "words"), CASES)
def test_scatter_native_matches_reference(B, N, C, k, words, dtype, isa):
    x, updates, reference, caches, exact = problem(B, N, C, k, words, dtype)
    result, have = run(x, updates, "native")
    assert_backend_within_budget(result, reference, exact)
    for cache, want in zip(have, caches, strict=True):
        assert_same_cache(cache, want)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "N", "C", "k", "words"), CASES)
def test_scatter_triton_matches_reference(B, N, C, k, words, dtype):
    x, updates, reference, caches, exact = problem(B, N, C, k, words, dtype)
    result, have = run(x, updates, "triton")
    assert_backend_within_budget(result, reference, exact)
    for cache, want in zip(have, caches, strict=True):
        assert_same_cache(cache, want)


@every_body
def test_inplace_writes_the_same_into_x(body):
    x, updates, *_ = problem(2, 13, 37, 5, "int8:token plain+:none float8+:sample", torch.float32)
    want, _ = run(x, updates, body)
    have, _ = run(x, updates, body, inplace=True)
    assert_same_bits(have, want)


def test_nan_of_a_replaced_row_is_gone_and_of_others_stays(backend):
    x = torch.zeros(1, 6, 8)
    inverse = torch.tensor([[-1, 0, -1, -1, 1, -1]], dtype=torch.int32)
    cache = written(torch.full((1, 6, 8), torch.nan), INT8)
    fresh = torch.randn(1, 2, 8)
    result = toca.scatter_residual(x, [(None, cache, fresh, inverse)], backend=backend)
    assert_same_bits(result[:, [1, 4]], fresh)
    assert result[:, [0, 2, 3, 5]].isnan().all()


@every_kind
def test_memory_round_a_cache_is_untouched(kind, isa):
    x, updates, *_ = problem(2, 13, 37, 5, "int8:sample int8+:sample", torch.float32)
    (gate, _, fresh, inverse) = updates[1]
    frame = new_cache(4, 13, 37, kind)
    inside = toca.QuantizedCache(frame.values[1:-1], frame.scale[1:-1])
    toca.store_rows(inside, x, backend="native")
    toca.scatter_residual(x, [(gate, inside, fresh, inverse)], backend="native")
    untouched = new_cache(2, 13, 37, kind)
    outside = toca.QuantizedCache(frame.values[[0, -1]], frame.scale[[0, -1]])
    assert_same_cache(outside, untouched)


def test_same_bits_for_any_number_of_threads(isa, with_threads):
    words = "int8+:token float8:none int8:sample plain+:token"
    x, updates, *_ = problem(2, 13, 37, 5, words, torch.bfloat16)
    two, caches_of_two = with_threads(2, lambda: run(x, updates, "native"))
    one, caches_of_one = with_threads(1, lambda: run(x, updates, "native"))
    assert_same_bits(two, one)
    for a, b in zip(caches_of_two, caches_of_one, strict=True):
        assert_same_cache(a, b)


GATHER = [
    pytest.param(2, 13, 37, 5, "sample", id="odd"),
    pytest.param(2, 13, 37, 5, "token", id="by-token"),
    pytest.param(2, 13, 37, 5, "none", id="without-gate"),
    pytest.param(2, 13, 40, None, "sample", id="every-token"),
    pytest.param(2, 13, 40, 13, "sample", id="all-selected"),
    pytest.param(2, 13, 40, 0, "sample", id="none-selected"),
    pytest.param(0, 13, 40, 5, "sample", id="no-sample"),
    pytest.param(1, 16, 1152, 3, "sample", id="dit-xl"),
]


@functools.cache
def gather_problem(B, N, C, k, gate, kind, dtype):
    torch.manual_seed(2)
    x, shift, scale = (torch.randn(size).to(dtype) for size in ((B, N, C), (B, C), (B, C)))
    index = None if k is None else selected(B, N, k)[0]
    residual = (make_gate(gate, B, N, C, dtype), make_cache(kind, B, N, C, dtype))
    given = (x, index, shift, scale)
    exact = oracle.gather_modulate(
        *map(exact_values, given), residual=(exact_values(residual[0]), read(residual[1]).numpy())
    )
    reference = toca.gather_modulate(*given, residual=residual, backend="reference")
    return given, residual, reference, exact


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("B", "N", "C", "k", "gate"), GATHER)
def test_gather_reference_matches_oracle(B, N, C, k, gate, kind, dtype):
    _, _, reference, exact = gather_problem(B, N, C, k, gate, kind, dtype)
    assert_reference_within_bound(reference, exact)


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("B", "N", "C", "k", "gate"), GATHER)
def test_gather_native_matches_reference(B, N, C, k, gate, kind, dtype, isa):
    given, residual, reference, exact = gather_problem(B, N, C, k, gate, kind, dtype)
    result = toca.gather_modulate(*given, residual=residual, backend="native")
    assert_backend_within_budget(result, reference, exact)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("B", "N", "C", "k", "gate"), GATHER)
def test_gather_triton_matches_reference(B, N, C, k, gate, kind, dtype):
    given, residual, reference, exact = gather_problem(B, N, C, k, gate, kind, dtype)
    result = interpreter.call("gather_modulate", *given, residual=residual)
    assert_backend_within_budget(result, reference, exact)


@every_kind
@pytest.mark.parametrize("k", [0, 5, 13])
def test_partial_mlp_is_its_parts(k, kind, backend):
    B, N, C = 2, 13, 24
    x, attn, mlp = torch.randn(3, B, N, C)
    attn, mlp = written(attn, kind), written(mlp, kind)
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
