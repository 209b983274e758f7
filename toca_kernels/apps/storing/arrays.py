"""Arrays in files that are there whole or not at all, and that know what they were made from."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .whole import whole_file

Arrays = dict[str, NDArray[Any]]
_MARK = "fingerprint"


def save(path: Path, fingerprint: str, arrays: Mapping[str, Any]) -> None:
    """Write arrays as .npz; whoever reads `path` sees the old file or the new, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held: dict[str, Any] = {_MARK: np.array(fingerprint), **arrays}
    with whole_file(path) as file:
        np.savez(file, **held)


def read(path: Path, fingerprint: str, names: Collection[str] | None = None) -> Arrays | None:
    """What `save` wrote under this fingerprint; None if there is nothing of it that can be read.

    Args:
        path, fingerprint: as they were saved.
        names: the arrays to read; None reads all.
    """
    try:
        with np.load(path, allow_pickle=False) as held:
            if str(held[_MARK]) != fingerprint:
                return None
            wanted = [name for name in held if name != _MARK] if names is None else names
            return {name: held[name] for name in wanted}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, AttributeError):
        return None  # broken off, cut short or of something else: it is made again
