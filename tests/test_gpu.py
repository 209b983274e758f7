"""What only a GPU can show: its bodies as compiled code, and steps that nobody waits for.

`cases` tests repeat the cases of the op tests, `real` ones have the shapes of models; `small` ones
reach every kernel and are what compute-sanitizer looks at (benchmarks/gpu.sh).  Exact results come
from the oracle, on the CPU.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import eight_bit
import forecast
import oracle
import test_attention_entropy
import test_attention_scores
import test_eight_bit_updates
import test_forecast_updates
import test_gather_modulate
import test_mlp_rows
import test_partial_attention
import test_read_rows
import test_scatter_residual
import test_select_tokens
import toca_kernels as toca
from dit import random_dit
from models import assert_close, reuse_attention
from toca_kernels import ops
from tolerance import assert_backend_within_budget, assert_same_bits, exact_values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = DTYPES[1:]
GIB = 2**30


# --- there and back ------------------------------------------------------------------------------


def on_gpu(value: Any) -> Any:
    """Copies of all tensors in nested tuples, lists and dicts, with their strides."""
    if isinstance(value, Tensor):
        flat = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
        copied = flat.to("cuda", copy=True)
        return copied.as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, ops.ForecastCache):
        return ops.ForecastCache(*map(on_gpu, value))
    if isinstance(value, ops.QuantizedCache):
        return ops.QuantizedCache(on_gpu(value.values), on_gpu(value.scale))
    if isinstance(value, tuple | list):
        return type(value)(map(on_gpu, value))
    return {key: on_gpu(v) for key, v in value.items()} if isinstance(value, dict) else value


def back(value: Any) -> Any:
    """The same on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, ops.Selection):
        return dataclasses.replace(value, **{n: back(getattr(value, n)) for n in SELECTION})
    if isinstance(value, ops.ForecastCache):
        return ops.ForecastCache(*map(back, value))
    if isinstance(value, ops.QuantizedCache):
        return ops.QuantizedCache(value.values.cpu(), value.scale.cpu())
    return type(value)(map(back, value)) if isinstance(value, tuple | list) else value


SELECTION = ("index", "inverse", "nan")


BACKENDS = tuple(n for n in ("triton", "native") if "cuda" in toca.backends()[n].devices)


def run(backend: str, op: str, *arguments: Any, **options: Any) -> tuple[Any, Any]:
    """(result, arguments afterwards) of an op's body."""
    arguments = on_gpu(arguments)
    result = getattr(ops, op)(*arguments, **on_gpu(options), backend=backend)
    return back(result), back(arguments)


def triton(op: str, *arguments: Any, **options: Any) -> tuple[Any, Any]:
    return run("triton", op, *arguments, **options)


def reference(op: str, *arguments: Any, **options: Any) -> Any:
    return getattr(ops, op)(*arguments, **options, backend="reference")


def cases_of(module: Any) -> Any:
    """The cases of an op's own tests in bfloat16, and the first of them in the other dtypes.

    Every combination is compiled anew; the interpreter has run them all.
    """
    first = module.CASES[0]
    others = [dtype for dtype in DTYPES if dtype != torch.bfloat16]
    return pytest.mark.parametrize(
        ("case", "dtype"),
        [pytest.param(case.values, torch.bfloat16, id=case.id) for case in module.CASES]
        + [pytest.param(first.values, dtype, id=f"{first.id}-{dtype}") for dtype in others],
    )


def need_memory(gib: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of device memory, {free / GIB:.1f} are free")


# --- ops -----------------------------------------------------------------------------------------


def check_attention_scores(B, H, Nq, N, D, layout, dtype):
    tensors, scale, *_, exact = test_attention_scores.problem(B, H, Nq, N, D, layout, dtype)
    result, _ = triton("attention_scores", *tensors, scale=scale)
    expected = reference("attention_scores", *tensors, scale=scale)
    assert_backend_within_budget(result, expected, exact)


def check_attention_entropy(B, H, N, L, D, layout, masked, dtype):
    tensors, options, *_, exact = test_attention_entropy.problem(
        B, H, N, L, D, layout, masked, dtype
    )
    result, _ = triton("attention_entropy", *tensors, **options)
    expected = reference("attention_entropy", *tensors, **options)
    assert_backend_within_budget(result, expected, exact)


def check_partial_attention(B, H, k, N, D, layout, masked, dtype):
    tensors, options, *_, exact = test_partial_attention.problem(
        B, H, k, N, D, layout, masked, dtype
    )
    result, _ = triton("partial_attention", *tensors, **options)
    expected = reference("partial_attention", *tensors, **options)
    for parts in zip(result, expected, exact, strict=True):
        assert_backend_within_budget(*parts)


def check_gather_modulate(B, N, C, k, options, dtype):
    tensors, options, *_, expected, exact = test_gather_modulate.problem(B, N, C, k, options, dtype)
    for backend in BACKENDS:
        result, _ = run(backend, "gather_modulate", *tensors, **options)
        assert_backend_within_budget(result, expected, exact)


def check_mlp_rows(B, k, C, hidden, biases, activation, dtype):
    rows, fc1, fc2, *_, exact = test_mlp_rows.problem(B, k, C, hidden, biases, activation, dtype)
    result, _ = triton("mlp_rows", rows, fc1, fc2, activation=activation)
    expected = reference("mlp_rows", rows, fc1, fc2, activation=activation)
    assert_backend_within_budget(result, expected, exact)


def check_scatter_residual(B, N, C, k, gates, dtype, **options):
    x, updates, *_, exact, caches = test_scatter_residual.problem(B, N, C, k, gates, dtype)
    copies = [(gate, cache.clone(), *moved) for gate, cache, *moved in updates]
    expected = reference("scatter_residual", x, copies)
    for backend in BACKENDS:
        result, (x_after, updates_after) = run(backend, "scatter_residual", x, updates, **options)
        assert_backend_within_budget(result, expected, exact)
        assert_same_bits(x_after, result if options.get("inplace") else x)
        for (_, cache, *_), exact_cache in zip(updates_after, caches, strict=True):
            assert_same_bits(cache, exact_cache)


def check_cached(module, same, B, N, C, k, words, dtype):
    """scatter_residual with the caches of a module's cases; written ones are `same`."""
    x, updates, expected, caches, exact = module.problem(B, N, C, k, words, dtype)
    for backend in BACKENDS:
        result, (_, updates_after) = run(backend, "scatter_residual", x, updates)
        assert_backend_within_budget(result, expected, exact)
        for (_, cache, *_), want in zip(updates_after, caches, strict=True):
            same(cache, want)


def check_select_tokens(score, k, options):
    age = torch.randint(0, 9, score.shape, dtype=torch.int32)
    before = age.clone()
    expected = reference("select_tokens", score, age, k, **options)
    for backend in BACKENDS:
        result, (_, age_after, _) = run(backend, "select_tokens", score, before, k, **options)
        for name in SELECTION:
            assert_same_bits(getattr(result, name), getattr(expected, name))
        assert_same_bits(age_after, age)


@pytest.mark.parametrize(
    ("check", "case"),
    [
        pytest.param(check_attention_scores, (2, 2, 37, 41, 72, "fused"), id="scores"),
        pytest.param(check_attention_scores, (1, 2, 65, 65, 128, "padded"), id="scores-flux"),
        pytest.param(check_attention_entropy, (2, 2, 17, 33, 72, "fused", True), id="entropy"),
        pytest.param(check_partial_attention, (2, 2, 40, 77, 72, "fused", True), id="attention"),
        pytest.param(
            check_partial_attention, (2, 1, 5, 600, 64, "contiguous", True), id="attention-in-parts"
        ),
        pytest.param(check_gather_modulate, (2, 13, 37, 5, {"residual": "gated"}), id="gather"),
        pytest.param(
            check_gather_modulate, (2, 13, 40, 5, {"modulation": "per-token"}), id="gather-token"
        ),
        pytest.param(check_mlp_rows, (2, 5, 37, 61, True, "gelu"), id="mlp"),
        pytest.param(check_mlp_rows, (2, 9, 72, 1100, True, "gelu_tanh"), id="mlp-in-parts"),
        pytest.param(
            check_scatter_residual, (2, 13, 37, 5, "token tokenchunk+ none chunk+"), id="scatter"
        ),
    ],
)
def test_small(check, case):
    check(*case, torch.bfloat16)


@pytest.mark.parametrize(
    ("R", "N", "k", "options"),
    [
        pytest.param(3, 20, [0, 20, 7], {"age_weight": 0.5}, id="ragged"),
        pytest.param(2, 35, 9, {"grid": (5, 7), "cell": 3, "bonus": 0.4}, id="tiles"),
        pytest.param(1, 9001, 900, {"age_weight": 0.1}, id="several-chunks"),
    ],
)
def test_small_select_tokens(R, N, k, options):
    check_select_tokens(torch.randn(R, N), k, options)


@cases_of(test_attention_scores)
def test_cases_of_attention_scores(case, dtype):
    check_attention_scores(*case, dtype)


@cases_of(test_attention_entropy)
def test_cases_of_attention_entropy(case, dtype):
    check_attention_entropy(*case, dtype)


@cases_of(test_partial_attention)
def test_cases_of_partial_attention(case, dtype):
    check_partial_attention(*case, dtype)


@cases_of(test_gather_modulate)
def test_cases_of_gather_modulate(case, dtype):
    check_gather_modulate(*case, dtype)


@cases_of(test_mlp_rows)
def test_cases_of_mlp_rows(case, dtype):
    check_mlp_rows(*case, "gelu_tanh", dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_cases_of_mlp_rows_activation(activation, dtype):
    """A sum that is split over programs, behind the other activations."""
    check_mlp_rows(2, 9, 72, 1100, True, activation, dtype)


@cases_of(test_scatter_residual)
def test_cases_of_scatter_residual(case, dtype):
    check_scatter_residual(*case, dtype)
    check_scatter_residual(*case, dtype, inplace=True)


@cases_of(test_eight_bit_updates)
def test_cases_of_8_bit_caches(case, dtype):
    check_cached(test_eight_bit_updates, eight_bit.assert_same_cache, *case, dtype)


@cases_of(test_forecast_updates)
def test_cases_of_forecast_caches(case, dtype):
    check_cached(test_forecast_updates, forecast.assert_same_cache, *case, dtype)


@forecast.every_stage
def test_store_rows_of_a_forecast(slopes, computed):
    cache = forecast.new_cache(2, 9, 1152, torch.bfloat16, slopes, computed)
    rows, want = torch.randn(2, 9, 1152).bfloat16(), forecast.clone(cache)
    reference("store_rows", want, rows)
    for backend in BACKENDS:
        _, (have, _) = run(backend, "store_rows", cache, rows)
        forecast.assert_same_cache(have, want)


@pytest.mark.parametrize("kind", test_forecast_updates.READ)
def test_gather_modulate_of_a_forecast(kind):
    for case in test_forecast_updates.GATHER:
        given, residual, expected, exact = test_forecast_updates.gather_problem(
            *case.values, kind, torch.bfloat16
        )
        for backend in BACKENDS:
            result, _ = run(backend, "gather_modulate", *given, residual=residual)
            assert_backend_within_budget(result, expected, exact)


@pytest.mark.parametrize("kind", test_read_rows.EVERY_KIND)
@pytest.mark.parametrize(("B", "N", "C", "k"), test_read_rows.CASES)
def test_cases_of_read_rows(B, N, C, k, kind):
    cache, index, options, exact = test_read_rows.problem(B, N, C, k, kind, torch.bfloat16)
    expected = reference("read_rows", cache, index, **options)
    for backend in BACKENDS:
        result, _ = run(backend, "read_rows", cache, index, **options)
        assert_backend_within_budget(result, expected, exact)


@pytest.mark.parametrize(("R", "N", "k", "options"), test_select_tokens.CASES)
def test_cases_of_select_tokens(R, N, k, options):
    for scores in test_select_tokens.SCORES:
        check_select_tokens(scores(R, N), k, options)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("B", "H", "N", "D"),
    [
        pytest.param(2, 16, 256, 72, id="dit-xl"),
        pytest.param(1, 2, 4096, 72, id="pixart-two-heads"),
        pytest.param(1, 2, 4608, 128, id="flux-two-heads"),
    ],
)
def test_real_attention_scores(B, H, N, D, dtype):
    check_attention_scores(B, H, N, N, D, "fused", dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_real_attention_entropy(dtype):
    check_attention_entropy(2, 16, 1229, 120, 72, "fused", True, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("B", "H", "k", "N", "D", "masked"),
    [
        pytest.param(2, 16, 18, 256, 72, False, id="dit-xl"),
        pytest.param(2, 16, 1229, 120, 72, True, id="pixart-text"),
        pytest.param(1, 2, 461, 4608, 128, False, id="flux-two-heads"),
    ],
)
def test_real_partial_attention(B, H, k, N, D, masked, dtype):
    check_partial_attention(B, H, k, N, D, "fused", masked, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("B", "N", "C", "k"),
    [
        pytest.param(2, 256, 1152, 18, id="dit-xl"),
        pytest.param(8, 256, 1152, None, id="dit-xl-all"),
        pytest.param(1, 4608, 3072, 461, id="flux"),
    ],
)
def test_real_gather_modulate(B, N, C, k, dtype):
    options = {"residual": "gated", "modulation": "chunks"}
    check_gather_modulate(B, N, C, k, options, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("B", "k", "C"),
    [
        pytest.param(1, 9, 1152, id="16-rows"),
        pytest.param(2, 18, 1152, id="64-rows"),
        pytest.param(4, 18, 1152, id="128-rows"),
        pytest.param(8, 18, 1152, id="by-the-library"),
        pytest.param(1, 33, 3072, id="flux-wide"),
    ],
)
def test_real_mlp_rows(B, k, C, dtype):
    check_mlp_rows(B, k, C, 4 * C, True, "gelu_tanh", dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("B", "N", "C", "k"),
    [
        pytest.param(2, 256, 1152, 18, id="dit-xl"),
        pytest.param(64, 256, 72, 18, id="many-samples"),
        pytest.param(1, 4608, 3072, 461, id="flux"),
    ],
)
def test_real_scatter_residual(B, N, C, k, dtype):
    check_scatter_residual(B, N, C, k, "chunk chunk+", dtype)


DIT = {"age_weight": 0.25 / 3, "grid": (16, 16), "cell": 2, "bonus": 0.6}


@pytest.mark.parametrize(
    ("R", "N", "k", "options"),
    [
        pytest.param(56, 256, 18, DIT, id="dit-xl"),
        pytest.param(56, 256, [row // 2 for row in range(56)], DIT, id="dit-xl-ragged"),
        pytest.param(38, 4608, 461, {"age_weight": 0.1}, id="flux"),
        pytest.param(2, 131072, 9000, {"age_weight": 0.1}, id="video"),
    ],
)
def test_real_select_tokens(R, N, k, options):
    check_select_tokens(torch.randn(R, N), k, options)
    check_select_tokens(torch.randint(0, 9, (R, N)).float(), k, options)


# --- the same bits in every run ------------------------------------------------------------------


def calls() -> dict[str, Callable[[str | None], Any]]:
    """Op -> a call at a model's shape, of a backend; what it writes is what it returns."""
    dtype = torch.bfloat16
    q, key, value = (on_gpu(torch.randn(2, 16, 1024, 72).to(dtype)) for _ in range(3))
    _, lse = ops.partial_attention(q, key, value, scale=0.1, backend="triton")
    x, cache = (on_gpu(torch.randn(2, 1024, 1152).to(dtype)) for _ in range(2))
    shift, scale, gate = on_gpu(torch.randn(2, 3 * 1152).to(dtype)).chunk(3, dim=1)
    score, age = torch.randn(2, 1024).cuda(), torch.zeros(2, 1024, dtype=torch.int32).cuda()
    index, inverse = ops.select_tokens(score, age.clone(), 30, backend="triton").rows(0, 2)
    fc1 = on_gpu((torch.randn(4608, 1152).to(dtype) / 34, torch.randn(4608).to(dtype)))
    fc2 = on_gpu((torch.randn(1152, 4608).to(dtype) / 68, torch.randn(1152).to(dtype)))
    fresh = on_gpu(torch.randn(2, 30, 1152).to(dtype))
    few = q[:, :, :30]
    return {
        "attention_scores": lambda _: ops.attention_scores(q, key, lse, scale=0.1),
        "attention_entropy": lambda _: ops.attention_entropy(q, key, lse, scale=0.1),
        "partial_attention": lambda _: ops.partial_attention(few, key, value, scale=0.1),
        "select_tokens": lambda backend: (
            ops.select_tokens(score, age.clone(), 30, backend=backend).index
        ),
        "gather_modulate": lambda backend: ops.gather_modulate(
            x, index, shift, scale, backend=backend
        ),
        "mlp_rows": lambda _: ops.mlp_rows(fresh, fc1, fc2),
        "scatter_residual": lambda backend: ops.scatter_residual(
            x, [(gate, cache.clone(), fresh, inverse)], backend=backend
        ),
        "read_rows": lambda backend: ops.read_rows(cache, index, backend=backend),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_in_every_run(backend):
    for op, call in calls().items():
        first = call(backend)
        for _ in range(5):
            torch.testing.assert_close(call(backend), first, rtol=0, atol=0, msg=op)


NATIVE_ON_CUDA = ("select_tokens", "gather_modulate", "scatter_residual", "read_rows")


@pytest.mark.skipif("native" not in BACKENDS, reason=toca.backends()["native"].reason)
def test_native_bodies_in_a_graph():
    """They neither allocate nor wait: captured once on torch's stream, replayed with new values."""
    for op in NATIVE_ON_CUDA:
        call = calls()[op]
        want = call("native")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            have = call("native")
        have.zero_()
        graph.replay()
        torch.testing.assert_close(have, want, rtol=0, atol=0, msg=op)


@pytest.mark.skipif("native" not in BACKENDS, reason=toca.backends()["native"].reason)
def test_native_bodies_run_on_the_current_stream():
    for op in NATIVE_ON_CUDA:
        call, stream = calls()[op], torch.cuda.Stream()
        want = call("native")
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            have = call("native")
            after = have.clone()  # on that stream: complete if the op was on it
        stream.synchronize()
        torch.testing.assert_close(after, want, rtol=0, atol=0, msg=op)


# --- offsets beyond 2**31 elements ---------------------------------------------------------------

LONG = (2, 1_000_000, 1152)  # most of the second sample lies beyond
PLACES = [0, 1, 531_337, 999_998, 999_999]


def put(tokens: Tensor, rows: Tensor | float) -> None:
    """Write rows (B, places, C) at the places; by views, so that no other kernel is at stake."""
    for slot, place in enumerate(PLACES):
        tokens[:, place] = rows[:, slot] if isinstance(rows, Tensor) else rows


def take(tokens: Tensor) -> Tensor:
    return torch.stack([tokens[:, place] for place in PLACES], dim=1).cpu()


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_gather_modulate(backend):
    need_memory(11)
    B, _, C = LONG
    x, cache = (torch.empty(LONG, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    rows, cached = (torch.randn(B, len(PLACES), C).bfloat16() for _ in range(2))
    put(x, rows)
    put(cache, cached)
    index = torch.tensor([PLACES] * B, device="cuda")
    shift, scale, gate = (torch.randn(B, C).bfloat16() for _ in range(3))
    result = ops.gather_modulate(
        x, index, shift.cuda(), scale.cuda(), residual=(gate.cuda(), cache), backend=backend
    )
    expected = reference("gather_modulate", rows, None, shift, scale, residual=(gate, cached))
    exact = oracle.gather_modulate(
        exact_values(rows),
        None,
        exact_values(shift),
        exact_values(scale),
        residual=(exact_values(gate), exact_values(cached)),
    )
    assert_backend_within_budget(result.cpu(), expected, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_scatter_residual(backend):
    need_memory(11)
    B, N, C = LONG
    x, cache = (torch.zeros(LONG, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    rows, fresh = (torch.randn(B, len(PLACES), C).bfloat16() for _ in range(2))
    put(x, rows)
    inverse = torch.full((B, N), -1, dtype=torch.int32)
    inverse[:, PLACES] = torch.arange(len(PLACES), dtype=torch.int32)
    ops.scatter_residual(
        x, [(None, cache, fresh.cuda(), inverse.cuda())], inplace=True, backend=backend
    )
    assert_same_bits(take(cache), fresh)
    assert_same_bits(take(x), (rows.float() + fresh.float()).bfloat16())
    for tensor in (x, cache):  # nothing was written anywhere else
        put(tensor, 0.0)
        assert not tensor.any()


def test_samples_far_apart():
    """Samples that are more than 2**31 elements from each other."""
    need_memory(6)
    values = torch.randn(2, 1, 64, 64).bfloat16()
    apart = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    q = apart.as_strided((2, 1, 64, 64), (2**31, 4096, 64, 1))
    q.copy_(values)
    near = values.cuda()
    _, lse = ops.partial_attention(near, near, near, scale=0.1, backend="triton")
    have, want = (ops.attention_scores(t, t, lse, scale=0.1, backend="triton") for t in (q, near))
    assert torch.equal(have, want)
    have, want = (ops.partial_attention(t, t, t, scale=0.1, backend="triton") for t in (q, near))
    assert torch.equal(have[0], want[0])


# --- refusals ------------------------------------------------------------------------------------


def test_tensors_of_the_cpu_are_refused():
    x, vector = torch.randn(1, 4, 8), torch.randn(1, 8)
    with pytest.raises(RuntimeError, match="runs on cuda, the tensors are on cpu"):
        ops.gather_modulate(x, None, vector, vector, backend="triton")


def test_native_is_refused_where_it_has_no_body_for_the_gpu():
    q, lse = torch.randn(1, 1, 4, 64, device="cuda"), torch.zeros(1, 1, 4, device="cuda")
    with pytest.raises(RuntimeError, match="backend 'native'"):
        ops.attention_scores(q, q, lse, scale=1.0, backend="native")


@pytest.mark.skipif("native" not in BACKENDS, reason=toca.backends()["native"].reason)
@pytest.mark.parametrize("wrong", [-1, 4, 2**31 - 1])
def test_native_bodies_follow_no_index_out_of_range(wrong):
    x = torch.randn(1, 4, 8, device="cuda")
    row, index = torch.zeros(1, 8, device="cuda"), torch.tensor([[0, wrong]], device="cuda")
    rows = ops.gather_modulate(x, index, row, row, backend="native")
    assert rows[0, 0].isfinite().all()
    assert rows[0, 1].isnan().all()
    cache, inverse = x.clone(), torch.tensor([[wrong] * 4], dtype=torch.int32, device="cuda")
    result = ops.scatter_residual(x, [(None, cache, x[:, :2].clone(), inverse)], backend="native")
    assert torch.equal(cache, x)
    assert torch.equal(result, x + x)


def test_mixed_devices_are_refused():
    x, vector = torch.randn(1, 4, 8, device="cuda"), torch.randn(1, 8)
    with pytest.raises(ValueError, match="shift: expected device cuda:0, got cpu"):
        ops.gather_modulate(x, None, vector, vector.cuda())
    with pytest.raises(ValueError, match="cache: expected device cuda:0, got cpu"):
        ops.scatter_residual(x, [(None, x.cpu())])


def test_a_head_that_is_too_long_is_refused():
    q = torch.randn(1, 1, 4, 264, device="cuda")
    with pytest.raises(ValueError, match="head dim: expected <= 256"):
        ops.attention_scores(q, q, torch.zeros(1, 1, 4, device="cuda"), scale=1.0)


# --- models --------------------------------------------------------------------------------------

STEPS = 9  # with an interval of 3: 0, 3 and 6 are full
TIMESTEPS = [float(t) for t in range(990, 0, -110)]
CONFIG = toca.ToCaConfig(interval=3, fresh_ratio=0.2, grid=2, bonus=0.6)
CONFIGS = [
    pytest.param(CONFIG, id="one-k"),
    pytest.param(toca.ToCaConfig.preset("dit-ddim50"), id="k-by-layer"),
    pytest.param(CONFIG.replace(full_steps="fused"), id="fused"),
]


@pytest.fixture(params=DTYPES, ids=str)
def model(request):
    return dit(request.param)


def dit(dtype):
    shape = {"channels": 64, "num_heads": 4, "depth": 3, "input_size": 16}
    return random_dit("S", dtype=dtype, **shape).cuda()


def direct(step: int, call: Callable[[], Tensor]) -> Tensor:
    return call()


def sample(model, each: Callable[[int, Callable[[], Tensor]], Tensor] = direct) -> list[Tensor]:
    """Outputs of a run.  `each` calls the model in every step; timesteps lie on the device."""
    dtype = next(model.parameters()).dtype
    x = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    t, y = torch.tensor(TIMESTEPS, device="cuda"), torch.tensor([1, 2, 1000, 1000]).cuda()
    outputs = []
    for step in range(STEPS):
        out = each(step, functools.partial(model, x, t[step].expand(4), y))
        outputs.append(out)
        x = x - 0.1 * out[:, :4]
    return outputs


def same(outputs: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(outputs, others, strict=True))


def test_always_full_equals_the_untouched_model(model):
    untouched = sample(model)
    with toca.enabled(model, toca.ToCaConfig(interval=1), timesteps=TIMESTEPS):
        assert same(sample(model), untouched)
    assert same(sample(model), untouched), "as it was, after disable"


def test_a_full_step_with_scores_equals_the_untouched_model(model):
    untouched = sample(model)
    with toca.enabled(model, CONFIG, timesteps=TIMESTEPS):
        assert torch.equal(sample(model)[0], untouched[0])


def test_every_token_equals_the_model_that_reuses_its_attention(model):
    full, dtype = (0, 3, 6), next(model.parameters()).dtype
    with toca.enabled(model, CONFIG.replace(fresh_ratio=1.0), timesteps=TIMESTEPS):
        have = sample(model)
    exact = sample(reuse_attention(model, full, torch.float64))
    rounded = sample(reuse_attention(model, full, dtype))
    assert_close(torch.stack(have), torch.stack(exact), torch.stack(rounded))


@pytest.mark.parametrize("config", CONFIGS)
def test_the_second_run_equals_the_first(model, config):
    with toca.enabled(model, config, timesteps=TIMESTEPS) as session:
        assert same(sample(model), sample(model))
        assert session.summary().cached_steps > 0


@pytest.mark.parametrize("config", CONFIGS)
def test_replayed_runs_are_like_eager_ones(model, config):
    with toca.enabled(model, config, timesteps=TIMESTEPS):
        eager = sample(model)
    with toca.enabled(model, config, timesteps=TIMESTEPS, cuda_graph=True) as session:
        for _ in range(4):  # eager, recorded, replayed, replayed
            replayed = sample(model)
            for have, want in zip(replayed, eager, strict=True):
                torch.testing.assert_close(have, want)
        summary = session.summary()
    assert summary.graph_fallback == ""
    assert summary.graphs > 0


# --- caches in host memory -----------------------------------------------------------------------

APART = {
    "plain": {},
    "int8": {"cache_dtype": "int8"},
    "fp8": {"cache_dtype": "fp8"},
    "forecast": {"forecast": 2, "interval": 2},
    "similarity": {"selector": "similarity"},
    "partial": {"self_attention": "partial", "module_ratio": {"attn": 0.5, "mlp": 1.0}},
    "fused": {"full_steps": "fused"},
    "gate": {"residual_threshold": 0.1},
}


@pytest.mark.parametrize("settings", APART)
def test_caches_in_host_memory_give_the_same_bits(model, settings):
    """In three runs: the first finds out the sizes, the others copy from the first step on."""
    config = CONFIG.replace(**APART[settings])
    with toca.enabled(model, config, timesteps=TIMESTEPS):
        want = sample(model)
    with toca.enabled(model, config.replace(cache_device="cpu"), timesteps=TIMESTEPS) as session:
        for _ in range(3):
            assert same(sample(model), want)
        summary = session.summary()
    assert summary.host_bytes >= summary.cache_bytes > 0
    assert summary.working_bytes > 0


def large() -> torch.nn.Module:
    """12 blocks and 1,024 tokens: 192 MiB of caches in bfloat16, of 16 MiB a block."""
    shape = {"channels": 512, "num_heads": 8, "depth": 12, "input_size": 64}
    return random_dit("S", dtype=torch.bfloat16, **shape).cuda()


def peak(model, config) -> int:
    """Device memory that a run takes at the most, beyond what there was before it."""
    x = torch.randn(8, 4, 64, 64, device="cuda", dtype=torch.bfloat16)
    t, y = torch.tensor(TIMESTEPS, device="cuda"), torch.tensor([1000] * 8, device="cuda")
    with toca.enabled(model, config, timesteps=TIMESTEPS):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for step in range(STEPS):
            model(x, t[step].expand(8), y)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def test_caches_in_host_memory_leave_the_device_to_others():
    need_memory(2)
    model = large()
    at_hand, apart = (
        peak(model, CONFIG.replace(bonus=0.0, cache_device=where)) for where in (None, "cpu")
    )
    told = CONFIG.replace(bonus=0.0, cache_device="cpu").memory(model, batch=8, tokens=1024)
    assert told.cache_bytes == 192 * 2**20
    assert told.working_bytes == 32 * 2**20
    assert at_hand - apart > 0.9 * (told.cache_bytes - told.working_bytes)


def test_nobody_waits_for_copies():
    """The host is not held up in a run that has its buffers, but for its first cached step, which
    fills tables, and its last, which counts NaNs."""
    model = dit(torch.bfloat16)

    def strictly(step: int, call: Callable[[], Tensor]) -> Tensor:
        torch.cuda.set_sync_debug_mode("error" if 2 <= step < STEPS - 1 else "default")
        try:
            return call()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    torch.use_deterministic_algorithms(False)  # its check of the cuBLAS workspace is not ours
    with toca.enabled(model, CONFIG.replace(cache_device="cpu"), timesteps=TIMESTEPS):
        sample(model)
        sample(model)
        sample(model, strictly)


def test_copies_run_while_blocks_compute():
    """Some of them begin before, and end after, a kernel of another stream begins."""
    model = large()
    x = torch.randn(8, 4, 64, 64, device="cuda", dtype=torch.bfloat16)
    t, y = torch.tensor(TIMESTEPS, device="cuda"), torch.tensor([1000] * 8, device="cuda")
    config = CONFIG.replace(bonus=0.0, cache_device="cpu")
    with toca.enabled(model, config, timesteps=TIMESTEPS):
        for step in (0, 1):
            model(x, t[step].expand(8), y)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            model(x, t[2].expand(8), y)
            torch.cuda.synchronize()
    spans = [(e.name, e.time_range.start, e.time_range.end) for e in profiler.events()]
    copies = [one for one in spans if "Memcpy" in one[0] and "inned" in one[0]]
    kernels = [one for one in spans if "Mem" not in one[0]]
    assert copies
    assert any(first < begun < end for _, first, end in copies for _, begun, _ in kernels)


# --- nobody waits --------------------------------------------------------------------------------

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "Memcpy DtoH")


def waits(call: Callable[[], object]) -> list[str]:
    """What a call did that makes the host wait for the device, by the trace."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
    names = {event.name for event in profiler.events()}
    return sorted(name for name in names if any(wait in name for wait in WAITS))


def test_the_trace_shows_who_waits():
    value = torch.ones(3, device="cuda")
    assert waits(lambda: value.sum().item())
    assert not waits(lambda: value + 1)


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_no_step_waits_for_the_device(config, cuda_graph):
    """Of the third run, in which kernels are compiled and graphs recorded; not its first cached
    step, which fills tables, nor its last, which counts NaNs."""
    model = dit(torch.bfloat16)
    plan = config.plan(num_steps=STEPS, num_layers=3, num_tokens=64, modules=("attn", "mlp"))
    cached = (~plan.full["mlp"]).any(axis=1)
    watch = range(2 + int(cached[1:].argmax()), STEPS - 1)
    found: dict[int, list[str]] = {}

    def watched(step: int, call: Callable[[], Tensor]) -> Tensor:
        outputs: list[Tensor] = []

        def strictly() -> None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                outputs.append(call())
            finally:
                torch.cuda.set_sync_debug_mode("default")

        if step not in watch:
            return call()
        found[step] = waits(strictly)
        return outputs[0]

    torch.use_deterministic_algorithms(False)  # its check of the cuBLAS workspace is not ours
    with toca.enabled(model, config, timesteps=TIMESTEPS, cuda_graph=cuda_graph):
        sample(model)
        sample(model)
        sample(model, watched)
    assert found == {step: [] for step in watch}
    assert any(cached[step] for step in watch)


# --- torch.compile -------------------------------------------------------------------------------


def test_a_cached_step_is_one_graph_for_the_compiler():
    x, cache = (torch.randn(2, 64, 32, device="cuda") for _ in range(2))
    shift, scale, gate = torch.randn(2, 96, device="cuda").chunk(3, dim=1)
    age = torch.zeros(2, 64, dtype=torch.int32, device="cuda")
    selection = ops.select_tokens(torch.rand(2, 64, device="cuda"), age, 8).rows(0, 2)
    fc1 = torch.randn(128, 32, device="cuda"), torch.randn(128, device="cuda")
    fc2 = torch.randn(32, 128, device="cuda"), torch.randn(32, device="cuda")

    def step(x: Tensor, cache: Tensor) -> Tensor:
        return ops.partial_mlp(x, selection, (shift, scale, gate), cache, fc1, fc2)

    expected_cache, compiled_cache = cache.clone(), cache.clone()
    expected = step(x, expected_cache)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x, compiled_cache).cpu(), expected.cpu())
    assert_same_bits(compiled_cache.cpu(), expected_cache.cpu())


@pytest.mark.parametrize("preset", ["dit-ddim50", "forecast"])
def test_real_requests_at_different_steps_share_batches(preset):
    config = toca.ToCaConfig.preset(preset, selector="random")  # none that are all but equal
    model = random_dit("S", depth=3).to("cuda", torch.float32)
    noise = torch.randn(4, 4, 32, 32, device="cuda")
    labels = torch.arange(4, device="cuda")

    def step(rows, t, batch):
        times = torch.tensor(t, device="cuda")
        with batch:
            x[rows] -= 0.1 * model(x[rows], times, labels[rows])[:, :4]

    x = noise.clone()
    with toca.enabled(model, config) as session:
        requests = [session.request(num_steps=8) for _ in range(4)]
        for tick in range(11):
            rows = [n for n in range(4) if n <= tick < n + 8]
            step(
                rows,
                [900.0 - 100 * (tick - n) for n in rows],
                session.batch([requests[n] for n in rows]),
            )
    together, x = x, noise.clone()
    for n in range(4):
        with toca.enabled(model, config, num_steps=8):
            for tick in range(8):
                step([n], [900.0 - 100 * tick], contextlib.nullcontext())
    torch.testing.assert_close(together, x, rtol=1e-3, atol=1e-3)
