"""fp32 products on Hopper: chains of fused multiply-adds over ascending k, with the CPU's bits.

One warp copies blocks of both operands into a ring of buffers, in slices of 16 along k; one or two
groups of four warps multiply them on the ordinary arithmetic units.
"""

# ruff: noqa: RUF005, SIM113  (compiled by Triton, which knows less of Python)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

SLICE = gl.constexpr(16)


@gluon.jit
def _copy(
    ad, bd, abuf, bbuf, full, free, K, pm, pn,
    BM: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr, SLICES: gl.constexpr,
    STAGES: gl.constexpr, A_K: gl.constexpr, B_K: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    BYTES: gl.constexpr = (BM * GROUPS + BN) * SLICES * SLICE * 4
    step = 0
    for k in range(0, K, SLICES * SLICE):
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
def _multiply(
    abuf, bbuf, full, free, c, add, M, N, K, pm, pn, sdm, sdn, alpha, beta,
    WHICH: gl.constexpr, BM: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr,
    SLICES: gl.constexpr, STAGES: gl.constexpr, A_K: gl.constexpr, B_K: gl.constexpr,
    ROW_WARPS: gl.constexpr, HAS_ADD: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """One multiplying group of four warps: rows WHICH * BM and on of the tile."""
    # Lanes take columns that lie side by side: their reads meet different banks.
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [ROW_WARPS, 4 // ROW_WARPS], [1, 0])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 0)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, LAYOUT, 0)
    acc = gl.zeros([BM, BN], gl.float32, LAYOUT)
    step = 0
    for _ in range(0, K, SLICES * SLICE):
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
    row = ((pm * GROUPS + WHICH) * BM + gl.arange(0, BM, gl.SliceLayout(1, LAYOUT)))[:, None]
    col = (pn * BN + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT)))[None, :]
    inside = (row < M) & (col < N)
    if SCALED:
        acc = acc * alpha
    if HAS_ADD:
        addend = gl.load(add + row * sdm + col * sdn, mask=inside, other=0.0)
        acc = gl.fma(gl.full([BM, BN], 0.0, gl.float32, LAYOUT) + beta, addend, acc)
    acc = gl.where(acc != acc, float("nan"), acc)
    gl.store(c + row.to(gl.int64) * N + col, acc, mask=inside)


@gluon.jit(do_not_specialize=["M"])
def gemm_fma(
    ad, bd, c, add, M, N, K, sdm, sdn, alpha: gl.float32, beta: gl.float32,
    BM: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr, SLICES: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, A_K: gl.constexpr, B_K: gl.constexpr,
    ROW_WARPS: gl.constexpr, HAS_ADD: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """Tiles of BM * GROUPS rows and BN columns, one program each; SLICES * 16 of k in a buffer."""
    nm = gl.cdiv(M, BM * GROUPS)
    nn = gl.cdiv(N, BN)
    per = GROUP * nn
    top = gl.program_id(0) // per * GROUP
    rows = gl.minimum(nm - top, GROUP)
    pm = top + (gl.program_id(0) % per) % rows
    pn = (gl.program_id(0) % per) // rows
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
                    abuf, bbuf, full, free, c, add, M, N, K, pm, pn, sdm, sdn, alpha, beta,
                    0, BM, GROUPS, BN, SLICES, STAGES, A_K, B_K, ROW_WARPS, HAS_ADD, SCALED,
                )),
                (_copy, (
                    ad, bd, abuf, bbuf, full, free, K, pm, pn,
                    BM, GROUPS, BN, SLICES, STAGES, A_K, B_K,
                )),
            ],
            [1],
            [40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply, (
                    abuf, bbuf, full, free, c, add, M, N, K, pm, pn, sdm, sdn, alpha, beta,
                    0, BM, GROUPS, BN, SLICES, STAGES, A_K, B_K, ROW_WARPS, HAS_ADD, SCALED,
                )),
                (_multiply, (
                    abuf, bbuf, full, free, c, add, M, N, K, pm, pn, sdm, sdn, alpha, beta,
                    1, BM, GROUPS, BN, SLICES, STAGES, A_K, B_K, ROW_WARPS, HAS_ADD, SCALED,
                )),
                (_copy, (
                    ad, bd, abuf, bbuf, full, free, K, pm, pn,
                    BM, GROUPS, BN, SLICES, STAGES, A_K, B_K,
                )),
            ],
            [4, 1],
            [232, 40],
        )  # fmt: skip
