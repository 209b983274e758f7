"""Trace: what a run did, step by step, in arrays: to look at, to save, to draw (`toca report`).

`Session.trace` records one; `recorder.py` says how.  A saved one needs no torch.
"""

from __future__ import annotations

import json
import os
import secrets
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import ToCaConfig
from .plan import BoolTable, IntTable, Plan

Floats = NDArray[np.float64]
_FORMAT = 1  # of the file
# What a file that is no trace makes of its reading; zipfile raises the last two for damaged flags.
_BROKEN = (
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
)


@dataclass(frozen=True, eq=False)
class Part:
    """The calls of one model in one guidance branch; most runs have one part.

    Attributes:
        model: the attribute of the pipeline that it is, "transformer" or "transformer_2".
        branch: number of the guidance branch, in the order in which they were first called.
        first: the step of the run that was its first.
        plan: its tables: full or cached, and k, as it was done.
        batch: B of each module.
        grids: (rows, columns) or (frames, rows, columns) of a module's tokens, where the model's
            call tells them; texts have none.
        flops: (steps,), done; `full_flops` is that of a step in full.
        selections: {module: (steps, L, B, N) bool}, of the modules that select among their tokens.
    """

    model: str
    branch: int
    first: int
    plan: Plan
    batch: Mapping[str, int]
    grids: Mapping[str, tuple[int, ...]]
    flops: IntTable
    full_flops: int
    selections: Mapping[str, BoolTable]

    def __post_init__(self) -> None:
        plan = self.plan
        steps = plan.num_steps
        _same_shape("flops", self.flops, (steps,))
        for name in plan.modules:
            L, N = plan.num_layers[name], plan.num_tokens[name]
            _same_shape(f"full of {name}", plan.full[name], (steps, L))
            _same_shape(f"k of {name}", plan.k[name], (steps, L))
            if name in self.selections:
                shape = (steps, L, self.batch[name], N)
                _same_shape(f"selections of {name}", self.selections[name], shape)

    def fresh(self, module: str) -> BoolTable:
        """(steps, L, B, N): whether a step computed the token; all of a full step, none where k
        is 0.

        Raises:
            ValueError: there is no such module.
        """
        if module not in self.plan.k:
            raise ValueError(f"module: expected one of {self.plan.modules}, got {module!r}")
        if module in self.selections:
            return self.selections[module]
        shape = (*self.plan.full[module].shape, self.batch[module], self.plan.num_tokens[module])
        return np.broadcast_to(self.plan.full[module][:, :, None, None], shape)

    def ages(self, module: str) -> NDArray[np.int32]:
        """(steps, L, B, N): steps since the token was computed; 0 in the step that computes it."""
        return np.stack(list(self._ages(module)))

    def age_histogram(self, module: str) -> IntTable:
        """(steps, ages): tokens of that age after the step, summed over layers and samples."""
        counts = [np.bincount(age.ravel()) for age in self._ages(module)]
        table = np.zeros((len(counts), max(map(len, counts))), dtype=np.int64)
        for row, count in zip(table, counts, strict=True):
            row[: len(count)] = count
        return table

    def _ages(self, module: str) -> Iterator[NDArray[np.int32]]:
        """Step by step: all steps of a video would not fit in memory."""
        fresh = self.fresh(module)
        age = np.zeros(fresh.shape[1:], dtype=np.int32)
        for now in fresh:
            age = np.where(now, np.int32(0), age + 1)
            yield age


@dataclass(frozen=True, eq=False)
class Trace:
    """What a run did.

    Attributes:
        model: class of the model.
        config: the settings.
        parts: what each model did in each guidance branch; their steps overlap.
        seconds: (steps,), in the models' forwards.  On a GPU that is the time of launching, unless
            whoever measured put in other numbers (`dataclasses.replace`), as `toca report` does.
        memory: bytes, by the names that `Summary` has for them.
        untouched_seconds: (steps,), of the same run without ToCa, if it was measured.
        captions: what each sample is of.
        result, untouched: the samples with and without ToCa, float32 in [0, 1], (B, C, H, W) or
            (B, F, C, H, W), if they were given.
        samples: {step: uint8 array of the same form} what the sampler held after that step, where
            it was kept.
        versions: of what ran it.
    """

    model: str
    config: ToCaConfig
    parts: tuple[Part, ...]
    seconds: Floats
    memory: Mapping[str, int]
    untouched_seconds: Floats | None = None
    captions: tuple[str, ...] = ()
    result: NDArray[np.float32] | None = None
    untouched: NDArray[np.float32] | None = None
    samples: Mapping[int, NDArray[np.uint8]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts: expected at least one, got none")
        _same_shape("seconds", self.seconds, (self.num_steps,))
        if self.untouched_seconds is not None:
            _same_shape("untouched_seconds", self.untouched_seconds, (self.num_steps,))

    @property
    def num_steps(self) -> int:
        return max(part.first + part.plan.num_steps for part in self.parts)

    @property
    def flops(self) -> IntTable:
        """(steps,), done."""
        return self._sum([part.flops for part in self.parts])

    @property
    def full_flops(self) -> IntTable:
        """(steps,), of the same steps in full."""
        return self._sum([np.full_like(part.flops, part.full_flops) for part in self.parts])

    @property
    def full_steps(self) -> BoolTable:
        """(steps,): whether every layer of every module ran in full."""
        cached = [
            ~np.all([full.all(axis=1) for full in part.plan.full.values()], axis=0)
            for part in self.parts
        ]
        return self._sum([one.astype(np.int64) for one in cached]) == 0

    def _sum(self, tables: Sequence[IntTable]) -> IntTable:
        total = np.zeros(self.num_steps, dtype=np.int64)
        for part, table in zip(self.parts, tables, strict=True):
            total[part.first : part.first + len(table)] += table
        return total

    @property
    def full_step_seconds(self) -> float | None:
        """Seconds of a step in full: median of the untouched model, or of this run's own full steps
        where that was not measured.

        Of several untouched steps the first is left out: it carries what is done once.
        """
        if self.untouched_seconds is not None:
            return float(np.median(self.untouched_seconds[len(self.untouched_seconds) > 1 :]))
        own = self.seconds[self.full_steps]
        return float(np.median(own)) if own.size else None

    @property
    def speedup(self) -> float | None:
        """Of the whole run: seconds without over seconds with ToCa."""
        if self.untouched_seconds is not None:
            return float(self.untouched_seconds.sum() / self.seconds.sum())
        full = self.full_step_seconds
        return None if full is None else full * self.num_steps / float(self.seconds.sum())

    @property
    def flops_ratio(self) -> float:
        """The ideal speed-up: FLOPs without over FLOPs with ToCa."""
        return float(self.full_flops.sum() / self.flops.sum())

    @property
    def step_speedups(self) -> Floats | None:
        """(steps,): seconds of a step in full over seconds of each step."""
        full = self.full_step_seconds
        return None if full is None else full / self.seconds

    @property
    def ideal_step_speedups(self) -> Floats:
        """(steps,): FLOPs of a step in full over FLOPs done."""
        return self.full_flops / self.flops

    # --- the file -------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it as one .npz; a reader of `path` sees the old file or the new, whole."""
        path = Path(path)
        arrays: dict[str, NDArray[Any]] = {"seconds": self.seconds}
        for name in ("untouched_seconds", "result", "untouched"):
            if (value := getattr(self, name)) is not None:
                arrays[name] = value
        arrays |= {f"samples/{step}": sample for step, sample in self.samples.items()}
        for at, part in enumerate(self.parts):
            arrays[f"{at}/flops"] = part.flops
            for name in part.plan.modules:
                arrays[f"{at}/full/{name}"] = part.plan.full[name]
                arrays[f"{at}/k/{name}"] = part.plan.k[name]
            for name, chosen in part.selections.items():
                arrays[f"{at}/selections/{name}"] = np.packbits(chosen)
        arrays["header"] = np.frombuffer(json.dumps(self._header()).encode(), dtype=np.uint8)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        try:
            with partial.open("wb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # not its own options
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _header(self) -> dict[str, Any]:
        parts = [
            {
                "model": part.model,
                "branch": part.branch,
                "first": part.first,
                "num_steps": part.plan.num_steps,
                "num_layers": part.plan.num_layers,
                "num_tokens": part.plan.num_tokens,
                "batch": dict(part.batch),
                "grids": {name: list(grid) for name, grid in part.grids.items()},
                "full_flops": part.full_flops,
                "selections": list(part.selections),
            }
            for part in self.parts
        ]
        return {
            "format": _FORMAT,
            "model": self.model,
            "config": self.config.to_dict(),
            "parts": parts,
            "memory": dict(self.memory),
            "captions": list(self.captions),
            "samples": list(self.samples),
            "versions": dict(self.versions),
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is no trace, or not a whole one.
            OSError: it cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return _read(arrays)
        except _BROKEN as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{os.fspath(path)}: expected a trace that Trace.save wrote, got a file that does "
                f"not read as one ({reason})"
            ) from error


def _same_shape(what: str, table: NDArray[Any], shape: tuple[int, ...]) -> None:
    if table.shape != shape:
        raise ValueError(f"{what}: expected the shape {shape}, got {table.shape}")


def _read(arrays: Any) -> Trace:
    header = json.loads(bytes(arrays["header"]))
    if header["format"] != _FORMAT:
        raise ValueError(f"format: expected {_FORMAT}, got {header['format']!r}")
    optional = ("untouched_seconds", "result", "untouched")
    return Trace(
        model=str(header["model"]),
        config=ToCaConfig.from_dict(header["config"]),
        parts=tuple(_read_part(arrays, at, said) for at, said in enumerate(header["parts"])),
        seconds=arrays["seconds"],
        memory=header["memory"],
        captions=tuple(header["captions"]),
        samples={step: arrays[f"samples/{step}"] for step in header["samples"]},
        versions=header["versions"],
        **{name: arrays[name] for name in optional if name in arrays},
    )


def _read_part(arrays: Any, at: int, said: Mapping[str, Any]) -> Part:
    layers, tokens, batch = said["num_layers"], said["num_tokens"], said["batch"]
    plan = Plan(
        num_steps=said["num_steps"],
        num_layers=layers,
        num_tokens=tokens,
        full={name: arrays[f"{at}/full/{name}"] for name in layers},
        k={name: arrays[f"{at}/k/{name}"] for name in layers},
    )
    selections = {}
    for name in said["selections"]:
        shape = (plan.num_steps, layers[name], batch[name], tokens[name])
        held, count = arrays[f"{at}/selections/{name}"], int(np.prod(shape))
        _same_shape(f"bytes of selections of {name}", held, (-(-count // 8),))
        selections[name] = np.unpackbits(held, count=count).astype(np.bool_).reshape(shape)
    return Part(
        model=said["model"],
        branch=said["branch"],
        first=said["first"],
        plan=plan,
        batch=batch,
        grids={name: tuple(grid) for name, grid in said["grids"].items()},
        flops=arrays[f"{at}/flops"],
        full_flops=said["full_flops"],
        selections=selections,
    )
