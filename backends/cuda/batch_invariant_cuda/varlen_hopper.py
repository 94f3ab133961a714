"""Attention over sequences in bf16 and fp16 on Hopper for many rows: `attention_hopper` by a list.

The copying warp claims tiles from the list of `varlen_plan`, where a counter hands them out, so
that sequences of any lengths keep all programs busy; the computing groups learn of a tile together
with its queries. Which program computes a tile changes no bit. Keys lie anywhere that bulk copies
reach: at an offset in packed storage or in pages, of which a block of 128 keys is several. Results
are copied in bulk too, but for the last rows of a sequence, behind which another one may begin.
"""

# ruff: noqa: RUF005  (compiled by Triton, which knows less of Python)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from batch_invariant_cuda.attention_hopper import (
    KEYS,
    cut,
    larger,
    scores,
    step_on,
    weigh,
)
from batch_invariant_cuda.attention_plan import ROWS
from batch_invariant_cuda.varlen_pages import blocks_of, boxes, copy_block, pages_of
from batch_invariant_cuda.varlen_plan import ENTRY
from batch_invariant_cuda.varlen_scores import capped, first_block

_ROWS = gl.constexpr(ROWS)
_HALF = gl.constexpr(ROWS // 2)  # of a tile, to each computing group
_KEYS = gl.constexpr(KEYS)
_ENTRY = gl.constexpr(ENTRY)
# Lanes that hold what the list does not: the head, and whether there is a tile at all.
_HEAD = gl.constexpr(ENTRY)
_GOING = gl.constexpr(ENTRY + 1)
_LOG2_E = gl.constexpr(1.4426950408889634)
_LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _entry(plan, unit, heads, tiles, lane):
    """The numbers of a unit's tile, a number a lane; the last tiles of the list come first."""
    tile = gl.maximum(tiles - 1 - unit // heads, 0)
    return gl.load(plan + (tile + 1) * _ENTRY + lane, mask=lane < _ENTRY, other=0)


@gluon.jit
def _claim(plan, lane):
    """Counts one more unit as taken; lane 0 has how many were before."""
    return gl.atomic_add(plan + 1 + lane * 0, lane * 0 + 1, lane == 0, sem="relaxed")


@gluon.jit
def _told(order, slot, NUMBER: gl.constexpr, WARPS: gl.constexpr = 1):
    """A number of the tile of a turn, from what the copying warp left in shared memory."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return gl.max(order.index(slot * 32 + NUMBER).load(ONE), 0)


@gluon.jit
def _copy(
    qd, kd, vd, plan, table, order, qbuf, kbuf, vbuf,
    q_full, q_free, k_full, k_free, v_full, v_free, heads, group, columns, page_size, pages,
    window, D: gl.constexpr, PAGE: gl.constexpr, ONE: gl.constexpr, STAGES: gl.constexpr,
    WINDOW: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    ORDER: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    lane = gl.arange(0, 32, LANES)
    per = page_size // PAGE
    step = 0
    turn = 0
    tiles = gl.load(plan)
    units = tiles * heads
    unit = gl.program_id(0)
    entry = _entry(plan, unit, heads, tiles, lane)
    claimed = _claim(plan, lane)
    going = units >= 0
    while going:
        # Behind a program's last unit one tile of queries and one block of keys are copied in vain.
        going = unit < units
        now = gl.where(lane == _HEAD, unit % heads, entry)
        now = gl.where(lane == _GOING, going.to(gl.int32), now)
        # What the next turn needs is on its way while this one's blocks are copied.
        unit = gl.num_programs(0) + gl.max(gl.where(lane == 0, claimed, 0), 0)
        entry = _entry(plan, unit, heads, tiles, lane)
        claimed = _claim(plan, lane)
        slot = turn % 3
        mbarrier.wait(q_free.index(slot), (turn // 3 & 1) ^ 1)
        order._reinterpret(gl.int32, [3, 32], ORDER).index(slot).store(now)
        gl.thread_barrier()
        head, end = _told(order, slot, _HEAD), _told(order, slot, 7)
        q_batch, q_row = _told(order, slot, 0), _told(order, slot, 1)
        batch, first = _told(order, slot, 3), _told(order, slot, 4)
        end = gl.where(going, end, 1)
        begin = 0
        if WINDOW:
            begin = first_block(_told(order, slot, 5), window, end)
        kv_head = head // group
        held = pages_of(table, batch, begin, columns, per, PAGE, ONE)
        bar = q_full.index(slot)
        mbarrier.expect(bar, _ROWS * D * 2)
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(
                qd, [q_batch, head, q_row + half * _HALF, 0], bar, qbuf.index(slot * 2 + half)
            )
        for j in range(begin, end):
            ahead = pages_of(table, batch, j + 1, columns, per, PAGE, ONE)
            slot = step % STAGES
            phase = (step // STAGES & 1) ^ 1
            mbarrier.wait(k_free.index(slot), phase)
            copy_block(
                kd, kbuf, slot, k_full, held, batch, kv_head, first, j, per, pages, D, PAGE, ONE
            )
            if going:
                mbarrier.wait(v_free.index(slot), phase)
                copy_block(
                    vd, vbuf, slot, v_full, held, batch, kv_head, first, j, per, pages, D, PAGE, ONE
                )
            step += 1
            held = ahead
        turn += 1


@gluon.jit
def _cut(s, low, last, begin, WINDOW: gl.constexpr):
    """The scores of a block of keys, -inf outside of what each row sees."""
    s = cut(s, last, begin)
    if WINDOW:
        key = begin + gl.arange(0, _KEYS, gl.SliceLayout(0, s.type.layout))
        s = gl.where(key[None, :] >= low[:, None], s, float("-inf"))
    return s


@gluon.jit
def _with_sink(top, total, acc, sinks, head, there):
    """The sink as a last key that has no value, if the rows are of a sequence."""
    sink = gl.load(sinks + head).to(gl.float32) * _LOG2_E
    sink = gl.where(there, sink, float("-inf"))
    highest = gl.maximum(top, sink + gl.zeros_like(top))
    base = gl.where(highest == float("-inf"), 0.0, highest)
    shrink, share = gl.exp2(top - base), gl.exp2(sink - base)
    total = gl.fma(gl.zeros_like(total) + gl.where(there, 1.0, 0.0), share, total * shrink)
    ROW: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    shrink, share = gl.convert_layout(shrink, ROW), gl.convert_layout(share, ROW)
    zero = gl.zeros_like(acc)
    return highest, total, gl.fma(zero, zero + share[:, None], acc * shrink[:, None])


@gluon.jit
def _finish(
    od, out, buf, top, total, acc, batch, head, heads, valid, q_row, queries, to_lse, row,
    WHICH: gl.constexpr,
):  # fmt: skip
    """Writes those of 64 rows that belong to the sequence; a copy of all goes on by itself."""
    D: gl.constexpr = acc.shape[1]
    LAYOUT: gl.constexpr = acc.type.layout
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    none = total == 0.0
    share = gl.div_rn(1.0, gl.where(none, 1.0, total))
    e = gl.where(none, float("-inf"), (gl.log2(total) + top) * _LN_2)
    gl.store(to_lse + row, e, mask=row < valid)
    # Plus 0: blocks that change nothing make +0 of -0, and which are walked may vary.
    share = gl.convert_layout(share, gl.SliceLayout(1, LAYOUT))[:, None]
    zero = gl.zeros([_HALF, D], gl.float32, LAYOUT)
    y = gl.fma(acc, zero + share, zero)
    held = buf.reshape([_HALF, D])
    held.store(y.to(out.dtype.element_ty))
    if valid >= WHICH * _HALF + _HALF:
        fence_async_shared()
        tma.async_copy_shared_to_global(od, [batch, head, q_row + WHICH * _HALF, 0], buf)
    else:
        gl.thread_barrier()
        results = held.load(STORE)
        fence_async_shared()
        index = WHICH * _HALF + gl.arange(0, _HALF, gl.SliceLayout(1, STORE))
        d = gl.arange(0, D, gl.SliceLayout(0, STORE))
        place = batch.to(gl.int64) * queries + q_row + index.to(gl.int64)
        at = out + (place * heads + head) * D
        gl.store(at[:, None] + d[None, :], results, mask=(index < valid)[:, None])


@gluon.jit
def _attend(
    od, out, lse, odd, plan, sinks, order, qbuf, kbuf, vbuf,
    q_full, q_free, k_full, k_free, v_full, v_free,
    heads, queries, window, lse_batch, lse_head, scale, cap,
    WHICH: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, CAP: gl.constexpr,
):  # fmt: skip
    """One computing group of four warps: one half of the rows of every tile."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _KEYS, 16])
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    step = 0
    by = scale
    if CAP:
        by = 1.0
    largest = gl.zeros([_HALF], gl.float32, gl.SliceLayout(1, LAYOUT))
    turn = 0
    mbarrier.wait(q_full.index(0), 0)
    going = _told(order, 0, _GOING, 4)
    q = qbuf.index(WHICH).reshape([_HALF, D])
    s = scores(q, kbuf, k_full, k_free, 0, D, STAGES)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_free.index(0))
    while going != 0:
        slot = turn % 3
        head, batch = _told(order, slot, _HEAD, 4), _told(order, slot, 0, 4)
        q_row, valid = _told(order, slot, 1, 4), _told(order, slot, 2, 4)
        seen = _told(order, slot, 5, 4)
        keys, end = _told(order, slot, 6, 4), _told(order, slot, 7, 4)
        row = WHICH * _HALF + gl.arange(0, _HALF, ROW)
        # The key behind each row's last one.
        last = gl.full([_HALF], keys, gl.int32, ROW)
        full = keys // _KEYS
        if CAUSAL:
            last = gl.minimum(last, seen + row)
            full = gl.maximum(gl.minimum(keys, seen), 0) // _KEYS
        begin = 0
        # The first key that each row sees, and the blocks of which some row sees but a part.
        low = last * 0
        cut_off = 0
        if WINDOW:
            begin = first_block(seen, window, end)
            low = gl.maximum(seen + row - window, 0)
            cut_off = (gl.maximum(seen + _ROWS - 1 - window, 0) + _KEYS - 1) // _KEYS
        buf = qbuf.index(turn % 3 * 2 + WHICH)
        q = buf.reshape([_HALF, D])
        top = gl.full([_HALF], float("-inf"), gl.float32, ROW)
        total = gl.zeros([_HALF], gl.float32, ROW)
        acc = gl.zeros([_HALF, D], gl.float32, LAYOUT)
        for j in range(begin, end - 1):
            if CAP:
                s = capped(s, scale, cap)
            if (j >= full) | (j < cut_off):
                s = _cut(s, low, last, j * _KEYS, WINDOW)
            top, total, acc, s = step_on(
                top, total, acc, s, q, kbuf, vbuf, k_full, k_free, v_full, v_free, step, by,
                D, STAGES,
            )  # fmt: skip
            step += 1
        if CAP:
            s = capped(s, scale, cap)
        s = _cut(s, low, last, (end - 1) * _KEYS, WINDOW)
        top, total, part, old, new = weigh(top, total, s, vbuf, v_full, step, by, D, STAGES)
        # The results of the turn before have left its buffer by now.
        tma.store_wait(0)
        gl.thread_barrier()
        mbarrier.arrive(q_free.index((turn + 2) % 3), pred=turn > 0)
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(v_free.index(step % STAGES))
        step += 1
        # The first scores of the next turn are computed while this one's results are written.
        slot = (turn + 1) % 3
        mbarrier.wait(q_full.index(slot), (turn + 1) // 3 & 1)
        going = _told(order, slot, _GOING, 4)
        q = qbuf.index(slot * 2 + WHICH).reshape([_HALF, D])
        following = scores(q, kbuf, k_full, k_free, step, D, STAGES)
        acc = gl.fma(part, new, acc * old)
        if odd is not None:
            most = gl.reduce(gl.abs(acc), 1, larger)
            index = WHICH * _HALF + gl.arange(0, _HALF, gl.SliceLayout(1, LAYOUT))
            largest = larger(largest, gl.where(index < valid, most, 0.0))
        if sinks is not None:
            top, total, acc = _with_sink(top, total, acc, sinks, head, keys >= 0)
        to_lse = lse + batch.to(gl.int64) * lse_batch + head.to(gl.int64) * lse_head + q_row
        _finish(
            od, out, buf, top, total, acc, batch, head, heads, valid, q_row, queries, to_lse, row,
            WHICH,
        )  # fmt: skip
        s = warpgroup_mma_wait(0, deps=[following])
        mbarrier.arrive(k_free.index(step % STAGES))
        turn += 1
    tma.store_wait(0)
    if odd is not None:
        finite = gl.reduce(largest, 0, larger) < float("inf")
        gl.store(odd + gl.program_id(0) * 2 + WHICH, gl.where(finite, 0, 1).to(gl.int8))


@gluon.jit(
    do_not_specialize=[
        "heads", "group", "queries", "columns", "page_size", "pages", "window", "lse_batch",
        "lse_head",
    ]
)  # fmt: skip
def sequences_ring(
    qd, kd, vd, od, out, lse, odd, plan, table, sinks,
    heads, group, queries, columns, page_size, pages, window, lse_batch, lse_head,
    scale: gl.float32, cap: gl.float32,
    D: gl.constexpr, PAGE: gl.constexpr, ONE: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, CAP: gl.constexpr,
):  # fmt: skip
    """128 rows of a head at a time. plan: the list of `varlen_plan`. table: of pages.

    PAGE: rows of a box; ONE: of a page, too.

    odd: as of `attention_ring`. queries: of a batch in storage, 0 where sequences are packed.
    """
    qbuf = gl.allocate_shared_memory(qd.dtype, [6] + qd.block_type.shape, qd.layout)
    k_boxes, v_boxes = boxes(kd, STAGES, D, PAGE), boxes(vd, STAGES, D, PAGE)
    kbuf, vbuf = blocks_of(k_boxes, STAGES, D), blocks_of(v_boxes, STAGES, D)
    ORDER: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    order = gl.allocate_shared_memory(gl.int32, [3 * 32, 1], ORDER)
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
                od, out, lse, odd, plan, sinks, order, qbuf, kbuf, vbuf,
                q_full, q_free, k_full, k_free, v_full, v_free,
                heads, queries, window, lse_batch, lse_head, scale, cap,
                0, D, STAGES, CAUSAL, WINDOW, CAP,
            )),
            (_attend, (
                od, out, lse, odd, plan, sinks, order, qbuf, kbuf, vbuf,
                q_full, q_free, k_full, k_free, v_full, v_free,
                heads, queries, window, lse_batch, lse_head, scale, cap,
                1, D, STAGES, CAUSAL, WINDOW, CAP,
            )),
            (_copy, (
                qd, kd, vd, plan, table, order, qbuf, k_boxes, v_boxes,
                q_full, q_free, k_full, k_free, v_full, v_free,
                heads, group, columns, page_size, pages, window, D, PAGE, ONE, STAGES, WINDOW,
            )),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
