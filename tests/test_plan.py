"""Plan: the published decision tables, k to the token, and what must hold.

Expected values are figures of the published code, or come from the simulations below:
the published state machines, run block by block with their own weights.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from toca_kernels.config import ToCaConfig
from toca_kernels.plan import Plan

FLUX_LAYERS = {"attn": 19, "img_mlp": 19, "txt_mlp": 19, "single_attn": 38, "single_mlp": 38}
FLUX_TOKENS = {
    "attn": 4608,
    "img_mlp": 4096,
    "txt_mlp": 512,
    "single_attn": 4608,
    "single_mlp": 4608,
}
OPENSORA = [
    f"{blocks}_{module}"
    for blocks in ("spatial", "temporal")
    for module in ("attn", "cross_attn", "mlp")
]

# Full steps in the published index, which counts down for DiT.
DDIM50_FULL = [49, 44, 40, 36, 30, 27, 24, 21, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0]
DDPM250_FULL = [
    *[249, 240, 234, 228, 222, 216, 210, 205, 200, 195, 190, 185, 180, 175, 170, 165, 160, 152],
    *[148, 144, 140, 136, 132, 128, 124, 120, 116, 112, 108, 104, 100, 96, 94, 92, 90, 88, 86],
    *[84, 82, 80, 78, 76, 74, 72, 70, 68, 66, 64, 62, 60, 58, 56, 54, 52, 50, 48, 45, 42, 39],
    *[36, 33, 30, 27, 24, 21, 18, 15, 12, 9, 6, 3, 0],
]


def dit_plan(name: str = "dit-ddim50", num_steps: int = 50, **overrides: object) -> Plan:
    config = ToCaConfig.preset(name, **overrides)
    return config.plan(num_steps=num_steps, num_layers=28, num_tokens=256, modules=["attn", "mlp"])


def flux_plan(**overrides: object) -> Plan:
    config = ToCaConfig.preset("flux-50", **overrides)
    return config.plan(num_steps=50, num_layers=FLUX_LAYERS, num_tokens=FLUX_TOKENS)


def full_steps(plan: Plan, module: str = "mlp") -> list[int]:
    return np.flatnonzero(plan.full[module].all(axis=1)).tolist()


def mixed_steps(plan: Plan, module: str = "mlp") -> list[int]:
    full = plan.full[module]
    return np.flatnonzero(full.any(axis=1) & ~full.all(axis=1)).tolist()


# The published full steps.


@pytest.mark.parametrize(
    ("name", "num_steps", "full", "layer0"),
    [
        ("dit-ddim50", 50, DDIM50_FULL, [45, 32]),
        ("dit-ddpm250", 250, DDPM250_FULL, [245, 155]),
    ],
)
def test_dit_full_steps(name: str, num_steps: int, full: list[int], layer0: list[int]) -> None:
    plan = dit_plan(name, num_steps)
    for module in ("attn", "mlp"):
        assert full_steps(plan, module) == [num_steps - 1 - index for index in full]
        assert mixed_steps(plan, module) == [num_steps - 1 - index for index in layer0]
        for step in mixed_steps(plan, module):
            assert plan.full[module][step].tolist() == [True] + [False] * 27


def test_pixart_full_steps() -> None:
    plan = ToCaConfig.preset("pixart-dpm20").plan(num_steps=20, num_layers=28, num_tokens=256)
    for module in ("attn", "cross_attn", "mlp"):
        assert full_steps(plan, module) == [0, 6, 9, 12, 15, 18]
        assert mixed_steps(plan, module) == [4]
        assert plan.full[module][4].tolist() == [True] + [False] * 27


def test_opensora_full_steps() -> None:
    plan = ToCaConfig.preset("opensora-rflow30").plan(
        num_steps=30, num_layers=28, num_tokens=23850, modules=OPENSORA
    )
    for module in OPENSORA:
        crosses = module.endswith("cross_attn")
        assert full_steps(plan, module) == (
            [0, 1, 2, 6, 12, 18, 24] if crosses else [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27]
        )
        assert mixed_steps(plan, module) == []


@pytest.mark.parametrize(
    ("interval", "full"),
    [
        (4, [0, 1, 2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46]),
        (5, [0, 1, 2, 7, 12, 17, 22, 27, 32, 37, 42, 47]),
        (6, [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]),
    ],
)
def test_flux_full_steps(interval: int, full: list[int]) -> None:
    plan = flux_plan(interval=interval)
    for module in FLUX_LAYERS:
        assert full_steps(plan, module) == full
        assert mixed_steps(plan, module) == []


def test_period_at_a_half_rounds_as_the_published_float32_expression() -> None:
    # PixArt, N0 = 12, 65 steps: 12 / phi falls on a half within float32; the division would give
    # 36 for the second full step. Figures of the published code.
    plan = ToCaConfig.preset("pixart-dpm20", interval=12).plan(
        num_steps=65, num_layers=28, num_tokens=256
    )
    assert full_steps(plan) == [0, 26, 55]
    assert mixed_steps(plan) == [15, 39, 48]


# The published k.


def test_dit_k() -> None:
    k = dit_plan().k["mlp"]
    assert k[49 - 1, [0, 13, 27]].tolist() == [104, 129, 156]
    assert k[49 - 38].max() == 0  # the step factor is negative until step 37
    assert k[49 - 37, [0, 27]].tolist() == [1, 2]
    assert int(k.sum()) == 168078
    ddpm = dit_plan("dit-ddpm250", 250).k["mlp"]
    assert ddpm[249 - 125, [0, 13, 27]].tolist() == [80, 46, 8]
    assert int(ddpm.sum()) == 731144


def test_dit_k_of_a_step_that_is_full_at_n3() -> None:
    # Step 30 of DDIM-50 is full at N0 = 3; the published ratio there is 21/26/32 of 256.
    k = dit_plan(interval=49, window=None, refresh_slope=0.0).k["mlp"]
    assert k[49 - 30, [0, 13, 27]].tolist() == [21, 26, 32]


def test_pixart_k() -> None:
    k = ToCaConfig.preset("pixart-dpm20").plan(num_steps=20, num_layers=28, num_tokens=256).k
    assert k["mlp"][1, [0, 18, 27]].tolist() == [256, 177, 88]
    assert k["cross_attn"][1, [0, 18, 27]].tolist() == [133, 66, 33]
    assert k["mlp"][19, [0, 18, 27]].tolist() == [37, 18, 9]
    assert k["cross_attn"][19, [0, 18, 27]].tolist() == [14, 7, 3]
    assert (k["attn"][1] == 0).all()


def test_opensora_k() -> None:
    plan = ToCaConfig.preset("opensora-rflow30").plan(
        num_steps=30, num_layers=28, num_tokens=23850, modules=OPENSORA
    )
    for module in OPENSORA:
        cached = set(plan.k[module][~plan.full[module]].tolist())
        assert cached == ({3565} if module.endswith("mlp") else {0})


def test_flux_k() -> None:
    k = flux_plan().k
    assert k["img_mlp"][3, [0, 9, 18]].tolist() == [245, 191, 136]
    assert k["txt_mlp"][3, [0, 9, 18]].tolist() == [30, 23, 17]
    assert k["single_mlp"][3, [0, 18, 37]].tolist() == [1105, 614, 95]
    assert k["attn"][3].max() == k["single_attn"][3].max() == 0
    assert (k["attn"][0] == 4608).all()


# The published state machines, step by step and block by block.


def token_count(ratio: float, num_tokens: int) -> int:
    clamped = max(min(np.float32(ratio), np.float32(1.0)), np.float32(0.0))
    return int(clamped * np.float32(num_tokens))


def float32_period(interval: int, phi: float) -> int:
    return round(float((np.float32(1.0) / np.float32(phi)) * np.float32(interval)))


def simulate_dit(
    num_steps: int, interval: int, ratio: float, step_weight: float, layer_weight: float, n: int
) -> NDArray[np.int64]:
    """k of the MLP, (steps, 28); N in full blocks. The step counts down, weights fall over it."""
    rows, period = [], 0
    for step in range(num_steps - 1, -1, -1):
        row = []
        for layer in range(28):
            if step == num_steps - 1 or step % period == 0:
                row.append(n)
                if layer == 0:
                    if int(num_steps * 0.2) <= step < int(num_steps * 0.4):
                        period = 2
                    else:
                        period = float32_period(interval, 1 + 0.4 - 2 * 0.4 * step / num_steps)
            else:
                by_step = 1 + step_weight - 2 * step_weight * step / num_steps
                by_layer = 1 + layer_weight - 2 * layer_weight * layer / 27
                row.append(token_count(ratio * by_layer * by_step * (1 + 0.6 * 2.5), n))
        rows.append(row)
    return np.array(rows)


def simulate_pixart(
    num_steps: int, interval: int, ratio: float, n: int
) -> dict[str, NDArray[np.int64]]:
    """k of the cross-attention and the MLP, (steps, 28); the step counts up."""
    rows: dict[str, list[list[int]]] = {"cross_attn": [], "mlp": []}
    period = 0
    for step in range(num_steps):
        row: dict[str, list[int]] = {"cross_attn": [], "mlp": []}
        for layer in range(28):
            full = step == 0 or step % period == 0
            for module, factor in (("cross_attn", 0.6), ("mlp", 1.6)):
                by_layer = 1 + 0.6 - 2 * 0.6 * layer / 27
                r = ratio * by_layer * (1 + 0.9 - 2 * 0.9 * step / num_steps) * factor
                row[module].append(n if full else token_count(r, n))
            if full:
                period = float32_period(interval, 1 - 0.2 + 2 * 0.2 * step / num_steps)
        for module, values in row.items():
            rows[module].append(values)
    return {module: np.array(values) for module, values in rows.items()}


def simulate_flux(num_steps: int, interval: int, ratio: float) -> dict[str, NDArray[np.int64]]:
    """k of the three MLPs: a counter of cached steps decides, after three full steps."""
    widths = {"img_mlp": (19, 0.4), "txt_mlp": (19, 0.4), "single_mlp": (38, 1.6)}
    rows: dict[str, list[list[int]]] = {module: [] for module in widths}
    counter = 0
    for step in range(num_steps):
        full = step <= 2 or counter == interval - 1
        counter = 0 if full else counter + 1
        for module, (depth, factor) in widths.items():
            n = FLUX_TOKENS[module]
            by_layer = [1 + 0.5 - 2 * 0.5 * layer / 27 for layer in range(depth)]
            rows[module].append(
                [n if full else token_count(ratio * f * factor, n) for f in by_layer]
            )
    return {module: np.array(values) for module, values in rows.items()}


@pytest.mark.parametrize("num_steps", [1, 2, 7, 20, 37, 50, 100, 251])
@pytest.mark.parametrize(
    ("interval", "ratio", "n"), [(2, 0.3, 1), (3, 0.07, 257), (5, 0.9, 1024), (8, 1.0, 4095)]
)
def test_presets_repeat_the_published_machines(
    num_steps: int, interval: int, ratio: float, n: int
) -> None:
    changes = {"interval": interval, "fresh_ratio": ratio}
    for name, step_weight, layer_weight in (("dit-ddim50", 2.0, -0.2), ("dit-ddpm250", 0.4, 0.8)):
        plan = ToCaConfig.preset(name, **changes).plan(
            num_steps=num_steps, num_layers=28, num_tokens=n
        )
        want = simulate_dit(num_steps, interval, ratio, step_weight, layer_weight, n)
        np.testing.assert_array_equal(plan.k["mlp"], want)
    plan = ToCaConfig.preset("pixart-dpm20", **changes).plan(
        num_steps=num_steps, num_layers=28, num_tokens=n
    )
    for module, want in simulate_pixart(num_steps, interval, ratio, n).items():
        np.testing.assert_array_equal(plan.k[module], want)
    plan = ToCaConfig.preset("flux-50", **changes).plan(
        num_steps=num_steps, num_layers=FLUX_LAYERS, num_tokens=FLUX_TOKENS
    )
    for module, want in simulate_flux(num_steps, interval, ratio).items():
        np.testing.assert_array_equal(plan.k[module], want)


# Plain settings and what holds for every plan.


def test_plain_settings() -> None:
    plan = ToCaConfig(interval=3, fresh_ratio=0.1).plan(num_steps=8, num_layers=2, num_tokens=100)
    assert plan.modules == ("attn", "cross_attn", "mlp")
    for module in plan.modules:
        assert full_steps(plan, module) == [0, 3, 6]
    assert plan.k["mlp"].T.tolist() == [[100, 10, 10, 100, 10, 10, 100, 10]] * 2
    assert plan.k["attn"].T.tolist() == [[100, 0, 0, 100, 0, 0, 100, 0]] * 2


def test_count_from_and_warmup() -> None:
    def full(**settings: object) -> list[int]:
        config = ToCaConfig(interval=4, **settings)  # type: ignore[arg-type]
        return full_steps(config.plan(num_steps=10, num_layers=3, num_tokens=8))

    assert full(count_from="start") == [0, 4, 8]
    assert full(count_from="end") == [0, 1, 5, 9]
    assert full(count_from="last_full") == [0, 4, 8]
    assert full(count_from="start", warmup=3) == [0, 1, 2, 4, 8]
    assert full(count_from="last_full", warmup=3) == [0, 1, 2, 6]


def test_full_steps_are_where_they_are_given() -> None:
    config = ToCaConfig(full_at=(7, 3), fresh_ratio=0.5)
    plan = config.plan(num_steps=10, num_layers=2, num_tokens=8)
    assert full_steps(plan) == [0, 3, 7]
    assert full_steps(config.replace(warmup=3).plan(num_steps=10, num_layers=2, num_tokens=8)) == [
        0,
        1,
        2,
        3,
        7,
    ]
    with pytest.raises(ValueError, match="full_at: expected steps below 7, as this run has them"):
        config.plan(num_steps=7, num_layers=2, num_tokens=8)


def test_factors_are_as_they_are_given() -> None:
    config = ToCaConfig(
        interval=4,
        fresh_ratio=0.1,
        step_slope=0.5,
        layer_slope=0.5,
        step_ratio=(1.0, 2.0, 0.0, 4.0),
        layer_ratio={"mlp": (1.0, 0.5, 10.0)},
    )
    plan = config.plan(num_steps=4, num_layers=3, num_tokens=100, modules=("mlp",))
    assert plan.k["mlp"][1:].tolist() == [[20, 10, 100], [0, 0, 0], [40, 20, 100]]
    with pytest.raises(ValueError, match="step_ratio: expected 5 factors, one for each step of"):
        config.plan(num_steps=5, num_layers=3, num_tokens=100)
    with pytest.raises(ValueError, match=r"layer_ratio\['mlp'\]: expected 2 factors, one for"):
        config.plan(num_steps=4, num_layers=2, num_tokens=100, modules=("mlp",))


def test_tokens_are_recomputed_in_every_second_cached_step() -> None:
    config = ToCaConfig(interval=5, fresh_ratio=0.25, fresh_every=2, decide_per_block=True)
    plan = config.plan(num_steps=9, num_layers=1, num_tokens=8)
    assert plan.k["mlp"][:, 0].tolist() == [8, 0, 2, 0, 2, 8, 0, 2, 0]
    every = config.replace(fresh_every=1).plan(num_steps=9, num_layers=1, num_tokens=8)
    assert every.k["mlp"][:, 0].tolist() == [8, 2, 2, 2, 2, 8, 2, 2, 2]


def test_a_decision_per_step_has_no_layer_0_quirk() -> None:
    quirky = dit_plan()
    plain = dit_plan(decide_per_block=False)
    assert mixed_steps(quirky) == [4, 17]
    assert mixed_steps(plain) == []
    np.testing.assert_array_equal(plain.full["mlp"][:, 0], quirky.full["mlp"][:, 0])


def test_module_settings_go_by_name_then_by_kind() -> None:
    config = ToCaConfig(
        interval=2, fresh_ratio=0.5, module_ratio={"mlp": 1.0, "txt_mlp": 0.5, "cross_attn": 0.2}
    ).replace(module_interval={"img_cross_attn": 3})
    plan = config.plan(
        num_steps=7,
        num_layers=1,
        num_tokens=100,
        modules=["attn", "img_cross_attn", "txt_cross_attn", "img_mlp", "txt_mlp"],
    )
    assert [int(plan.k[module][5, 0]) for module in plan.modules] == [0, 10, 10, 50, 25]
    assert full_steps(plan, "img_cross_attn") == [0, 3, 6]
    assert full_steps(plan, "txt_cross_attn") == [0, 2, 4, 6]


def test_layer_span() -> None:
    plain = ToCaConfig(interval=2, fresh_ratio=0.5, layer_slope=1.0)
    k = plain.plan(num_steps=2, num_layers=5, num_tokens=100).k["mlp"][1]
    assert k.tolist() == [0, 25, 50, 75, 100]
    k = plain.replace(layer_span=8).plan(num_steps=2, num_layers=5, num_tokens=100).k["mlp"][1]
    assert k.tolist() == [0, 12, 25, 37, 50]
    assert plain.plan(num_steps=2, num_layers=1, num_tokens=100).k["mlp"][1].tolist() == [0]


def test_round_k_to() -> None:
    config = ToCaConfig(interval=2, fresh_ratio=0.5, layer_slope=1.0, round_k_to=32)
    k = config.plan(num_steps=2, num_layers=5, num_tokens=100).k["mlp"][1]
    assert k.tolist() == [0, 32, 64, 96, 100]


CONFIGS = [
    *map(ToCaConfig.preset, ToCaConfig.presets()),
    ToCaConfig(),
    ToCaConfig(interval=7, fresh_ratio=1.0, refresh_slope=-0.99, window=(0.0, 1.0, 3)),
    ToCaConfig(interval=5, fresh_ratio=0.3, step_slope=-9.0, layer_slope=5.0, count_from="end"),
    ToCaConfig(interval=9, count_from="last_full", refresh_slope=0.9, round_k_to=64),
]
SIZES = [(1, 1, 1), (2, 1, 3), (13, 5, 63), (50, 28, 1000), (33, 60, 118800), (120, 2, 2**25 + 1)]


@pytest.mark.parametrize(("num_steps", "num_layers", "num_tokens"), SIZES)
@pytest.mark.parametrize("config", CONFIGS)
def test_tables_hold_their_bounds(
    config: ToCaConfig, num_steps: int, num_layers: int, num_tokens: int
) -> None:
    modules = ["attn", "cross_attn", "mlp", "img_mlp"]
    plan = config.plan(
        num_steps=num_steps, num_layers=num_layers, num_tokens=num_tokens, modules=modules
    )
    for module in modules:
        full, k = plan.full[module], plan.k[module]
        assert full.shape == k.shape == (num_steps, num_layers)
        assert (full.dtype, k.dtype) == (np.dtype(bool), np.dtype(np.int64))
        assert full[: config.warmup].all()
        assert (k >= 0).all()
        assert (k <= num_tokens).all()
        assert (k[full] == num_tokens).all()
        assert not (full[:, 1:] & ~full[:, :1]).any()  # layer 0 is full wherever any layer is
    assert 0 < plan.tokens("mlp") <= num_steps * num_layers * num_tokens
    assert plan.tokens() == sum(plan.tokens(module) for module in modules)
    assert str(plan).startswith(f"Plan of {num_steps} steps\n  attn: {num_layers} layers")


@pytest.mark.parametrize("count_from", ["start", "end", "last_full"])
def test_interval_1_is_always_full(count_from: str) -> None:
    config = ToCaConfig(interval=1, fresh_ratio=0.1, count_from=count_from)  # type: ignore[arg-type]
    plan = config.plan(num_steps=9, num_layers=4, num_tokens=16)
    assert all(plan.full[module].all() for module in plan.modules)
    assert not plan.needs_score().any()


# Which full steps need scores.


def needs_score_by_walking(plan: Plan, module: str, source: str) -> NDArray[np.bool_]:
    """Start at each full step, walk until the source is full again, look for a selection."""
    needs = np.zeros_like(plan.full[source])
    for step, layer in np.argwhere(plan.full[source]).tolist():
        for later in range(step, plan.num_steps):
            if later > step and plan.full[source][later, layer]:
                break
            k = plan.k[module][later, layer]
            if not plan.full[module][later, layer] and 0 < k < plan.num_tokens[module]:
                needs[step, layer] = True
    return needs


def test_needs_score_of_ddim50() -> None:
    needs = dit_plan().needs_score()
    # Published steps: k is 0 until 38, so the full steps 49, 44 and 40 leave no score that is read
    # (but 40 does, for 37); the last one, 0, has no cached step behind it.
    read = [index for index in range(49, -1, -1) if needs[49 - index, 1:].all()]
    assert read == [40, 36, 30, 27, 24, 21, 18, 16, 14, 12, 10, 8, 6, 4, 2]
    assert not needs[[49 - 49, 49 - 44, 49 - 0], 1:].any()


def test_needs_score_where_every_token_is_recomputed_is_false() -> None:
    for ratio in (0.0, 1.0):
        plan = ToCaConfig(interval=4, fresh_ratio=ratio).plan(
            num_steps=12, num_layers=3, num_tokens=64
        )
        assert not plan.needs_score().any()


def test_needs_score_from_another_module() -> None:
    plan = ToCaConfig.preset("opensora-rflow30").plan(num_steps=30, num_layers=2, num_tokens=405)
    needs = plan.needs_score("mlp", source="cross_attn")
    assert np.flatnonzero(needs.all(axis=1)).tolist() == [2, 6, 12, 18, 24]
    # With its own full steps as the source, every one of them but the first two is followed by one
    # that selects.
    own = plan.needs_score("mlp")
    assert np.flatnonzero(own.all(axis=1)).tolist() == [3, 6, 9, 12, 15, 18, 21, 24, 27]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("source", ["mlp", "cross_attn"])
def test_needs_score_equals_a_walk(config: ToCaConfig, source: str) -> None:
    for num_steps in (1, 9, 40):
        plan = config.plan(
            num_steps=num_steps,
            num_layers=28,
            num_tokens=17,
            modules=["cross_attn", "mlp", "img_mlp"],
        )
        for module in ("mlp", "img_mlp"):
            got = plan.needs_score(module, source=source)
            np.testing.assert_array_equal(got, needs_score_by_walking(plan, module, source))


# The Plan object and its refusals.


def test_plans_compare_copy_and_protect_their_tables() -> None:
    plan = dit_plan()
    assert plan == dit_plan()
    assert plan != dit_plan(fresh_ratio=0.08)
    assert plan != dit_plan(interval=4)
    assert plan != ToCaConfig.preset("dit-ddim50").plan(num_steps=50, num_layers=28, num_tokens=256)
    assert plan != "plan"
    assert copy.deepcopy(plan) == pickle.loads(pickle.dumps(plan)) == plan
    for table in (plan.full["mlp"], plan.k["mlp"], plan.needs_score()):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0
    assert repr(plan) == "Plan(num_steps=50, modules=['attn', 'mlp'])"


def test_summary_reads() -> None:
    assert dit_plan().summary().splitlines() == [
        "Plan of 50 steps",
        "  attn: 28 layers, N = 256; full in 18 steps (0 5 9 13 19 22 25 28 31 33 ... 49), "
        "in some layers of 2 more (4 17); else reused",
        "  mlp: 28 layers, N = 256; full in 18 steps (0 5 9 13 19 22 25 28 31 33 ... 49), "
        "in some layers of 2 more (4 17); else k = 0..156, mean 43.1 (16.8%)",
    ]


def _plan(**arguments: object) -> Plan:
    sizes: dict[str, object] = {"num_steps": 4, "num_layers": 2, "num_tokens": 8}
    return ToCaConfig().plan(**(sizes | arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps: expected an integer >= 1, got 0"),
        ({"num_steps": 2.0}, "num_steps: expected an integer >= 1, got 2.0"),
        ({"num_layers": True}, "num_layers: expected an integer >= 1, got True"),
        ({"num_tokens": -1}, "num_tokens: expected an integer >= 1, got -1"),
        ({"num_tokens": {"mlp": 0}}, r"num_tokens\['mlp'\]: expected an integer >= 1, got 0"),
        ({"num_tokens": {"mlp": 8}, "num_layers": {"img_mlp": 2}}, "num_tokens: expected a number"),
        ({"num_tokens": {"mlp": 8}, "modules": ["mlp", "attn"]}, "num_tokens: expected a number"),
        ({"modules": "mlp"}, "modules: expected a sequence of names, got the string 'mlp'"),
        ({"modules": []}, "modules: expected one or more different names"),
        ({"modules": ["mlp", "mlp"]}, "modules: expected one or more different names"),
        ({"modules": ["mlp", "ffn"]}, "module: expected one of .*'img_'.* got 'ffn'"),
        ({"modules": ["attn"]}, r"module_ratio: .*\['attn'\].* only \['mlp'\]"),
    ],
)
def test_meaningless_plans_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _plan(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda plan: plan.tokens("ffn"), r"expected one of \['attn', .*got 'ffn'"),
        (lambda plan: plan.needs_score("img_mlp"), "got 'img_mlp'"),
        (lambda plan: plan.needs_score("mlp", source="x"), "got 'x'"),
    ],
)
def test_meaningless_questions_are_refused(call: Callable[[Plan], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(_plan())


def test_the_source_of_scores_needs_as_many_layers() -> None:
    plan = _plan(num_layers={"attn": 2, "mlp": 3})
    with pytest.raises(ValueError, match="expected a module with the 3 layers of 'mlp'"):
        plan.needs_score("mlp", source="attn")
