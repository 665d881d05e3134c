import io
import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from qwen3_model import cli
from qwen3_model.chat import render
from qwen3_model.config import Qwen3Config
from qwen3_model.generate import Completion, Event, generate
from qwen3_model.load import load, save
from qwen3_model.model import Qwen3
from qwen3_model.sampling import NON_THINKING, THINKING, SamplingParams
from qwen3_model.tokenizer import Tokenizer, train_bpe

VOCAB = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random model with a tokenizer trained on this file."""
    path = tmp_path_factory.mktemp("cli") / "Tiny"
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, initializer_range=0.3,
        max_position_embeddings=512,
    )
    save(Qwen3(config).init_weights(0), path)
    train_bpe([Path(__file__).read_text()], VOCAB, path / "tokenizer.json")
    return path


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command with this standard input; gives exit code, stdout, stderr."""

    def run(*argv: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            code = cli.main([str(a) for a in argv])
        except SystemExit as leave:  # --help
            code = leave.code
        return code, *capsys.readouterr()

    return run


def prepared(folder: Path) -> tuple[Qwen3, Tokenizer]:
    return load(folder), Tokenizer.from_file(folder / "tokenizer.json")


# ---- generate --------------------------------------------------------------------------------------------------------


def test_generate_prints_prompt_and_completion(run, folder):
    model, tokenizer = prepared(folder)
    params = SamplingParams(temperature=0.9, top_k=7, top_p=0.9, seed=5, max_tokens=30, stop=["zz"])
    expected = generate(model, [tokenizer.encode("def f(")], params, tokenizer=tokenizer)[0]
    options = ["--temperature", 0.9, "--top-k", 7, "--top-p", 0.9, "--seed", 5, "--max-tokens", 30, "--stop", "zz"]
    code, out, err = run("generate", "--model", folder, "--prompt", "def f(", *options)
    assert (code, out) == (0, "def f(" + expected.text + "\n")
    assert err.startswith(f"[{len(expected.ids)} tokens, ") and err.endswith(" tokens/s]\n")
    assert run("generate", "--model", folder, *options, stdin="def f(")[1] == out
    assert run("generate", "--model", folder, "--prompt", "-", *options, stdin="def f(")[1] == out


def test_generate_defaults(run, folder, monkeypatch):
    seen = []
    original = cli._params
    monkeypatch.setattr(cli, "_params", lambda *args: seen.append(original(*args)) or seen[-1])
    assert run("generate", "--model", folder, "--prompt", "x", "--seed", 1)[0] == 0
    p = seen[0]
    assert (p.temperature, p.top_k, p.top_p, p.max_tokens, p.seed) == (0.6, 20, 0.95, 256, 1)
    run("generate", "--model", folder, "--prompt", "x", "--min-p", 0.1, "--presence-penalty", 1,
        "--repetition-penalty", 1.1, "--max-tokens", 2)
    p = seen[1]
    assert (p.min_p, p.presence_penalty, p.repetition_penalty, p.max_tokens, p.seed) == (0.1, 1, 1.1, 2, None)


def test_dtype_and_threads(run, folder, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    note = lambda model, *args, **options: seen.append(model.head_weight.dtype) or []  # noqa: E731
    monkeypatch.setattr("qwen3_model.generate.stream", note)
    run("generate", "--model", folder, "--prompt", "x", "--dtype", "bfloat16", "--threads", 1, "--device", "cpu")
    assert seen == [1, torch.bfloat16]


# ---- chat ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def turns(monkeypatch):
    """Replaces the model's replies by "reply N"; collects (prompt, params, guide) of every turn."""
    seen, number = [], itertools.count(1)

    def stream(model, prompts, params, *, tokenizer, guides):
        seen.append((tokenizer.decode(prompts[0]), params, guides[0]))
        ids = tokenizer.encode(f"reply {next(number)}") + [tokenizer.eos_id]
        done = Completion(ids, tokenizer.decode(ids[:-1]), "stop", None, None, [])
        return [Event(0, i, tokenizer.decode([i], skip_special=True), done if i == ids[-1] else None) for i in ids]

    monkeypatch.setattr("qwen3_model.generate.stream", stream)
    return seen


def conversation(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    roles = itertools.cycle(("user", "assistant"))
    return messages + [{"role": role, "content": content} for role, content in zip(roles, contents)]


def test_chat_reads_a_conversation_from_a_pipe(run, folder, turns):
    code, out, err = run("chat", "--model", folder, "--system", "Be brief.", stdin="hello\n\n  and now?  \n")
    assert (code, out) == (0, "reply 1\nreply 2\n")
    assert [prompt for prompt, *_ in turns] == [
        render(conversation("hello", system="Be brief.")),
        render(conversation("hello", "reply 1", "and now?", system="Be brief.")),
    ]
    assert turns[0][1:] == (THINKING, None)


def test_chat_switches_and_commands(run, folder, turns):
    lines = ["/no_think", "a", "b", "/think", "c", "/reset", "d /no_think", "/typo", "/help", "/exit", "never"]
    code, out, err = run("chat", "--model", folder, stdin="\n".join(lines))
    assert code == 0 and out == "reply 1\nreply 2\nreply 3\nreply 4\n"
    assert [p for _, p, _ in turns] == [NON_THINKING, NON_THINKING, THINKING, NON_THINKING]
    assert turns[2][0] == render(conversation("a /no_think", "reply 1", "b", "reply 2", "c /think"))
    assert turns[3][0] == render(conversation("d /no_think"))
    assert "no command /typo" in err and err.count("/reset forgets") == 2


def test_chat_options(run, folder, turns):
    run("chat", "--model", folder, "--thinking-budget", 50, "--temperature", 0.2, stdin="a\nb /no_think\n")
    (_, first, guide), (_, second, none) = turns
    assert (guide.budget, none) == (50, None)
    assert (first.temperature, first.top_p, second.temperature, second.top_p) == (0.2, 0.95, 0.2, 0.8)
    run("chat", "--model", folder, "--no-thinking", stdin="a\n")
    assert turns[2][:2] == (render(conversation("a"), enable_thinking=False), NON_THINKING)
    run("chat", "--model", folder, "--variant", "thinking-2507", stdin="a\n")
    assert turns[3][0].endswith("<think>\n")


def test_chat_with_a_real_model_repeats_with_a_seed(run, folder):
    def talk(seed):
        options = ["--seed", seed, "--max-tokens", 20]
        return run("chat", "--model", folder, *options, stdin="hello\nbye\n")

    code, out, err = talk(3)
    assert code == 0 and err.count(" tokens, ") == 2
    assert talk(3)[1] == out != talk(4)[1]


@pytest.mark.parametrize(
    "name, variant",
    [
        ("Qwen3-4B", "hybrid"),
        ("Qwen3-4B-Instruct-2507", "instruct-2507"),
        ("qwen3-4b-thinking-2507-FP8", "thinking-2507"),
    ],
)
def test_variant_comes_from_the_folder(name, variant):
    assert cli._variant_of(Path("models") / name) == variant


@pytest.mark.parametrize("opened", [False, True])
def test_thinking_is_dimmed_on_a_terminal_and_plain_elsewhere(folder, opened):
    _, tokenizer = prepared(folder)
    ids = tokenizer.encode(("" if opened else "<think>") + "a\tb</think>c")
    done = Completion(ids, "", "stop", None, None, [])
    events = [Event(0, i, tokenizer.decode([i]), done) for i in ids]

    def shown(**how):
        file = io.StringIO()
        assert cli._show(Console(file=file, **how), iter(events), tokenizer, opened, lambda event: None) == done
        return file.getvalue()

    dim, reset = "\x1b[2m", "\x1b[0m"
    terminal = shown(force_terminal=True, color_system="standard")
    assert f"{dim}b{reset}{dim}</think>{reset}c" in terminal and terminal.startswith(dim)
    assert shown() == tokenizer.decode(ids) + "\n"


# ---- info and doctor -------------------------------------------------------------------------------------------------


def test_info_of_a_name(run):
    code, out, _ = run("info", "Qwen3-0.6B")
    assert code == 0
    for text in ("596,049,920", "440,467,456", "114,688 B", "229,376 B", "2.22 GiB", "1.11 GiB", "40960"):
        assert text in out
    assert "experts" not in out
    out = run("info", "Qwen/Qwen3-30B-A3B")[1]
    assert "30,532,122,624" in out and "3,353,032,704" in out and "98,304 B" in out


def test_info_of_a_folder(run, folder):
    code, out, _ = run("info", folder)
    assert code == 0 and f"{Qwen3Config.from_file(folder).num_params():,}" in out


def test_doctor_gives_its_exit_code(run, monkeypatch):
    monkeypatch.setattr("qwen3_kernels.doctor.main", lambda: 7)
    assert run("doctor")[0] == 7


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, code, message",
    [
        ([], 2, "COMMAND"),
        (["sing"], 2, "invalid choice: 'sing'"),
        (["generate"], 2, "--model"),
        (["generate", "--model", "/nowhere", "--prompt", "x"], 1, "/nowhere: no such folder"),
        (["chat", "--model", "/nowhere"], 1, "/nowhere: no such folder"),
        (["info", "/nowhere"], 1, "no folder /nowhere, and model name is '/nowhere'"),
        (["info", "Qwen3-9B"], 1, "expected a released model such as Qwen3-8B"),
        (["generate", "--model", "DIR", "--prompt", "x", "--temperature", "-1"], 2, "--temperature: got -1.0; exp"),
        (["generate", "--model", "DIR", "--prompt", "x", "--temperature", "hot"], 2, "invalid float value: 'hot'"),
        (["generate", "--model", "DIR", "--prompt", "x", "--top-p", "2"], 2, "--top-p: got 2.0; expected in (0, 1]"),
        (["generate", "--model", "DIR", "--prompt", "x", "--presence-penalty", "3"], 2, "--presence-penalty: got 3.0"),
        (["generate", "--model", "DIR", "--prompt", "x", "--max-tokens", "0"], 2, "--max-tokens: got 0"),
        (["generate", "--model", "DIR", "--prompt", "x", "--stop", ""], 2, "--stop: got ''"),
        (["generate", "--model", "DIR", "--prompt", "x", "--threads", "0"], 2, "--threads: got 0"),
        (["generate", "--model", "DIR", "--prompt", "x", "--device", "gpu"], 2, "--device: cannot use 'gpu'"),
        (["generate", "--model", "DIR", "--prompt", "x", "--dtype", "int8"], 2, "invalid choice: 'int8'"),
        (["generate", "--model", "DIR", "--prompt", "x", "--best-of", "2"], 2, "unrecognized arguments: --best-of"),
        (["generate", "--model", "DIR", "--prompt", ""], 2, "the prompt is empty"),
        (["generate", "--model", "DIR"], 2, "the prompt is empty"),
        (["generate", "--model", "DIR", "--prompt", "x" * 3000], 1, "expected fewer than the model's context, 512"),
        (["chat", "--model", "DIR", "--thinking-budget", "-1"], 2, "--thinking-budget: got -1"),
        (["chat", "--model", "DIR", "--top-k", "-1"], 2, "--top-k: got -1"),
        (["chat", "--model", "DIR", "--variant", "qwq"], 2, "invalid choice: 'qwq'"),
        (["chat", "--model", "DIR", "--variant", "thinking-2507", "--no-thinking"], 2, "do not go with thinking-2507"),
        (["chat", "--model", "DIR", "--variant", "instruct-2507", "--thinking-budget", "5"], 2, "do not go with"),
    ],
)
def test_errors_are_one_line(run, folder, argv, code, message):
    got, out, err = run(*[folder if a == "DIR" else a for a in argv])
    assert (got, out) == (code, "")
    assert err.startswith("qwen3: error: ") and message in err and err.count("\n") == 1


def test_a_budget_that_leaves_no_answer_is_one_line(run, folder):
    code, _, err = run("chat", "--model", folder, "--thinking-budget", 30, "--max-tokens", 40, stdin="hi\n")
    assert code == 1 and "max_tokens: got 40; expected over" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "not a tokenizer.json"),
        (lambda d: (d / "config.json").unlink(), "config.json: no such file"),
        (lambda d: (d / "config.json").write_text("{"), "config.json: "),
        (lambda d: (d / "model.safetensors").write_bytes(b"\0" * 100), "not a whole safetensors file"),
        (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
    ],
)
def test_a_broken_folder_is_one_line(run, folder, tmp_path, spoil, message):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    spoil(broken)
    code, _, err = run("generate", "--model", broken, "--prompt", "x")
    assert code == 1 and message in err and err.startswith("qwen3: error: ") and err.count("\n") == 1


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(run, folder, tmp_path):
    small = tmp_path / "small"
    save(Qwen3(replace(Qwen3Config.from_file(folder), vocab_size=VOCAB - 1)).init_weights(0), small)
    (small / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    code, _, err = run("generate", "--model", small, "--prompt", "x")
    assert code == 1 and "ids up to 399" in err and "vocab_size 399" in err


def test_interrupt(run, folder, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen3_model.generate.stream", interrupted)
    assert run("generate", "--model", folder, "--prompt", "x")[::2] == (130, "qwen3: error: interrupted\n")


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["doctor"], ["info"]], ids=" ".join)
def test_help(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0 and out.startswith("usage: qwen3")
    assert ("examples:" in out) == bool(command)


def test_as_a_program(folder):
    """--help answers without importing torch; a reader that leaves early makes no noise."""
    probe = "import sys\nfrom qwen3_model import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    probe += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout.endswith("False\n") and done.stdout.startswith("usage: qwen3"), done.stderr
    argv = [sys.executable, "-W", "ignore", "-m", "qwen3_model.cli", "generate", "--model", str(folder)]
    argv += ["--prompt", "x", "--max-tokens", "300"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == b""
