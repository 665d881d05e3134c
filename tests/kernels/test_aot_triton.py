"""The Triton kernels as sm_90 machine code, compiled without a GPU: what the interpreter cannot show."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STREAMING = {"forward_kernel", "backward_kernel"}
REGISTERS, SHARED_BYTES = 65536, 227 * 1024  # of a multiprocessor; the latter is the most one program may ask for


pytestmark = pytest.mark.slow  # a minute of compiling


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aot")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "benchmarks.aot_triton", "--json", str(folder / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "rows.json").read_text())


def test_every_kernel_of_every_op_is_compiled(rows):
    found = {(r["op"], r["kernel"]) for r in rows}
    ops = ("rms_norm", "qk_norm_rope", "swiglu", "cross_entropy", "moe_router")
    assert found == {(op, kernel) for op in ops for kernel in STREAMING} | {
        (op, "sum_partials_kernel") for op in ("rms_norm", "qk_norm_rope", "moe_router")
    } | {("linear_cross_entropy", f"{kernel}_kernel") for kernel in ("label_rows", "finish_hidden")} | {
        ("linear_kl", f"{kernel}_kernel") for kernel in ("kl", "mass", "share")
    } | {
        ("moe_router", kernel) for kernel in ("count_kernel", "place_kernel")
    } | {
        ("moe_experts", f"{kernel}_kernel") for kernel in
        ("up", "rows", "down_backward", "weight_grad", "combine", "tiles", "dweights", "decode_up", "decode_down")
    } | {("paged_attention", f"{kernel}_kernel") for kernel in ("split", "combine", "write")} | {
        ("adamw", f"{kernel}_kernel") for kernel in ("adamw", "count")
    }


def test_products_read_in_units_of_16_bytes(rows):
    """Gathered rows are copied to shared memory while the last step is multiplied, which takes aligned, wide accesses."""
    products = {"up_kernel", "rows_kernel", "down_backward_kernel", "weight_grad_kernel"}
    training = [r for r in rows if r["case"] == "30B T8192 bf16" and r["kernel"] in products]
    assert len(training) == 7
    for r in training:
        assert r["shared"] >= 96 * 1024, f"{r['kernel']} holds fewer steps than it was given"


def test_programs_of_a_decoding_step_share_a_multiprocessor(rows):
    """What hides the latency of memory: three programs with two blocks of keys and values in shared memory, four with
    three blocks where the cache has 8 bits, whose blocks are half as large."""
    decode = {r["case"]: r for r in rows if r["kernel"] == "split_kernel"}
    for case, programs, blocks, size in (("32+8x128 bf16", 3, 2, 2), ("32+8x128 bf16, fp8", 4, 3, 1)):
        r = decode[case]
        assert programs * (r["shared"] + 1024) <= SHARED_BYTES + 1024, r  # the system takes 1 KB a program
        assert programs * r["registers"] * 32 * r["warps"] <= REGISTERS, r
        assert r["shared"] >= blocks * 2 * 64 * 128 * size, r


def test_tokens_of_a_chunk_are_one_wave(rows):
    """Four programs on each of 132 multiprocessors take 512 tokens."""
    for r in rows:
        if r["kernel"] == "kl_kernel":
            assert 4 * r["registers"] * 32 * r["warps"] <= REGISTERS and 4 * (r["shared"] + 1024) <= SHARED_BYTES, r


def test_nothing_spills(rows):
    assert [r for r in rows if r["spills"]] == []


def test_programs_fit_on_a_multiprocessor(rows):
    for r in rows:
        assert r["shared"] <= SHARED_BYTES, r
        assert r["registers"] * 32 * r["warps"] <= REGISTERS, r


def test_activations_move_16_bytes_at_a_time(rows):
    """Elementwise kernels touch nothing else, so each of their accesses is wide; odd sizes cannot be."""
    elementwise = [
        r for r in rows
        if r["op"] == "swiglu" or (r["op"] == "qk_norm_rope" and r["kernel"] == "forward_kernel")
        if "odd" not in r["case"]
    ]
    assert len(elementwise) > 10
    assert [r for r in elementwise if r["wide_accesses"] != r["accesses"]] == []


def test_adamw_moves_16_bytes_at_a_time(rows):
    """A thread's 8 values are one access of a bfloat16 tensor, two of a float32 one; the rest are scalars of the table."""
    wide = {r["case"]: r["wide_accesses"] for r in rows if r["kernel"] == "adamw_kernel"}
    assert wide == {"bf16": 7, "bf16 stochastic": 7, "bf16, fp32 stochastic": 3 + 2 * 4, "fp32, bf16 copy": 2 * 7 + 1,
                    "bf16 odd": 0}


def test_heads_need_no_shared_memory(rows):
    """A layout conversion would drag the tile of q or k through shared memory; the two halves share one layout."""
    forward = [r for r in rows if r["op"] == "qk_norm_rope" and r["kernel"] == "forward_kernel"]
    assert forward and all(r["shared"] == 0 for r in forward)
