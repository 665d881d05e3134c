"""A whole model with random weights, ours against transformers: prefill, and greedy generation with a KV cache.

On the CPU a small model; on CUDA the 0.6B shape. A prefill is bounded by matrix products, a generated token by reading
the weights and the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qwen3_kernels import dispatch
from qwen3_model.config import Qwen3Config
from qwen3_model.generate import generate
from qwen3_model.model import Qwen3
from qwen3_model.sampling import SamplingParams

from ..ceilings import short_name
from ..harness import Case, Impl, InputSet
from ..peers import provides

# Through all layers; the logits of a random model in bf16 differ by a few percent from those in float32.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def cases(device: str, quick: bool) -> Iterator[Case]:
    shapes, dtypes = ((1, 256, 32), (4, 64, 32)), (torch.float32, torch.bfloat16)  # batch, prompt, new tokens
    if device == "cuda":
        shapes, dtypes = ((1, 512, 64), (8, 128, 64)), (torch.bfloat16,)
    if quick:
        shapes, dtypes = ((1, 16, 4),), dtypes[:1]
    for dtype in dtypes:
        models = Models(config(device, quick), device, dtype)
        for batch, prompt, new in shapes:
            yield prefill_case(models, batch, prompt)
            yield generate_case(models, batch, prompt, new)


def config(device: str, quick: bool) -> Qwen3Config:
    if device == "cuda" and not quick:
        return Qwen3Config.from_name("Qwen3-0.6B")
    hidden, layers, vocab = (64, 2, 256) if quick else (512, 8, 16384)
    return Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, head_dim=64,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 128), tie_word_embeddings=True,
    )


class Models:
    """The model under test and its float32 twin in plain torch, with equal weights."""

    def __init__(self, config: Qwen3Config, device: str, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.model = Qwen3(config)
        self.model.init_weights(0)
        self.model = self.model.to(device, dtype).eval()
        self.twin = Qwen3(config)
        self.twin.load_state_dict(self.model.state_dict())
        self.twin = self.twin.to(device).float().eval()
        weights = dict(self.model.named_parameters())
        self.layer_weights = sum(p.numel() for n, p in weights.items() if ".layers." in n and p.dim() == 2)
        self.read_per_step = (self.layer_weights + config.vocab_size * config.hidden_size) * dtype.itemsize
        kv = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        self.cache_per_token = 2 * kv * dtype.itemsize

    @property
    def context(self) -> dict:
        return {"device": self.device, "dtype": self.dtype, "config": self.config, "weights": self.model.state_dict()}

    def reference(self, tokens: Tensor, last: int) -> Tensor:
        """Float32 logits of the last positions."""
        with dispatch.use("torch"), torch.no_grad():
            return self.twin.head(self.twin(tokens, return_hidden=True)[:, -last:])

    def prompt(self, batch: int, length: int, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return torch.randint(self.config.vocab_size, (batch, length), generator=g).to(self.device)


def prefill_case(models: Models, batch: int, length: int) -> Case:
    c = models.config

    cu_seqlens = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=models.device)

    def run(tokens: Tensor) -> Tensor:  # packed, as qwen3_model.generate prefills
        cache = models.model.new_cache(batch, length)
        hidden = models.model(tokens.flatten(), cu_seqlens=cu_seqlens, cache=cache, return_hidden=True)
        return models.model.head(hidden.view(batch, length, -1)[:, -1:])

    attention = 2 * c.head_dim * c.num_attention_heads * length**2 * c.num_hidden_layers
    head = 2 * c.vocab_size * c.hidden_size
    return Case(
        "prefill", f"prefill b{batch}T{length} {short_name(models.dtype)}",
        lambda seed: InputSet({"tokens": models.prompt(batch, length, seed)}), run,
        lambda data: ([models.reference(data.inputs["tokens"], 1)], None), TOLERANCE[models.dtype],
        f"gemm_{short_name(models.dtype)}_tflops",
        flops={"fwd": batch * (2 * models.layer_weights * length + attention + head)},
        modes=("fwd",), context=models.context, tokens=batch * length, sets=2,
    )


def generate_case(models: Models, batch: int, length: int, new: int) -> Case:
    params = SamplingParams(temperature=0.0, max_tokens=new, stop_ids=())

    def run(tokens: Tensor) -> Tensor:
        completions = generate(models.model, tokens.tolist(), params)
        return torch.tensor([completion.ids for completion in completions], device=tokens.device)

    def regret(got: list, want: list) -> float:
        """How far the chosen tokens' float32 logits are below the best ones, in standard deviations: 0 for greedy."""
        prompt, = want
        if got[0].shape != (batch, new):
            return float("inf")
        logits = models.reference(torch.cat((prompt, got[0]), 1), new + 1)[:, :-1]
        chosen = logits.gather(-1, got[0].unsqueeze(-1)).squeeze(-1)
        return ((logits.amax(-1) - chosen).max() / logits.std()).item()

    step_bytes = models.read_per_step + batch * (length + new / 2) * models.cache_per_token
    return Case(
        "generate", f"generate b{batch}p{length}n{new} {short_name(models.dtype)}",
        lambda seed: InputSet({"tokens": models.prompt(batch, length, seed)}), run,
        lambda data: ([data.inputs["tokens"]], None), 5 * TOLERANCE[models.dtype], "copy_gbps",
        bytes={"step": step_bytes}, modes=("step",), compare=regret, context=models.context | {"new": new}, steps=new,
        tokens=batch, sets=2,
    )


def _transformers(context: dict):
    from transformers import Qwen3Config as HFConfig
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM(HFConfig(**context["config"].to_dict()))
    missing, unexpected = model.load_state_dict(context["weights"], strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"transformers' weights do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.generation_config.eos_token_id = None
    return model.to(context["device"], context["dtype"]).eval()


@provides("transformers", "prefill")
def _(context):
    model = _transformers(context)
    return Impl(lambda tokens: model(tokens, use_cache=True, logits_to_keep=1).logits)


@provides("transformers", "generate")
def _(context):
    model, new = _transformers(context), context["new"]

    def run(tokens):
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new,
                             do_sample=False, use_cache=True, pad_token_id=0)
        return out[:, tokens.shape[1]:]

    return Impl(run)
