"""Random small models, ours and transformers', with the same weights."""

from dataclasses import replace

import torch
import transformers
from torch import Tensor

from qwen3_model.config import Qwen3Config
from qwen3_model.model import Qwen3

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
BASE = Qwen3Config(
    vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.15,
)
EXPERTS = replace(BASE, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, initializer_range=0.2)
DENSE = {
    "untied": BASE,
    "tied": replace(BASE, tie_word_embeddings=True),
    "one key head": replace(BASE, num_attention_heads=5, num_key_value_heads=1, head_dim=8),
    "no groups, narrow heads": replace(BASE, num_key_value_heads=4, head_dim=6, rms_norm_eps=1e-3),
    "wide heads": replace(BASE, head_dim=40, rope_theta=1e4, tie_word_embeddings=True),
    "yarn": replace(BASE, rope_scaling=YARN),
}
MOE = {
    "experts": EXPERTS,
    "experts, tied, yarn": replace(EXPERTS, tie_word_embeddings=True, rope_scaling=YARN),
    "weights not renormalised": replace(EXPERTS, norm_topk_prob=False),
    "every second layer": replace(EXPERTS, num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=(3,)),
    "dense first layer": replace(EXPERTS, mlp_only_layers=(0,), num_experts_per_tok=1, norm_topk_prob=False),
    "all experts": replace(EXPERTS, num_experts=3, num_experts_per_tok=3),
}
ALL = DENSE | MOE


def ours(config: Qwen3Config, dtype: torch.dtype = torch.float32, numerics: str = "fast") -> Qwen3:
    """Norms' weights are random too, so that one that is left out is seen."""
    model = Qwen3(replace(config, numerics=numerics)).init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.normal_(1, 0.3, generator=generator)
    return model.to(dtype).eval()


def theirs(model: Qwen3) -> transformers.PreTrainedModel:
    """transformers' model with the weights of ours: torch's attention, one expert after another."""
    kind = "Qwen3Moe" if model.config.num_experts else "Qwen3"
    config = getattr(transformers, f"{kind}Config")(**model.config.to_dict())
    config._attn_implementation, config._experts_implementation = "sdpa", "eager"
    hf = getattr(transformers, f"{kind}ForCausalLM")(config)
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    weights |= {"lm_head.weight": weights["model.embed_tokens.weight"]} if model.config.tie_word_embeddings else {}
    hf.load_state_dict(weights, assign=True)  # not .to(dtype), which would round the RoPE frequencies as well
    hf.tie_weights()
    return hf.eval()


def some_tokens(config: Qwen3Config, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def relative(got: Tensor, want: Tensor) -> float:
    """The largest difference over the largest value."""
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()
