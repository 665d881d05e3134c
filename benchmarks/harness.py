"""Times implementations of one op side by side.

Method. For each case every implementation is first compared with a float32 reference at the very shape that is timed; a
wrong one is reported and not timed. Then, in one process and one mode at a time, the implementations take turns
(`interleave`): each turn is one batch of calls, one call per input set, and the sets together exceed the last-level
cache several times, so no call finds its inputs there. A row holds the median over the turns and the 20th and 80th
percentile. On CUDA a batch is timed with events behind a spinning kernel that holds the stream back, so that the queue
is full and the times are the device's own, free of launch gaps.

Modes: ``fwd`` without autograd, ``bwd`` the backward alone, ``fwdbwd`` both as in training, ``step`` a generated token.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from qwen3_kernels import __version__, dispatch

ROOT = Path(__file__).resolve().parent.parent
# ‖got − want‖ / ‖want‖: half-precision results differ by a few roundings of 2^-9, float32 ones by the order of sums.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
WORST_ROW = 5.0  # a single row may be this much worse than the whole
MODES = ("fwd", "bwd", "fwdbwd", "step")
MAX_SETS = 32

Thunk = Callable[[], object]


# --- What is timed.


@dataclass(frozen=True)
class Impl:
    """One way to compute an op.

    Attributes:
        fn: takes the case's inputs by keyword; returns a tensor or a tuple of tensors.
        modes: the modes it can be timed in; None for all of the case's.
        mutates: it overwrites inputs or cotangents, so every call gets a copy made outside the timed region.
        adapt: turns the inputs into the layout it wants, once per input set, outside the timed region.
        backend: for ours, the backend that runs.
    """

    fn: Callable[..., Tensor | tuple[Tensor, ...]]
    modes: tuple[str, ...] | None = None
    mutates: bool = False
    adapt: Callable[[dict], dict] | None = None
    backend: str | None = None


@dataclass(frozen=True)
class InputSet:
    inputs: dict[str, object]
    cotangents: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        make: seed -> random inputs and cotangents on the device.
        reference: input set -> (outputs, gradients of the inputs named in ``grads``) in float32, or None as gradients.
        bytes: mode -> the fewest bytes the op must move (each input read once, each output written once).
        flops: mode -> floating-point operations.
        ceiling: the key of the ceilings that bounds the op, ``copy_gbps`` or ``gemm_*_tflops``.
        compare: (outputs, reference outputs) -> error to hold against ``tolerance``; default `relative_error`.
        context: what peers need to know besides the inputs.
        steps: a call does this many steps; ms is per step.
        tokens: tokens a step handles, reported as tokens/s.
        sets: number of input sets; None for as many as the cache asks for.
        peers: those that are timed; None for all that have the op.
    """

    op: str
    name: str
    make: Callable[[int], InputSet]
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[[InputSet], tuple[list, list | None]]
    tolerance: float
    ceiling: str
    bytes: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    grads: tuple[str, ...] = ()
    modes: tuple[str, ...] = ("fwd", "bwd", "fwdbwd")
    compare: Callable[[list, list], float] | None = None
    context: dict = field(default_factory=dict)
    steps: int = 1
    tokens: int | None = None
    sets: int | None = None
    peers: tuple[str, ...] | None = None


@dataclass
class Row:
    """One line of the JSON. ``ms`` is None when ``error`` says why nothing was timed."""

    suite: str
    case: str
    impl: str
    mode: str
    ms: float | None = None
    tflops: float | None = None
    tbps: float | None = None
    pct_of_ceiling: float | None = None
    peak_mb: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    turns: int | None = None
    rel_error: float | None = None
    backend: str | None = None
    tokens_per_s: float | None = None
    mfu_pct: float | None = None  # of the datasheet's peak, see train_step.py
    error: str | None = None

    def to_dict(self) -> dict:
        optional = ("backend", "tokens_per_s", "mfu_pct", "error")
        return {k: v for k, v in asdict(self).items() if v is not None or k not in optional}


@dataclass(frozen=True)
class Settings:
    device: str
    turns: int
    seconds: float  # aim for the turns of one case and mode, all implementations together
    min_turns: int = 3

    @classmethod
    def for_run(cls, device: str, quick: bool) -> Settings:
        if quick:
            return cls(device, turns=3, seconds=0.5)
        return cls(device, turns=25, seconds=1.5) if device == "cuda" else cls(device, turns=15, seconds=1.0)


# --- Time.


class Clock:
    """Milliseconds per call of a batch of calls."""

    # Cycles per second to spin for: at least any GPU's clock, so the queue is full before the spinning ends.
    SPIN_HZ = 2.2e9

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.enqueue_s: dict[object, float] = {}

    def time(self, thunks: Sequence[Thunk], key: object = None) -> float:
        """``key`` names what is called, so that the spin lasts as long as queueing it took the last time."""
        if not self.cuda:
            begin = time.perf_counter()
            for thunk in thunks:
                thunk()
            return (time.perf_counter() - begin) * 1e3 / len(thunks)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(min(self.enqueue_s.get(key, 1e-3) * 1.3 + 1e-4, 0.3) * self.SPIN_HZ))
        start.record()
        begin = time.perf_counter()
        for thunk in thunks:
            thunk()
        self.enqueue_s[key] = time.perf_counter() - begin
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / len(thunks)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], q: float) -> float:
    """The q-quantile, 0 <= q <= 1, by linear interpolation."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def interleave(names: Sequence[str], turns: int) -> Iterator[str]:
    """Every name once per turn; each turn starts one further on, so that none is always first."""
    for turn in range(turns):
        first = turn % len(names)
        yield from (*names[first:], *names[:first])


# --- Correctness.


def as_tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def relative_error(got: Tensor, want: Tensor) -> float:
    """The larger of ‖got − want‖ / ‖want‖ and a `WORST_ROW`-th of the same for the worst row; inf for NaN or another
    shape.

    A row's norm counts as at least the typical row's, so that rows that ought to be near zero do not divide by nothing.
    """
    if got.shape != want.shape:
        return math.inf
    want = want.float().reshape(-1, want.shape[-1] if want.dim() else 1)
    wrong = torch.linalg.vector_norm(got.float().reshape(want.shape) - want, dim=-1)
    size = torch.linalg.vector_norm(want, dim=-1)
    total = wrong.norm() / size.norm().clamp(min=1e-30)
    worst = (wrong / (size + size.square().mean().sqrt()).clamp(min=1e-30)).max()
    error = torch.maximum(total, worst / WORST_ROW).item()
    return math.inf if math.isnan(error) else error


def autograd_reference(ref: Callable, grads: Sequence[str]) -> Callable[[InputSet], tuple[list, list]]:
    """A reference out of a plain-torch function: float32 inputs, gradients by autograd."""

    def run(data: InputSet) -> tuple[list, list]:
        wide = {n: t.detach().float() if isinstance(t, Tensor) and t.is_floating_point() else t
                for n, t in data.inputs.items()}
        wanted = [wide[n].requires_grad_() for n in grads]
        out = as_tuple(ref(**wide))
        gradients = torch.autograd.grad(out, wanted, [c.to(o.dtype) for o, c in zip(out, data.cotangents, strict=True)])
        return [o.detach() for o in out], list(gradients)

    return run


# --- One case.


def our_impls(case: Case, device: str, dtype: torch.dtype) -> dict[str, Impl]:
    """"ours" as dispatched, and "ours:<backend>" for every other kernel that can run here."""
    if case.op not in dispatch.OPS:
        return {"ours": Impl(case.ours)}
    chosen = dispatch.resolve(case.op, device, dtype)
    impls = {"ours": Impl(case.ours, backend=chosen)}
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for name in dispatch.BACKENDS:
        skip = name in (chosen, "torch") or (name == "triton" and interpreted)
        if not skip and dispatch.unavailable(case.op, name, device, dtype) is None:
            impls[f"ours:{name}"] = Impl(_on_backend(case.ours, case.op, name), backend=name)
    return impls


def _on_backend(fn: Callable, op: str, backend: str) -> Callable:
    def run(**inputs):
        with dispatch.use(backend, op):
            return fn(**inputs)

    return run


def number_of_sets(set_bytes: int, device: str, quick: bool = False) -> int:
    """Enough sets to exceed a GPU's last-level cache four times, at least three."""
    if quick:
        return 2
    if device == "cpu":
        return 3  # enough for the private caches; the shared one can be larger than any sensible input
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(max(math.ceil(4 * cache / set_bytes), 3), MAX_SETS)


def set_bytes(data: InputSet) -> int:
    return sum(t.nbytes for t in (*data.inputs.values(), *data.cotangents) if isinstance(t, Tensor))


def thunks_for(impl: Impl, mode: str, sets: Sequence[InputSet], grads: Sequence[str]) -> list[Thunk]:
    """One call per input set, with everything that is not to be timed done already."""
    return [_thunk(impl, mode, data, grads) for data in sets]


def _thunk(impl: Impl, mode: str, data: InputSet, grads: Sequence[str]) -> Thunk:
    inputs, cotangents = dict(data.inputs), data.cotangents
    if impl.mutates:
        inputs = {n: t.clone() if isinstance(t, Tensor) else t for n, t in inputs.items()}
        cotangents = tuple(c.clone() for c in cotangents)
    if mode in ("fwd", "step"):
        return torch.no_grad()(lambda: impl.fn(**inputs))
    for name in grads:
        inputs[name] = inputs[name].detach().requires_grad_()
    wanted = [inputs[n] for n in grads]
    if mode == "fwdbwd":
        return lambda: torch.autograd.grad(as_tuple(impl.fn(**inputs)), wanted, cotangents)
    out = as_tuple(impl.fn(**inputs))
    return lambda: torch.autograd.grad(out, wanted, cotangents)


def check(case: Case, impl: Impl, data: InputSet, want: tuple[list, list | None]) -> tuple[dict[str, str], float]:
    """Mode -> why it is not timed, for the modes that raise or give wrong results; and the largest relative error."""
    modes = impl.modes or case.modes
    problems, worst = {}, 0.0
    compare = case.compare or (lambda got, ref: max(map(relative_error, got, ref)))
    plan = [("outputs", "fwd", want[0], modes)]
    if want[1] is not None:
        plan.append(("gradients", "fwdbwd", want[1], tuple(m for m in modes if m in ("bwd", "fwdbwd"))))
    for what, mode, expected, affected in plan:
        affected = [m for m in affected if m not in problems]
        if not affected:
            continue
        try:
            got = as_tuple(_thunk(impl, mode, data, case.grads)())
            if len(got) != len(expected):
                raise ValueError(f"{len(got)} {what}; expected {len(expected)}")
            measure = compare if what == "outputs" else lambda g, r: max(map(relative_error, g, r))
            error = measure(list(got), expected)
        except Exception as e:  # whatever a peer raises is its row's text
            problems |= dict.fromkeys(affected, describe(e))
            continue
        worst = max(worst, error)
        if not error <= case.tolerance:
            problems |= dict.fromkeys(affected, f"wrong {what}: relative error {error:.3g}, limit {case.tolerance:g}")
    return problems, worst


def describe(e: BaseException) -> str:
    text = " ".join(str(e).split())
    return f"{type(e).__name__}: {text[:300]}"


def run_case(
    suite: str, case: Case, impls: dict[str, Impl | Exception], settings: Settings, ceilings: dict[str, float],
    quick: bool = False, progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Check, then time, every implementation in every mode. An `Exception` in place of an implementation is a peer
    whose import or set-up failed: it becomes a row."""
    torch.manual_seed(0)
    first = case.make(0)
    count = case.sets or number_of_sets(set_bytes(first), settings.device, quick)
    sets = [first, *(case.make(seed) for seed in range(1, count))]
    want = case.reference(first)
    problems: dict[tuple[str, str], str] = {}
    errors: dict[str, float] = {}
    own_sets: dict[str, list[InputSet]] = {}
    for name, impl in impls.items():
        progress(f"{case.name}: checking {name}")
        try:
            if isinstance(impl, Exception):
                raise impl
            own_sets[name] = [InputSet(impl.adapt(s.inputs), s.cotangents) for s in sets] if impl.adapt else sets
            found, error = check(case, impl, own_sets[name][0], want)
            if math.isfinite(error):  # JSON has no infinity
                errors[name] = error
        except Exception as e:
            found = dict.fromkeys((getattr(impl, "modes", None) or case.modes), describe(e))
        problems |= {(name, mode): text for mode, text in found.items()}
    del want
    rows = []
    for mode in case.modes:
        names = [n for n, i in impls.items() if mode in (getattr(i, "modes", None) or case.modes)]
        progress(f"{case.name}: timing {mode}")
        rows += _run_mode(suite, case, mode, names, impls, own_sets, problems, errors, settings, ceilings)
    return rows


def _run_mode(suite, case, mode, names, impls, own_sets, problems, errors, settings, ceilings) -> list[Row]:
    clock = Clock(settings.device)
    rows = {n: Row(suite, case.name, n, mode, rel_error=errors.get(n), backend=getattr(impls[n], "backend", None),
                   error=problems.get((n, mode))) for n in names}
    times: dict[str, list[float]] = {}
    warm: dict[str, float] = {}

    def turn(name: str) -> float:
        return clock.time(thunks_for(impls[name], mode, own_sets[name], case.grads), name)

    for name in [n for n in names if rows[n].error is None]:
        try:
            turn(name)  # compiles, fills the allocator's pool
            rows[name].peak_mb = peak_mb(impls[name], mode, own_sets[name][0], case.grads, settings.device)
            begin = time.perf_counter()
            turn(name)
            warm[name], times[name] = time.perf_counter() - begin, []
        except Exception as e:
            rows[name].error = describe(e)
    if times:
        fit = int(settings.seconds / max(sum(warm.values()), 1e-9))
        turns = max(settings.min_turns, min(settings.turns, fit))
        for name in interleave(list(times), turns):
            if rows[name].error is None:
                try:
                    times[name].append(turn(name))
                except Exception as e:
                    rows[name].error = describe(e)
    for name, ms in times.items():
        if rows[name].error is None:
            fill(rows[name], case, [t / case.steps for t in ms], ceilings)
    return list(rows.values())


def fill(row: Row, case: Case, ms: Sequence[float], ceilings: dict[str, float]) -> None:
    """Medians, rates and the percentage of the ceiling, from milliseconds per step."""
    row.ms, row.ms_p20, row.ms_p80, row.turns = median(ms), percentile(ms, 0.2), percentile(ms, 0.8), len(ms)
    if row.mode in case.bytes:
        row.tbps = case.bytes[row.mode] / row.ms * 1e-9
    if row.mode in case.flops:
        row.tflops = case.flops[row.mode] / row.ms * 1e-9
    achieved = row.tbps and row.tbps * 1e3 if case.ceiling == "copy_gbps" else row.tflops
    if achieved is not None and case.ceiling in ceilings:
        row.pct_of_ceiling = 100 * achieved / ceilings[case.ceiling]
    if case.tokens is not None:
        row.tokens_per_s = case.tokens / row.ms * 1e3


def peak_mb(impl: Impl, mode: str, data: InputSet, grads: Sequence[str], device: str) -> float | None:
    """Device memory (10^6 bytes) that one call needs beyond what was there before it; None on the CPU."""
    if device != "cuda":
        return None
    thunk = _thunk(impl, mode, data, grads)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    thunk()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


# --- Where it ran.


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions(distributions: Sequence[str] = ()) -> dict[str, str]:
    """Versions of python, this package, torch, and what is installed of triton, transformers and ``distributions``."""
    found = {n: version_of(n) for n in ("triton", "transformers", *distributions)}
    own = {"python": platform.python_version(), "qwen3_kernels": __version__, "torch": torch.__version__}
    if torch.version.cuda:
        own["cuda"] = torch.version.cuda
    return own | {n: v for n, v in found.items() if v is not None}
