"""Processes that share the tokens: what one process selects and computes, and what they send.

The processes are those of sharded_worker.py, 2 and 4 of them, with gloo.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import sharded
from sharded import CASES, SAMPLES, Case, Ran
from toca_kernels import chooser, track
from toca_kernels.blocks import taps
from toca_kernels.ops import Selection

diffusers = pytest.importorskip("diffusers", reason="context parallelism is diffusers'")
if not hasattr(diffusers, "ContextParallelConfig"):
    pytest.skip("this diffusers has no context parallelism", allow_module_level=True)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="this torch has no gloo",
    ),
]

TESTS = Path(__file__).parent
LIMIT = 300  # seconds
SIZES = (2, 4)


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Iterator[dict[str, list[Ran]]]:
    """For each case what every process of its group did."""
    paths = [TESTS, TESTS.parent, TESTS.parent / "benchmarks"]
    variables = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    groups = {}
    for size in SIZES:
        folder = tmp_path_factory.mktemp(f"of{size}")
        groups[folder] = [
            subprocess.Popen(
                [sys.executable, str(TESTS / "sharded_worker.py"), str(rank), str(size), folder],
                env={**os.environ, **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(size)
        ]
    try:
        found: dict[str, list[Ran]] = {}
        for folder, processes in groups.items():
            said = [process.communicate(timeout=LIMIT)[0] for process in processes]
            for process, text in zip(processes, said, strict=True):
                assert process.returncode == 0, "\n".join(said) or text
            for rank in range(len(processes)):
                for name, one in torch.load(folder / f"{rank}.pt", weights_only=False).items():
                    found.setdefault(name, []).append(one)
        yield found
    finally:
        for process in (one for processes in groups.values() for one in processes):
            if process.poll() is None:
                process.kill()
            process.communicate()


# --- selecting in parts, in one process ----------------------------------------------------------


def parts_of(case: Case, N: int) -> list[torch.Tensor]:
    """For each process, its tokens of a module with N of them."""
    image = sharded.MODELS["uneven" if case.model == "uneven" else "flux"][2][0]
    text = sharded.PROMPT - (case.model == "uneven")
    streams = {"stdit3": [N // sharded.STDIT3_GRID[0]] * sharded.STDIT3_GRID[0], "wan": [N]}.get(
        case.model, [text, image] if text + image == N else [N]
    )
    places = torch.arange(N).split(streams)
    return [
        torch.cat([stream.tensor_split(case.size)[rank] for stream in places])
        for rank in range(case.size)
    ]


@contextmanager
def each_for_itself(case: Case, monkeypatch) -> Iterator[None]:
    """One process that selects as several do, each among its own tokens."""
    ratios = [0.3 * factor for factor in sharded.SELECTING["module_ratio"].values()]

    def select(score, age, k, *, age_weight, grid=None, cell=1, bonus=0.0):
        R, N = score.shape
        total = score + age_weight * age.float()
        chosen = torch.zeros(R, N, dtype=torch.bool)
        for row in range(R):
            ratio = next(ratio for ratio in ratios if int(ratio * N) == k[row])
            for places in parts_of(case, N):
                own = total[row, places]
                if bonus:
                    cells = [
                        (
                            p // grid[2] // grid[1],
                            p // grid[2] % grid[1] // cell,
                            p % grid[2] // cell,
                        )
                        for p in places.tolist()
                    ]
                    for one in set(cells):
                        there = [at for at, other in enumerate(cells) if other == one]
                        best = there[int(own[there].argmax())]
                        own[best] = own[best] * (1 + bonus)
                order = own.sort(descending=True, stable=True).indices
                chosen[row, places[order[: int(ratio * len(places))]]] = True
        age += 1
        age[chosen] = 0
        index = chosen.nonzero()[:, 1]
        inverse = torch.where(chosen, chosen.cumsum(1) - 1, -1).int()
        return Selection(index, inverse, chosen.sum(1).int() * 0, tuple(chosen.sum(1).tolist()))

    def rank(into, scores, offset, ranks=None):
        whole = torch.stack(list(scores)).mean(dim=0)
        if into.shape[-2] != whole.shape[-2]:
            whole = whole.unflatten(-2, (2, into.shape[-2])).mean(dim=-3)
        whole = whole + offset
        for places in parts_of(case, whole.shape[-1]):
            own = whole[..., places]
            into[..., places] = own / own.norm(dim=-1, keepdim=True) / case.size**0.5

    with monkeypatch.context() as patched:
        for module in (track, taps):
            patched.setattr(module, "select_tokens", select)
        for module in (chooser, taps):
            patched.setattr(module, "rank", rank)
        yield


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("-sent")])
def test_processes_do_what_one_does(name, ran, monkeypatch):
    case = CASES[name]
    settings = case.settings
    selects = settings["interval"] > 1 and settings["fresh_ratio"] > 0
    local = settings["quota"] == "local" and selects
    if local:
        with each_for_itself(case, monkeypatch):
            alone = sharded.run(case, alone=True)
    else:
        alone = sharded.run(case, alone=True)
    first = ran[name][0]
    assert len(ran[name]) == case.size
    # Rounding moves values across the boundaries of 8 bits.
    tolerance = 5e-3 if "cache_dtype" in settings else 1e-5
    assert torch.allclose(first.latents, alone.latents, rtol=0, atol=tolerance)
    for module, steps in alone.selections.items():
        for step, (mine, theirs) in enumerate(zip(steps, first.selections[module], strict=True)):
            assert (mine is None) == (theirs is None), (module, step)
            assert mine is None or torch.equal(mine, theirs), (module, step)
    for other in ran[name]:
        assert other.put_back
        assert torch.equal(other.latents, first.latents)
    if case.model != "uneven":
        same = ["full_steps", "tokens_total", "flops_full"]
        if not local:
            same += ["tokens_recomputed", "flops_done"]
        for what in same:
            assert getattr(first.summary, what) == getattr(alone.summary, what)


def test_cases_show_what_they_are_for(ran):
    """Processes hold unequal shares of a global selection, and some steps drift, others do not."""
    for name in ("flux-ulysses2-attention-global", "wan-ulysses4-entropy-global"):
        unequal = 0
        for module, steps in ran[name][0].selections.items():
            for step in filter(lambda one: one is not None, steps):
                counts = [
                    step[..., places].sum(-1) for places in parts_of(CASES[name], step.shape[-1])
                ]
                unequal += int((counts[0] != counts[1]).sum())
                assert 0 < step.float().mean() < 0.5, module
        assert unequal > 10
    for name in (one for one in CASES if "drift" in one):
        full = ran[name][0].summary.full_steps
        assert 2 < full < sharded.STEPS, name  # 2 are planned


# --- what is sent --------------------------------------------------------------------------------

FLOAT = COUNT = 4  # bytes
HISTOGRAMS = 4 * 256 * COUNT  # of a row
WIDTH, LAYERS = 64, {"img_mlp": 2, "txt_mlp": 2, "single_mlp": 3}  # of FLUX


def sent(name: str, ran: dict[str, list[Ran]]) -> list[dict[str, int]]:
    """Bytes of each kind of collective in every step, which all processes send alike."""
    for other in ran[name]:
        assert other.sent == ran[name][0].sent
    return [
        {kind: sum(size for one, size in step if one == kind) for kind, _ in step}
        for step in ran[name][0].sent
    ]


@pytest.mark.parametrize(
    ("name", "out"),
    [
        ("flux-ulysses2-late", sharded.SIDE**2 // 2 * 16),
        ("flux-ulysses2-random", sharded.SIDE**2 // 2 * 16),
        ("wan-ulysses4-entropy", 2 * 48 // 4 * 64),  # two calls; patches of 2 x 2 of 16 channels
        ("stdit3-own2-random", 2 * 48 // 2 * 48),  # both halves; gathered before its last layer
    ],
)
def test_a_cached_step_sends_its_output_alone(name, out, ran):
    """What a model gathers behind its blocks: within them nothing is sent."""
    steps = sent(f"{name}-local-sent", ran)
    for number in (1, 2, 4):
        assert sum(steps[number].values()) == SAMPLES * out * FLOAT
        assert len(steps[number]) == 1
    assert sum(steps[3].values()) > 8 * sum(steps[4].values())


def selecting(parts: int, layers: int, samples: int = SAMPLES) -> int:
    """Bytes of a selection in all layers of a module whose tokens are of `parts` parts."""
    return layers * samples * (HISTOGRAMS + (1 + parts) * COUNT)


def test_a_global_selection_sends_histograms(ran):
    flux = sum(selecting(1 + (name == "single_mlp"), LAYERS[name]) for name in LAYERS)
    # Entropies are new in every step: the MLP of each layer selects by them, and needs their norm.
    wan = 2 * (selecting(1, 3) + 3 * (selecting(1, 1) + SAMPLES * FLOAT))
    stdit3 = 4 * selecting(sharded.STDIT3_GRID[0], 2, samples=2 * SAMPLES)
    for name, expected in (
        ("flux-ulysses2-reuse", 0),  # where nobody selects
        ("flux-ulysses2-late", flux),
        ("flux-ulysses2-random", flux),
        ("wan-ulysses4-entropy", wan),
        ("stdit3-own2-random", stdit3),
    ):
        local, steps = (sent(f"{name}-{quota}-sent", ran) for quota in ("local", "global"))
        for number in (1, 2, 4):
            more = sum(steps[number].values()) - sum(local[number].values())
            assert more == expected, name


def test_a_full_step_sends_scores_beside_queries_keys_and_values(ran):
    N = sharded.SIDE**2 + sharded.PROMPT
    layers = LAYERS["img_mlp"] + LAYERS["single_mlp"]
    for quota in ("local", "global"):
        full = sent(f"flux-ulysses2-late-{quota}-sent", ran)[3]
        scores = layers * SAMPLES * N * FLOAT
        norms = sum(LAYERS.values()) * SAMPLES * FLOAT if quota == "global" else 0
        assert full["all_to_all_single"] == layers * 4 * SAMPLES * N // 2 * WIDTH * FLOAT
        assert full["allreduce_"] == scores + norms
