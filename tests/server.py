"""A server of stock pipelines: each runs in a thread, their calls of the model in one batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from toca_kernels.session import Session

SHARED = ("img_ids", "txt_ids", "image_rotary_emb")


class Client:
    """Stands for the transformer of one pipeline."""

    def __init__(self, model: Any, branches: int) -> None:
        self.model = model
        self.branches = branches
        self.calls = 0
        self.given = self.got = None
        self.asked, self.answered = threading.Event(), threading.Event()
        self.finished = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.given = args, kwargs
        self.asked.set()
        assert self.answered.wait(60), "nobody answers"
        self.answered.clear()
        self.calls += 1
        if isinstance(self.got, BaseException):
            raise self.got
        return self.got

    @property
    def branch(self) -> str:
        return str(self.calls % self.branches)


def serve(
    session: Session,
    jobs: Sequence[tuple[int, int, Callable[[Client], Any]]],
    *,
    branches: int = 1,
    record: bool = False,
) -> list[SimpleNamespace]:
    """Runs each (first tick, steps, run(client)); returns (out, request) of each.

    In every tick all that have begun take one call of the model.
    """
    served = [
        SimpleNamespace(client=Client(session.model, branches), first=first, steps=steps, run=run)
        for first, steps, run in jobs
    ]
    for one in served:
        one.request = session.request(num_steps=one.steps)
        one.request.record_selections = record
        one.thread = threading.Thread(target=_work, args=(one,), daemon=True)
    tick = 0
    while not all(one.client.finished for one in served):
        for one in served:
            if one.first == tick:
                one.thread.start()
        active = [one for one in served if one.first <= tick and not one.client.finished]
        for one in active:
            assert one.client.asked.wait(60), "nobody asks"
            one.client.asked.clear()
        active = [one for one in active if not one.client.finished]
        # Not in the order in which they came.
        active.sort(key=lambda one: (one.steps * 7 + one.first * 3 + tick) % 5)
        asking: dict[str, list[SimpleNamespace]] = {}  # whoever is answered may ask again at once
        for one in active:
            asking.setdefault(one.client.branch, []).append(one)
        for branch, some in sorted(asking.items()):
            _answer(session, branch, some)
        tick += 1
    return served


def _work(one: Any) -> None:
    try:
        one.out = one.run(one.client)
    except BaseException as error:
        one.out = error
    one.client.finished = True
    one.client.asked.set()


def _answer(session: Session, branch: str, asking: Sequence[Any]) -> None:
    calls = [one.client.given for one in asking]
    counts = [_rows(*call) for call in calls]
    args, kwargs = _together(calls, counts)
    rows = [one.request for one, count in zip(asking, counts, strict=True) for _ in range(count)]
    try:
        with session.batch(rows, branch=branch):
            out = session.model(*args, **kwargs)
        parts = _apart(out, counts)
    except BaseException as error:
        parts = [error] * len(asking)
    for one, part in zip(asking, parts, strict=True):
        one.client.got = part
        one.client.answered.set()


def _rows(args: Any, kwargs: Any) -> int:
    return len(args[0] if args else kwargs["hidden_states"])


def _together(calls: Sequence[Any], counts: Sequence[int]) -> tuple[list[Any], dict[str, Any]]:
    names = [*range(len(calls[0][0])), *calls[0][1]]
    found: dict[Any, Any] = {}
    for name in names:
        values = [(args[name] if isinstance(name, int) else kw[name]) for args, kw in calls]
        found[name] = values[0] if name in SHARED else _joined(name, values, counts)
    args = [found[name] for name in names if isinstance(name, int)]
    return args, {name: one for name, one in found.items() if isinstance(name, str)}


def _joined(name: Any, values: Sequence[Any], counts: Sequence[int]) -> Any:
    first = values[0]
    if name == "timestep" or (name == 1 and isinstance(first, Tensor) and first.ndim < 2):
        values = [
            torch.as_tensor(one).reshape(-1).expand(count) if torch.as_tensor(one).ndim < 2 else one
            for one, count in zip(values, counts, strict=True)
        ]
        return torch.cat(values)
    if isinstance(first, Tensor):
        assert all(len(one) == count for one, count in zip(values, counts, strict=True)), name
        return torch.cat(list(values))
    if isinstance(first, list):
        return [one for some in values for one in some]
    if isinstance(first, dict):
        return {key: _joined(key, [one[key] for one in values], counts) for key in first}
    return first


def _apart(out: Any, counts: Sequence[int]) -> list[Any]:
    leaves, spec = pytree.tree_flatten(out, is_leaf=lambda one: isinstance(one, list))
    parts: list[list[Any]] = [[] for _ in counts]
    for leaf in leaves:
        first = 0
        for part, count in zip(parts, counts, strict=True):
            part.append(leaf[first : first + count])
            first += count
    return [pytree.tree_unflatten(part, spec) for part in parts]
