"""Checkpoints: safetensors as published (one file or shards, per-expert or fused experts, FP8) in, the same out.

The FP8 form is that of the Qwen3-*-FP8 checkpoints: X in float8_e4m3fn beside X_scale_inv, one scale per 128 x 128 block.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import Qwen3Config
from .model import Qwen3
from .moe import MoE

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BLOCK = 128

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # stored by old versions of transformers; always recomputed
_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


def load(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, numerics: str = "fast"
) -> Qwen3:
    """The model in a folder with `config.json` and safetensors, in evaluation mode.

    Args:
        device, dtype: where and in what to hold the weights, which are read straight there: peak memory is the model
            and one tensor. Default dtype: the config's, else that of the first tensor.
        numerics: "fast" or "exact", see `Qwen3Config`.

    A tied model's stored `lm_head.weight` is left unread: the embedding is the head.

    Raises:
        FileNotFoundError: no config.json or no weights.
        ValueError: an unreadable or truncated file; an index that disagrees with its shards; tensors that are missing,
            unknown, of another shape or not floating point. Every offender is named, before any weight is read.
    """
    path = Path(path)
    config = Qwen3Config.from_file(path, numerics=numerics)
    with ExitStack() as stack:
        source = _open(path, stack)
        with torch.device("meta"):
            model = Qwen3(config)
        _check(config, source, _parts(model))
        dtype = dtype or _config_dtype(path) or _first_dtype(source)
        model = model.to(dtype).to_empty(device=device)
        with torch.no_grad():
            for name, part in _parts(model).items():
                if name in source:
                    part.copy_(_read(source, name, part.device))
    return model.eval()


def save(model: Qwen3, path: str | Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Writes `config.json` and the weights, experts one by one, as transformers and serving engines read them.

    The folder appears at once, by renaming a complete one into its place; an older checkpoint there is replaced and
    other files in it are kept. Shards hold up to `max_shard_bytes` (one tensor at least).

    Raises ValueError: max_shard_bytes below 1, or `path` is a file.
    """
    path = Path(path).resolve()
    if max_shard_bytes < 1:
        raise ValueError(f"save: max_shard_bytes is {max_shard_bytes}; expected a positive number")
    if path.exists() and not path.is_dir():
        raise ValueError(f"save: {path} is a file; expected a folder or a name that is free")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write(model, temporary, max_shard_bytes)
        _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- names -------------------------------------------------------------------------------------------------------------


def _parts(model: Qwen3) -> dict[str, Tensor]:
    """Every tensor a checkpoint may hold by name, as (views of) the parameters: experts both fused and one by one."""
    parts = {name: p.data for name, p in model.named_parameters()}
    for prefix, module in model.named_modules():
        if isinstance(module, MoE):
            for e in range(module.E):
                gate, up = module.experts.gate_up_proj.data[e].chunk(2)
                named = {"gate_proj": gate, "up_proj": up, "down_proj": module.experts.down_proj.data[e]}
                parts |= {f"{prefix}.experts.{e}.{name}.weight": part for name, part in named.items()}
    return parts


def _is_fused(name: str) -> bool:
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


_ONE_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(gate|up|down)_proj\.weight")


def _fused_name(name: str) -> str | None:
    """The fused tensor that a single expert's tensor is a part of; None for other names."""
    match = _ONE_EXPERT.fullmatch(name)
    return match and f"{match[1]}.{'down_proj' if match[2] == 'down' else 'gate_up_proj'}"


# ---- reading -----------------------------------------------------------------------------------------------------------


def _open(path: Path, stack: ExitStack) -> dict[str, Any]:
    """{tensor name: the open, memory-mapped file that holds it}"""
    if (path / SINGLE).is_file():
        return dict.fromkeys((handle := _open_file(path / SINGLE, stack)).keys(), handle)
    if not (path / INDEX).is_file():
        raise FileNotFoundError(f"{path}: neither {SINGLE} nor {INDEX} is there")
    try:
        weight_map = json.loads((path / INDEX).read_text("utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
        plain = all(Path(f).name == f for f in files)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path / INDEX}: not an index; expected JSON with a weight_map of names to files ({e!r})") from e
    if not plain:
        raise ValueError(f"{path / INDEX}: the weight_map names {files}; expected plain file names in the same folder")
    absent = [f for f in files if not (path / f).is_file()]
    if absent:
        raise ValueError(f"{path / INDEX}: names shards that are not there: {_some(absent)}")
    handles = {f: _open_file(path / f, stack) for f in files}
    held = {f: set(handle.keys()) for f, handle in handles.items()}
    lies = [f"{name} in {f}" for name, f in weight_map.items() if name not in held[f]]
    if lies:
        raise ValueError(f"{path / INDEX}: names tensors that their shard does not hold: {_some(lies)}")
    unlisted = [f"{name} in {f}" for f, names in held.items() for name in names if weight_map.get(name) != f]
    if unlisted:
        raise ValueError(f"{path / INDEX}: leaves out tensors that the shards hold: {_some(unlisted)}")
    return {name: handles[f] for name, f in weight_map.items()}


def _open_file(file: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(file, framework="pt"))
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file}: not a whole safetensors file: {e}") from e


def _check(config: Qwen3Config, source: dict[str, Any], parts: dict[str, Tensor]) -> None:
    """Compares names, shapes and dtypes in the files' headers with the model (on meta)."""
    problems: dict[str, list[str]] = {"missing": [], "unknown": [], "mis-shaped": [], "of the wrong dtype": []}
    scales = {name + "_scale_inv" for name in parts} & source.keys()
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    problems["unknown"] = [n for n in source if n not in parts.keys() | scales | optional and not _IGNORED.search(n)]
    split = {_fused_name(name) for name in source}  # stored expert by expert, at least in part
    for name, part in parts.items():
        if name in source:
            if name in split or (fused := _fused_name(name)) and fused in source:
                problems["unknown"].append(f"{name} (its experts are stored twice, fused and one by one)")
            _check_tensor(name, part, source, problems)
        elif (name not in split) if _is_fused(name) else (_fused_name(name) is None or _fused_name(name) in split):
            problems["missing"].append(name)
    for name in sorted(scales):
        if name.removesuffix("_scale_inv") not in source:
            problems["unknown"].append(f"{name} (a scale without its weight)")
    found = [f"{len(names)} tensors {kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError("the checkpoint does not fit its config: " + "; ".join(found))


def _check_tensor(name: str, part: Tensor, source: dict[str, Any], problems: dict[str, list[str]]) -> None:
    view = source[name].get_slice(name)
    shape, kind, scale = tuple(view.get_shape()), view.get_dtype(), name + "_scale_inv"
    if shape != tuple(part.shape):
        problems["mis-shaped"].append(f"{name} {shape}, expected {tuple(part.shape)}")
    if scale not in source:
        if kind not in _FLOATS:
            why = " without " + scale if kind.startswith("F8") else ""
            problems["of the wrong dtype"].append(f"{name} {kind}{why}")
        return
    if kind != "F8_E4M3":
        problems["of the wrong dtype"].append(f"{name} {kind}, expected F8_E4M3 beside {scale}")
    view = source[scale].get_slice(scale)
    blocks = (*shape[:-2], *(-(-n // BLOCK) for n in shape[-2:]))
    if tuple(view.get_shape()) != blocks:
        problems["mis-shaped"].append(f"{scale} {tuple(view.get_shape())}, expected {blocks}")
    if view.get_dtype() not in _FLOATS:
        problems["of the wrong dtype"].append(f"{scale} {view.get_dtype()}")


def _read(source: dict[str, Any], name: str, device: torch.device) -> Tensor:
    value = source[name].get_tensor(name)
    scale = name + "_scale_inv"
    if scale not in source:
        return value
    return dequantise(value.to(device), source[scale].get_tensor(scale).to(device))


def dequantise(weight: Tensor, scale: Tensor) -> Tensor:
    """float8 [..., out, in] times one scale per 128 x 128 block [..., ceil(out/128), ceil(in/128)], in float32. Blocks at
    the edges may be cut. The stored `scale_inv` is multiplied, despite its name."""
    rows, columns = weight.shape[-2:]
    scale = scale.float().repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :columns]
    return weight.float() * scale


def _config_dtype(path: Path) -> torch.dtype | None:
    raw = json.loads((path / "config.json").read_text("utf-8"))
    name = raw.get("dtype", raw.get("torch_dtype"))
    if name is None:
        return None
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if dtype not in _FLOATS.values():
        raise ValueError(f"{path / 'config.json'}: dtype is {name!r}; expected float32, bfloat16 or float16")
    return dtype


def _first_dtype(source: dict[str, Any]) -> torch.dtype:
    return _FLOATS[source["model.norm.weight"].get_slice("model.norm.weight").get_dtype()]


def _some(names: list[str], shown: int = 10) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(sorted(names)[:shown]) + more


# ---- writing -----------------------------------------------------------------------------------------------------------


def _stored(model: Qwen3) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint, in the model's order, experts one by one."""
    parts = _parts(model)
    single: dict[str, list[str]] = {}
    for name in parts:
        if fused := _fused_name(name):
            single.setdefault(fused, []).append(name)
    for name in dict(model.named_parameters()):
        for stored in single.get(name, [name]):
            yield stored, parts[stored]


def _write(model: Qwen3, folder: Path, max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in _stored(model):
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    weight_map, total = {}, 0
    for i, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: t.cpu().contiguous() for n, t in shard.items()}, folder / file, metadata={"format": "pt"})
        _sync(folder / file)
        weight_map |= dict.fromkeys(shard, file)
        total += sum(t.nbytes for t in shard.values())
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    dtype = str(model.head_weight.dtype).removeprefix("torch.")
    _write_json(folder / "config.json", {**model.config.to_dict(), "dtype": dtype})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
    _sync(file)


def _sync(file: Path) -> None:
    """A rename is only atomic across a power cut when what it names is on disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(new: Path, path: Path) -> None:
    """Renames `new` to `path`. Two renames when `path` exists: a crash between them leaves no folder rather than a mix
    of old and new weights. When the second one fails, the first is undone."""
    _sync(new)
    if path.exists():
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        os.rename(path, old)
        try:
            os.rename(new, path)
        except OSError:
            os.rename(old, path)
            raise
        for entry in old.iterdir():
            if not _SHARD.fullmatch(entry.name) and entry.name not in (INDEX, "config.json"):
                os.rename(entry, path / entry.name)
        shutil.rmtree(old)
    else:
        os.rename(new, path)
    _sync(path.parent)
