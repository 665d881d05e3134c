"""Attention forward in Gluon (Triton with explicit layouts) beside csrc/cuda/attention.cu, whose design it has.

    python benchmarks/probes/gluon_attention.py [--json FILE]   on a GPU: check against torch in fp32, time in turns
    python benchmarks/probes/gluon_attention.py --compile       anywhere: resources and SASS for sm_90

Causal, head width 128, bf16, whole rows [B, T, H, 128], T a multiple of 128. A partition of one warp loads with TMA,
two of four warps have 64 queries each; they meet blocks of 128 keys from the last visible one down, in rings of two
stages. While the products P V of a block run, the softmax of the next is computed. CTAs stay and get tiles as in
attention.cu. Variants: with and without the two partitions taking turns at the tensor cores. TFLOP/s count 2 B H D T^2.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.aot_triton import TARGET, resources
from benchmarks.harness import TOLERANCE, Clock, interleave, relative_error

D, QUERIES, KEYS, STAGES = (gl.constexpr(n) for n in (128, 64, 128, 2))  # queries of one computing partition
TILE = gl.constexpr(2 * QUERIES.value)
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
SCALE = 128**-0.5
CACHE_BYTES = 32 << 20  # keys and values that stay in L2
VARIANTS = {"gluon": False, "gluon in turns": True}
CHECKS = ((2, 384, 4, 2), (1, 128, 2, 1), (3, 1152, 48, 8), (2, 4096, 32, 16))  # B, T, H, Hk; the last: two sections
SHAPES = ((4, 4096, 32, 8), (1, 16384, 32, 8), (8, 4096, 16, 8))
TURNS, CALLS, CHECK_SECONDS = 15, 3, 30


@gluon.jit
def tile_of(round):
    """Rounds over all CTAs, every second one backwards."""
    ctas, cta = gl.num_programs(0), gl.program_id(0)
    return round * ctas + gl.where(round % 2 == 0, cta, ctas - 1 - cta)


@gluon.jit
def rounds_of_cta(plan):
    T, _, _, heads, _ = plan
    tiles = heads * (T // TILE)
    rounds = tiles // gl.num_programs(0)
    return rounds + (tile_of(rounds) < tiles).to(gl.int32)  # the last round may pass this CTA by


@gluon.jit
def work(round, plan):
    """(first token of the row in [B T], head, block of queries). Sections of heads whose keys fit in L2 begin with
    their longest and their shortest tiles in turns, the last with its longest."""
    T, H, _, heads, section = plan
    blocks, tile = T // TILE, tile_of(round)
    this = tile // (section * blocks)
    first = this * section
    width = gl.minimum(section, heads - first)
    place = tile - first * blocks
    row, block = first + place % width, place // width
    block = gl.where((gl.cdiv(heads, section) - this) % 2 == 1, blocks - 1 - block, block)
    return row // H * T, row % H, block


@gluon.jit
def ring(n):
    """(stage, phase) of the n-th block."""
    return n % STAGES, n // STAGES % 2


@gluon.jit
def load_block(desc, token, column, full, empty, tiles, n):
    stage, phase = ring(n)
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), KEYS * D * 2)
    tma.async_copy_global_to_shared(desc, [token, column], full.index(stage), tiles.index(stage))


@gluon.jit
def load(descriptors, tiles, bars, plan):
    q_desc, k_desc, v_desc, _ = descriptors
    q, k, v, _ = tiles
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = bars
    _, H, Hk, _, _ = plan
    done = 0  # blocks of keys before this tile's
    for turn in range(rounds_of_cta(plan)):
        row, head, block = work(turn, plan)
        column = head // (H // Hk) * D
        mbarrier.wait(q_empty, turn % 2 ^ 1)
        mbarrier.expect(q_full, TILE * D * 2)
        for i in gl.static_range(2):
            tma.async_copy_global_to_shared(q_desc, [row + block * TILE + i * QUERIES, head * D], q_full, q.index(i))
        load_block(k_desc, row + block * KEYS, column, k_full, k_empty, k, done)
        for i in range(1, block + 1):  # the values of a block are needed after the keys of the next
            load_block(k_desc, row + (block - i) * KEYS, column, k_full, k_empty, k, done + i)
            load_block(v_desc, row + (block - i + 1) * KEYS, column, v_full, v_empty, v, done + i - 1)
        load_block(v_desc, row, column, v_full, v_empty, v, done + block)
        done += block + 1


@gluon.jit
def softmax(scores, peak, total, scale_log2, operand: gl.constexpr):
    """(probabilities, new peak, new total, factor of what was summed before)."""
    top = gl.maximum(peak, gl.max(scores, 1))
    keep = gl.exp2((peak - top) * scale_log2)
    probs = gl.exp2(scores * scale_log2 - (top * scale_log2)[:, None])
    total = total * keep + gl.sum(probs, 1)
    return gl.convert_layout(probs.to(gl.bfloat16), operand, assert_trivial=True), top, total, keep


@gluon.jit
def multiply(descriptors, tiles, bars, plan, lse, scale, which: gl.constexpr, in_turns: gl.constexpr):
    q, k, v, out_tiles = tiles
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = bars
    _, H, _, _, _ = plan
    acc: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc, k_width=2)
    rows: gl.constexpr = gl.SliceLayout(1, acc)
    q_tile, out_tile = q.index(which), out_tiles.index(which)
    query, key = gl.arange(0, QUERIES, rows), gl.arange(0, KEYS, gl.SliceLayout(0, acc))
    none = gl.zeros([QUERIES, KEYS], gl.float32, acc)
    scale_log2 = scale * 1.4426950408889634
    done, step = 0, 0
    for turn in range(rounds_of_cta(plan)):
        row, head, block = work(turn, plan)
        stage, phase = ring(done)
        mbarrier.wait(q_full, turn % 2)
        mbarrier.wait(k_full.index(stage), phase)
        scores = warpgroup_mma(q_tile, k.index(stage).permute([1, 0]), none, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, [scores])
        mbarrier.arrive(k_empty.index(stage))
        scores = gl.where(key[None, :] > (which * QUERIES + query)[:, None], float("-inf"), scores)
        peak, total = gl.full([QUERIES], float("-inf"), gl.float32, rows), gl.zeros([QUERIES], gl.float32, rows)
        probs, peak, total, keep = softmax(scores, peak, total, scale_log2, operand)
        out = gl.zeros([QUERIES, D], gl.float32, acc)
        mbarrier.wait(v_full.index(stage), phase)
        for i in range(1, block + 1):
            before = stage
            stage, phase = ring(done + i)
            mbarrier.wait(k_full.index(stage), phase)
            if in_turns:
                mbarrier.wait(turns.index(which), step % 2 ^ (1 - which))  # the first partition goes first
            scores = warpgroup_mma(q_tile, k.index(stage).permute([1, 0]), none, use_acc=False, is_async=True)
            out = warpgroup_mma(probs, v.index(before), out, is_async=True)
            if in_turns:
                mbarrier.arrive(turns.index(1 - which))
                step += 1
            scores = warpgroup_mma_wait(1, [scores])
            mbarrier.arrive(k_empty.index(stage))
            probs, peak, total, keep = softmax(scores, peak, total, scale_log2, operand)
            mbarrier.wait(v_full.index(stage), phase)  # here, since ptxas moves the next wait up to a branch
            out = warpgroup_mma_wait(0, [out])
            mbarrier.arrive(v_empty.index(before))
            out = out * keep[:, None]
        mbarrier.arrive(q_empty)
        out = warpgroup_mma_wait(0, [warpgroup_mma(probs, v.index(stage), out, is_async=True)])
        mbarrier.arrive(v_empty.index(stage))
        done += block + 1

        token = row + block * TILE + which * QUERIES
        gl.store(lse + ((token + query).to(gl.int64) * H + head), peak * scale + gl.log2(total) * 0.6931471805599453)
        tma.store_wait(0)  # of the tile before
        out_tile.store((out * (1 / total)[:, None]).to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(descriptors[3], [token, head * D], out_tile)
    tma.store_wait(0)


@gluon.jit
def barriers(n: gl.constexpr, count: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(bars.index(i), count)
    return bars


@gluon.jit(do_not_specialize=["H", "Hk", "heads", "section"])
def forward_kernel(q_desc, k_desc, v_desc, out_desc, lse, T, H, Hk, heads, section, scale, in_turns: gl.constexpr):
    q = gl.allocate_shared_memory(gl.bfloat16, [2, QUERIES, D], q_desc.layout)
    out = gl.allocate_shared_memory(gl.bfloat16, [2, QUERIES, D], out_desc.layout)
    k = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, D], k_desc.layout)
    v = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, D], v_desc.layout)
    bars = (barriers(1, 1).index(0), barriers(1, 2).index(0), barriers(STAGES, 1), barriers(STAGES, 2),
            barriers(STAGES, 1), barriers(STAGES, 2), barriers(2, 1))
    fence_async_shared()
    descriptors, tiles, plan = (q_desc, k_desc, v_desc, out_desc), (q, k, v, out), (T, H, Hk, heads, section)
    gl.warp_specialize([
        (multiply, (descriptors, tiles, bars, plan, lse, scale, gl.constexpr(0), in_turns)),
        (multiply, (descriptors, tiles, bars, plan, lse, scale, gl.constexpr(1), in_turns)),
        (load, (descriptors, tiles, bars, plan)),
    ], [4, 1], [240, 24])


def forward(q: Tensor, k: Tensor, v: Tensor, in_turns: bool) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, 128], lse [B, T, H] in fp32)."""
    B, T, H, _ = q.shape
    out, lse = torch.empty_like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    blocks = (TensorDescriptor.from_tensor(t.view(B * T, -1), [rows.value, D.value], LAYOUT)
              for t, rows in ((q, QUERIES), (k, KEYS), (v, KEYS), (out, QUERIES)))
    section = min(max(CACHE_BYTES // (T * 4 * D.value), 1) * (H // k.shape[2]), B * H)
    ctas = min(B * H * T // TILE.value, torch.cuda.get_device_properties(q.device).multi_processor_count)
    forward_kernel[(ctas,)](*blocks, lse, T, H, k.shape[2], B * H, section, SCALE, in_turns, num_warps=4)
    return out, lse


def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from qwen3_kernels.cuda import attention

    return attention.forward(q, k, v, None, None, True, SCALE)


def inputs(B: int, T: int, H: int, Hk: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, T, h, D.value, device="cuda", dtype=torch.bfloat16) for h in (H, Hk, Hk)]


def name_of(B: int, T: int, H: int, Hk: int) -> str:
    return f"B{B} T{T} heads {H}/{Hk}"


def check(variant: str) -> None:
    """A line for each shape; ends the process with a message where the results are wrong."""
    for shape in CHECKS:
        q, k, v = inputs(*shape)
        wide = [t.float().repeat_interleave(q.shape[2] // t.shape[2], 2).transpose(1, 2) for t in (q, k, v)]
        want = F.scaled_dot_product_attention(*wide, is_causal=True, scale=SCALE).transpose(1, 2)
        (out, lse), (our_out, our_lse) = forward(q, k, v, VARIANTS[variant]), ours(q, k, v)
        error, our_error = relative_error(out, want), relative_error(our_out, want)
        apart = (lse - our_lse).abs().max().item()
        line = f"{variant}, {name_of(*shape)}: error {error:.2e}, ours {our_error:.2e}, lse apart by {apart:.1e}"
        if not (error <= TOLERANCE[torch.bfloat16] and apart <= 1e-3):
            sys.exit(line + ": WRONG")
        print(line, flush=True)


def problems() -> dict[str, str]:
    """Variant -> why it is not timed. Each is checked in its own process, which a kernel that faults takes along."""
    process, end = multiprocessing.get_context("spawn").Process, time.monotonic() + CHECK_SECONDS
    runs, found = {v: process(target=check, args=(v,)) for v in VARIANTS}, {}
    for run in runs.values():
        run.start()
    for variant, run in runs.items():
        run.join(max(end - time.monotonic(), 0))
        if run.exitcode != 0:
            late = f"its check is not done after {CHECK_SECONDS} s"
            found[variant] = late if run.is_alive() else f"its check ended with {run.exitcode}, see above"
            run.kill()
    return found


def measure(shape: tuple[int, int, int, int], variants: list[str], clock: Clock) -> list[dict]:
    B, T, H, _ = shape
    q, k, v = inputs(*shape)
    calls = {"ours": lambda: ours(q, k, v)} | {n: lambda turns=VARIANTS[n]: forward(q, k, v, turns) for n in variants}
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name in interleave(list(calls), TURNS):
        times[name].append(clock.time([calls[name]] * CALLS, name))
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    return [{"case": name_of(*shape), "impl": name, "ms": ms, "tflops": 2e-9 * B * H * D.value * T * T / ms}
            for name, ms in medians.items()]


def compile_only() -> None:
    block = "tensordesc<bf16[{}, {}],{!r}>"
    keys, queries = (block.format(rows.value, D.value, LAYOUT) for rows in (KEYS, QUERIES))
    signature = {"q_desc": queries, "k_desc": keys, "v_desc": keys, "out_desc": queries, "lse": "*fp32",
                 **dict.fromkeys(("T", "H", "Hk", "heads", "section"), "i32"), "scale": "fp32", "in_turns": "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in ("lse", "T")}
    for variant, in_turns in VARIANTS.items():
        source = GluonASTSource(forward_kernel, signature, {"in_turns": in_turns}, aligned)
        kernel = triton.compile(source, target=TARGET, options={"num_warps": 4})
        registers, spills = resources(kernel.asm["ptx"])
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(kernel.asm["cubin"])
            f.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-sass", f.name]
            sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        products, waits = re.findall(r"HGMMA\..*", sass), re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", sass)
        groups = sum("gsb0" in p for p in products)
        between = re.findall(r"DEPBAR\.LE gsb0, 0x1(.*?)DEPBAR\.LE gsb0, 0x0", sass, re.DOTALL)
        print(f"{variant}, Triton {triton.__version__}: {registers} registers, {spills} bytes spilled, "
              f"{kernel.metadata.shared} bytes shared, {kernel.metadata.num_warps} warps; {len(products)} HGMMA in "
              f"{groups} groups, waits that leave 0: {waits.count('0')}, 1: {waits.count('1')}, exponentials from one "
              f"that leaves 1 to the next: {[b.count('MUFU.EX2') for b in between]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="only compile for sm_90, which needs no GPU")
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")
    args = parser.parse_args()
    if args.compile:
        return compile_only()
    if not torch.cuda.is_available():
        sys.exit("gluon_attention: needs a GPU; --compile does not")
    found, clock, rows = problems(), Clock("cuda"), []
    for variant, problem in found.items():
        print(f"{variant} is not timed: {problem}")
    for shape in SHAPES:
        rows += measure(shape, [v for v in VARIANTS if v not in found], clock)
        line = [f"{r['impl']} {r['ms']:.3f} ms {r['tflops']:.0f} TFLOP/s" for r in rows if r["case"] == name_of(*shape)]
        print(f"{name_of(*shape):24s}" + "  ".join(line), flush=True)
    if args.json:
        result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
                  "problems": found, "rows": rows}
        Path(args.json + ".part").write_text(json.dumps(result, indent=1))
        os.replace(args.json + ".part", args.json)


if __name__ == "__main__":
    main()
