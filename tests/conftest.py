import functools
import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is first imported

import pytest  # noqa: E402


def pytest_configure():
    if not torch.cuda.is_available():
        patch_once_a_launch()


def pytest_collection_finish():
    gc.freeze()  # what is imported by now stays, so that no collection need go through it


def patch_once_a_launch():
    """Triton's interpreter puts its functions into triton.language at a launch, and at every call of one jitted function by
    another it goes through all of it again: a third of its time, though after a module's first call nothing is left to do."""
    import triton.language as tl
    from triton.runtime import interpreter

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
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For tiny models: more threads would only wait for each other, long when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
