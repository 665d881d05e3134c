"""The smallest model that can show the path: chains of sums modulo 10, some 0.3M parameters, and its base training.

The base model is given the skill (each sum, and how a chain is worked through line by line), as reinforcement learning
sharpens and extends what is there but finds nothing from nothing; it is not given think blocks, and few long chains.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from qwen3_model import load as model_io
from qwen3_model.config import Qwen3Config
from qwen3_model.tokenizer import Tokenizer, train_bpe

from ..config import Config
from ..data import shards
from ..environment import file_sha256
from ..pretrain import train
from ..rewards import find
from ..rewards.chains import Chain, worked

VOCABULARY = ("user assistant system /think /no_think\n\n",) * 50
VOCAB_SIZE = 307  # bytes, the chat format's 26 tokens, and all merges that the words above give


def tokenizer(path: Path) -> Tokenizer:
    """Every digit and sign is a token of its own, as in Qwen3's vocabulary; the chat format's words are single tokens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return train_bpe(VOCABULARY, VOCAB_SIZE, path)


def model(width: int = 96, layers: int = 3, context: int = 128) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCAB_SIZE, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=1, head_dim=32, rope_theta=10_000,
        max_position_embeddings=context, tie_word_embeddings=True, initializer_range=0.08, bos_token_id=256, eos_token_id=256,
    )


LENGTHS = {2: 30, 3: 30, 4: 30, 5: 5, 6: 5}  # of chains in the base model's text, and how often: long ones are rare


def texts(count: int, seed: int) -> Iterator[str]:
    """Documents: sums, all that there are; and questions with worked answers, as a corpus with synthetic instructions has
    them, without think blocks, and none of them a held-out one (`rewards.reserved`)."""
    rng, chain = random.Random(seed), Chain()
    for _ in range(count):
        if rng.random() < 0.4:
            yield "\n".join(worked(chain.problem(rng.getrandbits(60), 0).data["chain"])[1:] for _ in range(12))
            continue
        (length,) = rng.choices([*LENGTHS], [*LENGTHS.values()])
        data = find(chain, rng.getrandbits(60), length - 2).data
        yield (f"<|im_start|>user\n{data['chain']}<|im_end|>\n<|im_start|>assistant\n"
               f"{worked(data['chain'])}\n\n{data['answer']}<|im_end|>\n")


def base(
    out: Path, *, steps: int, width: int = 96, layers: int = 3, seed: int = 0, documents: int = 40_000, quiet: bool = False,
    vocabulary: Path | None = None,
) -> Path:
    """Trains a base model and returns its folder with tokenizer.json. ``vocabulary``: a tokenizer.json to share."""
    file = vocabulary or out / "tokenizer.json"
    tok = Tokenizer.from_file(file) if vocabulary else tokenizer(file)
    for name, count in (("train", documents), ("held_out", 500)):
        if not (out / name / "index.json").exists():
            found = list(texts(count, seed * 2 + (name == "held_out")))
            shards.write(out / name, zip(tok.encode_batch(found), (len(t) for t in found)), vocab_size=tok.vocab_size,
                         end_of_text=tok.token_id("<|endoftext|>"), tokenizer_sha256=file_sha256(file))
    config = Config(
        data=out / "train", eval_data=out / "held_out", tokenizer=file, out=out / "run", steps=steps, seq_len=128, rows=16,
        lr=5e-3, optimizer="muon", warmup=min(20, steps // 5), decay=0.5, seed=seed, device="cpu", dtype="float32",
        eval_every=max(1, steps // 4), log_every=max(1, steps // 10), save_every=max(1, steps // 4),
    )
    final = train(config, model_config=model(width, layers), quiet=quiet)
    trained = model_io.load(final)
    model_io.save(trained, out / "model")
    tok.save(out / "model" / "tokenizer.json")
    return out / "model"
