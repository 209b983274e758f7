"""Imports run one way, and `import toca_kernels` brings in nothing that it does not need."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "toca_kernels"

# A module imports from the lines below its own, and a package (models, blocks) from itself.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["apps"],
    ["__init__"],  # the public names
    ["diffusers"],
    ["session"],
    ["recorder", "requests"],
    ["trace"],
    ["summary"],
    ["graphs"],
    ["scheduler"],
    ["memory"],
    ["run"],
    ["joined", "steps"],
    ["branch"],
    ["chooser", "modulation", "offload", "room"],
    ["done"],
    ["models"],
    ["blocks"],
    ["selectors"],
    ["cache"],
    ["track"],
    ["copies", "parallel", "rows"],
    ["ops"],
    ["_backends", "_library"],
    ["reference", "native", "triton"],
    ["features"],
    ["_checks"],
    ["_C"],
    ["config"],
    ["flops"],
    ["plan"],
    ["presets"],
]
LAYER = {name: depth for depth, names in enumerate(LAYERS) for name in names}

# The same within apps; the commands are above all of its packages, and import none of each other.
APPS = [
    ["drawing", "reporting", "tuning"],
    ["evaluation"],
    ["measuring", "sampling"],
    ["storing"],
]
APP = {name: depth for depth, names in enumerate(APPS) for name in names}

# Upwards or sideways all the same, each for its reason.
EXCEPTIONS = {
    ("native", "reference"),  # the GEMMs of mlp_rows are the library's in both
    ("plan", "flops"),  # Plan.flops, a method for convenience, imports when it is called
    ("config", "memory"),  # ToCaConfig.memory, likewise
}

# Plain numbers, known before a run: a plan must not need torch.
NUMPY_ONLY = {"config", "plan", "flops", "presets"}


def parts(path: Path) -> tuple[str, ...]:
    names = path.relative_to(PACKAGE).with_suffix("").parts
    return names[:-1] if names[1:] and names[-1] == "__init__" else names


MODULES = {parts(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_module(name: tuple[str, ...]) -> bool:
    path = PACKAGE.joinpath(*name[1:])
    ours = name[0] == "toca_kernels"
    return name[-1] == "_C" or (ours and (path.is_dir() or path.with_suffix(".py").exists()))


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from run_time_nodes(child)


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Every module that a file imports at run time, at its top or inside a function.

    One of the package comes as ("toca_kernels", "blocks", "self_mlp"), any other as ("torch",).
    """
    package = ("toca_kernels", *path.relative_to(PACKAGE).parts[:-1])
    for node in run_time_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            # `from . import native` imports a module, `from . import backends` a name of one.
            for alias in node.names:
                yield (*base, alias.name) if is_module((*base, alias.name)) else base


def test_the_walk_sees_imports_of_every_form(tmp_path, monkeypatch):
    path = tmp_path / "blocks" / "one.py"
    path.parent.mkdir()
    (path.parent / "two.py").touch()
    (tmp_path / "ops.py").touch()
    path.write_text(
        "import os.path\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from ..session import Session\n"
        "from . import two\n"
        "from .three import name\n"
        "from .. import backends, ops\n"
        "def late():\n    from ..cache import TokenCache\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert {".".join(name) for name in imports(path)} == {
        "os.path",
        "typing",
        "toca_kernels.blocks.two",
        "toca_kernels.blocks.three",
        "toca_kernels",
        "toca_kernels.ops",
        "toca_kernels.cache",
    }


@pytest.mark.parametrize("module", MODULES, ids=".".join)
def test_imports_run_one_way(module):
    unit = module[0]
    assert unit in LAYER, f"{unit}: give the new module its place in LAYERS"
    for name in imports(MODULES[module]):
        if name[0] != "toca_kernels":
            continue
        target = (*name, "__init__")[1]
        if target == unit or (unit, target) in EXCEPTIONS:
            continue
        assert target in LAYER, f"{'.'.join(module)} imports {target}, which has no place in LAYERS"
        assert LAYER[target] > LAYER[unit], (
            f"{'.'.join(module)} imports {'.'.join(name)}, which is not below it"
        )


@pytest.mark.parametrize("module", [one for one in MODULES if one[0] == "apps"], ids=".".join)
def test_imports_of_the_apps_run_one_way(module):
    unit = (*module, "__init__")[1]
    command = len(module) == 2 and unit not in APP
    for name in imports(MODULES[module]):
        if name[:2] != ("toca_kernels", "apps"):
            continue
        target = name[2]
        assert target in APP, f"{'.'.join(module)} imports {target}, which has no place in APPS"
        if not command and target != unit:
            assert APP[target] > APP[unit], (
                f"{'.'.join(module)} imports {'.'.join(name)}, which is not below it"
            )


@pytest.mark.parametrize("module", [one for one in MODULES if one[0] == "apps"], ids=".".join)
def test_apps_import_no_private_names(module):
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert [one.name for one in node.names if re.match(r"_[^_]", one.name)] == []


@pytest.mark.parametrize("module", sorted(NUMPY_ONLY))
def test_plans_need_no_torch(module):
    assert "torch" not in {name[0] for name in imports(PACKAGE / f"{module}.py")}


def test_import_is_lean():
    """Optional packages are imported where they are used; the compiler of torch costs seconds."""
    script = """
import sys
import numpy, torch
before = set(sys.modules)
import toca_kernels
print(*{name.split(".")[0] for name in set(sys.modules) - before if "." not in name})
print(*(name for name in set(sys.modules) - before if name.startswith("torch._")))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    packages, of_torch = (set(line.split()) for line in done.stdout.split("\n")[:2])
    assert "toca_kernels" in packages
    third_party = packages - set(sys.stdlib_module_names) - {"toca_kernels"}
    assert third_party == set()
    assert {"torch._dynamo", "torch._inductor"} & of_torch == set()
