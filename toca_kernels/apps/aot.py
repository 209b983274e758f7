"""Compile every Triton kernel for GPUs that need not be here, and read what the code costs.

    python -m toca_kernels.apps.aot                      the shapes of measuring/shapes.py
    python -m toca_kernels.apps.aot --tokens 4096 --channels 3072 --heads 24 --selected 410

Launchers run on tensors of the meta device and their launches are recorded, so what is compiled is
what a call of that shape would compile.  Registers, stack and shared memory are the compiler's;
instructions are counted in the machine code.  That proves that a kernel compiles, does not spill
and uses tensor cores and asynchronous copies; it says nothing about speed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .. import triton as kernels
from ..features import ForecastCache
from ..ops import MAX_EXPONENT
from .measuring.shapes import SHAPES, Shape, add_arguments, from_arguments

ARCHS = (80, 90)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program can have
# Tensor-core products (of one warp, of four), asynchronous copies, spilled loads and stores.
INSTRUCTIONS = ("HMMA", "HGMMA", "LDGSTS", "LDL", "STL")

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.int8: "i8",
}

Row = dict[str, Any]


def calls(shape: Shape) -> dict[str, Callable[[], Any]]:
    """Op -> a call of its launcher with tensors of the meta device."""
    B, N, C, H, k = shape.B, shape.N, shape.C, shape.H, shape.k

    def new(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def heads(tokens: int) -> Tensor:
        """As a projection hands them over: (B, tokens, H, D), transposed."""
        return new(B, tokens, H, shape.D).transpose(1, 2)

    x, fresh, cache = new(B, N, C), new(B, k, C), new(B, N, C)
    shift, scale, gate = new(B, 6 * C).split(C, dim=1)[:3]
    index, inverse = new(B, k, dtype=torch.int64), new(B, N, dtype=torch.int32)
    score = new(shape.rows, N, dtype=torch.float32)
    age = new(shape.rows, N, dtype=torch.int32)
    side = int(N**0.5)
    grid = (1, side, side) if shape.cell > 1 else (1, 1, N)
    eight_bit, row_scale = new(B, N, C, dtype=torch.int8), new(B, N, dtype=torch.float32)
    distance = new(B, N, dtype=torch.float32)
    forecast = ForecastCache(cache, (cache,), distance, 2)
    lse = new(B, H, N, dtype=torch.float32)
    keys = shape.text or N
    mask = new(B, keys, dtype=torch.bool) if shape.text else None
    found: dict[str, Callable[[], Any]] = {
        "attention_scores": lambda: kernels.attention_scores(heads(N), heads(N), lse, 0.1),
        "scored_attention": lambda: kernels.scored_attention(
            heads(N), heads(N), heads(N), lse, 0.1, MAX_EXPONENT
        ),
        "select_tokens": lambda: kernels.select_tokens(
            score, age, shape.counts, 0.25, grid, shape.cell, 0.5
        ),
        "gather_modulate": lambda: kernels.gather_modulate(
            x, index, shift, scale, gate, cache, None, None, "layer", 1e-6
        ),
        "mlp_rows": lambda: kernels.mlp_rows(
            fresh, new(4 * C, C), new(4 * C), new(C, 4 * C), new(C), "gelu_tanh"
        ),
        "scatter_residual": lambda: kernels.scatter_residual(
            x, [gate, gate], [cache, cache], [None, fresh], [None, inverse], new(B, N, C)
        ),
        "gather_modulate_int8": lambda: kernels.gather_modulate(
            x, index, shift, scale, gate, eight_bit, None, None, "layer", 1e-6, row_scale
        ),
        "scatter_residual_int8": lambda: kernels.scatter_residual(
            x,
            [gate, gate],
            [eight_bit, eight_bit],
            [None, fresh],
            [None, inverse],
            new(B, N, C),
            [row_scale, row_scale],
        ),
        "store_rows": lambda: kernels.store_rows(eight_bit, row_scale, x),
        "gather_modulate_forecast": lambda: kernels.gather_modulate(
            x, index, shift, scale, gate, cache, None, None, "layer", 1e-6, None, (cache,), distance
        ),
        "scatter_residual_forecast": lambda: kernels.scatter_residual(
            x,
            [gate, gate],
            [cache, cache],
            [None, fresh],
            [None, inverse],
            new(B, N, C),
            None,
            [forecast, forecast],
        ),
        "store_rows_forecast": lambda: kernels.store_rows(cache, None, x, forecast),
        "read_rows": lambda: kernels.read_rows(cache, index, None, (cache,), distance, shape.dtype),
        "partial_attention": lambda: kernels.partial_attention(
            heads(k), heads(keys), heads(keys), 0.1, mask
        ),
    }
    if shape.text:
        found["attention_entropy"] = lambda: kernels.attention_entropy(
            heads(k), heads(keys), new(B, H, k, dtype=torch.float32), 0.1, mask
        )
    return found


def launches(
    shape: Shape, arch: int, ops: Sequence[str] | None = None
) -> Iterator[tuple[str, kernels.Launch]]:
    """(op, launch) of every kernel that a step of this shape runs on sm_`arch`."""
    for op, call in calls(shape).items():
        if ops is None or op in ops:
            with kernels.recording(arch) as recorded:
                call()
            for launch in recorded:
                yield op, launch


def source(launch: kernels.Launch) -> ASTSource:
    """The kernel with the types of its arguments, specialised as Triton does in a call."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        aligned = False
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(position,)] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[parameter.name] = "fp32"
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def resources(launch: kernels.Launch, arch: int) -> Row:
    """Compile one launch; registers, bytes of stack and shared memory, counts of instructions."""
    target = GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source(launch), target=target, options=launch.options)
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(what: str) -> str:
            command = [tool, what, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = dump("-res-usage"), dump("-sass")
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": int(compiled.metadata.shared),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
        **{name: len(re.findall(rf"\b{name}\b", code)) for name in INSTRUCTIONS},
    }


def table(
    ops: Sequence[str] | None = None,
    shapes: Sequence[Shape] = SHAPES,
    archs: Sequence[int] = ARCHS,
) -> list[Row]:
    """What every kernel of these ops costs; code that several shapes share is compiled once."""
    rows: dict[tuple[int, str, str], Row] = {}
    for arch in archs:
        for shape in shapes:
            for op, launch in launches(shape, arch, ops):
                key = (arch, source(launch).hash(), str(launch.options))
                if key not in rows:
                    rows[key] = {
                        "op": op,
                        "kernel": launch.kernel.__name__,
                        "shape": shape.name,
                        "arch": arch,
                        "tile": tile_of(launch),
                        **resources(launch, arch),
                    }
    return sorted(rows.values(), key=lambda row: (row["op"], row["kernel"], row["arch"]))


def tile_of(launch: kernels.Launch) -> str:
    """Block sizes and options: `C2048 w8`, `K128 Q64 w8 s3`."""
    blocks = [
        f"{name.removeprefix('BLOCK_')}{value}"
        for name, value in launch.arguments.items()
        if name.startswith("BLOCK_") and name not in ("BLOCK_D", "BLOCK_REST")
    ]
    options = [
        f"{short}{launch.options[name]}"
        for short, name in (("w", "num_warps"), ("s", "num_stages"))
        if name in launch.options
    ]
    return " ".join(blocks + options)


_COLUMNS = {
    "kernel": lambda row: row["kernel"].removeprefix("_").removesuffix("_kernel"),
    "shape": lambda row: row["shape"],
    "arch": lambda row: f"sm_{row['arch']}",
    "tile": lambda row: row["tile"],
    "registers": lambda row: str(row["registers"]),
    "stack": lambda row: str(row["stack"]),
    "spills": lambda row: str(row["LDL"] + row["STL"]),
    "shared KiB": lambda row: f"{row['shared'] / 1024:.1f}",
    "instructions": lambda row: str(row["instructions"]),
    "HMMA": lambda row: str(row["HMMA"]),
    "HGMMA": lambda row: str(row["HGMMA"]),
    "LDGSTS": lambda row: str(row["LDGSTS"]),
}


def as_markdown(rows: Sequence[Row]) -> str:
    lines = [list(_COLUMNS), ["---"] * len(_COLUMNS)]
    lines += [[text(row) for text in _COLUMNS.values()] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def as_text(rows: Sequence[Row]) -> str:
    lines = [list(_COLUMNS)] + [[text(row) for text in _COLUMNS.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in lines
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="toca aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("ops", nargs="*", help="only these ops (all)")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS, help="compute capability"
    )
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    add_arguments(parser)
    options = parser.parse_args(argv)
    rows = table(options.ops or None, from_arguments(options), options.arch)
    print(as_markdown(rows) if options.markdown else as_text(rows))


if __name__ == "__main__":
    main()
