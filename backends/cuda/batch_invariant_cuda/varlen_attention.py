"""Attention over sequences on CUDA: dense, packed or in pages; which kernel.

Lengths stay on the device: nothing waits for them, and the kernels clamp them to the tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from batch_invariant.backend import Kernel
from batch_invariant.errors import OpNotSupported
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
from batch_invariant.ops.varlen_attention import check_arguments
from batch_invariant.ops.varlen_definition import factor
from batch_invariant.ops.varlen_layout import NAME, Layout, check_values
from batch_invariant.order import chunked, serial, undeclared
from batch_invariant_cuda.attention import KERNELS as DENSE
from batch_invariant_cuda.attention import refusal
from batch_invariant_cuda.attention_chains import KEY_BLOCK
from batch_invariant_cuda.attention_merge import BLOCK
from batch_invariant_cuda.row_launch import Calls, kind_of
from batch_invariant_cuda.varlen_call import Call
from batch_invariant_cuda.varlen_ring import (
    few_rows,
    few_tiles,
    many_rows,
    takes_few,
    takes_many,
)
from batch_invariant_cuda.varlen_tiles import (
    Again,
    in_blocks,
    in_chains,
    mend,
    merge,
    parts_of,
    processors,
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
    kind = (causal, scale, window, soft_cap, *map(kind_of, given))
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
    if window is not None:  # longer than any sequence, and what the kernels' int32 bears
        window = min(window, 2**30)
    if out.numel() or lse.numel():
        call = Call(q, k, v, sinks, layout, out, lse, causal, by, window, soft_cap)
        again, used = _launch(call), call.tensors[: len(given)]
        if again is not None and all(
            x is y is None or (x is not None and y is not None and x.data_ptr() == y.data_ptr())
            for x, y in zip(used, given, strict=True)
        ):
            _calls.keep(kind, _repeat(again, out, lse))
    return out, lse


_calls = Calls(512)  # packed calls with new numbers of tokens are new kinds
forget = _calls.forget


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


def _launch(call: Call) -> Again | None:
    """Computes `out` and `lse`; and how to do it again, where that is known."""
    if call.q.dtype == torch.float32:
        in_chains(call)
        return None
    if takes_few(call):
        seen = call.blocks if call.window is None else min(call.blocks, call.window // BLOCK + 2)
        runs = runs_of(few_tiles(call)[1] * call.k.size(-2), seen, processors(call))
        parts = parts_of(call) if runs > 1 else None
        start = few_rows(call, parts, runs)
        return _alone(start) if parts is None else _folded(start, merge(call, parts), parts)
    if takes_many(call):
        odd, start = many_rows(call)
        if odd is None:
            return _alone(start)
        return _mended(start, mend(call, odd, call.blocks, odd.numel()), odd)
    in_blocks(call)
    return None


def _alone(start: Again | None) -> Again | None:
    """A launch that leaves nothing for another."""
    return None if start is None else lambda *addresses: start(*addresses, None)


def _folded(start: Again | None, fold: Again | None, parts: torch.Tensor) -> Again | None:
    """Few rows, and their parts merged."""
    if start is None or fold is None:
        return None
    room, device = parts.numel(), parts.device

    def again(*addresses: int | None) -> None:
        parts = torch.empty(room, dtype=torch.float32, device=device)
        start(*addresses, parts.data_ptr())
        *_, sinks, cu_q, cu_k, seq_lens, left_pad, _, out, lse = addresses
        fold(parts.data_ptr(), sinks, cu_q, cu_k, seq_lens, left_pad, out, lse)

    return again


def _mended(start: Again | None, fix: Again | None, odd: torch.Tensor) -> Again | None:
    """Many rows, and once more where that left a mark."""
    if start is None or fix is None:
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


_BLOCKWISE = undeclared("blocks of 128 keys from the sequence's first, merged ascending")

KERNELS = {
    NAME: Kernel(
        fn=_attention,
        guarantee=Guarantee.SCHEDULE,
        dtypes=frozenset(FLOATS),
        order={
            torch.float32: chunked(KEY_BLOCK, serial()),
            torch.bfloat16: _BLOCKWISE,
            torch.float16: _BLOCKWISE,
        },
        supports=refusal,
    )
}
