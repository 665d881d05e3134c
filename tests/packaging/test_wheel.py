"""The package as a user gets it: a wheel built in isolation, in an empty environment, away from the sources."""

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENV = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET", "QWEN3_BACKEND")}


def run(*command, cwd, timeout=500, **env) -> str:
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=ENV | env, timeout=timeout, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources, so that no earlier build helps."""
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    skip = shutil.ignore_patterns(".git", ".venv", "build", "runs", "*.so", "*.egg-info", "__pycache__", ".*_cache", ".whl")
    shutil.copytree(ROOT, source, ignore=skip)
    start = time.monotonic()
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", out, source, cwd=out, QWEN3_CUDA="0")
    assert time.monotonic() - start < 180, "the CPU build has a budget of three minutes"
    (path,) = out.glob("qwen3_kernels-*.whl")
    return path


def test_build_requirements_do_not_include_torch():
    requires = re.search(r"\[build-system\]\s+requires = (\[.*?\])", (ROOT / "pyproject.toml").read_text(), re.S)
    assert "torch" not in requires[1]


def test_wheel_holds_the_core_and_links_no_torch(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        (core,) = [n for n in names if re.fullmatch(r"qwen3_kernels/_cpu\..*\.so", n)]
        z.extract(core, tmp_path)
    assert "qwen3_model/configs.json" in names
    assert not [n for n in names if n.startswith(("tests/", "csrc/", "docs/"))]
    needed = run("readelf", "-d", tmp_path / core, cwd=tmp_path)
    assert "libgomp" in needed and "torch" not in needed and "c10" not in needed


@pytest.mark.slow
def test_wheel_works_in_an_empty_environment(wheel, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path)
    code = """
import torch, qwen3_kernels
from qwen3_kernels import dispatch
assert "site-packages" in qwen3_kernels.__file__, qwen3_kernels.__file__
for op, names in dispatch.PREFERENCE["cpu"].items():
    if names[0] != "cpu":  # plain torch is the choice
        continue
    choice = dispatch.explain(op, "cpu", torch.bfloat16)
    assert choice.backend == "cpu", choice
x = torch.randn(4, 64, requires_grad=True)
qwen3_kernels.rms_norm(x, torch.ones(64)).sum().backward()
assert x.grad.isfinite().all()
print("works")
"""
    assert "works" in run(python, "-c", code, cwd=tmp_path)
    assert "rms_norm" in run(python, "-m", "qwen3_kernels", "doctor", cwd=tmp_path)
    assert "596,049,920" in run(tmp_path / "venv/bin/qwen3", "info", "Qwen3-0.6B", cwd=tmp_path)


@pytest.mark.parametrize("value, words", [("yes", "expected 0, 1 or auto"), ("1", "no nvcc")])
def test_bad_build_options_are_refused(value, words, tmp_path):
    # a PATH without nvcc; a machine with /usr/local/cuda has one all the same
    if value == "1" and Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("/usr/local/cuda/bin/nvcc is found whatever PATH says")
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, env=ENV | {"QWEN3_CUDA": value, "PATH": str(tmp_path)},
        text=True, capture_output=True,
    )
    assert done.returncode != 0 and words in done.stderr
