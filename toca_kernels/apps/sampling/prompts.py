"""What to draw: prompt lists and class lists, in the formats that the benchmarks come in."""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# What the column or key of a prompt is called, the first that is there.
_NAMES = ("prompt_en", "prompt", "prompts", "caption", "captions", "text")
_IMAGENET_CLASSES = 1000
_SYNSET = re.compile(r"n\d{8}\b")
_RANGE = re.compile(r"(\d+)\s*(?:(?:-|\.\.)\s*(\d+))?")


def asked(args: argparse.Namespace) -> Sequence[int | str]:
    """The conditions that a command line asks for, by --prompts or --classes."""
    if args.prompts is not None:
        return read_prompts(args.prompts)
    return read_classes(args.classes)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file, in its order.

    The ending says how it is read:

        .txt          one prompt a line (VBench's prompts/*.txt); empty lines are left out
        .csv, .tsv    the column Prompts, Prompt, Caption or Text (DrawBench, PartiPrompts)
        .json         captions of COCO: the first one of each image; VBench_full_info.json and
                      other lists of objects with prompt_en, prompt, caption or text; objects of
                      such objects (MJHQ); a plain list
        .jsonl        one such object, or string, a line (GenEval)

    Raises:
        ValueError: another ending, a file that is not what its ending says, or no prompt in it.
        OSError: it cannot be read.
    """
    path = Path(path)
    readers = {
        ".txt": str.splitlines,
        ".csv": lambda text: _table(text, ","),
        ".tsv": lambda text: _table(text, "\t"),
        ".json": lambda text: _prompts(json.loads(text)),
        ".jsonl": lambda text: _prompts([json.loads(line) for line in _lines(text)]),
    }
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(readers)}")
    try:
        found = readers[path.suffix.lower()](_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    prompts = [" ".join(prompt.split()) for prompt in found if prompt.strip()]
    if not prompts:
        raise ValueError(f"{path}: expected prompts, got none")
    return prompts


def read_classes(text_or_path: str | Path) -> list[int]:
    """Class numbers: of a text like "0-9" or "207,360,0-4", or of a file.

    A file holds numbers and such ranges; or ImageNet's 1000 synsets, one a line and with or without
    words behind (LOC_synset_mapping.txt), whose numbers are their places in sorted order; or, in
    JSON, a list of numbers or an object with the numbers as keys (imagenet_class_index.json).

    Raises:
        ValueError: something else, a range that runs down, or no class at all.
        OSError: the file cannot be read.
    """
    given = str(text_or_path)
    if _is_range_list(given):
        classes = _ranges(given)
    elif not Path(given).is_file():
        raise ValueError(f'classes: expected a file or numbers like "0-9" or "1,5", got {given!r}')
    else:
        path = Path(given)
        try:
            text = _text(path)
            found = _json_classes(text) if path.suffix.lower() == ".json" else _listed(text)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        classes = found
    if not classes:
        raise ValueError(f"classes: expected some, got none in {given!r}")
    return classes


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark before the first column


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


# --- prompts -------------------------------------------------------------------------------------


def _table(text: str, delimiter: str) -> list[str]:
    rows = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    columns = {name.strip().lower(): name for name in rows.fieldnames or () if name}
    column = next((columns[name] for name in _NAMES if name in columns), None)
    if column is None:
        raise ValueError(f"expected a column {', '.join(_NAMES[1:])}, got {', '.join(columns)}")
    return [row[column] or "" for row in rows]


def _prompts(found: Any) -> list[str]:
    """Of parsed JSON."""
    if isinstance(found, dict) and isinstance(found.get("annotations"), list):
        return _first_captions(found["annotations"])
    if isinstance(found, dict):
        found = list(found.values())
    if not isinstance(found, list):
        raise ValueError(f"expected a list or an object of prompts, got {type(found).__name__}")
    return [_prompt(entry) for entry in found]


def _prompt(entry: Any) -> str:
    if isinstance(entry, dict):
        lower = {str(name).lower(): value for name, value in entry.items()}
        entry = next((lower[name] for name in _NAMES if name in lower), entry)
    if not isinstance(entry, str):
        raise ValueError(f"expected prompts or objects with {', '.join(_NAMES)}, got {entry!r:.80}")
    return entry


def _first_captions(annotations: Iterable[Any]) -> list[str]:
    """COCO has about five captions for each image; the first one listed stands for it."""
    captions: dict[Any, str] = {}
    for entry in annotations:
        if not isinstance(entry, dict) or "image_id" not in entry:
            raise ValueError(f"expected annotations with image_id and caption, got {entry!r:.80}")
        captions.setdefault(entry["image_id"], _prompt(entry))
    return list(captions.values())


# --- classes -------------------------------------------------------------------------------------


def _is_range_list(text: str) -> bool:
    parts = re.split(r"[,\s]+", text.strip())
    return all(_RANGE.fullmatch(part) for part in parts)


def _ranges(text: str) -> list[int]:
    classes: list[int] = []
    for part in re.split(r"[,\s]+", text.strip()):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f'expected numbers and ranges like "0-9", got {part!r}')
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"expected a range that runs up, got {part!r}")
        classes.extend(range(first, last + 1))
    return classes


def _listed(text: str) -> list[int]:
    lines = _lines(text)
    synsets = [match[0] for line in lines if (match := _SYNSET.match(line.strip()))]
    if not synsets:
        return _ranges(text) if lines else []
    if len(synsets) != len(lines) or len(set(synsets)) != _IMAGENET_CLASSES:
        raise ValueError(
            f"expected ImageNet's {_IMAGENET_CLASSES} synsets, for their order gives the numbers, "
            f"got {len(set(synsets))} in {len(lines)} lines"
        )
    places = {synset: place for place, synset in enumerate(sorted(synsets))}
    return [places[synset] for synset in synsets]


def _json_classes(text: str) -> list[int]:
    found = json.loads(text)
    numbers = list(found) if isinstance(found, (dict, list)) else [found]
    try:
        classes = [int(number) for number in numbers]
    except (TypeError, ValueError):
        raise ValueError(f"expected class numbers, got {numbers[:3]!r:.80}") from None
    if any(number < 0 for number in classes):
        raise ValueError("expected class numbers of at least 0")
    return classes
