"""ToCaConfig: presets, refusals, copies and files."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from toca_kernels.config import ToCaConfig

PRESETS = ["dit-ddim50", "dit-ddpm250", "pixart-dpm20", "opensora-rflow30", "flux-50"]
# Every setting away from its default.
CUSTOM = ToCaConfig(
    interval=5,
    fresh_ratio=0.1 + 0.2,
    age_weight=1 / 3,
    grid=3,
    bonus=0.7,
    selector="norm",
    warmup=2,
    count_from="end",
    refresh_slope=-0.1,
    window=(0.1, 0.3, 4),
    decide_per_block=True,
    module_interval={"temporal_attn": 2, "attn": 4},
    step_slope=1e-3,
    layer_slope=-2.5,
    layer_span=11,
    module_ratio={"txt_mlp": 0.0, "mlp": 2, "attn": 0.25},
    round_k_to=16,
    full_steps="fused",
    share_cfg_selection=True,
    tabulate_modulation=False,
    prepack=False,
    seed=7,
    self_attention="partial",
    quota="global",
    cache_dtype="int8",
    cache_device="cpu",
    residual_threshold=0.1,
    fresh_every=2,
)
# Settings that exclude some of those.
GIVEN = ToCaConfig(
    full_at=(0, 4, 9),
    step_ratio=(0.5, 1.0, 2.0),
    layer_ratio={"img_mlp": (1.0, 0.5), "mlp": (0.25,)},
    modules=("attn", "mlp"),
    layers={"mlp": (-1, 0)},
    forecast=2,
)


def test_preset_names() -> None:
    assert ToCaConfig.presets() == [*PRESETS, "forecast"]


@pytest.mark.parametrize(
    ("name", "interval", "fresh_ratio", "grid", "bonus", "selector", "shared"),
    [
        ("dit-ddim50", 3, 0.07, 2, 0.6, "attention", False),
        ("dit-ddpm250", 4, 0.07, 2, 0.6, "attention", False),
        ("pixart-dpm20", 3, 0.30, 4, 0.4, "entropy", True),
        ("opensora-rflow30", 3, 0.1, 1, 0.0, "entropy", True),
        ("flux-50", 4, 0.1, 1, 0.0, "attention", False),
    ],
)
def test_presets_hold_the_published_settings(
    name: str,
    interval: int,
    fresh_ratio: float,
    grid: int,
    bonus: float,
    selector: str,
    shared: bool,
) -> None:
    config = ToCaConfig.preset(name)
    assert (config.interval, config.fresh_ratio) == (interval, fresh_ratio)
    assert (config.grid, config.bonus, config.age_weight) == (grid, bonus, 0.25)
    assert (config.selector, config.share_cfg_selection) == (selector, shared)
    assert config.full_steps == "exact"
    assert config.round_k_to == 1


def test_age_step_uses_the_nominal_interval() -> None:
    assert ToCaConfig.preset("dit-ddim50").age_step == pytest.approx(0.083333, abs=1e-6)
    assert ToCaConfig.preset("dit-ddpm250").age_step == 0.0625


def test_preset_overrides_replace_single_settings() -> None:
    config = ToCaConfig.preset("dit-ddim50", interval=6, selector="random", seed=3)
    assert (config.interval, config.selector, config.seed) == (6, "random", 3)
    assert config.replace(interval=3, selector="attention", seed=0) == ToCaConfig.preset(
        "dit-ddim50"
    )


def test_preset_without_fresh_tokens_has_a_fixed_period() -> None:
    dit = ToCaConfig.preset("dit-ddim50", fresh_ratio=0)
    assert (dit.refresh_slope, dit.window) == (0.0, None)
    assert ToCaConfig.preset("pixart-dpm20", fresh_ratio=0.0).refresh_slope == 0.0
    assert ToCaConfig.preset("flux-50", fresh_ratio=0.0).warmup == 1
    assert ToCaConfig.preset("flux-50", fresh_ratio=0.0, warmup=2).warmup == 2
    assert ToCaConfig.preset("opensora-rflow30", fresh_ratio=0.0).warmup == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": 0}, "interval: expected an integer >= 1, got 0"),
        ({"interval": 2.0}, "interval: expected an integer >= 1, got 2.0"),
        ({"interval": True}, "interval: expected an integer >= 1, got True"),
        ({"interval": "3"}, "interval: expected an integer >= 1, got '3'"),
        ({"interval": None}, "interval: expected an integer >= 1, got None"),
        ({"fresh_ratio": -0.01}, r"fresh_ratio: expected a finite number in \[0, 1\], got -0.01"),
        ({"fresh_ratio": 1.01}, r"fresh_ratio: expected a finite number in \[0, 1\], got 1.01"),
        ({"fresh_ratio": float("nan")}, "fresh_ratio: .* got nan"),
        ({"fresh_ratio": True}, "fresh_ratio: .* got True"),
        ({"fresh_ratio": "0.1"}, "fresh_ratio: .* got '0.1'"),
        ({"fresh_ratio": 0.1 + 0j}, "fresh_ratio: "),
        ({"age_weight": -1.0}, "age_weight: expected a finite number >= 0, got -1.0"),
        ({"age_weight": float("inf")}, "age_weight: .* got inf"),
        ({"grid": 0}, "grid: expected an integer >= 1, got 0"),
        ({"grid": 2.5}, "grid: expected an integer >= 1, got 2.5"),
        ({"bonus": -0.1}, "bonus: expected a finite number >= 0, got -0.1"),
        ({"bonus": float("nan")}, "bonus: .* got nan"),
        ({"selector": "cosine"}, r"selector: expected one of \['attention', .*\], got 'cosine'"),
        ({"selector": None}, "selector: .* got None"),
        ({"warmup": 0}, "warmup: expected an integer >= 1, got 0"),
        ({"count_from": "middle"}, "count_from: .*'last_full'.* got 'middle'"),
        ({"refresh_slope": 1.0}, "refresh_slope: .* got 1.0"),
        ({"refresh_slope": -1}, "refresh_slope: .* got -1"),
        ({"refresh_slope": 1.5}, "refresh_slope: .* got 1.5"),
        ({"window": (0.2, 0.4)}, r"window: expected None or \(start, stop, period\), got"),
        ({"window": "abc"}, "window: expected None or"),
        ({"window": (0.4, 0.2, 2)}, "window: expected start < stop"),
        ({"window": (0.2, 1.4, 2)}, "window stop: .* got 1.4"),
        ({"window": (0.2, 0.4, 0)}, "window period: expected an integer >= 1, got 0"),
        ({"decide_per_block": 1}, "decide_per_block: expected True or False, got 1"),
        ({"decide_per_block": True, "count_from": "last_full"}, "decide_per_block: .*last_full"),
        ({"module_interval": 3}, "module_interval: expected a mapping of modules, got 3"),
        ({"module_interval": {"mlp": 0}}, r"module_interval\['mlp'\]: expected an integer >= 1"),
        ({"module_interval": {"ffn": 2}}, "module_interval: .*'cross_attn'.* got 'ffn'"),
        ({"module_interval": {3: 2}}, "module_interval: .* got 3"),
        ({"step_slope": float("nan")}, "step_slope: .* got nan"),
        ({"step_slope": 1e300}, "step_slope: .* got 1e.300"),
        ({"layer_slope": None}, "layer_slope: .* got None"),
        ({"layer_span": 0}, "layer_span: expected an integer >= 1, got 0"),
        ({"layer_span": 27.0}, "layer_span: expected an integer >= 1, got 27.0"),
        ({"module_ratio": {"mlp": -0.5}}, r"module_ratio\['mlp'\]: .* got -0.5"),
        ({"module_ratio": {"imgmlp": 1.0}}, "module_ratio: .* got 'imgmlp'"),
        ({"module_ratio": [("mlp", 1.0)]}, "module_ratio: expected a mapping"),
        ({"round_k_to": 0}, "round_k_to: expected an integer >= 1, got 0"),
        ({"full_steps": "fast"}, r"full_steps: expected one of \['exact', 'fused'\], got 'fast'"),
        ({"share_cfg_selection": "no"}, "share_cfg_selection: expected True or False, got 'no'"),
        ({"tabulate_modulation": None}, "tabulate_modulation: expected True or False, got None"),
        ({"prepack": 0}, "prepack: expected True or False, got 0"),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
        ({"seed": False}, "seed: expected an integer >= 0, got False"),
        ({"fresh_every": 0}, "fresh_every: expected an integer >= 1, got 0"),
        ({"full_at": 3}, "full_at: expected None or numbers of steps, got 3"),
        ({"full_at": (0, -1)}, "full_at: expected an integer >= 0, got -1"),
        ({"full_at": (0,), "window": (0.1, 0.2, 2)}, "window: expected none beside full_at"),
        ({"full_at": (0,), "module_interval": {"mlp": 2}}, "module_interval: expected none beside"),
        ({"full_at": (0,), "refresh_slope": 0.2}, "refresh_slope: expected none beside full_at"),
        ({"full_at": (0,), "decide_per_block": True}, "decide_per_block: expected none beside"),
        ({"step_ratio": ()}, "step_ratio: expected one or more factors, got"),
        ({"step_ratio": (1.0, -1.0)}, "step_ratio: .* got -1.0"),
        ({"layer_ratio": {"mlp": 1.0}}, r"layer_ratio\['mlp'\]: expected one or more factors"),
        ({"layer_ratio": {"ffn": (1.0,)}}, "layer_ratio: .* got 'ffn'"),
        ({"residual_threshold": -0.1}, "residual_threshold: expected a finite number >= 0"),
        ({"forecast": 3}, "forecast: expected an order of 0, 1 or 2, got 3"),
        ({"forecast": 1.0}, "forecast: expected an integer >= 0, got 1.0"),
        ({"quota": "each"}, "quota: expected one of .*'global'"),
        ({"forecast": 1, "cache_dtype": "fp8"}, "cache_dtype: expected None with a forecast"),
        ({"cache_device": "cuda"}, r"cache_device: expected one of \['cpu'\], got 'cuda'"),
    ],
)
def test_meaningless_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ToCaConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        ToCaConfig().replace(**settings)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"expected one of \['dit-ddim50', .*got 'dit'"):
        ToCaConfig.preset("dit")
    with pytest.raises(ValueError, match=r"unknown override \['ratio'\]: .*'fresh_ratio'"):
        ToCaConfig.preset("dit-ddim50", ratio=0.1)
    with pytest.raises(ValueError, match=r"unknown setting \['ratio'\]: .*'fresh_ratio'"):
        ToCaConfig().replace(ratio=0.1)
    with pytest.raises(ValueError, match=r"unknown setting \['N'\]"):
        ToCaConfig.from_dict({"N": 3})
    with pytest.raises(TypeError):
        ToCaConfig(3, 0.1)  # type: ignore[misc]


def test_numpy_numbers_become_plain() -> None:
    config = ToCaConfig(
        interval=np.int64(3), fresh_ratio=np.float32(0.5), module_ratio={"mlp": np.float64(2)}
    )
    assert config == ToCaConfig(interval=3, fresh_ratio=0.5, module_ratio={"mlp": 2})
    assert type(config.interval) is int
    assert type(config.fresh_ratio) is float
    json.dumps(config.to_dict())


def test_config_is_immutable_and_keeps_its_own_mappings() -> None:
    ratio = {"mlp": 1.0}
    config = ToCaConfig(module_ratio=ratio)
    ratio["mlp"] = 3.0
    assert config.module_ratio == {"mlp": 1.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.interval = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.module_ratio["mlp"] = 3.0  # type: ignore[index]


@pytest.mark.parametrize("config", [CUSTOM, GIVEN, *map(ToCaConfig.preset, PRESETS)])
def test_copies_and_files_are_equal(config: ToCaConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config.save(path)
    for twin in (ToCaConfig.load(path), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
        assert hash(twin) == hash(config)
        assert twin.to_dict() == config.to_dict()
    assert os.listdir(tmp_path) == ["config.json"]
    assert config != config.replace(interval=config.interval + 1)


def test_custom_configs_differ_from_the_default_everywhere() -> None:
    default, given = ToCaConfig().to_dict(), GIVEN.to_dict()
    same = [
        name for name, value in CUSTOM.to_dict().items() if value == default[name] == given[name]
    ]
    assert same == []


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    CUSTOM.save(path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            ToCaConfig().save(path)
    assert ToCaConfig.load(path) == CUSTOM
    assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"interval": 3, "intervall": 4}', r"config.json: unknown setting \['intervall'\]"),
        ('{"fresh_ratio": NaN}', "config.json: fresh_ratio: .* got nan"),
        ('{"interval": 3.0}', "config.json: interval: expected an integer >= 1, got 3.0"),
        ("[3]", "config.json: settings: expected a mapping, got"),
        ("{", "config.json: "),
    ],
)
def test_bad_files_are_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        ToCaConfig.load(path)


def test_a_file_may_leave_settings_out(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"interval": 5}', encoding="utf-8")
    assert ToCaConfig.load(path) == ToCaConfig(interval=5)
