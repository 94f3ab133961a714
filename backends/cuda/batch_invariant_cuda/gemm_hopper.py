"""The product on Hopper with separate warps for copying and multiplying, written in Gluon.

One warp copies blocks of both operands into a ring of buffers, one or two groups of four warps
multiply them; the copies of the next chunk or tile go on while a result is stored. Orders as in
`gemm`: a chain of matrix-unit steps over ascending k, or chains of chunks added in ascending order.
"""

# ruff: noqa: RUF005, SIM102  (compiled by Triton, which knows less of Python)
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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@gluon.jit
def unit_of(unit, whole, splits, nm, nn, GROUP: gl.constexpr):
    """A unit's tile and chunks: all chunks of one of the first `whole` tiles, or one of a later."""
    later = unit - whole
    is_whole = later < 0
    tile = gl.where(is_whole, unit, whole + later // splits)
    first = gl.where(is_whole, 0, later % splits)
    last = gl.where(is_whole, splits, first + 1)
    per = GROUP * nn
    top = tile // per * GROUP
    rows = gl.minimum(nm - top, GROUP)
    return tile, top + (tile % per) % rows, (tile % per) // rows, first, last


@gluon.jit
def ascending(place, local, splits, inside, SIZE: gl.constexpr, FEW: gl.constexpr):
    """The sum of the chains that all chunks of a tile left in the workspace."""
    total = gl.load(place + local, mask=inside, cache_modifier=".cg")
    if FEW:
        for i in gl.static_range(1, FEW):
            total += gl.load(place + i * SIZE + local, mask=inside, cache_modifier=".cg")
    else:
        for i in range(1, splits):
            total += gl.load(place + i * SIZE + local, mask=inside, cache_modifier=".cg")
    return total


@gluon.jit
def _copy(
    ad, bd, b2d, abuf, bbuf, b2buf, full, free, K, chunk, units, whole, splits, nm, nn,
    BM: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr, BN2: gl.constexpr,
    BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    A_K: gl.constexpr, B_K: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    BYTES: gl.constexpr = (BM * GROUPS + BN + BN2) * BK * 2
    if OVERLAP:
        gdc_wait()  # for what was launched before and may still run
        gdc_launch_dependents()
    step = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        _, pm, pn, first, last = unit_of(unit, whole, splits, nm, nn, GROUP)
        m0 = pm * (BM * GROUPS)
        n0 = pn * (BN + BN2)
        for k in range(first * chunk, gl.minimum(last * chunk, K), BK):
            slot = step % STAGES
            mbarrier.wait(free.index(slot), (step // STAGES & 1) ^ 1)
            bar = full.index(slot)
            mbarrier.expect(bar, BYTES)
            for g in gl.static_range(GROUPS):
                if A_K:
                    tma.async_copy_global_to_shared(
                        ad, [m0 + g * BM, k], bar, abuf.index(slot * GROUPS + g)
                    )
                else:
                    tma.async_copy_global_to_shared(
                        ad, [k, m0 + g * BM], bar, abuf.index(slot * GROUPS + g)
                    )
            if B_K:
                tma.async_copy_global_to_shared(bd, [n0, k], bar, bbuf.index(slot))
            else:
                tma.async_copy_global_to_shared(bd, [k, n0], bar, bbuf.index(slot))
            if BN2:
                if B_K:
                    tma.async_copy_global_to_shared(b2d, [n0 + BN, k], bar, b2buf.index(slot))
                else:
                    tma.async_copy_global_to_shared(b2d, [k, n0 + BN], bar, b2buf.index(slot))
            step += 1


@gluon.jit
def _finish(
    acc, cd, buf, add, m0, n0, M, N, sdm, sdn, alpha, beta,
    BM: gl.constexpr, BN: gl.constexpr, LAYOUT: gl.constexpr,
    HAS_ADD: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """alpha * chain, then fma(beta, addend, that); rounds once; the store goes on by itself."""
    if SCALED:
        acc = acc * alpha
    if HAS_ADD:
        row = (m0 + gl.arange(0, BM, gl.SliceLayout(1, LAYOUT)))[:, None]
        col = (n0 + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT)))[None, :]
        inside = (row < M) & (col < N)
        addend = gl.load(add + row * sdm + col * sdn, mask=inside, other=0.0).to(gl.float32)
        acc = gl.fma(gl.full([BM, BN], 0.0, gl.float32, LAYOUT) + beta, addend, acc)
    tma.store_wait(0)
    buf.store(acc.to(cd.dtype))  # every NaN becomes one: see `gemm.rounded`
    fence_async_shared()
    tma.async_copy_shared_to_global(cd, [m0, n0], buf)


@gluon.jit
def _step(
    acc, acc2, abuf, bbuf, b2buf, full, step,
    FIRST: gl.constexpr, WHICH: gl.constexpr, GROUPS: gl.constexpr, BN2: gl.constexpr,
    STAGES: gl.constexpr, A_K: gl.constexpr, B_K: gl.constexpr,
):  # fmt: skip
    """Starts to multiply the next blocks; returns when those before are done. FIRST: of a chain."""
    slot = step % STAGES
    mbarrier.wait(full.index(slot), step // STAGES & 1)
    x = abuf.index(slot * GROUPS + WHICH)
    if not A_K:
        x = x.permute((1, 0))
    y = bbuf.index(slot)
    if B_K:
        y = y.permute((1, 0))
    acc = warpgroup_mma(x, y, acc, use_acc=not FIRST, is_async=True)
    if BN2:
        z = b2buf.index(slot)
        if B_K:
            z = z.permute((1, 0))
        acc2 = warpgroup_mma(x, z, acc2, use_acc=not FIRST, is_async=True)
        acc, acc2 = warpgroup_mma_wait(2, deps=[acc, acc2])
    else:
        acc = warpgroup_mma_wait(1, deps=[acc])
    return acc, acc2


@gluon.jit
def _multiply(
    abuf, bbuf, b2buf, cd, c2d, cbuf, c2buf, full, free, add, ws, count, M, N, K, chunk, units,
    whole, splits, nm, nn, sdm, sdn, alpha, beta,
    WHICH: gl.constexpr, BM: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr,
    BN2: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    A_K: gl.constexpr, B_K: gl.constexpr, CHUNKED: gl.constexpr, FEW: gl.constexpr,
    APART: gl.constexpr, OVERLAP: gl.constexpr, HAS_ADD: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """One multiplying group of four warps: rows WHICH * BM and on of every tile."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    WIDTH2: gl.constexpr = BN2 if BN2 else 16
    LAYOUT2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH2, 16])
    SIZE: gl.constexpr = BM * (BN + BN2)
    if OVERLAP:
        gdc_wait()
    step = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        tile, pm, pn, first, last = unit_of(unit, whole, splits, nm, nn, GROUP)
        m0 = pm * (BM * GROUPS) + WHICH * BM
        n0 = pn * (BN + BN2)
        # Minus zero, which leaves the first chain what it is; plus zero would lose a -0.
        total = gl.zeros([BM, BN], gl.float32, LAYOUT) * -1.0
        total2 = gl.zeros([BM, WIDTH2], gl.float32, LAYOUT2) * -1.0
        for part in range(first, last):
            lo = part * chunk
            acc, acc2 = _step(
                gl.zeros([BM, BN], gl.float32, LAYOUT), gl.zeros([BM, WIDTH2], gl.float32, LAYOUT2),
                abuf, bbuf, b2buf, full, step, True, WHICH, GROUPS, BN2, STAGES, A_K, B_K,
            )  # fmt: skip
            step += 1
            for _ in range(lo + BK, gl.minimum(lo + chunk, K), BK):
                acc, acc2 = _step(
                    acc, acc2, abuf, bbuf, b2buf, full, step, False,
                    WHICH, GROUPS, BN2, STAGES, A_K, B_K,
                )  # fmt: skip
                # The step before is done: its buffers may be filled again.
                mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
                step += 1
            if BN2:
                acc, acc2 = warpgroup_mma_wait(0, deps=[acc, acc2])
            else:
                acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
            if CHUNKED:
                total += acc
                if BN2:
                    total2 += acc2
            else:
                total = acc
                total2 = acc2
        done = True
        if CHUNKED:
            if last - first < splits:
                row = gl.arange(0, BM, gl.SliceLayout(1, LAYOUT))[:, None]
                local = row * BN + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))[None, :]
                row2 = gl.arange(0, BM, gl.SliceLayout(1, LAYOUT2))[:, None]
                col2 = gl.arange(0, WIDTH2, gl.SliceLayout(0, LAYOUT2))[None, :]
                local2 = BM * BN + row2 * WIDTH2 + col2
                mine = (tile - whole) * GROUPS + WHICH
                place = ws + mine.to(gl.int64) * splits * SIZE
                gl.store(place + first * SIZE + local, total)
                if BN2:
                    gl.store(place + first * SIZE + local2, total2)
                if APART:
                    done = False
                else:
                    gl.thread_barrier()
                    arrived = gl.atomic_add(count + mine, 1, sem="acq_rel", scope="gpu")
                    done = arrived == splits - 1
                    if done:
                        total = ascending(place, local, splits, None, SIZE, FEW)
                        if BN2:
                            total2 = ascending(place, local2, splits, None, SIZE, FEW)
                        gl.store(count + mine, 0)
        if done:
            _finish(
                total, cd, cbuf.index(WHICH), add, m0, n0, M, N, sdm, sdn, alpha, beta,
                BM, BN, LAYOUT, HAS_ADD, SCALED,
            )  # fmt: skip
            if BN2:
                _finish(
                    total2, c2d, c2buf.index(WHICH), add, m0, n0 + BN, M, N, sdm, sdn,
                    alpha, beta, BM, BN2, LAYOUT2, HAS_ADD, SCALED,
                )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "whole"])
def gemm_ring(
    ad, bd, b2d, cd, c2d, add, ws, count, M, N, K, chunk, whole, sdm, sdn,
    alpha: gl.float32, beta: gl.float32,
    BM: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr, BN2: gl.constexpr,
    BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    A_K: gl.constexpr, B_K: gl.constexpr, CHUNKED: gl.constexpr, FEW: gl.constexpr,
    APART: gl.constexpr, OVERLAP: gl.constexpr, HAS_ADD: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """Bulk copies through a ring of STAGES buffers; tiles of BM * GROUPS rows, BN + BN2 columns."""
    nm = gl.cdiv(M, BM * GROUPS)
    nn = gl.cdiv(N, BN + BN2)
    splits = gl.cdiv(K, chunk)
    units = whole + (nm * nn - whole) * splits
    abuf = gl.allocate_shared_memory(ad.dtype, [STAGES * GROUPS] + ad.block_type.shape, ad.layout)
    bbuf = gl.allocate_shared_memory(bd.dtype, [STAGES] + bd.block_type.shape, bd.layout)
    if BN2:
        b2buf = gl.allocate_shared_memory(bd.dtype, [STAGES] + b2d.block_type.shape, b2d.layout)
    else:
        b2buf = bbuf
    cbuf = gl.allocate_shared_memory(cd.dtype, [GROUPS] + cd.block_type.shape, cd.layout)
    if BN2 and BN2 != BN:
        c2buf = gl.allocate_shared_memory(cd.dtype, [GROUPS] + c2d.block_type.shape, c2d.layout)
    else:
        c2buf = cbuf
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
                    abuf, bbuf, b2buf, cd, c2d, cbuf, c2buf, full, free, add, ws, count, M, N,
                    K, chunk, units, whole, splits, nm, nn, sdm, sdn, alpha, beta,
                    0, BM, GROUPS, BN, BN2, BK, STAGES, GROUP, A_K, B_K, CHUNKED, FEW, APART,
                    OVERLAP, HAS_ADD, SCALED,
                )),
                (_copy, (
                    ad, bd, b2d, abuf, bbuf, b2buf, full, free, K, chunk, units, whole, splits,
                    nm, nn, BM, GROUPS, BN, BN2, BK, STAGES, GROUP, A_K, B_K, OVERLAP,
                )),
            ],
            [1],
            [40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply, (
                    abuf, bbuf, b2buf, cd, c2d, cbuf, c2buf, full, free, add, ws, count, M, N,
                    K, chunk, units, whole, splits, nm, nn, sdm, sdn, alpha, beta,
                    0, BM, GROUPS, BN, BN2, BK, STAGES, GROUP, A_K, B_K, CHUNKED, FEW, APART,
                    OVERLAP, HAS_ADD, SCALED,
                )),
                (_multiply, (
                    abuf, bbuf, b2buf, cd, c2d, cbuf, c2buf, full, free, add, ws, count, M, N,
                    K, chunk, units, whole, splits, nm, nn, sdm, sdn, alpha, beta,
                    1, BM, GROUPS, BN, BN2, BK, STAGES, GROUP, A_K, B_K, CHUNKED, FEW, APART,
                    OVERLAP, HAS_ADD, SCALED,
                )),
                (_copy, (
                    ad, bd, b2d, abuf, bbuf, b2buf, full, free, K, chunk, units, whole, splits,
                    nm, nn, BM, GROUPS, BN, BN2, BK, STAGES, GROUP, A_K, B_K, OVERLAP,
                )),
            ],
            [4, 1],
            [232, 40],
        )  # fmt: skip
