"""The losses of post-training, each a function of per-token weights and targets.

A loss takes the model and a `Packed` and returns (sum over the trained tokens of weight times loss, statistics). What
makes an algorithm is in the weights, the advantages and a few switches:

| preset    | switches                                                         | source                            |
| :-------- | :--------------------------------------------------------------- | :-------------------------------- |
| grpo      | average="sequence", scale="std", clip 0.2 / 0.2; no KL term      | DeepSeekMath, arXiv 2402.03300    |
| dapo      | average="token", scale="std", clip 0.2 / 0.28 ("clip-higher")    | DAPO, arXiv 2503.14476            |
| dr_grpo   | average="constant", scale="none"                                 | Dr. GRPO, arXiv 2503.20783        |
| gspo      | ratio="sequence", clip 3e-4 / 4e-4                               | GSPO, arXiv 2507.18071            |
| cispo     | clip="weight": the ratio, bounded above, only weighs log p       | MiniMax-M1, arXiv 2506.13585      |
| reinforce | clip="none"; the group's mean is the baseline                    | Williams 1992                     |
| (any)     | correction > 0: bounded importance weight, trainer over sampler  | truncated importance sampling     |

Logits are never held as a whole: log-probabilities come from `linear_cross_entropy`, divergences from `linear_kl`.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qwen3_kernels import linear_cross_entropy, linear_kl
from qwen3_model.model import Qwen3

from .samples import Packed

Stats = dict[str, Tensor]
"""Sums over the trained tokens, or for names that begin with "max_" maxima; scalars on the device, without gradient."""
LossFn = Callable[[Qwen3, Packed], tuple[Tensor, Stats]]


def cross_entropy(model: Qwen3, packed: Packed) -> tuple[Tensor, Stats]:
    """Weighted negative log-likelihood (supervised fine-tuning, response distillation)."""
    loss, stats = linear_cross_entropy(
        packed.hidden(model), model.head_weight, packed.targets, weights=packed.weights, reduction="sum", return_stats=True
    )
    return loss, {"nll": stats.nll.sum(), "entropy": stats.entropy.sum()}


@dataclass(frozen=True)
class Divergence:
    """KL divergence between the teacher's and the student's distribution at every trained token (distillation).

    direction: "forward" is KL(teacher || student), "reverse" KL(student || teacher), which is what on-policy samples
    estimate (Agarwal et al. 2023, arXiv 2306.13649). The teacher has the student's vocabulary.
    """

    teacher: Qwen3
    direction: Literal["forward", "reverse"] = "reverse"
    temperature: float = 1.0

    def __call__(self, model: Qwen3, packed: Packed) -> tuple[Tensor, Stats]:
        with torch.no_grad():
            taught = packed.hidden(self.teacher)
        hidden = packed.hidden(model)
        loss, kl = linear_kl(
            hidden, model.head_weight, taught, self.teacher.head_weight, mask=packed.weights, direction=self.direction,
            temperature=self.temperature, reduction="sum", return_tokens=True,
        )
        with torch.no_grad():
            _, stats = linear_cross_entropy(
                hidden, model.head_weight, packed.targets, reduction="none", return_stats=True
            )
        return loss, {"kl": kl.sum(), "entropy": stats.entropy.sum()}


@dataclass(frozen=True)
class PolicyGradient:
    """Policy-gradient loss over `Packed.advantages`, with the ratio to the probabilities in `Packed.logprobs`.

    Attributes:
        ratio: "token", or "sequence" for the geometric mean over a sample, which all its tokens share.
        clip: "ppo" takes the worse of ratio and clipped ratio; "weight" clips the ratio, stops its gradient and weighs
            log p with it; "none" takes the ratio as it is.
        clip_low, clip_high: the ratio is kept in [1 - clip_low, 1 + clip_high].
        average: see `token_weight`. scale: see `advantages`.
        correction: bound of the truncated importance weight of old trainer over sampler, 0 for none; then
            `Packed.logprobs` are the old trainer's and the weight is in `Packed.weights` (see `rl`).
        temperature: of the sampler, so that both sides have the same distribution.

    Raises ValueError naming a field out of range.
    """

    ratio: Literal["token", "sequence"] = "token"
    clip: Literal["ppo", "weight", "none"] = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    average: Literal["token", "sequence", "constant"] = "token"
    scale: Literal["std", "none"] = "std"
    correction: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, known in (("ratio", ("token", "sequence")), ("clip", ("ppo", "weight", "none")),
                            ("average", ("token", "sequence", "constant")), ("scale", ("std", "none"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {known}")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low is {self.clip_low}; expected a share in [0, 1]")
        for name, low in (("clip_high", 0), ("correction", 0)):
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {low}")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; expected above 0")

    def __call__(self, model: Qwen3, packed: Packed) -> tuple[Tensor, Stats]:
        nll_K, stats = linear_cross_entropy(
            packed.hidden(model), model.head_weight, packed.targets, temperature=self.temperature, reduction="none",
            return_stats=True,
        )
        loss, found = self.of_logprobs(-nll_K, packed)
        return loss, found | {"entropy": stats.entropy.sum()}

    def of_logprobs(self, logp_K: Tensor, packed: Packed) -> tuple[Tensor, Stats]:
        """The loss given log p of the trained tokens, float32 [K] with gradient."""
        # Before exp: a factor of 0 behind it would not undo an infinity (0 * inf is NaN, and so is its gradient).
        apart_K = torch.where(packed.weights != 0, logp_K - packed.logprobs, 0.0)
        if self.ratio == "sequence":
            mean_S = torch.segment_reduce(apart_K, "mean", lengths=packed.lengths, unsafe=True)
            log_ratio_K = mean_S.repeat_interleave(packed.lengths, output_size=len(apart_K))
        else:
            log_ratio_K = apart_K
        ratio_K = log_ratio_K.exp()
        clipped_K = ratio_K.clamp(1 - self.clip_low, 1 + self.clip_high)
        A_K = packed.advantages
        if self.clip == "ppo":
            gain_K = torch.minimum(ratio_K * A_K, clipped_K * A_K)
            cut_K = ratio_K * A_K > clipped_K * A_K
        elif self.clip == "weight":
            gain_K = clipped_K.detach() * A_K * logp_K
            cut_K = ratio_K != clipped_K
        else:
            gain_K, cut_K = ratio_K * A_K, torch.zeros_like(ratio_K)
        with torch.no_grad():
            stats = {
                "clipped": cut_K.float().sum(),
                "kl_old": (apart_K.exp() - 1 - apart_K).sum(),  # k3 of joschu.net/blog/kl-approx.html
                "max_ratio": ratio_K.max(),
                "max_gap": apart_K.abs().max(),
            }
        return -(gain_K * packed.weights).sum(), stats


PRESETS = {
    "grpo": PolicyGradient(clip_high=0.2, average="sequence"),
    "dapo": PolicyGradient(),
    "dr_grpo": PolicyGradient(clip_high=0.2, average="constant", scale="none"),
    "gspo": PolicyGradient(ratio="sequence", clip_low=3e-4, clip_high=4e-4, average="sequence"),
    "cispo": PolicyGradient(clip="weight", clip_low=1.0, clip_high=4.0),
    "reinforce": PolicyGradient(clip="none", scale="none"),
}


def preset(name: str, **changes: object) -> PolicyGradient:
    """A named algorithm, with fields replaced. Raises ValueError for another name."""
    if name not in PRESETS:
        raise ValueError(f"algorithm is {name!r}; expected one of {tuple(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)


def advantages(rewards: Sequence[float], scale: str = "std") -> list[float]:
    """Of the members of one group: reward minus mean, with "std" over the standard deviation (0 for equal rewards)."""
    mean = statistics.fmean(rewards)
    spread = statistics.pstdev(rewards, mean) if scale == "std" else 1.0
    return [0.0 if r == mean else (r - mean) / (spread + 1e-6 * (scale == "std")) for r in rewards]


def token_weight(average: str, *, length: int, lengths: Sequence[int], max_length: int) -> float:
    """Weight of each trained token of a sample of ``length`` in an update of samples of ``lengths``: "token" is one mean
    over all tokens, "sequence" the mean over samples of the mean over their tokens, "constant" a sum over tokens divided
    by what they could have been at most (``max_length`` each), which does not depend on any length."""
    if average == "token":
        return 1 / sum(lengths)
    return 1 / (len(lengths) * (length if average == "sequence" else max_length))
