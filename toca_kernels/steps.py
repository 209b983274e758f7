"""Which step a call of the model is: of which run, of which guidance branch.

A model's forward tells its timestep and labels or text, nothing more: all of it follows from those.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils import _pytree as pytree

from .branch import Branch
from .models.adapter import ModelCall

if TYPE_CHECKING:
    from .run import Run


def enter(run: Run, call: ModelCall, signature: Hashable) -> Branch:
    """The step that a call is, of the branch that it belongs to, which has entered it."""
    if run.num_steps is None:
        raise ValueError(
            "num_steps: expected the number of sampling steps, as enable(..., num_steps=50); "
            "only a pipeline's scheduler can tell it"
        )
    # Where a scheduler announces every run, models of text are counted: their timesteps are
    # scaled and rounded on the way (two of FLUX in bfloat16 can be equal).
    counted = run.announced and call.text is not None
    timestep = None if counted else read_timestep(call.timestep)
    key = _key(run, call, timestep)
    branch = run.branches.get(key)
    if branch is None or _restarts(run, branch, timestep):
        branch = _open(run, key, timestep, counted=counted)
    if branch.position >= run.num_steps:
        raise ValueError(
            f"num_steps: expected a run of {run.num_steps} steps, got one more, at timestep "
            f"{timestep}; enable with the number of steps that you sample"
        )
    if counted and run.ticks and not branch.position <= run.ticks < run.num_steps:
        raise ValueError(
            f"scheduler: expected the one that announced this run, which has taken "
            f"{run.ticks} of {run.num_steps} steps, to lead step {branch.position}; another "
            "pipeline around this model is followed after `import toca_kernels.diffusers`, "
            "a scheduler of your own after `pipe.scheduler = scheduler`"
        )
    if call.text == () and timestep is not None and timestep == branch.last:
        raise ValueError(
            "guidance: expected both halves in one batch, as this model's own samplers have "
            f"it, got a second call at timestep {timestep}"
        )
    branch.text_at = _branch_key(call)
    branch.enter(call, timestep, signature)
    return branch


def enter_named(run: Run, name: str, call: ModelCall, signature: Hashable) -> Branch:
    """The next step of the branch of this name; what it does is decided then.

    The first branch leads: one that is new takes the step that the first has just taken.
    """
    branch = run.branches.get(name)
    if branch is not None and branch.position >= (run.num_steps or 0):
        raise ValueError(
            f"request: expected at most {run.num_steps} steps, its number, got one more"
        )
    timestep = read_timestep(call.timestep)
    if branch is None:
        leader = next(iter(run.branches.values()), None)
        if leader is None:
            run.prepare()
        position = 0 if leader is None else max(leader.position - 1, 0)
        branch = Branch(run, position, None if leader is None else leader.first)
        if leader is not None and run.config.share_cfg_selection:
            branch.chooser.follow(leader.chooser)
        run.branches = {**run.branches, name: branch}
    branch.enter(call, timestep, signature)
    return branch


def _open(run: Run, key: object, timestep: float | None, *, counted: bool) -> Branch:
    """A new branch: of a new run, of the step at hand, or in the place of one that changed."""
    others = {k: b for k, b in run.branches.items() if k != key}
    peers = {k: b for k, b in others.items() if b.ran(timestep)}
    position, first = 0, None
    if key not in run.branches:
        # Without peers, the labels or the batch changed in the middle of a run: it goes on
        # where it was, with a full step, because this branch has nothing cached.
        for other in peers.values() or others.values():
            if peers or not _restarts(run, other, timestep):
                position, first = other.position - bool(peers), other.first
                break
    if position == 0:
        run.prepare()
    if position == 0 and counted and run.ticks < (run.num_steps or 0):
        position = run.ticks  # of a second model, which takes over in the middle of a run
    branch = Branch(run, position, first)
    if peers and run.config.share_cfg_selection:
        branch.chooser.follow(next(iter(peers.values())).chooser)
    run.branches = {**peers, key: branch}
    return branch


def _key(run: Run, call: ModelCall, timestep: float | None) -> object:
    """What tells guidance branches apart: the labels, or where they or the text live.

    A text that was copied on its way to the model (to another device, by offloading hooks) is
    known by what it says.
    """
    key = _branch_key(call)
    if call.text is None:
        return key
    for known, branch in run.branches.items():
        if branch.text_at == key:
            return known
    for known, branch in run.branches.items():
        if not branch.ran(timestep) and branch.has_text(call.text):
            return known
    return object()  # an address that was another text's before tells nothing


def _restarts(run: Run, branch: Branch, timestep: float | None) -> bool:
    """Whether this call starts a new run of the branch rather than its next step."""
    if branch.position == 0:  # its first step was not finished
        return True
    if timestep is None:
        return branch.position >= (run.num_steps or 0)
    coming = run.timesteps[branch.position :][:1]
    if coming == [timestep]:  # announced, so it need not be monotone
        return False
    if timestep == branch.first:
        return True
    if branch.last is None or branch.first is None:
        return False
    direction = branch.last - branch.first
    return direction != 0 and (timestep - branch.last) * direction < 0


def read_timestep(timestep: Tensor) -> float | None:
    """The timestep as a number, where reading it does not wait for a device."""
    if not isinstance(timestep, Tensor):
        return float(timestep)
    if timestep.device.type != "cpu" or timestep.numel() == 0:
        return None
    values = timestep.flatten()
    if (values != values[0]).any():
        raise ValueError(
            f"timestep: expected one timestep for the whole batch, got {values.unique().tolist()}"
        )
    return float(values[0])


def _branch_key(call: ModelCall) -> object:
    """What tells guidance branches apart: the labels, or where they or the text live."""
    labels = call.labels
    if labels is not None and labels.device.type == "cpu":
        return tuple(labels.flatten().tolist())
    texts = pytree.tree_leaves(call.text if labels is None else labels)
    return tuple((text.data_ptr(), _version(text), tuple(text.shape)) for text in texts)


def _version(tensor: Tensor) -> int:
    """Changes where a tensor is written to; inference tensors do not count that."""
    return 0 if tensor.is_inference() else tensor._version
