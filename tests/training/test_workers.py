"""Scorers and tools that hang, crash or try to get out."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.rewards import sandbox
from training.rewards.workers import ROOT, Pool

PYTHON = "builtins:eval"


@pytest.fixture
def pool():
    with Pool([PYTHON], workers=2, deadline=1.0) as pool:
        yield pool


def test_a_hanging_call_is_killed_and_the_others_are_not(pool):
    start = time.monotonic()
    results = pool.map(PYTHON, [("1 + 1",), ("[i for i in iter(int, 1)]",), ("__import__('time').sleep(60)",), ("2 + 2",), ("3 + 3",)])
    assert [r.value for r in results] == [2, None, None, 4, 6]
    assert [r.error for r in results] == [None, "timeout", "timeout", None, None] and pool.timeouts == 2
    assert time.monotonic() - start < 40
    assert pool.map(PYTHON, [("5",)])[0].value == 5, "it goes on"


def test_a_crash_and_an_exception_are_results(pool):
    results = pool.map(PYTHON, [("__import__('os')._exit(3)",), ("1 / 0",), ("print('noise') or 4",)])
    assert [r.error for r in results] == ["crash", "ZeroDivisionError: division by zero", None]
    assert pool.crashes == 1 and pool.errors == 1 and results[2].value == 4


def test_a_missing_library_is_no_wrong_answer(pool):
    """A reward of 0 for it would teach the wrong thing."""
    from training.rewards.scorers import NEEDS

    code = f"raise ImportError({NEEDS.format('math-verify')!r})"
    with pytest.raises(ImportError, match="math-verify is not installed: pip install 'qwen3-kernels"):
        pool.map(PYTHON, [(f"exec({code!r})",)])


def test_no_process_is_left(pool):
    pool.map(PYTHON, [("__import__('time').sleep(60)",), ("1",), ("2",)])
    pids = [w.process.pid for w in pool._idle]
    pool.close()
    assert pids and not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_hung_worker_dies_with_its_trainer(tmp_path):
    file = tmp_path / "pid"
    hang = f"[open({str(file)!r}, 'w').write(str(__import__('os').getpid())), __import__('time').sleep(60)]"
    code = (f"from training.rewards.workers import Pool\n"
            f"Pool([{PYTHON!r}], workers=1, deadline=60.0).map({PYTHON!r}, [({hang!r},)])")
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)

    def wait(until):
        end = time.monotonic() + 20
        while not until() and time.monotonic() < end:
            time.sleep(0.05)
        return until()

    try:
        assert wait(lambda: file.exists() and file.read_text()), "the worker hangs"
    finally:
        trainer.kill()
        trainer.wait()
    stat = Path(f"/proc/{file.read_text()}/stat")
    gone = lambda: not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"  # noqa: E731
    assert wait(gone), "the worker is killed"


def test_bad_pools():
    with pytest.raises(ValueError, match="workers is 0"):
        Pool([PYTHON], workers=0)
    with Pool(["training.rewards.nothing:here"]) as pool, pytest.raises(ImportError, match="nothing"):
        pool.map("training.rewards.nothing:here", [()])
    with Pool([PYTHON]) as pool, pytest.raises(ValueError, match="function is 'x:y'"):
        pool.map("x:y", [])


# ---- the sandbox -------------------------------------------------------------------------------------------------------


def test_it_runs_python():
    assert sandbox.run("print(sum(range(10)))\nimport math\nprint(math.pi)") == sandbox.Output("45\n3.141592653589793", "ok")
    failed = sandbox.run("x = [1]\nx[3]")
    assert failed.status == "error" and "IndexError" in failed.text and "line 2" in failed.text
    assert "SyntaxError" in sandbox.run("def").text
    assert sandbox.run("open('note', 'w').write('kept'); print(open('note').read())").text == "kept"
    moved = "import os; os.mkdir('d'); os.chdir('d'); open('a', 'w').write('kept'); os.rename('a', '../b'); print(open('../b').read())"
    assert sandbox.run(moved).text == "kept", "it may move inside its folder"


def test_deadline():
    start = time.monotonic()
    out = sandbox.run("print('before', flush=True)\nwhile True: pass", seconds=1.0)
    assert out.status == "timeout" and out.text == "before\nstopped after 1 seconds" and time.monotonic() - start < 10


@pytest.mark.parametrize("code", [
    "import socket; socket.socket()", "import os; os.system('true')", "import subprocess; subprocess.run(['true'])",
    "import os; os.fork()", "open('/tmp/qwen3-escape', 'w')", "import os; os.open('../x', os.O_CREAT | os.O_WRONLY)",
    "import os; os.kill(1, 0)", "import ctypes; ctypes.CDLL(None)", "import os; os.remove('/tmp/nothing')",
    "import sys; sys.modules['os'].execv('/bin/true', ['true'])", "import os; os.symlink('/etc', 'e')",
    "import os; os.chdir('/tmp'); open('qwen3-escape', 'w')", "import os; os.chdir('/tmp'); os.mkdir('qwen3-escape')",
    "import os; open('a', 'w').close(); os.rename('a', '/tmp/qwen3-escape')",
    "import os; open('a', 'w').close(); os.replace('a', '/tmp/qwen3-escape')",
    "import os; os.open('qwen3-escape', os.O_CREAT | os.O_WRONLY, dir_fd=os.open('/tmp', 0))",
    "import os; os.mkdir('qwen3-escape', dir_fd=os.open('/tmp', os.O_PATH))",
    "import sqlite3; sqlite3.connect('/tmp/qwen3-escape').execute('create table t (x)')",
])
def test_what_it_refuses(code):
    out = sandbox.run(code)
    assert out.status == "error" and ("PermissionError" in out.text or "not allowed" in out.text), out.text
    assert not os.path.exists("/tmp/qwen3-escape")


def test_limits():
    assert "MemoryError" in sandbox.run("x = bytearray(2 << 30)").text
    out = sandbox.run("print('x' * 200_000)")
    assert out.status == "ok" and len(out.text) < sandbox.MAX_OUTPUT + 20
    big = sandbox.run("f = open('f', 'wb')\nfor _ in range(40): f.write(bytes(1 << 20))\nf.flush()")
    assert big.status == "error"
    assert "MY_SECRET" not in sandbox.run("import os; print(os.environ)").text


def test_network_namespace():
    if not sandbox.isolates_network():
        pytest.skip("no network namespaces here")
    assert sandbox.run("print(open('/proc/net/dev').read().count(':'))").text in ("0", "1"), "at most a loopback"
