import copy
import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from transformers import Qwen3Config as HFConfig
from transformers import Qwen3MoeConfig as HFMoeConfig

from qwen3_model.config import Qwen3Config, names, released

FACTS = json.loads((Path(__file__).parents[1] / "data/qwen3_configs.json").read_text())
COUNTED = [name for name in FACTS if "params_total" in FACTS[name]]
# hidden, layers, heads, key/value heads, feed-forward (of one expert), tied: the report's tables 1 and 2.
REPORT = {
    "Qwen3-0.6B": (1024, 28, 16, 8, 3072, True), "Qwen3-1.7B": (2048, 28, 16, 8, 6144, True),
    "Qwen3-4B": (2560, 36, 32, 8, 9728, True), "Qwen3-8B": (4096, 36, 32, 8, 12288, False),
    "Qwen3-14B": (5120, 40, 40, 8, 17408, False), "Qwen3-32B": (5120, 64, 64, 8, 25600, False),
    "Qwen3-30B-A3B": (2048, 48, 32, 4, 768, False), "Qwen3-235B-A22B": (4096, 94, 64, 4, 1536, False),
}  # fmt: skip
DENSE, MOE = FACTS["Qwen3-0.6B"]["config"], FACTS["Qwen3-30B-A3B"]["config"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def new_spelling(old: dict) -> dict:
    """What transformers 5 writes for a config.json of transformers 4."""
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype", "num_experts")}
    new["rope_parameters"] = {"rope_type": "default", **(old["rope_scaling"] or {}), "rope_theta": old["rope_theta"]}
    new["dtype"] = old["torch_dtype"]
    if "num_experts" in old:
        new["num_local_experts"] = old["num_experts"]
    return new | {"layer_types": ["full_attention"] * old["num_hidden_layers"], "pad_token_id": None}


# ---- released models -------------------------------------------------------------------------------------------------


def test_all_released_models_are_known():
    assert set(names()) == set(FACTS) and len(FACTS) == 20


@pytest.mark.parametrize("name", FACTS)
def test_released_config_is_the_published_one(name):
    fact, raw = FACTS[name], released(name)
    assert raw == fact["config"]
    if "sha256" in fact:
        assert hashlib.sha256(json.dumps(raw, indent=2, sort_keys=True).encode()).hexdigest() == fact["sha256"]
    config = Qwen3Config.from_name("Qwen/" + name)
    assert config == Qwen3Config.from_dict(fact["config"]) == Qwen3Config.from_dict(new_spelling(fact["config"]))
    for field in dataclasses.fields(config):
        if field.name in raw and field.name not in ("mlp_only_layers", "rope_scaling"):
            assert getattr(config, field.name) == raw[field.name], field.name


@pytest.mark.parametrize("name", REPORT)
def test_sizes_of_the_report(name):
    c = Qwen3Config.from_name(name)
    width = c.moe_intermediate_size if c.num_experts else c.intermediate_size
    sizes = (c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, width)
    assert (*sizes, c.tie_word_embeddings) == REPORT[name]
    assert (c.head_dim, c.vocab_size, c.rms_norm_eps, c.rope_theta, c.rope_scaling) == (128, 151_936, 1e-6, 1e6, None)
    if "-A" in name:
        assert (c.num_experts, c.num_experts_per_tok, c.norm_topk_prob, c.mlp_only_layers) == (128, 8, True, ())
        assert all(map(c.is_moe_layer, range(c.num_hidden_layers)))
    else:
        assert c.num_experts == 0 and not any(map(c.is_moe_layer, range(c.num_hidden_layers)))


@pytest.mark.parametrize("name", COUNTED)
def test_parameter_counts(name):
    fact, c = FACTS[name], Qwen3Config.from_name(name)
    assert c.num_params() == fact["params_total"]
    assert c.num_params(embeddings=False) == fact["params_non_embedding"]
    assert c.num_params(active=True) == fact["params_active"]


@pytest.mark.parametrize(
    "name, theta, context, eos",
    [
        ("Qwen3-0.6B-Base", 1e6, 32768, 151643), ("Qwen3-4B-Instruct-2507", 5e6, 262144, 151645),
        ("Qwen3-30B-A3B-Thinking-2507", 1e7, 262144, 151645), ("Qwen3-235B-A22B-Instruct-2507", 5e6, 262144, 151645),
    ],
)  # fmt: skip
def test_base_and_2507(name, theta, context, eos):
    c = Qwen3Config.from_name(name)
    assert (c.rope_theta, c.max_position_embeddings, c.eos_token_id) == (theta, context, eos)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="'Qwen3-0.5B'; expected a released model such as .*Qwen3-0.6B"):
        Qwen3Config.from_name("Qwen3-0.5B")


def test_overrides_replace_fields():
    c = Qwen3Config.from_name("Qwen3-4B", rope_scaling=YARN, max_position_embeddings=131072, numerics="exact")
    assert (c.rope_scaling, c.max_position_embeddings, c.numerics, c.hidden_size) == (YARN, 131072, "exact", 2560)
    with pytest.raises(TypeError, match="hidden"):
        Qwen3Config.from_name("Qwen3-4B", hidden=5)


# ---- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen3-8B", "Qwen3-30B-A3B"])
@pytest.mark.parametrize("scaling", [None, YARN])
def test_round_trips(name, scaling):
    """Through our own dict, through transformers' config, and through the file transformers writes."""
    config = Qwen3Config.from_name(name, rope_scaling=scaling, eos_token_id=(151645, 151643))
    written = config.to_dict()
    assert json.loads(json.dumps(written)) == written and Qwen3Config.from_dict(written) == config
    assert Qwen3Config.from_dict(config.to_dict(), numerics="exact") == dataclasses.replace(config, numerics="exact")
    theirs = (HFMoeConfig if config.num_experts else HFConfig)(**config.to_dict())
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "rms_norm_eps", "eos_token_id",
                "tie_word_embeddings", "vocab_size", "rope_parameters", "max_position_embeddings"):  # fmt: skip
        assert getattr(theirs, key) == written[key], key
    assert Qwen3Config.from_dict(theirs.to_dict()) == config


@pytest.mark.parametrize("kind", [HFConfig, HFMoeConfig])
@pytest.mark.parametrize("changes", [{}, {"rope_parameters": {**YARN, "rope_theta": 5e5}}, {"norm_topk_prob": True}])
def test_files_of_transformers_are_read(kind, changes, tmp_path):
    """Its own defaults too, which differ from those of the published files."""
    moe = kind is HFMoeConfig
    if "norm_topk_prob" in changes and not moe:
        changes = {"hidden_size": 1024}
    theirs = kind(**changes)
    theirs.save_pretrained(tmp_path)
    config = Qwen3Config.from_file(tmp_path)
    assert config == Qwen3Config.from_file(tmp_path / "config.json") == Qwen3Config.from_dict(theirs.to_dict())
    assert config.rope_theta == theirs.rope_parameters["rope_theta"] and config.hidden_size == theirs.hidden_size
    assert config.max_position_embeddings == 32768 and bool(config.rope_scaling) == ("rope_parameters" in changes)
    if moe:
        assert config.head_dim == 2048 // 32 and config.norm_topk_prob == changes.get("norm_topk_prob", False)
        assert config.num_experts == 128


def test_from_dict_leaves_its_argument_alone():
    for raw in (DENSE, MOE, new_spelling(MOE)):
        before = copy.deepcopy(raw)
        Qwen3Config.from_dict(raw)
        assert raw == before


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json: no such file; expected a config.json or a folder"):
        Qwen3Config.from_file(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: Expecting"):
        Qwen3Config.from_file(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json: config is a list; expected a JSON object"):
        Qwen3Config.from_file(tmp_path)


def test_keys_without_effect_are_accepted():
    plain = {"use_cache": False, "torch_dtype": "float32", "output_attentions": True, "id2label": {},
             "_name_or_path": "x", "use_sliding_window": False, "sliding_window": 4096}  # fmt: skip
    assert Qwen3Config.from_dict(DENSE | plain) == Qwen3Config.from_dict(DENSE)
    coder = {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0, "mlp_only_layers": None}
    assert Qwen3Config.from_dict(MOE | coder) == Qwen3Config.from_dict(MOE)
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"}
    assert Qwen3Config.from_dict(DENSE | {"quantization_config": fp8}) == Qwen3Config.from_dict(DENSE)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"logit_softcap": 30.0, "attention_sinks": 4}, "unknown keys attention_sinks, logit_softcap: they may change"),
        ({"num_experts": 4, "norm_topk_prob": True}, "unknown keys norm_topk_prob, num_experts"),
        ({"attention_bias": True}, "attention_bias is True; expected False: this model computes nothing else"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"use_qk_norm": False}, "use_qk_norm is False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size is 64"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window is True; expected false"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 14}, "layer_types is .*sliding_attention"),
        ({"layer_types": ["full_attention"]}, "layer_types is a list of 1; expected num_hidden_layers 28"),
        ({"model_type": "llama"}, "model_type is 'llama'; expected 'qwen3' or 'qwen3_moe'"),
        ({"model_type": None}, "model_type is None"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'; expected 'fp8'"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, r"size is \[64, 64\]"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size is None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type is 'linear'; expected one of"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta is 1000000; expected the same"),
        ({"rope_theta": None}, "rope_theta missing; a qwen3 config.json must say them"),
        ({"vocab_size": None, "hidden_size": None}, "vocab_size, hidden_size missing"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        Qwen3Config.from_dict(DENSE | changes)


@pytest.mark.parametrize("key", ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"])
def test_moe_keys_must_be_there(key):
    with pytest.raises(ValueError, match=f"{key} missing; a qwen3_moe config.json must say them"):
        Qwen3Config.from_dict({k: v for k, v in MOE.items() if k != key})


def test_moe_spellings():
    assert Qwen3Config.from_dict(MOE | {"num_local_experts": 128}) == Qwen3Config.from_dict(MOE)
    with pytest.raises(ValueError, match="num_local_experts is 64; expected the same as num_experts 128"):
        Qwen3Config.from_dict(MOE | {"num_local_experts": 64})


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 0}, "vocab_size is 0; expected a positive int"),
        ({"hidden_size": -8}, "hidden_size is -8; expected a positive int"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0; expected a positive int"),
        ({"intermediate_size": "64"}, "intermediate_size is 64; expected a positive int"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_attention_heads": 12}, "num_attention_heads is 12; expected a multiple of num_key_value_heads 8"),
        ({"head_dim": 7}, "head_dim is 7; expected an even number, since RoPE turns pairs"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0; expected a positive number"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0; expected a positive number"),
        ({"initializer_range": float("nan")}, "initializer_range is nan"),
        ({"numerics": "quick"}, "numerics is 'quick'; expected one of"),
        ({"num_experts": -1}, "num_experts is -1; expected 0 or more"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; expected True or False"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1; expected True or False"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Qwen3Config.from_name("Qwen3-0.6B"), **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_experts_per_tok": 129}, "num_experts_per_tok is 129; expected at most num_experts 128"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0; expected a positive int"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0; expected a positive int"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0; expected a positive int"),
        ({"mlp_only_layers": [3, 48]}, r"mlp_only_layers is \(3, 48\); expected layer indices below num_hidden_layers"),
    ],
)
def test_bad_moe_values(changes, message):
    with pytest.raises(ValueError, match=message):
        Qwen3Config.from_name("Qwen3-30B-A3B", **changes)


def test_layers_with_experts():
    c = Qwen3Config.from_name("Qwen3-30B-A3B", num_hidden_layers=8, decoder_sparse_step=2, mlp_only_layers=[3])
    assert [i for i in range(8) if c.is_moe_layer(i)] == [1, 5, 7]
    dense, experts = 3 * 2048 * 6144, 128 * (3 * 2048 * 768 + 2048)
    attention = 2 * 2048 * 128 * (32 + 4) + 2 * 128 + 2 * 2048
    assert c.num_params(embeddings=False) == 8 * attention + 5 * dense + 3 * experts + 2048


def test_configs_are_values():
    c = Qwen3Config.from_name("Qwen3-4B", rope_scaling=YARN)
    assert hash(c) == hash(Qwen3Config.from_name("Qwen3-4B", rope_scaling=dict(YARN))) and len({c, c}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.hidden_size = 1


# ---- YaRN ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scaling, context, kept",
    [
        (YARN, 131072, YARN),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 40960, YARN),  # before 4.45
        ({"rope_type": "yarn", "original_max_position_embeddings": 32768}, 131072, YARN),  # the ratio of the two
        ({"rope_type": "yarn", "factor": 4.0}, 32768, YARN),
        ({**YARN, "beta_fast": None, "truncate": False}, 131072, {**YARN, "truncate": False}),
        ({"rope_type": "default"}, 40960, None),
        ({}, 40960, None),
        (None, 40960, None),
    ],
)
def test_yarn_forms(scaling, context, kept):
    old = DENSE | {"rope_scaling": scaling, "max_position_embeddings": context}
    new = {k: v for k, v in old.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {**(scaling or {}), "rope_theta": 1e6}
    assert Qwen3Config.from_dict(old).rope_scaling == Qwen3Config.from_dict(new).rope_scaling == kept


@pytest.mark.parametrize(
    "scaling, message",
    [
        ({**YARN, "factor": 0.5}, "rope_scaling.factor is 0.5; expected at least 1"),
        ({**YARN, "factor": "4"}, "rope_scaling.factor is 4; expected a positive number"),
        ({**YARN, "beta_fast": -1}, "rope_scaling.beta_fast is -1; expected a positive number"),
        ({**YARN, "short_factor": [1.0]}, r"unknown keys \['short_factor'\]"),
        ({"rope_type": "default", "factor": 4.0}, "no further keys with rope_type 'default'"),
        ({"factor": 4.0}, "no further keys with rope_type 'default'"),
        ({**YARN, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_bad_yarn(scaling, message):
    with pytest.raises(ValueError, match=message):
        Qwen3Config.from_dict(DENSE | {"rope_scaling": scaling})
