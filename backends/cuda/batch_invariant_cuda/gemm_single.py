"""fp32 products on Hopper: chains of fused multiply-adds over ascending k, with the CPU's bits.

One warp copies blocks of both operands into a ring of buffers, in slices of 16 along k; one or two
groups of four warps multiply them on the ordinary arithmetic units. Chunks of k have a chain each,
in one program or in one for each chunk, and are added in ascending order.
"""

# ruff: noqa: RUF005, SIM102, SIM108, SIM113  (compiled by Triton, which knows less of Python)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from batch_invariant_cuda.gemm_hopper import ascending, unit_of

SLICE = gl.constexpr(16)


@gluon.jit
def _copy(
    ad, bd, abuf, bbuf, full, free, lo, hi, pm, pn,
    BM: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr, SLICES: gl.constexpr,
    STAGES: gl.constexpr, A_K: gl.constexpr, B_K: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    BYTES: gl.constexpr = (BM * GROUPS + BN) * SLICES * SLICE * 4
    if OVERLAP:
        gdc_wait()  # for what was launched before and may still run
        gdc_launch_dependents()
    step = 0
    for k in range(lo, hi, SLICES * SLICE):
        slot = step % STAGES
        mbarrier.wait(free.index(slot), (step // STAGES & 1) ^ 1)
        bar = full.index(slot)
        mbarrier.expect(bar, BYTES)
        for j in gl.static_range(SLICES):
            at = k + j * SLICE
            for g in gl.static_range(GROUPS):
                m0 = (pm * GROUPS + g) * BM
                to = abuf.index((slot * SLICES + j) * GROUPS + g)
                if A_K:
                    tma.async_copy_global_to_shared(ad, [m0, at], bar, to)
                else:
                    tma.async_copy_global_to_shared(ad, [at, m0], bar, to)
            if B_K:
                tma.async_copy_global_to_shared(
                    bd, [pn * BN, at], bar, bbuf.index(slot * SLICES + j)
                )
            else:
                tma.async_copy_global_to_shared(
                    bd, [at, pn * BN], bar, bbuf.index(slot * SLICES + j)
                )
        step += 1


@gluon.jit
def _finish(
    acc, c, add, row, col, inside, N, sdm, sdn, alpha, beta,
    BM: gl.constexpr, BN: gl.constexpr, LAYOUT: gl.constexpr,
    HAS_ADD: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """alpha * sum, then fma(beta, addend, that); every NaN becomes the one quiet NaN."""
    if SCALED:
        acc = acc * alpha
    if HAS_ADD:
        addend = gl.load(add + row * sdm + col * sdn, mask=inside, other=0.0)
        acc = gl.fma(gl.full([BM, BN], 0.0, gl.float32, LAYOUT) + beta, addend, acc)
    acc = gl.where(acc != acc, float("nan"), acc)
    gl.store(c + row.to(gl.int64) * N + col, acc, mask=inside)


@gluon.jit
def _multiply(
    abuf, bbuf, full, free, c, add, ws, count, M, N, K, chunk, pm, pn, first, last, splits, spread,
    sdm, sdn, alpha, beta,
    WHICH: gl.constexpr, BM: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr,
    SLICES: gl.constexpr, STAGES: gl.constexpr, A_K: gl.constexpr, B_K: gl.constexpr,
    ROW_WARPS: gl.constexpr, CHUNKED: gl.constexpr, SPLIT: gl.constexpr, FEW: gl.constexpr,
    APART: gl.constexpr, OVERLAP: gl.constexpr, HAS_ADD: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """One multiplying group of four warps: rows WHICH * BM and on of the tile.

    It adds the chunks from `first` up to `last`; `spread` numbers the tiles whose chunks are
    computed by several programs, of which the last to arrive adds what all left in the workspace.
    """
    # Lanes take columns that lie side by side: their reads meet different banks.
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [ROW_WARPS, 4 // ROW_WARPS], [1, 0])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 0)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, LAYOUT, 0)
    total = gl.zeros([BM, BN], gl.float32, LAYOUT)
    if OVERLAP:
        gdc_wait()
    step = 0
    for part in range(first, last):
        acc = gl.zeros([BM, BN], gl.float32, LAYOUT)
        lo = part * chunk
        for _ in range(lo, gl.minimum(lo + chunk, K), SLICES * SLICE):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            for j in gl.static_range(SLICES):
                x = abuf.index((slot * SLICES + j) * GROUPS + WHICH)
                y = bbuf.index(slot * SLICES + j)
                if not A_K:
                    x = x.permute((1, 0))
                if B_K:
                    y = y.permute((1, 0))
                acc = gl.dot_fma(x.load(LEFT), y.load(RIGHT), acc)
            mbarrier.arrive(free.index(slot))
            step += 1
        if CHUNKED:
            # The first chain is the sum so far; it is not added to zero, which would lose -0.
            total = gl.where(part > first, total + acc, acc)
        else:
            total = acc
    row = ((pm * GROUPS + WHICH) * BM + gl.arange(0, BM, gl.SliceLayout(1, LAYOUT)))[:, None]
    col = (pn * BN + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT)))[None, :]
    inside = (row < M) & (col < N)
    done = True
    if SPLIT:
        if last - first < splits:
            SIZE: gl.constexpr = BM * BN
            mine = spread * GROUPS + WHICH
            place = ws + mine.to(gl.int64) * splits * SIZE
            local = (
                gl.arange(0, BM, gl.SliceLayout(1, LAYOUT))[:, None] * BN
                + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))[None, :]
            )
            gl.store(place + first * SIZE + local, total, mask=inside)
            if APART:
                done = False
            else:
                gl.thread_barrier()
                arrived = gl.atomic_add(count + mine, 1, sem="acq_rel", scope="gpu")
                done = arrived == splits - 1
                if done:
                    total = ascending(place, local, splits, inside, SIZE, FEW)
                    gl.store(count + mine, 0)
    if done:
        _finish(
            total, c, add, row, col, inside, N, sdm, sdn, alpha, beta, BM, BN, LAYOUT,
            HAS_ADD, SCALED,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "whole"])
def gemm_fma(
    ad, bd, c, add, ws, count, M, N, K, chunk, whole, sdm, sdn,
    alpha: gl.float32, beta: gl.float32,
    BM: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr, SLICES: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, A_K: gl.constexpr, B_K: gl.constexpr,
    ROW_WARPS: gl.constexpr, CHUNKED: gl.constexpr, SPLIT: gl.constexpr, FEW: gl.constexpr,
    APART: gl.constexpr, OVERLAP: gl.constexpr, HAS_ADD: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """Tiles of BM * GROUPS rows and BN columns; SLICES * 16 of k in a buffer.

    One program for each of the first `whole` tiles, and, if SPLIT, one for each chunk of a later.
    """
    nm = gl.cdiv(M, BM * GROUPS)
    nn = gl.cdiv(N, BN)
    splits = gl.cdiv(K, chunk)
    tile, pm, pn, first, last = unit_of(gl.program_id(0), whole, splits, nm, nn, GROUP)
    lo = first * chunk
    hi = gl.minimum(last * chunk, K)
    abuf = gl.allocate_shared_memory(
        gl.float32, [STAGES * SLICES * GROUPS] + ad.block_type.shape, ad.layout
    )
    bbuf = gl.allocate_shared_memory(gl.float32, [STAGES * SLICES] + bd.block_type.shape, bd.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    gl.thread_barrier()
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_multiply, (
                    abuf, bbuf, full, free, c, add, ws, count, M, N, K, chunk, pm, pn, first, last,
                    splits, tile - whole, sdm, sdn, alpha, beta, 0, BM, GROUPS, BN, SLICES,
                    STAGES, A_K, B_K, ROW_WARPS, CHUNKED, SPLIT, FEW, APART, OVERLAP,
                    HAS_ADD, SCALED,
                )),
                (_copy, (
                    ad, bd, abuf, bbuf, full, free, lo, hi, pm, pn,
                    BM, GROUPS, BN, SLICES, STAGES, A_K, B_K, OVERLAP,
                )),
            ],
            [1],
            [40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply, (
                    abuf, bbuf, full, free, c, add, ws, count, M, N, K, chunk, pm, pn, first, last,
                    splits, tile - whole, sdm, sdn, alpha, beta, 0, BM, GROUPS, BN, SLICES,
                    STAGES, A_K, B_K, ROW_WARPS, CHUNKED, SPLIT, FEW, APART, OVERLAP,
                    HAS_ADD, SCALED,
                )),
                (_multiply, (
                    abuf, bbuf, full, free, c, add, ws, count, M, N, K, chunk, pm, pn, first, last,
                    splits, tile - whole, sdm, sdn, alpha, beta, 1, BM, GROUPS, BN, SLICES,
                    STAGES, A_K, B_K, ROW_WARPS, CHUNKED, SPLIT, FEW, APART, OVERLAP,
                    HAS_ADD, SCALED,
                )),
                (_copy, (
                    ad, bd, abuf, bbuf, full, free, lo, hi, pm, pn,
                    BM, GROUPS, BN, SLICES, STAGES, A_K, B_K, OVERLAP,
                )),
            ],
            [4, 1],
            [232, 40],
        )  # fmt: skip
