"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_PARTIAL = ".partial"


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its place when the block ends, and leaves nothing if it fails.

    Raises:
        OSError: it cannot be written; the message says where and why.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"{reason}; make room and run the same command again, it goes on from here"
        raise OSError(f"{path}: cannot be written: {reason}") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def remove_partials(folder: Path) -> None:
    """What a process that was killed left half written."""
    for path in folder.glob(f".*{_PARTIAL}"):
        path.unlink(missing_ok=True)


def save_json(path: Path, values: Any) -> None:
    """Write JSON; whoever reads `path` sees the old file or the new, whole."""
    save_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def save_text(path: Path, text: str) -> None:
    """Write text; whoever reads `path` sees the old file or the new, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(text.encode())
