"""The hyperparameters of a Qwen3 model: released sizes by name, and any `config.json` in either spelling.

Sources: Qwen3 technical report, tables 1 and 2; the published config.json files (per entry of `configs.json`,
`verified` says what was checked).
"""

from __future__ import annotations

import difflib
import functools
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

NUMERICS = ("fast", "exact")
ROPE_TYPES = ("default", "yarn")
YARN_KEYS = frozenset({
    "rope_type", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "truncate",
})

# Keys of a config.json that are none of ours and leave the maths of the model alone.
_HARMLESS = frozenset("""
    _name_or_path architectures auto_map chunk_size_feed_forward dtype torch_dtype id2label label2id is_encoder_decoder
    is_decoder add_cross_attention tie_encoder_decoder max_window_layers output_attentions output_hidden_states
    output_router_logits pad_token_id sep_token_id decoder_start_token_id problem_type return_dict task_specific_params
    tokenizer_class transformers_version use_cache use_return_dict finetuning_task prefix pruned_heads torchscript
    use_bfloat16 cross_attention_hidden_size _attn_implementation _attn_implementation_internal
    _attn_implementation_autoset attn_implementation _experts_implementation experts_implementation
    generation_config
""".split())

# Keys whose other values this model does not compute.
_FIXED = {
    "hidden_act": ("silu",), "attention_bias": (False,), "attention_dropout": (0.0, None), "mlp_bias": (False,),
    "qkv_bias": (False,), "use_qk_norm": (True,), "partial_rotary_factor": (1.0, None),
    "shared_expert_intermediate_size": (0, None),
}


@dataclass(frozen=True)
class Qwen3Config:
    """Sizes and constants of one model. `num_experts` 0 is a dense model; else layers whose index is not in
    `mlp_only_layers` and where (index + 1) % decoder_sparse_step == 0 hold experts.

    `numerics`: "fast" keeps fp32 inside every op; "exact" rounds where transformers does and is for comparisons.

    Raises ValueError when a value is out of range; the message names the field.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)
    max_position_embeddings: int = 40960
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.001
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    numerics: str = "fast"

    def __post_init__(self) -> None:
        set_ = functools.partial(object.__setattr__, self)
        set_("mlp_only_layers", tuple(self.mlp_only_layers))
        if isinstance(self.eos_token_id, list):
            set_("eos_token_id", tuple(self.eos_token_id))
        set_("rope_scaling", _checked_scaling(self.rope_scaling, self.max_position_embeddings))
        _require(type(self.num_experts) is int and self.num_experts >= 0, "num_experts", self.num_experts, "0 or more")
        sizes = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "head_dim", "max_position_embeddings", "decoder_sparse_step"]
        sizes += ["num_experts_per_tok", "moe_intermediate_size"] if self.num_experts else ["intermediate_size"]
        for name in sizes:
            value = getattr(self, name)
            _require(type(value) is int and value > 0, name, value, "a positive int")
        _require(self.num_attention_heads % self.num_key_value_heads == 0, "num_attention_heads",
                 self.num_attention_heads, f"a multiple of num_key_value_heads {self.num_key_value_heads}")
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number, since RoPE turns pairs")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, name)
            _require(isinstance(value, (int, float)) and value > 0, name, value, "a positive number")
        for name in ("tie_word_embeddings", "norm_topk_prob"):
            _require(type(getattr(self, name)) is bool, name, repr(getattr(self, name)), "True or False")
        if self.num_experts:
            _require(self.num_experts_per_tok <= self.num_experts, "num_experts_per_tok", self.num_experts_per_tok,
                     f"at most num_experts {self.num_experts}")
        _require(all(0 <= i < self.num_hidden_layers for i in self.mlp_only_layers), "mlp_only_layers",
                 self.mlp_only_layers, f"layer indices below num_hidden_layers {self.num_hidden_layers}")
        _require(self.numerics in NUMERICS, "numerics", repr(self.numerics), f"one of {NUMERICS}")

    # ---- where configs come from -------------------------------------------------------------------------------------

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> Qwen3Config:
        """A released model: "Qwen3-0.6B", "Qwen3-30B-A3B-Instruct-2507", ...; `overrides` replace fields."""
        return cls._build(released(name), overrides)

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> Qwen3Config:
        """A `config.json`, or the folder that holds it. Raises FileNotFoundError; ValueError as `from_dict`."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected a config.json or a folder with one")
        try:
            return cls.from_dict(json.loads(path.read_text("utf-8")), **overrides)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from e

    @classmethod
    def from_dict(cls, config: dict[str, Any], **overrides: Any) -> Qwen3Config:
        """The content of a config.json, as transformers 4 (rope_theta, num_experts, torch_dtype) or 5 (rope_parameters,
        num_local_experts, dtype) writes it.

        Raises ValueError: an architecture or option this model does not compute, a required key that is missing, or
        keys that are not known (all of them are listed).
        """
        if not isinstance(config, dict):
            raise ValueError(f"config is a {type(config).__name__}; expected a JSON object")
        return cls._build(dict(config), overrides)

    @classmethod
    def _build(cls, raw: dict[str, Any], overrides: dict[str, Any]) -> Qwen3Config:
        model_type = raw.pop("model_type", None)
        _require(model_type in ("qwen3", "qwen3_moe"), "model_type", repr(model_type), "'qwen3' or 'qwen3_moe'")
        moe = model_type == "qwen3_moe"
        for key, allowed in _FIXED.items():
            value = raw.pop(key, allowed[0])
            _require(value in allowed, key, repr(value), f"{allowed[0]!r}: this model computes nothing else")
        _refuse_sliding_window(raw)
        _check_quantization(raw.pop("quantization_config", None))
        if "num_local_experts" in raw:
            _require(raw.get("num_experts", raw["num_local_experts"]) == raw["num_local_experts"], "num_local_experts",
                     raw["num_local_experts"], f"the same as num_experts {raw.get('num_experts')}")
            raw["num_experts"] = raw.pop("num_local_experts")
        raw["rope_theta"], raw["rope_scaling"] = _rope(raw)
        if not raw.get("head_dim"):  # transformers' own defaults
            raw["head_dim"] = raw.get("hidden_size", 0) // max(raw.get("num_attention_heads", 1), 1) if moe else 128
        required = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                    "rope_theta", "intermediate_size"]
        if moe:
            required += ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"]
            raw["mlp_only_layers"] = raw.get("mlp_only_layers") or ()
        missing = [key for key in required if raw.get(key) is None]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing; a {model_type} config.json must say them")
        known = {f.name for f in fields(cls)} - {"numerics"}
        unknown = sorted(raw.keys() - known - _HARMLESS)
        if not moe:
            unknown += sorted(k for k in _MOE_KEYS & raw.keys() if raw[k])
        if unknown:
            raise ValueError(f"unknown keys {', '.join(unknown)}: they may change what a {model_type} model computes; "
                             "remove them if they do not")
        raw.setdefault("max_position_embeddings", 32768)  # transformers' class default
        values = {key: raw[key] for key in known & raw.keys() if moe or key not in _MOE_KEYS}
        return cls(**{**values, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """A config.json in transformers 5's spelling (what `from_dict` and transformers read)."""
        moe = self.num_experts > 0
        out: dict[str, Any] = {
            "architectures": ["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"],
            "model_type": "qwen3_moe" if moe else "qwen3",
            "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "use_sliding_window": False,
            "sliding_window": None, "use_cache": True,
            "rope_parameters": {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta},
        }
        for f in fields(self):
            if f.name in ("rope_theta", "rope_scaling", "numerics") or (f.name in _MOE_KEYS and not moe):
                continue
            value = getattr(self, f.name)
            out[f.name] = list(value) if isinstance(value, tuple) else value
        if moe:
            out["num_local_experts"] = out.pop("num_experts")
        return out

    # ---- derived -----------------------------------------------------------------------------------------------------

    def is_moe_layer(self, layer: int) -> bool:
        return self.num_experts > 0 and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    def num_params(self, *, active: bool = False, embeddings: bool = True) -> int:
        """Number of parameters, a tied head counted once; `active`: those one token uses (its `num_experts_per_tok`
        experts); without `embeddings`: leaving out the embedding and the head."""
        H, D = self.hidden_size, self.head_dim
        attention = 2 * H * D * (self.num_attention_heads + self.num_key_value_heads) + 2 * D
        experts = self.num_experts_per_tok if active else self.num_experts
        moe = experts * 3 * H * self.moe_intermediate_size + self.num_experts * H
        total = H  # the final norm
        for layer in range(self.num_hidden_layers):
            total += attention + 2 * H + (moe if self.is_moe_layer(layer) else 3 * H * self.intermediate_size)
        if embeddings:
            total += self.vocab_size * H * (1 if self.tie_word_embeddings else 2)
        return total


_MOE_KEYS = frozenset({"num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
                       "router_aux_loss_coef", "decoder_sparse_step", "mlp_only_layers"})


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("configs.json").read_text("utf-8"))


def names() -> tuple[str, ...]:
    """The released models, largest family first as in the report."""
    return tuple(_table()["models"])


def released(name: str) -> dict[str, Any]:
    """The published config.json of a released model, key for key. A "Qwen/" before the name is dropped.

    Raises ValueError for another name, with the nearest ones.
    """
    table, short = _table(), name.removeprefix("Qwen/")
    if short not in table["models"]:
        near = difflib.get_close_matches(short, names(), 3, 0.5) or names()
        raise ValueError(f"model name is {name!r}; expected a released model such as {', '.join(near)}")
    own = table["models"][short]["config"]
    return {**table["common"], **table[own["model_type"]], **own}


# ---- checks of single parts of a config.json ---------------------------------------------------------------------------


def _require(ok: bool, name: str, value: object, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value}; expected {wanted}")


def _refuse_sliding_window(raw: dict[str, Any]) -> None:
    used, window = raw.pop("use_sliding_window", False), raw.pop("sliding_window", None)
    _require(not (used and window is not None), "use_sliding_window", used, "false: every layer attends to all tokens")
    types = raw.pop("layer_types", None)
    if types is not None:
        _require(all(t == "full_attention" for t in types), "layer_types", sorted(set(types)), "only 'full_attention'")
        _require(len(types) == raw.get("num_hidden_layers"), "layer_types", f"a list of {len(types)}",
                 f"num_hidden_layers {raw.get('num_hidden_layers')} entries")


def _check_quantization(quantization: dict[str, Any] | None) -> None:
    if quantization is None:
        return
    method = quantization.get("quant_method")
    _require(method == "fp8", "quantization_config.quant_method", repr(method),
             "'fp8' (block-scaled), or a checkpoint that is not quantised")
    block = quantization.get("weight_block_size")
    _require(block is not None and list(block) == [128, 128], "quantization_config.weight_block_size", block, "[128, 128]")


def _rope(raw: dict[str, Any]) -> tuple[float | None, dict[str, Any] | None]:
    """(theta, scaling) out of rope_theta and rope_scaling (old spelling) or rope_parameters (new)."""
    new, old, theta = raw.pop("rope_parameters", None), raw.pop("rope_scaling", None), raw.pop("rope_theta", None)
    _require(not (new and old and new != old), "rope_scaling", old, "the same as rope_parameters, or only one of them")
    scaling = dict(new or old or {})
    inner = scaling.pop("rope_theta", None)
    _require(theta is None or inner in (None, theta), "rope_theta", theta, f"the same as in rope_parameters, {inner}")
    _require(scaling.pop("partial_rotary_factor", None) in (None, 1.0), "partial_rotary_factor", "below 1", "1.0")
    return (inner if theta is None else theta), scaling


def _checked_scaling(scaling: dict[str, Any] | None, max_position_embeddings: int) -> dict[str, Any] | None:
    """None for plain RoPE; else YaRN's keys with `original_max_position_embeddings` and `factor` filled in."""
    scaling = dict(scaling or {})
    kind = scaling.pop("type", None)  # transformers before 4.45
    kind = scaling.pop("rope_type", kind) or "default"
    _require(kind in ROPE_TYPES, "rope_scaling.rope_type", repr(kind), f"one of {ROPE_TYPES}")
    if kind == "default":
        _require(not scaling, "rope_scaling", scaling, "no further keys with rope_type 'default'")
        return None
    unknown = sorted(scaling.keys() - YARN_KEYS)
    _require(not unknown, "rope_scaling", f"with unknown keys {unknown}", f"keys of {sorted(YARN_KEYS)}")
    original = scaling.get("original_max_position_embeddings") or max_position_embeddings
    factor = scaling.get("factor") or max_position_embeddings / original
    for name, value in {**scaling, "factor": factor, "original_max_position_embeddings": original}.items():
        _require(value is None or (isinstance(value, (int, float)) and (name == "truncate" or value > 0)),
                 f"rope_scaling.{name}", value, "a positive number")
    _require(factor >= 1, "rope_scaling.factor", factor, "at least 1")
    kept = {name: value for name, value in scaling.items() if value is not None}
    return {"rope_type": "yarn", **kept, "factor": factor, "original_max_position_embeddings": original}
