"""Every CUDA source compiles for Hopper, and no kernel spills registers or uses a stack frame."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def resource_report(source: Path, out: Path) -> list[tuple[str, int, int]]:
    """(kernel, registers, bytes of stack and spills) of each kernel, from ptxas."""
    done = subprocess.run(
        [NVCC, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", "-gencode=arch=compute_90a,code=sm_90a",
         "-I", str(ROOT / "csrc"), "-cubin", "-o", str(out), str(source)],
        text=True, capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers", done.stderr, re.S,
    )
    return [(name, int(registers), sum(map(int, used))) for name, *used, registers in kernels]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """A report to come for each source; as many compile at a time as there are cores."""
    out = tmp_path_factory.mktemp("cubin")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {s: pool.submit(resource_report, s, out / f"{s.stem}.cubin") for s in SOURCES}


@pytest.mark.skipif(NVCC is None and not os.environ.get("CI"), reason="no nvcc on this machine")
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_compiles_without_spills(source, reports):
    report = reports[source].result()
    assert report, "ptxas named no kernel"
    assert not [k for k in report if k[2] != 0]
    assert max(registers for _, registers, _ in report) <= 255


def test_all_sources_are_in_the_build():
    listed = re.search(r"set\(QWEN3_CUDA_KERNELS (.*?)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()
    assert sorted(listed) == [s.stem for s in SOURCES]
