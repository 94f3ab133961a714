"""A list of the tiles of 128 rows of sequences, so that a kernel need not look for them.

Made by one small launch from lengths on the device. It is int32: the number of tiles, how many were
claimed beyond each program's first, 6 unused, then 8 for each tile: the batch and row of its first
query in storage, how many of its rows belong to the sequence, the batch (of pages: the sequence)
and row of the sequence's first key in storage, the key behind the last that its first row sees, how
many keys the sequence has (-1 for rows behind the last sequence), and how many blocks of 128 keys
there are up to the last that some row of it sees, at least one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from batch_invariant_cuda.attention_merge import BLOCK
from batch_invariant_cuda.attention_plan import ROWS
from batch_invariant_cuda.row_launch import RowKernel
from batch_invariant_cuda.varlen_spans import keys_of, rows_of

ENTRY = 8  # int32 numbers of a tile, and in front of the first

_BLOCK, _ROWS, _ENTRY = tl.constexpr(BLOCK), tl.constexpr(ROWS), tl.constexpr(ENTRY)
_CHUNK = tl.constexpr(1024)


@triton.jit
def _tiles(count, short):
    return tl.where(count <= short, 0, (count + _ROWS - 1) // _ROWS)


@triton.jit
def _tiles_before(cu_q, b, sequences, tokens, short):
    """Tiles of all packed sequences in front of sequence b."""
    before = tl.zeros((_CHUNK,), tl.int64)
    for begin in tl.range(0, b, _CHUNK):
        other = begin + tl.arange(0, _CHUNK)
        there = other < b
        from_ = tl.load(cu_q + other, mask=there, other=0).to(tl.int64)
        to = tl.load(cu_q + other + 1, mask=there, other=0).to(tl.int64)
        from_ = tl.minimum(tl.maximum(from_, 0), tokens)
        to = tl.maximum(tl.minimum(to, tokens), from_)
        before += _tiles(to - from_, short)
    return tl.sum(before, 0)


@triton.jit(do_not_specialize=["sequences", "queries", "tokens", "capacity", "short", "room"])
def _plan_kernel(
    plan, cu_q, cu_k, seq_lens, left_pad, sequences, queries, tokens, capacity, short, room,
    CAUSAL: tl.constexpr, BATCHED: tl.constexpr,
):  # fmt: skip
    """The tiles of one sequence; of packed ones, the last program has the rows behind the last.

    short: sequences of so few queries have no tiles.
    """
    b = tl.program_id(0)
    if cu_q is None:
        batch, q_row, count = b, 0, queries
        before = b.to(tl.int64) * _tiles(queries, short)
    else:
        batch = 0
        q_row, count = rows_of(cu_q, b, sequences, tokens)
        before = _tiles_before(cu_q, b, sequences, tokens, short)
    begin, first, end = keys_of(cu_k, seq_lens, left_pad, b, sequences, capacity)
    number = _tiles(count, short if b < sequences else 0)
    keys = end - first
    of = tl.minimum(b, sequences - 1)
    for at in tl.range(0, number, _CHUNK):
        tile = at + tl.arange(0, _CHUNK)
        row = tile * _ROWS
        valid = tl.minimum(count - row, _ROWS)
        seen = keys + row * 0
        most = seen
        if CAUSAL:
            seen = tl.minimum(keys, keys - count + row + 1)
            most = tl.minimum(keys, keys - count + row + valid)
        blocks = tl.maximum((most + _BLOCK - 1) // _BLOCK, 1)
        place = before + tile
        there = (tile < number) & (place < room)
        to = plan + (place + 1) * _ENTRY
        tl.store(to, batch + row * 0, mask=there)
        tl.store(to + 1, q_row + row, mask=there)
        tl.store(to + 2, valid, mask=there)
        tl.store(to + 3, (of if BATCHED else 0) + row * 0, mask=there)
        tl.store(to + 4, begin + first + row * 0, mask=there)
        tl.store(to + 5, seen, mask=there)
        tl.store(to + 6, tl.where(b < sequences, keys, -1) + row * 0, mask=there)
        tl.store(to + 7, blocks, mask=there)
    if b == tl.num_programs(0) - 1:
        tl.store(plan + tl.arange(0, _ENTRY), tl.zeros((_ENTRY,), tl.int32))
        tl.debug_barrier()
        total = tl.minimum(before + number, room).to(tl.int32)
        tl.store(plan, total)
        if total == 0:
            tl.store(plan + _ENTRY + tl.arange(0, _ENTRY), tl.zeros((_ENTRY,), tl.int32))


plan_tiles = RowKernel(_plan_kernel)


def room_for(sequences: int, queries: int, tokens: int, packed: bool) -> int:
    """How many tiles there can be."""
    return tokens // ROWS + sequences + 1 if packed else sequences * -(-queries // ROWS)


def empty_tiles(room: int, device: torch.device) -> torch.Tensor:
    """Memory for a list of so many tiles."""
    return torch.empty((room + 1) * ENTRY, dtype=torch.int32, device=device)
