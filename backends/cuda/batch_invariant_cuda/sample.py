"""sample on CUDA: the noise and the scores of the CPU reference, bit for bit, so the same draws.

A block of columns is one program: its maximum, then its best score; a last program for each row
takes the best of the blocks. Only exact selections meet other columns, so tiles decide nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from batch_invariant.backend import Kernel
from batch_invariant.errors import OpNotSupported
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
from batch_invariant.ops.dims import rows_along
from batch_invariant.ops.sample import UNIT, check_sample, kept
from batch_invariant.order import undeclared
from batch_invariant.stock import stock
from batch_invariant_cuda.explog import exp, log, minus_log1m
from batch_invariant_cuda.row_launch import RowKernel
from batch_invariant_cuda.rows import FEW, larger, take_turn
from batch_invariant_cuda.select import topk_rows

_BLOCK = 1024
_UNIT = tl.constexpr(UNIT)
_LARGEST_V = tl.constexpr(1 - 2.0**-24)


@triton.jit
def gumbel(word):
    """The noise of a Philox word: -log(-log(1 - v)), v from its upper 31 bits."""
    v = ((word >> 1).to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * 4.656612873077393e-10
    v = tl.where(v > _LARGEST_V, _LARGEST_V, v)
    return -log(minus_log1m(v))


@triton.jit
def scaled(x, top, temperature):
    """(x - top) / temperature; 0 for what equals the top, infinities too."""
    return tl.div_rn(tl.where(x == top, 0.0, x - top), temperature)


@triton.jit
def column_words(seed, position, group):
    """The four words of the columns 4 group .. 4 group + 3, each a tensor like group."""
    zero = tl.zeros_like(group)
    low = zero + (position & 0xFFFFFFFF).to(tl.int32)
    high = zero + (position >> 32).to(tl.int32)
    return tl.philox(seed, group, low, high, zero)


@triton.jit
def _row_top(tops, row, blocks, BLOCKS: tl.constexpr):
    block = tl.arange(0, BLOCKS)
    found = tl.load(tops + row * blocks + block, mask=block < blocks, other=float("-inf"))
    return tl.reduce(found, 0, larger)


@triton.jit(do_not_specialize=["n", "blocks"])
def _top_kernel(x, tops, n, blocks, BLOCK: tl.constexpr):
    take_turn()
    task = tl.program_id(0).to(tl.int64)
    row, block = task // blocks, task % blocks
    column = block * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + row * n + column, mask=column < n, other=float("-inf")).to(tl.float32)
    tl.store(tops + task, tl.reduce(v, 0, larger))


@triton.jit(do_not_specialize=["n", "blocks"])
def _score_kernel(
    x, seeds, positions, temperatures, min_p, keep, tops, scores, columns, n, blocks,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    take_turn()
    task = tl.program_id(0).to(tl.int64)
    row, block = task // blocks, task % blocks
    top = _row_top(tops, row, blocks, BLOCKS)
    given = tl.load(temperatures + row)
    greedy = given == 0.0
    temperature = tl.where(greedy, 1.0, given)
    group = (block * (BLOCK // 4)).to(tl.int32) + tl.arange(0, BLOCK // 4)
    words = column_words(tl.load(seeds + row), tl.load(positions + row), group)
    best = tl.full((BLOCK // 4,), float("-inf"), tl.float32)
    where = group * 4
    for word in tl.static_range(4):
        column = group * 4 + word
        there = column < n
        v = tl.load(x + row * n + column, mask=there, other=float("-inf")).to(tl.float32)
        z = scaled(v, top, temperature)
        score = z + gumbel(words[word])
        if min_p is not None:
            score = tl.where(exp(z, True) >= tl.load(min_p + row), score, float("-inf"))
        if keep is not None:
            kept = tl.load(keep + row * n + column, mask=there, other=0)
            score = tl.where(kept != 0, score, float("-inf"))
        score = tl.where(greedy, v, score)
        score = tl.where(there, score, float("-inf"))
        where = tl.where(score > best, column, where)
        best = tl.where(score > best, score, best)
    most = tl.max(best, 0)
    tl.store(scores + task, most)
    tl.store(columns + task, tl.min(tl.where(best == most, where, 0x7FFFFFFF), 0))


@triton.jit(do_not_specialize=["blocks"])
def _draw_kernel(
    tops, scores, columns, positions, temperatures, top_k, top_p, min_p, out, blocks,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    take_turn()
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    there = block < blocks
    best = tl.load(scores + row * blocks + block, mask=there, other=float("-inf"))
    where = tl.load(columns + row * blocks + block, mask=there, other=0x7FFFFFFF)
    column = tl.min(tl.where(best == tl.max(best, 0), where, 0x7FFFFFFF), 0)
    temperature = tl.load(temperatures + row)
    good = _row_top(tops, row, blocks, BLOCKS) > float("-inf")
    good &= (tl.load(positions + row) >= 0) & (temperature >= 0.0) & (temperature < float("inf"))
    if top_k is not None:
        good &= tl.load(top_k + row) >= 0
    if top_p is not None:
        good &= (tl.load(top_p + row) >= 0.0) & (tl.load(top_p + row) <= 1.0)
    if min_p is not None:
        good &= (tl.load(min_p + row) >= 0.0) & (tl.load(min_p + row) <= 1.0)
    tl.store(out + row, tl.where(good, column, -1).to(tl.int64))


@triton.jit(do_not_specialize=["n", "blocks"])
def _weight_kernel(x, temperatures, weights, n, blocks, BLOCK: tl.constexpr):
    take_turn()
    task = tl.program_id(0).to(tl.int64)
    row, block = task // blocks, task % blocks
    column = block * BLOCK + tl.arange(0, BLOCK)
    there = column < n
    top = tl.load(x + row * n).to(tl.float32)
    v = tl.load(x + row * n + column, mask=there, other=0.0).to(tl.float32)
    weight = exp(scaled(v, top, tl.load(temperatures + row)), True) * _UNIT
    weight = tl.where(weight >= 0.0, weight, 0.0)
    tl.store(weights + row * n + column, weight.to(tl.int64), mask=there)


_tops = RowKernel(_top_kernel, overlaps=FEW.value)
_scores = RowKernel(_score_kernel, overlaps=FEW.value)
_draws = RowKernel(_draw_kernel, overlaps=FEW.value)
_weights = RowKernel(_weight_kernel, overlaps=FEW.value)


def weights(x: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """exp((x - first) / temperature) in units of 2^-40 for rows whose first element is the top."""
    rows, n = x.shape
    out = torch.empty(rows, n, dtype=torch.int64, device=x.device)
    blocks = triton.cdiv(n, _BLOCK)
    _weights(rows * blocks, (x, temperature, out), (n, blocks), (_BLOCK,), 4, False)
    return out


def draw(
    x: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    keep: torch.Tensor | None,
) -> torch.Tensor:
    """The column that each row of contiguous x [rows, n] draws; keep: [rows, n] of bool.

    top_k and top_p are looked at for their ranges alone: what they leave is in keep.
    """
    rows, n = x.shape
    blocks = triton.cdiv(n, _BLOCK)
    held = triton.next_power_of_2(blocks)
    tops, scores = (torch.empty(rows * blocks, device=x.device) for _ in range(2))
    columns = torch.empty(rows * blocks, dtype=torch.int32, device=x.device)
    out = torch.empty(rows, dtype=torch.int64, device=x.device)
    bytes_kept = None if keep is None else keep.view(torch.uint8)
    _tops(rows * blocks, (x, tops), (n, blocks), (_BLOCK,), 4, False)
    tensors = (x, seeds, positions, temperature, min_p, bytes_kept, tops, scores, columns)
    _scores(rows * blocks, tensors, (n, blocks), (held, _BLOCK), 4, False)
    found = (tops, scores, columns, positions, temperature, top_k, top_p, min_p, out)
    _draws(rows, found, (blocks,), (held,), 1, False)
    return out


def _ranked(x: torch.Tensor, most: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The first columns of every row by rank: their logits and where they are."""
    if most is not None:
        return topk_rows(x, most, True)
    values, order = stock("sort.stable", "CUDA")(x, stable=True, dim=1, descending=True)
    return values.contiguous(), order


def _sample(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    most: int | None,
) -> torch.Tensor:
    shape = check_sample(logits, seeds, positions, temperature, top_k, top_p, min_p)
    if logits.dtype not in FLOATS:
        raise OpNotSupported(
            f"sample takes logits in {', '.join(map(str, FLOATS))}; got {logits.dtype}. "
            "Convert them with logits.float()"
        )
    x = rows_along(logits, -1)
    if not x.size(0):
        return seeds.new_empty(shape)
    seeds, positions, temperature = (
        t.reshape(-1).contiguous() for t in (seeds, positions, temperature)
    )
    top_k, top_p, min_p = (
        None if t is None else t.reshape(-1).contiguous() for t in (top_k, top_p, min_p)
    )
    keep = None
    if top_k is not None or top_p is not None:
        values, order = _ranked(x, most)
        remain = kept(weights(values, temperature), top_k, top_p, "CUDA")
        keep = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
        keep = stock("scatter.src", "CUDA")(keep, 1, order, remain)
    return draw(x, seeds, positions, temperature, top_k, top_p, min_p, keep).view(shape)


KERNELS = {
    "sample": Kernel(
        fn=_sample,
        guarantee=Guarantee.BATCH,
        dtypes=frozenset(FLOATS),
        order=undeclared("largest score with noise of (seed, position, column), lowest first"),
        portable=frozenset(FLOATS),
    )
}
