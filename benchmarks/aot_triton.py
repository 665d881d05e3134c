"""Registers, spills and shared memory of every Triton kernel on sm_90, compiled ahead of time: needs no GPU.

    python -m benchmarks.aot_triton [--op OP ...] [--json FILE]

The kernels are compiled for the very launches that qwen3_kernels/triton and training/adamw make at the sizes of Qwen3:
they run on meta tensors, with the launch itself replaced by a note of its arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from qwen3_kernels import dispatch
from qwen3_kernels.ops.moe_router import Plan
from training.adamw import adamw_fused_

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
            torch.int32: "*i32", torch.int16: "*i16", torch.float8_e4m3fn: "*fp8e4nv"}


@dataclass(frozen=True)
class Row:
    """Resources of one compiled kernel; spills in bytes a thread, shared memory in bytes a program."""

    op: str
    case: str
    kernel: str
    warps: int
    registers: int
    spills: int
    shared: int
    wide_accesses: int  # 16-byte global loads and stores in the PTX; the others waste bandwidth
    accesses: int


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    args: tuple
    options: dict


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Launches of any kernel are noted instead of made."""
    launches: list[Launch] = []
    run = JITFunction.run

    def note(self, *args, grid, warmup, **options):
        launches.append(Launch(self, args, options))

    JITFunction.run = note
    try:
        yield launches
    finally:
        JITFunction.run = run


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _rms_norm(n: int, h: int, dtype: torch.dtype, residual: bool) -> Callable[[], None]:
    def calls():
        op = dispatch.backend("rms_norm", "triton")
        x, weight, r = meta(n, h, dtype=dtype), meta(h, dtype=dtype), meta(n, h, dtype=dtype) if residual else None
        _, _, rstd = op.forward(x, weight, r, 1e-6)
        op.backward(x, r, x, weight, rstd)

    return calls


def _qk_norm_rope(n: int, hq: int, hk: int, d: int, dtype: torch.dtype) -> Callable[[], None]:
    def calls():
        op = dispatch.backend("qk_norm_rope", "triton")
        q, k = meta(n, hq, d, dtype=dtype), meta(n, hk, d, dtype=dtype)
        wq, wk, cos = meta(d, dtype=dtype), meta(d, dtype=dtype), meta(n, d // 2, dtype=torch.float32)
        op.forward(q, k, wq, wk, cos, cos, 1e-6)
        op.backward(q, k, q, k, wq, wk, cos, cos, 1e-6)

    return calls


def _swiglu(n: int, i: int, dtype: torch.dtype, packed: bool) -> Callable[[], None]:
    def calls():
        op = dispatch.backend("swiglu", "triton")
        gate, up = meta(n, 2 * i, dtype=dtype).chunk(2, -1) if packed else (meta(n, i, dtype=dtype),) * 2
        op.backward(op.forward(gate, up), gate, up, gate, up)

    return calls


def _cross_entropy(n: int, v: int, dtype: torch.dtype, dlse: bool) -> Callable[[], None]:
    def calls():
        op = dispatch.backend("cross_entropy", "triton")
        logits, labels = meta(n, v, dtype=dtype), meta(n, dtype=torch.int64)
        nll, lse = op.forward(logits, labels, -100)
        op.backward(nll, nll if dlse else None, logits, labels, lse, -100)

    return calls


def _label_rows(n: int, h: int, v: int, dtype: torch.dtype) -> Callable[[], None]:
    def calls():
        op = dispatch.backend("linear_cross_entropy", "triton")
        head, hidden, product = meta(v, h, dtype=dtype), meta(n, h, dtype=dtype), meta(n, h, dtype=FP32)
        labels, own = meta(n, dtype=torch.int64), meta(n, dtype=FP32)
        op.add_label_rows(head, hidden, labels, own)
        op.finish_hidden(hidden, product, own, own, head, labels)

    return calls


def _linear_kl(n: int, v: int, dtype: torch.dtype, k: int = 0, grad: bool = True) -> Callable[[], None]:
    def calls():
        op = dispatch.backend("linear_kl", "triton")
        student, weight = meta(n, v, dtype=FP32), meta(n, dtype=FP32)
        if k:
            op.chunk(student, None, meta(n, k, dtype=torch.int64), meta(n, k, dtype=FP32), weight, False, 1.0, dtype, grad)
            return
        for reverse in (False, True):
            op.chunk(student, meta(n, v, dtype=FP32), None, None, weight, reverse, 1.0, dtype, grad)

    return calls


def _moe_router(n: int, e: int, k: int, dtype: torch.dtype, replay: bool) -> Callable[[], None]:
    def calls():
        op = dispatch.backend("moe_router", "triton")
        logits, ids, mask = meta(n, e, dtype=dtype), meta(n, k, dtype=torch.int64), meta(n, dtype=torch.float32)
        weights, _, prob_sum, lse = op.forward(logits, k, True, ids if replay else None, mask, True)
        op.backward(weights, prob_sum, lse, logits, ids, mask, True)
        op.plan(ids, e)

    return calls


def _moe_experts(n: int, d: int, i: int, e: int, k: int, dtype: torch.dtype, backward: bool = True) -> Callable[[], None]:
    def calls():
        op = dispatch.backend("moe_experts", "triton")
        plan = Plan(meta(e + 1, dtype=torch.int32), *(meta(n * k, dtype=torch.int32) for _ in range(3)))
        x, gate_up, down = meta(n, d, dtype=dtype), meta(e, 2 * i, d, dtype=dtype), meta(e, d, i, dtype=dtype)
        weights = meta(n, k, dtype=FP32)
        if not backward:
            op.combine(op.down(op.activate(x, gate_up, plan), down, plan), weights, plan)
            op.decode(x, gate_up, down, meta(n, k, dtype=torch.int64), weights)
            return
        h, a = op.up(x, gate_up, plan)
        op.combine(op.down(a, down, plan), weights, plan)
        _, dh, a = op.down_backward(x, down, h, weights, plan)
        op.weight_grad(x, a, plan, down, False, "left")
        op.weight_grad(dh, x, plan, gate_up, False, "right")
        op.weight_grad(dh, x, plan, meta(e, 2 * i, d, dtype=FP32), True, "right")
        op.combine_backward(op.up_backward(dh, gate_up, plan), plan, n)

    return calls


def _paged_attention(
    b: int, tq: int, hq: int, hk: int, d: int, dtype: torch.dtype, cache: torch.dtype
) -> Callable[[], None]:
    def calls():
        op = dispatch.backend("paged_attention", "triton")
        pages, new, scale = meta(4096, 64, hk, d, dtype=cache), meta(b, tq, hk, d, dtype=dtype), meta(hk, dtype=FP32)
        table, lengths = meta(b, 128, dtype=torch.int32), meta(b, dtype=torch.int32)
        scale = scale if cache == FP8 else None
        op.write(new, new, pages, pages, table, meta(b, tq, dtype=torch.int32), scale, scale)
        op.forward(meta(b, tq, hq, d, dtype=dtype), pages, pages, table, lengths, scale, scale, d**-0.5)

    return calls


def _adamw(
    weight: torch.dtype, moment: torch.dtype, size: int = 1 << 20, copy: torch.dtype | None = None,
    stochastic: bool = False,
) -> Callable[[], None]:
    def calls():
        tensors = [[meta(size, dtype=dtype) for _ in range(310)] for dtype in (weight, weight, moment, moment)]
        steps, one = [meta(dtype=FP32) for _ in range(310)], meta(dtype=FP32)
        adamw_fused_(
            *tensors, steps, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, scale=one, skip=one,
            copies=[meta(size, dtype=copy) for _ in steps] if copy else None, keys=range(310) if stochastic else None,
        )

    return calls


BF16, FP32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
CASES: dict[str, dict[str, Callable[[], None]]] = {
    "rms_norm": {
        "4096 bf16": _rms_norm(16384, 4096, BF16, False),
        "4096 bf16 residual": _rms_norm(16384, 4096, BF16, True),
        "1024 bf16 residual": _rms_norm(4096, 1024, BF16, True),
        "2048 bf16 residual": _rms_norm(16384, 2048, BF16, True),
        "2560 bf16 residual": _rms_norm(16384, 2560, BF16, True),
        "5120 bf16 residual": _rms_norm(16384, 5120, BF16, True),
        "4096 fp32 residual": _rms_norm(16384, 4096, FP32, True),
        "128 bf16": _rms_norm(65536, 128, BF16, False),
        "1024 bf16 odd N": _rms_norm(4095, 1024, BF16, False),
    },
    "qk_norm_rope": {
        "32+8x128 bf16": _qk_norm_rope(16384, 32, 8, 128, BF16),
        "16+8x128 bf16": _qk_norm_rope(16384, 16, 8, 128, BF16),
        "40+8x128 bf16": _qk_norm_rope(16384, 40, 8, 128, BF16),
        "64+4x128 bf16": _qk_norm_rope(16384, 64, 4, 128, BF16),
        "32+8x128 fp32": _qk_norm_rope(16384, 32, 8, 128, FP32),
        "8+2x64 bf16": _qk_norm_rope(16384, 8, 2, 64, BF16),
        "6+3x96 bf16 odd N": _qk_norm_rope(1001, 6, 3, 96, BF16),
    },
    "swiglu": {
        "12288 bf16": _swiglu(16384, 12288, BF16, False),
        "12288 bf16 packed": _swiglu(16384, 12288, BF16, True),
        "3072 bf16 packed": _swiglu(16384, 3072, BF16, True),
        "768 bf16 packed": _swiglu(16384, 768, BF16, True),
        "9728 fp32": _swiglu(16384, 9728, FP32, False),
        "1000 bf16 odd": _swiglu(1001, 1000, BF16, False),
    },
    "cross_entropy": {
        "151936 bf16": _cross_entropy(8192, 151936, BF16, False),
        "151936 bf16 z-loss": _cross_entropy(8192, 151936, BF16, True),
        "151936 fp32": _cross_entropy(8192, 151936, FP32, False),
    },
    "linear_cross_entropy": {
        "151936x1024 bf16": _label_rows(8192, 1024, 151936, BF16),
        "151936x4096 bf16": _label_rows(65536, 4096, 151936, BF16),
        "1001x40 fp16 odd": _label_rows(37, 40, 1001, torch.float16),
    },
    "linear_kl": {
        "151936 bf16": _linear_kl(512, 151936, BF16),
        "151936 bf16 loss": _linear_kl(512, 151936, BF16, grad=False),
        "151936 fp32": _linear_kl(512, 151936, FP32),
        "151936 bf16 top 64": _linear_kl(1024, 151936, BF16, k=64),
        "1001 bf16 odd V": _linear_kl(37, 1001, BF16),
    },
    "moe_router": {
        "128 top 8 bf16": _moe_router(8192, 128, 8, BF16, False),
        "128 top 8 bf16 replay": _moe_router(8192, 128, 8, BF16, True),
        "512 top 10 fp32": _moe_router(8192, 512, 10, FP32, False),
    },
    "moe_experts": {
        "30B T8192 bf16": _moe_experts(8192, 2048, 768, 128, 8, BF16),
        "30B T1024 bf16": _moe_experts(1024, 2048, 768, 128, 8, BF16),
        "30B T8 bf16": _moe_experts(8, 2048, 768, 128, 8, BF16, backward=False),
        "odd bf16": _moe_experts(4096, 1001, 333, 8, 2, BF16),
        "512 fp32": _moe_experts(1024, 512, 256, 8, 2, FP32),
    },
    "paged_attention": {
        "32+8x128 bf16": _paged_attention(8, 1, 32, 8, 128, BF16, BF16),
        "32+8x128 bf16, fp8": _paged_attention(8, 1, 32, 8, 128, BF16, FP8),
        "64+4x128 bf16 Tq 8": _paged_attention(8, 8, 64, 4, 128, BF16, BF16),
        "64+4x128 fp8 Tq 8": _paged_attention(8, 8, 64, 4, 128, BF16, FP8),
        "16+8x64 bf16": _paged_attention(8, 1, 16, 8, 64, BF16, BF16),
        "32+8x128 fp32": _paged_attention(8, 1, 32, 8, 128, FP32, FP32),
        "32+8x128 fp32, fp8": _paged_attention(8, 1, 32, 8, 128, FP32, FP8),
    },
    "adamw": {
        "bf16": _adamw(BF16, BF16),
        "bf16 stochastic": _adamw(BF16, BF16, stochastic=True),
        "bf16, fp32 stochastic": _adamw(BF16, FP32, stochastic=True),
        "fp32, bf16 copy": _adamw(FP32, FP32, copy=BF16),
        "bf16 odd": _adamw(BF16, BF16, size=1001),
    },
}


def compiled(launch: Launch):
    """The kernel of a launch, compiled as Triton's JIT would for 16-byte aligned tensors."""
    signature, constants, attributes = {}, {}, {}
    values = dict(zip(launch.kernel.arg_names, launch.args)) | launch.options
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, values.pop(parameter.name)
        aligned = False
        if parameter.is_constexpr or value is None or (value == 1 if _specialised(parameter, value) else False):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name], aligned = POINTERS[value.dtype], True
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}{value.block_shape}>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name], aligned = "i32", _specialised(parameter, value) and value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGET, options=values)  # what is left are options such as num_warps


def _specialised(parameter, value: object) -> bool:
    return isinstance(value, int) and not parameter.do_not_specialize


@functools.cache  # cases share kernels
def resources(ptx: str) -> tuple[int, int]:
    """(registers, spilled bytes) a thread, by the ptxas that Triton ships."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        with open(path, "w") as f:
            f.write(ptx)
        arch = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)[1]
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={arch}", path, "-o", os.path.join(folder, "out")]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    if not registers or not spills:
        raise RuntimeError(f"ptxas reported no resources: {report!r}")
    return int(registers[1]), int(spills[1]) + int(spills[2])


def measure(op: str, case: str, launch: Launch) -> Row:
    kernel = compiled(launch)
    ptx = kernel.asm["ptx"]
    registers, spills = resources(ptx)
    accesses = re.findall(r"\b(?:ld|st)\.global\S*", ptx)
    wide = [a for a in accesses if re.search(r"v4\.[bfu]32|v2\.[bfu]64", a)]
    return Row(op, case, launch.kernel.__name__.strip("_"), launch.options["num_warps"], registers, spills,
               kernel.metadata.shared, len(wide), len(accesses))


def rows(ops: list[str]) -> list[Row]:
    """One row for every launch of every case."""
    wanted = []
    for op in ops:
        for case, calls in CASES[op].items():
            with recorded_launches() as launches:
                calls()
            wanted += [(op, case, launch) for launch in launches]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda w: measure(*w), wanted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=CASES, default=list(CASES), help="only these ops")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("aot_triton: TRITON_INTERPRET is 1; unset it, since interpreted kernels cannot be compiled")
    table = rows(args.op)
    line = "{:14}{:22}{:22}{:>6}{:>6}{:>8}{:>8}{:>9}{:>5}"
    print(line.format("op", "case", "kernel", "warps", "regs", "spills", "shared", "16-byte", "of"))
    for row in table:
        print(line.format(*asdict(row).values()))
    if args.json:
        with open(args.json, "w") as f:
            json.dump([asdict(r) for r in table], f, indent=1)


if __name__ == "__main__":
    main()
