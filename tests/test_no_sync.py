"""No step waits for a device: the code of a step reads nothing back from its tensors.

Syntax can show reads that are spelled out, not the bool of a tensor in an `if`; on a GPU
tests/test_gpu.py looks at what was really run.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "toca_kernels"

OWN = (
    "branch",
    "cache",
    "graphs",
    "joined",
    "parallel",
    "requests",
    "rows",
    "run",
    "steps",
    "track",
)
STEP_PATH = sorted(
    [
        *(PACKAGE / "triton").glob("*.py"),
        *(PACKAGE / "blocks").glob("*.py"),
        *(PACKAGE / f"{name}.py" for name in OWN),
    ]
)

READS = {"item", "tolist", "numpy", "cpu", "nonzero", "argwhere", "masked_select", "unique"}
SCALARS = {"bool", "int", "float"}

# (file, function): what it reads, and why nothing waits for that.
EXCEPTIONS = {
    ("blocks/linear.py", "checksum"): "weights, once a run and only where oneDNN packs: on a CPU",
    ("track.py", "recomputed"): "the selection, where a run records it for its user to read",
    ("branch.py", "_rows_of"): "tables of the plan, which are NumPy's",
    ("branch.py", "decide"): "tables of the plan, which are NumPy's",
    ("blocks/block.py", "check"): "tables of the plan, which are NumPy's",
    ("steps.py", "read_timestep"): "timesteps, after a return for every device but the CPU",
    ("steps.py", "_branch_key"): "labels, where they are on the CPU",
    ("branch.py", "nan_scores"): "NaNs so far, when a user asks for the summary",
    ("branch.py", "_relative"): "sums of errors, once a run or when a user asks for the summary",
    ("branch.py", "release"): "NaNs and strayed timesteps, once a run, after its last step",
    ("steps.py", "_open"): "Python's own numbers",
    ("cache.py", "drifted"): "the first block's drift, once a step and only with a gate",
    ("branch.py", "_recomputed"): "the selection of all processes, where a run records it",
    ("blocks/split_attention.py", "_received"): "sizes of parts, with diffusers' unequal ones only",
    ("parallel.py", "shares"): "sizes of parts, once a run",
    ("parallel.py", "any"): "whether caches fit on all processes, in the first step of a kind",
    (
        "parallel.py",
        "_filled",
    ): "lengths of rows, which follow from scores where all select together",
    ("blocks/block.py", "added"): "which stream is which, with a gate and streams of one length",
}


def reads(tree: ast.Module) -> Iterator[tuple[str, int, str]]:
    """(function, line, what) of every place that reads values of a tensor, or could."""

    def visit(node: ast.AST, function: str) -> Iterator[tuple[str, int, str]]:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        what = read(node)
        if what:
            yield function, getattr(node, "lineno", 0), what
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(tree, "<module>")


def read(node: ast.AST) -> str:
    """What a node reads, in words; empty if nothing."""
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        to_cpu = name == "to" and any(
            isinstance(a, ast.Constant) and a.value == "cpu" for a in node.args
        )
        if name in READS or to_cpu:
            return ast.unparse(node)
        of_constants = all(isinstance(argument, ast.Constant) for argument in node.args)
        if isinstance(node.func, ast.Name) and node.func.id in SCALARS and not of_constants:
            return ast.unparse(node)
    if isinstance(node, ast.Subscript) and any(map(is_condition, index_parts(node))):
        return f"boolean indexing: {ast.unparse(node)}"
    return ""


def index_parts(node: ast.Subscript) -> list[ast.expr]:
    return node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]


def is_condition(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Invert)
    if isinstance(node, ast.BinOp):
        of_types = isinstance(node.right, ast.Constant) and node.right.value is None
        return isinstance(node.op, ast.BitAnd | ast.BitOr | ast.BitXor) and not of_types
    return isinstance(node, ast.Compare)


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", STEP_PATH, ids=name)
def test_a_step_reads_nothing_back(path):
    found = [
        f"{name(path)}:{line}, {function}: {what}"
        for function, line, what in reads(ast.parse(path.read_text()))
        if (name(path), function) not in EXCEPTIONS
    ]
    assert not found, "\n".join(found)


def test_every_exception_is_needed():
    needed = {
        (name(path), function)
        for path in STEP_PATH
        for function, _, _ in reads(ast.parse(path.read_text()))
    }
    assert set(EXCEPTIONS) <= needed


@pytest.mark.parametrize(
    "code",
    [
        "k = score.argmax().item()",
        "counts.tolist()",
        "torch.nonzero(mask)",
        "x.to('cpu')",
        "x.cpu().numpy()",
        "rows = x[mask > 0]",
        "x[:, ~mask] = 0",
        "x[a & b]",
        "if bool(x.any()): pass",
        "n = int(nan)",
    ],
)
def test_what_is_found(code):
    assert len(list(reads(ast.parse(code)))) >= 1


@pytest.mark.parametrize(
    "code",
    [
        "x[index]",
        "x[:, 0]",
        "x[layer - 1]",
        "x.to('cuda')",
        "x[-1]",
        "float('inf')",
        "gates: list[Tensor | None] = []",
    ],
)
def test_what_is_not(code):
    assert not list(reads(ast.parse(code)))
