"""The other implementations that the suites time next to ours.

Every peer is optional: one that is not installed, or cannot run on the device, is listed with the reason and left out.
An entry of the table is a factory: it imports the peer and returns an `Impl`, or None when the peer has no such form of
the op (a varlen attention, say). It takes the case's context; the `Impl` takes the case's inputs.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qwen3_kernels.ops.cross_entropy import cross_entropy_ref
from qwen3_kernels.ops.linear_cross_entropy import linear_cross_entropy_ref
from qwen3_kernels.ops.moe_experts import moe_experts_ref
from qwen3_kernels.ops.moe_router import moe_router_ref
from qwen3_kernels.ops.qk_norm_rope import qk_norm_rope_ref
from qwen3_kernels.ops.rms_norm import rms_norm_ref
from qwen3_kernels.ops.swiglu import swiglu_ref

from .harness import Case, Impl, version_of


@dataclass(frozen=True)
class Peer:
    """``module`` is looked up to see whether the peer is there, ``distribution`` for its version."""

    what: str
    module: str
    distribution: str
    cuda_only: bool = False


PEERS = {
    "torch": Peer("plain torch, its fused functions where it has them", "torch", "torch"),
    "compile": Peer("torch.compile of the plain formulas", "torch", "torch"),
    "liger": Peer("Liger-Kernel's Triton functions", "liger_kernel", "liger-kernel", cuda_only=True),
    "cce": Peer("Apple's cut-cross-entropy", "cut_cross_entropy", "cut-cross-entropy", cuda_only=True),
    "quack": Peer("QuACK's CuTe kernels", "quack", "quack-kernels", cuda_only=True),
    "sonic": Peer("SonicMoE's CuTe kernels", "sonicmoe", "sonic-moe", cuda_only=True),
    "fa4": Peer("FlashAttention 4 (CuTe)", "flash_attn.cute", "flash-attn-4", cuda_only=True),
    "sdpa-flash": Peer("torch's flash attention", "torch", "torch"),
    "sdpa-cudnn": Peer("cuDNN attention through torch", "torch", "torch", cuda_only=True),
    "sdpa-efficient": Peer("torch's memory-efficient attention", "torch", "torch", cuda_only=True),
    "transformers": Peer("transformers' Qwen3ForCausalLM", "transformers", "transformers"),
}


def select(text: str) -> list[str]:
    """The peers that ``--peers`` names: ``all``, ``none`` or a comma-separated list."""
    if text in ("all", "none"):
        return list(PEERS) if text == "all" else []
    names = [n.strip() for n in text.split(",") if n.strip()]
    unknown = [n for n in names if n not in PEERS]
    if unknown or not names:
        raise ValueError(f"--peers is {text!r}; expected all, none, or a list of {', '.join(PEERS)}")
    return list(dict.fromkeys(names))


def absent(name: str, device: str) -> str | None:
    """Why a peer cannot run here, or None when it can."""
    peer = PEERS[name]
    if peer.cuda_only and device != "cuda":
        return "runs on CUDA only"
    try:
        found = importlib.util.find_spec(peer.module) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        found = False
    return None if found else "not installed"


def status(names: list[str], device: str) -> dict[str, str]:
    """Peer -> its version, or why it is absent."""
    reasons = {n: absent(n, device) for n in names}
    return {n: f"absent: {why}" if why else version_of(PEERS[n].distribution) or "unknown"
            for n, why in reasons.items()}


def impls(case: Case, names: list[str], device: str) -> dict[str, Impl | Exception]:
    """The peers of a case that are here; an `Exception` for one whose factory raised."""
    found: dict[str, Impl | Exception] = {}
    for name in names:
        factory = _FACTORIES.get((name, case.op))
        if factory is None or absent(name, device) is not None or (case.peers is not None and name not in case.peers):
            continue
        try:
            impl = factory(case.context)
        except Exception as e:
            impl = e
        if impl is not None:
            found[name] = impl
    return found


Factory = Callable[[dict], "Impl | None"]
_FACTORIES: dict[tuple[str, str], Factory] = {}


def provides(peer: str, op: str) -> Callable[[Factory], Factory]:
    """Registers a factory for a peer's implementation of an op."""
    if peer not in PEERS:
        raise ValueError(f"provides: peer is {peer!r}; expected one of {', '.join(PEERS)}")

    def register(factory: Factory) -> Factory:
        _FACTORIES[peer, op] = factory
        return factory

    return register


# --- rms_norm(x, weight[, residual]) -> y or (y, h)


@provides("torch", "rms_norm")
def _(context):
    def run(x, weight, residual=None):
        if residual is None:
            return F.rms_norm(x, weight.shape, weight, 1e-6)
        h = x + residual
        return F.rms_norm(h, weight.shape, weight, 1e-6), h

    return Impl(run)


@provides("compile", "rms_norm")
def _(context):
    return _compiled(lambda x, weight, residual=None: rms_norm_ref(x, weight, 1e-6, residual))


@provides("liger", "rms_norm")
def _(context):
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # Its in-place backward would write over the cotangents that the others read.
    def run(x, weight, residual=None):
        if residual is None:
            return LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)
        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, 1e-6, 0.0, "llama", False)

    return Impl(run)


@provides("quack", "rms_norm")
def _(context):
    from quack.rmsnorm import rmsnorm

    def run(x, weight, residual=None):
        return rmsnorm(x, weight, residual=residual, eps=1e-6, prenorm=residual is not None)

    return Impl(run)


# --- swiglu(gate, up) -> y


@provides("torch", "swiglu")
def _(context):
    return Impl(lambda gate, up: F.silu(gate) * up)


@provides("compile", "swiglu")
def _(context):
    return _compiled(swiglu_ref)


@provides("liger", "swiglu")
def _(context):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return Impl(lambda gate, up: LigerSiLUMulFunction.apply(gate, up))


# --- cross_entropy(logits, labels) -> mean loss


@provides("torch", "cross_entropy")
def _(context):
    return Impl(lambda logits, labels: F.cross_entropy(logits.float(), labels))


@provides("compile", "cross_entropy")
def _(context):
    return _compiled(cross_entropy_ref)


@provides("liger", "cross_entropy")
def _(context):
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    # The forward already computes the gradient, in the logits' own memory: only the pair can be compared.
    return Impl(lambda logits, labels: LigerCrossEntropyFunction.apply(logits, labels, None)[0],
                modes=("fwdbwd",), mutates=True)


@provides("quack", "cross_entropy")
def _(context):
    from quack.cross_entropy import cross_entropy

    return Impl(lambda logits, labels: cross_entropy(logits, labels, reduction="mean"))


# --- linear_cross_entropy(hidden, head, labels) -> mean loss


@provides("torch", "linear_cross_entropy")
def _(context):
    return Impl(lambda hidden, head, labels: F.cross_entropy((hidden @ head.T).float(), labels))


@provides("compile", "linear_cross_entropy")
def _(context):
    return _compiled(linear_cross_entropy_ref)


@provides("liger", "linear_cross_entropy")
def _(context):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return Impl(lambda hidden, head, labels: LigerFusedLinearCrossEntropyFunction.apply(hidden, head, labels)[0])


@provides("cce", "linear_cross_entropy")
def _(context):
    from cut_cross_entropy import linear_cross_entropy

    return Impl(lambda hidden, head, labels: linear_cross_entropy(hidden, head, labels))


@provides("quack", "linear_cross_entropy")
def _(context):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return Impl(lambda hidden, head, labels: chunked_linear_cross_entropy(hidden, head, labels, reduction="mean"))


# --- linear_kl(hidden, head, teacher_hidden, teacher_head) -> mean divergence from the teacher


@provides("torch", "linear_kl")
def _(context):
    """In chunks whose logits are computed again for the backward: as a whole, with their gradients, they take over 20 GB."""

    def chunk(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
        log_p = (teacher_hidden @ teacher_head.T).float().log_softmax(-1)
        return F.kl_div((hidden @ head.T).float().log_softmax(-1), log_p, reduction="sum", log_target=True)

    def run(hidden, head, teacher_hidden, teacher_head):
        parts = zip(hidden.split(1024), teacher_hidden.split(1024))
        sums = [checkpoint(chunk, h, head, t, teacher_head, use_reentrant=False) for h, t in parts]
        return torch.stack(sums).sum() / len(hidden)

    return Impl(run)


# --- qk_norm_rope(q, k, q_weight, k_weight, cos, sin) -> (q', k')


@provides("torch", "qk_norm_rope")
def _(context):
    def one(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = F.rms_norm(x, weight.shape, weight, 1e-6)
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    def run(q, k, q_weight, k_weight, cos, sin):
        return one(q, q_weight, cos, sin), one(k, k_weight, cos, sin)

    return Impl(run, adapt=lambda inputs: _full_tables(inputs, heads_dim=True))


@provides("compile", "qk_norm_rope")
def _(context):
    return _compiled(qk_norm_rope_ref)


@provides("liger", "qk_norm_rope")
def _(context):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction

    def run(q, k, q_weight, k_weight, cos, sin):
        q = LigerRMSNormFunction.apply(q, q_weight, 1e-6, 0.0, "llama", False)
        k = LigerRMSNormFunction.apply(k, k_weight, 1e-6, 0.0, "llama", False)
        q, k = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    # The rope's backward turns the cotangents in place.
    return Impl(run, mutates=True, adapt=lambda inputs: _full_tables(inputs, heads_dim=False))


def _full_tables(inputs: dict, heads_dim: bool) -> dict:
    """cos and sin [1, T, D] or [T, 1, D] in the activations' dtype, as model code keeps them for all layers."""
    tables = {n: torch.cat((inputs[n], inputs[n]), -1).to(inputs["q"].dtype) for n in ("cos", "sin")}
    return inputs | {n: t.unsqueeze(1) if heads_dim else t.unsqueeze(0) for n, t in tables.items()}


# --- attention(q, k, v[, cu_seqlens]) -> out, causal. context: documents (list of lengths, or None)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, gqa: bool) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if not gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


@provides("torch", "attention")
def _(context):
    documents = context["documents"]
    if documents is None:
        return Impl(lambda q, k, v: _sdpa(q, k, v, gqa=True))

    def run(q, k, v, cu_seqlens):
        parts = zip(*(t.split(documents) for t in (q, k, v)))
        return torch.cat([_sdpa(*(t[None] for t in part), gqa=True)[0] for part in parts])

    return Impl(run)


def _sdpa_backend(backend: str, gqa: bool) -> Factory:
    def factory(context):
        if context["documents"] is not None:
            return None
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def run(q, k, v):
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return _sdpa(q, k, v, gqa)

        return Impl(run)

    return factory


provides("sdpa-cudnn", "attention")(_sdpa_backend("CUDNN_ATTENTION", gqa=True))
# It refuses grouped heads, so k and v are repeated for it, within the timed region.
provides("sdpa-efficient", "attention")(_sdpa_backend("EFFICIENT_ATTENTION", gqa=False))


@provides("sdpa-flash", "attention")
def _(context):
    if context["documents"] is None:
        return _sdpa_backend("FLASH_ATTENTION", gqa=True)(context)
    if context["device"] != "cuda":
        return None  # torch's varlen form exists on CUDA only
    from torch.nn.attention.varlen import varlen_attn

    longest = max(context["documents"])
    accepted = inspect.signature(varlen_attn).parameters  # they differ between torch 2.10, 2.11 and 2.12
    options = {"is_causal": True} if "is_causal" in accepted else {"window_size": (-1, 0)}
    gqa = "enable_gqa" in accepted
    if gqa:
        options["enable_gqa"] = True

    def run(q, k, v, cu_seqlens):
        if not gqa:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)

    return Impl(run)


@provides("fa4", "attention")
def _(context):
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    if context["documents"] is None:
        return Impl(lambda q, k, v: flash_attn_func(q, k, v, causal=True)[0])
    longest = max(context["documents"])

    def run(q, k, v, cu_seqlens):
        return flash_attn_varlen_func(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest,
                                      max_seqlen_k=longest, causal=True)[0]

    return Impl(run)


# --- paged_attention(q, k_pages, v_pages, page_table, lengths[, k_scale, v_scale]) -> out. context: lengths


def _gathered(inputs: dict) -> dict:
    """Dense keys and values [B, T, Hk, D] in the queries' dtype, as one who has no paged kernel holds them."""
    table = inputs["page_table"].clamp(min=0).long()
    dense = {}
    for name in ("k", "v"):
        held, scale = inputs[f"{name}_pages"], inputs.get(f"{name}_scale")
        rows = held[table] if scale is None else held.view(torch.uint8)[table].view(held.dtype)
        rows = rows.flatten(1, 2).to(inputs["q"].dtype)
        dense[name] = rows if scale is None else rows * scale.to(rows.dtype).unsqueeze(-1)
    return {"q": inputs["q"], "lengths": inputs["lengths"]} | dense


@provides("torch", "paged_attention")
def _(context):
    equal = len(set(context["lengths"])) == 1

    def run(q, k, v, lengths):
        mask = None if equal else (torch.arange(k.shape[1], device=q.device) < lengths.unsqueeze(1))[:, None, None]
        k, v = (t[:, : max(context["lengths"])].transpose(1, 2) for t in (k, v))
        mask = None if equal else mask[..., : k.shape[2]]
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    return Impl(run, adapt=_gathered)


@provides("sdpa-flash", "paged_attention")
def _(context):
    if context["device"] != "cuda":
        return None
    from torch.nn.attention.varlen import varlen_attn

    accepted = inspect.signature(varlen_attn).parameters
    if "seqused_k" not in accepted:
        return None
    lengths, gqa = context["lengths"], {"enable_gqa": True} if "enable_gqa" in accepted else {}

    def run(q, k, v, lengths, cu_q, cu_k):
        B, T = k.shape[:2]
        k, v = (t.flatten(0, 1) for t in (k, v))
        if not gqa:
            k, v = (t.repeat_interleave(q.shape[2] // t.shape[1], 1) for t in (k, v))
        return varlen_attn(q.flatten(0, 1), k, v, cu_q, cu_k, 1, T, seqused_k=lengths, **gqa).view(q.shape)

    def adapt(inputs):
        dense = _gathered(inputs)
        rows = torch.arange(len(lengths) + 1, dtype=torch.int32, device=dense["q"].device)
        return dense | {"cu_q": rows, "cu_k": rows * dense["k"].shape[1]}

    return Impl(run, adapt=adapt)


# --- qk_norm_attention(q, k, v, q_weight, k_weight, cos, sin[, cu_seqlens]) -> out: what one would put together from the parts


def _assembled(prologue: str, core: str) -> Factory:
    def factory(context):
        after = _FACTORIES[core, "attention"](context)
        if after is None or (prologue == "liger" and context["documents"] is not None):  # Liger's rope wants a batch
            return None
        before = _FACTORIES[prologue, "qk_norm_rope"](context)

        def run(q, k, v, q_weight, k_weight, cos, sin, **packed):
            q, k = before.fn(q, k, q_weight, k_weight, cos, sin)
            return after.fn(q, k, v, **packed)

        return Impl(run, mutates=before.mutates, adapt=before.adapt)

    return factory


for _name, _prologue, _core in (
    ("torch", "torch", "torch"), ("sdpa-cudnn", "compile", "sdpa-cudnn"), ("sdpa-flash", "compile", "sdpa-flash"),
    ("fa4", "compile", "fa4"), ("liger", "liger", "torch"),
):
    provides(_name, "qk_norm_attention")(_assembled(_prologue, _core))


# --- moe_router(logits) -> weights. context: top_k


@provides("torch", "moe_router")
def _(context):
    def run(logits):
        weights = logits.softmax(-1, dtype=torch.float32).topk(context["top_k"], dim=-1).values
        return weights / weights.sum(-1, keepdim=True)

    return Impl(run)


@provides("compile", "moe_router")
def _(context):
    return _compiled(lambda logits: moe_router_ref(logits, context["top_k"])[0])


# --- moe_experts(x, gate_up, down, ids, weights) -> out


def _grouped_mm(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """On torch's grouped products, as transformers' implementation of that name."""
    (N, K), E = ids.shape, gate_up.shape[0]
    by_expert, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(by_expert, torch.arange(1, E + 1, device=ids.device), out_int32=True)
    gate, up = torch._grouped_mm(x[order // K], gate_up.mT, ends).chunk(2, -1)
    y = torch._grouped_mm(F.silu(gate) * up, down.mT, ends)
    rows = torch.empty_like(order).scatter_(0, order, torch.arange(N * K, device=ids.device))
    return (y[rows].view(N, K, -1) * weights.unsqueeze(-1)).sum(1).to(x.dtype)


@provides("torch", "moe_experts")
def _(context):
    return Impl(_grouped_mm if context["device"] == "cuda" else moe_experts_ref)


@provides("compile", "moe_experts")
def _(context):
    return _compiled(_grouped_mm) if context["device"] == "cuda" else None


@provides("liger", "moe_experts")
def _(context):
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return Impl(lambda x, gate_up, down, ids, weights: LigerFusedMoEFunction.apply(x, gate_up, down, ids, weights),
                adapt=lambda inputs: inputs | {"ids": inputs["ids"].int()})


def _fewer_sonic_configurations() -> None:
    """Each of SonicMoE's products is tuned among up to 44 configurations, which takes over 200 s to compile. Its default and
    the widest tiles of both kinds, 6 of them, are what it is tuned among here."""
    from quack import gemm_interface

    widest = {(256, 128, False), (256, 192, False), (128, 256, False), (128, 128, True), (128, 160, True), (128, 192, True)}

    def kept(choice: object) -> bool:
        c = choice.kwargs["config"]
        shape = (c.tile_m, c.tile_n, c.pingpong)
        return c.device_capacity == 9 and shape in widest and c.cluster_m == 2 and not c.swap_ab

    for tuned in vars(gemm_interface).values():  # what its decorator has made of each product
        if hasattr(tuned, "configs"):
            tuned.configs = [c for c in tuned.configs if kept(c)] or tuned.configs


@provides("sonic", "moe_experts")
def _(context):
    _fewer_sonic_configurations()
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import TC_topk_router_metadata_triton, _DownProjection, _UpProjection

    def run(x, gate_up, down, ids, weights):
        (N, K), E = ids.shape, gate_up.shape[0]
        count, bounds, token, slot, inverse = (
            torch.empty(n, dtype=torch.int32, device=x.device) for n in (E, E + 1, N * K, N * K, N * K)
        )
        TC_topk_router_metadata_triton(ids, E, count, bounds, token, slot, inverse)
        w1, w2, swiglu = gate_up.permute(1, 2, 0), down.permute(1, 2, 0), ActivationType.SWIGLU
        plan = (token, slot, inverse, None, False)
        a, h = _UpProjection.apply(x, w1, None, bounds, N * K, K, *plan, swiglu, not torch.is_grad_enabled(), True)
        return _DownProjection.apply(a, h, w2, None, weights, bounds, N, K, *plan, swiglu)

    return Impl(run, adapt=lambda inputs: inputs | {"ids": inputs["ids"].int()})


def _compiled(fn: Callable) -> Impl:
    """A fresh compile: shapes of earlier cases neither count against the recompile limit nor turn dynamic."""
    torch._dynamo.reset()
    return Impl(torch.compile(fn, dynamic=False))
