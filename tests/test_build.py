"""What is built, what it links to, and what happens where it is not there."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The C and C++ run times and OpenMP: on every Linux machine that runs PyTorch.
SYSTEM_LIBRARIES = re.compile(
    r"(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|libgomp|ld-linux[-\w]*)\.so\.\d+"
)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) is not installed")
def test_extension_links_system_libraries_only():
    """Torch or the CUDA driver here would tie the package to one version or one machine."""
    spec = importlib.util.find_spec("toca_kernels._C")
    assert spec is not None, "toca_kernels._C is not built: pip install -e ."
    dynamic = subprocess.run(
        ["readelf", "--dynamic", "--wide", spec.origin], check=True, capture_output=True, text=True
    ).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert needed
    assert [name for name in needed if not SYSTEM_LIBRARIES.fullmatch(name)] == []
    assert re.findall(r"\((?:RPATH|RUNPATH)\).*", dynamic) == []


def test_build_does_not_require_torch():
    """Build isolation would install the newest torch, gigabytes of it, to no purpose."""
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(
        r"^\[build-system\].*?^requires = \[(.*?)\]", text, re.DOTALL | re.MULTILINE
    )
    assert requires is not None
    assert "pybind11" in requires[1]
    assert "torch" not in requires[1]


@pytest.mark.slow
@pytest.mark.parametrize("cuda", ["AUTO", "OFF"])
def test_wheel_builds_under_isolation(cuda, tmp_path):
    """From a copy without build products, in an environment without torch, with and without CUDA.

    The wheel then imports here, and says what is in it.
    """
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("csrc", "toca_kernels"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)

    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "-w", str(tmp_path)]
    environment = {**os.environ, "CMAKE_ARGS": f"-DTOCA_CUDA={cuda}"}
    build = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert build.returncode == 0, build.stdout + build.stderr

    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if re.fullmatch(r"toca_kernels/_C\..*\.so", name)], names
    assert {re.split("[-/]", name)[0] for name in names} == {"toca_kernels"}
    for page in ("css", "js"):  # of `toca report`
        assert f"toca_kernels/apps/reporting/page.{page}" in names

    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    program = "import toca_kernels; print(toca_kernels.backends()['native'].reason)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=installed
    )
    assert run.returncode == 0, run.stderr
    compiled_in = cuda == "AUTO" and shutil.which("nvcc") is not None
    assert ("CUDA bodies: compiled in" in run.stdout) == compiled_in, run.stdout


def test_import_without_the_extension():
    """The package still imports, runs its reference, and says what is missing."""
    program = """
import sys
sys.modules["toca_kernels._C"] = None  # makes every import of it an ImportError
import toca_kernels
for name, status in toca_kernels.backends().items():
    print(name, status.available, status.reason, sep="|")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    status = {line.split("|")[0]: line.split("|")[1:] for line in run.stdout.splitlines()}
    assert status["reference"][0] == "True"
    assert status["native"][0] == "False"
    assert "_C" in status["native"][1]
