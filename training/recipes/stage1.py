"""S1, the general stage (Qwen3 technical report, section 3.2): over 30T tokens of 119 languages and dialects, in rows of
4,096, for language and general knowledge. The rate is warmed up and stays: it falls in the next stage.

    python -m training.recipes.stage1 --shards runs/data/shards --tokenizer tokenizer.json --out runs/s1
"""

from .stages import Scale, Stage, command


def stage(scale: Scale) -> Stage:
    return Stage(
        name="s1", title="general", seq_len=scale.seq_len, tokens=scale.tokens[0], batch_tokens=scale.batch_tokens,
        rope_theta=10_000, lr=scale.lr, lr_end=1.0, decay=0.0, warmup=scale.warmup,
        factors={},  # every label as the search found it
    )


if __name__ == "__main__":
    command(stage, "stage1", __doc__)
