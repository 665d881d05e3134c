import io
import os
import subprocess
import sys

import pytest
import torch
from processes import Python
from rich.console import Console

from qwen3_kernels import dispatch, doctor, rms_norm, selfcheck


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch):
    monkeypatch.delenv("QWEN3_BACKEND", raising=False)
    dispatch.reset()
    yield
    dispatch.reset()


def chosen(op, device="cpu", dtype=torch.float32):
    return dispatch.explain(op, device, dtype)


@pytest.mark.parametrize("op", [op for op, names in dispatch.PREFERENCE["cpu"].items() if names[0] == "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_runs_the_compiled_kernels(op, dtype):
    choice = chosen(op, dtype=dtype)
    assert (choice.backend, choice.why) == ("cpu", "first choice")
    assert choice.error <= selfcheck.LIMIT


def test_a_dtype_without_a_kernel_falls_back_and_says_so():
    choice = chosen("rms_norm", dtype=torch.float64)
    assert choice.backend == "torch" and "no float64" in choice.why


def test_environment_forces_a_backend(monkeypatch):
    monkeypatch.setenv("QWEN3_BACKEND", "torch")
    dispatch.reset()
    assert all(chosen(op).backend == "torch" for op in dispatch.OPS)
    monkeypatch.setenv("QWEN3_BACKEND", "swiglu=torch")
    dispatch.reset()
    assert chosen("swiglu").backend == "torch" and chosen("rms_norm").backend == "cpu"


@pytest.mark.parametrize("value", ["tritn", "rms_nrm=torch", "rms_norm=", "rms_norm=cpu,swiglu=x"])
def test_unknown_names_in_the_environment_are_refused(monkeypatch, value):
    monkeypatch.setenv("QWEN3_BACKEND", value)
    dispatch.reset()
    with pytest.raises(ValueError, match="QWEN3_BACKEND is .*expected"):
        chosen("rms_norm")


def test_a_named_op_must_run_on_the_named_backend(monkeypatch):
    monkeypatch.setenv("QWEN3_BACKEND", "rms_norm=cpu")
    dispatch.reset()
    with pytest.raises(RuntimeError, match="rms_norm=cpu, but cpu: no float64"):
        chosen("rms_norm", dtype=torch.float64)


def test_use_refuses_unknown_names():
    with pytest.raises(ValueError, match="'gpu'"), dispatch.use("gpu"):
        pass
    with pytest.raises(ValueError, match="layer_norm"), dispatch.use("cpu", "layer_norm"):
        pass


def test_use_nests_and_restores():
    with dispatch.use("torch"):
        with dispatch.use("cpu", "rms_norm"):
            assert dispatch.resolve("rms_norm", "cpu", torch.float32) == "cpu"
            assert dispatch.resolve("swiglu", "cpu", torch.float32) == "torch"
        assert dispatch.resolve("rms_norm", "cpu", torch.float32) == "torch"
    assert dispatch.resolve("rms_norm", "cpu", torch.float32) == "cpu"


def test_a_wrong_kernel_is_found_and_not_used(monkeypatch):
    module = dispatch.backend("rms_norm", "cpu")
    right = module.forward

    def wrong(x, weight, residual, eps):
        y, h, rstd = right(x, weight, residual, eps)
        return y * 1.01, h, rstd

    monkeypatch.setattr(module, "forward", wrong)
    with pytest.warns(UserWarning, match="rms_norm on backend 'cpu' is not used: self-check error"):
        choice = chosen("rms_norm")
    assert choice.backend == "torch" and "self-check error" in choice.why
    console = Console(file=io.StringIO(), width=200)
    assert doctor.main(console) == 1
    assert "self-check error" in console.file.getvalue()


def test_a_kernel_that_raises_is_not_used(monkeypatch):
    def broken(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr(dispatch.backend("rms_norm", "cpu"), "backward", broken)
    with pytest.warns(UserWarning, match="boom"):
        assert chosen("rms_norm").backend == "torch"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_first_call_without_gradients_still_checks_the_backward(mode):
    with mode():
        choice = chosen("rms_norm")
    assert choice.backend == "cpu" and choice.error <= selfcheck.LIMIT


def test_the_self_check_would_see_one_part_in_a_hundred():
    x = torch.randn(64)
    assert selfcheck.error_ratio(x * 1.01, x, x.double()) > 100
    assert selfcheck.error_ratio(torch.full((64,), float("nan")), x, x.double()) == float("inf")


def test_doctor_command():
    done = subprocess.run([sys.executable, "-m", "qwen3_kernels", "doctor"], text=True, capture_output=True,
                          env=os.environ | {"COLUMNS": "160"})
    assert done.returncode == 0, done.stderr
    for word in (*dispatch.PREFERENCE["cpu"], "bfloat16", "first choice", "torch"):
        assert word in done.stdout
    wrong = Python("-m", "qwen3_kernels", "cure")
    assert "invalid choice" in wrong.communicate()[1] and wrong.returncode == 2


def test_compiled_graphs_follow_use():
    x, w = torch.randn(3, 16), torch.randn(16)
    compiled = torch.compile(lambda: rms_norm(x, w), fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    with dispatch.use("torch"):
        torch.testing.assert_close(compiled(), rms_norm(x, w))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("op", selfcheck.PAIRS)
def test_a_second_gpu_in_one_process_gives_the_same(op):
    function, _ = selfcheck.PAIRS[op]
    inputs = selfcheck.inputs_for(op, "cuda", torch.bfloat16)
    first, second = (
        selfcheck.outputs_and_grads(function, {n: t.to(f"cuda:{i}") for n, t in inputs.items()}) for i in (0, 1)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.cpu(), b.cpu())
