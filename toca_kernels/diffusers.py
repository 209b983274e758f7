"""`enable_cache(ToCaConfig(...))` on diffusers' models.  Importing this module is all it takes.

    import toca_kernels as toca
    import toca_kernels.diffusers

    pipe.transformer.enable_cache(toca.ToCaConfig.preset("flux-50"))
    image = pipe(prompt)  # the pipeline tells how many steps it is about to take
    pipe.transformer.disable_cache()

`enable_cache` takes the options of `toca.enable` too, and returns its session.  A loop of your own
has to say how many steps it takes, `enable_cache(config, num_steps=50)`: nothing else tells there.

Wrapped are the methods of diffusers' CacheMixin, and the method of DiffusionPipeline that every
pipeline calls where its loop begins: so every pipeline around an enabled model is followed.  For
other configs and other models nothing changes.  Models without CacheMixin (DiT, PixArt, SD3,
Z-Image and others) have `toca.enable`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.models.cache_utils import CacheMixin
from torch import nn

from .config import ToCaConfig
from .session import _ATTRIBUTE, Session, disable, enable


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
        return enable(self, config, **options)

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
    def progress_bar(self: Any, *args: Any, **kwargs: Any) -> Any:
        models = [part for part in vars(self).values() if isinstance(part, nn.Module)]
        for session in filter(None, map(_session, models)):
            session._follower.loop(self, *args, **kwargs)
        return own(self, *args, **kwargs)

    return progress_bar


def _wrap(
    kind: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    setattr(kind, name, wrapper(getattr(kind, name)))


_wrap(CacheMixin, "enable_cache", _enable_cache)
_wrap(CacheMixin, "disable_cache", _disable_cache)
_wrap(CacheMixin, "_reset_stateful_cache", _reset_stateful_cache)
_wrap(DiffusionPipeline, "progress_bar", _progress_bar)
