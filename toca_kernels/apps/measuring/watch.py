"""Watch: time and caches of every call of a model, looked at from outside."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...blocks.block import Block, BlockState
from ...session import Session
from ...track import rebuilt, tensors

_TOKENS = 1024  # of a sample, evenly spread, are compared: a video's would not fit in memory


class Watch:
    """Looks at every call of one model: its time, and the caches of some layers after it.

    Attributes:
        seconds: of each call.
        cached: numbers of the calls in which something came from the cache.
        outputs: (call, module, layer) -> what is cached, on the CPU; filled where there is no
            `reference`.
        errors: module -> layer -> relative error in each cached call; against the reference.
    """

    def __init__(
        self, model: nn.Module, session: Session | None = None, reference: Watch | None = None
    ) -> None:
        self.model = model
        self.seconds: list[float] = []
        self.cached: set[int] = set()
        self.outputs: dict[tuple[int, str, int], Tensor] = {}
        self.errors: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._reference = reference
        self._watched = _some(session._run.blocks) if session is not None else {}
        self._states: dict[Block, BlockState] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watch]:
        """Calls inside are looked at.

        The model's forward is wrapped and not hooked: published samplers call it directly.
        """
        own, attributes = self.model.forward, vars(self.model)
        before = attributes.get("forward")

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._synchronize()
            started = time.perf_counter()
            out = own(*args, **kwargs)
            self._synchronize()
            self._after(time.perf_counter() - started)
            return out

        handles = [one.block.register_forward_hook(self._noting(one)) for one in self._watched]
        attributes["forward"] = forward
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            attributes.pop("forward")
            if before is not None:
                attributes["forward"] = before

    def _synchronize(self) -> None:
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def _noting(self, block: Block) -> Callable[..., None]:
        """Keeps the step's state, to be read when the time has been taken."""

        def note(*args: Any) -> None:
            if block.state is not None:
                self._states[block] = block.state

        return note

    def _after(self, seconds: float) -> None:
        call = len(self.seconds)
        self.seconds.append(seconds)
        for block, state in self._states.items():
            for name in self._watched[block]:
                at = call, name, block.layers[name]
                kept, device = state.features[name], state.every[name].device
                # From host memory, where cache_device has them lie.
                state.features[name] = rebuilt(kept, [one.to(device) for one in tensors(kept)])
                block.settle(state, name)
                if self._reference is None:
                    self.outputs[at] = _sample(block.read(state, name))
                elif not state.full[name]:
                    self.cached.add(call)
                    want = self._reference.outputs[at].float()
                    error = relative(_sample(block.read(state, name)).float(), want)
                    self.errors[name][at[2]].append(error)
        self._states = {}

    def per_step(self, calls: Sequence[int], steps: int) -> float | None:
        """Seconds of a step, from the median of these calls."""
        if not calls:
            return None
        median = statistics.median(self.seconds[call] for call in calls)
        return median * len(self.seconds) / steps


def _some(blocks: Sequence[Block]) -> dict[Block, list[str]]:
    """The blocks that are the first, middle or last layer of a module, and of which."""
    last: dict[str, int] = {}
    for block in blocks:
        last |= {name: block.layers[name] for name in block.modules}
    found = {
        block: [
            name for name in block.modules if block.layers[name] in (0, last[name] // 2, last[name])
        ]
        for block in blocks
    }
    return {block: names for block, names in found.items() if names}


def _sample(x: Tensor) -> Tensor:
    """Some of a module's tokens, on the CPU; spaced oddly, so that they are not one column."""
    return x[:, :: math.ceil(x.shape[1] / _TOKENS) | 1].to("cpu", copy=True)


def relative(have: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm; 0 where both are zero."""
    norm, off = float(want.norm()), float((have - want).norm())
    return off / norm if norm else float(off > 0)
