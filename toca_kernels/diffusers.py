"""`enable_cache(ToCaConfig(...))` on diffusers' models.  Importing this module is all it takes.

    import toca_kernels as toca
    import toca_kernels.diffusers

    pipe.transformer.enable_cache(toca.ToCaConfig.preset("flux-50"))
    image = pipe(prompt)  # the pipeline tells how many steps it is about to take
    pipe.transformer.disable_cache()

`enable_cache` takes the options of `toca.enable` too, and returns its session.  A loop of your own
has to say how many steps it takes, `enable_cache(config, num_steps=50)`: nothing else tells there.

Wrapped are the methods of diffusers' CacheMixin, and the method of DiffusionPipeline that every
pipeline calls where its loop begins.  For other configs and other models nothing changes.  Models
without CacheMixin (DiT, PixArt, SD3, Z-Image and others) have `toca.enable`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sized
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from diffusers import DiffusionPipeline
from diffusers.models.cache_utils import CacheMixin
from torch import nn

from .config import ToCaConfig
from .session import _ATTRIBUTE, Session, disable, enable

# The sessions that `enable_cache` made: they came without a scheduler, so they are told here.
_sessions: WeakSet[Session] = WeakSet()
# Those that count the steps of a scheduler.
_followers: WeakKeyDictionary[Any, WeakSet[Session]] = WeakKeyDictionary()


def _session(model: Any) -> Session | None:
    return vars(model).get(_ATTRIBUTE)


# --- CacheMixin ----------------------------------------------------------------------------------


def _enable_cache(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def enable_cache(self: Any, config: Any, **options: Any) -> Session | None:
        session = _session(self)
        enabled = self._cache_config if session is None else session.config
        if enabled is not None:
            raise ValueError(
                f"Caching has already been enabled with {type(enabled)}. To apply a new caching "
                "technique, please disable the existing one first."
            )
        if not isinstance(config, ToCaConfig):
            own(self, config, **options)
            return None
        session = enable(self, config, **options)
        session._undo.append(lambda: vars(self).pop("_cache_config", None))
        self._cache_config = config
        _sessions.add(session)
        return session

    return enable_cache


def _disable_cache(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def disable_cache(self: Any) -> None:
        if _session(self) is None:
            own(self)
        else:
            disable(self)

    return disable_cache


def _reset_stateful_cache(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def reset_stateful_cache(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        session = _session(self)
        if session is None:
            return
        if session._run.announced:  # and so will be the next run: `summary` can tell of this one
            session._run.release()
        else:
            session.reset()

    return reset_stateful_cache


# --- DiffusionPipeline ---------------------------------------------------------------------------


def _progress_bar(own: Callable[..., Any]) -> Callable[..., Any]:
    """Every pipeline calls it once its timesteps are known, before the first step."""

    @functools.wraps(own)
    def progress_bar(self: Any, iterable: Any = None, total: int | None = None) -> Any:
        models = [part for part in vars(self).values() if isinstance(part, nn.Module)]
        sessions = [session for session in map(_session, models) if session in _sessions]
        steps = len(iterable) if isinstance(iterable, Sized) else total
        scheduler = getattr(self, "scheduler", None)
        if sessions and scheduler is not None and steps:
            timesteps = _timesteps(scheduler, steps)
            for session in sessions:
                assert session is not None
                _follow(session, scheduler)
                session._run.begin(len(timesteps), timesteps)
        return own(self, iterable, total)

    return progress_bar


def _timesteps(scheduler: Any, steps: int) -> list[float]:
    """Those of the run: a pipeline that starts from an image skips the first of its scheduler's.

    A scheduler of order 2 has two timesteps for each step but the last.
    """
    timesteps: list[float] = torch.as_tensor(scheduler.timesteps).tolist()
    order = getattr(scheduler, "order", 1)
    every = getattr(scheduler, "num_inference_steps", None) or -(-len(timesteps) // order)
    return timesteps[max(0, every - steps) * order :]


def _follow(session: Session, scheduler: Any) -> None:
    """Count the scheduler's steps for the session, until that ends or follows another."""
    if session in _followers.get(scheduler, ()):
        return
    for other in list(_followers):
        _leave(session, other)
    if scheduler not in _followers:
        _followers[scheduler] = WeakSet()
        vars(scheduler)["step"] = _Step(vars(scheduler).get("step"), type(scheduler)).of(scheduler)
    _followers[scheduler].add(session)
    session._undo.append(lambda: _leave(session, scheduler))


def _leave(session: Session, scheduler: Any) -> None:
    followers = _followers.get(scheduler)
    if followers is None:
        return
    followers.discard(session)
    ours = getattr(vars(scheduler).get("step"), "__func__", None)
    if not followers and isinstance(ours, _Step):
        del _followers[scheduler]
        vars(scheduler).pop("step")
        if ours.before is not None:
            vars(scheduler)["step"] = ours.before


class _Step:
    """A scheduler's step, which also counts.

    It is bound to the scheduler as a method, so a deep copy of the scheduler gets a step of its
    own, which counts for nobody.
    """

    def __init__(self, before: Callable[..., Any] | None, kind: Any) -> None:
        self.before = before  # somebody else's, on the instance
        self._own = kind.step
        functools.update_wrapper(self, kind.step)  # pipelines read its signature

    def of(self, scheduler: Any) -> MethodType:
        return MethodType(self, scheduler)

    def __call__(self, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        if self.before is None:
            out = self._own(scheduler, *args, **kwargs)
        else:
            out = self.before(*args, **kwargs)
        for session in _followers.get(scheduler, ()):
            session._run.ticks += 1
        return out


def _wrap(
    kind: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    setattr(kind, name, wrapper(getattr(kind, name)))


_wrap(CacheMixin, "enable_cache", _enable_cache)
_wrap(CacheMixin, "disable_cache", _disable_cache)
_wrap(CacheMixin, "_reset_stateful_cache", _reset_stateful_cache)
_wrap(DiffusionPipeline, "progress_bar", _progress_bar)
