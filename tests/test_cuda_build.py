"""The CUDA half of the extension, read from the binary: no GPU is needed to see what it costs.

Code that spills, or moves two bytes at a time, is right and slow: no other test would see it.
"""

import importlib.util
import re
import shutil
import subprocess

import pytest

from toca_kernels import _backends, native

ARCHS = (80, 90)
BYTES = {"f": 4, "6__half": 2, "13__nv_bfloat16": 2}  # of a type, by its mangled name

# Kernel -> registers of a thread, bytes of static shared memory.  Dynamic shared memory is
# select_tokens' only: 4.4 KiB of counters and 4 bytes for each of up to 23552 tokens.
LIMITS = {
    "select_row_kernel": (64, 0),
    "rank_chunk_kernel": (64, 0),
    "reward_tiles_kernel": (64, 0),
    "count_digit_kernel": (64, 0),
    "count_chunk_kernel": (64, 0),
    "write_chunk_kernel": (64, 0),
    "gather_modulate_kernel": (80, 256),
    "scatter_residual_kernel": (96, 0),
    "scatter_residual_8bit_kernel": (120, 0),
    "scatter_forecast_kernel": (120, 0),
    "store_forecast_kernel": (48, 0),
    "store_rows_kernel": (80, 0),
    "read_rows_kernel": (48, 0),
}
SELECT = [name for name in LIMITS if LIMITS[name][0] == 64]
STREAMING = (
    "gather_modulate_kernel",
    "scatter_residual_kernel",
    "scatter_residual_8bit_kernel",
    "scatter_forecast_kernel",
    "store_forecast_kernel",
    "read_rows_kernel",
)
RESERVED = {80: 0, 90: 1024}  # bytes of shared memory that the driver keeps of every CTA


def cuobjdump():
    if importlib.util.find_spec("triton"):  # which brings one
        import triton

        return triton.knobs.nvidia.cuobjdump.path
    return shutil.which("cuobjdump")


def test_cuda_is_compiled_in_where_there_is_a_compiler():
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not on PATH")
    assert native._C is not None, "toca_kernels._C is not built: pip install -e ."
    assert native._C.cuda_toolkit() > 0, "built without CUDA: pip install -e . with nvcc on PATH"


def dump(what):
    """(arch, name, text) of every kernel in the extension."""
    text = subprocess.run(
        [cuobjdump(), what, native._C.__file__], check=True, capture_output=True, text=True
    ).stdout
    for image in re.split(r"^Fatbin elf code:$", text, flags=re.MULTILINE)[1:]:
        arch = int(re.search(r"^arch = sm_(\d+)", image, re.MULTILINE)[1])
        for function in re.split(r"^\s*Function\s*:?\s*", image, flags=re.MULTILINE)[1:]:
            mangled, _, body = function.partition("\n")
            yield arch, mangled.rstrip(": "), body


def kernel_of(mangled):
    (name,) = [name for name in LIMITS if f"{len(name)}{name}" in mangled]
    return name


def moves_16_bytes(mangled):
    """Whether this is an instance for aligned rows: <type, values, ...> of 16 bytes."""
    found = re.search(r"_kernelI(f|6__half|13__nv_bfloat16)Li(\d+)E", mangled)
    return found is not None and BYTES[found[1]] * int(found[2]) == 16


def find(kernels, name, arch, wanted=lambda _: True):
    found = {
        mangled: text
        for at, mangled, text in kernels
        if at == arch and kernel_of(mangled) == name and wanted(mangled)
    }
    assert found, f"no {name} for sm_{arch}"
    return found


@pytest.fixture(scope="module")
def built():
    if native._C is None or not native._C.cuda_toolkit():
        pytest.skip("the extension was built without CUDA")
    if cuobjdump() is None:
        pytest.skip("cuobjdump is not here: pip install triton")


@pytest.fixture(scope="module")
def usage(built):
    return list(dump("-res-usage"))


@pytest.fixture(scope="module")
def code(built):
    return list(dump("-sass"))


every_arch = pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: f"sm_{arch}")


@every_arch
@pytest.mark.parametrize("name", LIMITS)
def test_resources(name, arch, usage):
    registers, shared = LIMITS[name]
    for mangled, text in find(usage, name, arch).items():
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}
        assert (used["STACK"], used["LOCAL"]) == (0, 0), f"spills: {mangled}"
        assert used["REG"] <= registers, mangled
        assert used["SHARED"] <= shared + RESERVED[arch], mangled


@every_arch
@pytest.mark.parametrize("name", LIMITS)
def test_nothing_is_spilled(name, arch, code):
    for mangled, text in find(code, name, arch).items():
        assert not re.search(r"\b(LDL|STL)\b", text), mangled


@every_arch
@pytest.mark.parametrize("name", STREAMING)
def test_aligned_rows_move_16_bytes_at_a_time(name, arch, code):
    instances = find(code, name, arch, moves_16_bytes)
    assert len({re.search(r"_kernelI(f|6|13)", mangled)[1] for mangled in instances}) == 3
    for mangled, text in instances.items():
        assert re.search(r"\bLDG\.E(\.\w+)*\.128\b", text), mangled
        assert re.search(r"\bSTG\.E(\.\w+)*\.128\b", text), mangled


@every_arch
def test_caches_are_streamed(arch, code):
    """Of scatter_residual: loads and stores that leave the L2 to x ("evict first")."""
    for name in ("scatter_residual_kernel", "scatter_forecast_kernel"):
        for text in find(code, name, arch, moves_16_bytes).values():
            assert re.search(r"\bLDG\.E\.EF\.128\b", text)
            assert re.search(r"\bSTG\.E\.EF\.128\b", text)


@every_arch
@pytest.mark.parametrize("name", SELECT)
def test_no_multiply_add_is_fused_in_the_selection(name, arch, code):
    for mangled, text in find(code, name, arch).items():
        assert "FFMA" not in text, mangled


@every_arch
def test_equal_digits_of_a_warp_are_counted_at_once(arch, code):
    for text in find(code, "select_row_kernel", arch).values():
        assert "ATOMS.POPC.INC" in text


def test_code_for_later_architectures(built):
    command = [cuobjdump(), "-lptx", native._C.__file__]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert ".sm_90.ptx" in listed


# --- what needs no device ------------------------------------------------------------------------

BFLOAT16, INT8 = 1, 3


def call(op, rows, channels, where):
    """A body on memory that is not there, `rows` of 4 tokens each."""
    nobody = [0] * 10
    if op == "select_tokens":
        native._C.select_tokens(nobody[:7], [rows, 4, 2, 1, 2, 2, 1], 0.0, 0.0, 1, where)
    elif op == "gather_modulate":
        size = [rows, 4, 2, channels]
        dtypes = BFLOAT16, BFLOAT16
        native._C.gather_modulate(nobody, size, [0] * 6, 1e-6, False, *dtypes, 1, where, None)
    elif op == "scatter_residual":
        update = (0, 0, 0, 0, 0, BFLOAT16, 0, 0, 0, None)
        native._C.scatter_residual(0, 0, [rows, 4, channels], [update], BFLOAT16, 1, where)
    elif op == "store_rows":
        native._C.store_rows(nobody[:3], [rows, channels], BFLOAT16, INT8, 1, where, None)
    else:
        size = [rows, 4, 2, channels]
        native._C.read_rows(nobody[:4], size, BFLOAT16, BFLOAT16, 1, where, None)


every_body = pytest.mark.parametrize(
    "op", ["select_tokens", "gather_modulate", "scatter_residual", "store_rows", "read_rows"]
)


@every_body
def test_an_error_of_cuda_names_the_op(op, built):
    """Without a driver, or with one: there is no such device."""
    with pytest.raises(RuntimeError, match=f"^{op}: CUDA: "):
        call(op, 2, 8, (9999, 0))


@every_body
def test_nothing_is_launched_for_nothing(op, built):
    """CUDA is not even asked for the device."""
    call(op, 0, 8, (9999, 0))


@every_body
def test_rows_that_int_cannot_count_are_refused(op, built):
    with pytest.raises(ValueError, match="expected at most 2\\*\\*30"):
        call(op, 2**30 + 1, 8, (9999, 0))


@every_body
def test_a_build_without_cuda_says_so(op):
    if native._C is None or native._C.cuda_toolkit():
        pytest.skip("the extension was built with CUDA, or not at all")
    with pytest.raises(RuntimeError, match="built without a CUDA compiler"):
        call(op, 2, 8, (0, 0))


@pytest.mark.parametrize(
    ("toolkit", "driver", "reason"),
    [
        (0, 13000, "not compiled in: the build found no CUDA compiler"),
        (13000, 0, "compiled in with CUDA 13.0, but there is no CUDA driver"),
        (13000, 12080, "but the driver is older: it knows CUDA 12.8"),
        (12080, 12040, ""),  # within a major version any driver will do
        (12080, 13000, ""),
    ],
)
def test_why_the_bodies_cannot_run(toolkit, driver, reason):
    why = _backends._why_no_cuda(toolkit, driver)
    assert reason in why
    assert bool(why) == bool(reason)
