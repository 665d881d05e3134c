"""S3, the long-context stage (Qwen3 technical report, section 3.2): hundreds of billions of tokens in rows of 32,768, 75 %
of them from texts of 16,384 to 32,768 tokens and 25 % from 4,096 to 16,384, with RoPE's base raised from 10,000 to
1,000,000 (ABF: Xiong et al. 2023, arXiv 2309.16039). Longer texts count as long; a row cuts them.

    python -m training.recipes.stage3 --init runs/s2/model --shards runs/data/shards --tokenizer tokenizer.json --out runs/s3
"""

from .stage2 import MORE
from .stages import Scale, Stage, command


def stage(scale: Scale) -> Stage:
    seq_len = 8 * scale.seq_len  # 32,768 where S1 and S2 have 4,096
    return Stage(
        name="s3", title="long context", seq_len=seq_len, tokens=scale.tokens[2],
        batch_tokens=max(scale.batch_tokens, seq_len), rope_theta=1_000_000, lr=0.2 * scale.lr, lr_end=0.0, decay=1.0,
        warmup=scale.warmup // 2, factors=MORE, long_share=0.75,
    )


if __name__ == "__main__":
    command(stage, "stage3", __doc__)
