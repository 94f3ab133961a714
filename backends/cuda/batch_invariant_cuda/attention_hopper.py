"""Attention in bf16 and fp16 on Hopper for many rows, written in Gluon: the bits of its contract.

One warp copies blocks of queries, keys and values into rings of buffers; two groups of four warps
compute 64 rows each, so that the matrix units work for one while the other takes exponentials.
Order as in `attention_blocks`: blocks of 128 keys from the sequence's first, merged ascending.
"""

# ruff: noqa: RUF005  (compiled by Triton, which knows less of Python)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language import PropagateNan

from batch_invariant_cuda.attention_merge import BLOCK
from batch_invariant_cuda.attention_plan import ROWS

KEYS = BLOCK

_ROWS = gl.constexpr(ROWS)
_HALF = gl.constexpr(ROWS // 2)  # of a tile, to each computing group
_KEYS = gl.constexpr(KEYS)
_ALL = gl.constexpr(PropagateNan.ALL)
_LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _place(unit, heads, blocks, section):
    """A unit's head (of all batches) and block of rows.

    Heads whose keys fit the cache together are a section; in it the longest rows come first.
    """
    per = section * blocks
    head = unit // per * section
    inside = unit % per
    count = gl.minimum(section, heads - head)
    return head + inside % count, blocks - 1 - inside // count


@gluon.jit
def _turn(turn, units):
    """The unit of a program's turn: forwards and backwards in turns, so that long rows even out.

    Behind a program's last turn it is some unit: its first copies are made, and not used.
    """
    programs = gl.num_programs(0)
    own = gl.program_id(0)
    unit = turn * programs + gl.where(turn % 2 == 0, own, programs - 1 - own)
    return gl.minimum(unit, units - 1)


@gluon.jit
def _turns(units):
    """How many units a program has."""
    programs = gl.num_programs(0)
    whole = units // programs
    own = gl.program_id(0)
    place = gl.where(whole % 2 == 0, own, programs - 1 - own)
    return whole + (place < units - whole * programs).to(gl.int32)


@gluon.jit
def _planned(plan, head, q_heads, blocks, rows, mask_batch, mask_head):
    """Where the plan of a head's mask begins."""
    mask = head // q_heads * mask_batch + head % q_heads * mask_head
    return plan + mask.to(gl.int64) * (1 + 2 * blocks + rows)


@gluon.jit
def _walk(
    plan, head, block, q_heads, blocks, rows, keys, mask_batch, mask_head, CAUSAL: gl.constexpr
):  # fmt: skip
    """The first key of a tile, the blocks of keys that all its rows attend to, and those that some
    do: at least one, and the last may be cut."""
    start = 0
    full = 0
    end = keys
    if plan is not None:
        at = _planned(plan, head, q_heads, blocks, rows, mask_batch, mask_head)
        first = gl.load(at)
        start = gl.maximum(first, 0)
        full = gl.maximum(gl.load(at + 1 + 2 * block) - start, 0) // _KEYS
        end = gl.where(first < 0, 0, gl.load(at + 2 + 2 * block) - start)
    elif CAUSAL:
        end = gl.minimum(keys, block * _ROWS + _ROWS)
    return start, full, gl.maximum((end + _KEYS - 1) // _KEYS, 1)


@gluon.jit
def _copy(
    qd, kd, vd, plan, qbuf, kbuf, vbuf, q_full, q_free, k_full, k_free, v_full, v_free,
    heads, q_heads, group, rows, keys, blocks, section, units, mask_batch, mask_head,
    D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    step = 0
    turns = _turns(units)
    for turn in range(0, turns + 1):
        head, block = _place(_turn(turn, units), heads, blocks, section)
        start, _, end = _walk(
            plan, head, block, q_heads, blocks, rows, keys, mask_batch, mask_head, CAUSAL
        )
        batch, head = head // q_heads, head % q_heads
        kv_head = head // group
        end = gl.where(turn < turns, end, 1)
        slot = turn % 3
        mbarrier.wait(q_free.index(slot), (turn // 3 & 1) ^ 1)
        bar = q_full.index(slot)
        mbarrier.expect(bar, _ROWS * D * 2)
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(
                qd, [batch, head, block * _ROWS + half * _HALF, 0], bar,
                qbuf.index(slot * 2 + half),
            )  # fmt: skip
        for j in range(0, end):
            slot = step % STAGES
            phase = (step // STAGES & 1) ^ 1
            mbarrier.wait(k_free.index(slot), phase)
            bar = k_full.index(slot)
            mbarrier.expect(bar, _KEYS * D * 2)
            at = [batch, kv_head, start + j * _KEYS, 0]
            tma.async_copy_global_to_shared(kd, at, bar, kbuf.index(slot))
            if turn < turns:
                mbarrier.wait(v_free.index(slot), phase)
                bar = v_full.index(slot)
                mbarrier.expect(bar, _KEYS * D * 2)
                tma.async_copy_global_to_shared(vd, at, bar, vbuf.index(slot))
            step += 1


@gluon.jit
def _sum(p):
    """The sum of each row of p [rows, 128]: halves folded down to 8, neighbours, halves again."""
    ROWS: gl.constexpr = p.shape[0]
    p = gl.sum(gl.reshape(p, [ROWS, 2, 64]), 1)
    p = gl.sum(gl.reshape(p, [ROWS, 2, 32]), 1)
    p = gl.sum(gl.reshape(p, [ROWS, 2, 16]), 1)
    p = gl.sum(gl.reshape(p, [ROWS, 2, 8]), 1)
    p = gl.sum(gl.reshape(p, [ROWS, 4, 2]), 2)
    p = gl.sum(gl.reshape(p, [ROWS, 2, 2]), 1)
    return gl.sum(p, 1)


@gluon.jit
def cut(s, last, begin):
    """The scores of a block of keys, -inf behind each row's last key."""
    key = begin + gl.arange(0, _KEYS, gl.SliceLayout(0, s.type.layout))
    return gl.where(key[None, :] < last[:, None], s, float("-inf"))


@gluon.jit
def _weights(s, scale, dtype):
    """Maximum, denominator and weights of one block of keys, from its scores."""
    top = gl.max(s, 1) * scale
    base = gl.where(top == float("-inf"), 0.0, top)
    p = gl.exp2(s * scale - base[:, None])
    return top, gl.convert_layout(_sum(p), gl.SliceLayout(1, s.type.layout)), p.to(dtype)


@gluon.jit
def scores(q, kbuf, k_full, k_free, step, D: gl.constexpr, STAGES: gl.constexpr):
    """Begins the product of 64 queries and a block of keys."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _KEYS, 16])
    slot = step % STAGES
    mbarrier.wait(k_full.index(slot), step // STAGES & 1)
    k = kbuf.index(slot).reshape([_KEYS, D]).permute((1, 0))
    s = gl.zeros([_HALF, _KEYS], gl.float32, LAYOUT)
    return warpgroup_mma(q, k, s, use_acc=False, is_async=True)


@gluon.jit
def weigh(
    top, total, s, vbuf, v_full, step, scale, D: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Begins the weighted sum of a block of values; new maximum and sum, and the factors of both
    weighted sums."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    next_top, next_total, p = _weights(s, scale, vbuf.dtype)
    p = gl.convert_layout(p, gl.DotOperandLayout(0, LAYOUT, 2))
    slot = step % STAGES
    mbarrier.wait(v_full.index(slot), step // STAGES & 1)
    v = vbuf.index(slot).reshape([_KEYS, D])
    part = gl.zeros([_HALF, D], gl.float32, LAYOUT)
    part = warpgroup_mma(p, v, part, use_acc=False, is_async=True)
    highest = gl.maximum(top, next_top)
    base = gl.where(highest == float("-inf"), 0.0, highest)
    shrink, share = gl.exp2(top - base), gl.exp2(next_top - base)
    total = gl.fma(next_total, share, total * shrink)
    zero = gl.zeros([_HALF, D], gl.float32, LAYOUT)
    old = zero + gl.convert_layout(shrink, gl.SliceLayout(1, LAYOUT))[:, None]
    new = zero + gl.convert_layout(share, gl.SliceLayout(1, LAYOUT))[:, None]
    return highest, total, part, old, new


@gluon.jit
def step_on(
    top, total, acc, s, q, kbuf, vbuf, k_full, k_free, v_full, v_free, step, scale,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The state after a block of scores s, and the scores of the next block."""
    top, total, part, old, new = weigh(top, total, s, vbuf, v_full, step, scale, D, STAGES)
    part = warpgroup_mma_wait(0, deps=[part])
    mbarrier.arrive(v_free.index(step % STAGES))
    following = scores(q, kbuf, k_full, k_free, step + 1, D, STAGES)
    acc = gl.fma(part, new, acc * old)
    s = warpgroup_mma_wait(0, deps=[following])
    mbarrier.arrive(k_free.index((step + 1) % STAGES))
    return top, total, acc, s


@gluon.jit
def larger(a, b):
    return gl.maximum(a, b, propagate_nan=_ALL)


@gluon.jit
def _finish(od, lse, buf, top, total, acc, head, q_heads, rows, row, at):
    """Writes 64 rows; the copy of the results goes on by itself."""
    D: gl.constexpr = acc.shape[1]
    LAYOUT: gl.constexpr = acc.type.layout
    none = total == 0.0
    share = gl.div_rn(1.0, gl.where(none, 1.0, total))
    e = gl.where(none, float("-inf"), (gl.log2(total) + top) * _LN_2)
    gl.store(lse + head.to(gl.int64) * rows + row, e, mask=row < rows)
    # Plus 0: blocks that change nothing make +0 of -0, and which are walked may vary.
    share = gl.convert_layout(share, gl.SliceLayout(1, LAYOUT))[:, None]
    zero = gl.zeros([_HALF, D], gl.float32, LAYOUT)
    y = gl.fma(acc, zero + share, zero)
    buf.reshape([_HALF, D]).store(y.to(od.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(od, [head // q_heads, head % q_heads, at, 0], buf)


@gluon.jit
def _attend(
    od, lse, odd, plan, qbuf, kbuf, vbuf, q_full, q_free, k_full, k_free, v_full, v_free,
    heads, q_heads, rows, keys, blocks, section, units, mask_batch, mask_head, scale,
    WHICH: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """One computing group of four warps: one half of the rows of every tile."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _KEYS, 16])
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    step = 0
    largest = gl.zeros([_HALF], gl.float32, gl.SliceLayout(1, LAYOUT))
    mbarrier.wait(q_full.index(0), 0)
    q = qbuf.index(WHICH).reshape([_HALF, D])
    s = scores(q, kbuf, k_full, k_free, 0, D, STAGES)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_free.index(0))
    for turn in range(0, _turns(units)):
        head, block = _place(_turn(turn, units), heads, blocks, section)
        start, full, end = _walk(
            plan, head, block, q_heads, blocks, rows, keys, mask_batch, mask_head, CAUSAL
        )
        at = block * _ROWS + WHICH * _HALF
        row = at + gl.arange(0, _HALF, ROW)
        # The key behind each row's last one.
        last = gl.full([_HALF], keys, gl.int32, ROW)
        if plan is not None:
            ends = _planned(plan, head, q_heads, blocks, rows, mask_batch, mask_head)
            last = gl.load(ends + 1 + 2 * blocks + row, mask=row < rows, other=0)
        elif CAUSAL:
            last = gl.minimum(last, row + 1)
        buf = qbuf.index(turn % 3 * 2 + WHICH)
        q = buf.reshape([_HALF, D])
        top = gl.full([_HALF], float("-inf"), gl.float32, ROW)
        total = gl.zeros([_HALF], gl.float32, ROW)
        acc = gl.zeros([_HALF, D], gl.float32, LAYOUT)
        # One loop for whole blocks and those that are cut: of two, ptxas computed the address of q
        # in front of the first alone.
        for j in range(0, end - 1):
            if plan is not None:  # noqa: SIM102  (a constexpr, and a number on the device)
                if j >= full:
                    s = cut(s, last, start + j * _KEYS)
            top, total, acc, s = step_on(
                top, total, acc, s, q, kbuf, vbuf, k_full, k_free, v_full, v_free, step, scale,
                D, STAGES,
            )  # fmt: skip
            step += 1
        s = cut(s, last, start + (end - 1) * _KEYS)
        top, total, part, old, new = weigh(top, total, s, vbuf, v_full, step, scale, D, STAGES)
        # The results of the turn before have left its buffer by now.
        tma.store_wait(0)
        mbarrier.arrive(q_free.index((turn + 2) % 3), pred=turn > 0)
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(v_free.index(step % STAGES))
        step += 1
        # The first scores of the next turn are computed while this one's results are written.
        slot = (turn + 1) % 3
        mbarrier.wait(q_full.index(slot), (turn + 1) // 3 & 1)
        q = qbuf.index(slot * 2 + WHICH).reshape([_HALF, D])
        following = scores(q, kbuf, k_full, k_free, step, D, STAGES)
        acc = gl.fma(part, new, acc * old)
        if odd is not None:
            largest = larger(largest, gl.reduce(gl.abs(acc), 1, larger))
        _finish(od, lse, buf, top, total, acc, head, q_heads, rows, row, at)
        s = warpgroup_mma_wait(0, deps=[following])
        mbarrier.arrive(k_free.index(step % STAGES))
    tma.store_wait(0)
    if odd is not None:
        finite = gl.reduce(largest, 0, larger) < float("inf")
        gl.store(odd + gl.program_id(0) * 2 + WHICH, gl.where(finite, 0, 1).to(gl.int8))


@gluon.jit(
    do_not_specialize=[
        "heads", "q_heads", "group", "rows", "keys", "blocks", "section", "units", "mask_batch",
        "mask_head",
    ]
)  # fmt: skip
def attention_ring(
    qd, kd, vd, od, lse, odd, plan,
    heads, q_heads, group, rows, keys, blocks, section, units, mask_batch, mask_head,
    scale: gl.float32,
    D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """128 rows of a head at a time; heads: of all batches; blocks: of rows.

    plan: of a mask, as `attention_plan` makes it; results of heads without a plan mean nothing.
    odd: where masked keys may have odd values; it says for each computing group whether some result
    of its rows is not finite.
    """
    qbuf = gl.allocate_shared_memory(qd.dtype, [6] + qd.block_type.shape, qd.layout)
    kbuf = gl.allocate_shared_memory(kd.dtype, [STAGES] + kd.block_type.shape, kd.layout)
    vbuf = gl.allocate_shared_memory(vd.dtype, [STAGES] + vd.block_type.shape, vd.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(3):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_attend, (
                od, lse, odd, plan, qbuf, kbuf, vbuf,
                q_full, q_free, k_full, k_free, v_full, v_free, heads, q_heads,
                rows, keys, blocks, section, units, mask_batch, mask_head, scale,
                0, D, STAGES, CAUSAL,
            )),
            (_attend, (
                od, lse, odd, plan, qbuf, kbuf, vbuf,
                q_full, q_free, k_full, k_free, v_full, v_free, heads, q_heads,
                rows, keys, blocks, section, units, mask_batch, mask_head, scale,
                1, D, STAGES, CAUSAL,
            )),
            (_copy, (
                qd, kd, vd, plan, qbuf, kbuf, vbuf, q_full, q_free, k_full, k_free, v_full, v_free,
                heads, q_heads, group, rows, keys, blocks, section, units, mask_batch, mask_head,
                D, STAGES, CAUSAL,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
