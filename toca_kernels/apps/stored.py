"""Arrays in files that are there whole or not at all, and that know what they were made from."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .features import rgb
from .sample_files import to_bytes, whole_file

Arrays = dict[str, NDArray[Any]]
_MARK = "fingerprint"


def save(path: Path, fingerprint: str, arrays: Mapping[str, Any]) -> None:
    """Write arrays as .npz; whoever reads `path` sees the old file or the new, whole."""
    held: dict[str, Any] = {_MARK: np.array(fingerprint), **arrays}
    _whole(path, lambda file: np.savez(file, **held))


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


def save_json(path: Path, values: Any) -> None:
    """Write JSON; whoever reads `path` sees the old file or the new, whole."""
    save_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def save_text(path: Path, text: str) -> None:
    """Write text; whoever reads `path` sees the old file or the new, whole."""
    _whole(path, lambda file: file.write(text.encode()))


def save_samples(path: Path, parts: Sequence[Callable[[], Tensor]]) -> None:
    """Pictures as the ImageNet evaluators read them: `arr_0` of an .npz, uint8 (N, H, W, 3).

    Args:
        path: the file.
        parts: each makes some of the pictures (B, C, H, W) in [0, 1]; one part is in memory at a
            time.

    Raises:
        ValueError: parts of different sizes, or pictures of neither 1 nor 3 channels.
    """
    sizes = [tuple(part().shape) for part in parts]
    if len({size[1:] for size in sizes}) != 1:
        raise ValueError(f"pictures: expected all of one size, got {sorted(set(sizes))}")
    _, _, H, W = sizes[0]
    shape = (sum(size[0] for size in sizes), H, W, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        whole_file(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as entry,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(entry, header)
        for part in parts:
            entry.write(to_bytes(rgb(part().float())).tobytes())


def _whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        write(file)
