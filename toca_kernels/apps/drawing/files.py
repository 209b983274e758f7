"""The files of a run: written whole or not at all, with checksums, so that it can be resumed.

run.json                 all settings; a folder belongs to one run
samples.jsonl            what each sample shows
000000.png               a picture for each sample (of videos 000000_0000.png for each frame),
batches/000000.npz         or one file for each batch of samples
batches/000000.json      checksums of a batch's files; written last, so the batch is done
samples_NxHxWx3.npz      of .npz batches: all of them in one file, as evaluators read it
done.json                its checksum
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..storing.pictures import rgb, save_npz, to_bytes
from ..storing.whole import remove_partials, whole_file

FORMATS = ("png", "npz", "safetensors")
RUN, DONE, SAMPLES, BATCHES = "run.json", "done.json", "samples.jsonl", "batches"
_CHUNK = 1 << 22


# --- writing -------------------------------------------------------------------------------------


def write(path: Path, content: bytes) -> str:
    """Write a file unless it is there with this content; returns its checksum."""
    digest = hashlib.sha256(content).hexdigest()
    if checksum(path) != digest:
        with whole_file(path) as file:
            file.write(content)
    return digest


def checksum(path: Path) -> str | None:
    """sha256 of a file; None if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()


def dump(content: Any) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


# --- a batch -------------------------------------------------------------------------------------


def is_done(folder: Path, batch: int) -> bool:
    """Whether all files of a batch are there and whole."""
    try:
        files = json.loads(_record(folder, batch).read_bytes())["files"]
        return bool(files) and all(checksum(folder / n) == digest for n, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def count_done(folder: Path) -> int:
    """How many batches are recorded as done; their files are not looked at."""
    return sum(1 for _ in (folder / BATCHES).glob("*.json"))


def save_batch(
    folder: Path, batch: int, kind: str, indices: Sequence[int], rows: Tensor, parts: Sequence[int]
) -> None:
    """Write the files of a batch, then its record.

    Args:
        folder: of the run.
        batch: its number.
        kind: one of FORMATS.
        indices: numbers of its samples.
        rows: samples in [0, 1], or latents for "safetensors".
        parts: how many samples were drawn at a time, where that was less than the batch.
    """
    files = {
        name: write(folder / name, content)
        for name, content in _contents(kind, batch, indices, rows)
    }
    record: dict[str, Any] = {"files": files}
    if len(parts) > 1:
        record["parts"] = list(parts)
    write(_record(folder, batch), dump(record))


def forget(folder: Path, batch: int) -> None:
    """A batch whose files are not whole is not done."""
    _record(folder, batch).unlink(missing_ok=True)


def _record(folder: Path, batch: int) -> Path:
    return folder / BATCHES / f"{batch:06d}.json"


def batch_file(batch: int, kind: str) -> str:
    return f"{BATCHES}/{batch:06d}.{kind}"


def _contents(
    kind: str, batch: int, indices: Sequence[int], rows: Tensor
) -> Iterator[tuple[str, bytes]]:
    if kind == "png":
        for index, pixels in zip(indices, to_bytes(rows), strict=True):
            if pixels.ndim == 3:
                yield f"{index:06d}.png", _png(pixels)
            else:
                for number, frame in enumerate(pixels):
                    yield f"{index:06d}_{number:04d}.png", _png(frame)
    elif kind == "npz":
        buffer = io.BytesIO()
        np.savez(buffer, arr_0=to_bytes(rgb(rows)))
        yield batch_file(batch, kind), buffer.getvalue()
    else:
        try:
            from safetensors.torch import save
        except ImportError:
            raise ValueError("safetensors is missing: pip install safetensors") from None
        named = {"latents": rows.contiguous(), "index": torch.tensor(indices)}
        yield batch_file(batch, kind), save(named)


def _png(pixels: NDArray[Any]) -> bytes:
    try:
        from PIL import Image
    except ImportError:
        raise ValueError("png: Pillow is missing: pip install pillow") from None
    if pixels.shape[-1] not in (1, 3, 4):
        raise ValueError(f"png: expected pictures of 1, 3 or 4 channels, got {pixels.shape[-1]}")
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "png")
    return buffer.getvalue()


# --- all samples in one file ---------------------------------------------------------------------


def assembled(folder: Path) -> Path | None:
    """The file of all samples, if it is there and whole."""
    try:
        done = json.loads((folder / DONE).read_bytes())
        path = folder / done["file"]
        return path if checksum(path) == done["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def assemble(folder: Path, batches: int, count: int) -> Path:
    """One .npz of all batches: `arr_0`, uint8 (N, H, W, 3), of videos (N, F, H, W, 3).

    One batch at a time is in memory.
    """
    shape = _array(folder, 0).shape[1:]
    path = folder / f"samples_{'x'.join(map(str, (count, *shape)))}.npz"
    save_npz(path, (count, *shape), _arrays(folder, batches, shape))
    write(folder / DONE, dump({"file": path.name, "sha256": checksum(path)}))
    return path


def _arrays(folder: Path, batches: int, shape: tuple[int, ...]) -> Iterator[NDArray[Any]]:
    for batch in range(batches):
        part = _array(folder, batch)
        if part.shape[1:] != shape:
            raise ValueError(
                f"{batch_file(batch, 'npz')}: expected samples of the shape {shape} as in "
                f"the first batch, got {part.shape[1:]}"
            )
        yield part


def _array(folder: Path, batch: int) -> NDArray[Any]:
    with np.load(folder / batch_file(batch, "npz")) as archive:
        found: NDArray[Any] = archive["arr_0"]
    return found


# --- whose folder it is --------------------------------------------------------------------------


def make(folder: Path) -> None:
    """The folder of a run.

    Raises:
        OSError: it cannot be made; the message says why.
    """
    try:
        (folder / BATCHES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder}: cannot be made: {error.strerror}") from error


def claim(folder: Path, settings: Mapping[str, Any], samples: bytes) -> None:
    """Make the folder this run's, or find that it is.

    Args:
        folder: made and locked.
        settings: all that the files depend on.
        samples: content of samples.jsonl.

    Raises:
        ValueError: it is another run's, or has samples of nobody knows whom.
        OSError: it cannot be written to.
    """
    if (folder / RUN).exists():
        _compare(folder, settings)
    else:
        strange = next(
            (path for path in sorted(folder.iterdir()) if path.suffix[1:] in FORMATS), None
        )
        if strange is not None:
            raise ValueError(
                f"{folder}: expected an empty folder or one of this run, but it has {strange.name} "
                f"and no {RUN}; give another --out"
            )
    for place in (folder, folder / BATCHES):
        remove_partials(place)
    write(folder / RUN, dump(settings))
    write(folder / SAMPLES, samples)


def _compare(folder: Path, settings: Mapping[str, Any]) -> None:
    try:
        before = json.loads((folder / RUN).read_bytes())
        names = sorted({*before, *settings})
        now = json.loads(dump(settings))
    except (ValueError, TypeError):
        raise ValueError(f"{folder / RUN}: expected a run's settings; give another --out") from None
    different = [
        f"{name}: {_short(before.get(name))} there, {_short(now.get(name))} now"
        for name in names
        if before.get(name) != now.get(name)
    ]
    if different:
        raise ValueError(
            f"{folder} belongs to another run ({'; '.join(different)}); "
            "give the same settings to go on with it, or another --out"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def saved_setting(folder: Path, name: str) -> Any:
    """A setting of the run that the folder belongs to; None if there is none."""
    try:
        return json.loads((folder / RUN).read_bytes()).get(name)
    except (OSError, ValueError, AttributeError):
        return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one run writes to a folder at a time; a killed one lets go of it.

    Raises:
        ValueError: another run does.
    """
    import fcntl

    at = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(at, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another run is writing there") from None
        except OSError:
            pass  # a file system without locks: whole files make a second run wasteful, not wrong
        yield
    finally:
        os.close(at)
