"""scaled_dot_product_attention on CUDA: which kernel, which tile, which strides.

fp32 is `attention_chains.py`, the bits of the CPU reference; bf16 and fp16 are
`attention_blocks.py`, on the matrix units, and on Hopper what `attention_ring.py` launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton

from batch_invariant.backend import Kernel
from batch_invariant.errors import OpNotSupported
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.attention import check_attention
from batch_invariant.ops.contract import FLOATS
from batch_invariant.order import chunked, serial, undeclared
from batch_invariant_cuda.attention_blocks import (
    INSIDE,
    MARK,
    NOBODY,
    attention_blocks,
    mend,
)
from batch_invariant_cuda.attention_chains import (
    ADDITIVE_MASK,
    BOOL_MASK,
    KEY_BLOCK,
    NO_MASK,
    attention_chains,
    size_chunks,
)
from batch_invariant_cuda.attention_merge import BLOCK, EXTRA, combine
from batch_invariant_cuda.attention_plan import empty_plan, plan_rows, prepare_mask
from batch_invariant_cuda.attention_ring import (
    few_rows,
    many_rows,
    marks,
    takes_few,
    takes_many,
)
from batch_invariant_cuda.matmul import PROVED, capability
from batch_invariant_cuda.row_launch import Calls, kind_of, multiprocessors

Pair = tuple[torch.Tensor, torch.Tensor]
# A call again, with the addresses of q, k, v, out, lse.
Again = Callable[[int, int, int, int, int], None]

_WIDEST = 256  # head size whose tiles still fit
_LONG = 16  # blocks of keys


def _four(x: torch.Tensor) -> torch.Tensor:
    """[batch, heads, rows, columns] of a tensor of any rank from 2."""
    if x.dim() == 4:
        return x
    return x[(None,) * (4 - x.dim())] if x.dim() < 4 else x.flatten(0, -4)


def refusal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> str | None:
    """Why these kernels refuse a call; None if they do not."""
    if query.dtype not in FLOATS:
        return (
            f"attention on CUDA takes float32, bfloat16 and float16; got {query.dtype}; "
            "cast to float32, or compute on the CPU"
        )
    widest = max(query.size(-1), value.size(-1))
    if widest > _WIDEST:
        return f"attention on CUDA takes head sizes up to {_WIDEST}; got {widest}"
    return None


def _chains(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    is_causal: bool,
    factor: float,
) -> None:
    batch, heads, rows, size = q.shape
    keys, v_size = v.shape[2:]
    kind, first, strides, firsts = NO_MASK, None, (0, 0, 0, 0), (0, 0, 0)
    if mask is not None:
        kind = BOOL_MASK if mask.dtype == torch.bool else ADDITIVE_MASK
        mask = mask.view(torch.uint8) if kind == BOOL_MASK else mask
        first, _ = _first_keys(mask.expand(-1, -1, rows, keys), None, False)
        strides = mask.expand(batch, heads, rows, keys).stride()
        firsts = first.expand(batch, heads, -1).stride()
    block, at_once, warps = tile_of_chains(rows, max(size, v_size), mask is not None, q.device)
    blocks = -(-rows // block)
    attention_chains(
        batch * heads * blocks,
        (q, k, v, mask, first, out, lse),
        (
            heads, heads // max(k.size(1), 1), rows, keys, size, v_size, max(blocks, 1),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides, *firsts, factor,
        ),
        (block, at_once, size_chunks(size), padded_size(v_size), kind, is_causal),
        warps,
    )  # fmt: skip


def padded_size(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


class Tile(NamedTuple):
    """Rows that one program computes, its warps, and the stages of its pipeline."""

    rows: int
    warps: int
    stages: int


def tile(rows: int, keys: int, widest: int, device: torch.device) -> Tile:
    """The tile for so many rows that share keys.

    Any gives the same bits where the matrix units do so; on other GPUs there is one for each size.
    """
    if device.type == "cuda" and capability(device) != PROVED:
        return Tile(64, 4, 1) if widest <= 128 else Tile(16, 4, 1)
    stages = 2 if widest <= 128 and keys > BLOCK else 1
    if rows <= 16:
        return Tile(16, 4, stages)
    if widest > 128:
        return Tile(64, 8, stages)
    return Tile(64, 4, 1) if rows <= 64 or keys <= 512 else Tile(128, 8, stages)


def tile_of_chains(
    rows: int, widest: int, masked: bool, device: torch.device
) -> tuple[int, int, int]:
    """Rows and keys of a tile in fp32, and its warps: the fastest of nine on an H200 that fits.

    A tile in which a block of keys ends is added in two parts. Under a mask, where blocks end
    anywhere, tiles of few rows are short for that.
    """
    if widest > 128:
        return 16, 16, 4
    if rows > 16:
        return 32, 32, 4
    room = device.type == "cuda" and capability(device) in ((8, 0), (9, 0), (10, 0))
    return 16, 64 if room and not masked else 16, 4


def run_of(tiles: int, blocks: int, processors: int) -> int:
    """Blocks of keys that one program computes of its tile; it changes no bit."""
    return -(-blocks // max(1, min(blocks, 2 * processors // max(tiles, 1))))


def goes_alone(tiles: int, size: int, blocks: int, processors: int) -> bool:
    """Whether tiles of few rows, a multiprocessor for each, are faster than in runs.

    Each then has all buffers of its multiprocessor, and leaves no parts in memory. The shares of
    the multiprocessors are where both took equally long on an H200.
    """
    least = 0.42 if size == 128 and blocks >= _LONG else 0.6
    return least * processors <= tiles <= processors and blocks > 1


def _parts(q: torch.Tensor, blocks: int, v_size: int) -> torch.Tensor:
    """Room for weighted sum, maximum and sum of each row over each block of keys."""
    shape = (*q.shape[:3], blocks, padded_size(v_size) + EXTRA)
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _combine(
    parts: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    is_causal: bool,
    first: int = 0,
) -> Callable[..., None] | None:
    """The rows from their parts; and how to do it again, with the addresses of the tensors.

    first: the block whose part holds those before it too.
    """
    if parts is None:
        return None
    heads, rows, blocks = parts.shape[1:4]
    v_size = out.size(3)
    depth = padded_size(v_size)
    width = min(depth, 32)
    launch = (
        lse.numel() * (depth // width), (parts, out, lse), (heads, rows, blocks, first, v_size),
        (width, depth // width, 4 if blocks <= 4 else 32, is_causal), 1,
    )  # fmt: skip
    combine(*launch)
    return combine.repeat(*launch)


def _few(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    factor: float,
) -> Again | None:
    """A few rows that attend to all keys, on Hopper."""
    blocks = -(-k.size(2) // BLOCK)
    tiles, processors = q.size(0) * k.size(1), multiprocessors(q.device.index)
    alone = goes_alone(tiles, q.size(3), blocks, processors)
    run = blocks if alone else run_of(tiles, blocks, processors)
    parts = _parts(q, blocks, v.size(3)) if run < blocks else None
    start = few_rows(q, k, v, out, lse, parts, run, alone, factor)
    fold = _combine(parts, out, lse, False, run - 1)
    if start is None:
        return None

    def begin(q: int, k: int, v: int, out: int, lse: int, parts: int | None, odd: None) -> None:
        start(k, v, q, out, lse, *(() if alone else (parts,)))

    return _kept(begin, None, fold, parts, None)


def _kept(
    begin: Callable[..., None],
    fix: Callable[..., None] | None,
    fold: Callable[..., None] | None,
    parts: torch.Tensor | None,
    odd: torch.Tensor | None,
) -> Again | None:
    """A call without a mask again, if all of its launches are known.

    begin: the first; it is also given the addresses of parts and marks. fix: what it marked once
    more. fold: the rows from their parts.
    """
    if (odd is not None and fix is None) or (parts is not None and fold is None):
        return None
    rooms = [None if x is None else (x.numel(), x.dtype, x.device) for x in (parts, odd)]

    def again(q: int, k: int, v: int, out: int, lse: int) -> None:
        parts, odd = (
            None if room is None else torch.empty(room[0], dtype=room[1], device=room[2])
            for room in rooms
        )
        at = None if parts is None else parts.data_ptr()
        marks = None if odd is None else odd.data_ptr()
        begin(q, k, v, out, lse, at, marks)
        if fix is not None:
            fix(q, k, v, None, None, out, lse, at, marks, None)
        if fold is not None:
            fold(at, out, lse)

    return again


def _first_keys(
    mask: torch.Tensor, added: torch.Tensor | None, planned: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The first key of each row of a mask, whose booleans are uint8, and the plan of each head.

    added: where to write what booleans add to the scores.
    """
    first = torch.empty(mask.shape[:3], dtype=torch.int32, device=mask.device)
    plan = empty_plan(first) if planned else None
    numbers, static = (*mask.shape[1:], *mask.stride()), (mask.dtype == torch.uint8,)
    prepare_mask(first.numel(), (mask, added, first, plan), numbers, static, 4)
    if plan is not None:
        plan_rows(plan[..., 0].numel(), (first, plan), (mask.size(2),), (), 4)
    return first, plan


def _prepared(
    mask: torch.Tensor, q: torch.Tensor, keys: int, planned: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What is added to the scores, the first key of each row, and the plan of each head."""
    given = mask.expand(-1, -1, q.size(2), keys)
    if mask.dtype == torch.bool:
        given = given.view(torch.uint8)
        mask = torch.empty(given.shape, dtype=q.dtype, device=q.device)
    return mask, *_first_keys(given, mask, planned)


def _blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    is_causal: bool,
    factor: float,
) -> Again | None:
    factor *= math.log2(math.e)
    if mask is None and not is_causal and takes_few(q, k, v):
        return _few(q, k, v, out, lse, factor)
    batch, heads, rows, size = q.shape
    kv_heads, keys, v_size = v.shape[1:]
    group = heads // max(kv_heads, 1)
    processors = multiprocessors(q.device.index) if q.is_cuda else 1
    hopper = takes_many(q, k, v)
    first, plan, strides, firsts = None, None, (0, 0, 0, 0), (0, 0, 0)
    if mask is not None:
        mask, first, plan = _prepared(mask, q, keys, hopper)
        strides = mask.expand(batch, heads, rows, keys).stride()
        firsts = first.expand(batch, heads, -1).stride()
    depth, v_depth = padded_size(size), padded_size(v_size)
    how = tile(rows * group, keys, max(depth, v_depth), q.device)
    per_head = -(-rows * group // how.rows)
    tiles = batch * kv_heads * per_head
    # A mask's first block begins before the first key of a row.
    blocks = -(-keys // BLOCK) + (mask is not None)
    run = run_of(tiles, blocks, processors)
    split = run < blocks and not hopper
    unit = 1 if any(stride % 8 for x in (q, k, v) for stride in x.stride()[:3]) else 8
    parts = _parts(q, blocks, v_size) if split else None
    programs = tiles * -(-blocks // run) if split else tiles
    cared = mask is not None or is_causal
    care = NOBODY
    if cared:
        care = INSIDE if how.rows <= 16 or split else MARK
    general = not hopper or mask is not None  # heads of a mask that have no plan
    marked = marks(q) if hopper and cared else 0
    marks_of_all = marked + (tiles if general and care == MARK else 0)
    odd = torch.empty(marks_of_all, dtype=torch.int8, device=q.device) if marks_of_all else None
    begin: Callable[..., None] | None = None
    if hopper:
        start = many_rows(q, k, v, out, lse, odd if marked else None, plan, is_causal, factor)
        if start is not None:

            def begin(
                q: int, k: int, v: int, out: int, lse: int, parts: None, odd: int | None
            ) -> None:
                start(q, k, v, out, lse, odd, None)

    numbers = (
        heads, group, rows, keys, size, v_size, per_head, blocks, run,
        *(stride // unit for x in (q, k, v) for stride in x.stride()[:3]), *strides,
        *firsts, factor,
    )  # fmt: skip
    whole = (depth, v_depth) == (size, v_size)
    static = (how.rows, depth, v_depth, mask is not None, is_causal, whole, split)
    tensors = (q, k, v, mask, first, out, lse, parts)
    if general:
        own = None if odd is None else odd[marked:]
        launch = (
            programs, (*tensors, own, plan), numbers, (*static, care, how.stages, unit), how.warps
        )  # fmt: skip
        attention_blocks(*launch)
        repeated = attention_blocks.repeat(*launch) if mask is None else None
        if repeated is not None:

            def begin(
                q: int, k: int, v: int, out: int, lse: int, parts: int | None, odd: int | None
            ) -> None:
                repeated(q, k, v, None, None, out, lse, parts, odd, None)

    fix = None
    if odd is not None:
        repair = (
            *(min(tiles, processors), (*tensors, odd, None), (*numbers, odd.numel(), tiles)),
            *((*static, INSIDE, 1, unit), how.warps),
        )
        mend(*repair)
        fix = mend.repeat(*repair) if mask is None else None
    fold = _combine(parts, out, lse, is_causal)
    if mask is not None or begin is None:
        return None
    return _kept(begin, fix, fold, parts, odd)


def _repeat(again: Again, out: torch.Tensor, lse: torch.Tensor) -> Callable[..., Pair]:
    """A call whose launches are known."""
    shape, strides, rows, dtype, device = out.shape, out.stride(), lse.shape, out.dtype, out.device

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Pair:
        out = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        lse = torch.empty(rows, dtype=torch.float32, device=device)
        again(
            *(query.data_ptr(), key.data_ptr(), value.data_ptr()), *(out.data_ptr(), lse.data_ptr())
        )
        return out, lse

    return call


_calls = Calls()
forget = _calls.forget


def _kind(tensors: tuple[torch.Tensor, ...], *rest: Any) -> tuple[Any, ...]:
    """All that a call without a mask depends on."""
    return (
        *rest,
        *map(kind_of, tensors),
    )


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Pair:
    given, kind = (query, key, value), None
    if attn_mask is None:
        kind = _kind(given, dropout_p, is_causal, scale, enable_gqa)
        call = _calls.find(kind)
        if call is not None:
            found: Pair = call(query, key, value)
            return found
    check_attention(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if (reason := refusal(query, key, value)) is not None:
        raise OpNotSupported(reason)
    batches = (query.shape[:-2], key.shape[:-2], value.shape[:-2])
    lead = tuple(query.shape[:-2] if enable_gqa else torch.broadcast_shapes(*batches))
    four = []
    for x in (query, key, value):
        held = (*lead[:-1], x.size(-3)) if enable_gqa else lead
        x = _four(x.expand(*held, *x.shape[-2:]))
        four.append(x if x.stride(-1) == 1 else x.contiguous())
    q, k, v = four
    batch, heads, rows, size = q.shape
    v_size = v.size(3)
    # Laid out as [batch, rows, heads, size], so that a model's next reshape copies nothing.
    out = torch.empty(batch, rows, heads, v_size, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    mask = attn_mask
    if mask is not None:
        mask = _four(mask.expand(*lead, *mask.shape[-2:]) if len(lead) > 2 else mask)
    factor = 1 / math.sqrt(size) if scale is None else float(scale)
    if factor <= 0:  # the largest score is that of the largest product
        q, factor = (q * 0, 1.0) if factor == 0 else (-q, -factor)
    if q.dtype == torch.float32:
        _chains(q, k, v, mask, out, lse, is_causal, factor)
    else:
        again = _blocks(q, k, v, mask, out, lse, is_causal, factor)
        in_place = all(x.data_ptr() == y.data_ptr() for x, y in zip((q, k, v), given, strict=True))
        if again is not None and kind is not None and in_place and len(lead) == 2:
            _calls.keep(kind, _repeat(again, out, lse))
    return out.reshape(*lead, rows, v_size), lse.reshape(*lead, rows)


_BLOCKWISE = undeclared("blocks of 128 keys, merged ascending, rescaled to the maximum so far")

KERNELS = {
    "scaled_dot_product_attention": Kernel(
        fn=_attention,
        guarantee=Guarantee.SCHEDULE,
        dtypes=frozenset(FLOATS),
        order={
            torch.float32: chunked(KEY_BLOCK, serial()),
            torch.bfloat16: _BLOCKWISE,
            torch.float16: _BLOCKWISE,
        },
        portable=frozenset((torch.float32,)),
        supports=refusal,
    )
}
