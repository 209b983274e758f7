"""Builds toca_kernels._C with CMake. Everything else about the package is in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def tool(name: str) -> str:
    """Path of a build tool: on PATH, or beside an interpreter whose environment is not active."""
    path = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if path is None:
        raise SystemExit(f"{name} is needed to build toca_kernels: pip install {name}")
    return path


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        # Our own directory, not build_temp: that one is new in every editable install, and this
        # one lets a second build compile only what changed.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # Under build isolation these paths die with the build, so none may come from CMake's cache.
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "TOCA_CUDA": "AUTO",  # said again in every build: the cache would keep an earlier OFF
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))  # last, so that it wins
        cmake = tool("cmake")
        for step in (
            [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *defines, *extra],
            [cmake, "--build", build],
            [cmake, "--install", build, "--prefix", target],
        ):
            if subprocess.run(step).returncode:
                raise SystemExit("toca_kernels._C was not built; the reason is above")


# `depends` is what puts the C++ side into a source distribution.
sources = ["CMakeLists.txt", *(str(f.relative_to(ROOT)) for f in ROOT.glob("csrc/**/*.*"))]
setup(
    ext_modules=[Extension("toca_kernels._C", sources=[], depends=sorted(sources))],
    cmdclass={"build_ext": CMakeBuild},
)
