"""How a kernel is launched, and how a launch is recorded where there is no GPU.

Every launcher of this package goes through `launch`.  Under `recording(arch)` it runs nothing and
keeps what it was asked for; with tensors of the meta device that gives the very kernels,
configurations and argument types of a real call, for ahead-of-time compilation (apps/aot.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

# Read once: a kernel is interpreted or not from its decoration on.
INTERPRETED: bool = triton.knobs.runtime.interpret

_INTERPRETED_ARCH = 80  # whose configurations the interpreter runs


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its arguments by name (constexprs included) and compiler options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class _Recorder:
    arch: int
    launches: list[Launch]


_recorder: ContextVar[_Recorder | None] = ContextVar("toca_kernels_recorder", default=None)


@contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Record the launches of a block instead of running them, as if the device were sm_`arch`."""
    recorder = _Recorder(arch, [])
    token = _recorder.set(recorder)
    try:
        yield recorder.launches
    finally:
        _recorder.reset(token)


def launch(kernel: Any, programs: int, *arguments: Any, **named: Any) -> None:
    """Run `programs` programs of a kernel; `named` are its constexprs and compiler options.

    The grid has one dimension: only the first can be longer than 65535.
    """
    named.setdefault("enable_fp_fusion", True)
    recorder = _recorder.get()
    if recorder is not None:
        names = kernel.arg_names
        options = {name: value for name, value in named.items() if name not in names}
        constants = {name: value for name, value in named.items() if name in names}
        given = dict(zip(names, arguments, strict=False)) | constants
        recorder.launches.append(Launch(kernel, (programs,), given, options))
        return
    device = next(value.device for value in arguments if isinstance(value, Tensor))
    _refuse_the_cpu(device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*arguments, **named)


def arch_of(tensor: Tensor) -> int:
    """Compute capability of the tensor's device: 90 for sm_90."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.arch
    _refuse_the_cpu(tensor.device)
    if INTERPRETED:
        return _INTERPRETED_ARCH
    return _capability(tensor.device.index)


def _refuse_the_cpu(device: torch.device) -> None:
    if device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(
            f"backend 'triton' runs on cuda, the tensors are on {device}; "
            "set TRITON_INTERPRET=1 before Triton is imported to run it in Triton's interpreter"
        )


def row_strides(tensor: Tensor | None) -> tuple[int, int]:
    """(per sample, per token) strides of a modulation; 0 where one row serves a whole sample."""
    if tensor is None:
        return 0, 0
    return tensor.stride(0), (tensor.stride(1) if tensor.ndim == 3 else 0)


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
