"""A Python file of the user's as a module."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def module(path: Path) -> ModuleType:
    """Run a file, which may import what lies beside it.

    Raises:
        ValueError: it imports what is not there.
    """
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # Its own name in sys.modules, which dataclasses and pickle look for.
    name = f"_toca_file_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    found = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(found)
    except ImportError as error:
        raise ValueError(f"{path}: {error}") from error
    return found
