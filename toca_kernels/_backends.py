"""Which bodies of an op can run here, and which one a call gets.

A backend that is named is used or refused; it is never silently replaced.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch  # before _C: both then share the OpenMP runtime, and so the threads, of torch

try:
    from . import _C
except ImportError as error:
    _NATIVE_MISSING = (
        f"the extension toca_kernels._C is not built ({error}); "
        "install from source with a C++ compiler: pip install ."
    )
else:
    _NATIVE_MISSING = ""


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _why_no_cuda(toolkit: int, driver: int) -> str:
    """Why the extension's CUDA bodies cannot run here; empty if they can, given a device."""
    if not toolkit:
        return "not compiled in: the build found no CUDA compiler"
    if not driver:
        return f"compiled in with CUDA {_version(toolkit)}, but there is no CUDA driver"
    if driver // 1000 < toolkit // 1000:
        return (
            f"compiled in with CUDA {_version(toolkit)}, but the driver is older: it knows CUDA "
            f"{_version(driver)}"
        )
    return ""


# The driver is asked for its version, but not started: that would spoil a later fork.
_CUDA_MISSING = _NATIVE_MISSING or _why_no_cuda(_C.cuda_toolkit(), _C.cuda_driver())

_TRITON_MISSING = (
    ""
    if importlib.util.find_spec("triton")
    else "Triton is not installed: pip install 'toca_kernels[triton]'"
)

NAMES = ("reference", "native", "triton")

# Known at import: `resolve` runs in every call and inside torch.compile, which cannot call _C.
_DEVICES = {
    "reference": ("cpu", "cuda"),
    "native": () if _NATIVE_MISSING else ("cpu",) if _CUDA_MISSING else ("cpu", "cuda"),
    "triton": () if _TRITON_MISSING else ("cuda",),
}

# Ops with a native body on CUDA -> who comes first there.  Not measured on a GPU yet, so nothing
# says that the native bodies are faster: Triton's come first where it is installed.
_ON_CUDA = {
    "select_tokens": ("triton", "native"),
    "gather_modulate": ("triton", "native"),
    "mlp_rows": ("triton", "native"),
    "scatter_residual": ("triton", "native"),
    "store_rows": ("triton", "native"),
    "read_rows": ("triton", "native"),
}


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run here (`available`), on which devices, and why or why not."""

    available: bool
    devices: tuple[str, ...]
    reason: str


def backends() -> dict[str, BackendStatus]:
    """Name -> status of every backend: what is usable here, and why the rest is not."""
    return {
        "reference": BackendStatus(True, _DEVICES["reference"], "plain PyTorch, the specification"),
        "native": _native_status(),
        "triton": _triton_status(),
    }


def _native_status() -> BackendStatus:
    if _NATIVE_MISSING:
        return BackendStatus(False, (), _NATIVE_MISSING)
    devices, cuda = _DEVICES["native"], _CUDA_MISSING
    if not cuda:
        count, error = _C.cuda_devices()
        cuda = f"compiled in with CUDA {_version(_C.cuda_toolkit())}"
        if count < 1:
            devices = ("cpu",)
            cuda += f", but no device can be used: {error or 'there is none'}"
    return BackendStatus(
        True,
        devices,
        f"C++ bodies, {_C.isa()} chosen at run time of {', '.join(_C.isas())}; CUDA bodies: {cuda}",
    )


def _triton_status() -> BackendStatus:
    if _TRITON_MISSING:
        return BackendStatus(False, (), _TRITON_MISSING)
    if _interpreted():
        return BackendStatus(True, ("cpu",), "Triton's interpreter, for tests: it is slow")
    if not torch.cuda.is_available():
        return BackendStatus(
            False, (), "Triton kernels run on CUDA, and torch finds no CUDA device"
        )
    version = importlib.import_module("triton").__version__
    return BackendStatus(True, ("cuda",), f"kernels compiled by Triton {version} when first used")


def _interpreted() -> bool:
    """Whether Triton was told (TRITON_INTERPRET=1) to interpret its kernels, on the CPU."""
    if _TRITON_MISSING:
        return False
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


def native_on_cuda(op: str) -> bool:
    """Whether the op has a native body for CUDA."""
    return op in _ON_CUDA


def resolve(
    backend: str | None,
    device: torch.device,
    bodies: Sequence[str] = NAMES,
    op: str | None = None,
) -> str:
    """The backend a call gets: the fastest for `device`, or exactly the one that was named.

    `bodies` are the backends that have a body for the op, on some device.  On CUDA the choice goes
    by `op`; without it, native is used where it is named only.
    """
    if backend is None:
        on_cuda = _ON_CUDA.get(op or "", ("triton",))
        for name in on_cuda if device.type == "cuda" else ("native", "triton"):
            if name in bodies and device.type in _DEVICES[name]:
                return name
        return "reference"
    if backend not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)} or None, got {backend!r}")
    if backend not in bodies:
        raise RuntimeError(f"backend {backend!r} has no body of this op: use {' or '.join(bodies)}")
    if backend == "reference":
        return backend
    if not _DEVICES[backend]:
        raise RuntimeError(f"backend {backend!r} is not available: {backends()[backend].reason}")
    if backend == "triton" and device.type == "cpu":
        if not _interpreted():
            raise RuntimeError(
                "backend 'triton' runs on cuda, the tensors are on cpu; set TRITON_INTERPRET=1 "
                "before Triton is imported to run it in Triton's interpreter"
            )
        return backend
    if device.type not in _DEVICES[backend]:
        why = f"; CUDA bodies: {_CUDA_MISSING}" if device.type == "cuda" else ""
        raise RuntimeError(
            f"backend {backend!r} runs on {', '.join(_DEVICES[backend])}, "
            f"the tensors are on {device}{why}"
        )
    if backend == "native" and device.type == "cuda" and op and not native_on_cuda(op):
        raise RuntimeError(f"backend 'native' has no body of {op} on cuda")
    return backend
