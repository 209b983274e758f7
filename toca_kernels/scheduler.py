"""Where a run begins and how many steps it has taken, as a pipeline and its scheduler tell.

A scheduler's `set_timesteps` and `set_begin_index` announce a run, and its `step` counts.  A
pipeline's `progress_bar`, called where its loop begins, tells which of the timesteps will be run
(one that starts from an image skips the first) and which scheduler the pipeline has by then.
Their methods are replaced on the instances while somebody follows, and put back after that.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence, Sized
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from .run import Run

_TELLING = ("set_timesteps", "set_begin_index", "step")


class Follower:
    """Tells the runs of one or more models what pipelines and schedulers do.

    Followed are the enabled pipeline's scheduler, and that of the pipeline which began a loop last.
    """

    def __init__(self, runs: Sequence[Run], pipe: Any = None) -> None:
        self._runs = runs
        self._pipe = _weakly(pipe)  # its text encoders may be large
        self._bar = self._listen(pipe, "progress_bar")
        self._heard: dict[int, tuple[Any, list[_Telling]]] = {}  # schedulers, by their id
        self._announced = False  # a run of which no model has been called yet
        self._follow()

    def close(self) -> None:
        """Follow nobody any more."""
        self._leave(self._bar)
        for _, methods in self._heard.values():
            self._leave(methods)
        self._heard = {}

    def look(self) -> None:
        """A model is about to be called: by now the pipeline may have another scheduler."""
        scheduler = getattr(self._pipe(), "scheduler", None)
        if scheduler is not None and id(scheduler) not in self._heard:
            self._follow()
            if getattr(scheduler, "num_inference_steps", None):  # its set_timesteps was not heard
                self._begin(_timesteps(scheduler)[_begin_index(scheduler) :])
        if self._announced:
            self._announced = False
            for run in self._runs:
                run.branches = {}

    def loop(
        self, pipe: Any, iterable: Any = None, total: int | None = None, *_: Any, **__: Any
    ) -> None:
        """A pipeline begins its loop: over `iterable`, or of `total` steps."""
        scheduler = getattr(pipe, "scheduler", None)
        steps = len(iterable) if isinstance(iterable, Sized) else total
        if scheduler is None or not steps:
            return
        self._follow(scheduler)
        given = isinstance(iterable, Tensor) and iterable.ndim == 1
        self._begin(iterable.tolist() if given else _last_timesteps(scheduler, steps))

    def hear(self, target: Any, name: str, *args: Any, **kwargs: Any) -> None:
        """A method was called."""
        if name == "step":
            for run in self._runs:
                run.ticks += 1
        elif name == "progress_bar":
            self.loop(target, *args, **kwargs)
        else:
            first = 0 if name == "set_timesteps" else _begin_index(target)
            self._begin(_timesteps(target)[first:])

    def _begin(self, timesteps: Sequence[float]) -> None:
        if timesteps:
            self._announced = True
            for run in self._runs:
                run.begin(timesteps)

    def _follow(self, *others: Any) -> None:
        """Follow the enabled pipeline's scheduler and these, and leave all that went before."""
        schedulers = {id(one): one for one in (getattr(self._pipe(), "scheduler", None), *others)}
        for key in self._heard.keys() - schedulers.keys():
            self._leave(self._heard.pop(key)[1])
        for key in schedulers.keys() - self._heard.keys():
            one = schedulers[key]
            names = _TELLING if hasattr(one, "set_timesteps") else ()
            self._heard[key] = one, self._listen(one, *names)

    def _listen(self, target: Any, *names: str) -> list[_Telling]:
        methods = [_Telling.of(target, name) for name in names if hasattr(target, name)]
        for method in methods:
            method.followers.add(self)
        return methods

    def _leave(self, methods: Sequence[_Telling]) -> None:
        for method in methods:
            method.followers.discard(self)
            method.put_back()


class _Telling:
    """A method of an object that also tells of its calls.

    It is bound to the object, so a deep copy of that gets a method of its own, which tells nobody.
    """

    def __init__(self, target: Any, name: str) -> None:
        self.followers: weakref.WeakSet[Follower] = weakref.WeakSet()
        self._target, self._name = _weakly(target), name
        self._before = vars(target).get(name)  # somebody else's
        own = getattr(target, name)
        bound = getattr(own, "__self__", None) is target
        function = getattr(own, "__func__", None) if bound else None
        self._function = function or (lambda _, *args, **kwargs: own(*args, **kwargs))
        functools.update_wrapper(self, function or own, updated=())  # its signature is read

    @staticmethod
    def of(target: Any, name: str) -> _Telling:
        """The one that the object has, or a new one."""
        method = getattr(vars(target).get(name), "__func__", None)
        if not isinstance(method, _Telling) or method._target() is not target:
            method = _Telling(target, name)
            vars(target)[name] = MethodType(method, target)
        return method

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        out = self._function(target, *args, **kwargs)
        if target is self._target():
            for follower in list(self.followers):
                follower.hear(target, self._name, *args, **kwargs)
        return out

    def put_back(self) -> None:
        """Give the object its own method back, unless somebody follows or has put theirs over."""
        attributes = getattr(self._target(), "__dict__", {})
        if not self.followers and getattr(attributes.get(self._name), "__func__", None) is self:
            del attributes[self._name]
            if self._before is not None:
                attributes[self._name] = self._before


def _timesteps(scheduler: Any) -> list[float]:
    timesteps = getattr(scheduler, "timesteps", None)
    return [] if timesteps is None else torch.as_tensor(timesteps).tolist()


def _begin_index(scheduler: Any) -> int:
    return getattr(scheduler, "begin_index", None) or 0


def _last_timesteps(scheduler: Any, steps: int) -> list[float]:
    """Those of the last steps; a scheduler of order 2 has two for each step but the last."""
    timesteps = _timesteps(scheduler)
    order = getattr(scheduler, "order", 1)
    every = getattr(scheduler, "num_inference_steps", None) or -(-len(timesteps) // order)
    return timesteps[max(0, every - steps) * order :]


def _weakly(target: Any) -> Callable[[], Any]:
    """Gives the object for as long as it lives."""
    try:
        return weakref.ref(target)
    except TypeError:  # None, or a SimpleNamespace
        return lambda: target
