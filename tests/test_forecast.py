"""ForecastCache: what store_rows writes, what a run of steps makes of it, what is refused."""

import math
import re

import pytest
import torch

import oracle
import toca_kernels as toca
from eight_bit import INT8, written
from forecast import (
    assert_same_cache,
    call,
    clone,
    every_body,
    every_dtype,
    every_stage,
    exact,
    new_cache,
    selected,
)
from interpreter import needs_triton
from tolerance import assert_reference_within_bound, assert_same_bits, exact_values

# --- store_rows ---


def stored(cache, rows, backend="reference"):
    after = clone(cache)
    call("store_rows", after, rows, backend=backend)
    return after


@every_stage
@every_dtype
def test_reference_takes_the_differences_of_the_oracle(dtype, slopes, computed):
    cache = new_cache(2, 9, 37, dtype, slopes, computed)
    rows = torch.randn(2, 9, 37).to(dtype)
    after = stored(cache, rows)
    assert_same_bits(after.values, rows)
    wanted = oracle.differences(exact(cache), exact_values(rows))
    for slope, want in zip(after.slopes, wanted, strict=True):
        assert_reference_within_bound(slope, want)


@every_stage
@every_dtype
@pytest.mark.parametrize("C", [1, 3, 15, 16, 37, 1152])
def test_native_writes_the_same_bits(C, dtype, slopes, computed, isa):
    cache = new_cache(2, 9, C, dtype, slopes, computed)
    rows = torch.randn(2, 9, C).to(dtype)
    assert_same_cache(stored(cache, rows, "native"), stored(cache, rows))


@needs_triton
@every_stage
@every_dtype
@pytest.mark.parametrize("C", [1, 37, 300])
def test_triton_writes_the_same_bits(C, dtype, slopes, computed):
    cache = new_cache(2, 9, C, dtype, slopes, computed)
    rows = torch.randn(2, 9, C).to(dtype)
    assert_same_cache(stored(cache, rows, "triton"), stored(cache, rows))


@pytest.mark.parametrize("size", [(0, 9, 24), (2, 0, 24), (2, 9, 0)])
def test_nothing_to_store(size, backend):
    cache = new_cache(*size, torch.float32, 2, 3)
    assert stored(cache, torch.randn(size), backend).values.shape == size


@pytest.mark.parametrize("special", [math.nan, math.inf, -0.0, 3e38, 1e-40])
def test_special_values_stay_in_their_channel(special, isa):
    """What one value becomes is the reference's, and its neighbours do not notice."""
    cache, rows = new_cache(2, 5, 37, torch.float32, 2, 3), torch.randn(2, 5, 37)
    rows[1, 3, 6] = special
    cache.values[0, 2, 36] = special
    cache.slopes[0][1, 1, 0] = special
    assert_same_cache(stored(cache, rows, "native"), stored(cache, rows))


@every_body
@pytest.mark.parametrize("slopes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_on_straight_lines_are_foreseen(dtype, slopes, body):
    """Each token is computed at times of its own: slopes are those of the lines, to the bit."""
    B, N, C, k = 2, 7, 20, 3
    start = torch.randint(-8, 9, (B, N, C)).float()
    slope = torch.randint(-4, 5, (B, N, C)).float()
    empty = torch.full((B, N, C), torch.nan, dtype=dtype)
    cache = toca.ForecastCache(
        empty.clone(), tuple(empty.clone() for _ in range(slopes)), torch.ones(B, N), 0
    )

    def at(step):
        return (start + step * slope).to(dtype)

    times = torch.zeros(B, N)
    for step, is_full in enumerate([True, False, True, False, False, True, False, False]):
        cache = cache._replace(distance=(step - times).clamp(min=1.0))
        zero = torch.zeros(B, N, C, dtype=dtype)
        if is_full:
            call("store_rows", cache, at(step), backend=body)
            cache = cache._replace(computed=cache.computed + 1)
            times[:] = step
            continue
        index, inverse = selected(B, N, k)
        fresh = at(step).gather(1, index[:, :, None].expand(-1, -1, C))
        result = call("scatter_residual", zero, [(None, cache, fresh, inverse)], backend=body)
        if cache.computed >= 2:
            assert_same_bits(result, at(step))
            assert_same_bits(cache.slopes[0], slope.to(dtype))
            assert not (slopes == 2 and cache.slopes[-1].any())
        times[inverse >= 0] = step


# --- registration ---

B, N, C, K = 2, 9, 8, 3


def forecast_lists(slopes, computed):
    """gates, caches, fresh, inverse; and distance, slopes, computed of the registered op."""
    # All finite, for what compares the results: what is not to be read is tested elsewhere.
    cached, refreshed = (new_cache(B, N, C, torch.float32, slopes, 9) for _ in range(2))
    _, inverse = selected(B, N, K)
    known = cached.slopes[: max(0, min(slopes, computed - 1))]
    caches = [cached.values, refreshed.values, torch.randn(B, N, C), *known, *refreshed.slopes]
    distance = [cached.distance] * bool(known) + [refreshed.distance]
    counts = [len(known), slopes, 0]
    updates = ([torch.randn(B, C), None, None], caches, [None, torch.randn(B, K, C), None])
    return (*updates, [None, inverse, None]), (distance, counts, [computed, computed, 0])


@every_stage
def test_opcheck(slopes, computed, backend):
    ops, rows, gate = torch.ops.toca, torch.randn(B, N, C), torch.randn(B, C)
    cache = new_cache(B, N, C, torch.float32, slopes, 9)._replace(computed=computed)
    updates, forecasts = forecast_lists(slopes, computed)
    index, _ = selected(B, N, K)
    given = rows, index, gate, gate, gate, cache.values, None, None, "layer", 1e-6
    read = cache.slopes[:1], cache.distance
    for op, arguments in (
        (ops.store_rows, (cache.values, None, cache.slopes, *cache[2:], rows, backend)),
        (ops.scatter_residual, (rows, *updates, backend, *forecasts)),
        (ops.scatter_residual_, (rows, *updates, backend, *forecasts)),
        (ops.gather_modulate, (*given, backend, None, *read)),
        (ops.read_rows, (cache.values, index, None, *read, torch.float32, backend)),
    ):
        torch.library.opcheck(op.default, arguments)


def step(x, attn, mlp, modulation, index, inverse, fresh):
    toca.store_rows(attn, x)
    rows = toca.gather_modulate(x, index, *modulation[1:], residual=(modulation[0], attn))
    updates = [(modulation[0], attn), (None, mlp, fresh + rows, inverse)]
    return rows, toca.read_rows(attn, index), toca.scatter_residual(x, updates, inplace=True)


def of_step(slopes, computed):
    index, inverse = selected(B, N, K)
    caches = [new_cache(B, N, C, torch.float32, slopes, computed) for _ in range(2)]
    return (
        torch.randn(B, N, C),
        *caches,
        tuple(torch.randn(3, B, C)),
        index,
        inverse,
        torch.randn(B, K, C),
    )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("slopes", "computed"), [(1, 1), (1, 2), (2, 3)])
def test_full_graph(slopes, computed, compiler):
    torch._dynamo.reset()
    x, attn, mlp, *rest = of_step(slopes, computed)
    copies = x.clone(), clone(attn), clone(mlp)
    want = step(x, attn, mlp, *rest)
    have = torch.compile(step, fullgraph=True, backend=compiler)(*copies, *rest)
    torch._dynamo.reset()
    for compiled, eager in zip((*have, copies[0]), (*want, x), strict=True):
        assert_same_bits(compiled, eager)
    for compiled, eager in zip(copies[1:], (attn, mlp), strict=True):
        assert_same_cache(compiled, eager)


def test_a_graph_serves_every_later_step():
    """From the third full step on nothing depends on how many there were."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    found = []
    for computed in range(1, 12):
        given = of_step(2, computed)
        copies = [clone(part) if part is given[1] or part is given[2] else part for part in given]
        copies[0] = given[0].clone()
        want = step(*given)
        for have, eager in zip(compiled(*copies), want, strict=True):
            assert_same_bits(have, eager)
        found.append(len(graphs))
    torch._dynamo.reset()
    assert len(graphs) <= 4
    assert found[-1] == found[4]


# --- refusals ---


def tokens(*size, dtype=torch.float32):
    return torch.zeros(size, dtype=dtype)


GOOD = {
    "values": tokens(2, 13, 8),
    "slopes": (tokens(2, 13, 8),),
    "distance": torch.ones(2, 13),
    "computed": 2,
}
REFUSED = [
    pytest.param(
        {"values": tokens(2, 12, 8)},
        "cache values: expected shape (2, 13, 8), got (2, 12, 8)",
        id="shape-of-values",
    ),
    pytest.param(
        {"values": tokens(2, 13, 8, dtype=torch.float16)},
        "cache values: expected dtype float32, got float16",
        id="dtype-of-values",
    ),
    pytest.param(
        {"values": tokens(2, 13, 8, dtype=INT8)},
        "cache values: a ForecastCache is not held in 8 bits: expected dtype float32, bfloat16 or "
        "float16, got int8",
        id="8-bit-values",
    ),
    pytest.param(
        {"values": tokens(2, 8, 13).transpose(1, 2)},
        "cache values: expected a contiguous tensor, got strides (104, 1, 13)",
        id="layout-of-values",
    ),
    pytest.param({"values": None}, "cache values: expected a tensor, got NoneType", id="no-values"),
    pytest.param({"slopes": ()}, "cache slopes: expected a tuple of 1 or 2, got 0", id="no-slope"),
    pytest.param(
        {"slopes": (tokens(2, 13, 8),) * 3},
        "cache slopes: expected a tuple of 1 or 2, got 3",
        id="three-slopes",
    ),
    pytest.param(
        {"slopes": tokens(2, 13, 8)},
        "cache slopes: expected a tuple of 1 or 2, got Tensor",
        id="bare-slope",
    ),
    pytest.param(
        {"slopes": (tokens(2, 13, 8), tokens(2, 13, 9))},
        "cache slopes[1]: expected shape (2, 13, 8), got (2, 13, 9)",
        id="shape-of-slope",
    ),
    pytest.param(
        {"slopes": (tokens(2, 13, 8, dtype=torch.bfloat16),)},
        "cache slopes[0]: expected dtype float32, got bfloat16",
        id="dtype-of-slope",
    ),
    pytest.param(
        {"slopes": (tokens(1, 13, 8).expand(2, 13, 8),)},
        "cache slopes[0]: expected a contiguous tensor, got strides (0, 8, 1)",
        id="layout-of-slope",
    ),
    pytest.param(
        {"distance": torch.ones(2, 13, 1)},
        "cache distance: expected shape (2, 13), got (2, 13, 1)",
        id="shape-of-distance",
    ),
    pytest.param(
        {"distance": torch.ones(2, 13, dtype=torch.int32)},
        "cache distance: expected dtype float32, got int32",
        id="dtype-of-distance",
    ),
    pytest.param(
        {"distance": torch.ones(13, 2).t()},
        "cache distance: expected a contiguous tensor, got strides (1, 2)",
        id="layout-of-distance",
    ),
    pytest.param(
        {"distance": torch.ones(2, 13, device="meta")},
        "cache distance: expected device cpu, got meta",
        id="device-of-distance",
    ),
    pytest.param(
        {"computed": -1}, "cache computed: expected an integer >= 0, got -1", id="negative-count"
    ),
    pytest.param(
        {"computed": torch.tensor(2)},
        "cache computed: expected an integer >= 0, got tensor(2)",
        id="tensor-for-a-count",
    ),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_refuses_a_cache(changed, message):
    x, gate = torch.randn(2, 13, 8), torch.randn(2, 8)
    cache = toca.ForecastCache(**GOOD | changed)
    with pytest.raises(ValueError, match=re.escape(message)):
        toca.store_rows(cache, x)
    with pytest.raises(ValueError, match=re.escape(f"updates[1] {message}")):
        toca.scatter_residual(x, [(gate, x.clone()), (gate, cache)])
    with pytest.raises(ValueError, match=re.escape(f"residual {message}")):
        toca.gather_modulate(x, None, gate, gate, residual=(gate, cache))


@pytest.mark.parametrize("computed", [0, 2])
def test_refuses_an_8_bit_cache_beside_a_forecast(computed):
    x, cache = torch.randn(2, 13, 8), toca.ForecastCache(**GOOD | {"computed": computed})
    message = "updates: expected no QuantizedCache beside a ForecastCache, got both in one call"
    with pytest.raises(ValueError, match=message):
        toca.scatter_residual(x, [(None, cache), (None, written(x, INT8))])


def test_a_refused_slot_changes_nothing(backend):
    x, fresh = torch.randn(1, 4, 8), torch.randn(1, 2, 8)
    cache = new_cache(1, 4, 8, torch.float32, 2, 3)
    before = clone(cache)
    good = torch.tensor([[0, -1, 1, -1]], dtype=torch.int32)
    bad = torch.tensor([[0, -1, 2, -1]], dtype=torch.int32)
    updates = [(None, cache, fresh, good), (None, x.clone(), fresh, bad)]
    with pytest.raises(ValueError, match=r"inverse: expected values in \[-1, 2\)"):
        toca.scatter_residual(x, updates, backend=backend)
    assert_same_cache(cache, before)
