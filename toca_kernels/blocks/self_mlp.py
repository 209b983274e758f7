"""Family self_mlp: x += gate_a * attn(M(x)); x += gate_m * mlp(M(x)).

Members: DiT (Peebles & Xie 2023) in facebookresearch's code and in diffusers'.  A cached step
reuses the attention whole and recomputes the MLP of the selected tokens (ToCa, ICLR 2025, 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache import TokenCache
from ..ops import gather_modulate, mlp_rows, partial_mlp, scatter_residual
from . import linear
from .capture import CapturedScores

SHIFT_A, SCALE_A, GATE_A, SHIFT_M, SCALE_M, GATE_M = range(6)
CACHED_CHUNKS = slice(GATE_A, GATE_M + 1)  # what a cached step reads of the six
SELECTORS = ("attention", "norm", "random")  # entropy is one of cross-attention


@dataclass(frozen=True)
class Norm:
    """A norm of the block.

    Attributes:
        eps, weight, bias: of a LayerNorm; its affine parameters where it has any.
        module: called instead where it is anything else, or has hooks.
    """

    eps: float = 0.0
    weight: Tensor | None = None
    bias: Tensor | None = None
    module: nn.Module | None = None

    @classmethod
    def of(cls, module: nn.Module) -> Norm:
        if type(module) is nn.LayerNorm and linear.unhooked(module):
            return cls(module.eps, module.weight, module.bias)
        return cls(module=module)


@dataclass(frozen=True)
class BlockParts:
    """How a concrete block maps onto the family; the adapters in models/ fill it.

    Attributes:
        block: the block whose forward is replaced; its hidden states are the first argument,
            or the keyword `hidden`.
        hidden: name of that argument.
        attn, mlp: modules with (B, N, C) in and out, called whole on full steps.
        norm1, norm2: read anew in each run, in case they were replaced.
        mlp_linears: () -> (fc1, fc2, activation) if the MLP is exactly fc2(activation(fc1(x))),
            else None, and then the module is called.
        modulation: the linear whose output is (B, 6 C): shift, scale, gate of the attention, then
            of the MLP.
        condition: (block's arguments) -> the input of `modulation`, (B, C).
    """

    block: nn.Module
    hidden: str
    attn: nn.Module
    mlp: nn.Module
    norm1: Callable[[], Norm]
    norm2: Callable[[], Norm]
    mlp_linears: Callable[[], tuple[nn.Linear, nn.Linear, str] | None]
    modulation: Callable[[], nn.Module]
    condition: Callable[..., Tensor]


class Step(Protocol):
    """What a block asks of the step at hand; `run.Branch` is one."""

    cache: TokenCache
    fused: bool

    def begin(self, x: Tensor) -> None: ...
    def full(self, layer: int) -> bool: ...
    def selector(self, layer: int) -> str | None: ...
    def modulation(self, layer: int) -> Tensor | None: ...


class SelfMLP:
    """One block of an enabled model: its replaced forward, and what that keeps."""

    def __init__(
        self, parts: BlockParts, layer: int, step: Callable[[], Step | None], *, prepack: bool
    ) -> None:
        self.parts = parts
        self.layer = layer
        self.prepack = prepack
        self._step = step
        self._scoring: Step | None = None
        self._linears: tuple[nn.Linear, nn.Linear, str] | None = None
        self._packed = linear.PackedMLP()
        self._norms = (parts.norm1(), parts.norm2())
        self._own_forward = parts.block.forward
        self._own_attn = parts.attn.forward

    def replacements(self) -> tuple[tuple[nn.Module, Callable[..., Any]], ...]:
        """(module, the forward that takes its place while the model is enabled)."""
        return ((self.parts.block, self.forward), (self.parts.attn, self._attn_forward))

    @property
    def packed_nbytes(self) -> int:
        return self._packed.nbytes

    def release(self) -> None:
        self._packed.release()

    def prepare(self) -> None:
        """Before a run: look again at modules that may have been replaced or changed."""
        self._norms = (self.parts.norm1(), self.parts.norm2())
        self._linears = self.parts.mlp_linears() if linear.unhooked(self.parts.mlp) else None
        pack = self._linears[:2] if self.prepack and self._linears else (None, None)
        self._packed.refresh(*pack)

    # --- forwards ---------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        step = self._step()
        if step is None:  # called outside the model's forward: not part of a run
            return self._own_forward(*args, **kwargs)
        x = args[0] if args else kwargs[self.parts.hidden]
        if self.layer == 0:
            step.begin(x)
        if not step.full(self.layer):
            return self._cached(step, x, args, kwargs)
        self._scoring = step
        try:
            if step.fused:
                out = self._fused(step, x, args, kwargs)
            else:
                out = self._exact(step, args, kwargs)
        finally:
            self._scoring = None
        step.cache.refreshed(self.layer)
        return out

    def _attn_forward(self, *args: Any, **kwargs: Any) -> Any:
        step = self._scoring
        selector = step.selector(self.layer) if step is not None else None
        if step is None or selector is None:
            return self._own_attn(*args, **kwargs)
        with CapturedScores(selector, batch=step.cache.shape[0]) as captured:
            out = self._own_attn(*args, **kwargs)
        if captured.score is None:
            raise RuntimeError(
                f"selector {selector!r}: {type(self.parts.attn).__name__} of layer "
                f"{self.layer} calls neither scaled_dot_product_attention nor softmax; "
                "use selector='random'"
            )
        step.cache.record_score(self.layer, captured.score)
        return out

    # --- full steps -------------------------------------------------------------------------

    def _exact(self, step: Step, args: Any, kwargs: Any) -> Any:
        """The block's own forward, bit for bit; what its two modules return goes to the cache.

        Taken by hooks, which come last and so see what the block sees: other hooks may change it.
        """
        kept: list[str] = []

        def keep(name: str, module: nn.Module, buffer: Tensor) -> Any:
            def hook(module: nn.Module, inputs: Any, out: Tensor) -> None:
                if out.shape != buffer.shape:
                    raise RuntimeError(
                        f"{name} of layer {self.layer}: expected to be called with all tokens, "
                        f"{tuple(buffer.shape)} in and out, got {tuple(out.shape)}"
                    )
                buffer.copy_(out)
                kept.append(name)

            return module.register_forward_hook(hook)

        handles = [
            keep("attention", self.parts.attn, step.cache.attn[self.layer]),
            keep("MLP", self.parts.mlp, step.cache.mlp[self.layer]),
        ]
        try:
            out = self._own_forward(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if kept != ["attention", "MLP"]:
            raise RuntimeError(
                f"layer {self.layer}: expected its attention and its MLP to be called once each, "
                f"got {kept}; if modules were replaced, disable the model and enable it again"
            )
        return out

    def _cached(self, step: Step, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        """The attention from the cache, the MLP of the selected tokens."""
        cache, norm = step.cache, self._norms[1]
        gate_a, shift, scale, gate_m = self._modulation(step, x, args, kwargs, CACHED_CHUNKS)
        index, inverse = cache.selection(self.layer)
        reuse = (gate_a, cache.attn[self.layer])
        x = x.contiguous()
        if index.shape[1] == 0:
            return scatter_residual(x, [reuse, (gate_m, cache.mlp[self.layer])])
        if norm.module is None and self._native_mlp(x):
            fc1, fc2, activation = self._mlp_weights()
            return partial_mlp(
                x,
                (index, inverse),
                (shift, scale, gate_m),
                cache.mlp[self.layer],
                fc1,
                fc2,
                residual=reuse,
                activation=activation,
                weight=norm.weight,
                bias=norm.bias,
                eps=norm.eps,
            )
        fresh = self._mlp(_rows(norm, x, index, shift, scale, reuse))
        return scatter_residual(x, [reuse, (gate_m, cache.mlp[self.layer], fresh, inverse)])

    def _fused(self, step: Step, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        """A full step through the ops of a cached one, with every token selected."""
        cache, layer = step.cache, self.layer
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self._modulation(
            step, x, args, kwargs, slice(None)
        )
        norm1, norm2 = self._norms
        x = x.contiguous()
        cache.attn[layer].copy_(self.parts.attn(_rows(norm1, x, None, shift_a, scale_a, None)))
        reuse = (gate_a, cache.attn[layer])
        fresh = self._mlp(_rows(norm2, x, None, shift_m, scale_m, reuse))
        return scatter_residual(x, [reuse, (gate_m, cache.mlp[layer], fresh, cache.every)])

    # --- the MLP ----------------------------------------------------------------------------

    def _mlp(self, rows: Tensor) -> Tensor:
        if self._native_mlp(rows):
            fc1, fc2, activation = self._mlp_weights()
            return mlp_rows(rows, fc1, fc2, activation=activation)
        out: Tensor = self.parts.mlp(rows)
        return out.to(rows.dtype).contiguous()

    def _native_mlp(self, x: Tensor) -> bool:
        """Whether the MLP's weights may be read: plain linears, and no autocast to obey."""
        return (
            self._linears is not None
            and self._linears[0].weight.dtype == x.dtype
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _mlp_weights(self) -> tuple[Any, Any, str]:
        assert self._linears is not None
        fc1, fc2, activation = self._linears
        packed = self._packed.linears()
        return (*packed, activation) if packed else (fc1, fc2, activation)

    # --- modulation -------------------------------------------------------------------------

    def _modulation(
        self, step: Step, x: Tensor, args: Any, kwargs: Any, chunks: slice
    ) -> tuple[Tensor, ...]:
        table = step.modulation(self.layer)
        if table is None:
            table = self.modulate(self.parts.condition(*args, **kwargs), chunks)
        elif table.shape[1] == 6 * x.shape[2]:
            first = (chunks.start or 0) * x.shape[2]
            table = table[:, first:]
        table = table.to(x.dtype).expand(x.shape[0], -1)  # one label may serve the whole batch
        return tuple(table.split(x.shape[2], dim=1))

    def modulate(self, condition: Tensor, chunks: slice) -> Tensor:
        """The chosen ones of the six (B, C) chunks, side by side."""
        module = self.parts.modulation()
        first = chunks.start or 0
        if linear.plain(module) and not torch.is_autocast_enabled(condition.device.type):
            C = module.out_features // 6
            bias = module.bias
            return F.linear(
                condition,
                module.weight[first * C :],
                None if bias is None else bias[first * C :],
            )
        out: Tensor = module(condition)
        return out[:, first * (out.shape[1] // 6) :]


def _rows(
    norm: Norm,
    x: Tensor,
    index: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    residual: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """gather_modulate; through the norm's own module where that is not a plain LayerNorm."""
    if norm.module is None:
        return gather_modulate(
            x,
            index,
            shift,
            scale,
            residual=residual,
            weight=norm.weight,
            bias=norm.bias,
            eps=norm.eps,
        )
    rows = x
    if residual is not None:
        gate, cache = residual
        rows = rows + gate[:, None] * cache
    if index is not None:
        rows = rows.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
    rows = norm.module(rows) * (1 + scale[:, None]) + shift[:, None]
    return rows.to(x.dtype).contiguous()
