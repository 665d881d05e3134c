"""A trained model as a folder that transformers loads, and what transformers makes of it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen3_model import load
from qwen3_model.model import Qwen3
from qwen3_model.tokenizer import Tokenizer

from ..data.shards import TokenShards

LOGIT_TOLERANCE = 1e-4  # of the largest logit, float32 on both sides
TEXTS = ("def ", "class ", "    \"\"\"Return ", "for i in range(", "caf\u00e9 <think>12 x 3</think>\n\n\tend")


def export(model: Qwen3, tokenizer_file: Path, folder: Path, *, end: str = "<|endoftext|>") -> None:
    """Config, weights and tokenizer. ``end``: the token that ends a text, or for a chat model a reply."""
    load.save(model, folder)
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": "<|endoftext|>",
        "model_max_length": model.config.max_position_embeddings, "clean_up_tokenization_spaces": False,
    }, indent=1))


def compare_with_transformers(folder: Path, data: Sequence[TokenShards], rows: int = 4) -> dict[str, Any]:
    """Logits of the longest documents of ``data`` and token ids of TEXTS from our code and from transformers, float32 on the
    CPU. RuntimeError where they differ."""
    if importlib.util.find_spec("transformers") is None:
        return {"checked": False, "text": "transformers is not installed, so nothing was compared (pip install transformers)"}
    import transformers

    ours = load.load(folder, dtype=torch.float32)
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    transformers.utils.logging.enable_progress_bar()
    length = ours.config.max_position_embeddings
    longest = sorted(((int(n), s, d) for s, part in enumerate(data) for d, n in enumerate(part.lengths)), reverse=True)[:rows]
    documents = [data[s].read(d)[:length] for _, s, d in longest]
    tokens = torch.from_numpy(np.stack([d[: min(map(len, documents))] for d in documents]))
    with torch.no_grad():
        a, b = ours(tokens), theirs(tokens).logits
    difference, largest = (a - b).abs().max().item(), b.abs().max().item()
    same_ids = all(
        Tokenizer.from_file(folder / "tokenizer.json").encode(text)
        == transformers.AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
        for text in TEXTS
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
