"""Every Triton kernel with every shipped tile, compiled for sm_80 and sm_90 without a GPU.

Code that spills, exceeds shared memory or misses the tensor cores is right and slow: no other test
on the CPU would see it.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'toca_kernels[triton]'")

from toca_kernels import triton as kernels
from toca_kernels.apps import aot
from toca_kernels.apps.shapes import SHAPES, Shape
from toca_kernels.triton import configs

ATTENTION = ("attention_scores", "attention_entropy", "partial_attention")
HEAD_DIMS = (64, 72, 80, 96, 128, 256)
OF_EACH_TABLE = (72, 96, 128, 256)  # head dimensions up to 80 share their tiles
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


# (shape, ops)
CASES = [pytest.param(shape, None, id=shape.name) for shape in SHAPES]
CASES += [
    pytest.param(attention_shape(rows, D), ATTENTION, id=f"{rows}-rows-d{D}")
    for rows in ROWS
    for D in (HEAD_DIMS if rows == "many" else OF_EACH_TABLE)
]
CASES += [
    pytest.param(attention_shape(rows, D, torch.float32), ATTENTION, id=f"{rows}-rows-d{D}-float32")
    for rows, D in (("few", 72), ("some", 72), ("few", 256))
]
CASES += [
    pytest.param(mlp_shape(rows, 1152), ("mlp_rows",), id=f"mlp-of-{rows}-rows")
    for rows in (16, 32, 128)
]
CASES += [
    pytest.param(mlp_shape(64, 3072), ("mlp_rows",), id="wide-mlp"),
    pytest.param(
        Shape("float16", 1, 100, 384, 6, 33, text=20, dtype=torch.float16), None, id="float16"
    ),
    pytest.param(
        Shape("odd", 1, 33, 39, 3, 1, dtype=torch.float32),
        ("gather_modulate", "scatter_residual", "select_tokens"),
        id="odd-sizes-and-one-token",
    ),
]

# A kernel of these multiplies matrices; the name is followed by its tile.
PRODUCTS = ("attention_scores", "attention_entropy", "partial_attention", "linear")


def product_rows(row):
    """Rows of the product that a program computes, 0 where there is none."""
    if row["kernel"] not in {f"_{name}_kernel" for name in PRODUCTS}:
        return 0
    return int(row["tile"].split()[0][1:])


@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.ARCHS, ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize(("shape", "ops"), CASES)
def test_compiles_to_good_code(shape, ops, arch):
    rows = aot.table(ops, [shape], [arch])
    assert rows
    for row in rows:
        assert (row["stack"], row["LDL"], row["STL"]) == (0, 0, 0), f"spills: {row}"
        assert row["shared"] <= aot.SHARED_LIMIT[arch], f"too much shared memory: {row}"
        if product_rows(row):
            assert row["LDGSTS"] > 0, f"loads are not asynchronous: {row}"
        if product_rows(row) and shape.dtype != torch.float32:
            tensor_core = "HGMMA" if arch >= 90 and product_rows(row) >= 64 else "HMMA"
            assert row[tensor_core] > 0, f"no {tensor_core}: {row}"


def recorded():
    """Every launch of every case above."""
    for case in CASES:
        shape, ops = case.values
        for arch in aot.ARCHS:
            yield from (launch for _, launch in aot.launches(shape, arch, ops))


def test_every_shipped_tile_is_compiled():
    used = {launch.kernel.__name__: set() for launch in recorded()}
    for launch in recorded():
        sizes = [value for name, value in launch.arguments.items() if name.startswith("BLOCK_")]
        options = [launch.options.get(name) for name in ("num_warps", "num_stages")]
        used[launch.kernel.__name__].add((*sizes, *options))
    tables = {
        "_attention_scores_kernel": configs._ATTENTION_SCORES,
        "_attention_entropy_kernel": configs._ATTENTION_ENTROPY,
        "_partial_attention_kernel": configs._PARTIAL_ATTENTION,
    }
    for name, tiles_of in tables.items():
        have = {sizes[2:] for sizes in used[name]}  # after BLOCK_D and BLOCK_REST
        want = {tuple(tile) for _, tiles in (*tiles_of, *configs._FLOAT32) for tile in tiles}
        assert want <= have, f"{name}: not compiled: {want - have}"
    assert {tuple(tile[:5]) for _, tile in configs._LINEAR} <= used["_linear_kernel"]


def test_recording_runs_nothing():
    x = torch.ones(1, 4, 32, device="meta")
    with kernels.recording(90) as launches:
        out = kernels.gather_modulate(
            x, None, x[:, 0], x[:, 1], None, None, None, None, "layer", 1e-6
        )
    assert out.device.type == "meta"
    assert [launch.kernel.__name__ for launch in launches] == ["_gather_modulate_kernel"]
    assert launches[0].grid == (4,)


def test_arguments_are_specialised_as_in_a_call():
    x = torch.ones(1, 4, 32, dtype=torch.bfloat16, device="meta")
    shift = torch.ones(1, 40, dtype=torch.bfloat16, device="meta")[:, 5:37]
    with kernels.recording(90) as (launches):
        kernels.gather_modulate(x, None, shift, shift, None, None, None, None, "rms", 1e-6)
    source = aot.source(launches[0])
    names = launches[0].kernel.arg_names
    aligned = {names[position] for (position,) in source.attrs}
    assert source.signature["x_ptr"] == "*bf16"
    assert source.signature["eps"] == "fp32"
    assert source.signature["C"] == "i32"
    assert source.constants[(names.index("index_ptr"),)] is None
    assert source.constants[(names.index("RMS"),)] is True
    assert {"x_ptr", "out_ptr", "C"} <= aligned
    assert not {"shift_ptr", "N", "stride_shift_b"} & aligned


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
