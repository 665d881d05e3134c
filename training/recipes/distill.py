"""Strong-to-weak distillation (Qwen3 technical report, section 4.5) for the smaller models, in place of the four stages.

First the teacher's replies in both modes as fine-tuning data (`off_policy`), then the student's own samples with the
teacher's distribution at every token (`on_policy`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..distill import DistillConfig
from ..rewards.families import GENERAL
from ..sft import SFTConfig


def off_policy(start: Path, data: Path, out: Path, **changes: Any) -> SFTConfig:
    return SFTConfig(**({
        "start": start, "data": data, "out": out, "steps": 3000, "rows": 128, "lr": 2e-5, "schedule": "cosine", "warmup": 100,
        "max_tokens": 16_384, "tokens_per_pack": 32_768,
    } | changes))


def on_policy(teacher: Path, start: Path, out: Path, **changes: Any) -> DistillConfig:
    return DistillConfig(**({
        "teacher": teacher, "start": start, "out": out, "families": GENERAL,
        "steps": 150, "groups": 64, "group_size": 2, "mini_batches": 1, "direction": "reverse",
        "lr": 2e-6, "schedule": "wsd", "warmup": 5, "temperature": 1.0, "max_tokens": 8192, "max_prompt": 2048, "slots": 32,
        "tokens_per_pack": 16_384, "workers": 8,
    } | changes))
