import dataclasses
import functools
import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is first imported

import pytest  # noqa: E402


def pytest_configure():
    if not torch.cuda.is_available():
        quicken_the_interpreter()


def pytest_collection_finish():
    gc.freeze()  # what is imported by now stays, so that no collection need go through it


def quicken_the_interpreter():
    """Half of its time goes into what changes nothing. It computes for every sum of integers whether it overflowed, and drops
    that, since an assertion outside of debug mode does nothing. And what it puts into triton.language at a launch, it
    looks for again at every call of one jitted function by another."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    patch, patched = interpreter._patch_lang, set()

    @functools.cache
    def modules(function):
        return {m for m in (tl, tl.core) if any(m is value for value in function.__globals__.values())}

    def once(function):
        if modules(function) <= patched:
            return None  # a call within a launch, which asks for no answer
        scope = patch(function)
        restore = scope.restore

        def restored():
            patched.clear()
            restore()

        scope.restore = restored
        patched.update(modules(function))
        return scope

    interpreter._patch_lang = once


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seed_and_one_thread():
    """Of small work, more threads would mostly wait for each other: on a busy machine fifty times as long as the work takes.
    Tests of what their number may change say how many."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
