"""Reading a module's weights, or calling the module: never the first where it could be wrong.

A linear that was replaced or wrapped (LoRA, quantised, hooked, offloaded, parametrised) computes
something other than its weight says.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import PackedLinear, packing_unavailable

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_hf_hook",  # accelerate: offload
    "_diffusers_hook",  # diffusers: caches, layerwise casting, group offload
    "parametrizations",
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def hooked(module: nn.Module) -> bool:
    """Whether hooks or parametrisations act when the module is called."""
    return any(getattr(module, name, None) for name in _HOOKS)


def unhooked(module: nn.Module, ours: Callable[..., Any] | None = None) -> bool:
    """Whether calling the module does what its class says; `ours` is a forward of this package."""
    return vars(module).get("forward") == ours and not hooked(module)


def plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the module is exactly x @ weight.T + bias, and these may be read and sliced."""
    return (
        type(module) is nn.Linear
        and unhooked(module)
        and module.weight.dtype in _DTYPES
        and dense(module.weight, module.bias)
    )


def dense(*tensors: Tensor | None) -> bool:
    """Whether the memory of tensors holds their values; not that of a quantised or sharded one.

    torchao leaves an nn.Linear as it is and gives it a subclass of Tensor as its weight, which has
    a dtype and a shape like any other but answers to few functions.
    """
    return all(one is None or type(one) in (Tensor, nn.Parameter) for one in tensors)


def activation_of(module: nn.Module) -> str | None:
    """The name that `mlp_rows` has for an activation module; None if it has none."""
    if not unhooked(module):
        return None
    if type(module) is nn.SiLU:
        return "silu"
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return None


def outputs_from(fused: nn.Module, rows: Tensor, first: int) -> Tensor:
    """The outputs of a linear from `first` on; only those are computed where it is a plain one."""
    if plain(fused) and not torch.is_autocast_enabled(rows.device.type):
        bias = None if fused.bias is None else fused.bias[first:]
        return F.linear(rows, fused.weight[first:], bias)
    out: Tensor = fused(rows)[..., first:]
    return out


class PackedMLP:
    """The two linears of an MLP, packed once and packed again when their weights change."""

    def __init__(self) -> None:
        self._packed: tuple[PackedLinear, PackedLinear] | None = None
        self._of: tuple[object, ...] = ()
        self.nbytes = 0

    def linears(self) -> tuple[PackedLinear, PackedLinear] | None:
        return self._packed

    def refresh(self, fc1: nn.Linear | None, fc2: nn.Linear | None) -> None:
        """Pack these linears unless that was done; None, or what cannot be packed, unpacks."""
        if (
            fc1 is None
            or fc2 is None
            or packing_unavailable(fc1.weight.dtype, fc1.weight.device)
            or fc1.weight.dtype != fc2.weight.dtype
        ):
            self.release()
            self.nbytes = 0
            return
        now = (*fingerprint(fc1), *fingerprint(fc2))
        if now != self._of:
            self._packed = (PackedLinear.from_linear(fc1), PackedLinear.from_linear(fc2))
            self._of = now
            self.nbytes = sum(linear.nbytes for linear in self._packed)

    def release(self) -> None:
        """Give the memory back; `nbytes` stays to be read."""
        self._packed, self._of = None, ()


def fingerprint(linear: nn.Linear) -> tuple[object, ...]:
    """Changes with the weights, also where they are written through `.data`, as fusing LoRA does.

    One read of the weights, once a run.
    """
    return tuple(
        value
        for tensor in (linear.weight, linear.bias)
        if tensor is not None
        for value in (tensor.data_ptr(), tensor.dtype, tensor.shape, checksum(tensor))
    )


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes: unlike a sum it changes when rows or columns change places."""
    data: Any = tensor.detach().contiguous().view(torch.uint8).numpy()
    return zlib.crc32(data)
