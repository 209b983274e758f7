"""Every Triton kernel with every shipped tile, compiled for sm_80 and sm_90 without a GPU.

Code that spills, exceeds shared memory or misses the tensor cores is right and slow: no other test
on the CPU would see it.
"""

import os
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'toca_kernels[triton]'")

import triton
from triton.backends.compiler import GPUTarget

from toca_kernels import triton as kernels
from toca_kernels.apps import aot
from toca_kernels.apps.measuring.shapes import SHAPES, Shape
from toca_kernels.features import ForecastCache
from toca_kernels.triton import configs

ATTENTION = ("attention_scores", "attention_entropy", "partial_attention")
HEAD_DIMS = (64, 72, 80, 96, 128, 256)
OF_EACH_TABLE = (72, 96, 128, 256)  # head dimensions up to 80 share their tiles
DENSE = ("scored_attention",)  # its tiles are for few and for many rows
# Tiles for few, some and many rows; some: without text, so the keys are split.
ROWS = {
    "few": {"B": 1, "N": 64, "k": 16, "text": 120},
    "some": {"B": 1, "N": 2048, "k": 60},
    "many": {"B": 16, "N": 2048, "k": 600, "text": 120},
}


def attention_shape(rows, D, dtype=torch.bfloat16):
    return Shape(f"{rows} rows, D {D}", C=16 * D, H=16, dtype=dtype, **ROWS[rows])


def mlp_shape(rows, C):
    return Shape(f"{rows} rows, C {C}", 1, 256, C, 16, rows)


# Name -> (shape, ops).
CASES = {shape.name: (shape, None) for shape in SHAPES}
CASES |= {
    f"{rows}-rows-d{D}": (
        attention_shape(rows, D),
        ATTENTION if rows == "some" else ATTENTION + DENSE,
    )
    for rows in ROWS
    for D in (HEAD_DIMS if rows == "many" else OF_EACH_TABLE)
}
CASES |= {
    f"{rows}-rows-d{D}-float32": (attention_shape(rows, D, torch.float32), ops)
    for rows, D, ops in (
        ("few", 72, ATTENTION + DENSE),
        ("some", 72, ATTENTION),
        ("few", 256, ATTENTION + DENSE),
    )
}
CASES |= {f"mlp-of-{rows}-rows": (mlp_shape(rows, 1152), ("mlp_rows",)) for rows in (16, 32, 128)}
CASES |= {
    "wide-mlp": (mlp_shape(64, 3072), ("mlp_rows",)),
    "float16": (Shape("float16", 1, 100, 384, 6, 33, text=20, dtype=torch.float16), None),
    "odd-sizes-and-one-token": (
        Shape("odd", 1, 33, 39, 3, 1, dtype=torch.float32),
        (
            "gather_modulate",
            "gather_modulate_forecast",
            "gather_modulate_int8",
            "read_rows",
            "scatter_residual",
            "scatter_residual_forecast",
            "scatter_residual_int8",
            "select_tokens",
            "store_rows",
            "store_rows_forecast",
        ),
    ),
}

B, N, C, k = 2, 100, 384, 30


def meta(*size, dtype=torch.bfloat16):
    return torch.empty(size, dtype=dtype, device="meta")


def gather(index, rows, *, affine, norm):
    """`rows`: the modulation of a sample, (B, C), or of each token, (B, N, C)."""
    x, weight = meta(B, N, C), meta(C) if affine else None
    return lambda: kernels.gather_modulate(
        x, index, rows, rows, None, None, weight, weight, norm, 1e-6
    )


def scatter(*updates):
    """(gate, fresh) of each update."""
    inverse = [None if fresh is None else meta(B, N, dtype=torch.int32) for _, fresh in updates]
    gates, fresh = zip(*updates, strict=True)
    x, caches = meta(B, N, C), [meta(B, N, C) for _ in updates]
    return lambda: kernels.scatter_residual(x, gates, caches, fresh, inverse, x)


def eight_bit(kind, call):
    """`call` with the values and the scales of an 8-bit cache."""
    return lambda: call(meta(B, N, C, dtype=kind), meta(B, N, dtype=torch.float32))


def gather_cached(values, scale):
    x, rows = meta(B, N, C), meta(B, C)
    kernels.gather_modulate(x, None, rows, rows, rows, values, None, None, "rms", 1e-6, scale)


def scatter_cached(values, scale):
    """One 8-bit cache that is read, then one of each kind with fresh rows."""
    x, gate, fresh = meta(B, N, C), meta(B, C), meta(B, k, C)
    inverse = meta(B, N, dtype=torch.int32)
    kernels.scatter_residual(x, [None], [values], [None], [None], x, [scale])
    kernels.scatter_residual(
        x, [gate] * 2, [x, values], [fresh] * 2, [inverse] * 2, x, [None, scale]
    )


def forecast(slopes, computed):
    x = [meta(B, N, C) for _ in range(slopes)]
    return ForecastCache(meta(B, N, C), tuple(x), meta(B, N, dtype=torch.float32), computed)


def stored(slopes, computed):
    cache = forecast(slopes, computed)
    return lambda: kernels.store_rows(cache.values, None, meta(B, N, C), cache)


def extrapolated(slopes):
    """Everything that reads a forecast cache of so many slopes: every row, and selected ones."""
    cache, rows = forecast(slopes, slopes + 1), meta(B, C)
    read = cache.slopes, cache.distance

    def call():
        x, index = meta(B, N, C), meta(B, k, dtype=torch.int64)
        given = x, None, rows, rows, None, cache.values, None, None, "rms", 1e-6, None
        kernels.gather_modulate(*given, *read)
        for selected in (None, index):
            kernels.read_rows(cache.values, selected, None, *read, torch.bfloat16)

    return call


def scatter_forecasts(*caches):
    """Every second one without fresh rows, and one cache that is not extrapolated."""
    values = [*(cache.values for cache in caches), meta(B, N, C)]
    fresh = [meta(B, k, C) if u % 2 == 0 else None for u in range(len(values))]
    inverse = [None if rows is None else meta(B, N, dtype=torch.int32) for rows in fresh]
    gates = [meta(B, C), meta(B, N, C), None, meta(B, C)][: len(values)]
    x, forecasts = meta(B, N, C), [*caches, None]
    return lambda: kernels.scatter_residual(x, gates, values, fresh, inverse, x, None, forecasts)


def mlp(activation, bias, rows=36):
    bias1, bias2 = (meta(4 * C), meta(C)) if bias else (None, None)
    weights = meta(4 * C, C), bias1, meta(C, 4 * C), bias2
    return lambda: kernels.mlp_rows(meta(1, rows, C), *weights, activation)


def every_op(shape):
    return lambda: [call() for call in aot.calls(shape).values()]


def select(k, **options):
    tensors = meta(4, 256, dtype=torch.float32), meta(4, 256, dtype=torch.int32)
    grid, cell, bonus = (1, 16, 16), options.get("cell", 1), options.get("bonus", 0.0)
    return lambda: kernels.select_tokens(*tensors, k, 0.25, grid, cell, bonus)


# What the shapes above leave out: options that compile other code.  An argument that is 1 becomes
# a constant, which is other code too.
VARIANTS = {
    "gather-every-token": gather(None, meta(B, C), affine=True, norm="rms"),
    "gather-by-token": gather(
        meta(B, k, dtype=torch.int64), meta(B, N, C), affine=True, norm="layer"
    ),
    "scatter-one-without-gate": scatter((None, None)),
    "scatter-four": scatter(
        (meta(B, C), meta(B, k, C)), (meta(B, N, C), None), (None, meta(B, 1, C)), (None, None)
    ),
    "gather-float8": eight_bit(torch.float8_e4m3fn, gather_cached),
    "scatter-int8": eight_bit(torch.int8, scatter_cached),
    "scatter-float8": eight_bit(torch.float8_e4m3fn, scatter_cached),
    "store-float8": eight_bit(
        torch.float8_e4m3fn,
        lambda values, scale: kernels.store_rows(values, scale, meta(B, N, C)),
    ),
    **{
        f"store-forecast-{slopes}-{computed}": stored(slopes, computed)
        for slopes, computed in ((1, 0), (1, 1), (1, 2), (2, 1), (2, 3))
    },
    "read-forecast-1": extrapolated(1),
    "read-forecast-2": extrapolated(2),
    "scatter-forecast-one": scatter_forecasts(forecast(1, 2)),
    "scatter-forecast-first": scatter_forecasts(forecast(1, 1), forecast(2, 2)),
    "scatter-forecast-four": scatter_forecasts(forecast(2, 3), forecast(2, 3), forecast(2, 3)),
    "read-int8": eight_bit(
        torch.int8,
        lambda values, scale: kernels.read_rows(values, None, scale, (), None, torch.float16),
    ),
    "mlp-gelu-without-bias": mlp("gelu", False),
    "mlp-silu": mlp("silu", True),
    "mlp-of-one-row": mlp("gelu_tanh", True, rows=1),
    "select-none": select([0] * 4),
    "select-one": select([1] * 4, cell=2, bonus=0.5),
    "select-ragged": select([1, 2, 3, 4]),
    "sizes-of-1": every_op(Shape("ones", 1, 1, 1, 1, 1, layers=1, text=1)),
    "sizes-of-2": every_op(Shape("twos", 2, 2, 4, 2, 2, layers=1, text=2)),
    "keys-split": lambda: kernels.partial_attention(
        meta(1, 1, 1, 64), meta(1, 1, 4096, 64), meta(1, 1, 4096, 64), 0.1, None
    ),
}


def rows_of(name, arch):
    """What every kernel of a case or variant costs."""
    if name in CASES:
        shape, ops = CASES[name]
        return aot.table(ops, [shape], [arch])
    with kernels.recording(arch) as launches:
        VARIANTS[name]()
    return [aot.resources(launch, arch) for launch in launches]


@pytest.fixture(scope="session")
def compiled(request):
    """(name, arch) -> its rows to come: every core compiles what the selected tests ask for."""
    wanted = [
        (item.callspec.params["name"], item.callspec.params["arch"])
        for item in request.session.items
        if "compiled" in item.fixturenames
    ]
    pool = ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"))
    yield {case: pool.submit(rows_of, *case) for case in wanted}
    pool.shutdown(cancel_futures=True)


every_arch = pytest.mark.parametrize("arch", aot.ARCHS, ids=lambda arch: f"sm_{arch}")

# A kernel of these multiplies matrices; the name is followed by its tile.
PRODUCTS = (*ATTENTION, *DENSE, "linear")


def product_rows(row):
    """Rows of the product that a program computes, 0 where there is none."""
    if row["kernel"] not in {f"_{name}_kernel" for name in PRODUCTS}:
        return 0
    return int(row["tile"].split()[0][1:])


def assert_registers_left(row, arch):
    """partial_attention on sm_80: so far from the 255 that another Triton does not spill either."""
    if arch == 80 and row["kernel"] == "_partial_attention_kernel":
        assert row["registers"] <= 224, f"close to a spill: {row}"


def assert_no_spill(row):
    assert (row["stack"], row["LDL"], row["STL"]) == (0, 0, 0), f"spills: {row}"


@pytest.mark.slow
@every_arch
@pytest.mark.parametrize("name", CASES)
def test_compiles_to_good_code(name, arch, compiled):
    rows = compiled[name, arch].result()
    assert rows
    for row in rows:
        assert_no_spill(row)
        assert_registers_left(row, arch)
        assert row["shared"] <= aot.SHARED_LIMIT[arch], f"too much shared memory: {row}"
        if product_rows(row):
            assert row["LDGSTS"] > 0, f"loads are not asynchronous: {row}"
        if product_rows(row) and CASES[name][0].dtype != torch.float32:
            tensor_core = "HGMMA" if arch >= 90 and product_rows(row) >= 64 else "HMMA"
            assert row[tensor_core] > 0, f"no {tensor_core}: {row}"


@pytest.mark.slow
@every_arch
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_compile(name, arch, compiled):
    rows = compiled[name, arch].result()
    assert rows
    for row in rows:
        assert_no_spill(row)


def recorded():
    """Every launch of every case above."""
    for shape, ops in CASES.values():
        for arch in aot.ARCHS:
            yield from ((arch, launch) for _, launch in aot.launches(shape, arch, ops))


def test_every_shipped_tile_is_compiled():
    used = defaultdict(set)
    for arch, launch in recorded():
        sizes = [value for name, value in launch.arguments.items() if name.startswith("BLOCK_")]
        options = [launch.options.get(name) for name in ("num_warps", "num_stages")]
        used[launch.kernel.__name__, arch].add((*sizes, *options))
    for arch in aot.ARCHS:
        tables = {
            "_attention_scores_kernel": configs._ATTENTION_SCORES,
            "_attention_entropy_kernel": configs._ATTENTION_ENTROPY,
            "_partial_attention_kernel": configs._PARTIAL_ATTENTION[arch],
            "_scored_attention_kernel": configs._SCORED_ATTENTION[arch],
        }
        for name, tiles_of in tables.items():
            have = {sizes[2:] for sizes in used[name, arch]}  # after BLOCK_D and BLOCK_REST
            want = {tile for _, tiles in (*tiles_of, *configs._FLOAT32) for tile in tiles}
            assert want <= have, f"{name}, sm_{arch}: not compiled: {want - have}"
        assert {tuple(tile[:5]) for _, tile in configs._LINEAR} <= used["_linear_kernel", arch]


def test_recording_runs_nothing():
    x = torch.ones(1, 4, 32, device="meta")
    with kernels.recording(90) as launches:
        out = kernels.gather_modulate(
            x, None, x[:, 0], x[:, 1], None, None, None, None, "layer", 1e-6
        )
    assert out.device.type == "meta"
    assert [launch.kernel.__name__ for launch in launches] == ["_gather_modulate_kernel"]
    assert launches[0].grid == (4,)


class NoDevice:
    """A driver for Triton's own binder of arguments, which asks only for the target."""

    def get_current_target(self):
        return GPUTarget("cuda", 80, 32)


@pytest.mark.parametrize("name", CASES)
def test_arguments_are_specialised_as_in_a_call(name, monkeypatch):
    """What is compiled here is what Triton would compile when the launcher is called."""
    monkeypatch.setattr(triton.runtime.driver, "_active", NoDevice())
    for _, launch in aot.launches(CASES[name][0], 80):
        *_, backend, bind = launch.kernel.create_binder()
        options = launch.options | {"debug": False}
        bound, specialization, named = bind(**launch.arguments, **options)
        _, signature, constants, attributes = launch.kernel._pack_args(
            backend, options, bound, specialization, named
        )
        source = aot.source(launch)
        assert source.signature == signature
        assert source.constants == constants
        assert source.attrs == {position: found for position, found in attributes.items() if found}


def test_command_prints_a_table(capsys):
    arguments = ["scatter_residual", "--arch", "80", "--tokens", "100", "--channels", "384"]
    aot.main([*arguments, "--heads", "6"])
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["kernel", "shape", "arch"]
    assert row.startswith("scatter_residual  2 x 100 x 384")
    aot.main([*arguments, "--heads", "6", "--markdown"])
    assert capsys.readouterr().out.count("| scatter_residual |") == 1


@pytest.mark.parametrize(
    "arguments",
    [["--tokens", "100", "--selected", "101"], ["--tokens", "100", "--channels", "100"]],
    ids=["more-than-all-tokens", "heads-that-do-not-divide"],
)
def test_command_refuses(arguments):
    with pytest.raises(SystemExit):
        aot.main(arguments)
