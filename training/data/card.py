"""The data card: what went in, what was dropped and why, what is left, and what of it overlaps the evaluations."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

from .. import report
from ..files import write_json
from .filters import ngrams

STEPS = {  # stage, block -> what the card calls it
    ("clean", "language"): "language", ("clean", "quality"): "quality", ("unique", "exact-deduplication"): "equal to another",
    ("kept", "MinHash"): "nearly equal to another", ("kept", "contamination"): "overlaps an evaluation",
    ("tokens", "label"): "unsafe",
}
COUNTED, SCORES = ("source_", "contaminated_", "pages_", "unreadable"), ("_given", "_scored", "_unknown")


def stats(out: Path) -> dict[str, list[dict[str, Any]]]:
    """{stage: its blocks with summed counts}. From the tasks' own files: datatrove's sum leaves out tasks that were done
    before a build was resumed."""
    found = {}
    for log in sorted((out / "work" / "logs").iterdir(), key=lambda p: int(p.name.split("-")[0])):
        blocks: list[dict[str, Any]] = []
        for file in sorted((log / "stats").glob("*.json")):
            for i, block in enumerate(json.loads(file.read_text())):
                if i == len(blocks):
                    blocks.append({"name": block["name"], "stats": Counter()})
                for key, value in block["stats"].items():
                    blocks[i]["stats"][key] += value if isinstance(value, (int, float)) else value.get("total", 0)
        found[log.name.split("-", 1)[1]] = blocks
    return found


def summary(out: Path, build: dict[str, Any]) -> dict[str, Any]:
    """The card's numbers."""
    found, cells = stats(out), json.loads((out / "shards" / "cells.json").read_text())
    steps, reasons = [], {}
    for (stage, word), name in STEPS.items():
        for block in found.get(stage, ()):
            if word in block["name"]:
                s = block["stats"]
                steps.append({"step": name, "in": int(s["total"]), "dropped": int(s["dropped"])})
                reasons[name] = {k.removeprefix("dropped_"): int(v) for k, v in sorted(s.items()) if k.startswith("dropped_")}
    by = {name: Counter() for name in ("language", "field", "domain", "educational_value")}
    for cell in cells.values():
        for name, counter in by.items():
            counter[cell[name]] += cell.get("train", {}).get("tokens", 0)
    blocks = [b for stage in found.values() for b in stage]
    total = Counter()
    for b in blocks:
        total.update({k: v for k, v in b["stats"].items() if k.startswith(COUNTED) or k.endswith(SCORES)})
    evals = {}
    for path in map(Path, build["evals"]):
        known, items, short = ngrams(path, build["eval_words"])
        evals[path.stem] = {"items": items, "too short to check": short, "runs of words": len(known),
                            "documents that overlap": int(total[f"contaminated_{path.stem}"])}
    classifier = out / "classifier.json"
    return {
        "steps": steps, "reasons": reasons, "tokens by": {k: dict(v.most_common()) for k, v in by.items()},
        "totals": {part: {unit: sum(c.get(part, {}).get(unit, 0) for c in cells.values())
                          for unit in ("documents", "bytes", "tokens")} for part in ("train", "held_out")},
        "cells": len(cells),
        "sources": {k.removeprefix("source_"): int(v) for k, v in sorted(total.items()) if k.startswith("source_")},
        "labels": {k: int(v) for k, v in sorted(total.items()) if k.endswith(SCORES)},
        "models": {k: int(v) for k, v in total.items() if k.startswith(("pages_", "unreadable"))},
        "classifier": json.loads(classifier.read_text()) if classifier.exists() else {}, "evals": evals,
    }


def write(out: Path, build: dict[str, Any]) -> None:
    """``card.json`` and ``card.html``."""
    s = summary(out, build)
    first = s["steps"][0]["in"]
    kept = s["totals"]["train"]["documents"] + s["totals"]["held_out"]["documents"]
    sections = [
        ("What was dropped, in this order", report.table(
            ("step", "documents in", "dropped", "share of those in"),
            [(x["step"], f"{x['in']:,}", f"{x['dropped']:,}", f"{100 * x['dropped'] / max(x['in'], 1):.2f} %")
             for x in s["steps"]])
         + report.table(("step", "why", "documents", "such as"), [
             (step, why, f"{n:,}", example(out, why)) for step, whys in s["reasons"].items() for why, n in whys.items()])),
        ("What is left", report.table(("", "documents", "bytes", "tokens"), [
            (part, *(f"{n:,}" for n in sizes.values())) for part, sizes in s["totals"].items()])),
    ]
    train = max(s["totals"]["train"]["tokens"], 1)
    sections += [
        (f"Tokens by {name.replace('_', ' ')}", report.table(("", "tokens", "share"), [
            (k, f"{v:,}", f"{100 * v / train:.2f} %") for k, v in counts.items()]))
        for name, counts in s["tokens by"].items()
    ]
    sections += [
        ("Tokens by source, held-out ones included", report.table(
            ("source", "tokens"), [(k, f"{v:,}") for k, v in s["sources"].items()])),
        ("Labels", report.table(("label", "documents"), [(k.replace("_", " "), f"{v:,}") for k, v in s["labels"].items()])
         + (report.table(("classifier", "fitted on", "accuracy on a held-out fifth", "always the commonest"), [
             (k, f"{v['documents']:,}", f"{v['accuracy']:.3f}" if "accuracy" in v else "-",
              f"{v['majority']:.3f}" if "majority" in v else "-") for k, v in s["classifier"].items()])
            if s["classifier"] else "")),
        ("Overlap with evaluations", report.table(
            ("evaluation", "items", "too short to check", f"runs of {build['eval_words']} words", "documents that overlap"),
            [(k, *(f"{n:,}" for n in v.values())) for k, v in s["evals"].items()])
         + ("<p>Documents that overlap were dropped.</p>" if build["drop_contaminated"] else "<p>They were kept.</p>")
         if s["evals"] else "<p>No evaluation was given, so nothing was checked.</p>"),
        ("Read by models, or not readable",
         report.table(("", "count"), list(s["models"].items())) if s["models"] else "<p>None.</p>"),
        ("Settings", "<pre>" + escape(json.dumps(build, indent=1, default=str)) + "</pre>"),
    ]
    lead = (f"{first:,} documents in, {kept:,} kept; {s['totals']['train']['tokens']:,} tokens to train on in {s['cells']} "
            f"cells of field, domain, language and educational value")
    write_json(out / "card.json", s)
    report.write(out / "card.html", report.page("Data card", lead, sections))


def example(out: Path, why: str, chars: int = 90) -> str:
    """The start of a document that was dropped for this reason."""
    for file in sorted((out / "work" / "dropped").glob("*/*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as f:
            for line in f:
                doc = json.loads(line)
                if doc["metadata"].get("filter_reason") == why:
                    return " ".join(doc["text"].split())[:chars]
    return ""
