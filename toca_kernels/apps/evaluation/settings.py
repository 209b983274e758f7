"""The settings that `toca eval` compares, read from a file.

    [
        {"name": "25 steps", "policy": "fewer steps", "config": null, "steps": 25},
        {"name": "N=3", "policy": "ToCa", "config": "dit-ddim50"},
        {"name": "N=4", "policy": "ToCa", "config": {"preset": "dit-ddim50", "interval": 4}},
        {"name": "N=5", "policy": "reuse", "config": {"interval": 5, "fresh_ratio": 0.0}}
    ]

`config` is null for the untouched model, the name of a preset, or settings of a ToCaConfig, which
may start from a preset.  `policy` names the line of a plot that a setting belongs to, by default
its name.  `steps` is the sampler's own number where it is left out.  The untouched model at that
number is what all are compared with; it is added in front if the file lacks it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import __version__
from ...config import ToCaConfig
from ...plan import check_integer

UNTOUCHED = "untouched"


@dataclass(frozen=True)
class Setting:
    """One way to sample.

    Attributes:
        name: in tables and pictures.
        policy: settings of the same policy are points of one line.
        config: None leaves the model untouched.
        steps: of a run.
    """

    name: str
    policy: str
    config: ToCaConfig | None
    steps: int

    @property
    def slug(self) -> str:
        """The name as part of a file name; other names may have the same."""
        return re.sub(r"[^A-Za-z0-9.=]+", "-", self.name).strip("-.") or "setting"

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.name,
            "policy": self.policy,
            "config": None if self.config is None else self.config.to_dict(),
            "steps": self.steps,
        }

    def fingerprint(self, **about: Any) -> str:
        """Of all that the samples depend on: config, steps, and what `about` says of the run."""
        config = None if self.config is None else _changed(self.config)
        return fingerprint(config=config, steps=self.steps, version=__version__, **about)


def fingerprint(**values: Any) -> str:
    """A short hash of JSON values."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _changed(config: ToCaConfig) -> dict[str, Any]:
    """Settings that differ from the defaults: one that is new must not undo what is stored."""
    default = ToCaConfig().to_dict()
    return {name: one for name, one in config.to_dict().items() if one != default[name]}


def read_settings(path: str | Path, num_steps: int) -> list[Setting]:
    """The settings of a file, the untouched model first.

    Args:
        path: JSON, a list as above.
        num_steps: steps where a setting does not say.

    Raises:
        ValueError: what is not such a list, or settings that are not valid.
        OSError: the file cannot be read.
    """
    try:
        return parse_settings(json.loads(Path(path).read_text(encoding="utf-8")), num_steps)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_settings(entries: Any, num_steps: int) -> list[Setting]:
    """The settings of a parsed list, the untouched model first.

    Raises:
        ValueError: what is not such a list, or settings that are not valid.
    """
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise ValueError(f"expected a list of settings, got {type(entries).__name__}")
    found = [_setting(entry, num_steps) for entry in entries]
    base = [one for one in found if one.config is None and one.steps == num_steps]
    if not base:
        base = [Setting(UNTOUCHED, UNTOUCHED, None, num_steps)]
    settings = base[:1] + [one for one in found if one is not base[0]]
    names = [one.name for one in settings]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"name: expected every setting to have its own, got {twice} again")
    return settings


def _setting(entry: Any, num_steps: int) -> Setting:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise ValueError(f'expected a setting like {{"name": "N=3", ...}}, got {entry!r:.80}')
    name = entry["name"]
    unknown = set(entry) - {"name", "policy", "config", "steps"}
    if unknown:
        raise ValueError(
            f"{name}: expected some of name, policy, config, steps, got {sorted(unknown)}"
        )
    policy = entry.get("policy", name)
    if not isinstance(policy, str):
        raise ValueError(f"{name}: policy: expected a name, got {policy!r}")
    try:
        steps = check_integer("steps", entry.get("steps", num_steps), low=1)
        return Setting(name, policy, _config(entry.get("config")), steps)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _config(given: Any) -> ToCaConfig | None:
    if given is None:
        return None
    if isinstance(given, str):
        return ToCaConfig.preset(given)
    if not isinstance(given, Mapping):
        raise ValueError(f"config: expected null, a preset or settings, got {given!r}")
    rest = {name: value for name, value in given.items() if name != "preset"}
    return (
        ToCaConfig.preset(given["preset"], **rest)
        if "preset" in given
        else ToCaConfig.from_dict(rest)
    )
