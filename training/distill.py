"""Strong-to-weak distillation: ``python -m training.distill --teacher MODEL --start MODEL --out DIR --families ...``.

Qwen3 technical report, section 4.5. Off-policy: the teacher's own replies, in both modes, are the student's fine-tuning
data (`teacher_data`, then `sft`). On-policy: the student samples in either mode, and at each of its tokens its
distribution is drawn to the teacher's by the KL divergence, through both heads without either's logits as a whole. No
reward is needed; rewards are measured all the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen3_model import load as model_io
from qwen3_model.model import Qwen3
from qwen3_model.tokenizer import Tokenizer

from . import stage_memory
from .config import DTYPES
from .core import Run, command, train
from .environment import file_sha256, weights_sha256
from .losses import Divergence
from .rewards import Family, Problem, mixed_seed
from .rewards.families import SCORERS, make
from .rewards.workers import Pool
from .rl import RolloutConfig, draw, play, summary
from .samples import Sample
from .sft import normalised


@dataclass(frozen=True, kw_only=True)
class DistillConfig(RolloutConfig):
    """The fields of the groups are those of RL; a group may be of one here."""

    teacher: Path  # folder of the teacher: the same vocabulary, any size
    direction: Literal["forward", "reverse"] = "reverse"


def teacher_data(
    teacher: Qwen3, tokenizer: Tokenizer, families: Mapping[str, Family], problems: Sequence[Problem], *, repeats: int = 1,
    seed: int = 0, right_only: bool = True, **options: Any,
) -> list[list[dict[str, Any]]]:
    """Conversations of the teacher for `sft.write`, the right ones only unless told otherwise (rejection sampling).
    ``options`` as `rl.play`. Each problem's mode is its own, so both modes come from families of both."""
    episodes = play(teacher, tokenizer, families, problems, repeats=repeats, seed=seed, **options)
    return [
        [*map(dict, e.problem.messages), *e.messages] for e in episodes
        if e.reply.format > 0 and (e.reward >= 0.5 or not right_only)
    ]


def distill(config: DistillConfig, *, families: Mapping[str, Family] | None = None, quiet: bool = False) -> Path:
    """On-policy; runs or resumes and returns the folder of the finished student. Raises ValueError for a teacher of
    another vocabulary; other errors as `core.train` and `stage_memory.check`."""
    config = config.resolved()
    stage_memory.check(stage_memory.Distillation, config)
    teacher = model_io.load(config.teacher, device=config.device, dtype=DTYPES[config.dtype]).requires_grad_(False)
    hashes = {file_sha256(folder / "tokenizer.json") for folder in (config.teacher, config.start)}
    if len(hashes) > 1:
        raise ValueError(f"teacher {config.teacher} has another tokenizer.json than {config.start}; expected the same")
    loss = Divergence(teacher, config.direction, config.temperature)
    with Pool(SCORERS, workers=config.workers, deadline=config.deadline) as pool:
        families = families or make(config.families, pool)
        levels = {n: min(config.level, f.max_level) for n, f in families.items()}

        def step(run: Run, n: int) -> dict[str, float]:
            episodes = play(
                run.model, run.tokenizer, families, draw(config, families, levels, n), repeats=config.group_size,
                seed=mixed_seed(config.seed, "sample", n), temperature=config.temperature, max_tokens=config.max_tokens,
                max_prompt=config.max_prompt, slots=config.slots,
            )
            parts = [p for i in range(config.mini_batches) if (p := episodes[i :: config.mini_batches])]
            stats = [
                run.update(normalised([Sample(e.tokens, e.mask) for e in part]), loss, config.lr_at(n)) for part in parts
            ]
            return summary(episodes) | {name: statistics.fmean(s[name] for s in stats) for name in stats[0]}

        return train(config, step, data={"teacher": weights_sha256(config.teacher)}, quiet=quiet)


if __name__ == "__main__":
    command(DistillConfig, distill, "training.distill", __doc__)
