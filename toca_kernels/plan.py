"""Plan: for each step, layer and module of a run, full or cached, and k. Plain numbers, no tensor.

A plan is made before the run, so that every cached step is a fixed sequence of kernels and nothing
is read back from the device. `ToCaConfig` holds the settings; this file holds the two rules that
turn them into tables:

    full   step i is full where  i mod N_t == 0,  N_t = round(N0 / phi)      (`_full_table`)
    k      k = int(clamp(R0 * layer * step * module, 0, 1) * N)              (`_token_table`)

Row 0 of every table is the first step of sampling, also where a published index counts down.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .config import ToCaConfig
    from .flops import BlockShape, Flops

BoolTable = NDArray[np.bool_]
IntTable = NDArray[np.int64]
T = TypeVar("T")
Index = TypeVar("Index", float, NDArray[np.float64])

MODULES = ("attn", "cross_attn", "mlp")


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """The tables of one run; made by `ToCaConfig.plan`.

    Attributes:
        num_steps: steps of the run.
        num_layers: layers of each module, {module: L}.
        num_tokens: tokens of each module, {module: N}.
        full: {module: (num_steps, L) bool}, read-only. True where all N tokens are computed: in
            full steps, and always in what the settings do not cache.
        k: {module: (num_steps, L) int64}, read-only. Tokens computed: N where full, else the k
            that are selected; 0 where the cached output is reused whole.
    """

    num_steps: int
    num_layers: dict[str, int]
    num_tokens: dict[str, int]
    full: dict[str, BoolTable]
    k: dict[str, IntTable]

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules this plan has tables for."""
        return tuple(self.k)

    def needs_score(self, module: str = "mlp", *, source: str | None = None) -> BoolTable:
        """Where a full step must leave scores behind, (num_steps, L) bool.

        True at (step, layer) where `source` is full and `module` of that layer selects among its
        tokens (0 < k < N, cached) before `source` is full there again. Everywhere else the scores
        would never be read: not before another full step, not before the end, not where k is 0.

        Args:
            module: the module whose tokens are selected.
            source: the module whose full step yields the scores; `module` itself when None. For
                the entropy score it is the cross-attention, whose period may differ (Open-Sora);
                it runs before the MLP, so its scores already serve the same step.
        """
        source = module if source is None else source
        self._require(module)
        self._require(source)
        if self.num_layers[module] != self.num_layers[source]:
            raise ValueError(
                f"source: expected a module with the {self.num_layers[module]} layers of "
                f"{module!r}, got {source!r} with {self.num_layers[source]}"
            )
        k = self.k[module]
        selects = ~self.full[module] & (k > 0) & (k < self.num_tokens[module])
        refreshed = self.full[source]
        needs = np.zeros_like(selects)
        pending = np.zeros(selects.shape[1], dtype=bool)
        for step in reversed(range(self.num_steps)):
            pending |= selects[step]
            needs[step] = refreshed[step] & pending
            pending &= ~refreshed[step]
        needs.setflags(write=False)
        return needs

    def tokens(self, module: str | None = None) -> int:
        """Tokens computed in the run, summed over steps and layers; of all modules when None."""
        if module is None:
            return sum(self.tokens(name) for name in self.modules)
        self._require(module)
        return int(self.k[module].sum())

    def flops(self, *blocks: BlockShape, outside: int = 0) -> Flops:
        """FLOPs of the run, full and done, for blocks of the given shapes.

        Args:
            blocks: one `BlockShape` per list of blocks that the model has: one for DiT and PixArt,
                spatial and temporal for Open-Sora, double and single stream for FLUX.
            outside: FLOPs of one step outside the blocks (embedders, final layer), which are never
                cached. The published DiT figures leave them out, the FLUX figures do not
                (`flops.flux_outside`).
        """
        from .flops import count_flops  # flops.py is built on this file

        return count_flops(self, blocks, outside=outside)

    def summary(self) -> str:
        """A few lines to read: which steps are full and how many tokens the others compute."""
        return "\n".join([f"Plan of {self.num_steps} steps", *map(self._line, self.modules)])

    def _line(self, module: str) -> str:
        full, k, n = self.full[module], self.k[module], self.num_tokens[module]
        every = np.flatnonzero(full.all(axis=1))
        some = np.flatnonzero(full.any(axis=1) & ~full.all(axis=1))
        line = f"  {module}: {self.num_layers[module]} layers, N = {n}; "
        line += f"full in {len(every)} steps ({_shorten(every)})"
        if len(some):
            line += f", in some layers of {len(some)} more ({_shorten(some)})"
        cached = k[~full]
        if not cached.any():
            return line + ("; else reused" if cached.size else "")
        mean = float(cached.mean())
        return line + f"; else k = {cached.min()}..{cached.max()}, mean {mean:.1f} ({mean / n:.1%})"

    def _require(self, module: str) -> None:
        if module not in self.k:
            raise ValueError(f"module: expected one of {list(self.modules)}, got {module!r}")

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return f"Plan(num_steps={self.num_steps}, modules={list(self.modules)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return (
            (self.num_steps, self.num_layers, self.num_tokens)
            == (other.num_steps, other.num_layers, other.num_tokens)
            and all(np.array_equal(self.full[name], other.full[name]) for name in self.modules)
            and all(np.array_equal(self.k[name], other.k[name]) for name in self.modules)
        )

    __hash__ = None  # type: ignore[assignment]


def build_plan(
    config: ToCaConfig,
    *,
    num_steps: int,
    num_layers: int | Mapping[str, int],
    num_tokens: int | Mapping[str, int],
    modules: Sequence[str] | None = None,
) -> Plan:
    """The tables of `ToCaConfig.plan`, which documents the arguments."""
    num_steps = check_integer("num_steps", num_steps, low=1)
    names = _module_names(modules, num_layers, num_tokens)
    layers = _per_module("num_layers", num_layers, names)
    tokens = _per_module("num_tokens", num_tokens, names)
    if config.fresh_ratio > 0 and all(
        module_setting(config.module_ratio, name) is None for name in names
    ):
        raise ValueError(
            f"module_ratio: expected a factor for one of the modules {list(names)}, got only "
            f"{sorted(config.module_ratio)}; nothing would be recomputed at fresh_ratio="
            f"{config.fresh_ratio}"
        )
    kept = cached_layers(config, layers)
    full: dict[str, BoolTable] = {}
    k: dict[str, IntTable] = {}
    for name in names:
        interval = module_setting(config.module_interval, name) or config.interval
        full[name] = _full_table(config, interval, num_steps, layers[name]) | ~kept[name]
        cached = _token_table(config, name, num_steps, layers[name], tokens[name])
        cached = np.where(_recomputes(full[name], config.fresh_every), cached, 0)
        k[name] = np.where(full[name], np.int64(tokens[name]), cached)
        full[name].setflags(write=False)
        k[name].setflags(write=False)
    return Plan(num_steps=num_steps, num_layers=layers, num_tokens=tokens, full=full, k=k)


def cached_layers(config: ToCaConfig, num_layers: Mapping[str, int]) -> dict[str, BoolTable]:
    """{module: (L,) bool}: what `modules` and `layers` have cached, for {module: L}.

    Raises:
        ValueError: a name that is no module's, or a number that is no layer's of any of them.
    """
    chosen = config.modules
    kept = {
        name: np.full(L, chosen is None or name in chosen or module_kind(name) in chosen)
        for name, L in num_layers.items()
    }
    for one in chosen or ():
        _named("modules", one, num_layers)
    if config.layers is None:
        return kept
    named = config.layers if isinstance(config.layers, Mapping) else {"": config.layers}
    for key, numbers in named.items():
        names = _named("layers", key, num_layers) if key else list(num_layers)
        if key:  # a full name goes before its kind
            names = [name for name in names if name == key or name not in named]
        used: set[int] = set()
        for name in names:
            L = num_layers[name]
            here = {one for one in numbers if -L <= one < L}
            used |= here
            mask = np.zeros(L, dtype=bool)
            mask[list(here)] = True
            kept[name] &= mask
        if names and used < set(numbers):
            most = max(num_layers[name] for name in names)
            raise ValueError(
                f"layers: expected numbers from {-most} to {most - 1} for "
                f"{key or 'the modules of this model'}, got {sorted(set(numbers) - used)}"
            )
    return kept


def _named(setting: str, key: str, names: Mapping[str, int]) -> list[str]:
    """The modules that a name or a kind means."""
    found = [name for name in names if key in (name, module_kind(name))]
    if not found:
        kinds = sorted({module_kind(name) for name in names})
        raise ValueError(
            f"{setting}: expected some of the modules {sorted(names)} or of their kinds {kinds}, "
            f"got {key!r}"
        )
    return found


def _full_table(config: ToCaConfig, interval: int, num_steps: int, num_layers: int) -> BoolTable:
    """Which (step, layer) run in full; `interval` is the N0 of the module at hand.

    The period N_t is rewritten by every full step, in its layer 0. Where the published code takes
    the decision anew in each block (`decide_per_block`), the layers behind layer 0 see the new
    period within the same step: if it does not divide the step, layer 0 alone was full.
    """
    table = np.zeros((num_steps, num_layers), dtype=bool)
    if config.full_at is not None:
        if config.full_at and config.full_at[-1] >= num_steps:
            raise ValueError(
                f"full_at: expected steps below {num_steps}, as this run has them, got "
                f"{list(config.full_at)}"
            )
        table[list(config.full_at)] = True
        table[: config.warmup] = True
        return table
    period, since_full = interval, 0
    for step in range(num_steps):
        index = _index(config, step, num_steps)
        forced = step < config.warmup
        by_counter = config.count_from == "last_full"
        table[step] = forced or (since_full >= period if by_counter else index % period == 0)
        if table[step, 0]:
            period, since_full = _next_period(config, interval, index, num_steps), 0
            if config.decide_per_block:
                table[step, 1:] = forced or index % period == 0
        since_full += 1
    return table


def _next_period(config: ToCaConfig, interval: int, index: int, num_steps: int) -> int:
    """N_t = round(N0 / phi), half to even; the fixed period inside `window`.

    phi is a float32 scalar in the published code, and an integer over such a scalar is evaluated
    as N0 * (1 / phi), each rounded to float32: at halves that differs from the division.
    """
    if config.window is not None:
        start, stop, period = config.window
        if int(num_steps * start) <= index < int(num_steps * stop):
            return period
    phi = np.float32(_along(config, config.refresh_slope, float(index), num_steps))
    return max(1, int(np.round(np.float32(1) / phi * np.float32(interval))))


def _token_table(
    config: ToCaConfig, module: str, num_steps: int, num_layers: int, num_tokens: int
) -> IntTable:
    """k = int(clamp(r, 0, 1) * N) of a cached step, r = R0 * layer * step * module factor.

    The factors are multiplied in this order in float64; the clamp and the product with N are
    float32, then truncated: exact to the token.
    """
    per_layer = config.fresh_ratio * _layer_factors(config, module, num_layers)
    per_step = _step_factors(config, num_steps)
    factor = module_setting(config.module_ratio, module) or 0.0
    ratio = (per_layer[None, :] * per_step[:, None] * factor).astype(np.float32)
    product = np.clip(ratio, np.float32(0), np.float32(1)) * np.float32(num_tokens)
    k: IntTable = product.astype(np.int64)
    k = -(-k // config.round_k_to) * config.round_k_to
    return k.clip(0, num_tokens)


def _layer_factors(config: ToCaConfig, module: str, num_layers: int) -> NDArray[np.float64]:
    given = module_setting(config.layer_ratio, module)
    if given is None:
        layer = np.arange(num_layers, dtype=np.float64)
        span = config.layer_span or max(num_layers - 1, 1)
        slope = config.layer_slope
        return 1 - slope + 2 * slope * layer / span
    if len(given) != num_layers:
        raise ValueError(
            f"layer_ratio[{module!r}]: expected {num_layers} factors, one for each layer, got "
            f"{len(given)}"
        )
    return np.array(given)


def _step_factors(config: ToCaConfig, num_steps: int) -> NDArray[np.float64]:
    if config.step_ratio is None:
        steps = [_index(config, step, num_steps) for step in range(num_steps)]
        return _along(config, config.step_slope, np.array(steps, np.float64), num_steps)
    if len(config.step_ratio) != num_steps:
        raise ValueError(
            f"step_ratio: expected {num_steps} factors, one for each step of this run, got "
            f"{len(config.step_ratio)}"
        )
    return np.array(config.step_ratio)


def _recomputes(full: BoolTable, every: int) -> BoolTable:
    """Where tokens may be recomputed: in every `every`-th step after a full one."""
    since = np.zeros(full.shape, dtype=np.int64)
    for step in range(1, len(full)):
        since[step] = np.where(full[step], 0, since[step - 1] + 1)
    return since % every == 0


def _index(config: ToCaConfig, step: int, num_steps: int) -> int:
    """The published step index: it counts down in DiT, up everywhere else."""
    return num_steps - 1 - step if config.count_from == "end" else step


def _along(config: ToCaConfig, slope: float, index: Index, num_steps: int) -> Index:
    """A factor that runs linearly over the run: about 1 - slope at first, 1 + slope at last.

    Both published forms run from 1 - slope to 1 + slope in sampling order; the index divides by n,
    not by n - 1, so the end where the index is n - 1 misses its value by 2 * slope / n.
    """
    if config.count_from == "end":
        return 1 + slope - 2 * slope * index / num_steps
    return 1 - slope + 2 * slope * index / num_steps


def module_kind(name: str) -> str:
    """What a module is, whatever stream it belongs to: "img_mlp" -> "mlp"."""
    for kind in sorted(MODULES, key=len, reverse=True):
        if isinstance(name, str) and (name == kind or name.endswith(f"_{kind}")):
            return kind
    raise ValueError(
        f"module: expected one of {list(MODULES)}, alone or behind a stream's prefix such as "
        f"'img_' or 'single_', got {name!r}"
    )


def is_module(name: str) -> bool:
    """Whether a name is one that a plan can have."""
    try:
        module_kind(name)
    except ValueError:
        return False
    return True


def module_setting(settings: Mapping[str, T], module: str) -> T | None:
    """The setting of a module: by its full name, else by its kind, else None."""
    return settings.get(module, settings.get(module_kind(module)))


def check_integer(name: str, value: object, *, low: int) -> int:
    """`value` as an int >= low; a bool or a float is refused, a NumPy integer taken."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = low - 1
    if isinstance(value, (bool, np.bool_)) or number < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")
    return number


def _module_names(
    modules: Sequence[str] | None,
    num_layers: int | Mapping[str, int],
    num_tokens: int | Mapping[str, int],
) -> tuple[str, ...]:
    if modules is None:
        named = next((v for v in (num_layers, num_tokens) if isinstance(v, Mapping)), MODULES)
        names = tuple(named)
    elif isinstance(modules, str):
        raise ValueError(f"modules: expected a sequence of names, got the string {modules!r}")
    else:
        names = tuple(modules)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"modules: expected one or more different names, got {list(names)}")
    for name in names:
        module_kind(name)
    return names


def _per_module(
    setting: str, value: int | Mapping[str, int], names: tuple[str, ...]
) -> dict[str, int]:
    """{module: value} of an argument that is one number for all modules or one for each."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, check_integer(setting, value, low=1))
    if set(value) != set(names):
        raise ValueError(
            f"{setting}: expected a number for each of the modules {list(names)}, "
            f"got one for {list(value)}"
        )
    return {name: check_integer(f"{setting}[{name!r}]", value[name], low=1) for name in names}


def _shorten(steps: NDArray[np.int64], limit: int = 12) -> str:
    """Step numbers in one short line, the middle ones left out."""
    numbers = [str(step) for step in steps]
    if len(numbers) > limit:
        numbers = [*numbers[: limit - 2], "...", numbers[-1]]
    return " ".join(numbers)
