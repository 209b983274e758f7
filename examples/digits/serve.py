"""Digits for many who ask at different times: one batch whose members come and go.

Each order has its class, its number of steps and its noise, and begins when there is room.  Every
call of the model takes all of them one step further, whatever steps those are; with ToCa each goes
through its own plan, so some of a batch recompute everything and others only what matters.

    python examples/digits/serve.py            # draws 24 digits, checks them against lone runs
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

import toca_kernels as toca
from digits import GUIDANCE, IMAGE_SIZE, NULL_CLASS, load_model, sample, scheduler


@dataclass(frozen=True)
class Order:
    """A digit that somebody wants: its class, the steps it may take, its noise's seed, and the
    number of the model call before which it arrives."""

    label: int
    steps: int
    seed: int
    arrives: int = 0

    def noise(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(1, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


class Drawing:
    """An order under way."""

    def __init__(self, order: Order, session: toca.Session | None) -> None:
        self.order = order
        self.x = order.noise()
        self._ddim = scheduler()
        self._ddim.set_timesteps(order.steps)
        self._left = deque(self._ddim.timesteps)
        self.request = None
        if session is not None:
            self.request = session.request(timesteps=self._ddim.timesteps)

    @property
    def t(self) -> Tensor:
        return self._left[0]

    @property
    def finished(self) -> bool:
        return not self._left

    def step(self, output: Tensor) -> None:
        self.x = self._ddim.step(output, self._left.popleft(), self.x).prev_sample


@torch.no_grad()
def serve(
    model: torch.nn.Module,
    orders: Iterable[Order],
    *,
    capacity: int,
    session: toca.Session | None = None,
) -> dict[Order, Tensor]:
    """Draws all of them, at most `capacity` at once; without a session by the untouched model."""
    waiting = deque(sorted(orders, key=lambda order: order.arrives))
    active: list[Drawing] = []
    drawn: dict[Order, Tensor] = {}
    call = 0
    while waiting or active:
        while waiting and waiting[0].arrives <= call and len(active) < capacity:
            active.append(Drawing(waiting.popleft(), session))
        call += 1
        if not active:
            continue
        x = torch.cat([one.x for one in active]).repeat(2, 1, 1, 1).to(model.dtype)
        t = torch.stack([one.t for one in active]).repeat(2)
        labels = torch.tensor([one.order.label for one in active])
        labels = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])
        if session is None:
            output = model(x, timestep=t, class_labels=labels).sample
        else:
            # Both guidance halves of a digit are rows of its request.
            with session.batch([one.request for one in active] * 2):
                output = model(x, timestep=t, class_labels=labels).sample
        cond, uncond = output.float().chunk(2)
        guided = uncond + GUIDANCE * (cond - uncond)
        for one, row in zip(active, guided.split(1), strict=True):
            one.step(row)
            if one.finished:
                drawn[one.order] = one.x
        active = [one for one in active if not one.finished]
    return drawn


def some_orders(count: int) -> list[Order]:
    """Of every class in turn, of 20, 30 or 50 steps, one arriving after every third call."""
    return [Order(n % 10, (50, 20, 30)[n % 3], seed=n, arrives=3 * n) for n in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=24, help="digits (%(default)s)")
    parser.add_argument("--capacity", type=int, default=8, help="rows at once (%(default)s)")
    parser.add_argument("--preset", default="dit-ddim50", help="settings of ToCa (%(default)s)")
    args = parser.parse_args()
    model, orders = load_model(), some_orders(args.count)
    config = toca.ToCaConfig.preset(args.preset)

    started = time.perf_counter()
    with toca.enabled(model, config) as session:
        drawn = serve(model, orders, capacity=args.capacity, session=session)
    seconds = time.perf_counter() - started
    print(f"{len(drawn)} digits in {seconds:.1f} s, up to {args.capacity} at once")

    worst = 0.0
    for order in orders[:3]:
        with toca.enabled(model, config, num_steps=order.steps):
            alone = sample(
                model,
                torch.tensor([order.label]),
                num_steps=order.steps,
                noise=order.noise(),
                progress=False,
            )
        worst = max(worst, float((drawn[order] - alone).abs().max()))
    print(f"the first three drawn alone differ by at most {worst:.1e} (pixels span 2)")


if __name__ == "__main__":
    main()
