"""Steps captured once and replayed: what a launch-bound cached step is made of.

A plan fixes, before the run, which layers of a step are full and how many tokens the others
recompute.  So every step of one kind is the same sequence of kernels over the same buffers, and a
CUDA graph can replay it: no Python, no launches, one submission.  The selection is inside the
graph; the step's gates, shifts and scales are copied to a fixed place before it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .branch import Branch
from .selectors import SELECTORS


class Recorder(Protocol):
    """Records the kernels of a call without keeping its Python."""

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """(replay, out): `replay()` runs the kernels again, over the same memory, into `out`."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory that the records hold."""
        ...


class CudaGraphs:
    """CUDA graphs in one shared pool: the steps of a run never overlap."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.nbytes = 0
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        before = torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self._pool):
            out = call()
        self.nbytes += max(0, torch.cuda.memory_reserved(self.device) - before)
        return graph.replay, out


@dataclass(frozen=True)
class _Record:
    replay: Callable[[], None]
    inputs: list[Tensor]
    out: Any


class StepGraphs:
    """Replays the steps of an enabled model.

    The first step of each kind runs eagerly (kernels are compiled, workspaces made), the second
    is recorded, all later ones are replayed.  A step that cannot be recorded runs eagerly from
    then on, and `fallback` says why.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.fallback = ""
        self.replayed = 0
        self._warm: set[Hashable] = set()
        self._records: dict[Hashable, _Record] = {}

    @property
    def nbytes(self) -> int:
        return self.recorder.nbytes

    def release(self) -> None:
        """Give the recorded steps back."""
        self._records.clear()
        self._warm.clear()

    def __len__(self) -> int:
        return len(self._records)

    def call(
        self, branch: Branch, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """forward(*args, **kwargs) as the step that `branch` is about to take."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        selector = branch.run.config.selector
        if SELECTORS[selector].source == "drawn":
            self.fallback = f"selector {selector!r} draws new numbers in every step"
        if branch.run.config.residual_threshold is not None:
            self.fallback = "residual_threshold decides in the middle of a step what it computes"
        if branch.run.ranks is not None:
            self.fallback = "processes share the tokens and wait for each other within a step"
        kind = None if self.fallback else branch.kind()
        if kind is None:
            return branch.forward(forward, args, kwargs)
        key = (kind, spec, tuple(map(_signature, leaves)))
        if key in self._records:
            return self._replay(self._records[key], tensors)
        if key not in self._warm:
            self._warm.add(key)
            return branch.forward(forward, args, kwargs)
        try:
            record = self._record(branch, forward, leaves, spec)
        except RuntimeError as error:
            self.fallback = f"recording a step failed: {str(error).splitlines()[0]}"
            branch.abort()  # what the failed record left behind is not known: the step is full
            branch.decide()
            return branch.forward(forward, args, kwargs)
        self._records[key] = record
        return self._replay(record, tensors)

    def _record(
        self, branch: Branch, forward: Callable[..., Any], leaves: list[Any], spec: Any
    ) -> _Record:
        inputs = []
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                leaves[position] = leaf.clone()
                inputs.append(leaves[position])
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        replay, out = self.recorder.record(lambda: branch.forward(forward, args, kwargs))
        return _Record(replay, inputs, out)

    def _replay(self, record: _Record, tensors: list[Tensor]) -> Any:
        for static, tensor in zip(record.inputs, tensors, strict=True):
            static.copy_(tensor)
        record.replay()
        self.replayed += 1
        # The next replay writes into the same memory: the caller gets his own copy.
        return pytree.tree_map_only(Tensor, torch.clone, record.out)


def _signature(leaf: Any) -> Hashable:
    """What must not change between a record and its replay."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device
    return leaf if isinstance(leaf, Hashable) else repr(leaf)
