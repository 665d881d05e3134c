"""Checks and times each step of the Hopper experts (qwen3_kernels/cuda/moe_experts.py) on its own.

    python benchmarks/probes/moe_probe.py [check|time|all]

Error: that of the step over that of plain torch in bf16, both against float64, on the same inputs; at most 2 passes.
Every step also runs three times with bitwise equal results. TFLOP/s count 6 N K D I forward and twice that backward,
without padding.
A step that takes more than a minute is taken for hung and ends the process by its name.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic mode

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from qwen3_kernels.cuda import moe_experts as ours

# name: tokens, D, I, experts, K, routing
CHECKS = {
    "one token": (1, 64, 32, 4, 2, "random"),
    "odd widths": (37, 72, 24, 5, 3, "random"),
    "one expert": (300, 136, 200, 6, 2, "one"),
    "many empty": (65, 256, 128, 64, 1, "random"),
    "K is E": (129, 320, 384, 4, 4, "random"),
    "dropped": (513, 264, 392, 9, 4, "dropped"),
    "wide": (700, 1032, 520, 3, 2, "random"),
    "skewed": (2000, 512, 768, 32, 8, "zipf"),
    "30B T8192": (8192, 2048, 768, 128, 8, "random"),
}
TIMINGS = {
    "30B T8192": (8192, 2048, 768, 128, 8, "random"),
    "30B T32768": (32768, 2048, 768, 128, 8, "random"),
    "30B T8192 zipf": (8192, 2048, 768, 128, 8, "zipf"),
    "235B T8192": (8192, 4096, 1536, 128, 8, "random"),
}

stage, since = "start", time.monotonic()


def enter(name: str) -> None:
    global stage, since
    torch.cuda.synchronize()
    stage, since = name, time.monotonic()


def watch() -> None:
    while True:
        time.sleep(1)
        if time.monotonic() - since > 25:
            print(f"\nHUNG in {stage}", flush=True)
            os._exit(3)


class Plan(NamedTuple):
    offsets: Tensor
    token: Tensor
    slot: Tensor
    inverse: Tensor


def route(tokens: int, experts: int, k: int, kind: str) -> Tensor:
    scores = torch.rand(tokens, experts, device="cuda")
    if kind == "zipf":
        weight = 1 / torch.arange(1, experts + 1, device="cuda")
        return torch.multinomial(weight.expand(tokens, -1), k)
    ids = scores.topk(k).indices
    if kind == "one":
        ids[:, 0] = experts - 2
        ids[:, 1:] = experts - 2  # an expert may be named twice
    if kind == "dropped":
        ids = torch.where(torch.rand_like(ids.float()) < 0.3, experts + ids % 2, ids)
    return ids


def plan_of(ids: Tensor, experts: int) -> Plan:
    flat = ids.reshape(-1).clamp(max=experts)
    by_expert, slot = flat.sort(stable=True)
    offsets = torch.searchsorted(by_expert, torch.arange(experts + 1, device="cuda"))
    inverse = torch.empty_like(slot).scatter_(0, slot, torch.arange(flat.numel(), device="cuda"))
    return Plan(*(t.int() for t in (offsets, slot // ids.shape[1], slot, inverse)))


class Problem:
    def __init__(self, tokens: int, d: int, i: int, experts: int, k: int, kind: str) -> None:
        torch.manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

        self.x, self.dout = normal(tokens, d), normal(tokens, d)
        self.gate_up, self.down = normal(experts, 2 * i, d) * d**-0.5, normal(experts, d, i) * i**-0.5
        self.weights = torch.rand(tokens, k, device="cuda").softmax(1)
        self.plan = plan_of(route(tokens, experts, k, kind), experts)
        self.rows = int(self.plan.offsets[-1])
        self.tokens, self.d, self.i, self.experts, self.k = tokens, d, i, experts, k


class Reference:
    """The steps expert by expert in plain torch, in one dtype; sums over k and SwiGLU in at least float32."""

    def __init__(self, plan: Plan, dtype: torch.dtype) -> None:
        self.plan, self.dtype, self.bounds = plan, dtype, plan.offsets.tolist()
        self.wide = torch.promote_types(dtype, torch.float32)

    def groups(self):
        for e, (begin, end) in enumerate(zip(self.bounds, self.bounds[1:])):
            yield e, slice(begin, end)

    def product(self, rows: Tensor, weight: Tensor) -> Tensor:
        out = rows.new_zeros(rows.shape[0], weight.shape[2], dtype=self.dtype)
        for e, part in self.groups():
            out[part] = rows[part].to(self.dtype) @ weight[e].to(self.dtype)
        return out

    def up(self, x, gate_up):
        h = self.product(x[self.plan.token], gate_up.mT)
        gate, up = h.to(self.wide).chunk(2, 1)
        return h, (gate * gate.sigmoid() * up).to(self.dtype)

    def down(self, a, down):
        return (self.product(a, down.mT),)

    def combine(self, y, weights, tokens):
        kept = (self.plan.inverse < self.bounds[-1]).unsqueeze(1)
        rows = torch.where(kept, y[self.plan.inverse].to(self.wide), 0).view(tokens, -1, y.shape[1])
        return ((rows if weights is None else rows * weights.to(self.wide).unsqueeze(2)).sum(1).to(self.dtype),)

    def down_backward(self, dout, down, h, weights):
        da = self.product(dout[self.plan.token], down).to(self.wide)
        gate, up = h.to(self.wide).chunk(2, 1)
        sigmoid = gate.sigmoid()
        a = gate * sigmoid * up
        dweights = torch.zeros(weights.numel(), device="cuda", dtype=self.wide)
        kept = slice(0, self.bounds[-1])
        dweights[self.plan.slot[kept].long()] = (da * a)[kept].sum(1)
        weight = weights.to(self.wide).reshape(-1)[self.plan.slot].unsqueeze(1)
        da = da * weight
        dh = torch.cat((da * up * sigmoid * (1 + gate * (1 - sigmoid)), da * gate * sigmoid), 1)
        return dweights.view(weights.shape), dh.to(self.dtype), (weight * a).to(self.dtype)

    def up_backward(self, dh, gate_up):
        return (self.product(dh, gate_up),)

    def weight_grad(self, left, right, gathered, before):
        left, right = (t[self.plan.token] if gathered == side else t for side, t in (("left", left), ("right", right)))
        out = torch.zeros(len(self.bounds) - 1, left.shape[1], right.shape[1], device="cuda", dtype=self.dtype)
        for e, part in self.groups():
            out[e] = left[part].to(self.dtype).T @ right[part].to(self.dtype)
        return (out if before is None else before.to(self.dtype) + out,)


def weight_grad(p: Problem, left: Tensor, right: Tensor, gathered: str, before: Tensor | None, dtype=torch.bfloat16):
    shape = p.experts, left.shape[1], right.shape[1]
    out = torch.full(shape, torch.nan, device="cuda", dtype=dtype) if before is None else before.clone()
    ours.weight_grad(left, right, p.plan, out, before is not None, gathered)
    return (out,)


def error(got: Tensor, truth: Tensor) -> float:
    """Chunked, for the sake of memory."""
    return sum(float((g.double() - t.double()).square().sum()) for g, t in zip(got.split(64), truth.split(64))) ** 0.5


def check(name: str, p: Problem) -> bool:
    truth, plain = Reference(p.plan, torch.float64), Reference(p.plan, torch.bfloat16)
    good, worst = True, []

    def step(label, run, reference, rows: bool):
        nonlocal good
        enter(f"{name}: {label}")

        def used(t):  # rows of dropped assignments hold nothing
            return t[: p.rows] if rows and t.shape[0] == p.plan.token.shape[0] else t

        outs = run()
        torch.cuda.synchronize()
        for _ in range(2):
            if not all(torch.equal(used(a), used(b)) for a, b in zip(outs, run())):
                good = False
                print(f"  {name}: {label} differs from run to run")
        for n, tensors in enumerate(zip(outs, reference(truth), reference(plain))):
            got, want, ref = map(used, tensors)
            floor = torch.finfo(got.dtype).eps * 0.25 * float(want.double().norm())
            ratio = error(got, want) / max(error(ref, want), floor, 1e-300)
            worst.append(f"{label}{n if len(outs) > 1 else ''} {ratio:.2f}")
            if not ratio <= 2:
                good = False
                print(f"  {name}: {label} output {n}: error {ratio:.3g} times plain torch's")
        return outs

    plan = p.plan
    h, a = step("up", lambda: ours.up(p.x, p.gate_up, plan), lambda r: r.up(p.x, p.gate_up), True)
    y, = step("down", lambda: (ours.down(a, p.down, plan),), lambda r: r.down(a, p.down), True)
    step("combine", lambda: (ours.combine(y, p.weights, plan),), lambda r: r.combine(y, p.weights, p.tokens), False)
    _, dh, scaled = step("down_backward", lambda: ours.down_backward(p.dout, p.down, h, p.weights, plan),
                         lambda r: r.down_backward(p.dout, p.down, h, p.weights), True)
    dx, = step("up_backward", lambda: (ours.up_backward(dh, p.gate_up, plan),), lambda r: r.up_backward(dh, p.gate_up),
               True)
    step("combine_backward", lambda: (ours.combine_backward(dx, plan, p.tokens),),
         lambda r: r.combine(dx, None, p.tokens), False)

    def weight_grads(label, left, right, gathered):
        nonlocal good
        step(label, lambda: weight_grad(p, left, right, gathered, None),
             lambda r: r.weight_grad(left, right, gathered, None), False)
        if p.tokens <= 2000:
            for dtype in (torch.bfloat16, torch.float32):
                before = torch.randn(p.experts, left.shape[1], right.shape[1], device="cuda", dtype=dtype)
                step(f"{label} += {str(before.dtype)[6:]}", lambda b=before: weight_grad(p, left, right, gathered, b),
                     lambda r, b=before: r.weight_grad(left, right, gathered, b), False)
            step(f"{label} float32", lambda: weight_grad(p, left, right, gathered, None, torch.float32),
                 lambda r: r.weight_grad(left, right, gathered, None), False)
            # Rows of other experts must not leak in, whatever they hold: here NaN.
            last = max((e for e in range(p.experts) if plan.offsets[e] < plan.offsets[e + 1]), default=0)
            spoilt = (scaled if gathered == "left" else dh).clone()
            spoilt[plan.offsets[last]:] = torch.nan
            out, = weight_grad(p, *((left, spoilt) if gathered == "left" else (spoilt, right)), gathered, None)
            if out[:last].isnan().any():
                good = False
                print(f"  {name}: {label}: NaN of expert {last} in another's gradient")

    weight_grads("dW2", p.dout, scaled, "left")
    weight_grads("dW1", dh, p.x, "right")
    print(f"{'ok  ' if good else 'FAIL'} {name}: {', '.join(worst)}", flush=True)
    return good


def check_graph() -> bool:
    """A captured forward and backward, replayed with another routing."""
    p = Problem(1000, 512, 384, 16, 4, "random")

    def everything():
        h, a = ours.up(p.x, p.gate_up, p.plan)
        out = ours.combine(ours.down(a, p.down, p.plan), p.weights, p.plan)
        dw, dh, scaled = ours.down_backward(p.dout, p.down, h, p.weights, p.plan)
        dx = ours.combine_backward(ours.up_backward(dh, p.gate_up, p.plan), p.plan, p.tokens)
        return out, dw, dx, *weight_grad(p, p.dout, scaled, "left", None), *weight_grad(p, dh, p.x, "right", None)

    enter("graph")
    everything()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    other = plan_of(route(1000, 16, 4, "zipf"), 16)
    for mine, new in zip(p.plan, other):
        mine.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    good = all(torch.equal(a, b) for a, b in zip(captured, everything()))
    print(f"{'ok  ' if good else 'FAIL'} graph replayed with another routing", flush=True)
    return good


def once(run) -> float:
    """Milliseconds; the device first sleeps for longer than the host takes to launch."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)
    begin.record(), run(), end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def milliseconds(run, reps: int = 20) -> float:
    for _ in range(3):
        run()
    return sorted(once(run) for _ in range(reps))[reps // 2]


def measure(name: str, p: Problem) -> list[str]:
    unit = 2 * p.tokens * p.k * p.d * p.i  # FLOPs of a product with one of gate, up and down
    lines, plan = [name], p.plan
    dw1, dw2 = torch.empty_like(p.gate_up), torch.empty_like(p.down)

    def line(label, flops, run, moved=0):
        enter(f"{name}: {label}")
        ms = milliseconds(run)
        rate = f"{flops / ms * 1e-9:7.0f} TFLOP/s" if flops else f"{moved / ms * 1e-6:7.0f} GB/s"
        lines.append(f"  {label:17} {ms:8.3f} ms {rate}")

    h, a = ours.up(p.x, p.gate_up, plan)
    y = ours.down(a, p.down, plan)
    _, dh, scaled = ours.down_backward(p.dout, p.down, h, p.weights, plan)
    moved = (p.tokens * (p.k + 1)) * p.d * 2
    line("up", 2 * unit, lambda: ours.up(p.x, p.gate_up, plan))
    line("down", unit, lambda: ours.down(a, p.down, plan))
    line("combine", 0, lambda: ours.combine(y, p.weights, plan), moved)
    line("down_backward", unit, lambda: ours.down_backward(p.dout, p.down, h, p.weights, plan))
    line("up_backward", 2 * unit, lambda: ours.up_backward(dh, p.gate_up, plan))
    line("combine_backward", 0, lambda: ours.combine_backward(y, plan, p.tokens), moved)
    line("dW2", unit, lambda: ours.weight_grad(p.dout, scaled, plan, dw2, False, "left"))
    line("dW1", 2 * unit, lambda: ours.weight_grad(dh, p.x, plan, dw1, False, "right"))
    line("dW2 +=", unit, lambda: ours.weight_grad(p.dout, scaled, plan, dw2, True, "left"))
    line("dW1 +=", 2 * unit, lambda: ours.weight_grad(dh, p.x, plan, dw1, True, "right"))
    wide = torch.zeros_like(dw1, dtype=torch.float32)
    line("dW1 float32", 2 * unit, lambda: ours.weight_grad(dh, p.x, plan, wide, False, "right"))
    line("dW1 += float32", 2 * unit, lambda: ours.weight_grad(dh, p.x, plan, wide, True, "right"))
    del wide

    def forward():
        h, a = ours.up(p.x, p.gate_up, plan)
        return h, ours.combine(ours.down(a, p.down, plan), p.weights, plan)

    def both():
        h, _ = forward()
        _, dh, scaled = ours.down_backward(p.dout, p.down, h, p.weights, plan)
        ours.weight_grad(p.dout, scaled, plan, dw2, False, "left")
        ours.weight_grad(dh, p.x, plan, dw1, False, "right")
        return ours.combine_backward(ours.up_backward(dh, p.gate_up, plan), plan, p.tokens)

    line("forward", 3 * unit, forward)
    line("forward+backward", 9 * unit, both)
    # What cuBLAS makes of one expert's share times all: the dense rate at these widths.
    rows = min(p.tokens * p.k, 65536)
    left = torch.randn(rows, p.d, device="cuda", dtype=torch.bfloat16)
    line("dense, K = D", 2 * rows * p.d * 2 * p.i, lambda: left @ p.gate_up[0].T)
    left = torch.randn(rows, p.i, device="cuda", dtype=torch.bfloat16)
    line("dense, K = I", 2 * rows * p.d * p.i, lambda: left @ p.down[0].T)
    enter("between")
    return lines


def main() -> int:
    what = sys.argv[1] if len(sys.argv) > 1 else "all"
    if what not in ("check", "time", "all"):
        raise SystemExit(f"got {what!r}; expected check, time or all")
    threading.Thread(target=watch, daemon=True).start()
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    good = True
    if what != "time":
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN: what is not written shows
        for name, shape in CHECKS.items():
            enter(f"{name}: inputs")
            good &= check(name, Problem(*shape))
            torch.cuda.empty_cache()
        good &= check_graph()
        torch.use_deterministic_algorithms(False)
    if what != "check":
        for name, shape in TIMINGS.items():
            enter(f"{name}: inputs")
            print(*measure(name, Problem(*shape)), sep="\n", flush=True)
            torch.cuda.empty_cache()
    print("all checks passed" if good else "CHECKS FAILED", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
