"""Attention of a few new tokens over a paged KV cache, and the write of their keys and values into it. Inference only.

Sources: Kwon et al. 2023 (arXiv 2309.06180) for pages; Dao et al. 2023, "Flash-Decoding for long-context inference",
for splitting the keys; Micikevicius et al. 2022 (arXiv 2209.05433) for the 8-bit format e4m3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ._check import floating, require, same_device, same_dtype

FP8 = torch.float8_e4m3fn
MAX_QUERIES = 8  # of a row in one call: one new token, or the few that speculation proposes


def paged_attention_ref(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, *, scale: float | None = None,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain torch over gathered pages, with the whole score matrix, in fp32 (fp64 for fp64 queries). Arguments as
    ``paged_attention``."""
    B, Tq, Hq, D = q.shape
    scale = D**-0.5 if scale is None else scale
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    at = torch.arange(page_table.shape[1] * k_pages.shape[1], device=q.device)
    filled = at < lengths.unsqueeze(1)
    kh, vh = (
        _gathered(pages, page_table, filled, s, wide).repeat_interleave(Hq // pages.shape[2], 1)
        for pages, s in ((k_pages, k_scale), (v_pages, v_scale))
    )
    last = lengths.view(-1, 1, 1) - Tq + torch.arange(Tq, device=q.device).view(1, -1, 1)
    scores = q.transpose(1, 2).to(wide) @ kh.mT * scale
    scores = scores.masked_fill(~(filled.unsqueeze(1) & (at <= last)).unsqueeze(1), float("-inf"))
    lse = torch.logsumexp(scores, -1)
    probs = (scores - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)).exp()
    out = (probs @ vh).transpose(1, 2).to(q.dtype)
    return (out, lse.transpose(1, 2)) if return_lse else out


def _gathered(pages: Tensor, page_table: Tensor, filled: Tensor, scale: Tensor | None, wide: torch.dtype) -> Tensor:
    """[B, Hk, max_pages * page_size, D] in ``wide``; 0 in slots that are not filled, whatever lies there."""
    held = pages.shape[1] * torch.arange(page_table.shape[1], device=pages.device) < filled.sum(1, keepdim=True)
    table = page_table.masked_fill(~held, 0).long()
    # torch does not index 8-bit floats.
    rows = pages.view(torch.uint8)[table].view(FP8) if pages.dtype == FP8 else pages[table]
    rows = rows.flatten(1, 2).to(wide).masked_fill(~filled[:, :, None, None], 0.0)
    return (rows if scale is None else rows * scale.to(wide).unsqueeze(-1)).transpose(1, 2)


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, *, scale: float | None = None,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each row's last tokens over keys and values that lie in pages.

    Args:
        q: [B, Tq, Hq, D] with Tq from 1 to 8, float32, bfloat16 or float16: the queries of the positions
            lengths[b] - Tq to lengths[b] - 1 of row b, causal among them.
        k_pages, v_pages: [P, page_size, Hk, D], Hq a multiple of Hk, in q's dtype or float8_e4m3fn. Views with any
            strides but for D, such as a layer's part of a larger pool. Rows may share pages.
        page_table: [B, max_pages] int32. Position i of row b lies in slot i % page_size of page
            page_table[b, i // page_size]. Entries and slots beyond a row's length are never read.
        lengths: [B] int32, tokens of each row with the new ones, which are written already (``paged_write``).
        scale: multiplies the scores; default D**-0.5.
        k_scale, v_scale: [Hk] float32, given if and only if the pages are float8_e4m3fn: what their numbers are
            multiplied by.
        return_lse: also return the log-sum-exp of the scaled scores.

    Returns:
        out, q's shape and dtype; with ``return_lse`` the pair (out, lse float32 [B, Tq, Hq]). A query that sees no key
        (length 0, or the first of more queries than tokens) gives 0 (lse -inf).

    The keys are cut into splits of a fixed number, whose partial results are summed in a fixed order: on a GPU, a row's
    bits depend neither on the other rows nor on max_pages nor on which pages it lies in. Nothing waits for the host and
    all sizes follow from shapes, so a CUDA graph may be replayed with other lengths and tables.

    Bytes: keys and values up to the longest of each row's lengths once, lengths.sum() * 2 * Hk * D numbers. Beside the
    output, scratch of B * Tq * Hq * (D + 2) float32 for every split of max_pages * page_size keys.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; the message names the argument.
        IndexError: on the CPU, a length beyond the page table, or one of its used entries outside the pages. On CUDA
            that would need a sync: the caller sees to it.
        RuntimeError: an input requires grad while gradients are on.
    """
    op = "paged_attention"
    floating(op, q=q)
    require(q.dim() == 4 and q.shape[-1] > 0, op, "q", tuple(q.shape), "[B, Tq, Hq, D]")
    require(1 <= q.shape[1] <= MAX_QUERIES, op, "q", tuple(q.shape), f"1 to {MAX_QUERIES} queries a row")
    _check_pages(op, "q", q, k_pages, v_pages, page_table, k_scale, v_scale)
    require(q.shape[2] % k_pages.shape[2] == 0, op, "q", tuple(q.shape),
            f"a number of heads that is a multiple of k_pages' {k_pages.shape[2]}")
    _check_integers(op, q, "lengths", lengths, (q.shape[0],))
    _no_grad(op, q=q, k_pages=k_pages, v_pages=v_pages)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out, lse = _forward(
        q, k_pages, v_pages, page_table, lengths, k_scale, v_scale, scale, backend_for(q, k_pages)
    )
    return (out, lse) if return_lse else out


def paged_write_ref(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, positions: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:
    """Plain torch (with a host sync, to find the tokens that are left out). Arguments as ``paged_write``."""
    rows, tokens = (positions >= 0).nonzero(as_tuple=True)
    at = positions[rows, tokens].long()
    page, slot = page_table[rows, at // k_pages.shape[1]].long(), at % k_pages.shape[1]
    for new, pages, scale in ((k, k_pages, k_scale), (v, v_pages, v_scale)):
        new = new[rows, tokens]
        if pages.dtype == FP8:
            top = torch.finfo(FP8).max  # beyond it the cast gives NaN
            new = (new.float() / scale.unsqueeze(-1)).clamp(-top, top).to(FP8).view(torch.uint8)
            pages = pages.view(torch.uint8)
        pages[page, slot] = new


def paged_write(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, positions: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:
    """Writes the keys and values of new tokens into the pages, in place.

    Args:
        k, v: [B, T, Hk, D], float32, bfloat16 or float16; views with token and head strides are fine.
        k_pages, v_pages, page_table: as for ``paged_attention``.
        positions: [B, T] int32, the position of each token in its row; negative for one that is left out. No two tokens
            may have the same place: which of them would stay is not defined.
        k_scale, v_scale: [Hk] float32, positive, given if and only if the pages are float8_e4m3fn: what is stored is
            k / k_scale rounded to nearest even, at most 448 in size; NaN stays NaN.

    Raises: as ``paged_attention``.
    """
    op = "paged_write"
    floating(op, k=k)
    require(k.dim() == 4 and k.shape[-1] > 0, op, "k", tuple(k.shape), "[B, T, Hk, D]")
    require(v.shape == k.shape, op, "v", tuple(v.shape), f"k's shape {tuple(k.shape)}")
    same_device(op, k, v=v)
    same_dtype(op, k, v=v)
    _check_pages(op, "k", k, k_pages, v_pages, page_table, k_scale, v_scale)
    require(k.shape[2] == k_pages.shape[2], op, "k", tuple(k.shape), f"k_pages' {k_pages.shape[2]} heads")
    _check_integers(op, k, "positions", positions, tuple(k.shape[:2]))
    _no_grad(op, k=k, v=v)
    _write(k, v, k_pages, v_pages, page_table, positions, k_scale, v_scale, backend_for(k, k_pages))


def _check_pages(
    op: str, first: str, like: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """What both ops ask of the cache; ``like`` [B, T, H, D] is their first argument, of that name."""
    require(k_pages.dim() == 4 and k_pages.numel() > 0, op, "k_pages", tuple(k_pages.shape),
            "[P, page_size, Hk, D], at least one page and slot")
    require(v_pages.shape == k_pages.shape, op, "v_pages", tuple(v_pages.shape),
            f"k_pages' shape {tuple(k_pages.shape)}")
    require(k_pages.shape[-1] == like.shape[-1], op, "k_pages", tuple(k_pages.shape),
            f"{first}'s head dimension {like.shape[-1]}")
    same_device(op, like, k_pages=k_pages, v_pages=v_pages, k_scale=k_scale, v_scale=v_scale)
    if k_pages.dtype not in (like.dtype, FP8):
        raise TypeError(f"{op}: k_pages is {k_pages.dtype}; expected {first}'s {like.dtype}, or {FP8}")
    if v_pages.dtype != k_pages.dtype:
        raise TypeError(f"{op}: v_pages is {v_pages.dtype}; expected k_pages' {k_pages.dtype}")
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):  # a copy would be of the whole cache
        require(pages.stride(-1) == 1, op, name, f"of strides {pages.stride()}", "a last stride of 1")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if k_pages.dtype != FP8:
            require(scale is None, op, name, "given", f"None with pages of {k_pages.dtype}")
            continue
        require(scale is not None, op, name, None, f"a scale for each key head with pages of {FP8}")
        require(scale.shape == (k_pages.shape[2],), op, name, tuple(scale.shape), f"({k_pages.shape[2]},)")
        if scale.dtype != torch.float32:
            raise TypeError(f"{op}: {name} is {scale.dtype}; expected torch.float32")
    require(page_table.dim() == 2 and page_table.shape[1] > 0, op, "page_table", tuple(page_table.shape),
            "[B, max_pages], at least one entry a row")
    _check_integers(op, like, "page_table", page_table, (like.shape[0], page_table.shape[1]))


def _check_integers(op: str, like: Tensor, name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    require(t.shape == shape, op, name, tuple(t.shape), str(shape))
    same_device(op, like, **{name: t})
    if t.dtype != torch.int32:
        raise TypeError(f"{op}: {name} is {t.dtype}; expected torch.int32")


def _no_grad(op: str, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        if torch.is_grad_enabled() and t.requires_grad:
            raise RuntimeError(f"{op}: {name} requires grad; no gradient flows through a cache, use torch.no_grad()")


def _check_places(op: str, name: str, lengths: Tensor, page_table: Tensor, k_pages: Tensor) -> None:
    """On the CPU: every row's table has pages for its length, and they exist."""
    P, page_size = k_pages.shape[:2]
    room = page_table.shape[1] * page_size
    if (lengths > room).any():
        raise IndexError(f"{op}: {name} asks for {lengths.max().item()} slots; the page table has {room} a row")
    used = page_size * torch.arange(page_table.shape[1]) < lengths.unsqueeze(1)
    wrong = page_table[used & ((page_table < 0) | (page_table >= P))]
    if len(wrong):
        raise IndexError(f"{op}: page_table holds {wrong[0].item()} where it is used; expected 0 to {P - 1}")


def backend_for(q: Tensor, k_pages: Tensor) -> str:
    backend = dispatch.resolve("paged_attention", q.device.type, q.dtype)
    fits = q.shape[-1] <= 256 and (k_pages.dtype != FP8 or _casts_fp8(q.device.type))
    return backend if fits else "torch"


def _casts_fp8(device: str) -> bool:
    """Triton compiles e4m3 from Ada on; its interpreter has it, too."""
    return device != "cuda" or torch.cuda.get_device_capability() >= (8, 9)


_casts_fp8._dynamo_marked_constant = True


@torch.library.custom_op("qwen3::paged_attention", mutates_args=())
def _forward(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, k_scale: Tensor | None,
    v_scale: Tensor | None, scale: float, backend: str,
) -> tuple[Tensor, Tensor]:
    """(out like q, contiguous; lse float32 [B, Tq, Hq])."""
    if q.device.type == "cpu":
        _check_places("paged_attention", "lengths", lengths, page_table, k_pages)
    if q.numel() == 0:
        return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)
    if backend == "torch":
        out, lse = paged_attention_ref(
            q, k_pages, v_pages, page_table, lengths, scale=scale, k_scale=k_scale, v_scale=v_scale, return_lse=True
        )
        return out.contiguous(), lse.float().contiguous()
    return dispatch.backend("paged_attention", backend).forward(
        q, k_pages, v_pages, page_table, lengths, k_scale, v_scale, scale
    )


@_forward.register_fake
def _(q, k_pages, v_pages, page_table, lengths, k_scale, v_scale, scale, backend):
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("qwen3::paged_write", mutates_args=("k_pages", "v_pages"))
def _write(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, positions: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None, backend: str,
) -> None:
    if k.numel() == 0:
        return
    if k.device.type == "cpu":
        _check_written(positions, page_table, k_pages)
    write = paged_write_ref if backend == "torch" else dispatch.backend("paged_attention", backend).write
    write(k, v, k_pages, v_pages, page_table, positions, k_scale, v_scale)


@_write.register_fake
def _(k, v, k_pages, v_pages, page_table, positions, k_scale, v_scale, backend):
    return None


def _check_written(positions: Tensor, page_table: Tensor, k_pages: Tensor) -> None:
    """On the CPU: the pages that are written to exist; those before them need not be there."""
    P, page_size = k_pages.shape[:2]
    room = page_table.shape[1] * page_size
    if (positions >= room).any():
        most = positions.max().item()
        raise IndexError(f"paged_write: positions holds {most}; the page table has {room} slots a row")
    page = page_table.gather(1, (positions.clamp(min=0) // page_size).long())
    wrong = page[(positions >= 0) & ((page < 0) | (page >= P))]
    if len(wrong):
        raise IndexError(f"paged_write: page_table holds {wrong[0].item()} where it is used; expected 0 to {P - 1}")
