"""Every kernel of this GPU once, forward and backward, on small inputs that end inside a tile: work for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.sanitize [--backend cuda] [OP ...]

Without torch's caching allocator every tensor is an allocation of its own, so that an overrun is seen. ``--tool racecheck``
looks for hazards in shared memory.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from qwen3_kernels import dispatch, linear_cross_entropy, qk_norm_attention, selfcheck

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Case = tuple[Callable, dict[str, torch.Tensor]]


def cases(op: str, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """The self-check's inputs, and for the largest kernels others that take several tiles and all their paths."""
    yield selfcheck.PAIRS[op][0], selfcheck.inputs_for(op, device, dtype)
    g = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    if op == "moe_experts":  # full tiles, an odd one, and an expert with nothing
        ids = torch.randint(3, (300, 2), generator=g).to(device)
        yield selfcheck.PAIRS[op][0], {
            "x": rand(300, 72), "gate_up": rand(4, 400, 72) / 8, "down": rand(4, 72, 200) / 14, "ids": ids,
            "weights": torch.rand(300, 2, generator=g).to(device),
        }
    if op == "linear_cross_entropy":  # two chunks of a wide head; more tiles than clusters at a time
        yield functools.partial(linear_cross_entropy, chunk_tokens=300), {
            "hidden": rand(500, 2056), "head": rand(9000, 2056) / 45,
            "labels": torch.randint(9000, (500,), generator=g).to(device),
        }
    if op == "attention":
        angle = torch.rand(300, 64, generator=g) * 100
        inputs = {"q": rand(300, 4, 128), "k": rand(300, 2, 128), "v": rand(300, 2, 128), "q_weight": rand(128),
                  "k_weight": rand(128), "cos": angle.cos().to(device), "sin": angle.sin().to(device)}
        yield _normed, inputs | {"cu_seqlens": torch.tensor([0, 130, 130, 300], dtype=torch.int32, device=device)}
        yield _normed, {n: t if n in ("cos", "sin") or t.dim() == 1 else t[None] for n, t in inputs.items()}


def _normed(q, k, v, q_weight, k_weight, cos, sin, cu_seqlens=None):
    return qk_norm_attention(q, k, v, q_weight, k_weight, (cos, sin), cu_seqlens=cu_seqlens)


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__.splitlines()[0])
    p.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(dispatch.OPS)} (default all)")
    p.add_argument("--backend", choices=("cpu", "cuda", "triton"), action="append", help="default cuda and triton")
    args = p.parse_args(argv)
    unknown = set(args.ops) - set(dispatch.OPS)
    if unknown:
        p.error(f"OP is {sorted(unknown)}; expected some of {', '.join(dispatch.OPS)}")
    ran = 0
    for backend in args.backend or ("cuda", "triton"):
        device = dispatch.DEVICES[backend]
        if device == "cuda" and not torch.cuda.is_available():
            p.error(f"--backend {backend} needs a GPU, and torch finds none")
        for op in args.ops or dispatch.OPS:
            for dtype in DTYPES:
                if dispatch.unavailable(op, backend, device, dtype) is not None:
                    continue
                with dispatch.use(backend, op):
                    done = [selfcheck.outputs_and_grads(*case) for case in cases(op, device, dtype)]
                if device == "cuda":
                    torch.cuda.synchronize()
                ran += len(done)
                print(f"{op} on {backend} in {str(dtype).removeprefix('torch.')}: {len(done)} cases", flush=True)
    if ran == 0:
        p.error("no kernel of these runs here")


if __name__ == "__main__":
    main()
