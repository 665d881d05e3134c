"""The command `qwen3`: generate, chat, doctor, info.

Exit codes: 0 done, 1 failed, 2 wrong arguments, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

# torch takes seconds to import, so the commands import what they need and --help answers at once.
if TYPE_CHECKING:
    from rich.console import Console

    from .generate import Completion, Event
    from .model import Qwen3
    from .sampling import SamplingParams
    from .tokenizer import Tokenizer

VARIANTS = ("hybrid", "instruct-2507", "thinking-2507")
_SAMPLING = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "presence_penalty", "repetition_penalty", "seed", "stop"
)
_CHAT_HELP = """commands: /think and /no_think switch thinking for the next message and on (also inside a message),
/reset forgets the conversation, /exit leaves, /help prints this; Ctrl-C stops a reply"""


class UsageError(Exception):
    """A wrong argument: exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code. Errors are one line on stderr."""
    try:
        options = _parser().parse_args(argv)
        return options.run(options)
    except UsageError as error:
        return _fail(2, f"{error} (see qwen3 --help)")
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        return _fail(1, str(error))
    except KeyboardInterrupt:
        return _fail(130, "interrupted")


def _fail(code: int, message: str) -> int:
    print("qwen3: error: " + " ".join(message.split()), file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{self.prog.removeprefix('qwen3').strip()}: {message}".lstrip(": "))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qwen3", description="Run Qwen3 models.", epilog="qwen3 COMMAND --help explains a command.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, summary: str, examples: str) -> argparse.ArgumentParser:
        p = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        p.set_defaults(run=run)
        return p

    p = command(
        "generate", _generate, "continue a text, printed as it comes",
        '  qwen3 generate --model runs/demo/s3/model --prompt "def main("\n'
        "  cat story.txt | qwen3 generate --model Qwen3-0.6B --max-tokens 500 --seed 1\n"
        "  qwen3 generate --model Qwen3-0.6B --prompt 'The capital of France is' --temperature 0 --stop .",
    )
    p.add_argument("--prompt", metavar="TEXT", help="the text to continue, as it is; default, or '-': standard input")
    _add_model_options(p)
    _add_sampling_options(p, "default 256", "default 0.6", "default 20", "default 0.95", "default 0")

    p = command(
        "chat", _chat, "talk with a model; on a terminal, or one message per line of standard input",
        "  qwen3 chat --model Qwen3-0.6B\n"
        "  qwen3 chat --model Qwen3-0.6B --thinking-budget 500 --system 'Answer in French.'\n"
        "  printf 'My name is Ada.\\nWhat is my name? /no_think\\n' | qwen3 chat --model Qwen3-0.6B\n\n" + _CHAT_HELP,
    )
    p.add_argument("--system", metavar="TEXT", help="the system message")
    p.add_argument("--thinking-budget", type=int, metavar="N", help="end the thinking after N tokens and let it answer")
    p.add_argument("--no-thinking", action="store_true", help="forbid thinking in every turn (hybrid models)")
    p.add_argument("--variant", choices=VARIANTS, help="chat format; default: by the folder's name, else hybrid")
    _add_model_options(p)
    card = "Qwen3's for the turn: {} thinking, {} not"
    defaults = (card.format(*pair) for pair in ((0.6, 0.7), (20, 20), (0.95, 0.8), (0, 1.5)))
    _add_sampling_options(p, "thinking included; default 32768", *defaults)

    command("doctor", _doctor, "show which kernels would run here, and why; exit code 1 if one fails its check",
            "  qwen3 doctor\n  QWEN3_BACKEND=torch qwen3 doctor")

    p = command("info", _info, "show a model's configuration and what it takes in memory",
                "  qwen3 info Qwen3-30B-A3B\n  qwen3 info runs/demo/model")
    p.add_argument("model", metavar="MODEL", help="a folder with a config.json, or the name of a released model")
    return parser


def _add_model_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("model")
    group.add_argument("--model", required=True, type=Path, metavar="DIR",
                       help="folder with config.json, safetensors and tokenizer.json")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's choice")


def _add_sampling_options(
    p: argparse.ArgumentParser, tokens: str, heat: str, top_k: str, top_p: str, presence: str
) -> None:
    group = p.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, metavar="N", help=f"most tokens to generate; {tokens}")
    group.add_argument("--temperature", type=float, metavar="T", help=f"0 takes the likeliest token; {heat}")
    group.add_argument("--top-k", type=int, metavar="K", help=f"sample among the K likeliest tokens, 0 all; {top_k}")
    group.add_argument("--top-p", type=float, metavar="P",
                       help=f"sample among the likeliest tokens that sum to probability P; {top_p}")
    group.add_argument("--min-p", type=float, metavar="P",
                       help="drop tokens less likely than P times the likeliest; default 0")
    group.add_argument("--presence-penalty", type=float, metavar="X",
                       help=f"lower the logits of tokens already generated by X; {presence}")
    group.add_argument("--repetition-penalty", type=float, metavar="X",
                       help="divide the positive logits of tokens seen by X, multiply the negative; default 1")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same text; default: a new one")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")


def _params(options: argparse.Namespace, preset: SamplingParams) -> SamplingParams:
    """The preset with what the command line says."""
    given = {name: getattr(options, name) for name in _SAMPLING if getattr(options, name) is not None}
    try:
        return replace(preset, **given)
    except ValueError as error:
        raise UsageError(f"{options.command}: --{str(error).replace('_', '-', 1)}") from None


def _load(options: argparse.Namespace) -> tuple[Qwen3, Tokenizer]:
    import torch

    from .load import load
    from .tokenizer import Tokenizer

    if not options.model.is_dir():
        raise FileNotFoundError(f"{options.model}: no such folder; expected one with config.json and safetensors "
                                "(released models are not downloaded by name)")
    if options.threads is not None:
        if options.threads < 1:
            raise UsageError(f"{options.command}: --threads: got {options.threads}; expected 1 or more")
        torch.set_num_threads(options.threads)
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{options.command}: --device: cannot use {options.device!r} ({reason})") from None
    tokenizer = Tokenizer.from_file(options.model / "tokenizer.json")
    model = load(options.model, device=device, dtype=getattr(torch, options.dtype) if options.dtype else None)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{options.model}: its tokenizer.json has ids up to {tokenizer.vocab_size - 1}, but its config.json only "
            f"vocab_size {model.config.vocab_size}"
        )
    return model, tokenizer


# ---- generate --------------------------------------------------------------------------------------------------------


def _generate(options: argparse.Namespace) -> int:
    from .generate import stream
    from .sampling import THINKING

    params = _params(options, replace(THINKING, max_tokens=256))
    if options.prompt is None and sys.stdin.isatty():
        raise UsageError("generate: --prompt is missing, and standard input is a terminal")
    prompt = sys.stdin.read() if options.prompt in (None, "-") else options.prompt
    if not prompt:
        raise UsageError("generate: the prompt is empty")
    model, tokenizer = _load(options)
    events = stream(model, [tokenizer.encode(prompt)], params, tokenizer=tokenizer)
    print(prompt, end="", flush=True)
    with _timing() as count:
        for event in events:
            print(event.text, end="", flush=True)
            count(event)
        print()
    return 0


@contextmanager
def _timing() -> Iterator[Any]:
    """Counts events and prints the speed after the first token, which waits for the prompt, on stderr."""
    times: list[float] = []
    yield lambda event: times.append(time.perf_counter())
    if len(times) > 1:
        speed = f", {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s"
    else:
        speed = ""
    print(f"[{len(times)} tokens{speed}]", file=sys.stderr)


# ---- chat ------------------------------------------------------------------------------------------------------------


def _chat(options: argparse.Namespace) -> int:
    from rich.console import Console

    from .sampling import NON_THINKING

    _params(options, NON_THINKING)  # wrong values are told before the weights are read
    if options.thinking_budget is not None and options.thinking_budget < 0:
        raise UsageError(f"chat: --thinking-budget: got {options.thinking_budget}; expected 0 or more")
    variant = options.variant or _variant_of(options.model)
    if variant != "hybrid" and (options.no_thinking or (options.thinking_budget is not None and "instruct" in variant)):
        raise UsageError(f"chat: --no-thinking and --thinking-budget do not go with {variant}")
    model, tokenizer = _load(options)
    console, interactive = Console(), sys.stdin.isatty()
    if interactive:
        print(f"{options.model.name}, {variant}; {_CHAT_HELP}", file=sys.stderr)
    system = [{"role": "system", "content": options.system}] if options.system else []
    messages, switch = list(system), ""
    for line in _lines(console, interactive):
        if line in ("/exit", "/quit"):
            break
        if line == "/help":
            print(_CHAT_HELP, file=sys.stderr)
        elif line == "/reset":
            messages, switch = list(system), ""
        elif line in ("/think", "/no_think"):
            switch = " " + line
        elif line.startswith("/") and line[1:].isidentifier():
            print(f"no command {line}; {_CHAT_HELP}", file=sys.stderr)
        elif line:
            asked = [*messages, {"role": "user", "content": line + switch}]
            try:
                messages = [*asked, _turn(console, model, tokenizer, asked, variant, options)]
                switch = ""
            except (ValueError, KeyboardInterrupt) as error:
                if not interactive:
                    raise
                print(f"\n{error or 'stopped'}; the message was not kept", file=sys.stderr)
    return 0


def _lines(console: Console, interactive: bool) -> Iterator[str]:
    while True:
        try:
            yield (console.input("[bold]> [/bold]") if interactive else input()).strip()
        except EOFError:
            return


def _turn(
    console: Console, model: Qwen3, tokenizer: Tokenizer, messages: list[dict[str, Any]], variant: str,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Prints the reply as it comes and returns its message."""
    from .generate import stream
    from .sampling import NON_THINKING, THINKING
    from .thinking import prepare, reply, thinks

    how = {"enable_thinking": False if options.no_thinking else None, "variant": variant}
    how["thinking_budget"] = options.thinking_budget
    params = _params(options, THINKING if thinks(messages, **how) else NON_THINKING)
    turn = prepare(tokenizer, messages, params=params, **how)
    with _timing() as count:
        events = stream(model, [turn.prompt], turn.params, tokenizer=tokenizer, guides=[turn.guide])
        completion = _show(console, events, tokenizer, turn.thinking_open, count)
    return reply(turn, completion, tokenizer).parsed.message()


def _show(console: Console, events: Iterator[Event], tokenizer: Tokenizer, thinking: bool, count) -> Completion:
    """Prints a reply, its thinking dimmed on a terminal."""
    for event in events:
        count(event)
        thinking |= event.id == tokenizer.think_id
        if console.is_terminal:
            console.out(event.text, style="dim" if thinking else None, end="", highlight=False)
        else:  # as it is: rich would replace tabs
            console.file.write(event.text)
        console.file.flush()
        thinking &= event.id != tokenizer.end_think_id
    console.file.write("\n")
    return event.completion


def _variant_of(folder: Path) -> str:
    name = folder.resolve().name.lower()
    return next((variant for variant in VARIANTS if variant in name), "hybrid")


# ---- doctor and info -------------------------------------------------------------------------------------------------


def _doctor(options: argparse.Namespace) -> int:
    from qwen3_kernels import doctor

    return doctor.main()


def _info(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from .config import Qwen3Config

    path = Path(options.model)
    try:
        config = Qwen3Config.from_file(path) if path.exists() else Qwen3Config.from_name(options.model)
    except ValueError as error:
        raise ValueError(str(error) if path.exists() else f"no folder {path}, and {error}") from None
    table = Table(title=options.model, show_header=False)
    for name, value in config.to_dict().items():
        table.add_row(name, str(value))
    table.add_section()
    total = config.num_params()
    table.add_row("parameters", f"{total:,}")
    table.add_row("without embeddings", f"{config.num_params(embeddings=False):,}")
    if config.num_experts:
        table.add_row("active per token", f"{config.num_params(active=True):,}")
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    for name, size in (("float32", 4), ("bfloat16 or float16", 2)):
        table.add_section()
        table.add_row(f"weights in {name}", _bytes(total * size))
        table.add_row("cache per token", f"{kv * size:,} B")
        table.add_row("cache per full context", _bytes(kv * size * config.max_position_embeddings))
    Console().print(table)
    return 0


def _bytes(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.2f} MiB"


if __name__ == "__main__":
    sys.exit(main())
