"""The CUDA bodies, run on the CPU: the same source, with a CTA's threads as fibers of one thread.

cuda_on_host/cuda_runtime.h says what that can show (indices, bounds, missing barriers) and what it
cannot.  The tests are those of every backend; only the module behind `native` is another one.
"""

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import forecast
import test_eight_bit_updates
import test_forecast_updates
import test_gather_modulate
import test_read_rows
import test_scatter_residual
import test_select_tokens
from eight_bit import assert_same_cache, every_dtype, every_kind, new_cache, written
from forecast import every_stage
from test_eight_bit import special_rows, uneven_rows
from test_select_tokens import check_against_oracle, few_levels, random_age
from toca_kernels import (
    QuantizedCache,
    gather_modulate,
    native,
    read_rows,
    scatter_residual,
    store_rows,
)
from tolerance import assert_backend_within_budget, assert_same_bits

HERE = Path(__file__).parent / "cuda_on_host"
CSRC = Path(__file__).parents[1] / "csrc"
KERNELS = ("select_tokens", "gather_modulate", "scatter_residual", "store_rows", "read_rows")
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        COMPILER is None or importlib.util.find_spec("pybind11") is None,
        reason="needs a C++ compiler and pybind11: pip install pybind11",
    ),
]


@pytest.fixture(scope="session")
def on_host(tmp_path_factory):
    """The extension with the CUDA bodies and without the others."""
    import pybind11  # here: the tests are skipped without it

    build = tmp_path_factory.mktemp("cuda_on_host")
    sources = [CSRC / "bindings.cpp", HERE / "fibers.cpp", HERE / "no_cpu.cpp"]
    sources += [CSRC / "cuda" / f"{name}.cu" for name in KERNELS]
    # As CUDA's compiler leaves it: select_tokens is compiled without fused multiply-adds.
    flags = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    flags += ["-DTOCA_ISA=on_host", "-fvisibility=hidden", "-fno-extern-tls-init"]
    folders = [HERE, CSRC, pybind11.get_include(), sysconfig.get_path("include")]
    includes = [f"-I{folder}" for folder in folders]

    def compiled(source):
        target = build / f"{source.stem}.o"
        command = [COMPILER, *flags, *includes, "-x", "c++", "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    library = build / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([COMPILER, "-shared", *objects, "-o", str(library)], check=True)
    loader = importlib.machinery.ExtensionFileLoader("cuda_on_host._C", str(library))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def cuda(on_host, monkeypatch):
    """Named `native`, the CUDA bodies run."""
    monkeypatch.setattr(native, "_C", on_host)
    monkeypatch.setattr(native, "_where", lambda _: (0, 0))


# --- select_tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", test_select_tokens.SCORES)
@pytest.mark.parametrize(("R", "N", "k", "options"), test_select_tokens.CASES)
def test_select_tokens(R, N, k, options, scores, cuda):
    check_against_oracle(scores(R, N), random_age(R, N), k, options, "native")


@pytest.mark.parametrize(
    ("R", "N", "k", "options"),
    [
        pytest.param(2, 4608, 461, {"age_weight": 0.1}, id="flux"),
        pytest.param(
            2, 4096, 600, {"grid": (64, 64), "cell": 2, "bonus": 99.0}, id="tiles-of-many-warps"
        ),
        pytest.param(1, 23 * 1024, 3, {}, id="the-longest-in-shared-memory"),
        pytest.param(2, 23 * 1024 + 1, (5000, 0), {}, id="the-shortest-in-scratch"),
        pytest.param(2, 65_537, (70, 65_537), {"age_weight": 1.0}, id="the-shortest-in-chunks"),
        pytest.param(
            1, 90_000, 9000, {"grid": (10, 90, 100), "cell": 7, "bonus": 0.5}, id="tiles-in-chunks"
        ),
        pytest.param(3, 65_600, (0, 1, 65_599), {}, id="ragged-in-chunks"),
    ],
)
def test_select_tokens_of_long_rows(R, N, k, options, cuda):
    for score in (torch.randn(R, N), few_levels(R, N)):
        check_against_oracle(score, random_age(R, N), k, options, "native")


def test_many_long_rows_are_not_cut(on_host):
    scratch = on_host.select_tokens_scratch
    assert scratch(64, 65_537) > 64 * 65_537
    assert scratch(65, 65_537) == 65 * 65_537
    assert scratch(65, 23 * 1024) == 0


# --- gather_modulate -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", test_gather_modulate.DTYPES, ids=str)
@pytest.mark.parametrize(("B", "N", "C", "k", "options"), test_gather_modulate.CASES)
def test_gather_modulate_(B, N, C, k, options, dtype, cuda):
    tensors, options, reference, exact = test_gather_modulate.problem(B, N, C, k, options, dtype)
    result = gather_modulate(*tensors, **options, backend="native")
    assert_backend_within_budget(result, reference, exact)


@pytest.mark.parametrize("index", [-1, 3, 2**40])
def test_an_index_out_of_range_is_not_followed(index, cuda):
    x, shift, scale = torch.randn(1, 3, 8), torch.zeros(1, 8), torch.zeros(1, 8)
    rows = gather_modulate(x, torch.tensor([[0, index]]), shift, scale, backend="native")
    assert rows[0, 0].isfinite().all()
    assert rows[0, 1].isnan().all()


def test_too_many_channels_are_refused(cuda):
    x, row = torch.zeros(1, 1, 12_289), torch.zeros(1, 12_289)
    with pytest.raises(ValueError, match="expected at most 12288 channels on CUDA, got 12289"):
        gather_modulate(x, None, row, row, backend="native")


# --- scatter_residual ----------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", test_scatter_residual.DTYPES, ids=str)
@pytest.mark.parametrize(("B", "N", "C", "k", "gates"), test_scatter_residual.CASES)
def test_scatter_residual_(B, N, C, k, gates, dtype, inplace, cuda):
    x, updates, (reference, _), exact, exact_caches = test_scatter_residual.problem(
        B, N, C, k, gates, dtype
    )
    result, caches = test_scatter_residual.run(x, updates, "native", inplace=inplace)
    assert_backend_within_budget(result, reference, exact)
    for cache, exact_cache in zip(caches, exact_caches, strict=True):
        assert_same_bits(cache, exact_cache)


@pytest.mark.parametrize("slot", [-2, 1, 2**31 - 1, -(2**31)])
def test_a_slot_out_of_range_is_not_followed(slot, cuda):
    x, cache, fresh = torch.zeros(1, 2, 8), torch.ones(1, 2, 8), torch.full((1, 1, 8), 2.0)
    inverse = torch.tensor([[0, slot]], dtype=torch.int32)
    result = scatter_residual(x, [(None, cache, fresh, inverse)], backend="native")
    assert_same_bits(result[0, :, 0], torch.tensor([2.0, 1.0]))
    assert_same_bits(cache, result)


# --- 8-bit caches --------------------------------------------------------------------------------


@every_kind
@every_dtype
@pytest.mark.parametrize("C", [1, 3, 16, 37, 1152])
def test_store_rows(C, dtype, kind, cuda):
    for rows in (uneven_rows(2, 9, C, dtype), *([special_rows(C, dtype)] if C > 1 else [])):
        assert_same_cache(written(rows, kind, "native"), written(rows, kind))


@every_kind
@pytest.mark.parametrize("size", [(0, 9, 24), (2, 0, 24), (2, 9, 0)])
def test_nothing_to_store(size, kind, cuda):
    cache = new_cache(*size, kind)
    store_rows(cache, torch.randn(size), backend="native")
    assert (cache.scale == 0).all()


@every_kind
def test_every_code_is_read(kind, cuda):
    codes = torch.arange(256).to(torch.uint8).view(kind).view(1, 1, 256)
    cache = QuantizedCache(codes, torch.full((1, 1), 0.5))
    result = scatter_residual(torch.zeros(1, 1, 256), [(None, cache)], backend="native")
    assert_same_bits(result, codes.float() * 0.5 + 0.0)


@every_dtype
@pytest.mark.parametrize(("B", "N", "C", "k", "words"), test_eight_bit_updates.CASES)
def test_scatter_residual_in_8_bits(B, N, C, k, words, dtype, cuda):
    x, updates, reference, caches, exact = test_eight_bit_updates.problem(B, N, C, k, words, dtype)
    result, have = test_eight_bit_updates.run(x, updates, "native")
    assert_backend_within_budget(result, reference, exact)
    for cache, want in zip(have, caches, strict=True):
        assert_same_cache(cache, want)


@every_dtype
@pytest.mark.parametrize("kind", test_eight_bit_updates.KINDS)
@pytest.mark.parametrize(("B", "N", "C", "k", "gate"), test_eight_bit_updates.GATHER)
def test_gather_modulate_in_8_bits(B, N, C, k, gate, kind, dtype, cuda):
    given, residual, reference, exact = test_eight_bit_updates.gather_problem(
        B, N, C, k, gate, kind, dtype
    )
    result = gather_modulate(*given, residual=residual, backend="native")
    assert_backend_within_budget(result, reference, exact)


# --- forecast caches -----------------------------------------------------------------------------


@every_stage
@every_dtype
@pytest.mark.parametrize("C", [1, 3, 16, 37, 1152])
def test_store_rows_of_a_forecast(C, dtype, slopes, computed, cuda):
    cache = forecast.new_cache(2, 9, C, dtype, slopes, computed)
    rows = torch.randn(2, 9, C).to(dtype)
    have, want = forecast.clone(cache), forecast.clone(cache)
    store_rows(have, rows, backend="native")
    store_rows(want, rows, backend="reference")
    forecast.assert_same_cache(have, want)


@pytest.mark.parametrize("size", [(0, 9, 24), (2, 0, 24), (2, 9, 0)])
def test_nothing_to_store_in_a_forecast(size, cuda):
    cache = forecast.new_cache(*size, torch.float32, 2, 3)
    store_rows(cache, torch.randn(size), backend="native")


@every_dtype
@pytest.mark.parametrize(("B", "N", "C", "k", "words"), test_forecast_updates.CASES)
def test_scatter_residual_of_forecasts(B, N, C, k, words, dtype, cuda):
    x, updates, reference, caches, exact = test_forecast_updates.problem(B, N, C, k, words, dtype)
    result, have = test_forecast_updates.run(x, updates, "native")
    assert_backend_within_budget(result, reference, exact)
    for cache, want in zip(have, caches, strict=True):
        forecast.assert_same_cache(cache, want)


@every_dtype
@pytest.mark.parametrize("kind", test_forecast_updates.READ)
@pytest.mark.parametrize(("B", "N", "C", "k", "gate"), test_forecast_updates.GATHER)
def test_gather_modulate_of_a_forecast(B, N, C, k, gate, kind, dtype, cuda):
    given, residual, reference, exact = test_forecast_updates.gather_problem(
        B, N, C, k, gate, kind, dtype
    )
    result = gather_modulate(*given, residual=residual, backend="native")
    assert_backend_within_budget(result, reference, exact)


# --- read_rows -----------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("kind", test_read_rows.EVERY_KIND)
@pytest.mark.parametrize(("B", "N", "C", "k"), test_read_rows.CASES)
def test_read_rows_(B, N, C, k, kind, dtype, cuda):
    cache, index, options, exact = test_read_rows.problem(B, N, C, k, kind, dtype)
    reference = read_rows(cache, index, **options, backend="reference")
    result = read_rows(cache, index, **options, backend="native")
    assert_backend_within_budget(result, reference, exact)


@pytest.mark.parametrize("index", [-1, 3, 2**40])
def test_an_index_out_of_range_is_not_read(index, cuda):
    rows = read_rows(torch.randn(1, 3, 8), torch.tensor([[0, index]]), backend="native")
    assert rows[0, 0].isfinite().all()
    assert rows[0, 1].isnan().all()
