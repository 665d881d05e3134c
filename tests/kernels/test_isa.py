"""Every instruction set that this machine runs, each in a process of its own, since the choice is made once."""

import json

import pytest
from processes import Python

from qwen3_kernels import dispatch, selfcheck

ISAS = ("scalar", "avx2", "avx512")
SCRIPT = """
import json, torch
from qwen3_kernels import dispatch, selfcheck
from qwen3_kernels.cpu._core import core

isa, errors, left_out = core.isa(), {}, {}
for op in dispatch.PREFERENCE["cpu"]:
    for dtype in (torch.float32, torch.bfloat16):
        why = dispatch.unavailable(op, "cpu", "cpu", dtype)
        if why:
            left_out[op] = why
        else:
            errors[f"{op} {dtype}"] = selfcheck.run(op, "cpu", "cpu", dtype)
print(json.dumps({"isa": isa, "errors": errors, "left_out": left_out}))
"""


def run(isa: str, script: str = SCRIPT) -> tuple[int, str, str]:
    process = Python("-c", script, QWEN3_CPU_ISA=isa)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


@pytest.mark.parametrize("isa", ISAS)
def test_error_rule(isa):
    code, output, errors = run(isa)
    if "but the best this machine runs is" in errors:
        pytest.skip(f"this machine does not run {isa}")
    assert code == 0, errors
    report = json.loads(output)
    assert report["isa"] == isa
    assert all(why == "no kernel" for why in report["left_out"].values()), report["left_out"]
    assert len(report["errors"]) == 2 * (len(dispatch.PREFERENCE["cpu"]) - len(report["left_out"])) > 0
    over = {name: error for name, error in report["errors"].items() if not error <= selfcheck.LIMIT}
    assert not over, f"error relative to plain torch on {isa}: {over}"


def test_an_unknown_instruction_set_is_refused():
    code, _, errors = run("sse9", "from qwen3_kernels.cpu._core import core; core.isa()")
    assert code != 0
    assert "QWEN3_CPU_ISA is 'sse9'; expected scalar, avx2 or avx512" in errors
