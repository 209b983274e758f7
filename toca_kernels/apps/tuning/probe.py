"""What a model is like, from full runs that are looked at: shapes, FLOPs, and how its modules'
outputs change from step to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...blocks.block import Block
from ...config import ToCaConfig
from ...plan import Plan
from ...session import Session, enabled
from ..sampling.sampler import Request, Sampler
from .cost import RATIOS, CostTable, growing

_VALUES = 8192  # of a module's output in a layer are looked at, drawn at random

Gram = NDArray[np.float64]


@dataclass(frozen=True)
class Shapes:
    """The modules of a model as its plan names them: layers and tokens of each."""

    layers: Mapping[str, int]
    tokens: Mapping[str, int]

    def plan(self, config: ToCaConfig, steps: int) -> Plan:
        """The plan of a run; ValueError if the config does not fit."""
        return config.plan(
            num_steps=steps, num_layers=dict(self.layers), num_tokens=dict(self.tokens)
        )


@dataclass(frozen=True)
class Probe:
    """What the full runs showed.

    Attributes:
        shapes: of the modules.
        flops: what steps cost in FLOPs.
        grams: {module: (layers, steps, steps)}: inner products ⟨y_s, y_t⟩ of a module's outputs in
            any two steps, of all samples.
    """

    shapes: Shapes
    flops: CostTable
    grams: Mapping[str, Gram]


def probe(
    sampler: Sampler,
    batches: Sequence[Sequence[Request]],
    *,
    seed: int,
    steps: int,
    progress: Callable[[int], object] = lambda count: None,
) -> Probe:
    """Sample in full steps and look at what every module returns in each of them.

    Raises:
        ValueError: a model that is not supported.
    """
    config = ToCaConfig(
        interval=1, fresh_ratio=0.0, selector="random", tabulate_modulation=False, prepack=False
    )
    timesteps = sampler.timesteps(steps)
    with enabled(sampler.target, config, num_steps=steps, timesteps=timesteps) as session:
        recorder = _Recorder(session, steps)
        with recorder, torch.no_grad():
            for requests in batches:
                session.reset()
                sampler.sample(requests, seed=seed, steps=steps)
                recorder.finish()
                progress(len(requests))
        shapes, flops = _shapes(session), _flops(session, steps)
    return Probe(shapes, flops, recorder.grams)


# --- outputs -------------------------------------------------------------------------------------


class _Recorder:
    """Some values of every module's output in every step, the same in all of them."""

    def __init__(self, session: Session, steps: int) -> None:
        self.grams: dict[str, Gram] = {}
        self._steps = steps
        self._sessions = [session, *session.others]
        self._values: dict[tuple[str, int], dict[int, Tensor]] = {}
        self._chosen: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for one in self._sessions:
            for block in one._blocks:
                self._handles.append(block.block.register_forward_hook(self._noting(one, block)))

    def __exit__(self, *args: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _noting(self, session: Session, block: Block) -> Any:
        def note(*args: Any) -> None:
            if block.state is None:
                return
            # Guidance in calls of its own: the branch that lags behind is the one at hand.
            step = min(branch.position for branch in session._run.branches.values())
            for name in block.modules:
                found = block.read(block.state, name).flatten()
                values = found[self._places(found)].to("cpu", torch.float64)
                self._values.setdefault((name, block.layers[name]), {})[step] = values

        return note

    def _places(self, found: Tensor) -> Tensor:
        count = found.numel()
        if count not in self._chosen:
            generator = torch.Generator().manual_seed(0)
            places = torch.randint(count, (min(_VALUES, count),), generator=generator)
            self._chosen[count] = places.to(found.device)
        return self._chosen[count]

    def finish(self) -> None:
        """A run is over: add its inner products."""
        layers = {
            name: 1 + max(at for m, at in self._values if m == name) for name, _ in self._values
        }
        for name, count in layers.items():
            if name not in self.grams:
                self.grams[name] = np.zeros((count, self._steps, self._steps))
            for layer in range(count):
                held = self._values[name, layer]
                # A step that a model left to another one is like its neighbour.
                known = sorted(held)
                nearest = [min(known, key=lambda at: abs(at - s)) for s in range(self._steps)]
                rows = torch.stack([held[at] for at in nearest]).numpy()
                self.grams[name][layer] += rows @ rows.T
        self._values = {}


# --- shapes and FLOPs ----------------------------------------------------------------------------


def _branches(session: Session) -> list[tuple[Session, Any]]:
    return [
        (one, branch)
        for one in (session, *session.others)
        for branch in one._run.branches.values()
        if branch.done.seconds
    ]


def _shapes(session: Session) -> Shapes:
    _, branch = _branches(session)[0]
    plan = branch.done.plan()
    return Shapes(dict(plan.num_layers), dict(plan.num_tokens))


def _flops(session: Session, steps: int) -> CostTable:
    """FLOPs of steps, as the adapters count them, of all branches and models."""
    names = list(_shapes(session).layers)

    def step(ratios: Mapping[str, float]) -> float:
        total = 0.0
        for one, branch in _branches(session):
            done = branch.done.plan()
            made = one._adapter.flops(_one_step(done, ratios), branch.done.batch).done
            total += made * done.num_steps / steps
        return total

    full, cached = step(dict.fromkeys(names, 1.0)), step({})
    apart = {name: step({name: 1.0}) - cached for name in names}
    whole = sum(apart.values())
    return CostTable(
        unit="FLOPs",
        outside=0.0,
        untouched=full,
        full=(full,) * 3,
        cached=(cached,) * 3,
        share={name: one / whole for name, one in apart.items()},
        extra={
            name: growing([(ratio, step({name: ratio}) - cached) for ratio in (*RATIOS, 1.0)])
            for name in names
        },
        scores={},
    )


def _one_step(done: Plan, ratios: Mapping[str, float]) -> Plan:
    """A plan of one step with these k / N, the others 0."""
    k, full = {}, {}
    for name, layers in done.num_layers.items():
        ratio = ratios.get(name, 0.0)
        k[name] = np.full((1, layers), round(ratio * done.num_tokens[name]), dtype=np.int64)
        full[name] = np.full((1, layers), ratio == 1.0)
    return Plan(1, dict(done.num_layers), dict(done.num_tokens), full, k)
