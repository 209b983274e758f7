"""Noise of each sample's own, also where code asks torch for a batch of it without a generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class OwnNoise(TorchFunctionMode):
    """Within it, `randn` and `randn_like` without a generator give row i from generator i.

    Args:
        generators: one for each of B samples.  A batch of m·B rows holds the samples m times
            over (guidance has m = 2), and row r is drawn from generator r mod B.

    A batch of another length cannot be told apart into samples: ValueError.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self._generators = list(generators)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn_like:
            like, *_ = args or (kwargs["input"],)
            dtype = kwargs.get("dtype") or like.dtype
            return self._draw(like.shape, dtype, kwargs.get("device") or like.device)
        if func is torch.randn and kwargs.get("generator") is None:
            shape = kwargs.get("size", args)
            shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            return self._draw(shape, dtype, kwargs.get("device") or "cpu")
        return func(*args, **kwargs)

    def _draw(self, shape: Sequence[int], dtype: torch.dtype, device: Any) -> Tensor:
        B = len(self._generators)
        if not shape or shape[0] % B:
            raise ValueError(
                f"noise: expected a multiple of {B} rows, one for each sample, got the shape "
                f"{tuple(shape)}; draw one sample at a time (batch size 1)"
            )
        # A mode is off while it handles a call.
        rows = [
            torch.randn(*shape[1:], generator=self._generators[row % B]) for row in range(shape[0])
        ]
        drawn = torch.stack(rows) if rows else torch.empty(*shape)
        return drawn.to(device, dtype)


class OuterCall:
    """A function that runs outside of the mode it is called in.

    A mode sees every call of torch in it; a model makes thousands and draws nothing.
    """

    def __init__(self, mode: OwnNoise, function: Callable[..., Any]) -> None:
        self._mode, self._function = mode, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._mode.__exit__(None, None, None)
        try:
            return self._function(*args, **kwargs)
        finally:
            self._mode.__enter__()


@contextmanager
def watched(device: torch.device, seed: int, samples: int, what: str) -> Iterator[None]:
    """torch's own generators start from `seed`, are put back after, and refused for a batch.

    Raises:
        ValueError: they were drawn from for more than one sample: those would change each other.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        before = _states(devices)
        yield
        same = all(torch.equal(a, b) for a, b in zip(before, _states(devices), strict=True))
    if not same and samples > 1:
        raise ValueError(
            f"{what}: expected all noise from the generators that it is given, but it draws from "
            "torch's own, so samples of a batch change each other; use a batch size of 1"
        )


def _states(devices: Sequence[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(one) for one in devices)]
