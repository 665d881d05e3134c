"""S2, the reasoning stage (Qwen3 technical report, section 3.2): about 5T tokens of higher quality, in rows of 4,096, with
more STEM, code, reasoning and synthetic text, and a faster decay of the learning rate. How much more is not in the report.

    python -m training.recipes.stage2 --init runs/s1/model --shards runs/data/shards --tokenizer tokenizer.json --out runs/s2
"""

from .stages import Scale, Stage, command

MORE = {
    "domain=code": 1.5, "domain=reasoning": 3.0, "domain=synthetic": 2.0, "domain=textbook": 2.0, "field=mathematics": 1.5,
    "field=science": 1.5, "educational_value=0": 0.5, "educational_value=1": 0.5, "educational_value=4": 1.5,
    "educational_value=5": 1.5,
}


def stage(scale: Scale) -> Stage:
    return Stage(
        name="s2", title="STEM, code and reasoning", seq_len=scale.seq_len, tokens=scale.tokens[1],
        batch_tokens=scale.batch_tokens, rope_theta=10_000, lr=scale.lr, lr_end=0.2, decay=0.5, warmup=scale.warmup // 2,
        factors=MORE,
    )


if __name__ == "__main__":
    command(stage, "stage2", __doc__)
