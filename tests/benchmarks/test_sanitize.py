import pytest
import torch

from benchmarks import sanitize
from qwen3_kernels import dispatch


def test_every_kernel_of_a_backend_runs(capsys):
    sanitize.main(["--backend", "cpu", "rms_norm", "attention"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{op} on cpu in {dtype}: {n} cases" for op, n in (("rms_norm", 1), ("attention", 3)) for dtype in ("float32", "bfloat16")
    ]


def test_what_cannot_run_is_said(capsys):
    for args, words in ((["nope"], "OP is ['nope']; expected some of"), (["--backend", "cpu", "moe_router"], "no kernel of these")):
        with pytest.raises(SystemExit, match="2"):
            sanitize.main(args)
        assert words in capsys.readouterr().err


def test_every_op_has_cases():
    for op in dispatch.OPS:
        assert all(isinstance(t, torch.Tensor) for _, inputs in sanitize.cases(op, "cpu", torch.float32) for t in inputs.values())
