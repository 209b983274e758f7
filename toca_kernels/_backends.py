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

_TRITON_MISSING = (
    ""
    if importlib.util.find_spec("triton")
    else "Triton is not installed: pip install 'toca_kernels[triton]'"
)

NAMES = ("reference", "native", "triton")

# Known at import: `resolve` runs in every call and inside torch.compile, which cannot call _C.
_DEVICES = {
    "reference": ("cpu", "cuda"),
    "native": () if _NATIVE_MISSING else ("cpu",),
    "triton": () if _TRITON_MISSING else ("cuda",),
}


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run here (`available`), on which devices, and why or why not."""

    available: bool
    devices: tuple[str, ...]
    reason: str


def backends() -> dict[str, BackendStatus]:
    """Name -> status of every backend: what is usable here, and why the rest is not."""
    reasons = {
        "reference": "plain PyTorch, the specification",
        "native": _NATIVE_MISSING
        or f"C++ bodies, {_C.isa()} chosen at run time of {', '.join(_C.isas())}",
    }
    status = {
        name: BackendStatus(bool(_DEVICES[name]), _DEVICES[name], reason)
        for name, reason in reasons.items()
    }
    return {**status, "triton": _triton_status()}


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


def resolve(backend: str | None, device: torch.device, bodies: Sequence[str] = NAMES) -> str:
    """The backend a call gets: the fastest for `device`, or exactly the one that was named.

    `bodies` are the backends that have a body for the op.
    """
    if backend is None:
        for name in ("native", "triton"):
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
        raise RuntimeError(
            f"backend {backend!r} runs on {', '.join(_DEVICES[backend])}, "
            f"the tensors are on {device}"
        )
    return backend
