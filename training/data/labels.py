"""Labels of documents: educational value, field, domain and safety, beside the language.

The Qwen3 report (section 3.1) labels over 30T tokens so and weighs instances by their labels. Here a scorer is any
object with ``score(texts) -> [{label: value}]``: a linear classifier on hashed words and pairs of words (as fastText;
Joulin et al. 2016, arXiv 1607.01759), fitted on the documents that come with labels, or a model behind an endpoint.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from ..endpoint import Endpoint
from .blocks import BaseFilter, Document, words

LABELS = ("educational_value", "field", "domain", "safety")
EDUCATIONAL = tuple(map(str, range(6)))  # 0: none, 5: a textbook's
UNKNOWN = "unknown"
BUCKETS = 1 << 16
_MISSING = -100
WINDOW = 400  # words of a document that are looked at


def clean(name: str, value: Any) -> str:
    """A label's value as text. Raises ValueError for what cannot name a folder, or educational values beside 0 to 5."""
    value = str(value).strip().lower().replace(" ", "_")
    if not re.fullmatch(r"[\w+-]{1,40}", value) or name == "educational_value" and value not in (*EDUCATIONAL, UNKNOWN):
        wanted = "0 to 5" if name == "educational_value" else "a word of letters, digits, _, + and -"
        raise ValueError(f"label {name} is {value!r}; expected {wanted}")
    return value


def features(text: str) -> np.ndarray:
    """int64 [n] hashed words and pairs of words of the document's start; never empty."""
    found = words(text[: 12 * WINDOW])[:WINDOW]
    pairs = (f"{a} {b}" for a, b in zip(found, found[1:]))
    hashed = [zlib.crc32(w.encode()) % BUCKETS for part in (found, pairs) for w in part]
    return np.array(hashed or [0], np.int64)


class Classifier:
    """A linear layer on the mean of a document's features, whose outputs are the values of all labels, label by label."""

    def __init__(self, classes: dict[str, list[str]], weight: torch.Tensor):
        self.classes, self.weight = classes, weight

    @classmethod
    def fit(
        cls, documents: Sequence[tuple[str, dict[str, str]]], *, seed: int = 0, epochs: int = 12, lr: float = 0.5,
        batch: int = 64,
    ) -> tuple[Classifier, dict[str, dict[str, float]]]:
        """A classifier of the labels given, and per label {"documents", "accuracy" on a fifth that was held out,
        "majority": the accuracy of always saying the commonest value}. The classifier itself is fitted on all."""
        bags = [features(text) for text, _ in documents]
        classes = {name: sorted({labels[name] for _, labels in documents if name in labels}) for name in LABELS}
        classes = {name: values for name, values in classes.items() if values}
        target = torch.tensor([[values.index(labels[name]) if name in labels else _MISSING for name, values in classes.items()]
                               for _, labels in documents])
        options = {"sizes": [len(v) for v in classes.values()], "seed": seed, "epochs": epochs, "lr": lr, "batch": batch}
        held = torch.tensor([zlib.crc32(text.encode()) % 5 == 0 for text, _ in documents])
        report: dict[str, dict[str, float]] = {
            name: {"documents": int((target[:, i] >= 0).sum())} for i, name in enumerate(classes)
        }
        if 0 < held.sum() < len(documents):
            trial = _fit([bags[i] for i in (~held).nonzero()[:, 0]], target[~held], **options)
            scores = _logits(trial, [bags[i] for i in held.nonzero()[:, 0]]).split(options["sizes"], 1)
            for i, name in enumerate(classes):
                truth = target[held][:, i]
                if (given := truth >= 0).any():
                    right = scores[i].argmax(-1)[given] == truth[given]
                    commonest = max(Counter(truth[given].tolist()).values()) / int(given.sum())
                    report[name] |= {"accuracy": right.float().mean().item(), "majority": commonest}
        weight = _fit(bags, target, **options)
        return cls(classes, weight), report

    def score(self, texts: Sequence[str]) -> list[dict[str, str]]:
        parts = _logits(self.weight, [features(t) for t in texts]).split([len(v) for v in self.classes.values()], 1)
        best = [part.argmax(-1).tolist() for part in parts]
        return [{name: values[best[k][i]] for k, (name, values) in enumerate(self.classes.items())} for i in range(len(texts))]

    def save(self, path: Path) -> None:
        tmp = path.with_name(f".{path.name}.tmp")
        save_file({"weight": self.weight}, tmp, metadata={"classes": json.dumps(self.classes)})
        tmp.rename(path)

    @classmethod
    def load(cls, path: Path) -> Classifier:
        with safe_open(path, "pt") as f:
            return cls(json.loads(f.metadata()["classes"]), f.get_tensor("weight"))


def _flat(bags: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    starts = np.cumsum([0, *map(len, bags[:-1])])
    return torch.from_numpy(np.concatenate(bags)), torch.from_numpy(starts)


def _logits(weight_BC: torch.Tensor, bags: Sequence[np.ndarray]) -> torch.Tensor:
    flat, starts = _flat(bags)
    return F.embedding_bag(flat, weight_BC, starts, mode="mean")


def _fit(
    bags: list[np.ndarray], target_NL: torch.Tensor, *, sizes: list[int], seed: int, epochs: int, lr: float, batch: int
) -> torch.Tensor:
    """float32 [BUCKETS, sum of sizes]; Adam on the sum of the labels' cross-entropies, without those that are missing."""
    weight = torch.zeros(BUCKETS, sum(sizes), requires_grad=True)
    optimizer = torch.optim.SparseAdam([weight], lr=lr)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(bags), generator=order).split(batch):
            flat, starts = _flat([bags[i] for i in rows.tolist()])
            scores = F.embedding_bag(flat, weight, starts, mode="mean", sparse=True).split(sizes, 1)
            losses = [
                F.cross_entropy(s, target_NL[rows, i], ignore_index=_MISSING, reduction="sum") for i, s in enumerate(scores)
            ]
            optimizer.zero_grad()
            (sum(losses) / len(rows)).backward()
            optimizer.step()
    return weight.detach()


class Judge:
    """Labels by a language model, which is asked for JSON."""

    PROMPT = (
        "Judge the document between the lines of dashes. Answer with one JSON object and nothing else: "
        '{{"educational_value": 0 to 5, "field": subject in one word such as mathematics, "domain": kind of text in one '
        'word such as textbook, news, code, forum, "safety": "safe" or "unsafe"}}\n-----\n{}\n-----'
    )

    def __init__(self, endpoint: Endpoint, cache: Path):
        self.endpoint, self.cache = endpoint, cache

    def score(self, texts: Sequence[str]) -> list[dict[str, str]]:
        return [self._one(text) for text in texts]

    def _one(self, text: str) -> dict[str, str]:
        answer = self.endpoint.chat(self.PROMPT.format(text[:8000]), self.cache)
        found = re.search(r"\{.*\}", answer, re.DOTALL)
        try:
            raw = json.loads(found[0]) if found else {}
        except ValueError:
            return {}
        labels = {}
        for name in raw.keys() & set(LABELS):
            try:
                labels[name] = clean(name, raw[name])
            except ValueError:  # Label counts it as unknown; the others stand: an unsafe document is to go
                pass
        return labels


class Label(BaseFilter):
    """Completes the ``labels`` of documents and drops unsafe ones. What came with a document is kept as it is. ``scorer``
    is None, a ``Judge``, or the path of a ``Classifier``, which each worker opens itself."""

    name = "label"

    def __init__(self, scorer: Judge | Path | None, batch_size: int = 32):
        super().__init__(batch_size=batch_size)
        self.scorer = scorer

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return self.filter_batch([doc])[0]

    def filter_batch(self, batch: list[Document]) -> list[bool | tuple[bool, str]]:
        if isinstance(self.scorer, Path):
            self.scorer = Classifier.load(self.scorer)
        given = [given_labels(doc.metadata) for doc in batch]
        lacking = [i for i, labels in enumerate(given) if len(labels) < len(LABELS)] if self.scorer else []
        scored = dict(zip(lacking, self.scorer.score([batch[i].text for i in lacking]) if lacking else ()))
        for i, doc in enumerate(batch):
            doc.metadata["labels"] = dict.fromkeys(LABELS, UNKNOWN) | scored.get(i, {}) | given[i]
            self.stat_update(*(f"{name}_{'given' if name in given[i] else 'scored' if name in scored.get(i, {}) else UNKNOWN}"
                               for name in LABELS))
        return [doc.metadata["labels"]["safety"] != "unsafe" or (False, "unsafe") for doc in batch]


def given_labels(metadata: dict[str, Any]) -> dict[str, str]:
    """The labels a document came with, checked."""
    labels = metadata.get("labels") or {}
    if unknown := sorted(labels.keys() - set(LABELS)):
        raise ValueError(f"a document of {metadata.get('source')!r} has labels {unknown}; expected some of {LABELS}")
    return {name: clean(name, value) for name, value in labels.items()}


def labelled(documents: Iterable[Document]) -> list[tuple[str, dict[str, str]]]:
    """(text, labels) of the documents that came with labels."""
    pairs = ((doc.text, given_labels(doc.metadata)) for doc in documents)
    return [(text, labels) for text, labels in pairs if labels]
