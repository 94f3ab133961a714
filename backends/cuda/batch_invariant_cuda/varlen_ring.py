"""When attention over sequences goes to the kernels for Hopper, and how they are launched."""

from __future__ import annotations

import math
from functools import cache

import torch

from batch_invariant_cuda.attention_hopper import KEYS
from batch_invariant_cuda.attention_plan import ROWS
from batch_invariant_cuda.attention_ring import DescribedKernel, boxed, fits
from batch_invariant_cuda.attention_step import ROWS as STEP_ROWS
from batch_invariant_cuda.attention_step import rows_of_tile
from batch_invariant_cuda.varlen_call import Call
from batch_invariant_cuda.varlen_hopper import sequences_ring
from batch_invariant_cuda.varlen_pages import WIDTH
from batch_invariant_cuda.varlen_plan import empty_tiles, plan_tiles, room_for
from batch_invariant_cuda.varlen_step import sequences_step
from batch_invariant_cuda.varlen_tiles import Again, processors

_STAGES = 2
_MANY = 64  # queries of a sequence; fewer leave most of a tile empty
_MIXED = 16  # of packed sequences, which may differ: short ones are computed as few rows
_TILES = 4  # of few rows; more read the keys too often
_LEAST = 8  # rows of a box: what bulk copies swizzle together


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """[batch or pages, heads, rows, size] of a tensor as it is given."""
    return (x if x.dim() == 4 else x[None]).transpose(1, 2)


def _box(call: Call) -> int:
    """Rows of a key's box: none crosses a page."""
    return math.gcd(call.k.size(1) if call.paged else KEYS, KEYS)


def _is_page(call: Call) -> bool:
    """Whether a box is a page."""
    return call.paged and _box(call) == call.k.size(1)


def _fits(call: Call) -> bool:
    return (
        fits(*(_heads_first(x) for x in (call.q, call.k, call.v)))
        and call.sequences > 0
        and call.room > 0
        and _box(call) >= _LEAST
        and not (call.paged and call.layout.left_pad is not None)
    )


def takes_few(call: Call) -> bool:
    """Whether `few_rows` takes a call."""
    most = STEP_ROWS if call.packed else _TILES * STEP_ROWS
    return call.rows * call.group <= most * call.sequences and _fits(call)


def takes_many(call: Call) -> bool:
    """Whether `many_rows` takes a call."""
    least = _MIXED if call.packed else _MANY
    return call.rows >= least * call.sequences and _fits(call)


@cache
def _kernels() -> tuple[DescribedKernel, DescribedKernel]:
    """For many rows, for few: compiled code is looked up once in a process."""
    return DescribedKernel(sequences_ring), DescribedKernel(sequences_step)


def few_tiles(call: Call) -> tuple[int, int]:
    """Tiles of a head that `few_rows` launches, and how many of them have rows, or so."""
    if call.packed:
        return call.tokens * call.group // STEP_ROWS + call.sequences + 2, call.sequences
    tiles = call.sequences * -(-call.queries * call.group // STEP_ROWS)
    return tiles, tiles


def few_rows(
    call: Call, parts: torch.Tensor | None, runs: int, short: bool = False
) -> Again | None:
    """Computes `out` and `lse`, or `parts` by so many runs of blocks of keys for each tile.

    short: of packed sequences whose queries are one tile alone.
    And how to do it again, called with the addresses of a call's tensors and that of parts.
    """
    heads, size = call.q.shape[-2:]
    box = _box(call)
    k, v = (_heads_first(x) for x in (call.k, call.v))
    strides = [stride // 8 for stride in call.strides]
    start = _kernels()[1](
        (call.sequences if short else few_tiles(call)[0]) * call.k.size(-2) * runs,
        (boxed(k, box, WIDTH), boxed(v, box, WIDTH)),
        (call.q, call.v, call.sinks, *call.layout, call.out, call.lse, parts),
        (
            call.sequences, call.queries, call.tokens, heads, call.group, call.room,
            *(call.blocks, runs, *call.pages, call.window or 0), *strides[:3], *strides[-4:],
            *call.lse_strides, *call.factors,
        ),
        (
            *(size, STEP_ROWS if call.packed else rows_of_tile(call.queries * call.group), box),
            *(call.causal, parts is not None, short, _is_page(call), *call.limits),
        ),
    )  # fmt: skip
    if start is None:
        return None

    def again(q: int, k: int, v: int, *rest: int | None) -> None:
        start(k, v, q, v, *rest)

    return again


def many_rows(call: Call) -> tuple[torch.Tensor | None, Again | None]:
    """Computes `out` and `lse`; marks, of which one is set where a result is not finite.

    No marks where no key that takes no part is read. And how to do it again, called with the
    addresses of a call's tensors and that of the marks.
    """
    heads, size = call.q.shape[-2:]
    room = room_for(call.sequences, call.queries, call.tokens, call.packed)
    plan = empty_tiles(room, call.q.device)
    short = STEP_ROWS // call.group if call.packed else 0
    shorter = few_rows(call, None, 1, True) if short else None
    layout = call.layout
    listing = (
        call.sequences + call.packed,
        (plan, layout.cu_seqlens_q, layout.cu_seqlens_k, layout.seq_lens, layout.left_pad),
        (call.sequences, call.queries, call.tokens, call.room, short, room),
        (call.causal, layout.cu_seqlens_k is None), 4,
    )  # fmt: skip
    plan_tiles(*listing)
    lister = plan_tiles.repeat(*listing)
    programs = min(room * heads, processors(call))
    odd = None
    if call.causal or any(x is not None for x in layout):
        odd = torch.empty(2 * programs, dtype=torch.int8, device=call.q.device)
    box = _box(call)
    q, k, v, out = (_heads_first(x) for x in (call.q, call.k, call.v, call.out))
    start = _kernels()[0](
        programs,
        (boxed(q, ROWS // 2), boxed(k, box, WIDTH), boxed(v, box, WIDTH), boxed(out, ROWS // 2)),
        (call.out, call.lse, odd, plan, layout.block_table, call.sinks),
        (
            heads, call.group, call.queries, *call.pages, call.window or 0,
            *call.lse_strides, *call.factors,
        ),
        (size, box, _is_page(call), _STAGES, call.causal, *call.limits),
    )  # fmt: skip
    if start is None or lister is None or (short and shorter is None):
        return odd, None
    device = call.q.device

    def again(*addresses: int | None) -> None:
        q, k, v, sinks, cu_q, cu_k, seq_lens, left_pad, table, out, lse, odd = addresses
        plan = empty_tiles(room, device)
        if shorter is not None:
            shorter(*addresses[:-1], None)
        lister(plan.data_ptr(), cu_q, cu_k, seq_lens, left_pad)
        start(q, k, v, out, out, lse, odd, plan.data_ptr(), table, sinks)

    return odd, again
