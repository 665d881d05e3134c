"""What the kernel tests share: the backends that run here, and the error rule of DESIGN against fp64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3_kernels import dispatch, selfcheck

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def backends(op: str, dtype: torch.dtype = torch.float32) -> list:
    """Parameters for every backend that has a kernel for ``op`` on this machine's device."""
    names = ("cpu", "cuda", "triton")
    found = [n for n in names if dispatch.unavailable(op, n, DEVICE, dtype) is None]
    if op != "attention" or DEVICE == "cpu":  # on CUDA attention is torch's own
        assert found, f"no backend of {names} runs {op} on {DEVICE}: is the package built?"
    return found


def pick(backend: str, usual: int, interpreted: int) -> int:
    """A size: a smaller one for Triton's interpreter, which is slow."""
    return interpreted if backend == "triton" and DEVICE == "cpu" else usual


def check_error_rule(op, ref, backend: str, inputs: dict, **options) -> None:
    """Error at most twice plain torch's in the same dtype, for every output and gradient; truth is fp64."""
    with dispatch.use(backend):
        ratios = selfcheck.ratios(op, ref, inputs, **options)
    shown = ", ".join(f"{r:.3g}" for r in ratios)
    assert max(ratios) <= selfcheck.LIMIT, f"{op.__name__} on {backend}: errors {shown} times those of plain torch"


def pooled_ratios(op, ref, draws, plain=None) -> list[float]:
    """The error ratio of each output and gradient over several draws taken together: of a handful of numbers alone, plain
    torch's error is luck. ``plain``: what makes that error, by default ``ref``."""
    found = {"truth": [], "plain": [], "got": []}
    for inputs in draws:
        wide = {n: t.cpu().double() if t.is_floating_point() else t.cpu() for n, t in inputs.items()}
        for name, function, given in (("truth", ref, wide), ("plain", plain or ref, inputs), ("got", op, inputs)):
            found[name].append(selfcheck.outputs_and_grads(function, given))
    pooled = {n: [torch.cat([t.flatten() for t in same]) for same in zip(*lists)] for n, lists in found.items()}
    return [selfcheck.error_ratio(*t) for t in zip(pooled["got"], pooled["plain"], pooled["truth"], strict=True)]


def check_registration(op, backend: str, custom_op, args: tuple, inputs: dict, **options) -> None:
    """torch.library.opcheck of the custom op, and a fullgraph compile that gives the same bits as eager."""
    with dispatch.use(backend):
        torch.library.opcheck(custom_op, args)
        torch._dynamo.reset()
        compiled = torch.compile(lambda **kw: op(**kw, **options), fullgraph=True, backend="aot_eager")
        eager = selfcheck.outputs_and_grads(lambda **kw: op(**kw, **options), inputs)
        for a, b in zip(eager, selfcheck.outputs_and_grads(compiled, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def check_repeatable(op, backend: str, inputs: dict, times: int = 5, threads: tuple[int, ...] = (1, 2), **options) -> None:
    """Bitwise equal results, again and again (once under the interpreter, which runs one program after another), and whatever
    the number of threads (where matrix products are torch's, its own results depend on that number)."""
    results = []
    with dispatch.use(backend):
        for i in range(1 + pick(backend, times, 1)):
            torch.set_num_threads(threads[i % len(threads)])
            results.append(selfcheck.outputs_and_grads(lambda **kw: op(**kw, **options), inputs))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


class _Calls(TorchDispatchMode):
    """Names of the torch operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def check_no_copy(function, *args) -> None:
    """The CPU backend's ``function`` reads and writes its arguments where they are."""
    if DEVICE != "cpu":
        pytest.skip("of the CPU kernels")
    with _Calls() as calls:
        function(*args)
    assert not calls.names & {"clone", "copy_", "contiguous", "_to_copy"}, calls.names


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


parametrize_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
