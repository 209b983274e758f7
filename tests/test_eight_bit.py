"""store_rows and what 8-bit caches are read as: equal to the bit in every body."""

import re

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
from tolerance import UNIT, assert_same_bits, exact_values


def uneven_rows(B, N, C, dtype):
    """Rows of very different size, as far as the dtype goes."""
    least, most = (-6, 3) if dtype == torch.float16 else (-30, 30)
    size = 10.0 ** torch.linspace(least, most, max(B * N, 1))[: B * N].view(B, N, 1)
    return (torch.randn(B, N, C) * size).to(dtype)


def special_rows(C, dtype):
    """Zeros, -0, values too small for a scale, one NaN, one infinity, both, one lone value."""
    rows = torch.randn(1, 8, C).to(dtype)
    rows[0, 0], rows[0, 1] = 0.0, -0.0
    rows[0, 2] *= 1e-38
    rows[0, 3, C // 2] = torch.nan
    rows[0, 4, C - 1] = -torch.inf
    rows[0, 5, 0], rows[0, 5, C - 1] = torch.inf, torch.nan
    rows[0, 6, 1:] = 0.0
    return rows


# --- store_rows ---


@every_kind
@every_dtype
def test_reference_rounds_as_the_oracle(dtype, kind):
    rows = uneven_rows(2, 9, 37, dtype)
    values, scale = oracle.store_rows(exact_values(rows), str(kind).removeprefix("torch."))
    cache = written(rows, kind)
    assert (abs(cache.scale.numpy() - scale) <= 2 * UNIT * scale).all()
    # The rounded quotient carries three roundings; so near a tie either neighbour is right.
    quotient = exact_values(rows) / scale[:, :, None]
    have = cache.values.float().double().numpy()
    assert (abs(have - quotient) <= abs(values - quotient) + 8 * UNIT * abs(quotient)).all()


@pytest.mark.parametrize(
    ("kind", "quotients", "rounded"),
    [
        (INT8, [127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5], [127, 0, 2, 2, 0, -2, -126]),
        (FLOAT8, [448, 17, 19, -17, 432, 2**-10, 3 * 2**-10], [448, 16, 20, -16, 448, 0, 2**-8]),
    ],
    ids=["int8", "float8"],
)
@every_body
def test_ties_go_to_even(body, kind, quotients, rounded):
    cache = written(torch.tensor(quotients).view(1, 1, -1).float(), kind, body)
    assert cache.scale.item() == 1.0
    assert cache.values.float().flatten().tolist() == rounded


@every_kind
@every_dtype
def test_special_rows(dtype, kind):
    cache = written(special_rows(24, dtype), kind)
    assert (cache.scale[0] == 0).tolist() == [True] * 3 + [False] * 5
    assert cache.scale[0].isnan().tolist() == [False] * 3 + [True] * 3 + [False] * 2
    assert (cache.values[0, :6].view(torch.int8) == 0).all()
    assert cache.values[0, 6, 0].float().abs() == (127 if kind == INT8 else 448)
    back = read(cache)
    assert back[0, 3:6].isnan().all()
    assert (back[0, :3] == 0).all()


@every_kind
@every_dtype
def test_round_trip(dtype, kind):
    rows = uneven_rows(2, 25, 200, dtype)
    cache = written(rows, kind)
    error, scale = (read(cache) - rows.double()).abs(), cache.scale.double()[:, :, None]
    # What rounding in float32 adds is relative to the quotient, 127 or 448 at most.
    if kind == INT8:
        assert (error <= scale * (0.5 + 127 * 8 * UNIT)).all()
    else:
        bound = torch.maximum(rows.double().abs() / 16, scale / 1024)
        assert (error <= bound * (1 + 16 * UNIT) + scale * 448 * 8 * UNIT).all()


@every_kind
@every_dtype
@pytest.mark.parametrize("C", [1, 3, 15, 16, 37, 1152])
def test_native_writes_the_same_bits(C, dtype, kind, isa):
    for rows in (uneven_rows(2, 9, C, dtype), special_rows(C, dtype) if C > 1 else None):
        if rows is not None:
            assert_same_cache(written(rows, kind, "native"), written(rows, kind))


@needs_triton
@every_kind
@every_dtype
@pytest.mark.parametrize("C", [1, 37, 300])
def test_triton_writes_the_same_bits(C, dtype, kind):
    for rows in (uneven_rows(2, 9, C, dtype), special_rows(C, dtype) if C > 1 else None):
        if rows is not None:
            assert_same_cache(written(rows, kind, "triton"), written(rows, kind))


@every_kind
@pytest.mark.parametrize("size", [(0, 9, 24), (2, 0, 24), (2, 9, 0)])
def test_nothing_to_store(size, kind, backend):
    cache = new_cache(*size, kind)
    toca.store_rows(cache, torch.randn(size), backend=backend)
    assert (cache.scale == 0).all()


def test_a_plain_cache_is_copied_to(backend):
    rows, cache = torch.randn(2, 5, 7), torch.zeros(2, 5, 7)
    toca.store_rows(cache, rows, backend=backend)
    assert_same_bits(cache, rows)


@every_kind
def test_every_code_reads_as_torch_reads_it(kind, isa):
    codes = torch.arange(256).to(torch.uint8).view(kind).view(1, 1, 256)
    cache = toca.QuantizedCache(codes, torch.full((1, 1), 0.5))
    result = toca.scatter_residual(torch.zeros(1, 1, 256), [(None, cache)], backend="native")
    assert_same_bits(result, codes.float() * 0.5 + 0.0)


@needs_triton
@every_kind
def test_every_code_reads_in_triton(kind):
    codes = torch.arange(256).to(torch.uint8).view(kind).view(1, 1, 256)
    cache = toca.QuantizedCache(codes, torch.full((1, 1), 0.5))
    result = interpreter.call("scatter_residual", torch.zeros(1, 1, 256), [(None, cache)])
    assert_same_bits(result, codes.float() * 0.5 + 0.0)


# --- registration ---

B, N, C, K = 2, 9, 8, 3


# test_schema compares what a call was given before and after, which torch cannot do for float8.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@every_kind
def test_opcheck(kind, backend):
    ops, rows = torch.ops.toca, torch.randn(B, N, C)
    cache, gate = written(rows, kind), torch.randn(B, C)
    index, inverse = selected(B, N, K)
    caches = [torch.randn(B, N, C), cache.values, cache.scale]
    updates = [gate, None], caches, [None, torch.randn(B, K, C)], [None, inverse]
    given = rows, index, gate, gate, gate, cache.values, None, None, "layer", 1e-6
    for op, arguments in (
        (ops.store_rows, (cache.values, cache.scale, [], None, 0, rows, backend)),
        (ops.scatter_residual, (rows, *updates, backend)),
        (ops.scatter_residual_, (rows, *updates, backend)),
        (ops.gather_modulate, (*given, backend, cache.scale)),
    ):
        checks = CHECKS if kind == FLOAT8 else ("test_schema", *CHECKS)
        torch.library.opcheck(op.default, arguments, test_utils=checks)


@every_kind
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_full_graph(compiler, kind):
    def step(x, attn, mlp, modulation, index, inverse, fresh):
        toca.store_rows(attn, x)
        rows = toca.gather_modulate(x, index, *modulation[1:], residual=(modulation[0], attn))
        updates = [(modulation[0], attn), (None, mlp, fresh + rows, inverse)]
        return rows, toca.scatter_residual(x, updates, inplace=True)

    torch._dynamo.reset()
    index, inverse = selected(B, N, K)
    x, rest = torch.randn(B, N, C), (tuple(torch.randn(3, B, C)), index, inverse)
    caches = written(torch.randn(B, N, C), kind), written(torch.randn(B, N, C), kind)
    fresh = torch.randn(B, K, C)
    copies = x.clone(), *map(clone, caches)
    want = step(x, *caches, *rest, fresh)
    have = torch.compile(step, fullgraph=True, backend=compiler)(*copies, *rest, fresh)
    torch._dynamo.reset()
    for compiled, eager in zip((*have, copies[0]), (*want, x), strict=True):
        assert_same_bits(compiled, eager)
    for compiled, eager in zip(copies[1:], caches, strict=True):
        assert_same_cache(compiled, eager)


# --- refusals ---


def values(*size, dtype=INT8):
    return torch.zeros(size).to(dtype)


REFUSED = [
    pytest.param(
        values(2, 12, 8),
        torch.zeros(2, 13),
        "cache values: expected shape (2, 13, 8), got (2, 12, 8)",
        id="shape-of-values",
    ),
    pytest.param(
        values(2, 13, 8, dtype=torch.uint8),
        torch.zeros(2, 13),
        "cache values: expected dtype int8 or float8_e4m3fn, got uint8",
        id="dtype-of-values",
    ),
    pytest.param(
        values(2, 13, 8, dtype=torch.float8_e5m2),
        torch.zeros(2, 13),
        "cache values: expected dtype int8 or float8_e4m3fn, got float8_e5m2",
        id="other-float8",
    ),
    pytest.param(
        values(2, 8, 13).transpose(1, 2),
        torch.zeros(2, 13),
        "cache values: expected a contiguous tensor, got strides (104, 1, 13)",
        id="layout-of-values",
    ),
    pytest.param(
        values(2, 13, 8),
        torch.zeros(2, 13, 1),
        "cache scale: expected shape (2, 13), got (2, 13, 1)",
        id="shape-of-scale",
    ),
    pytest.param(
        values(2, 13, 8),
        torch.zeros(2, 13).half(),
        "cache scale: expected dtype float32, got float16",
        id="dtype-of-scale",
    ),
    pytest.param(
        values(2, 13, 8),
        torch.zeros(13, 2).t(),
        "cache scale: expected a contiguous tensor, got strides (1, 2)",
        id="layout-of-scale",
    ),
    pytest.param(
        values(2, 13, 8),
        torch.zeros(2, 13, device="meta"),
        "cache scale: expected device cpu, got meta",
        id="device-of-scale",
    ),
    pytest.param(
        None, torch.zeros(2, 13), "cache values: expected a tensor, got NoneType", id="no-values"
    ),
]


@pytest.mark.parametrize(("values", "scale", "message"), REFUSED)
def test_refuses_a_cache(values, scale, message):
    x, gate, cache = torch.randn(2, 13, 8), torch.randn(2, 8), toca.QuantizedCache(values, scale)
    with pytest.raises(ValueError, match=re.escape(message)):
        toca.store_rows(cache, x)
    with pytest.raises(ValueError, match=re.escape(f"updates[1] {message}")):
        toca.scatter_residual(x, [(gate, x.clone()), (gate, cache)])
    with pytest.raises(ValueError, match=re.escape(f"residual {message}")):
        toca.gather_modulate(x, None, gate, gate, residual=(gate, cache))


@pytest.mark.parametrize("dtype", [INT8, FLOAT8, torch.float64], ids=str)
def test_refuses_rows(dtype):
    cache = written(torch.randn(2, 13, 8), INT8)
    message = "rows: expected dtype float32 or bfloat16 or float16, got "
    with pytest.raises(ValueError, match=message):
        toca.store_rows(cache, torch.zeros(2, 13, 8).to(dtype))


def test_a_bare_8_bit_tensor_is_no_cache():
    """Without its scale it says nothing."""
    x = torch.randn(2, 13, 8)
    with pytest.raises(ValueError, match="cache: expected dtype float32, got int8"):
        toca.store_rows(torch.zeros(2, 13, 8, dtype=INT8), x)


def test_a_refused_slot_changes_nothing(backend):
    x, fresh = torch.randn(1, 4, 8), torch.randn(1, 2, 8)
    cache = written(x, INT8)
    before = clone(cache)
    good = torch.tensor([[0, -1, 1, -1]], dtype=torch.int32)
    bad = torch.tensor([[0, -1, 2, -1]], dtype=torch.int32)
    updates = [(None, cache, fresh, good), (None, x.clone(), fresh, bad)]
    with pytest.raises(ValueError, match=r"inverse: expected values in \[-1, 2\)"):
        toca.scatter_residual(x, updates, backend=backend)
    assert_same_cache(cache, before)
