import json
import os
import struct
from dataclasses import replace

import pytest
import torch
from hf import ALL, BASE, EXPERTS, ours, relative, some_tokens, theirs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwen3_model import load as module
from qwen3_model.config import Qwen3Config
from qwen3_model.load import INDEX, SINGLE, dequantise, load, save

TIED = replace(BASE, tie_word_embeddings=True)
every = pytest.mark.parametrize("config", ALL.values(), ids=ALL)


def logits(model, tokens):
    with torch.no_grad():
        out = model(tokens)
    return getattr(out, "logits", out)


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def write(folder, config: Qwen3Config, tensors: dict, **raw) -> None:
    """A checkpoint made by hand."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | raw))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / SINGLE)


def stored(model, folder) -> dict[str, torch.Tensor]:
    """The tensors `save` writes."""
    save(model, folder)
    return load_file(folder / SINGLE)


# ---- both ways with transformers -------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("shard", [None, "20KB"])
def test_from_transformers(config, shard, tmp_path):
    """Its save_pretrained, in one file or in shards."""
    model, tokens = ours(config), some_tokens(config, 2, 12)
    hf = theirs(model)
    hf.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    assert (tmp_path / INDEX).exists() == bool(shard) and (tmp_path / SINGLE).exists() != bool(shard)
    again = load(tmp_path)
    assert again.config == config and not again.training
    assert_same_weights(again, model)
    assert relative(logits(again, tokens), logits(hf, tokens)) <= 1e-5


@every
@pytest.mark.parametrize("shard", [None, 20_000])
def test_to_transformers(config, shard, tmp_path):
    model, tokens = ours(config), some_tokens(config, 2, 12)
    save(model, tmp_path / "m", **({"max_shard_bytes": shard} if shard else {}))
    hf, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert hf.dtype == torch.float32 and relative(logits(model, tokens), logits(hf, tokens)) <= 1e-5
    assert_same_weights(load(tmp_path / "m"), model)
    if shard:
        index = json.loads((tmp_path / "m" / INDEX).read_text())
        files = {f: load_file(tmp_path / "m" / f) for f in set(index["weight_map"].values())}
        assert len(files) > 3 and {f.name for f in (tmp_path / "m").iterdir()} == files.keys() | {INDEX, "config.json"}
        assert index["metadata"]["total_size"] == sum(t.nbytes for held in files.values() for t in held.values())
        sizes = [sum(t.nbytes for t in held.values()) for held in files.values()]
        assert all(size <= shard or len(held) == 1 for size, held in zip(sizes, files.values()))


def test_bf16_round_trip(tmp_path):
    model = ours(EXPERTS, torch.bfloat16)
    save(model, tmp_path / "m")
    assert json.loads((tmp_path / "m/config.json").read_text())["dtype"] == "bfloat16"
    assert_same_weights(load(tmp_path / "m"), model)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype == torch.bfloat16


def test_published_names(tmp_path):
    """The exact set of tensors of a dense and of an experts checkpoint."""
    dense, moe = stored(ours(BASE), tmp_path / "d"), stored(ours(EXPERTS), tmp_path / "e")
    assert len(dense) == 3 * 11 + 3 and dense["model.layers.2.self_attn.q_norm.weight"].shape == (16,)
    assert len(moe) == 3 * (11 - 3 + 1 + 3 * 6) + 3 and moe["model.layers.0.mlp.gate.weight"].shape == (6, 48)
    assert moe["model.layers.1.mlp.experts.5.gate_proj.weight"].shape == (24, 48)
    assert moe["model.layers.1.mlp.experts.5.down_proj.weight"].shape == (48, 24)
    assert "lm_head.weight" not in stored(ours(TIED), tmp_path / "t")


# ---- forms -----------------------------------------------------------------------------------------------------------


def test_fused_experts(tmp_path):
    """As a state_dict of transformers 5 holds them; and one layer fused, another one by one."""
    model = ours(EXPERTS)
    write(tmp_path / "f", EXPERTS, model.state_dict())
    assert_same_weights(load(tmp_path / "f"), model)
    single = stored(model, tmp_path / "s")
    mixed = {n: t for n, t in single.items() if ".layers.1.mlp.experts." not in n}
    mixed |= {n: t for n, t in model.state_dict().items() if ".layers.1.mlp.experts." in n}
    write(tmp_path / "x", EXPERTS, mixed)
    assert_same_weights(load(tmp_path / "x"), model)


def test_tied_file_that_stores_the_head(tmp_path):
    """As the published 0.6B and 1.7B: the embedding is the head, whatever the file says."""
    model = ours(TIED)
    write(tmp_path / "m", TIED, model.state_dict() | {"lm_head.weight": torch.full((96, 48), float("nan"))})
    assert_same_weights(load(tmp_path / "m"), model)
    write(tmp_path / "u", BASE, model.state_dict())
    with pytest.raises(ValueError, match="1 tensors missing: lm_head.weight"):
        load(tmp_path / "u")


def test_stored_frequencies_are_ignored(tmp_path):
    model = ours(BASE)
    write(tmp_path / "m", BASE, model.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert_same_weights(load(tmp_path / "m"), model)


@pytest.mark.parametrize("raw, asked, expected", [
    ({"torch_dtype": "bfloat16"}, None, torch.bfloat16), ({"dtype": "float16"}, None, torch.float16),
    ({"dtype": "float32"}, None, torch.float32), ({}, None, torch.float32), ({"dtype": None}, None, torch.float32),
    ({"dtype": "bfloat16"}, torch.float32, torch.float32), ({"dtype": "float32"}, torch.bfloat16, torch.bfloat16),
])  # fmt: skip
def test_dtype(raw, asked, expected, tmp_path):
    """Asked for, else the config's, else the first tensor's; the numbers are those of the file, rounded once."""
    model = ours(BASE)
    write(tmp_path / "m", BASE, model.state_dict(), **raw)
    again = load(tmp_path / "m", dtype=asked)
    assert {p.dtype for p in again.parameters()} == {expected} and again.inv_freq.dtype == torch.float32
    assert_same_weights(again, ours(BASE).to(expected))


def test_dtype_that_is_none(tmp_path):
    write(tmp_path / "m", BASE, ours(BASE).state_dict(), dtype="int8")
    with pytest.raises(ValueError, match="config.json: dtype is 'int8'; expected float32, bfloat16 or float16"):
        load(tmp_path / "m")


def test_numerics_and_device(tmp_path):
    save(ours(BASE), tmp_path / "m")
    assert load(tmp_path / "m", numerics="exact").config == replace(BASE, numerics="exact")
    assert {p.device.type for p in load(tmp_path / "m", device="cpu").parameters()} == {"cpu"}


def test_weights_do_not_depend_on_the_file(tmp_path):
    """They are copied, not mapped: the file may go, or change, and memory is the model's own."""
    save(ours(BASE), tmp_path / "m")
    model = load(tmp_path / "m")
    path = tmp_path / "m" / SINGLE
    with path.open("r+b") as f:
        f.seek(path.stat().st_size // 2)
        f.write(b"\xff" * (path.stat().st_size // 2))
    assert_same_weights(model, ours(BASE))


def test_peak_memory_is_the_model_and_one_tensor(tmp_path, monkeypatch):
    """No tensor of the file is still alive when the next one is read."""
    import weakref

    save(ours(BASE), tmp_path / "m")
    original, alive, seen = module._read, [], []

    def read(*args):
        seen.append(sum(ref() is not None for ref in alive))
        value = original(*args)
        alive.append(weakref.ref(value))
        return value

    monkeypatch.setattr(module, "_read", read)
    load(tmp_path / "m", dtype=torch.bfloat16)
    assert len(seen) == 36 and max(seen) <= 1


# ---- FP8 -------------------------------------------------------------------------------------------------------------


def quantise(w: torch.Tensor, scale_dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(fp8, scale per 128 x 128 block, what they stand for), block by block."""
    rows, columns = w.shape
    quantised, value = torch.empty_like(w, dtype=torch.float8_e4m3fn), torch.empty_like(w)
    scale = torch.empty(-(-rows // 128), -(-columns // 128), dtype=scale_dtype)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale[i, j] = w[at].abs().max() / 448
            quantised[at] = (w[at] / scale[i, j].float()).to(torch.float8_e4m3fn)
            value[at] = quantised[at].float() * scale[i, j].float()
    return quantised, scale, value


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (200, 130), (1, 1), (129, 127)])
def test_dequantise(shape):
    w = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]  # blocks of very different size
    quantised, scale, value = quantise(w)
    assert torch.equal(dequantise(quantised, scale), value)
    stacked = dequantise(torch.stack((quantised, quantised)), torch.stack((scale, scale * 2)))
    assert torch.equal(stacked, torch.stack((value, value * 2)))


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"}
WIDE = replace(BASE, hidden_size=144, intermediate_size=272, num_hidden_layers=1, head_dim=40)
WIDE_EXPERTS = replace(WIDE, num_experts=3, num_experts_per_tok=1, moe_intermediate_size=136)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [WIDE, WIDE_EXPERTS], ids=["dense", "experts"])
def test_fp8_checkpoint(config, scale_dtype, tmp_path):
    """Linear layers in blocks of 128, cut at the edges; head, embedding, norms and router as they are."""
    tensors, expected = stored(ours(config), tmp_path / "plain"), {}
    for name, w in list(tensors.items()):
        expected[name] = w
        if name.endswith("_proj.weight"):
            tensors[name], tensors[name + "_scale_inv"], expected[name] = quantise(w, scale_dtype)
    assert sum(t.dtype == torch.float8_e4m3fn for t in tensors.values()) in (7, 13)
    write(tmp_path / "q", config, tensors, quantization_config=FP8, torch_dtype="bfloat16")
    write(tmp_path / "want", config, expected)
    assert_same_weights(load(tmp_path / "q", dtype=torch.float32), load(tmp_path / "want"))
    assert_same_weights(load(tmp_path / "q"), load(tmp_path / "want", dtype=torch.bfloat16))


def test_fp8_problems_are_named(tmp_path):
    tensors = stored(ours(WIDE), tmp_path / "plain")
    q, k, v, o = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkvo")
    for name in (q, k, v):
        tensors[name], tensors[name + "_scale_inv"], _ = quantise(tensors[name])
    del tensors[q + "_scale_inv"]
    tensors[k + "_scale_inv"] = torch.ones(2, 2)
    tensors[v + "_scale_inv"] = torch.ones(1, 2, dtype=torch.int32)
    tensors[o + "_scale_inv"] = torch.ones(2, 2)
    write(tmp_path / "q", WIDE, tensors)
    with pytest.raises(ValueError) as e:
        load(tmp_path / "q")
    for part in (f"{k}_scale_inv (2, 2), expected (1, 2)", f"{q} F8_E4M3 without {q}_scale_inv",
                 f"{o} F32, expected F8_E4M3 beside {o}_scale_inv", f"{v}_scale_inv I32"):
        assert part in str(e.value)
    tensors = stored(ours(WIDE), tmp_path / "plain2")
    del tensors[q]
    write(tmp_path / "s", WIDE, tensors | {q + "_scale_inv": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"q_proj.weight_scale_inv \(a scale without its weight\)"):
        load(tmp_path / "s")


# ---- checkpoints that do not fit -------------------------------------------------------------------------------------


def test_every_offender_is_named_at_once(tmp_path):
    tensors = stored(ours(BASE), tmp_path / "plain")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.ones(80, 48)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.ones(48, 32)
    tensors["model.layers.2.self_attn.v_proj.weight"] = torch.ones(32, 48, dtype=torch.int64)
    write(tmp_path / "m", BASE, tensors)
    with pytest.raises(ValueError) as e:
        load(tmp_path / "m")
    assert str(e.value) == (
        "the checkpoint does not fit its config: "
        "2 tensors missing: model.layers.1.mlp.up_proj.weight, model.norm.weight; "
        "2 tensors unknown: model.layers.0.self_attn.q_proj.bias, model.layers.3.mlp.up_proj.weight; "
        "1 tensors mis-shaped: model.layers.0.self_attn.k_proj.weight (48, 32), expected (32, 48); "
        "1 tensors of the wrong dtype: model.layers.2.self_attn.v_proj.weight I64"
    )


def test_many_offenders_are_cut_short(tmp_path):
    write(tmp_path / "m", BASE, {"other": torch.ones(1)})
    with pytest.raises(ValueError, match="36 tensors missing: lm_head.weight, .* and 26 more; 1 tensors unknown: o"):
        load(tmp_path / "m")


def test_experts_that_do_not_fit(tmp_path):
    single, fused = stored(ours(EXPERTS), tmp_path / "plain"), ours(EXPERTS).state_dict()
    experts = "model.layers.0.mlp.experts"

    def problem(tensors) -> str:
        write(tmp_path / "m", EXPERTS, tensors)
        with pytest.raises(ValueError) as e:
            load(tmp_path / "m")
        return str(e.value).removeprefix("the checkpoint does not fit its config: ")

    one = f"{experts}.3.up_proj.weight"
    assert problem({n: t for n, t in single.items() if n != one}) == f"1 tensors missing: {one}"
    one = f"{experts}.down_proj"
    assert problem({n: t for n, t in fused.items() if n != one}) == f"1 tensors missing: {one}"
    assert "1 tensors unknown: model.layers.0.mlp.experts.6.up_proj.weight" in problem(
        single | {f"{experts}.6.up_proj.weight": torch.ones(24, 48)})
    assert "expected (6, 48, 48)" in problem(fused | {f"{experts}.gate_up_proj": torch.ones(6, 48, 24)})
    twice = problem(fused | {n: t for n, t in single.items() if f"{experts}.2." in n})
    assert f"{experts}.2.down_proj.weight (its experts are stored twice, fused and one by one)" in twice


def test_no_weights_or_config(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json: no such file"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BASE.to_dict()))
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor model.safetensors.index.json is there"):
        load(tmp_path)


# ---- broken files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated_file(keep, tmp_path):
    save(ours(BASE), tmp_path / "m")
    path = tmp_path / "m" / SINGLE
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="model.safetensors: not a whole safetensors file"):
        load(tmp_path / "m")


@pytest.mark.parametrize("lie", ["size of the header", "offsets", "shape", "beyond the end", "not JSON"])
def test_lying_header(lie, tmp_path):
    save(ours(BASE), tmp_path / "m")
    path = tmp_path / "m" / SINGLE
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    entry = header["model.norm.weight"]
    if lie == "offsets":
        entry["data_offsets"] = header["lm_head.weight"]["data_offsets"]
    elif lie == "shape":
        entry["shape"] = [49]
    elif lie == "beyond the end":
        entry["data_offsets"] = [len(data), len(data) + 48 * 4]
    text = b"{" * 50 if lie == "not JSON" else json.dumps(header).encode()
    length = 2**40 if lie == "size of the header" else len(text)
    path.write_bytes(struct.pack("<Q", length) + text + data)
    with pytest.raises(ValueError, match="model.safetensors: not a whole safetensors file"):
        load(tmp_path / "m")


@pytest.fixture
def sharded(tmp_path):
    """(folder, its index, to be written back by the third)"""
    save(ours(BASE), tmp_path / "m", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    return tmp_path / "m", index, lambda: (tmp_path / "m" / INDEX).write_text(json.dumps(index))


def test_index_names_an_absent_shard(sharded):
    folder, index, _ = sharded
    file = index["weight_map"]["model.norm.weight"]
    (folder / file).unlink()
    with pytest.raises(ValueError, match=f"names shards that are not there: {file}"):
        load(folder)


def test_index_names_an_absent_tensor(sharded):
    folder, index, rewrite = sharded
    index["weight_map"]["model.other"] = file = index["weight_map"]["model.norm.weight"]
    rewrite()
    with pytest.raises(ValueError, match=f"names tensors that their shard does not hold: model.other in {file}"):
        load(folder)


def test_index_leaves_out_a_tensor(sharded):
    folder, index, rewrite = sharded
    file = index["weight_map"].pop("model.norm.weight")
    rewrite()
    with pytest.raises(ValueError, match=f"leaves out tensors that the shards hold: model.norm.weight in {file}"):
        load(folder)


def test_index_names_the_wrong_shard(sharded):
    folder, index, rewrite = sharded
    index["weight_map"]["model.norm.weight"] = file = index["weight_map"]["model.embed_tokens.weight"]
    rewrite()
    with pytest.raises(ValueError, match=f"their shard does not hold: model.norm.weight in {file}"):
        load(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", *('{"weight_map": %s}' % m for m in ("[]", '{"a": 3}', "null"))])
def test_index_that_is_none(sharded, content):
    folder = sharded[0]
    (folder / INDEX).write_text(content)
    with pytest.raises(ValueError, match="index.json: not an index; expected JSON with a weight_map"):
        load(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_index_does_not_leave_the_folder(sharded, name):
    folder, index, rewrite = sharded
    index["weight_map"]["model.norm.weight"] = name
    rewrite()
    with pytest.raises(ValueError, match="expected plain file names in the same folder"):
        load(folder)


# ---- saving ----------------------------------------------------------------------------------------------------------


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("failing", ["save_file", "_write_json", "_put_in_place"])
@pytest.mark.parametrize("existing", [True, False])
def test_failing_save_leaves_what_was_there(failing, existing, tmp_path, monkeypatch):
    """The disk is full at the second shard, at the index, or at the end."""
    if existing:
        save(ours(BASE), tmp_path / "m", max_shard_bytes=20_000)
        (tmp_path / "m/notes.txt").write_text("mine")
    before, original, calls = contents(tmp_path), getattr(module, failing), []

    def fail(*args, **kwargs):
        calls.append(args)
        if failing == "save_file" and len(calls) == 1:
            return original(*args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        save(ours(TIED), tmp_path / "m", max_shard_bytes=20_000)
    assert calls and contents(tmp_path) == before and len(list(tmp_path.iterdir())) == existing


@pytest.mark.parametrize("call", [1, 2])
def test_failing_rename_puts_the_old_folder_back(call, tmp_path, monkeypatch):
    save(ours(BASE), tmp_path / "m")
    before, original, calls = contents(tmp_path), os.rename, []

    def rename(*args):
        calls.append(args)
        if len(calls) == call:
            raise OSError(5, "Input/output error")
        return original(*args)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"):
        save(ours(TIED), tmp_path / "m")
    assert contents(tmp_path) == before


def test_saving_replaces_weights_and_keeps_other_files(tmp_path):
    """Shards of the old checkpoint go, or the new one would be read with them."""
    folder = tmp_path / "deep" / "er" / "m"
    save(ours(BASE), folder, max_shard_bytes=20_000)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "logs").mkdir()
    (folder / "logs/a").write_text("x")
    save(ours(TIED), folder)
    names = {"config.json", SINGLE, "tokenizer.json", "logs"}
    assert {f.name for f in folder.iterdir()} == names and (folder / "logs/a").read_text() == "x"
    assert_same_weights(load(folder), ours(TIED))
    save(ours(BASE), folder, max_shard_bytes=20_000)
    assert not (folder / SINGLE).exists() and (folder / INDEX).exists()
    assert_same_weights(load(folder), ours(BASE))
    assert [p.name for p in folder.parent.iterdir()] == ["m"]


def test_saving_over_a_symlink_and_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(ours(BASE), "real")
    (tmp_path / "link").symlink_to("real")
    save(ours(TIED), "link")
    assert (tmp_path / "link").is_symlink() and load("real").config == TIED


def test_bad_save_arguments(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file; expected a folder or a name that is free"):
        save(ours(BASE), tmp_path / "file")
    with pytest.raises(ValueError, match="max_shard_bytes is 0; expected a positive number"):
        save(ours(BASE), tmp_path / "m", max_shard_bytes=0)
    assert contents(tmp_path) == {"file": b"mine"}


def test_one_tensor_per_shard(tmp_path):
    save(ours(BASE), tmp_path / "m", max_shard_bytes=1)
    assert len(list((tmp_path / "m").glob("model-*-of-00036.safetensors"))) == 36
    assert_same_weights(load(tmp_path / "m"), ours(BASE))
