"""Attention over sequences by the kernels for any GPU: their tiles, numbers and launches."""

from __future__ import annotations

from collections.abc import Callable

import torch

from batch_invariant_cuda.attention import Tile, padded_size, run_of, tile, tile_of_chains
from batch_invariant_cuda.attention_blocks import INSIDE, MARK, NOBODY
from batch_invariant_cuda.attention_chains import size_chunks
from batch_invariant_cuda.attention_merge import EXTRA
from batch_invariant_cuda.row_launch import multiprocessors
from batch_invariant_cuda.varlen_blocks import combine_sequences, sequences_in_blocks
from batch_invariant_cuda.varlen_call import Call
from batch_invariant_cuda.varlen_chains import sequences_in_chains

# A launch again, called with the addresses of its tensors.
Again = Callable[..., None]


def processors(call: Call) -> int:
    return multiprocessors(call.q.device.index) if call.q.is_cuda else 1


def _sizes(call: Call) -> tuple[int, int]:
    """Sizes of the heads of queries and values in the kernels."""
    return padded_size(call.q.size(-1)), padded_size(call.v.size(-1))


def _before(call: Call) -> tuple[int, ...]:
    """The numbers that the kernels take first."""
    heads, size = call.q.shape[-2:]
    lengths = (call.sequences, call.queries, call.tokens)
    return (*lengths, heads, call.group, call.room, size, call.v.size(-1))


def _behind(call: Call) -> tuple[tuple[int, ...], int]:
    """The numbers that they take later, among them strides divided by the last result."""
    unit = 1 if any(stride % 8 for stride in call.strides) else 8
    divided = (stride // unit for stride in call.strides)
    return (*call.pages, call.window or 0, *divided, *call.lse_strides), unit


def _tiles(call: Call, rows: int) -> int:
    """Packed sequences have at most this many tiles of so many rows, and one more behind them."""
    if call.packed:
        return (call.tokens * call.group // rows + call.sequences + 2) * call.k.size(-2)
    return call.sequences * -(-call.queries * call.group // rows) * call.k.size(-2)


def in_chains(call: Call) -> None:
    """Computes `out` and `lse` in fp32."""
    chunks, v_depth = size_chunks(call.q.size(-1)), padded_size(call.v.size(-1))
    widest = max(call.q.size(-1), call.v.size(-1))
    rows, keys, warps = tile_of_chains(call.queries * call.group, widest, False, call.q.device)
    behind, unit = _behind(call)
    sequences_in_chains(
        _tiles(call, rows), call.tensors,
        (*_before(call), *behind, call.factor, call.soft_cap or 0.0),
        (rows, keys, chunks, v_depth, call.causal, *call.limits, unit), warps,
    )  # fmt: skip


def parts_of(call: Call) -> torch.Tensor:
    """Room for weighted sum, maximum and sum of each row over each block of keys."""
    shape = (call.lse.numel(), call.blocks, call.v.size(-1) + EXTRA)
    return torch.empty(shape, dtype=torch.float32, device=call.q.device)


def merge(call: Call, parts: torch.Tensor) -> Again | None:
    """Computes `out` and `lse` from the parts of all rows; and how to do it again."""
    v_size, v_depth = call.v.size(-1), _sizes(call)[1]
    width = min(v_depth, 32)
    lengths = (call.sequences, call.queries, call.tokens, call.q.size(-2), call.room, v_size)
    window = call.window is not None
    launch = (
        call.lse.numel() * (v_depth // width),
        (parts, call.sinks, *call.layout[:-1], call.out, call.lse),
        (*lengths, call.blocks, call.window or 0, *call.lse_strides),
        (width, v_depth // width, call.causal, window, 4 if call.blocks <= 4 else 32), 1,
    )  # fmt: skip
    combine_sequences(*launch)
    return combine_sequences.repeat(*launch)


def _tile(call: Call) -> Tile:
    """The tile for the sequences of a call; packed ones are taken to be alike."""
    each = -(-call.tokens // max(call.sequences, 1)) if call.packed else call.queries
    return tile(each * call.group, call.room, max(_sizes(call)), call.q.device)


def mend(call: Call, odd: torch.Tensor, run: int, marks: int) -> Again | None:
    """Computes marked tiles once more, or all if one of `marks` is set; and how to do it again."""
    how, (behind, unit) = _tile(call), _behind(call)
    tiles = _tiles(call, how.rows)
    launch = (
        min(tiles, processors(call)), (*call.tensors, None, odd),
        (*_before(call), call.blocks, run, *behind, *call.factors, tiles, marks),
        (
            *(how.rows, *_sizes(call), call.causal, *call.limits),
            *(False, INSIDE, 1, unit, True),
        ),
        how.warps,
    )  # fmt: skip
    sequences_in_blocks(*launch)
    return sequences_in_blocks.repeat(*launch)


def in_blocks(call: Call) -> None:
    """Computes `out` and `lse` in bf16 and fp16."""
    how, (behind, unit) = _tile(call), _behind(call)
    tiles, blocks = _tiles(call, how.rows), call.blocks
    run = run_of(tiles, max(blocks, 1), processors(call))
    parts = parts_of(call) if run < blocks else None
    care = NOBODY
    if call.causal:
        care = INSIDE if how.rows <= 16 or parts is not None else MARK
    odd = torch.empty(tiles, dtype=torch.int8, device=call.q.device) if care == MARK else None
    sequences_in_blocks(
        tiles if parts is None else tiles * -(-blocks // run), (*call.tensors, parts, odd),
        (*_before(call), blocks, run, *behind, *call.factors, tiles, 0),
        (
            *(how.rows, *_sizes(call), call.causal, *call.limits),
            *(parts is not None, care, how.stages, unit, False),
        ),
        how.warps,
    )  # fmt: skip
    if odd is not None:
        mend(call, odd, run, 0)
    if parts is not None:
        merge(call, parts)
