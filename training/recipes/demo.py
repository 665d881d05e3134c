"""From nothing to a small Qwen3 trained on real text: ``python -m training.recipes.demo``.

Builds a corpus from text this machine has, trains a tokenizer with Qwen's pre-tokenizer and special tokens, trains a
small Qwen3 with this project's kernels for a few minutes, states its held-out bits per byte beside what compressors and
a unigram model reach on the same text, samples from it, loads the result in transformers and compares logits, and
writes ``report.html``. A run that was stopped while training goes on from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import lzma
import math
import shutil
import statistics
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from qwen3_model import generate, load
from qwen3_model.config import Qwen3Config
from qwen3_model.model import Qwen3
from qwen3_model.sampling import SamplingParams
from qwen3_model.tokenizer import Tokenizer, train_bpe

from .. import corpus, environment, report
from ..config import DTYPES, Config, to_json
from ..data import shards
from ..data.packing import PackedLoader, evaluation_batches
from ..log import read_metrics
from ..pretrain import evaluate, next_token_loss, set_up, train, train_step

PROMPTS = ("def ", "class ", "import ", "The ", '    """Return ', "for i in range(")
LOGIT_TOLERANCE = 1e-4  # of the largest logit, float32 on both sides


@dataclass(frozen=True)
class Recipe:
    """What is trained on what. Chosen by experiment for a few minutes on the device of its name in ``RECIPES``; see
    docs/LOG.md. Two CPU cores see about two million tokens in that time, which is little: so a small model, small steps,
    Muon, and initial weights near 1/sqrt(hidden_size) rather than Qwen3's 0.02, too weak a signal at this width."""

    corpus_bytes: int = 12_000_000
    held_out: float = 0.03
    vocab_size: int = 4096
    hidden_size: int = 128
    layers: int = 4
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    intermediate_size: int = 384
    seq_len: int = 256
    rows: int = 4
    lr: float = 1.5e-2
    optimizer: str = "muon"
    initializer_range: float = 0.08
    warmup: int = 20
    decay: float = 0.5
    weight_decay: float = 0.1
    max_epochs: float = 4.0  # more passes over the text would only be learnt by heart

    def model(self, end_of_text: int) -> Qwen3Config:
        return Qwen3Config(
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim, rope_theta=10_000, max_position_embeddings=self.seq_len, tie_word_embeddings=True,
            initializer_range=self.initializer_range, bos_token_id=end_of_text, eos_token_id=end_of_text,
        )


RECIPES = {
    "cpu": Recipe(),
    "cuda": Recipe(
        corpus_bytes=80_000_000, vocab_size=8192, hidden_size=512, layers=8, heads=8, kv_heads=4, intermediate_size=1536,
        seq_len=1024, rows=64, lr=2e-3, optimizer="adamw", initializer_range=0.02, warmup=100,
    ),
}


@dataclass(frozen=True)
class Demo:
    """Options of the command line."""

    out: Path = Path("runs/demo")
    minutes: float = 3.0  # training time; the number of steps is worked out from the speed of the first ones
    steps: int = 0  # fixes the number of steps instead
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.minutes > 0 or self.steps < 0 or self.seed < 0:
            raise ValueError(
                f"minutes {self.minutes}, steps {self.steps}, seed {self.seed}; expected minutes > 0 and none negative"
            )


@dataclass
class Stages:
    """Prints a heading as each stage starts and keeps its wall time."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, name: str) -> None:
        self.stop()
        self.console.rule(name, align="left")
        self._open = name, time.perf_counter()

    def stop(self) -> None:
        name, start = getattr(self, "_open", (None, 0.0))
        if name is not None:
            self.seconds[name] = time.perf_counter() - start
        self._open = None, 0.0


def run(demo: Demo, recipe: Recipe | None = None, *, quiet: bool = False) -> dict[str, Any]:
    """The whole job; returns what ``results.json`` holds. Raises RuntimeError when the trained model gives other logits
    in transformers."""
    device = Config(Path(), Path(), device=demo.device).resolved().device
    recipe = recipe or RECIPES[torch.device(device).type]
    console, out = Console(quiet=quiet, highlight=False, soft_wrap=True), demo.out
    stages = Stages(console)

    plan = read_plan(out, demo, recipe)
    if plan is None:
        for old in ("data", "train", "model"):
            shutil.rmtree(out / old, ignore_errors=True)
        for old in ("plan.json", "results.json", "report.html"):
            (out / old).unlink(missing_ok=True)
        stages("Corpus, tokenizer and token shards; what compressors reach")
        data = prepare(out / "data", recipe, console)
        stages("Speed of the first steps")
        config, model_config = configure(demo, recipe, device, data["end_of_text"])
        config = schedule(config, model_config, demo, recipe, console)
        plan = {"demo": to_json(demo), "recipe": to_json(recipe), "data": data, "steps": config.steps, "dtype": config.dtype}
        (out / "plan.json").write_text(json.dumps(plan, indent=1))
    data = plan["data"]
    config, model_config = configure(demo, recipe, device, data["end_of_text"], plan["steps"], plan["dtype"])
    print_kernels(console, config)

    stages("Training")
    final = train(config, model_config=model_config, quiet=quiet)

    stages("Held-out loss")
    model = load.load(final, device=device)
    held_out = shards.TokenShards(out / "data" / "held_out")
    rows = evaluation_batches(held_out, seq_len=recipe.seq_len, rows=recipe.rows, overlap=recipe.seq_len // 2)
    result = evaluate(model, held_out, rows)
    scores = {f"this model, {model_config.num_params():,} parameters": result["bits_per_byte"]} | data["baselines"]
    console.print(f"held-out loss {result['loss']:.4f} nats/token, {result['bits_per_byte']:.4f} bits/byte")
    console.print(_table(("held-out text, coded by", "bits/byte"), [(k, f"{v:.4f}") for k, v in scores.items()]))

    stages("Samples")
    tokenizer = Tokenizer.from_file(out / "data" / "tokenizer.json")
    samples = sample(model, tokenizer, demo.seed)
    for prompt, text in samples[:3]:
        console.print(f"[bold]{prompt!r}[/] ->", end=" ")
        console.print(repr(text), markup=False)

    stages("The same model in transformers")
    export(model, out / "data" / "tokenizer.json", out / "model")
    equality = compare_with_transformers(out / "model", held_out)
    console.print(equality["text"], markup=False)
    stages.stop()

    results = {
        "held_out": result, "bits_per_byte": scores, "transformers": equality, "samples": samples, "plan": plan,
        "stages": stages.seconds, "environment": environment.describe(device, DTYPES[config.dtype]),
    }
    (out / "results.json").write_text(json.dumps(results, indent=1))
    report.write(out / "report.html", render(results, config, model_config))
    console.print(f"report: {out / 'report.html'}   model: {out / 'model'}", markup=False)
    return results


def read_plan(out: Path, demo: Demo, recipe: Recipe) -> dict[str, Any] | None:
    """The plan of an unfinished run with the same settings in ``out``, or None."""
    if not (out / "plan.json").exists() or (out / "report.html").exists():
        return None
    try:
        plan = json.loads((out / "plan.json").read_text())
    except ValueError:  # cut short by a kill
        return None
    same = plan["demo"] == to_json(demo) and plan["recipe"] == to_json(recipe)
    return plan if same else None


# ---- data ------------------------------------------------------------------------------------------------------------


def prepare(folder: Path, recipe: Recipe, console: Console) -> dict[str, Any]:
    """Corpus, tokenizer, shards and baselines. The compressors run beside the tokenizer, which uses other threads."""
    docs = list(corpus.documents(recipe.corpus_bytes))
    held = [d for d in docs if corpus.is_held_out(d, recipe.held_out)]
    kept = [d for d in docs if not corpus.is_held_out(d, recipe.held_out)]
    if not held or not kept:
        raise ValueError(f"{len(kept)} documents to train on and {len(held)} held out; expected at least one of each")
    sizes = corpus.sizes(docs)
    console.print(_table(("source", "documents", "bytes"),
                         [(s, f"{v['documents']:,}", f"{v['bytes']:,}") for s, v in sizes.items()]))
    folder.mkdir(parents=True)
    with ThreadPoolExecutor() as pool:  # zlib and lzma let go of the interpreter lock
        compressed = compressors(pool, kept, held)
        tokenizer = train_bpe((d.text for d in kept[::2]), recipe.vocab_size, folder / "tokenizer.json")
        options = {
            "vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.token_id("<|endoftext|>"),
            "tokenizer_sha256": environment.file_sha256(folder / "tokenizer.json"),
        }
        indices = {}
        for name, part in (("train", kept), ("held_out", held)):
            ids = tokenizer.encode_batch([d.text for d in part])
            pairs = zip(ids, (len(d.text.encode()) for d in part))
            indices[name] = shards.write(folder / name, pairs, **options)
            console.print(f"{name}: {indices[name].n_documents:,} documents, {indices[name].n_bytes:,} bytes, "
                          f"{indices[name].n_tokens:,} tokens")
        baselines = {"unigram: entropy of the held-out tokens themselves": unigram(shards.TokenShards(folder / "held_out"))}
        baselines |= {name: job.result() for name, job in compressed.items()}
    return {"end_of_text": options["end_of_text"], "baselines": baselines, "sources": sizes,
            **{name: to_json(index) for name, index in indices.items()}}


def unigram(data: shards.TokenShards) -> float:
    """Bits per byte of the best possible model without context: no other unigram model does better on these tokens."""
    counts = np.bincount(np.concatenate([data.read(d) for d in range(len(data))]))
    counts = counts[counts > 0]
    bits = -(counts * np.log2(counts / counts.sum())).sum()
    return float(bits / data.index.n_bytes)


def compressors(pool: ThreadPoolExecutor, kept: list[corpus.Document], held: list[corpus.Document]) -> dict[str, Any]:
    """{what it is: future of bits per byte} of the held-out documents as one text. The last one knows the whole training
    text: xz has no preset dictionary, so it is what the held-out text adds behind it, in a window that holds both."""
    seen, text = (b"".join(d.text.encode() for d in part) for part in (kept, held))

    def zlib_bits(dictionary: bytes = b"") -> float:
        options = {"zdict": dictionary} if dictionary else {}
        squeeze = zlib.compressobj(9, **options)
        return 8 * len(squeeze.compress(text) + squeeze.flush()) / len(text)

    def xz_size(data: bytes) -> int:
        window = max(1 << 20, 1 << (len(seen) + len(text)).bit_length())
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": min(window, 1 << 27)}]
        return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))

    alone = pool.submit(xz_size, seen)
    both = pool.submit(xz_size, seen + text)
    return {
        "gzip -9 (zlib)": pool.submit(zlib_bits),
        "gzip -9 with 32 KiB of training text as dictionary": pool.submit(zlib_bits, seen[-(1 << 15):]),
        "xz": pool.submit(lambda: 8 * xz_size(text) / len(text)),
        "xz behind the whole training text": pool.submit(lambda: 8 * (both.result() - alone.result()) / len(text)),
    }


# ---- plan ------------------------------------------------------------------------------------------------------------


def configure(
    demo: Demo, recipe: Recipe, device: str, end_of_text: int, steps: int = 10**6, dtype: str = "auto"
) -> tuple[Config, Qwen3Config]:
    data = demo.out / "data"
    config = Config(
        data=data / "train", eval_data=data / "held_out", tokenizer=data / "tokenizer.json", out=demo.out / "train",
        steps=steps, seq_len=recipe.seq_len, rows=recipe.rows, lr=recipe.lr, optimizer=recipe.optimizer,
        warmup=min(recipe.warmup, steps // 5),
        decay=recipe.decay, weight_decay=recipe.weight_decay, seed=demo.seed, device=device, dtype=dtype,
        eval_every=max(1, steps // 8), eval_batches=max(8, 32_768 // (recipe.rows * recipe.seq_len)),
        log_every=max(1, steps // 40), save_every=max(1, steps // 4),
        tensorboard=importlib.util.find_spec("tensorboard") is not None,
    )
    return config, recipe.model(end_of_text)


def schedule(config: Config, model_config: Qwen3Config, demo: Demo, recipe: Recipe, console: Console) -> Config:
    """Chooses the dtype, on a CPU the faster one, and the number of steps that fit."""
    names = ("bfloat16",)
    if config.device == "cpu":  # without instructions for bfloat16, torch takes up to 60 times as long in it
        fit = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        names = ("float32", "bfloat16") if fit else ("float32",)
    seconds = {n: seconds_per_step(dataclasses.replace(config, dtype=n), model_config) for n in names}
    dtype = min(seconds, key=seconds.get)
    tokens = config.rows * config.seq_len
    console.print("; ".join(f"{n}: {s:.3f} s per step of {tokens:,} tokens" for n, s in seconds.items()))
    steps = demo.steps
    if not steps:
        in_time = 0.92 * demo.minutes * 60 / seconds[dtype]  # the rest goes to evaluation and checkpoints
        in_text = recipe.max_epochs * shards.read_index(config.data).n_tokens / tokens
        steps = max(10, int(min(in_time, in_text)) // 10 * 10)
    console.print(f"{steps} steps in {dtype}")
    return dataclasses.replace(config, steps=steps, warmup=min(config.warmup, steps // 5), dtype=dtype)


def seconds_per_step(config: Config, model_config: Qwen3Config, count: int = 4) -> float:
    """Median of a few training steps of a model that is then thrown away."""
    model, optimizer = set_up(config, model_config, None)
    loader = PackedLoader(shards.TokenShards(config.data), seq_len=config.seq_len, rows=config.rows, seed=config.seed)
    times = []
    for step in range(count + 1):  # the first one builds and checks kernels
        start = time.perf_counter()
        loss, _, _ = train_step(
            model, optimizer, [loader.batch(step)], next_token_loss, lr=config.lr_at(step), max_grad_norm=1.0
        )
        loss.item()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


# ---- the trained model -------------------------------------------------------------------------------------------------


def sample(model: Qwen3, tokenizer: Tokenizer, seed: int, max_tokens: int = 96) -> list[tuple[str, str]]:
    """[(prompt, what the model wrote behind it)]"""
    end = tokenizer.token_id("<|endoftext|>")
    prompts = [[end, *tokenizer.encode(text)] for text in PROMPTS]
    room = model.config.max_position_embeddings - max(map(len, prompts))
    params = [
        SamplingParams(temperature=0.7, top_p=0.95, seed=seed + i, stop_ids=[end], max_tokens=min(max_tokens, room))
        for i in range(len(prompts))  # one seed would give all prompts the same noise
    ]
    return [(p, c.text) for p, c in zip(PROMPTS, generate.generate(model, prompts, params, tokenizer=tokenizer))]


def export(model: Qwen3, tokenizer_file: Path, folder: Path) -> None:
    """A folder that transformers loads: config, weights and tokenizer."""
    load.save(model, folder)
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
        "model_max_length": model.config.max_position_embeddings, "clean_up_tokenization_spaces": False,
    }, indent=1))


def compare_with_transformers(folder: Path, data: shards.TokenShards, rows: int = 4) -> dict[str, Any]:
    """Logits and token ids of held-out text from our code and from transformers, float32 on the CPU."""
    if importlib.util.find_spec("transformers") is None:
        return {"checked": False, "text": "transformers is not installed, so nothing was compared (pip install transformers)"}
    import transformers

    ours = load.load(folder, dtype=torch.float32)
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    transformers.utils.logging.enable_progress_bar()
    length = ours.config.max_position_embeddings
    documents = [data.read(d)[:length] for d in np.argsort(-data.lengths, kind="stable")[:rows]]
    tokens = torch.from_numpy(np.stack([d[: min(map(len, documents))] for d in documents]))
    with torch.no_grad():
        a, b = ours(tokens), theirs(tokens).logits
    difference, largest = (a - b).abs().max().item(), b.abs().max().item()
    same_ids = all(
        Tokenizer.from_file(folder / "tokenizer.json").encode(text)
        == transformers.AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
        for text in (*PROMPTS, "caf\u00e9 <think>12 x 3</think>\n\n\tend")
    )
    if not difference <= LOGIT_TOLERANCE * largest or not same_ids:
        raise RuntimeError(
            f"transformers {transformers.__version__} disagrees on {folder}: logits differ by up to {difference:.3g} where the "
            f"largest is {largest:.3g}; token ids {'equal' if same_ids else 'differ'}"
        )
    return {
        "checked": True, "version": transformers.__version__, "max_abs": difference, "max_rel": difference / largest,
        "text": f"transformers {transformers.__version__}: logits of {tuple(tokens.shape)} held-out tokens differ by at most "
                f"{difference:.2e} ({difference / largest:.1e} of the largest); token ids equal",
    }


# ---- what is shown -----------------------------------------------------------------------------------------------------


def print_kernels(console: Console, config: Config) -> None:
    choices = environment.kernels(config.device, DTYPES[config.dtype])
    rows = [(op, c["backend"], c["why"], "" if c["error"] is None else f"{c['error']:.2f}") for op, c in choices.items()]
    console.print(_table(("op", "kernel", "why", "error / plain torch's"), rows))


def render(results: dict[str, Any], config: Config, model_config: Qwen3Config) -> str:
    """The report's HTML."""
    records = read_metrics(config.out)
    pick = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "eval", "speed")}
    plan, env = results["plan"], results["environment"]
    index = plan["data"]["held_out"]
    per_token = index["n_bytes"] / index["n_tokens"]  # bytes: turns bits/byte into bits/token
    losses = {
        "training": report.smooth([(r["step"], r["loss"]) for r in pick["train"]], max(1, config.steps // 50)),
        "held out": [(r["step"], r["loss"]) for r in pick["eval"]],
    }
    baselines = {name.split(":")[0]: bits * math.log(2) * per_token for name, bits in plan["data"]["baselines"].items()}
    short = {name.replace(" with 32 KiB of training text as dictionary", " + dict").replace(
        " behind the whole training text", " + training text"): v for name, v in baselines.items()}
    tokens = config.steps * config.rows * config.seq_len
    best = results["held_out"]["bits_per_byte"]
    rates = sorted(r["tokens_per_s"] for r in pick["speed"])
    sections = [
        ("Held-out text, bits per byte (less is better)", report.table(
            ("coded by", "bits/byte", "against the model"),
            [(k, f"{v:.4f}", "" if v == best else f"{100 * (v / best - 1):+.1f} %")
             for k, v in results["bits_per_byte"].items()])
         + f"<p>{index['n_documents']} documents, {index['n_bytes']:,} bytes, chosen by the hash of their text and never "
         f"trained on. The model codes every token including the end of each document, in rows of {config.seq_len} tokens of "
         f"which half are context. Loss {results['held_out']['loss']:.4f} nats per token.</p>"),
        ("Loss, nats per token", report.chart(losses, x="step", y="nats per token", baselines=short)
         + "<p>Dashed: what the baselines' bits per byte come to per token. During training the held-out loss is of the first "
         "few rows, without context from before a row; the last point is of all.</p>"),
        ("Speed", report.chart({"tokens/s": [(r["step"], r["tokens_per_s"]) for r in pick["speed"]]}, x="step", y="tokens/s")
         + f"<p>Median {rates[len(rates) // 2]:,.0f} tokens/s on {env['device']}, {env['threads']} threads, {config.dtype}.</p>"),
        ("Kernels", report.table(
            ("op", "kernel", "why", "self-check error / plain torch's"),
            [(op, k["backend"], k["why"], "" if k["error"] is None else f"{k['error']:.2f}") for op, k in env["kernels"].items()])),
        ("The same weights in transformers", f"<p>{results['transformers']['text']}.</p>"),
        ("Samples", "".join(f"<pre><b>{_html(p)}</b>{_html(t)}</pre>" for p, t in results["samples"])),
        ("Text", report.table(("source", "documents", "bytes"), [
            (s, f"{v['documents']:,}", f"{v['bytes']:,}") for s, v in plan["data"]["sources"].items()])),
        ("Settings", report.table(("setting", "value"), [
            *((k, v) for k, v in to_json(config).items() if k != "model"), *model_config.to_dict().items()])),
        ("Time and versions", report.table(("stage", "seconds"), [(k, f"{v:.1f}") for k, v in results["stages"].items()])
         + report.table(("", ""), [(k, env[k]) for k in ("device", "platform", "python", "torch", "numpy", "qwen3_kernels")])),
    ]
    lead = (f"{model_config.num_params():,} parameters, {config.steps} steps, {tokens:,} tokens "
            f"({tokens / plan['data']['train']['n_tokens']:.2f} passes over the training text): {best:.3f} bits per byte")
    return report.page("A small Qwen3, trained from nothing", lead, sections)


def _html(text: str) -> str:
    from html import escape

    return escape(text)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def main(args: Sequence[str] | None = None) -> None:
    try:
        import tyro
    except ImportError as e:
        raise SystemExit("tyro is not installed: pip install 'qwen3-kernels[train]'") from e
    run(tyro.cli(Demo, args=args, prog="python -m training.recipes.demo", description=__doc__))


if __name__ == "__main__":
    main()
