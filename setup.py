"""Builds the compiled core with CMake and Ninja; metadata is in pyproject.toml.

Environment: QWEN3_CUDA=0|1|auto (default auto: build CUDA kernels when nvcc is found), QWEN3_CUDA_ARCHS (default "90a",
semicolon-separated compute capabilities), CMAKE_BUILD_PARALLEL_LEVEL.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def wants_cuda() -> bool:
    choice = os.environ.get("QWEN3_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"QWEN3_CUDA is {choice!r}; expected 0, 1 or auto")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if choice == "1" and nvcc is None:
        raise SystemExit("QWEN3_CUDA=1, but no nvcc is on PATH or in /usr/local/cuda/bin; install CUDA or set QWEN3_CUDA=0")
    return choice != "0" and nvcc is not None


class CMakeBuild(build_ext):
    """One CMake configure and build for all extensions; the modules land where setuptools expects them."""

    def run(self) -> None:
        import pybind11  # here, so that wrong options are told without it

        out = Path(self.get_ext_fullpath("qwen3_kernels._cpu")).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        subprocess.run([
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",  # a cached one may lie in a build environment that is gone
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DQWEN3_OUTPUT_DIR={out}", f"-DQWEN3_CUDA={'ON' if wants_cuda() else 'OFF'}",
            f"-DQWEN3_CUDA_ARCHS={os.environ.get('QWEN3_CUDA_ARCHS', '90a')}",
        ], check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


extensions = [Extension("qwen3_kernels._cpu", [])]
if wants_cuda():
    extensions.append(Extension("qwen3_kernels._cuda", []))
setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
