"""When attention over sequences goes to the kernels for Hopper, and how they are launched."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from batch_invariant.ops.varlen_layout import Layout, batch_of, capacity
from batch_invariant_cuda.attention_hopper import KEYS
from batch_invariant_cuda.attention_plan import ROWS
from batch_invariant_cuda.attention_ring import DescribedKernel, boxed, fits
from batch_invariant_cuda.attention_step import ROWS as FEW_ROWS
from batch_invariant_cuda.row_launch import multiprocessors
from batch_invariant_cuda.varlen_hopper import sequences_ring
from batch_invariant_cuda.varlen_pages import WIDTH
from batch_invariant_cuda.varlen_plan import empty_tiles, plan_tiles, room_for
from batch_invariant_cuda.varlen_step import sequences_step

_STAGES = 2
_MANY = 64  # queries of a sequence; fewer leave most of a tile empty
_MIXED = 16  # of packed sequences, which may differ: short ones are computed as few rows
_TILES = 4  # of few rows; more read the keys too often
_LEAST = 8  # rows of a box: what bulk copies swizzle together


# A call again, with the addresses of query, key, value, sinks, the layout, output and lse, and of
# what a kernel leaves for the next.
Again = Callable[..., None]


class Call(NamedTuple):
    """Attention over sequences in bf16 or fp16."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sinks: torch.Tensor | None
    layout: Layout
    out: torch.Tensor
    lse: torch.Tensor
    causal: bool
    window: int | None
    factors: tuple[float, float]  # of the scores; with a soft cap, of tanh and of its argument

    @property
    def packed(self) -> bool:
        return self.layout.cu_seqlens_q is not None

    @property
    def sequences(self) -> int:
        return batch_of(self.q, self.layout)

    @property
    def queries(self) -> int:
        """Of each sequence in storage; 0 where they are packed."""
        return 0 if self.packed else self.q.size(1)

    @property
    def tokens(self) -> int:
        return self.q.size(0) if self.packed else 0

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.q.size(-2) // self.k.size(-2)

    def pages(self) -> tuple[int, int, int]:
        """Columns of the page table, keys of a page, pages; of no use where there are none."""
        table = self.layout.block_table
        return (0, 1, 1) if table is None else (table.size(1), self.k.size(1), self.k.size(0))

    def options(self) -> tuple[bool, bool]:
        """Whether there are a window and a soft cap."""
        return self.window is not None, self.factors[1] != 0.0

    def lse_strides(self) -> tuple[int, int]:
        return (0 if self.packed else self.lse.stride(0)), self.lse.stride(-2)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """[batch or pages, heads, rows, size] of a tensor as it is given."""
    return (x if x.dim() == 4 else x[None]).transpose(1, 2)


def _box(call: Call) -> int:
    """Rows of a key's box: none crosses a page."""
    size = KEYS if call.layout.block_table is None else call.k.size(1)
    return math.gcd(size, KEYS)


def _is_page(call: Call) -> bool:
    """Whether a box is a page."""
    return call.layout.block_table is not None and _box(call) == call.k.size(1)


def _fits(call: Call) -> bool:
    paged = call.layout.block_table is not None
    return (
        fits(*(_heads_first(x) for x in (call.q, call.k, call.v)))
        and call.sequences > 0
        and capacity(call.k, call.layout) > 0
        and _box(call) >= _LEAST
        and not (paged and call.layout.left_pad is not None)
    )


def takes_few(call: Call) -> bool:
    """Whether `few_rows` takes a call."""
    rows = (call.tokens or call.sequences * call.queries) * call.group
    most = FEW_ROWS if call.packed else _TILES * FEW_ROWS
    return rows <= most * call.sequences and _fits(call)


def takes_many(call: Call) -> bool:
    """Whether `many_rows` takes a call."""
    rows = call.tokens or call.sequences * call.queries
    least = _MIXED if call.packed else _MANY
    return rows >= least * call.sequences and _fits(call)


@cache
def _kernels() -> tuple[DescribedKernel, DescribedKernel]:
    """For many rows, for few: compiled code is looked up once in a process."""
    return DescribedKernel(sequences_ring), DescribedKernel(sequences_step)


def few_tiles(call: Call) -> tuple[int, int]:
    """Tiles of a head that `few_rows` launches, and how many of them have rows, or so."""
    if call.packed:
        return call.tokens * call.group // FEW_ROWS + call.sequences + 2, call.sequences
    tiles = call.sequences * -(-call.queries * call.group // FEW_ROWS)
    return tiles, tiles


def few_rows(
    call: Call, parts: torch.Tensor | None, runs: int, short: bool = False
) -> Again | None:
    """Computes `out` and `lse`, or `parts` by so many runs of blocks of keys for each tile.

    short: of packed sequences whose queries are one tile alone.
    And how to do it again, called with the addresses of a call's tensors and that of parts.
    """
    heads, size = call.q.shape[-2:]
    box, room = _box(call), capacity(call.k, call.layout)
    k, v = (_heads_first(x) for x in (call.k, call.v))
    paged = call.layout.block_table is not None
    first = call.v.stride(0) if call.v.dim() == 4 else 0
    start = _kernels()[1](
        (call.sequences if short else few_tiles(call)[0]) * call.k.size(-2) * runs,
        (boxed(k, box, WIDTH), boxed(v, box, WIDTH)),
        (call.q, call.v, call.sinks, *call.layout, call.out, call.lse, parts),
        (
            call.sequences, call.queries, call.tokens, heads, call.group, room, -(-room // KEYS),
            runs, *call.pages(), call.window or 0,
            (0 if call.packed else call.q.stride(0)) // 8, call.q.stride(-2) // 8,
            call.q.stride(-3) // 8,
            (0 if paged else first) // 8, (first if paged else 0) // 8, call.v.stride(-2) // 8,
            call.v.stride(-3) // 8, *call.lse_strides(), *call.factors,
        ),
        (size, box, call.causal, parts is not None, short, _is_page(call), *call.options()),
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
    short = FEW_ROWS // call.group if call.packed else 0
    shorter = few_rows(call, None, 1, True) if short else None
    layout = call.layout
    listing = (
        call.sequences + call.packed,
        (plan, layout.cu_seqlens_q, layout.cu_seqlens_k, layout.seq_lens, layout.left_pad),
        (call.sequences, call.queries, call.tokens, capacity(call.k, layout), short, room),
        (call.causal, layout.cu_seqlens_k is None), 4,
    )  # fmt: skip
    plan_tiles(*listing)
    lister = plan_tiles.repeat(*listing)
    programs = min(room * heads, multiprocessors(call.q.device.index))
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
            heads, call.group, call.queries, *call.pages(), call.window or 0,
            *call.lse_strides(), *call.factors,
        ),
        (size, box, _is_page(call), _STAGES, call.causal, *call.options()),
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
