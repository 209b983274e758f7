"""The presets, published and not: their numbers live only in this file."""

from __future__ import annotations

from typing import Any

# What the published code sets for each model: its command lines (README) and, for what they leave
# open, its schedulers of the period and of the ratio. Published weights that fall over the run or
# over the layers are negative slopes here. The age weight 0.25 is the same for all.
_DIT: dict[str, Any] = {
    "fresh_ratio": 0.07,
    "grid": 2,
    "bonus": 0.6,
    "count_from": "end",
    "refresh_slope": 0.4,
    "window": (0.2, 0.4, 2),
    "decide_per_block": True,
    "module_ratio": {"mlp": 2.5},
}
PRESETS: dict[str, dict[str, Any]] = {
    "dit-ddim50": _DIT | {"interval": 3, "step_slope": 2.0, "layer_slope": 0.2},
    "dit-ddpm250": _DIT | {"interval": 4, "step_slope": 0.4, "layer_slope": -0.8},
    "pixart-dpm20": {
        "interval": 3,
        "fresh_ratio": 0.3,
        "grid": 4,
        "bonus": 0.4,
        "selector": "entropy",
        "refresh_slope": 0.2,
        "decide_per_block": True,
        "step_slope": -0.9,
        "layer_slope": -0.6,
        "module_ratio": {"cross_attn": 0.6, "mlp": 1.6},
        "share_cfg_selection": True,
    },
    # The published ratio of the cross-attention is -0.005 * R0: clamped, nothing is recomputed.
    "opensora-rflow30": {
        "interval": 3,
        "fresh_ratio": 0.1,
        "selector": "entropy",
        "warmup": 3,
        "module_interval": {"cross_attn": 6},
        "module_ratio": {"mlp": 1.495},
        "share_cfg_selection": True,
    },
    "flux-50": {
        "interval": 4,
        "fresh_ratio": 0.1,
        "warmup": 3,
        "count_from": "last_full",
        "layer_slope": -0.5,
        "layer_span": 27,
        "module_ratio": {"img_mlp": 0.4, "txt_mlp": 0.4, "single_mlp": 1.6},
    },
    # Not published: what was best at equal time on a trained model, see docs/quality.md.
    "forecast": {"interval": 3, "fresh_ratio": 0.0, "forecast": 1, "selector": "random"},
}
# What changes in the published code when the ratio is 0.
WITHOUT_FRESH_TOKENS: dict[str, dict[str, Any]] = {
    "dit-ddim50": {"refresh_slope": 0.0, "window": None},
    "dit-ddpm250": {"refresh_slope": 0.0, "window": None},
    "pixart-dpm20": {"refresh_slope": 0.0},
    "opensora-rflow30": {},
    "flux-50": {"warmup": 1},
    "forecast": {},
}
