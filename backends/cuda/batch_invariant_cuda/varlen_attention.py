"""Attention over sequences on CUDA: dense, packed or in pages; which kernel, which tile.

fp32 is `varlen_chains.py`; bf16 and fp16 are `varlen_blocks.py`. Lengths stay on the device:
nothing waits for them, and the kernels clamp them to the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.errors import OpNotSupported
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
from batch_invariant.ops.varlen_attention import check_arguments
from batch_invariant.ops.varlen_definition import factor
from batch_invariant.ops.varlen_layout import NAME, Layout, batch_of, capacity, check_values
from batch_invariant.order import serial, undeclared
from batch_invariant_cuda.attention import KERNELS as DENSE
from batch_invariant_cuda.attention import padded_size, refusal, run_of, tile
from batch_invariant_cuda.attention_blocks import INSIDE, MARK, NOBODY
from batch_invariant_cuda.attention_chains import KEYS
from batch_invariant_cuda.attention_merge import BLOCK
from batch_invariant_cuda.row_launch import Calls, multiprocessors
from batch_invariant_cuda.varlen_blocks import combine_sequences, sequences_in_blocks
from batch_invariant_cuda.varlen_chains import sequences_in_chains
from batch_invariant_cuda.varlen_ring import (
    Again,
    Call,
    few_rows,
    few_tiles,
    many_rows,
    takes_few,
    takes_many,
)

Pair = tuple[torch.Tensor, torch.Tensor]


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    left_pad: torch.Tensor | None,
    block_table: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    window: int | None,
    soft_cap: float | None,
) -> Pair:
    layout = Layout(cu_seqlens_q, cu_seqlens_k, seq_lens, left_pad, block_table)
    given = (query, key, value, sinks, *layout)
    kind = (causal, scale, window, soft_cap, *(None if x is None else _kind(x) for x in given))
    if (known := _calls.find(kind)) is not None:
        found: Pair = known(given)
        return found
    check_arguments(query, key, value, sinks, layout, causal, window, soft_cap)
    if (reason := refusal(query, key, value)) is not None:
        raise OpNotSupported(reason)
    devices = {x.device for x in layout if x is not None}
    if devices == {torch.device("cpu")}:
        check_values(query, key, layout)
    elif devices - {query.device}:
        raise RuntimeError(
            f"{NAME}: lengths and pages must all be on {query.device}, where the query is, or all "
            f"on the CPU, where they are checked; they are on {', '.join(map(str, devices))}"
        )
    dense = all(x is None for x in (*layout, sinks, window, soft_cap))
    if dense and query.dtype != torch.float32 and is_square(query, key, causal):
        _calls.keep(kind, lambda given: _square(*given[:3], causal, scale))
        return _square(query, key, value, causal, scale)
    layout = Layout(*(None if x is None else x.to(query.device).contiguous() for x in layout))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    *batch, length, heads, _ = q.shape
    out = q.new_empty(*batch, length, heads, v.size(-1))
    lse = q.new_empty(*batch, heads, length, dtype=torch.float32)
    by = factor(query, scale)
    # The largest score is that of the largest product.
    if by <= 0:
        q, by = (q * 0, 1.0) if by == 0 else (-q, -by)
    sinks = None if sinks is None else sinks.contiguous()
    if out.numel() or lse.numel():
        again = _launch(q, k, v, sinks, layout, out, lse, causal, by, window, soft_cap)
        used = (q, k, v, sinks, *layout)
        if again is not None and all(
            x is y is None or (x is not None and y is not None and x.data_ptr() == y.data_ptr())
            for x, y in zip(used, given, strict=True)
        ):
            _calls.keep(kind, _repeat(again, out, lse))
    return out, lse


_calls = Calls()
forget = _calls.forget


def _kind(x: torch.Tensor) -> tuple[Any, ...]:
    """All of a tensor that the launches of a call depend on."""
    return x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() & 15


def _repeat(again: Again, out: torch.Tensor, lse: torch.Tensor) -> Callable[..., Pair]:
    """A call whose launches are known."""
    shape, rows, dtype, device = out.shape, lse.shape, out.dtype, out.device

    def call(given: tuple[torch.Tensor | None, ...]) -> Pair:
        out = torch.empty(shape, dtype=dtype, device=device)
        lse = torch.empty(rows, dtype=torch.float32, device=device)
        addresses = (None if x is None else x.data_ptr() for x in given)
        again(*addresses, out.data_ptr(), lse.data_ptr())
        return out, lse

    return call


def is_square(query: torch.Tensor, key: torch.Tensor, causal: bool) -> bool:
    """Whether `scaled_dot_product_attention` computes the same of dense sequences.

    It does where every row sees the sequence's first key, from which both count their blocks; there
    the first row stands at the first key, here the last row at the last.
    """
    return not causal or query.size(1) == 1 or query.size(1) == key.size(1)


def _square(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float | None
) -> Pair:
    """Dense sequences by the kernels for `scaled_dot_product_attention`."""
    out, lse = DENSE["scaled_dot_product_attention"].fn(
        *(x.transpose(1, 2) for x in (query, key, value)),
        is_causal=causal and query.size(1) > 1, scale=scale, enable_gqa=True,
    )  # fmt: skip
    return out.transpose(1, 2), lse


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    layout: Layout,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    by: float,
    window: int | None,
    soft_cap: float | None,
) -> Again | None:
    """Computes `out` and `lse`; and how to do it again, where that is known."""
    packed = layout.cu_seqlens_q is not None
    sequences, room = batch_of(q, layout), capacity(k, layout)
    heads, size, v_size = *q.shape[-2:], v.size(-1)
    group = heads // k.size(-2)
    tokens = q.size(0) if packed else 0
    queries = 0 if packed else q.size(1)
    table = layout.block_table
    depth, v_depth = padded_size(size), padded_size(v_size)
    before = (sequences, queries, tokens, heads, group, room, size, v_size)
    strides = (
        *(0 if packed else q.stride(0), q.stride(-2), q.stride(-3)),
        *(stride for x in (k, v) for stride in _strides(x, table is not None)),
    )
    unit = 1 if any(stride % 8 for stride in strides) else 8
    behind = (
        *((0, 1, 1) if table is None else (table.size(1), k.size(1), k.size(0))),
        window or 0,
        *(stride // unit for stride in strides),
        *(0 if packed else lse.stride(0), lse.stride(-2)),
    )
    options = (causal, window is not None, soft_cap is not None)

    def tiles_of(rows: int) -> int:
        """Packed sequences have at most this many tiles, and one more behind them."""
        if packed:
            return (tokens * group // rows + sequences + 2) * k.size(-2)
        return sequences * -(-queries * group // rows) * k.size(-2)

    if q.dtype == torch.float32:
        wide = max(size, v_size) > 64
        rows = 16 if wide or queries * group <= 16 else 32
        sequences_in_chains(
            tiles_of(rows), (q, k, v, sinks, *layout, out, lse),
            (*before, *behind, by, soft_cap or 0.0),
            (rows, KEYS, depth, v_depth, *options, unit), 8 if wide else 4,
        )  # fmt: skip
        return None
    factors = (by * math.log2(math.e), 0.0)
    if soft_cap is not None:
        factors = (2 * math.log2(math.e) * by / soft_cap, soft_cap * math.log2(math.e))
    blocks = -(-room // BLOCK)
    processors = multiprocessors(q.device.index) if q.is_cuda else 1

    def parts_of() -> torch.Tensor:
        """Room for weighted sum, maximum and sum of each row over each block of keys."""
        shape = (lse.numel(), blocks, v_size + 2)
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    def merge(parts: torch.Tensor) -> Again | None:
        width = min(v_depth, 32)
        launch = (
            lse.numel() * (v_depth // width), (parts, sinks, *layout[:-1], out, lse),
            (sequences, queries, tokens, heads, room, v_size, blocks, window or 0, *behind[-2:]),
            (width, v_depth // width, *options[:2], 4 if blocks <= 4 else 32), 1,
        )  # fmt: skip
        combine_sequences(*launch)
        return combine_sequences.repeat(*launch)

    call = Call(q, k, v, sinks, layout, out, lse, causal, window, factors)
    if takes_few(call):
        seen = blocks if window is None else min(blocks, window // BLOCK + 2)
        runs = runs_of(few_tiles(call)[1] * k.size(-2), seen, processors)
        parts = parts_of() if runs > 1 else None
        start = few_rows(call, parts, runs)
        return _folded(start, None if parts is None else (parts, merge(parts)))
    each = queries if not packed else -(-tokens // max(sequences, 1))
    how = tile(each * group, room, max(depth, v_depth), q.device)
    tiles = tiles_of(how.rows)
    static = (how.rows, depth, v_depth, *options)

    def mend(odd: torch.Tensor, run: int, marks: int) -> Again | None:
        launch = (
            min(tiles, processors), (q, k, v, sinks, *layout, out, lse, None, odd),
            (*before, blocks, run, *behind, *factors, tiles, marks),
            (*static, False, INSIDE, 1, unit, True), how.warps,
        )  # fmt: skip
        sequences_in_blocks(*launch)
        return sequences_in_blocks.repeat(*launch)

    if takes_many(call):
        odd, start = many_rows(call)
        return _mended(start, None if odd is None else (odd, mend(odd, blocks, odd.numel())))
    run = run_of(tiles, max(blocks, 1), processors)
    parts = parts_of() if run < blocks else None
    care = NOBODY
    if causal:
        care = INSIDE if how.rows <= 16 or parts is not None else MARK
    odd = torch.empty(tiles, dtype=torch.int8, device=q.device) if care == MARK else None
    sequences_in_blocks(
        tiles if parts is None else tiles * -(-blocks // run),
        (q, k, v, sinks, *layout, out, lse, parts, odd),
        (*before, blocks, run, *behind, *factors, tiles, 0),
        (*static, parts is not None, care, how.stages, unit, False), how.warps,
    )  # fmt: skip
    if odd is not None:
        mend(odd, run, 0)
    if parts is not None:
        merge(parts)
    return None


def _folded(start: Again | None, more: tuple[torch.Tensor, Again | None] | None) -> Again | None:
    """Few rows, and their parts merged."""
    if start is None or more is None:
        return None if start is None else lambda *addresses: start(*addresses, None)
    parts, fold = more
    if fold is None:
        return None
    room, device = parts.numel(), parts.device

    def again(*addresses: int | None) -> None:
        parts = torch.empty(room, dtype=torch.float32, device=device)
        start(*addresses, parts.data_ptr())
        *_, sinks, cu_q, cu_k, seq_lens, left_pad, _, out, lse = addresses
        fold(parts.data_ptr(), sinks, cu_q, cu_k, seq_lens, left_pad, out, lse)

    return again


def _mended(start: Again | None, more: tuple[torch.Tensor, Again | None] | None) -> Again | None:
    """Many rows, and once more where that left a mark."""
    if start is None or more is None:
        return None if start is None else lambda *addresses: start(*addresses, None)
    odd, fix = more
    if fix is None:
        return None
    count, device = odd.numel(), odd.device

    def again(*addresses: int | None) -> None:
        odd = torch.empty(count, dtype=torch.int8, device=device)
        start(*addresses, odd.data_ptr())
        fix(*addresses, None, odd.data_ptr())

    return again


def runs_of(tiles: int, blocks: int, processors: int) -> int:
    """Programs that share the blocks of keys of one tile of few rows; it changes no bit."""
    return max(1, min(blocks, 2 * processors // max(tiles, 1)))


def _strides(x: torch.Tensor, paged: bool) -> tuple[int, int, int, int]:
    """Of a batch, a page, a head and a row; 0 where there is none."""
    first = x.stride(0) if x.dim() == 4 else 0
    return (0 if paged else first, first if paged else 0, x.stride(-2), x.stride(-3))


_BLOCKWISE = undeclared("blocks of 128 keys from the sequence's first, merged ascending")

KERNELS = {
    NAME: Kernel(
        fn=_attention,
        guarantee=Guarantee.SCHEDULE,
        dtypes=frozenset(FLOATS),
        order={torch.float32: serial(), torch.bfloat16: _BLOCKWISE, torch.float16: _BLOCKWISE},
        supports=refusal,
    )
}
