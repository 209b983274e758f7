"""Which bodies of an op can run here, and which one a call gets.

A backend that is named is used or refused; it is never silently replaced.
"""

from __future__ import annotations

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

NAMES = ("reference", "native")

# Known at import: `resolve` runs in every call and inside torch.compile, which cannot call _C.
_DEVICES = {"reference": ("cpu", "cuda"), "native": () if _NATIVE_MISSING else ("cpu",)}


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
    return {
        name: BackendStatus(bool(_DEVICES[name]), _DEVICES[name], reasons[name]) for name in NAMES
    }


def resolve(backend: str | None, device: torch.device) -> str:
    """The backend a call gets: the fastest for `device`, or exactly the one that was named."""
    if backend is None:
        return "native" if device.type in _DEVICES["native"] else "reference"
    if backend not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)} or None, got {backend!r}")
    if backend == "reference":
        return backend
    if not _DEVICES[backend]:
        raise RuntimeError(f"backend {backend!r} is not available: {backends()[backend].reason}")
    if device.type not in _DEVICES[backend]:
        raise RuntimeError(
            f"backend {backend!r} runs on {', '.join(_DEVICES[backend])}, "
            f"the tensors are on {device}"
        )
    return backend
