"""What was measured, in a folder: a run that was broken off or is repeated reads it there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..evaluation.settings import fingerprint
from ..storing import arrays, whole
from .cost import CostTable
from .probe import Probe, Shapes

_ABOUT, _PROBE, _TRIALS, _COSTS = "about.json", "probe.npz", "trials.json", "costs.json"


class State:
    """The folder; every file in it is there whole or not at all.

    Args:
        folder: made if there is none.
        about: all that the measurements depend on, as JSON values.

    Raises:
        ValueError: the folder holds measurements of something else.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder = folder
        self.mark = fingerprint(**about)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"state: expected a folder, got the file {folder}")
        held = _json(folder / _ABOUT)
        if held is None:
            if folder.is_dir() and any(folder.iterdir()):
                raise ValueError(f"state: expected a folder of toca tune or an empty one: {folder}")
            whole.save_json(folder / _ABOUT, dict(about))
        elif held != json.loads(json.dumps(dict(about))):
            other = [name for name in {**held, **about} if _differs(held, about, name)]
            raise ValueError(
                f"state: expected measurements of this run, {folder} holds those of another "
                f"({', '.join(f'{n}: {held.get(n)!r}, not {about.get(n)!r}' for n in other)}); "
                "name another folder with --state"
            )
        self.trials: dict[str, Any] = _json(folder / _TRIALS) or {}

    # --- trials ---

    def keep(self, key: str, found: Mapping[str, Any]) -> None:
        """Store a trial."""
        self.trials[key] = dict(found)
        whole.save_json(self.folder / _TRIALS, self.trials)

    # --- probe and costs ---

    def probe(self) -> Probe | None:
        """The stored one."""
        held = arrays.read(self.folder / _PROBE, self.mark)
        if held is None:
            return None
        known = json.loads(str(held["known"]))
        grams = {name: held[f"gram {name}"] for name in known["shapes"]["layers"]}
        return Probe(Shapes(**known["shapes"]), CostTable.from_dict(known["flops"]), grams)

    def keep_probe(self, probe: Probe) -> None:
        """Store it."""
        known = {"shapes": asdict(probe.shapes), "flops": probe.flops.to_dict()}
        grams = {f"gram {name}": gram for name, gram in probe.grams.items()}
        arrays.save(self.folder / _PROBE, self.mark, {"known": json.dumps(known), **grams})

    def costs(self) -> CostTable | None:
        """The stored table of seconds."""
        held = _json(self.folder / _COSTS)
        return None if held is None else CostTable.from_dict(held)

    def keep_costs(self, table: CostTable) -> None:
        """Store it."""
        whole.save_json(self.folder / _COSTS, table.to_dict())

    @property
    def times(self) -> Path:
        """The file of the rounds in which the result is timed."""
        return self.folder / "times.json"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: expected what toca tune has stored: {error}") from None


def _differs(held: Mapping[str, Any], about: Mapping[str, Any], name: str) -> bool:
    plain = json.loads(json.dumps(about.get(name)))
    return bool(held.get(name) != plain)
