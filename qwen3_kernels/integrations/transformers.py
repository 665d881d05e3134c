"""The kernels inside transformers' own Qwen3 and Qwen3-MoE (4.57 and 5.x): `apply`, a `Report` of it, `revert`.

    from qwen3_kernels.integrations.transformers import apply
    print(apply(model))   # an existing model, whatever wraps it; or apply() before any model is made

One table, `PATCHES`, says which attribute of which class an op replaces; both families share it. A replacement is made
from the attribute it replaces, calls that one whenever the kernel cannot do what was asked, and takes all arguments it
does not use itself as they come: so it needs to know little of the version.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..ops import attention as attention_op
from ..ops import linear_cross_entropy, moe_experts, qk_norm_attention, qk_norm_rope, rms_norm, swiglu
from ..ops.linears import project
from ..ops.swiglu_mlp import fuses, swiglu_mlp

NAME = "qwen3_kernels"  # of the implementations of attention and experts
OPS = ("rms_norm", "qk_norm_rope", "swiglu", "linear_cross_entropy", "attention", "experts")


# --- What replaces what: functions of (the original, the family) that return the replacement.


def _norm(original: Callable, family: Family) -> Callable:
    def forward(self, hidden_states):
        return rms_norm(hidden_states, _weight(self, hidden_states), self.variance_epsilon)

    return forward


def _decoder_layer(original: Callable, family: Family) -> Callable:
    """The sum of attention's output and the residual stream goes with the norm that follows it; where the stream forks,
    the sum of gradients goes with the backward of the norm there. Always put on the instance: the class's forward is
    the one that checkpoints, and does so only where it is found on the class."""

    def forward(self, hidden_states, *args, **kwargs):
        first, second = self.input_layernorm, self.post_attention_layernorm
        if args or self.gradient_checkpointing or not (_bare(first) and _bare(second)):
            return type(self).forward(self, hidden_states, *args, **kwargs)
        weight = _weight(first, hidden_states)
        x, hidden_states = rms_norm(hidden_states, weight, first.variance_epsilon, fork=True)
        x, _ = self.self_attn(hidden_states=x, **kwargs)
        dtype = torch.promote_types(x.dtype, hidden_states.dtype)  # they differ under autocast
        x, hidden_states = x.to(dtype), hidden_states.to(dtype)
        x, hidden_states = rms_norm(x, _weight(second, x), second.variance_epsilon, hidden_states)
        x = self.mlp(x)
        return hidden_states + (x[0] if isinstance(x, tuple) else x)  # a tuple with the router's logits in 4.57

    return forward


def _rotary(original: Callable, family: Family) -> Callable:
    """cos and sin [B or 1, T, D/2] in float32, where transformers rounds them to the activations' dtype."""

    def forward(self, x, position_ids):
        cos, sin = original(self, x.new_empty(0, dtype=torch.float32), position_ids)
        return tuple(t[..., : t.shape[-1] // 2].contiguous() for t in (cos, sin))

    return forward


def _attention_module(original: Callable, family: Family) -> Callable:
    cache_name = "cache" if "cache" in inspect.signature(original).parameters else "past_key_values"  # before 5.2x

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        half = self.head_dim // 2
        if not (_bare(self.q_norm) and _bare(self.k_norm)):
            if position_embeddings[0].shape[-1] == half:
                position_embeddings = tuple(torch.cat((t, t), -1).to(hidden_states.dtype) for t in position_embeddings)
            return original(self, hidden_states, position_embeddings, attention_mask, **kwargs)
        cos, sin = (t[..., :half].reshape(-1, half).float() for t in position_embeddings)
        tokens = hidden_states.shape[:-1]
        q, k, v = (y.view(*tokens, -1, self.head_dim) for y in project(hidden_states, self.q_proj, self.k_proj, self.v_proj))
        weights, eps = (_weight(self.q_norm, q), _weight(self.k_norm, k)), self.q_norm.variance_epsilon
        cache, position = kwargs.pop(cache_name, None), kwargs.pop("cache_position", None)
        dropout = self.attention_dropout if self.training else 0.0
        if cache is None and self.config._attn_implementation == NAME and self.sliding_window is None:
            ours, bounds = _documents(self, tokens[1], tokens[1], attention_mask, dropout, kwargs)
            if ours:
                if bounds is not None:
                    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
                out = qk_norm_attention(q, k, v, *weights, (cos, sin), cu_seqlens=bounds, eps=eps, scale=self.scaling)
                return self.o_proj(out.reshape(*tokens, -1)), None
        q, k = qk_norm_rope(q, k, *weights, cos, sin, eps)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            known = {} if position is None else {"cache_kwargs": {"cache_position": position}}
            k, v = cache.update(k, v, self.layer_idx, **({"kwargs": kwargs} if cache_name == "cache" else known))
        out, weights = family.attention_function(self.config._attn_implementation)(
            self, q, k, v, attention_mask, scaling=self.scaling, sliding_window=self.sliding_window, dropout=dropout, **kwargs
        )
        return self.o_proj(out.reshape(*tokens, -1)), weights

    return forward


def _mlp(original: Callable, family: Family) -> Callable:
    def forward(self, x):
        if not _is_silu(self.act_fn):
            return original(self, x)
        layers = self.gate_proj, self.up_proj, self.down_proj
        if fuses(x, *layers):
            return swiglu_mlp(x, *(layer.weight for layer in layers))
        return self.down_proj(swiglu(*project(x, self.gate_proj, self.up_proj)))

    return forward


def _gate(original: Callable, family: Family) -> Callable:
    """Of all the experts' implementations but "eager": the packed products of gate and up come in one tensor."""

    def _apply_gate(self, gate_up_out):
        return swiglu(gate_up_out) if _is_silu(self.act_fn) else original(self, gate_up_out)

    return _apply_gate


def _experts(original: Callable, family: Family) -> Callable:
    """In place of every implementation: eager, grouped_mm, batched_mm."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        if not _plain_experts(self):
            return original(self, hidden_states, top_k_index, top_k_weights)
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)

    return forward


def _causal_lm(original: Callable, family: Family) -> Callable:
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.utils.generic import can_return_tuple

    names = tuple(inspect.signature(original).parameters)[1:]

    def forward(self, *args, **kwargs):
        kwargs.update(zip(names, args))
        keep = kwargs.get("logits_to_keep", 0)
        if (
            kwargs.get("labels") is None or not self.training or not (isinstance(keep, int) and keep == 0)
            or self.loss_function is not ForCausalLMLoss or not _plain_head(self)
        ):
            return original(self, **kwargs)
        return training(self, **kwargs)

    @can_return_tuple
    def training(self, labels, logits_to_keep=0, **kwargs):
        if family.is_moe and kwargs.get("output_router_logits") is None:
            kwargs["output_router_logits"] = self.config.output_router_logits
        outputs = self.model(**kwargs)
        with _LossOfHead(labels, **kwargs):
            loss = self.lm_head(outputs.last_hidden_state)
        fields = {name: outputs[name] for name in outputs.keys() if name != "last_hidden_state"}
        if kwargs.get("output_router_logits"):
            aux_loss = family.module.load_balancing_loss_func(
                outputs.router_logits, self.num_experts, self.num_experts_per_tok, kwargs.get("attention_mask")
            )
            fields["aux_loss"] = aux_loss
            loss = loss + self.router_aux_loss_coef * aux_loss.to(loss.device)
        return family.causal_lm_output(loss=loss, **fields)

    return forward


class _LossOfHead(TorchFunctionMode):
    """Inside, the head's ``F.linear`` gives the loss in place of logits. The head is still called as the module it is:
    its hooks (FSDP2's gathering, accelerate's moving) run, and its wrappers (PEFT's trained copy) choose the weight."""

    def __init__(self, labels, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **_) -> None:
        super().__init__()
        if shift_labels is None:  # token t is predicted from the hidden state of token t - 1
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        self.labels, self.num_items, self.ignore_index = shift_labels, num_items_in_batch, ignore_index

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        hidden, head = args[:2]
        device = hidden.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else head.dtype
        labels = self.labels.to(device).view(hidden.shape[:-1])
        items = self.num_items.to(device) if isinstance(self.num_items, Tensor) else self.num_items
        return linear_cross_entropy(
            hidden.to(dtype), head.to(dtype), labels, ignore_index=self.ignore_index,
            reduction="mean" if items is None else "num_items", num_items=items,
        )


def _new_layer(original: Callable, family: Family) -> Callable:
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        layer = family.cls("DecoderLayer")
        _swap(self, "forward", types.MethodType(_replacement(layer, "forward", _decoder_layer, family), self))

    return __init__


def _default_attention(original: Callable, family: Family) -> Callable:
    """The implementation of a model that is made without naming one."""

    def get_correct_attn_implementation(self, requested_attention, *args, **kwargs):
        if requested_attention is not None:
            return original(self, requested_attention, *args, **kwargs)
        _remember_config(self.config, original(self, None, *args, **kwargs))
        return NAME

    return get_correct_attn_implementation


# --- Attention through transformers' interface.


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **kwargs,
) -> tuple[Tensor, None]:
    """query [B, Hq, T, D], key and value [B, Hk, Tk, D]; ``attention_mask`` is what `attention_mask` below gives, and
    packed documents may be named by ``cu_seq_lens_q`` as well. Returns (out [B, T, Hq, D], None).

    transformers' sdpa does what the op cannot: any other mask, dropout, attention that is not causal.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    B, T = query.shape[0], query.shape[2]
    ours, bounds = _documents(module, T, key.shape[2], attention_mask, dropout, kwargs)
    if not ours:
        if attention_mask is not None and attention_mask.dim() == 2:
            same = attention_mask.unsqueeze(2) == attention_mask.unsqueeze(1)
            attention_mask = (same & same.new_ones(T, T).tril()).unsqueeze(1)
        kwargs |= {"dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if 1 < T < key.shape[2]:  # without a mask: the first tokens of a static cache, whose later rows are empty
        key, value = key[:, :, :T], value[:, :, :T]
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if bounds is None:
        return attention_op(q, k, v, scale=scaling), None
    q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    return attention_op(q, k, v, scale=scaling, cu_seqlens=bounds).unflatten(0, (B, T)), None


def _documents(
    module: nn.Module, queries: int, keys: int, attention_mask: Tensor | None, dropout: float, kwargs: dict
) -> tuple[bool, Tensor | None]:
    """(whether it is attention that the op can do, cu_seqlens of packed documents or None)"""
    packed = attention_mask is not None and attention_mask.dim() == 2
    bounds = kwargs.get("cu_seq_lens_q") if keys == queries else None
    causal = getattr(module, "is_causal", True) if kwargs.get("is_causal") is None else kwargs["is_causal"]
    ours = causal and not dropout and kwargs.get("position_bias") is None and (packed or attention_mask is None)
    if packed and bounds is None and torch.compiler.is_compiling():
        ours = False  # how many documents there are is data: a mask it is, as in transformers
    if ours and packed and bounds is None:
        bounds = _bounds(attention_mask)
    return ours, None if bounds is None else bounds.int()


def _bounds(documents: Tensor) -> Tensor:
    """cu_seqlens of the documents numbered in [B, T], row after row. One host sync for a forward of the model, as in
    transformers' own test for packed positions; ``cu_seq_lens_q`` among the inputs saves it."""
    known = getattr(documents, "_cu_seqlens", None)
    if known is None:
        first = torch.ones_like(documents[:, :1], dtype=torch.bool)
        starts = torch.cat((first, documents.diff() != 0), 1).flatten()
        known = F.pad(starts.nonzero().squeeze(1), (0, 1), value=starts.numel()).int()
        documents._cu_seqlens = known
    return known


def attention_mask(*, mask_function: Callable, attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
    """None for plain causal attention; the number of each token's document [B, T] for packed ones; else sdpa's mask."""
    from transformers import masking_utils

    sdpa_mask = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    queries = kwargs["q_length"] if "q_length" in kwargs else kwargs["cache_position"].shape[0]
    packed = mask_function is not masking_utils.causal_mask_function and not kwargs.get("allow_is_causal_skip", True)
    if not packed or attention_mask is not None or kwargs.get("local_size") is not None or kwargs.get("use_vmap"):
        return sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **kwargs)
    if queries != kwargs["kv_length"]:
        return sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **kwargs)
    device = kwargs["device"] if "device" in kwargs else kwargs["cache_position"].device
    token = torch.arange(1, queries, device=device)
    row = torch.arange(kwargs["batch_size"], device=device).unsqueeze(1)
    same = mask_function(row, 0, token, token - 1)  # may a token see the one before it?
    return F.pad((~same).expand(kwargs["batch_size"], -1).cumsum(-1), (1, 0))


# --- Experts through transformers' interface.


def experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The implementation "qwen3_kernels" of transformers' ExpertsInterface: hidden_states [N, D], top_k_index and
    top_k_weights [N, K] -> [N, D]. Indices from ``num_experts`` on, those of other ranks, add nothing.

    Raises ValueError: experts whose activation is not SiLU, or whose weights are not whole [E, 2I, D] and [E, D, I].
    """
    if not _plain_experts(module):
        raise ValueError(f"experts_implementation is {NAME!r}, but {type(module).__name__} has another activation than "
                         "SiLU, biases, transposed or sharded weights; expected gate_up_proj [E, 2I, D] and down_proj [E, D, I]")
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else module.gate_up_proj.dtype
    if top_k_weights.dtype not in (dtype, torch.float32):
        top_k_weights = top_k_weights.float()
    x, gate_up, down = (t.to(dtype) for t in (hidden_states, module.gate_up_proj, module.down_proj))
    return moe_experts(x, gate_up, down, top_k_index, top_k_weights).to(hidden_states.dtype)


# --- The table, and the questions the replacements ask.

BOTH, CLASS, INSTANCE = {"class", "instance"}, {"class"}, {"instance"}
PATCHES = (  # (op, class without the family's prefix, attribute, replacement, on what)
    ("rms_norm", "RMSNorm", "forward", _norm, BOTH),  # those of q and k too
    ("rms_norm", "DecoderLayer", "forward", _decoder_layer, INSTANCE),
    ("rms_norm", "DecoderLayer", "__init__", _new_layer, CLASS),
    ("qk_norm_rope", "RotaryEmbedding", "forward", _rotary, BOTH),
    ("qk_norm_rope", "Attention", "forward", _attention_module, BOTH),
    ("swiglu", "MLP", "forward", _mlp, BOTH),
    ("experts", "Experts", "forward", _experts, BOTH),
    ("experts", "Experts", "_apply_gate", _gate, BOTH),
    ("experts", "MLP", "forward", _mlp, BOTH),  # 4.57: every expert is one
    ("linear_cross_entropy", "ForCausalLM", "forward", _causal_lm, BOTH),
    ("attention", "PreTrainedModel", "get_correct_attn_implementation", _default_attention, CLASS),  # or _use_attention
)


@dataclass(frozen=True)
class Family:
    prefix: str
    module: types.ModuleType

    def cls(self, name: str) -> type | None:
        return getattr(self.module, self.prefix + name, None)

    @property
    def is_moe(self) -> bool:
        return self.prefix == "Qwen3Moe"

    @property
    def causal_lm_output(self) -> type:
        return self.module.MoeCausalLMOutputWithPast if self.is_moe else self.module.CausalLMOutputWithPast

    def attention_function(self, implementation: str) -> Callable:
        table, eager = self.module.ALL_ATTENTION_FUNCTIONS, self.module.eager_attention_forward
        if hasattr(table, "get_interface"):
            return table.get_interface(implementation, eager)
        return eager if implementation == "eager" else table[implementation]


@functools.cache
def _families() -> tuple[Family, ...]:
    names = {"Qwen3": "qwen3.modeling_qwen3", "Qwen3Moe": "qwen3_moe.modeling_qwen3_moe"}
    return tuple(Family(p, importlib.import_module(f"transformers.models.{m}")) for p, m in names.items())


def _weight(norm: nn.Module, x: Tensor) -> Tensor:
    weight = norm.weight
    return weight if weight.dtype in (x.dtype, torch.float32) else weight.to(x.dtype)


def _bare(module: nn.Module) -> bool:
    """Nothing happens in the module's call but its forward, so the kernel may read its weight without that call."""
    return not (module._forward_pre_hooks or module._forward_hooks or "_hf_hook" in vars(module))


def _is_silu(activation: Callable) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


def _plain_experts(experts: nn.Module) -> bool:
    """SiLU, gate before up, no biases, and each weight one whole tensor."""
    other = [getattr(experts, name, usual) != usual for name, usual in
             (("has_gate", True), ("has_bias", False), ("is_transposed", False), ("is_concatenated", True),
              ("has_post_expert_norm", False))]
    weights = [getattr(experts, name, None) for name in ("gate_up_proj", "down_proj")]
    whole = all(isinstance(w, Tensor) and w.dim() == 3 and type(w).__name__ != "DTensor" for w in weights)
    return whole and not any(other) and _is_silu(experts.act_fn)


def _plain_head(model: nn.Module) -> bool:
    """The head is one whole matrix: an ``nn.Linear`` or PEFT's trained copy of one; not LoRA, quantised or sharded."""
    head = model.lm_head
    if type(head).__name__ == "ModulesToSaveWrapper":
        head = head.original_module
    whole = getattr(model, "tp_size", None) in (None, 1)
    return whole and type(head).forward is nn.Linear.forward and head.bias is None


# --- Apply, report, revert.


@dataclass(frozen=True)
class Report:
    """What `apply` patched."""

    model: str | None  # class of the model; None when the classes themselves were patched
    version: str  # of transformers
    patched: dict[str, dict[str, int]]  # op -> class -> number of instances, 0 for the class itself
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        def shown(name: str, n: int) -> str:
            return f"{name}: {n} instance{'s' * (n != 1)}" if self.model else f"{name} (class)"

        lines = [f"{NAME} in {self.model or 'every model made from now on'} (transformers {self.version})"]
        for op, counts in self.patched.items():
            lines.append(f"  {op:<22}{', '.join(shown(*item) for item in counts.items())}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def apply(
    model: nn.Module | None = None, *, rms_norm: bool = True, qk_norm_rope: bool = True, swiglu: bool = True,
    linear_cross_entropy: bool = True, attention: bool = True, experts: bool = True,
) -> Report:
    """Put the kernels into transformers' Qwen3 and Qwen3-MoE.

    Args:
        model: patch the modules of this model, found by class whatever wraps them (PEFT, FSDP2, accelerate's hooks).
            None patches the classes, for models made later. To call it twice does no harm.
        rms_norm: the norms, those of q and k included, and the residual sum before the second norm of a layer; in the
            backward, the sums of gradients where the residual stream forks.
        qk_norm_rope: norm and rotation of q and k in one pass, with float32 angles.
        swiglu: the MLPs.
        linear_cross_entropy: head and loss in one, for training with labels: ``logits`` of the output is None then. A
            loss of your own, label smoothing and evaluation keep the logits. Set it to False for a trainer that reads them in
            training, as TRL's SFTTrainer below 1.7 does.
        attention: the implementation "qwen3_kernels" of transformers' AttentionInterface: causal and packed batches;
            sdpa for padding masks, sliding windows and dropout.
        experts: activation and products of all experts in one op; also registered as the implementation "qwen3_kernels" of
            transformers' ExpertsInterface. In 4.57, where every expert is a module, its activation.

    Raises:
        ValueError: the model is not Qwen3 or Qwen3-MoE, no op or an op without a match was asked for.
        RuntimeError: a module's forward was replaced by someone else. Nothing is patched in either case.
    """
    asked = dict(zip(OPS, (rms_norm, qk_norm_rope, swiglu, linear_cross_entropy, attention, experts)))
    ops = [op for op, wanted in asked.items() if wanted]
    if not ops:
        raise ValueError(f"apply: no op was asked for; expected at least one of {OPS}")
    swaps, counts, notes = _plan_classes(ops) if model is None else _plan_instances(model, ops)
    patched = {op: dict(counts[op]) for op in ops if counts[op]}
    missing = [op for op in ops if not counts[op]]
    for op, other in (("experts", "swiglu"), ("swiglu", "experts")):
        if patched and op in missing and counts[other]:  # a model has both, or either
            missing.remove(op)
            notes.append(f"{op}: no {'experts' if op == 'experts' else 'dense MLP'} in this model")
    if missing:
        what = "this version of transformers" if model is None else type(model).__name__
        raise ValueError(f"apply: nothing to patch for {', '.join(missing)} in {what}; pass "
                         f"{', '.join(f'{op}=False' for op in missing)} if that is right")
    if "Qwen3MoeMLP" in patched.get("experts", ()):
        notes.append("experts: the activation of each; their matrix products are transformers'")
    if linear_cross_entropy and (version := _trl_that_reads_logits()):
        notes.append(f"linear_cross_entropy: the SFTTrainer of trl {version} reads the logits in training where its "
                     "loss_type is 'nll', the default below 1.7; pass linear_cross_entropy=False for it")
    if attention:
        _register_attention()
    if experts:
        _register_experts()
    for swap in swaps:
        swap()
    return Report(None if model is None else type(model).__name__, transformers.__version__, patched, tuple(notes))


def _trl_that_reads_logits() -> str | None:
    """The version of trl, if it is in use and below 1.15."""
    version = getattr(sys.modules.get("trl"), "__version__", None)
    return version if version and Version(version).release[:2] < (1, 15) else None


def revert() -> None:
    """Take back every `apply`: classes, instances, registrations and configs are as they were."""
    while _undo:
        _undo.pop()()
    _replacements.clear()


_Plan = tuple[list[Callable[[], None]], dict[str, Counter], list[str]]
_undo: list[Callable[[], None]] = []
_replacements: dict[tuple[type, str], Callable] = {}
_ABSENT = object()


def _rows(on: str) -> Iterator[tuple[str, type, str, Callable]]:
    """(op, class, attribute, replacement) of `PATCHES` for both families, as far as this version has them."""
    for family in _families():
        for op, name, attr, make, places in PATCHES:
            cls = family.cls(name)
            if on not in places or cls is None or not hasattr(cls, attr):
                continue
            if op == "experts" and name == "MLP" and (family.cls("Experts") or not family.is_moe):
                continue
            yield op, cls, attr, _replacement(cls, attr, make, family)


def _replacement(cls: type, attr: str, make: Callable, family: Family) -> Callable:
    """Made once, so that what is patched already is recognised."""
    key = (cls, attr)
    if key not in _replacements:
        original = getattr(cls, attr)
        _replacements[key] = functools.wraps(original)(make(original, family))
    return _replacements[key]


def _plan_classes(ops: list[str]) -> _Plan:
    swaps, counts = [], {op: Counter() for op in OPS}
    for op, cls, attr, new in _rows("class"):
        counts[op][cls.__name__] = 0
        if op in ops:
            swaps.append(functools.partial(_swap, cls, attr, new))
    return swaps, counts, []


def _plan_instances(model: nn.Module, ops: list[str]) -> _Plan:
    """Counts what there is of every op; swaps are those of ``ops``."""
    rows, configs = list(_rows("instance")), {}
    swaps, counts, notes = [], {op: Counter() for op in OPS}, []
    for name, module in model.named_modules():
        homes = {cls.__module__ for cls in type(module).__mro__}
        family = next((f for f in _families() if f.module.__name__ in homes), None)
        if family is None:
            continue
        if hasattr(module, "config"):
            configs[id(module.config)] = module.config
        found = {("attention", family.prefix + "Attention")} if isinstance(module, family.cls("Attention")) else set()
        for op, cls, attr, new in rows:
            if not isinstance(module, cls) or not _inherits(type(module), cls, attr):
                continue
            found.add((op, cls.__name__))
            if op in ops:
                slot = _slot(module, name, attr, getattr(cls, attr), getattr(type(module), attr), new)
                swaps.append(functools.partial(_swap, module, slot, types.MethodType(new, module)))
        for op, cls_name in found:
            counts[op][cls_name] += 1
        if "linear_cross_entropy" in ops and isinstance(module, family.cls("ForCausalLM")) and not _plain_head(module):
            notes.append(f"{name or 'the model'}: lm_head is {type(module.lm_head).__name__}, not one whole matrix: "
                         "the loss goes through the logits")
        if hasattr(module, "act_fn") and not _is_silu(module.act_fn) and {"swiglu", "experts"} & set(ops):
            notes.append(f"{name}: its activation is {type(module.act_fn).__name__}, not SiLU: left to transformers")
    if not configs:
        inner = dict.fromkeys(type(m).__name__ for m in model.modules() if isinstance(m, transformers.PreTrainedModel))
        raise ValueError(f"apply: {type(model).__name__} is not a Qwen3 or Qwen3-MoE model of transformers; it holds "
                         f"{', '.join(inner) or 'no model of transformers'}")
    if "attention" in ops and counts["attention"]:
        swaps += [functools.partial(_use_attention, config) for config in configs.values()]
    return swaps, counts, notes


def _inherits(own: type, cls: type, attr: str) -> bool:
    """Whether ``own`` has the attribute of ``cls``, as it is or in a wrapper (transformers' checkpointing wraps the
    forward of every subclass, FSDP2's included). A subclass with a forward of its own is another model."""
    wanted = getattr(cls, attr)
    return inspect.unwrap(getattr(own, attr), stop=lambda f: f is wanted) is wanted


def _slot(module: nn.Module, name: str, attr: str, *ours: Callable) -> str:
    """Where the instance keeps the attribute: accelerate's hooks put it aside."""
    own = vars(module)
    slot = "_old_forward" if attr == "forward" and "_hf_hook" in own and "_old_forward" in own else attr
    present = own.get(slot)
    if present is not None and getattr(present, "__func__", None) not in ours:
        code = getattr(inspect.unwrap(present, stop=lambda f: hasattr(f, "__code__")), "__code__", None)
        raise RuntimeError(
            f"apply: {attr} of {name or 'the model'} ({type(module).__name__}) was replaced by code in "
            f"{code.co_filename if code else type(present).__name__}; call apply before that, or leave its op out"
        )
    return slot


def _swap(owner: object, name: str, new: Callable) -> None:
    """Set an attribute of a class or an instance, and remember what was there."""
    old = vars(owner).get(name, _ABSENT)
    if _function(old) is _function(new):
        return
    setattr(owner, name, new)
    reference, new = weakref.ref(owner), _function(new)  # a bound method would keep the model alive

    def undo() -> None:
        owner = reference()
        if owner is None:
            return
        slot = name
        if _function(vars(owner).get(slot)) is not new:
            slot = "_old_forward"  # accelerate's hooks came after
            if _function(vars(owner).get(slot)) is not new:
                what = f"{name} of {type(owner).__name__}"
                warnings.warn(f"revert: {what} was wrapped after apply and stays", stacklevel=3)
                return
            setattr(owner, slot, getattr(type(owner), name).__get__(owner) if old is _ABSENT else old)
        elif old is _ABSENT:
            delattr(owner, slot)
        else:
            setattr(owner, slot, old)

    _undo.append(undo)


def _function(attribute: object) -> object:
    return getattr(attribute, "__func__", attribute)


def _register_attention() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    _register(AttentionInterface, attention_forward)
    _register(AttentionMaskInterface, attention_mask)


def _register_experts() -> None:
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError:  # 4.57
        return
    _register(ExpertsInterface, experts_forward)


def _register(interface: type, function: Callable) -> None:
    table = interface._global_mapping
    if table.get(NAME) is function:
        return
    before = {NAME: table[NAME]} if NAME in table else None
    interface.register(NAME, function)
    _undo.append(functools.partial(table.update, before) if before else functools.partial(table.pop, NAME))


def _use_attention(config: object) -> None:
    if config._attn_implementation != NAME:
        _remember_config(config, config._attn_implementation)
        config._attn_implementation = NAME


def _remember_config(config: object, old: str | None) -> None:
    reference = weakref.ref(config)

    def undo() -> None:
        config = reference()
        if config is not None and config._attn_implementation == NAME:
            config._attn_implementation = old

    _undo.append(undo)
