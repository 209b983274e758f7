"""FLOPs of a plan: the published figures, to the last digit where one is published."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from toca_kernels.config import ToCaConfig
from toca_kernels.flops import BlockShape, flux_outside
from toca_kernels.plan import Plan

DIT = BlockShape(batch=2, channels=1152, heads=16)
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


def dit_plan(name: str = "dit-ddim50", num_steps: int = 50, **overrides: object) -> Plan:
    config = ToCaConfig.preset(name, **overrides)
    return config.plan(num_steps=num_steps, num_layers=28, num_tokens=256, modules=["attn", "mlp"])


def flux_plan(**overrides: object) -> Plan:
    config = ToCaConfig.preset("flux-50", **overrides)
    return config.plan(num_steps=50, num_layers=FLUX_LAYERS, num_tokens=FLUX_TOKENS)


@pytest.mark.parametrize(
    ("name", "num_steps", "overrides", "tera"),
    [
        ("dit-ddpm250", 250, {}, 43.420574210048),
        ("dit-ddpm250", 250, {"interval": 1}, 103.549585270784),
    ],
)
def test_dit_flops_to_the_last_digit(
    name: str, num_steps: int, overrides: dict[str, object], tera: float
) -> None:
    assert dit_plan(name, num_steps, **overrides).flops(DIT).done == round(tera * 1e12)


@pytest.mark.parametrize(
    ("name", "num_steps", "overrides", "tera", "digits"),
    [
        ("dit-ddim50", 50, {}, 10.2328, 4),
        ("dit-ddim50", 50, {"fresh_ratio": 0}, 8.560, 3),  # FORA, N = 3
        ("dit-ddpm250", 250, {"fresh_ratio": 0, "interval": 3}, 39.955, 3),
    ],
)
def test_dit_flops(
    name: str, num_steps: int, overrides: dict[str, object], tera: float, digits: int
) -> None:
    flops = dit_plan(name, num_steps, **overrides).flops(DIT)
    assert round(flops.done * 1e-12, digits) == tera
    assert round(flops.full * 1e-12, 3) == {50: 23.735, 250: 118.676}[num_steps]
    assert flops.ratio == pytest.approx(flops.full / flops.done)
    assert flops.steps.sum() == flops.done
    assert flops.full_step * num_steps == flops.full


def test_dit_compression_ratio() -> None:
    assert round(dit_plan().flops(DIT).ratio, 2) == 2.32
    assert round(dit_plan("dit-ddpm250", 250).flops(DIT).ratio, 2) == 2.73
    assert "2.32x" in str(dit_plan().flops(DIT))


def flux_flops(plan: Plan, *, reproject: bool, outside: bool) -> NDArray[np.int64]:
    double = BlockShape(
        family="double_stream", batch=1, channels=3072, heads=24, reproject=reproject
    )
    single = BlockShape(family="single_stream", batch=1, channels=3072, heads=24)
    around = flux_outside(batch=1, img_tokens=4096, txt_tokens=512, channels=3072)
    return plan.flops(double, single, outside=around if outside else 0).steps


@pytest.mark.parametrize(
    ("interval", "fresh_ratio", "reproject", "tera"),
    [
        # README of the published code; its attention is cached before the projection.
        (1, 0.0, True, 3719.50),
        (3, 0.0, True, 1320.07),
        (4, 0.1, True, 1263.22),
        (5, 0.1, True, 1126.76),
        (6, 0.1, True, 990.30),
        # The same group's later variant, which caches it after the projection.
        (6, 0.1, False, 924.30),
        (8, 0.1, False, 784.54),
        (10, 0.1, False, 714.66),
    ],
)
def test_flux_flops(interval: int, fresh_ratio: float, reproject: bool, tera: float) -> None:
    plan = flux_plan(interval=interval, fresh_ratio=fresh_ratio)
    steps = flux_flops(plan, reproject=reproject, outside=True)
    # The published total adds steps which its tool had rounded to 0.01 TFLOP.
    assert (steps * 1e-12).round(2).sum() == pytest.approx(tera, abs=1e-6)
    assert steps.sum() * 1e-12 == pytest.approx(tera, rel=1e-3)


@pytest.mark.parametrize(("interval", "tera"), [(4, 1262.5), (5, 1126.0), (6, 989.6)])
def test_flux_flops_of_the_blocks_alone(interval: int, tera: float) -> None:
    steps = flux_flops(flux_plan(interval=interval), reproject=True, outside=False)
    assert steps.sum() * 1e-12 == pytest.approx(tera, rel=2e-4)


def test_flops_of_a_small_cross_attention_block_by_hand() -> None:
    # B = 1, C = 2, H = 1, M = 2, N = 3, L = 5, one layer, two steps; k = 1 in both modules.
    config = ToCaConfig(interval=2, fresh_ratio=0.5, module_ratio={"mlp": 1.0, "cross_attn": 1.0})
    plan = config.plan(num_steps=2, num_layers=1, num_tokens=3)
    shape = BlockShape(
        family="self_cross_mlp", batch=1, channels=2, heads=1, mlp_ratio=1.0, context_tokens=5
    )
    norms = 2 * 3 * 2
    attn = 3 * (2 * 2 * 8 + 2 + 4 * 3 * 2 + 5 * 3)  # qkv and proj, scale, QK and PV, softmax
    cross_row = 2 * 2 * 4 + 2 + 4 * 5 * 2 + 5 * 5
    keys_values = 2 * 5 * 2 * 4
    mlp_row = 2 * 2 * 2 * 2 + 6 * 2
    flops = plan.flops(shape)
    assert flops.steps.tolist() == [
        norms + attn + 3 * cross_row + keys_values + 3 * mlp_row,
        norms + cross_row + keys_values + mlp_row,
    ]
    assert plan.flops(BlockShape(**(vars(shape) | {"batch": 7}))).done == 7 * flops.done
    assert plan.flops(shape, shape).done == 2 * flops.done
    gated = plan.flops(BlockShape(**(vars(shape) | {"mlp_matrices": 3})))
    assert (gated.steps - flops.steps).tolist() == [3 * 8, 8]
    short = plan.flops(BlockShape(**(vars(shape) | {"attn_length": 1})))
    assert (flops.steps - short.steps).tolist() == [3 * (4 * 2 * 2 + 5 * 2), 0]
    assert plan.flops(shape, outside=11).steps.tolist() == (flops.steps + 11).tolist()


def test_a_cross_attention_without_rows_costs_nothing() -> None:
    plan = ToCaConfig(interval=2, fresh_ratio=0.0).plan(num_steps=2, num_layers=1, num_tokens=3)
    shape = BlockShape(family="self_cross_mlp", batch=1, channels=2, heads=1, context_tokens=5)
    assert plan.flops(shape).steps[1] == 2 * 3 * 2  # both norms of the published count


def linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def test_flops_of_small_flux_blocks_by_hand() -> None:
    # B = 1, C = 2, M = 6; 4 image and 3 text tokens. One full step, then one with k = 2 of 4 and 1
    # of 3 in the double stream and 3 of 7 in the single stream block.
    config = ToCaConfig(interval=2, fresh_ratio=0.5)
    plan = config.plan(
        num_steps=2,
        num_layers=1,
        num_tokens={"attn": 7, "img_mlp": 4, "txt_mlp": 3, "single_attn": 7, "single_mlp": 7},
    )
    sizes = {"batch": 1, "channels": 2, "heads": 1, "mlp_ratio": 3.0}
    norm = 4 * 2  # per token

    def mlp(rows: int) -> int:
        return linear(rows, 2, 6) + rows * 6 + linear(rows, 6, 2) + rows * norm

    modulation = 2 * (2 + linear(1, 2, 12))  # SiLU and linear, for each stream
    attention = 2 * linear(7, 2, 7)
    double = [
        modulation + 7 * norm + linear(7, 2, 6) + attention + linear(7, 2, 2) + mlp(4) + mlp(3),
        modulation + mlp(2) + mlp(1),
    ]
    shape = BlockShape(family="double_stream", **sizes)  # type: ignore[arg-type]
    assert plan.flops(shape).steps.tolist() == double
    early = BlockShape(family="double_stream", reproject=True, **sizes)  # type: ignore[arg-type]
    assert plan.flops(early).steps.tolist() == [double[0], double[1] + linear(7, 2, 2)]

    def joined(rows: int, inner: int) -> int:
        return rows * norm + linear(rows, 2, inner) + rows * 6 + linear(rows, 2 + 6, 2)

    modulation = 2 + linear(1, 2, 6)
    single = [modulation + joined(7, 6 + 6) + attention, modulation + joined(3, 6)]
    shape = BlockShape(family="single_stream", **sizes)  # type: ignore[arg-type]
    assert plan.flops(shape).steps.tolist() == single
    shared = BlockShape(family="single_stream", block_modulation=False, **sizes)  # type: ignore[arg-type]
    assert plan.flops(shared).steps.tolist() == [step - modulation for step in single]


def test_flux_outside_by_hand() -> None:
    sizes = {"img_tokens": 4, "txt_tokens": 3, "channels": 2, "in_channels": 5}
    widths = {"context_channels": 7, "vector_channels": 9, "time_channels": 6}

    def embedder(width: int) -> int:
        return linear(1, width, 2) + 2 + linear(1, 2, 2)

    tokens = linear(4, 5, 2) + linear(3, 7, 2)
    final = 2 + linear(1, 2, 4) + 4 * 4 * 2 + linear(4, 2, 5)
    schnell = embedder(6) + embedder(9) + tokens + final
    assert flux_outside(batch=1, guidance=False, **sizes, **widths) == schnell
    assert flux_outside(batch=3, **sizes, **widths) == 3 * (schnell + embedder(6))


def test_flops_of_two_lists_of_blocks_add() -> None:
    config = ToCaConfig.preset("opensora-rflow30")
    both = config.plan(num_steps=30, num_layers=28, num_tokens=6075, modules=OPENSORA)
    one = config.plan(num_steps=30, num_layers=28, num_tokens=6075)

    def shape(prefix: str, attn_length: int) -> BlockShape:
        return BlockShape(
            family="self_cross_mlp",
            prefix=prefix,
            batch=2,
            channels=1152,
            heads=16,
            context_tokens=300,
            attn_length=attn_length,
        )

    total = both.flops(shape("spatial_", 405), shape("temporal_", 15))
    parts = [one.flops(shape("", 405)), one.flops(shape("", 15))]
    assert total.done == sum(part.done for part in parts)
    assert total.full == sum(part.full for part in parts)


def test_always_full_is_the_untouched_model() -> None:
    plan = ToCaConfig(interval=1).plan(num_steps=9, num_layers=4, num_tokens=16)
    assert plan.flops(DIT).ratio == 1.0


def test_steps_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        dit_plan().flops(DIT).steps[0] = 0


def test_meaningless_questions_are_refused() -> None:
    plan = dit_plan()
    with pytest.raises(ValueError, match="blocks: expected at least one BlockShape"):
        plan.flops()
    with pytest.raises(ValueError, match="outside: expected an integer >= 0, got -1"):
        plan.flops(DIT, outside=-1)
    double = BlockShape(family="double_stream", batch=1, channels=8, heads=2)
    with pytest.raises(ValueError, match=r"double_stream block has the modules .*'img_mlp'"):
        plan.flops(double)
    layers = {"attn": 2, "mlp": 3}
    uneven = ToCaConfig().plan(num_steps=4, num_layers=layers, num_tokens=8)
    with pytest.raises(ValueError, match=r"one number of layers .* got \[2, 3\]"):
        uneven.flops(DIT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "dit"}, r"family: expected one of \['self_mlp', .*got 'dit'"),
        ({"batch": 0}, "batch: expected an integer >= 1, got 0"),
        ({"channels": 1152.0}, "channels: expected an integer >= 1, got 1152.0"),
        ({"heads": 7}, "heads: expected a divisor of channels=1152, got 7"),
        ({"mlp_ratio": 0}, "mlp_ratio: expected a number > 0, got 0"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio: expected a number > 0, got nan"),
        ({"mlp_matrices": 4}, "mlp_matrices: expected 2 or 3, got 4"),
        ({"attn_length": 0}, "attn_length: expected an integer >= 1, got 0"),
        ({"context_tokens": -1}, "context_tokens: expected an integer >= 0, got -1"),
        ({"family": "self_cross_mlp"}, "context_tokens: expected an integer >= 1, got 0"),
        ({"reproject": True}, "reproject: expected False for self_mlp, got True"),
    ],
)
def test_meaningless_shapes_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockShape(**(vars(DIT) | change))
