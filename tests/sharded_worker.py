"""One process of several that share tokens: `python sharded_worker.py RANK SIZE FOLDER`.

Runs the cases of its number of processes, saves what they did for test_parallel.py to compare, and
checks what only several processes can.
"""

from __future__ import annotations

import datetime
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import toca_kernels as toca
from models import sample, tiny_dit
from sharded import CASES, MODELS, PROMPT, SAMPLES, SELECTING, SIDE, Case, parallelise, run
from toca_kernels import room
from toca_kernels.graphs import StepGraphs
from toca_kernels.ops import select_tokens
from toca_kernels.parallel import Ranks, Share, shares


def gather_uneven(part: Tensor, dim: int, group: Any) -> Tensor:
    """What diffusers does by a gather of unequal parts, which gloo has none of."""
    sizes = [torch.empty((), dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor(part.shape[dim]), group=group)
    longest = max(map(int, sizes))
    part = part.movedim(dim, 0)
    padded = torch.cat([part, part.new_zeros(longest - len(part), *part.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    whole = [one[: int(size)] for one, size in zip(parts, sizes, strict=True)]
    return torch.cat(whole).movedim(0, dim)


# --- selections ----------------------------------------------------------------------------------


def check_selections(rank: int, size: int) -> None:
    """Of random scores with many equal ones, against the op on all tokens."""
    group = dist.group.WORLD
    for seed in range(24):
        generator = torch.Generator().manual_seed(seed)
        grid = (2, 3, 5) if seed % 3 else None  # the last part: of unequal shares
        sizes = [[4 + (seed + r) % 3 for r in range(size)], [30 // size] * size]
        sizes[1][-1] += 30 - sum(sizes[1])
        sizes = sizes[1:] if grid else sizes
        N, R = sum(map(sum, sizes)), 6
        score = torch.randint(-3, 4, (R, N), generator=generator).float() / 4
        score[0, ::7] = torch.nan
        score[1] = 0.0
        score[1, ::2] = -0.0
        score[2, 3] = -torch.inf
        age = torch.randint(0, 3, (R, N), generator=generator, dtype=torch.int32)
        k = [N // 3, N // 3, N, 0, 1, N - 1]
        settings: dict[str, Any] = {"age_weight": 0.25}
        if grid:
            settings |= {"grid": grid, "cell": 2, "bonus": 0.5}
        whole_age = age.clone()
        whole = select_tokens(score, whole_age, k, **settings)
        own = [part[rank] for part in sizes]
        share = shares(Ranks(group, together=True), {"mlp": own}, score.device)["mlp"]
        assert share.tokens == N
        places = share.places
        own_score, own_age = score[:, places].contiguous(), age[:, places].contiguous()
        selection = share.select(own_score, own_age, k, **settings)
        assert torch.equal(selection.inverse >= 0, whole.inverse[:, places] >= 0)
        assert torch.equal(own_age, whole_age[:, places])
        assert torch.equal(selection.nan, score[:, places].isnan().sum(1).int())
        _check_rows(share, selection, k)


def _check_rows(share: Share, selection: Any, k: list[int]) -> None:
    """Rows hold what is selected, in order, then others; equal k have equal lengths."""
    first, N = 0, selection.inverse.shape[1]
    counts = (selection.inverse >= 0).sum(1)
    longest = share.ranks.most(counts.clone())
    for row, width in enumerate(selection.k):
        index = selection.index[first : first + width]
        first += width
        most = max(int(longest[other]) for other in range(len(k)) if k[other] == k[row])
        assert width == min(most, N)
        assert len(set(index.tolist())) == width
        chosen = (selection.inverse[row] >= 0).nonzero()[:, 0]
        assert torch.equal(index[: len(chosen)], chosen)
        slots = torch.arange(len(chosen), dtype=torch.int32)
        assert torch.equal(selection.inverse[row, chosen], slots)


# --- what is refused -----------------------------------------------------------------------------


def check_memory(rank: int, size: int) -> None:
    """One process has too little: all of them say so, and none waits."""
    case = Case("flux", (1, size), SELECTING, False)
    make, step, shape = MODELS["flux"]
    model = make()
    parallelise(model, case)
    session = toca.enable(model, toca.ToCaConfig(**SELECTING), num_steps=3)
    x = torch.zeros(SAMPLES, *shape)
    words = "free on cpu" if rank == 1 else "another process has too little memory"
    with (
        mock.patch.object(room, "free_bytes", return_value=1000 if rank == 1 else 2**40),
        pytest.raises(toca.CacheTooLarge, match=words),
    ):
        step(model, x, 900.0)
    for t in (900.0, 800.0, 700.0):
        step(model, x, t)
    assert session.summary().cached_steps == 2


def check_trace(rank: int, size: int) -> None:
    """It shows all tokens, and counts what all processes did."""
    case = Case("flux", (1, size), SELECTING, False)
    make, step, shape = MODELS["flux"]
    model = make()
    parallelise(model, case)
    session = toca.enable(model, toca.ToCaConfig(**SELECTING), num_steps=3)
    session._run.graphs = graphs = StepGraphs(mock.Mock(nbytes=0))
    with session.trace() as recorder:
        for t in (900.0, 800.0, 700.0):
            step(model, torch.zeros(SAMPLES, *shape), t)
    assert "share the tokens" in graphs.fallback
    part = recorder.trace.parts[0]
    assert part.plan.num_tokens["single_mlp"] == SIDE**2 + PROMPT
    for name, chosen in part.selections.items():
        N = part.plan.num_tokens[name]
        assert chosen.shape[1:] == (len(part.plan.k[name][0]), SAMPLES, N)
        assert (chosen.sum(-1) == part.plan.k[name][:, :, None]).all()
    summary = session.summary()
    assert summary.cache_bytes * size == sum(
        layers * SAMPLES * (SIDE**2 + PROMPT) * 64 * 4 * 2 for layers in (2, 3)
    )


def check_refusals(rank: int, size: int) -> None:
    group = dist.group.WORLD
    model = tiny_dit()
    config = toca.ToCaConfig(self_attention="partial", module_ratio={"attn": 1.0, "mlp": 1.0})
    with (
        toca.enabled(model, config, num_steps=2, group=group),
        pytest.raises(ValueError, match="self_attention: expected 'reuse'"),
    ):
        sample(model, 2)
    other = dist.new_group([0])
    if rank:
        with (
            toca.enabled(model, num_steps=2, group=other),
            pytest.raises(ValueError, match="group: expected one that this process"),
        ):
            sample(model, 2)
    case = Case("ltx", (1, size), SELECTING, False)
    make, step, shape = MODELS["ltx"]
    model = make()
    parallelise(model, case)
    with (
        toca.enabled(model, toca.ToCaConfig(selector="entropy"), num_steps=2),
        pytest.raises(RuntimeError, match="selector 'entropy': expected a cross"),
    ):
        step(model, torch.zeros(SAMPLES, *shape), 900.0)


def main() -> None:
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore", FutureWarning)  # diffusers' own
    mock.patch("diffusers.hooks.context_parallel._all_gather_anything", gather_uneven).start()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    for check in (check_selections, check_memory, check_trace, check_refusals):
        print(check.__name__, flush=True)
        check(rank, size)
    ran = {}
    for name, case in CASES.items():
        if case.size == size:
            print(name, flush=True)
            ran[name] = run(case)
    torch.save(ran, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
