"""What each op must read, write and multiply, and how long that takes at assumed rates.

`work` is the only place where bytes and FLOPs are counted; `toca bench` divides them by its times.

    python -m toca_kernels.apps.measuring.roofline       a Markdown table of the shapes of shapes.py

A model, not a measurement: an op takes as long as the slowest of its memory traffic (every input
read once, every output written once), its matrix products and its exponentials, or as one kernel
in a CUDA graph where all of them are shorter than that.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from .shapes import SHAPES, Shape, add_arguments, from_arguments


@dataclass(frozen=True)
class Device:
    """Rates that real kernels sustain, per second, and seconds of one kernel in a CUDA graph."""

    name: str
    bytes: float
    products: float  # FLOPs of a library's GEMM
    attention: float  # FLOPs of flash attention
    exponentials: float  # 16 a cycle and multiprocessor
    kernel: float


DEVICES = (
    Device("A100/A800", 1.75e12, 240e12, 180e12, 2.4e12, 2.0e-6),
    Device("H200", 4.3e12, 650e12, 420e12, 4.1e12, 1.8e-6),
)


@dataclass(frozen=True)
class Work:
    """Of one call: bytes moved, FLOPs of matrix products (2 a multiply-add), exponentials."""

    bytes: int
    flops: int = 0
    exponentials: int = 0
    attention: bool = False

    def __add__(self, other: Work) -> Work:
        """Of both calls, one after the other, with no attention among them."""
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, device: Device) -> float:
        rate = device.attention if self.attention else device.products
        return max(
            self.bytes / device.bytes,
            self.flops / rate,
            self.exponentials / device.exponentials,
            device.kernel,
        )


def work(shape: Shape) -> dict[str, Work]:
    """Op -> what one call of it does in a step of this shape."""
    B, N, C, H, k, e = shape.B, shape.N, shape.C, shape.H, shape.k, shape.dtype.itemsize
    return {
        "select_tokens": Work(shape.rows * (16 * N + 4) + 8 * sum(shape.counts)),
        "gather_modulate": Work(3 * B * C * (k + 1) * e + 8 * B * k),
        "mlp_rows": Work((2 * B * k * C + 8 * C * C + 5 * C) * e, 16 * B * k * C * C),
        "scatter_residual": Work(B * C * (4 * N + k + 2) * e + 4 * B * N),
        # Of both caches the slopes and distances; of the fresh rows what was there before, too.
        "scatter_residual_forecast": Work(B * C * (6 * N + 2 * k + 2) * e + 12 * B * N),
        "attention_scores": Work(
            2 * B * N * C * e + 4 * B * N * (H + 1), 2 * B * N * N * C, B * H * N * N, True
        ),
        "scored_attention": Work(
            4 * B * N * C * e + 4 * B * N * (2 * H + 1), 4 * B * N * N * C, B * H * N * N, True
        ),
        **_of_queries(shape),
    }


def _of_queries(shape: Shape) -> dict[str, Work]:
    """Of the selected queries, over the text or over all tokens where there is none."""
    B, C, H, k, e = shape.B, shape.C, shape.H, shape.k, shape.dtype.itemsize
    keys = shape.text or shape.N
    found = {
        "partial_attention": Work(
            2 * B * (k + keys) * C * e + 4 * B * H * k, 4 * B * k * keys * C, B * H * k * keys, True
        )
    }
    if shape.text:
        found["attention_entropy"] = Work(
            B * (k + keys) * C * e + 4 * B * k * (H + 1) + B * keys,
            2 * B * k * keys * C,
            B * H * k * keys,
            True,
        )
    return found


def as_markdown(shapes: Sequence[Shape] = SHAPES, devices: Sequence[Device] = DEVICES) -> str:
    heads = ["op", "shape", "MB", "GFLOP", *(f"{device.name} µs" for device in devices)]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for shape in shapes:
        for op, amount in work(shape).items():
            times = [f"{1e6 * amount.seconds(device):.1f}" for device in devices]
            size = [f"{amount.bytes / 1e6:.2f}", f"{amount.flops / 1e9:.2f}"]
            lines.append([op, shape.name, *size, *times])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    print(as_markdown(from_arguments(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
