"""What a block's step reads and writes of its caches: for whoever brings them."""

from __future__ import annotations

from ..ops import ForecastCache
from .block import Block, BlockState


def decided(block: Block) -> dict[str, tuple[str, str]]:
    """Name -> (module whose full steps write it, module whose selected rows cached steps write).

    Keys and values of a text are written in full steps only; they have "" there.
    """
    names = {name: (name, name) for name in block.modules}
    for tap in (one.tap for one in block.taps):
        for name in tap.outputs:
            names.setdefault(name, (tap.decides, ""))
        if tap.rowwise:
            names |= dict.fromkeys(tap.kept_keys, (tap.outputs[0], tap.outputs[0]))
        if tap.queries:
            names[tap.entropy] = (tap.outputs[0], tap.selection)
    return names


def read(block: Block, state: BlockState) -> list[str]:
    """The names whose old features a block's step depends on."""
    names = []
    for name, (decides, _) in decided(block).items():
        if name not in state.features:
            continue
        kept = state.features[name]
        compared = state.changes is not None and name in state.scores and state.valid[name]
        extends = isinstance(kept, ForecastCache) and kept.computed > 0
        if not state.full[decides] or compared or extends:
            names.append(name)
    return names


def written(block: Block, state: BlockState) -> list[str]:
    """The names of features that a block's step has changed."""
    entropies = {one.tap.entropy for one in block.taps if one.tap.queries}
    names = []
    for name, (decides, rows) in decided(block).items():
        if name not in state.features:
            continue
        if state.full[decides]:
            changed = name not in entropies or state.selector == "entropy"
        else:
            changed = rows in state.index and state.index[rows].shape[1] > 0
            changed = changed and (name not in entropies or state.refreshes)
        if changed:
            names.append(name)
    return names
