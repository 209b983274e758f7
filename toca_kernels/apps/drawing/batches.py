"""Drawing the batches of a run: memory that runs out, and progress."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..sampling.sampler import Request

# What allocators say that raise no error of their own.
_SAYS_NO_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)

_LOOK = 0.5  # seconds at least between two looks at what all processes have done,
_LOOKS_APART = 99  # and this many times as long as the last one took: 1 % of the time at most


class Drawer:
    """Draws batches, in halves where one does not fit into memory.

    Args:
        draw: draws these requests.
        release: frees what the last call left, before a smaller one.
        batch_size: how many requests at most come at once.
    """

    def __init__(
        self,
        draw: Callable[[Sequence[Request]], Tensor],
        release: Callable[[], None],
        batch_size: int,
    ) -> None:
        self._draw, self._release = draw, release
        self.limit = batch_size

    def __call__(self, requests: Sequence[Request]) -> tuple[Tensor, list[int]]:
        """The samples, and how many were drawn at a time.

        Raises:
            ValueError: there is no memory for a single sample; it repeats what was refused.
        """
        rows: list[Tensor] = []
        while (at := sum(map(len, rows))) < len(requests):
            part = requests[at : at + self.limit]
            drawn = self._try(part)
            if isinstance(drawn, Tensor):
                rows.append(drawn)
            elif len(part) == 1:
                raise ValueError(f"memory: expected enough for a batch of 1, there is not: {drawn}")
            else:
                self.limit = (len(part) + 1) // 2
                print(
                    f"toca sample: out of memory with {len(part)} samples at once, going on with "
                    f"{self.limit}",
                    file=sys.stderr,
                )
        return torch.cat(rows), [len(one) for one in rows]

    def _try(self, requests: Sequence[Request]) -> Tensor | str:
        """The samples, or what was said when memory ran out."""
        try:
            return self._draw(requests)
        except (torch.OutOfMemoryError, MemoryError) as error:
            said = str(error) or type(error).__name__
        except RuntimeError as error:
            said = str(error)
            if not any(words in said for words in _SAYS_NO_MEMORY):
                raise
        # Only here, where the error that holds the frames, and so their tensors, is gone.
        self._release()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return said


class Progress:
    """Samples done, samples per second and time left, of all processes.

    Args:
        total, done: samples of the run, and those that were there before.
        shown: by this process.

    Attributes:
        reached: samples that are shown as done.
    """

    def __init__(self, total: int, done: int, *, shown: bool) -> None:
        self.reached, self._next_look = done, 0.0
        self._bar: Any = None
        if shown:
            try:
                from tqdm import tqdm
            except ImportError:
                raise ValueError("tqdm is missing: pip install tqdm") from None
            # Into a file a line now and then.
            every = 0.5 if sys.stderr.isatty() else 10.0
            self._bar = tqdm(
                total=total, initial=done, unit="sample", mininterval=every, dynamic_ncols=True
            )

    def look(self, count: Callable[[], int], *, at_once: bool = False) -> None:
        """Show how many samples there are.

        Args:
            count: tells it; asked now and then only, for it looks through all files of a run.
            at_once: ask it now.
        """
        started = time.perf_counter()
        if self._bar is None or (started < self._next_look and not at_once):
            return
        done = count()
        ended = time.perf_counter()
        self._next_look = ended + max(_LOOK, _LOOKS_APART * (ended - started))
        if done > self.reached:
            self._bar.update(done - self.reached)
            self.reached = done

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
