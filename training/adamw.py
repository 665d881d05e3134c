"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101): on a GPU all parameters in one launch and one pass over memory.

That moves 14 bytes a parameter where all is bfloat16, and 30 where masters, moments and gradients are float32 and a
bfloat16 copy of the weights is written. Arithmetic is float32, each result rounded once.
"""

from __future__ import annotations

import functools
import math
import warnings
from array import array
from collections import defaultdict
from collections.abc import Sequence
from itertools import repeat

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}  # and their names in Triton


@torch.no_grad()
def adamw_fused_(
    weights: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Tensor], squares: Sequence[Tensor],
    steps: Sequence[Tensor], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
    scale: Tensor | None = None, skip: Tensor | None = None, copies: Sequence[Tensor] | None = None,
    keys: Sequence[int] | None = None,
) -> None:
    """A step of AdamW with the Triton kernel: a launch for all tensors that share dtypes. Reads nothing on the host.

    Args:
        weights, grads, moments, squares: of the same sizes, as `fits` wants them; grads are only read.
        steps: of each weight, float32 scalars on its device, the number of steps so far; 1 is added.
        scale: scalar on the device that the gradients are divided by as they are read.
        skip: float32 scalar on the device; if 1, nothing changes.
        copies: of the weights in other dtypes, written as well.
        keys: int64 numbers; if given, what is stored in bfloat16, but for the copies, is rounded stochastically: the
            noise of each element is a function of its tensor's key and its place.
    """
    tensors, launches = (weights, grads, moments, squares, copies or weights), defaultdict(list)
    addresses = zip(*([t.data_ptr() for t in column] for column in (*tensors, steps)))
    dtypes = zip(*([t.dtype for t in column] for column in tensors))
    for weight, own, found, key in zip(weights, addresses, dtypes, keys or repeat(0)):
        w, g, m, v, c, _ = own
        size = weight.numel()
        launches[weight.device, found, (w | g | m | v | c | size) % 16 == 0].append((*own, key, size))
    for (device, found, aligned), rows in launches.items():
        own_scale, own_skip = (None if t is None else t.to(device, non_blocking=True) for t in (scale, skip))
        launch(
            rows, device, found if copies else (*found[:4], None), lr=lr, betas=betas, eps=eps,
            weight_decay=weight_decay, scale=own_scale, skip=own_skip, stochastic=keys is not None, aligned=aligned,
        )


def launch(
    rows: Sequence[Sequence[int]], device: torch.device, dtypes: tuple[torch.dtype | None, ...], *, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float, scale: Tensor | None, skip: Tensor | None,
    stochastic: bool, aligned: bool,
) -> None:
    """``rows``: the table's columns but for the last; ``dtypes`` of weight, gradient, moment, square and copy;
    ``aligned``: addresses and sizes divide by 16."""
    import triton.language as tl  # Triton is not everywhere

    from qwen3_kernels.triton._launch import on_device

    from . import adamw_kernel as source

    table, blocks, n = [], 0, len(rows)
    for row in rows:
        table += (*row, blocks)
        blocks += -(-row[-1] // source.BLOCK)
    table = torch.frombuffer(array("q", table), dtype=torch.int64)  # torch.tensor takes 0.2 ms for a model's
    if device.type == "cuda":
        table = table.pin_memory()  # so that the copy waits for nothing; the allocator keeps it until the copy is done
    table = table.to(device, non_blocking=True)
    corrections = torch.empty((n, 2), dtype=torch.float32, device=device)
    names = dict(zip("WGMVC", (None if d is None else getattr(tl, DTYPES[d]) for d in dtypes)))
    logs = {name: math.log(beta) if beta else -math.inf for name, beta in zip(("LOG_1", "LOG_2"), betas)}
    with on_device(table):
        source.count_kernel[(-(-n // 128),)](table, corrections, skip, n, **logs, BLOCK=128, num_warps=4)
        if blocks:
            source.adamw_kernel[(blocks,)](
                table, corrections, scale, skip, n,
                lr, lr * weight_decay, betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps,
                **names, STOCHASTIC=stochastic, ALIGNED=aligned, PRECISE=dtypes[0] == torch.float32,
                HALVINGS=(n - 1).bit_length(), BLOCK=source.BLOCK, num_warps=source.WARPS,
            )


@torch.no_grad()
def adamw_torch_(
    weights: list[Tensor], grads: list[Tensor], moments: list[Tensor], squares: list[Tensor], steps: list[Tensor], *,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, scale: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """The same in torch, fused where torch can, which ``scale`` needs; it leaves the gradients divided."""
    fused = weights[0].device.type in ("cpu", "cuda") if weights else None
    adamw(
        weights, grads, moments, squares, [], steps, fused=fused or None, amsgrad=False, maximize=False, lr=lr,
        beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay, grad_scale=scale, found_inf=skip,
    )


def fits(weight: Tensor, *others: Tensor) -> bool:
    """Whether `adamw_fused_` takes a weight with its gradient and moments, of its shape and device: all contiguous, of
    16 or 32 bits, on a GPU where the kernel runs."""
    if not runs(weight.device):
        return False
    for t in (weight, *others):
        if t.dtype not in DTYPES or not t.is_contiguous():
            return False
    return True


@functools.cache
def runs(device: torch.device) -> bool:
    """The kernel is held against torch before it is used. Synchronises at the first call for a GPU."""
    if device.type != "cuda":
        return False
    try:
        wrong = [str(dtype) for dtype in (torch.float32, torch.bfloat16) if not _is_right(device, dtype)]
        reason = f"its results differ from torch's in {', '.join(wrong)}" if wrong else ""
    except Exception as e:  # whatever Triton lacks here
        reason = f"{type(e).__name__}: {e}"
    if reason:
        warnings.warn(f"the AdamW kernel is not used on {device}, so steps are slower ({reason})", stacklevel=2)
    return not reason


def _is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Three steps of an aligned and of an odd tensor against torch in float64."""
    generator = torch.Generator(device).manual_seed(0)
    sizes, options = (4096, 1001), {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    weights = [(0.02 * torch.randn(n, device=device, generator=generator)).to(dtype) for n in sizes]
    moments, squares = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    wide = [[t.double() for t in tensors] for tensors in (weights, moments, squares)]
    steps, wide_steps = ([torch.zeros((), dtype=torch.float32, device=device) for _ in sizes] for _ in range(2))
    for _ in range(3):
        grads = [torch.randn(n, device=device, generator=generator).to(dtype) for n in sizes]
        adamw_fused_(weights, grads, moments, squares, steps, **options)
        adamw_torch_(wide[0], [g.double() for g in grads], *wide[1:], wide_steps, **options)
    bound = 1e-5 if dtype == torch.float32 else 1e-2  # some roundings of weights as small as what they moved by
    return all(bool(((w - exact).norm() <= bound * exact.norm()).item()) for w, exact in zip(weights, wide[0]))


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW with ``fused=True``, whose step on CUDA is `adamw_fused_`.

    Args:
        params, lr, betas, eps, weight_decay: as in torch. lr is a number.

    State dicts are torch's, both ways. What the kernel does not take (other devices, float64, tensors that are not
    contiguous, DTensors whose gradient lies otherwise) goes through torch's fused step. Of a DTensor the local part is
    updated. If ``grad_scale`` is set, gradients are divided by it as they are read (the kernel, unlike torch, leaves
    them as they were), and ``found_inf`` of 1 skips the step: float32 scalars on the device, never read on the host.

    Raises:
        ValueError: an option of torch's that is not supported, in a parameter group or a state dict that is loaded.
    """

    def __init__(
        self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        for device in {p.device for group in self.param_groups for p in group["params"]}:
            runs(device)  # now, as it waits for the device

    def add_param_group(self, param_group: dict) -> None:
        _check(self.defaults | param_group)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict) -> None:
        for group in state_dict["param_groups"]:
            _check(group)
        super().load_state_dict(state_dict)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.update(fused=True, foreach=None, capturable=False)
            for p in group["params"]:
                if kept := self.state.get(p):  # torch's other steps count on the host
                    kept["step"] = kept["step"].to(p.device, torch.float32)

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lists = [[] for _ in range(6)]
            self._init_group(group, *lists)
            fused, others = [], []
            for *tensors, step in zip(*lists[:4], lists[5]):
                local = _local(tensors)
                fused.append((*local, step)) if local and fits(*local) else others.append((*tensors, step))
            options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            options |= {"scale": getattr(self, "grad_scale", None), "skip": getattr(self, "found_inf", None)}
            for update, rows in ((adamw_fused_, fused), (adamw_torch_, others)):
                if rows:
                    update(*map(list, zip(*rows)), **options)
        return loss


def _local(tensors: list[Tensor]) -> list[Tensor] | None:
    """The tensors themselves, or of DTensors the local parts, if they are placed alike."""
    if type(tensors[0]) in (Tensor, nn.Parameter) or not hasattr(tensors[0], "to_local"):
        return tensors
    alike = all(getattr(t, "placements", None) == tensors[0].placements for t in tensors)
    return [t.to_local() for t in tensors] if alike else None


def _check(group: dict) -> None:
    for name in ("amsgrad", "maximize", "differentiable"):
        if group.get(name):
            raise ValueError(f"{name} is {group[name]!r}; expected False: torch.optim.AdamW has it")
    if isinstance(group["lr"], Tensor):
        raise ValueError("lr is a tensor; expected a number: torch.optim.AdamW takes tensors")
