"""ToCaConfig: what a run skips.

A config is plain numbers. `ToCaConfig.plan` turns it into tables for one run (`plan.py`); the ops
and blocks read the rest.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

from .plan import Plan, build_plan, check_integer, module_kind
from .presets import PRESETS, WITHOUT_FRESH_TOKENS

if TYPE_CHECKING:
    import torch

    from .memory import Memory

Selector = Literal["attention", "entropy", "norm", "similarity", "random", "mask"]
CountFrom = Literal["start", "end", "last_full"]
FullSteps = Literal["exact", "fused"]
CacheDtype = Literal["int8", "fp8"]
CacheDevice = Literal["cpu"]
SelfAttention = Literal["reuse", "partial"]
Quota = Literal["local", "global"]

# A factor of 1 - slope to 1 + slope is clamped to [0, 1] in the end; larger slopes only overflow.
_MAX_FACTOR = 100.0


@dataclass(frozen=True, kw_only=True)
class ToCaConfig:
    """Settings of token-wise caching; immutable, comparable, hashable, picklable.

    Two numbers decide: every `interval`-th step runs in full, and in the cached steps between, each
    layer recomputes the `fresh_ratio` of its MLP tokens that matter most. With nothing else given,
    the first step is full and the ratio is the same in all layers and steps. "Published" means the
    code of the ToCa paper (ICLR 2025), whose four models are the presets.

    Which steps are full
        interval: N0, steps between two full steps (N in the paper). 1 = always full.
        warmup: first steps that are always full, >= 1.
        count_from: where steps are counted from. "start": step i is full when N_t divides i,
            i = 0 at the first step (PixArt, Open-Sora). "end": the same with i counting down to 0,
            so the last step is full (DiT). "last_full": N_t steps after the latest full one (FLUX).
        refresh_slope: w in N_t = round(N0 / phi), rewritten by each full step: phi runs linearly
            from 1 - w at the first step to 1 + w at the last, so w > 0 makes full steps denser
            towards the end (w_t in the paper). In (-1, 1).
        window: (start, stop, period): while int(start * n) <= i < int(stop * n), with i counted by
            `count_from` and n steps in all, a full step sets N_t = period (DiT).
        decide_per_block: True repeats what the published DiT and PixArt code does: every block
            decides for itself, after layer 0 of a full step has rewritten N_t. Where the new N_t
            does not divide the step, layer 0 runs in full and the other layers run cached.
        full_at: the full steps themselves, (0, 4, 9): in place of all of the above but `warmup`.
        residual_threshold: None, or the drift above which a step that the plan caches runs in full
            all the same: |r - r0| / |r0| (means of magnitudes) of what the first block adds to its
            input, r, against the last full step's, r0 (the first-block cache of ParaAttention).
            The first block then runs in full in every step.
        module_interval: {module: N0} for modules with an own interval (Open-Sora).

    How many tokens a cached step recomputes:  k = int(clamp(r, 0, 1) * N),
    r = fresh_ratio * layer factor * step factor * module factor
        fresh_ratio: R0 in [0, 1]. 0 reuses every output whole. (The paper's R is 1 - R0.)
        step_slope: w of the step factor, from 1 - w at the first step to 1 + w at the last.
        layer_slope: w of the layer factor 1 - w + 2 w l / layer_span in layer l.
        layer_span: the layer where that factor reaches 1 + w. None = the last one. Published: 27
            for every model, also for the 38 layers of FLUX.
        step_ratio: the step factor of every step of a run, in place of `step_slope`.
        layer_ratio: {module: the layer factor of each of its layers}, in place of `layer_slope`.
        fresh_every: after a full step, tokens are recomputed in every fresh_every-th cached step
            and all outputs reused whole in the others. 1 = ToCa. 2 = the alternation of DuCa
            (arXiv 2412.18911): reuse, then recompute. Full steps are the plan's here, not those
            that `residual_threshold` adds.
        module_ratio: {module: factor}, keyed by "attn", "cross_attn", "mlp" or by a module of one
            stream ("img_mlp"), which goes before its kind. Modules not named are reused whole.
        round_k_to: k > 0 is rounded up to a multiple of this (at most N), so that k takes few
            values and matches a GEMM tile. 1 = off, as published.

    Which tokens (the score S = s + age_weight * age / interval, paper section 3)
        selector: s. "attention": attention the token received in the last full step, s1.
            "entropy": entropy of its cross-attention, s2. "norm": values that are small rank high
            (DuCa). "similarity": 1 - cosine of what its module returned in the last full step
            and what was cached until then, so where the cache was worst ranks high. "random"
            (DuCa's second version). "mask": the weights that `enable(..., mask=)` gives.
        age_weight: w3, weight of the steps since the token was last computed, s3. `interval` is
            N0 here, also where the period varies.
        grid: side of the square cells in which the best token gets the bonus, s4. 1 = off.
        bonus: b of s4: the best token of a cell counts S * (1 + b).
        quota: where processes share the tokens (sequence parallelism). "local": each selects k of
            its own, k from their number, and asks nobody. "global": all select together what one
            device would, by histograms that they add up in every step that selects.

    What is cached at all (the rest is computed in full in every step and takes no memory)
        modules: names or kinds, as `module_ratio` takes them: ("attn",) leaves every MLP as it is.
            None = all.
        layers: their numbers, counted by each module from its own first, from -1 down from its
            last: range(20), (0, 1, -1); {module: numbers} where they differ, all for modules that
            are not named. None = all.

    What stands for the others
        forecast: order of the Taylor expansion of what is reused, in the steps since each token was
            computed, by finite differences between the steps in which it was (TaylorSeer, arXiv
            2503.06923). 0 reuses it as it is, as published for ToCa; 1 and 2 keep one and two more
            tensors for each that is cached.

    How it runs (no effect on the plan)
        full_steps: "exact" calls the model's own forward on full steps, bit for bit; "fused" runs
            them through this package's ops, faster, equal within rounding.
        share_cfg_selection: the two guidance halves of a batch select the same tokens.
        tabulate_modulation: gates, shifts and scales of all steps are computed once, before the
            run, in one GEMM per layer; False computes them in each step.
        self_attention: "reuse" returns the attention of the last full step whole, as published.
            "partial" recomputes it for the tokens that `module_ratio` grants to "attn", over the
            kept keys and values of all tokens; for models without rotary embeddings.
        cache_dtype: "int8" or "fp8" (e4m3) keep cached outputs in 8 bits with one scale for each
            token, half the memory of bfloat16; None keeps the model's dtype.
        cache_device: "cpu" keeps cached outputs in pinned host memory; while a block computes, what
            the next one will read is copied to the GPU, which has room for those of two blocks.
            The results are the same. None keeps them where the model computes; for a model on a
            CPU that is all the same. Not with `cuda_graph=True`.
        prepack: weights are laid out once for the backend that reads them; False reads them as
            they are, which saves the copy.
        seed: of the "random" selector.
    """

    interval: int = 3
    fresh_ratio: float = 0.1
    age_weight: float = 0.25
    grid: int = 1
    bonus: float = 0.0
    selector: Selector = "attention"
    quota: Quota = "local"

    warmup: int = 1
    count_from: CountFrom = "start"
    refresh_slope: float = 0.0
    window: tuple[float, float, int] | None = None
    decide_per_block: bool = False
    module_interval: Mapping[str, int] = field(default_factory=dict, hash=False)
    full_at: tuple[int, ...] | None = None
    residual_threshold: float | None = None

    step_slope: float = 0.0
    layer_slope: float = 0.0
    layer_span: int | None = None
    module_ratio: Mapping[str, float] = field(default_factory=lambda: {"mlp": 1.0}, hash=False)
    step_ratio: tuple[float, ...] | None = None
    layer_ratio: Mapping[str, tuple[float, ...]] = field(default_factory=dict, hash=False)
    fresh_every: int = 1
    round_k_to: int = 1

    modules: tuple[str, ...] | None = None
    layers: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = field(default=None, hash=False)

    forecast: int = 0
    full_steps: FullSteps = "exact"
    share_cfg_selection: bool = False
    tabulate_modulation: bool = True
    self_attention: SelfAttention = "reuse"
    cache_dtype: CacheDtype | None = None
    cache_device: CacheDevice | None = None
    prepack: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("interval", "grid", "warmup", "fresh_every", "round_k_to"):
            self._set(name, check_integer(name, getattr(self, name), low=1))
        self._set("seed", check_integer("seed", self.seed, low=0))
        if self.layer_span is not None:
            self._set("layer_span", check_integer("layer_span", self.layer_span, low=1))
        self._set("fresh_ratio", _number("fresh_ratio", self.fresh_ratio, 0.0, 1.0))
        self._set("age_weight", _number("age_weight", self.age_weight, 0.0, math.inf))
        self._set("bonus", _number("bonus", self.bonus, 0.0, math.inf))
        for name in ("step_slope", "layer_slope"):
            self._set(name, _number(name, getattr(self, name), -_MAX_FACTOR, _MAX_FACTOR))
        self._set("refresh_slope", _number("refresh_slope", self.refresh_slope, -1.0, 1.0))
        if abs(self.refresh_slope) == 1.0:
            raise ValueError(
                f"refresh_slope: expected a number between -1 and 1, both excluded "
                f"(at 1 the period is infinite), got {self.refresh_slope!r}"
            )
        _choice("selector", self.selector, get_args(Selector))
        _choice("count_from", self.count_from, get_args(CountFrom))
        _choice("full_steps", self.full_steps, get_args(FullSteps))
        _choice("quota", self.quota, get_args(Quota))
        _choice("self_attention", self.self_attention, get_args(SelfAttention))
        if self.cache_dtype is not None:
            _choice("cache_dtype", self.cache_dtype, get_args(CacheDtype))
        if self.cache_device is not None:
            _choice("cache_device", self.cache_device, get_args(CacheDevice))
        for name in ("decide_per_block", "share_cfg_selection", "tabulate_modulation", "prepack"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.decide_per_block and self.count_from == "last_full":
            raise ValueError(
                "decide_per_block: expected False with count_from='last_full', where one counter "
                "decides for all blocks of a step, got True"
            )
        self._set("window", _window(self.window))
        self._set("forecast", check_integer("forecast", self.forecast, low=0))
        if self.forecast > 2:
            raise ValueError(f"forecast: expected an order of 0, 1 or 2, got {self.forecast}")
        if self.forecast and self.cache_dtype is not None:
            raise ValueError(
                "cache_dtype: expected None with a forecast, whose differences 8 bits would drown, "
                f"got {self.cache_dtype!r}"
            )
        if self.residual_threshold is not None:
            threshold = _number("residual_threshold", self.residual_threshold, 0.0, math.inf)
            self._set("residual_threshold", threshold)
        self._set("full_at", _steps(self.full_at))
        if self.full_at is not None:
            self._check_full_at()
        if self.step_ratio is not None:
            self._set("step_ratio", _factors("step_ratio", self.step_ratio))
        self._set("layer_ratio", _settings("layer_ratio", self.layer_ratio, _factors))
        self._set("module_interval", _settings("module_interval", self.module_interval, _interval))
        self._set("module_ratio", _settings("module_ratio", self.module_ratio, _factor))
        self._set("modules", _modules(self.modules))
        if isinstance(self.layers, Mapping):
            self._set("layers", _settings("layers", self.layers, _layers))
        elif self.layers is not None:
            self._set("layers", _layers("layers", self.layers))

    def _check_full_at(self) -> None:
        """Refuse settings whose place `full_at` takes."""
        for name in ("module_interval", "window", "refresh_slope", "decide_per_block"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}: expected none beside full_at, which says what is full, got "
                    f"{getattr(self, name)!r}"
                )

    def _set(self, name: str, value: object) -> None:
        """Store the checked value in its plain Python type (the dataclass is frozen)."""
        object.__setattr__(self, name, value)

    @property
    def age_step(self) -> float:
        """What one step of age adds to a token's score: age_weight / interval."""
        return self.age_weight / self.interval

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ToCaConfig:
        """Settings that are known by a name, with some of them replaced.

            dit-ddim50        DiT-XL/2 256, DDIM 50 steps, N = 3
            dit-ddpm250       DiT-XL/2 256, DDPM 250 steps, N = 4
            pixart-dpm20      PixArt-alpha 256, DPM-Solver++ 20 steps, N = 3
            opensora-rflow30  Open-Sora 1.2, rectified flow 30 steps
            flux-50           FLUX.1-dev 1024, 50 steps, N = 4
            forecast          not published: any model; all outputs extrapolated, N = 3

        At the model's own depth the published ones are exact to the step and to the token, for any
        number of steps and tokens and any interval and ratio. With `fresh_ratio=0` the published
        code turns into FORA (everything reused), with a fixed period and only the first step of
        FLUX full; so does the preset, unless an override says otherwise.
        """
        if name not in cls.presets():
            raise ValueError(f"preset: expected one of {cls.presets()}, got {name!r}")
        _known("override", overrides)
        settings = dict(PRESETS[name])
        if overrides.get("fresh_ratio") == 0:
            settings |= WITHOUT_FRESH_TOKENS[name]
        return cls(**(settings | overrides))

    @classmethod
    def presets(cls) -> list[str]:
        """Names of the presets."""
        return list(PRESETS)

    def replace(self, **changes: Any) -> ToCaConfig:
        """A copy with some settings replaced."""
        _known("setting", changes)
        return dataclasses.replace(self, **changes)

    def plan(
        self,
        *,
        num_steps: int,
        num_layers: int | Mapping[str, int],
        num_tokens: int | Mapping[str, int],
        modules: Sequence[str] | None = None,
    ) -> Plan:
        """The tables of one run: which steps are full, and k.

        A module is named by its kind, "attn", "cross_attn" or "mlp", behind a prefix where a model
        has several: "img_mlp" and "txt_mlp" for the streams of a double stream block, "single_attn"
        and "single_mlp" for single stream blocks, "spatial_mlp" and "temporal_mlp" for lists of
        blocks that alternate. Each has its own number of layers and tokens:

            config.plan(num_steps=50, num_layers=28, num_tokens=256)                # DiT
            layers = {"attn": 19, "img_mlp": 19, "txt_mlp": 19,
                      "single_attn": 38, "single_mlp": 38}
            tokens = {"attn": 4608, "img_mlp": 4096, "txt_mlp": 512,
                      "single_attn": 4608, "single_mlp": 4608}
            config.plan(num_steps=50, num_layers=layers, num_tokens=tokens)         # FLUX

        Args:
            num_steps: steps of the run, one model evaluation each.
            num_layers: layers of every module, or {module: layers}.
            num_tokens: N of every module, or {module: N}.
            modules: names of the modules. None takes the names of a mapping given above, else
                "attn", "cross_attn" and "mlp"; a module the model lacks may simply go unread.

        Returns:
            A `Plan`; row 0 of its tables is the first step of sampling.

        Raises:
            ValueError: a number below 1, an unknown module, mappings that name other modules,
                `modules` or `layers` that there are none of, or a
                fresh_ratio above 0 of which `module_ratio` gives none to any of the modules.
        """
        return build_plan(
            self,
            num_steps=num_steps,
            num_layers=num_layers,
            num_tokens=num_tokens,
            modules=modules,
        )

    def memory(
        self,
        model: torch.nn.Module,
        *,
        batch: int,
        tokens: int | Sequence[int],
        text_tokens: float = 0,
        num_steps: int | None = None,
        dtype: torch.dtype | None = None,
        branches: int = 1,
        device: torch.device | str | None = None,
    ) -> Memory:
        """The bytes that enabling a model will take, without running it.

        The model may be on the meta device, so that no weight is needed. Print what is returned.

        Args:
            model: a transformer of a supported family.
            batch: samples of one call of the model; both guidance halves, where one call has them.
            tokens: of the image: their number, (rows, columns) or (frames, rows, columns). The
                last is needed by models that attend in space and in time by turns.
            text_tokens: of one prompt, padding included, as the blocks see them; their mean where
                the prompts of a batch are packed one behind the other.
            num_steps: of a run; it decides about the sizes of tables and selections alone. None
                takes what `step_ratio` or `full_at` say, else some fifty.
            dtype: of the hidden states; None takes that of the blocks' weights.
            branches: guidance branches in calls of their own, each with a cache.
            device: what the model will run on; None takes where it is. Weights are packed on a
                CPU alone, so a model on the meta device has none unless this says "cpu"; nor does
                `cache_device` change anything there.

        Returns:
            A `Memory`: its `cache_bytes` are exact, the others to a few percent. The layers'
            temporary results are the model's own and not counted.

        Raises:
            ValueError: the model is of no supported family, the settings do not fit it, or a
                number is below 1.
        """
        from .memory import estimate  # memory.py is built on this file, and on torch

        return estimate(
            self,
            model,
            batch=batch,
            tokens=tokens,
            text_tokens=text_tokens,
            num_steps=num_steps,
            dtype=dtype,
            branches=branches,
            device=device,
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: _plain(value) for name, value in values.items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> ToCaConfig:
        """The config with these settings and the defaults for the rest."""
        if not isinstance(settings, Mapping):
            raise ValueError(f"settings: expected a mapping, got {settings!r}")
        _known("setting", settings)
        return cls(**settings)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all settings as JSON; a reader of `path` sees the old file or the new, whole."""
        path = Path(path)
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ToCaConfig:
        """Read what `save` wrote; `load(save(c)) == c`. Settings left out take their defaults."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        # Read-only mappings cannot be pickled or deep-copied, the plain settings can.
        return ToCaConfig.from_dict, (self.to_dict(),)


def _plain(value: Any) -> Any:
    """Mappings and tuples as JSON has them."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _known(what: str, names: Mapping[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(ToCaConfig)]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown {what} {unknown}: expected some of {known}")


def _number(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a finite float in [low, high]; a bool is refused, a NumPy number taken."""
    usable = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not usable or not math.isfinite(value) or not low <= value <= high:
        bounds = f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name}: expected a finite number {bounds}, got {value!r}")
    return float(value)


def _choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {list(known)}, got {value!r}")


def _window(value: Any) -> tuple[float, float, int] | None:
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 3:
        raise ValueError(f"window: expected None or (start, stop, period), got {value!r}")
    start = _number("window start", value[0], 0.0, 1.0)
    stop = _number("window stop", value[1], 0.0, 1.0)
    if not start < stop:
        raise ValueError(f"window: expected start < stop, got {value!r}")
    return start, stop, check_integer("window period", value[2], low=1)


def _steps(value: Any) -> tuple[int, ...] | None:
    """Step numbers, ascending."""
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"full_at: expected None or numbers of steps, got {value!r}")
    return tuple(sorted({check_integer("full_at", step, low=0) for step in value}))


def _factors(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"{name}: expected one or more factors, got {value!r}")
    return tuple(_factor(name, one) for one in value)


def _modules(value: Any) -> tuple[str, ...] | None:
    """Names or kinds of modules, in one order so that equal configs save alike."""
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"modules: expected None or one or more names, got {value!r}")
    for one in value:
        try:
            module_kind(one)
        except ValueError as error:
            raise ValueError(f"modules: {error}") from None
    return tuple(sorted(set(value)))


def _layers(name: str, value: Any) -> tuple[int, ...]:
    """Numbers of layers, ascending, those from the end first."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"{name}: expected one or more numbers of layers, got {value!r}")
    for one in value:
        if isinstance(one, bool) or not isinstance(one, numbers.Integral):
            raise ValueError(f"{name}: expected numbers of layers, got {one!r} among them")
    return tuple(sorted({int(one) for one in value}))


def _interval(name: str, value: Any) -> int:
    return check_integer(name, value, low=1)


def _factor(name: str, value: Any) -> float:
    return _number(name, value, 0.0, _MAX_FACTOR)


def _settings(
    name: str, value: Any, check: Callable[[str, Any], Any]
) -> MappingProxyType[str, Any]:
    """A read-only copy of {module: setting}, in one order so that equal configs save alike."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: expected a mapping of modules, got {value!r}")
    for module in value:
        try:
            module_kind(module)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    checked = {module: check(f"{name}[{module!r}]", value[module]) for module in sorted(value)}
    return MappingProxyType(checked)
