"""One implementation's whole training step in a process of its own: ``python -m benchmarks.train_step --impl ours``.

A step is forward, backward, clipping of the global gradient norm without a host sync, and AdamW on bfloat16 parameters and
moments (torch's fused one, but for ours, which has its own) over random tokens. The same weights, batch and settings in every
implementation; a process each, since patches and compiled code stay, and so that the peak of the memory is its own. Prints
one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from qwen3_kernels import linear_cross_entropy
from qwen3_model.config import Qwen3Config
from qwen3_model.model import Qwen3

PEAK_FLOPS = 989e12  # dense bf16 of an H100 SXM's datasheet: what MFU is a share of


def flops_per_token(config: Qwen3Config, length: int, frozen: bool = False) -> float:
    """6 per parameter (4 when they are frozen and only small adapters learn, which are not counted), and causal
    attention's products: 2·H·C·T forward, twice that backward."""
    attention = 6 * config.num_attention_heads * config.head_dim * length * config.num_hidden_layers
    return (4 if frozen else 6) * config.num_params(active=True) + attention


def fill(model: nn.Module, seed: int = 0) -> None:
    """The same weights in every implementation: parameter names are those of the published checkpoints in all."""
    device = next(model.parameters()).device
    with torch.no_grad():
        for index, (_, p) in enumerate(sorted(model.named_parameters())):
            generator = torch.Generator(device).manual_seed(seed + index)
            p.fill_(1.0) if p.dim() == 1 else p.normal_(0.0, 0.02, generator=generator)


def ours(config: Qwen3Config) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = Qwen3(config)

    def loss(tokens: Tensor) -> Tensor:
        hidden = model(tokens, return_hidden=True)
        labels = nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
        return linear_cross_entropy(hidden, model.head_weight, labels)

    return model, loss


def _transformers(
    config: Qwen3Config, attention: str | None = "sdpa"
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    import transformers

    family = "Qwen3Moe" if config.num_experts else "Qwen3"
    settings = getattr(transformers, f"{family}Config")(**config.to_dict())
    if attention is not None:
        settings._attn_implementation = attention
    model = getattr(transformers, f"{family}ForCausalLM")(settings)
    return model, lambda tokens: model(input_ids=tokens, labels=tokens, use_cache=False).loss


def liger(config: Qwen3Config) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3, apply_liger_kernel_to_qwen3_moe

    (apply_liger_kernel_to_qwen3_moe if config.num_experts else apply_liger_kernel_to_qwen3)()
    return _transformers(config)


def patched(config: Qwen3Config) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from qwen3_kernels.integrations import transformers as integration

    integration.apply()
    return _transformers(config, attention=None)  # the patch chooses, unless one is asked for


def compiled(config: Qwen3Config) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model, loss = _transformers(config)
    model.forward = torch.compile(model.forward, dynamic=False)
    return model, loss


IMPLS = {
    "ours": ours, "transformers+ours": patched, "transformers+liger": liger, "transformers+compile": compiled,
    "transformers": _transformers,
}


def measure(
    impl: str, config: Qwen3Config, rows: int, length: int, steps: int, profile: bool = False, lora_rank: int = 0
) -> dict:
    """Milliseconds of each timed step, first loss and gradient norm, peak memory; three steps of warm-up before."""
    from training.adamw import AdamW
    from training.optim import clip_factor

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model, loss_of = IMPLS[impl](config)
        fill(model)
        tokens = torch.randint(config.vocab_size, (rows, length), generator=torch.Generator("cuda").manual_seed(1))
    if lora_rank:
        from training import lora

        lora.add(model, lora_rank)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind = AdamW if impl == "ours" else partial(torch.optim.AdamW, fused=True)
    optimizer = kind(parameters, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)

    def step() -> tuple[Tensor, Tensor]:
        loss = loss_of(tokens)
        loss.backward()
        norm, factor = clip_factor([p.grad for p in parameters], 1.0)
        optimizer.grad_scale = factor.reciprocal()  # the fused step divides by it
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    first, norm = (t.item() for t in step())
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]
    result = {"ms": times, "loss": first, "grad_norm": norm, "peak_mb": torch.cuda.max_memory_allocated() / 1e6}
    if profile:
        result["profile"] = _profile(step)
    return result


def _profile(step: Callable) -> dict[str, float]:
    """Milliseconds on the device by the op that launched the work, largest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize()
    rows = {e.key: e.self_device_time_total / 1e3 for e in record.key_averages() if e.device_type.name == "CPU"}
    return {k: round(v, 3) for k, v in sorted(rows.items(), key=lambda r: -r[1]) if v >= 0.05}


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0])
    p.add_argument("--impl", choices=IMPLS, required=True)
    p.add_argument("--model", default="Qwen3-0.6B", help="a released size")
    p.add_argument("--layers", type=int, help="keep this many layers")
    p.add_argument("--rows", type=int, default=8)
    p.add_argument("--seq-len", type=int, default=4096)
    p.add_argument("--steps", type=int, default=8, help="timed steps")
    p.add_argument("--lora-rank", type=int, default=0, help="adapters of this rank on all layers, the rest frozen (ours only)")
    p.add_argument("--profile", action="store_true", help="also the time on the device by op")
    args = p.parse_args(argv)
    if args.lora_rank < 0 or (args.lora_rank and args.impl != "ours"):
        p.error(f"--lora-rank is {args.lora_rank} with --impl {args.impl}; expected 0, or above with --impl ours")
    if not torch.cuda.is_available():
        p.error("torch finds no CUDA device")
    config = Qwen3Config.from_name(args.model, **({"num_hidden_layers": args.layers} if args.layers else {}))
    result = measure(args.impl, config, args.rows, args.seq_len, args.steps, args.profile, args.lora_rank)
    rate = args.rows * args.seq_len / statistics.median(result["ms"]) * 1e3
    flops = rate * flops_per_token(config, args.seq_len, frozen=args.lora_rank > 0)
    result |= {"tokens_per_s": rate, "tflops": flops * 1e-12, "mfu_pct": 100 * flops / PEAK_FLOPS}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
