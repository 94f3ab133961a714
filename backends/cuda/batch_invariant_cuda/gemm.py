"""Triton kernels of the matrix products: one order of additions over k, many schedules.

Each output element is one chain of matrix-unit steps over ascending k (`tl.dot` into a running
accumulator), or, where CHUNKED, one such chain for each chunk of k, the chains being added in
ascending order. Tiles, warps, stages, operand order and who computes a chunk change no bit.
"""

# ruff: noqa: SIM108  (compiled by Triton, which knows less of Python)
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def take_turn(OVERLAP: tl.constexpr):
    """Waits for what was launched before and may still run, then lets the next launch begin."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _tile_of(pid, nm, nn, GROUP: tl.constexpr):
    """Tiles in column groups of GROUP rows, so that neighbours in time share operands in L2."""
    per = GROUP * nn
    first = pid // per * GROUP
    rows = min(nm - first, GROUP)
    return first + (pid % per) % rows, (pid % per) // rows


@triton.jit
def finished(
    x, add, om, on, inside, sdm, sdn, alpha, beta, HAS_ADD: tl.constexpr, SCALED: tl.constexpr
):
    """alpha * chain, then fma(beta, addend, that)."""
    if SCALED:
        x = x * alpha
    if HAS_ADD:
        addend = tl.load(add + om * sdm + on * sdn, mask=inside, other=0.0).to(x.dtype)
        scale = tl.full(x.shape, 0.0, x.dtype) + beta
        x = tl.fma(scale, addend, x)
    return x


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x rounded once to a dtype, with one NaN for every NaN.

    To 16 bits the conversion itself makes them one. A choice of another NaN in front of it is moved
    behind it by the compiler in some kernels and not in others, which gave two.
    """
    if DTYPE.primitive_bitwidth == 16:
        return x.to(DTYPE)
    else:  # noqa: RET505  (Triton compiles what follows a plain return)
        return tl.where(x != x, float("nan"), x)


@triton.jit
def _folded(
    acc, acc2, ws, count, tile, split, splits,
    SIZE_0: tl.constexpr, SIZE_1: tl.constexpr, SIZE_2: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Leaves this chunk's chain in the workspace; the last to arrive adds all of them, ascending.

    FEW: the number of chunks if it is small, so that all are read at once; else 0.
    acc: [SIZE_0, SIZE_1]; acc2: [SIZE_0, SIZE_2], the same tile's other columns, if SIZE_2 > 0.
    Returns whether this program was the last, and the sums if so. The counter is zero again then.
    """
    row = tl.arange(0, SIZE_0)[:, None]
    local = row * SIZE_1 + tl.arange(0, SIZE_1)[None, :]
    SIZE: tl.constexpr = SIZE_0 * (SIZE_1 + SIZE_2)
    place = ws + tile.to(tl.int64) * splits * SIZE
    tl.store(place + split * SIZE + local, acc)
    if SIZE_2:
        local2 = SIZE_0 * SIZE_1 + row * SIZE_2 + tl.arange(0, SIZE_2)[None, :]
        tl.store(place + split * SIZE + local2, acc2)
    tl.debug_barrier()
    arrived = tl.atomic_add(count + tile, 1, sem="acq_rel", scope="gpu")
    last = arrived == splits - 1
    if last:
        acc = tl.load(place + local, cache_modifier=".cg")
        if FEW:
            for i in tl.static_range(1, FEW):
                acc += tl.load(place + i * SIZE + local, cache_modifier=".cg")
        else:
            for i in range(1, splits):
                acc += tl.load(place + i * SIZE + local, cache_modifier=".cg")
        if SIZE_2:
            acc2 = tl.load(place + local2, cache_modifier=".cg")
            if FEW:
                for i in tl.static_range(1, FEW):
                    acc2 += tl.load(place + i * SIZE + local2, cache_modifier=".cg")
            else:
                for i in range(1, splits):
                    acc2 += tl.load(place + i * SIZE + local2, cache_modifier=".cg")
        tl.store(count + tile, 0)
    return last, acc, acc2


@triton.jit
def _span(
    pa, pb, sak, sbk, lo, hi, in_m, in_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr,
    EVEN_K: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chain over [lo, hi); pa and pb point at its first block. Padding with zeros adds none."""
    ok = tl.arange(0, BK)
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
    for k in range(lo, hi, BK):
        in_k = (ok < hi - k)[None, :]
        if EVEN_K:
            x = tl.load(pa, mask=in_m, other=0.0) if MASK_M else tl.load(pa)
            y = tl.load(pb, mask=in_n, other=0.0) if MASK_N else tl.load(pb)
        else:
            x = tl.load(pa, mask=in_m & in_k if MASK_M else in_k, other=0.0)
            y = tl.load(pb, mask=in_n & in_k if MASK_N else in_k, other=0.0)
        if SWAP:
            acc = tl.dot(y, x.T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, y.T, acc, input_precision=PRECISION)
        pa += BK * sak
        pb += BK * sbk
    return acc


@triton.jit
def chain(
    pa, pb, sak, sbk, K, chunk, in_m, in_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr,
    EVEN_K: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr, PRECISION: tl.constexpr,
    CHUNKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sum over all k by one program: one chain, or those of the chunks, added ascending."""
    if not CHUNKED:
        acc = _span(
            pa, pb, sak, sbk, 0, K, in_m, in_n,
            BM, BN, BK, SWAP, EVEN_K, MASK_M, MASK_N, PRECISION,
        )  # fmt: skip
    else:
        acc = _span(
            pa, pb, sak, sbk, 0, min(chunk, K), in_m, in_n,
            BM, BN, BK, SWAP, EVEN_K, MASK_M, MASK_N, PRECISION,
        )  # fmt: skip
        lo = chunk
        while lo < K:
            at = lo.to(tl.int64) if WIDE else lo
            acc += _span(
                pa + at * sak, pb + at * sbk, sak, sbk, lo, min(lo + chunk, K), in_m, in_n,
                BM, BN, BK, SWAP, EVEN_K, MASK_M, MASK_N, PRECISION,
            )  # fmt: skip
            lo += chunk
    return acc


@triton.jit(do_not_specialize=["M"])
def gemm_tile(
    a, b, c, add, ws, count, M, N, K, chunk, sam, sak, sbk, sbn, sab, sbb, sdm, sdn, sdb,
    alpha: tl.float32, beta: tl.float32,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SWAP: tl.constexpr, EVEN_K: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr,
    CHUNKED: tl.constexpr, SPLIT: tl.constexpr, FEW: tl.constexpr, BATCHED: tl.constexpr,
    WIDE: tl.constexpr, HAS_ADD: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Pointer loads: any strides, any sizes. SPLIT: one program for each chunk of a tile.

    MASK_M, MASK_N: that operand is contiguous along rows, so its edge is masked, not clamped.
    WIDE: 64-bit offsets. PRECISION: of fp32 operands, "ieee" or "tf32".
    """
    take_turn(OVERLAP)
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    splits = tl.cdiv(K, chunk) if SPLIT else 1
    unit = pid // splits
    split = pid % splits
    nm = tl.cdiv(M, BM)
    nn = tl.cdiv(N, BN)
    pm, pn = _tile_of(unit % (nm * nn) if BATCHED else unit, nm, nn, GROUP)
    if BATCHED:
        batch = unit // (nm * nn)
        a += batch * sab
        b += batch * sbb
        c += batch * M * N
        add += batch * sdb
    om = pm * BM + tl.arange(0, BM)
    on = pn * BN + tl.arange(0, BN)
    rm = om if MASK_M else tl.where(om < M, om, 0)
    rn = on if MASK_N else tl.where(on < N, on, 0)
    in_m = (om < M)[:, None]
    in_n = (on < N)[:, None]
    ok = tl.arange(0, BK)
    if WIDE:
        ok = ok.to(tl.int64)
    pa = a + rm[:, None] * sam + ok[None, :] * sak
    pb = b + rn[:, None] * sbn + ok[None, :] * sbk
    if SPLIT:
        lo = split * chunk
        acc = _span(
            pa + lo * sak, pb + lo * sbk, sak, sbk, lo, min(lo + chunk, K), in_m, in_n,
            BM, BN, BK, SWAP, EVEN_K, MASK_M, MASK_N, PRECISION,
        )  # fmt: skip
        done, acc, _ = _folded(
            acc, acc, ws, count, unit, split, splits,
            BN if SWAP else BM, BM if SWAP else BN, 0, FEW,
        )  # fmt: skip
    else:
        done = True
        acc = chain(
            pa, pb, sak, sbk, K, chunk, in_m, in_n,
            BM, BN, BK, SWAP, EVEN_K, MASK_M, MASK_N, PRECISION, CHUNKED, WIDE,
        )  # fmt: skip
    if done:
        if SWAP:
            row = om[None, :]
            col = on[:, None]
        else:
            row = om[:, None]
            col = on[None, :]
        inside = (row < M) & (col < N)
        x = finished(acc, add, row, col, inside, sdm, sdn, alpha, beta, HAS_ADD, SCALED)
        tl.store(c + row * N + col, rounded(x, c.dtype.element_ty), mask=inside)


@triton.jit
def _span_tma(
    ad, bd, b2d, m0, n0, lo, hi,
    BM: tl.constexpr, BN: tl.constexpr, BN2: tl.constexpr, BK: tl.constexpr,
    A_K: tl.constexpr, B_K: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """One chain over [lo, hi) by bulk copies, for columns [n0, n0 + BN) and BN2 more."""
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
    acc2 = tl.zeros((BM, BN2 if BN2 else 16), tl.float32)
    for k in range(lo, hi, BK):
        x = ad.load([m0, k]) if A_K else ad.load([k, m0]).T
        y = bd.load([n0, k]) if B_K else bd.load([k, n0]).T
        if SWAP:
            acc = tl.dot(y, x.T, acc)
        else:
            acc = tl.dot(x, y.T, acc)
        if BN2:
            z = b2d.load([n0 + BN, k]) if B_K else b2d.load([k, n0 + BN]).T
            acc2 = tl.dot(x, z.T, acc2)
    return acc, acc2


@triton.jit
def _store_tma(
    cd, acc, m0, n0, add, M, N, sdm, sdn, alpha, beta,
    BM: tl.constexpr, BN: tl.constexpr, HALVES: tl.constexpr,
    HAS_ADD: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Rounds and stores a tile, in two halves if its buffer would take room from the pipeline."""
    if HAS_ADD or SCALED:
        row = (m0 + tl.arange(0, BM))[:, None]
        col = (n0 + tl.arange(0, BN))[None, :]
        inside = (row < M) & (col < N)
        acc = finished(acc, add, row, col, inside, sdm, sdn, alpha, beta, HAS_ADD, SCALED)
    if HALVES:
        pair = tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1))
        left, right = tl.split(pair)
        cd.store([m0, n0], rounded(left, DTYPE))
        cd.store([m0, n0 + BN // 2], rounded(right, DTYPE))
    else:
        cd.store([m0, n0], rounded(acc, DTYPE))


@triton.jit
def _store_both(
    cd, c2d, acc, acc2, m0, n0, add, M, N, sdm, sdn, alpha, beta,
    BM: tl.constexpr, BN: tl.constexpr, BN2: tl.constexpr, HALVES: tl.constexpr,
    HAS_ADD: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Rounds and stores the columns that `_span_tma` computes."""
    _store_tma(
        cd, acc, m0, n0, add, M, N, sdm, sdn, alpha, beta, BM, BN, HALVES, HAS_ADD, SCALED, DTYPE
    )
    if BN2:
        _store_tma(
            c2d, acc2, m0, n0 + BN, add, M, N, sdm, sdn, alpha, beta,
            BM, BN2, False, HAS_ADD, SCALED, DTYPE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def gemm_tma(
    ad, bd, b2d, cd, c2d, c, add, M, N, K, sdm, sdn, alpha: tl.float32, beta: tl.float32,
    BM: tl.constexpr, BN: tl.constexpr, BN2: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PERSISTENT: tl.constexpr, A_K: tl.constexpr, B_K: tl.constexpr,
    HALVES: tl.constexpr, SWAP: tl.constexpr, HAS_ADD: tl.constexpr, SCALED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Bulk copies, one chain over k; PERSISTENT: a few programs walk over all tiles."""
    take_turn(OVERLAP)
    nm = tl.cdiv(M, BM)
    nn = tl.cdiv(N, BN + BN2)
    DTYPE: tl.constexpr = c.dtype.element_ty
    if PERSISTENT:
        for unit in tl.range(tl.program_id(0), nm * nn, tl.num_programs(0), flatten=True):
            pm, pn = _tile_of(unit, nm, nn, GROUP)
            m0 = pm * BM
            n0 = pn * (BN + BN2)
            acc, acc2 = _span_tma(ad, bd, b2d, m0, n0, 0, K, BM, BN, BN2, BK, A_K, B_K, False)
            _store_both(
                cd, c2d, acc, acc2, m0, n0, add, M, N, sdm, sdn, alpha, beta,
                BM, BN, BN2, HALVES, HAS_ADD, SCALED, DTYPE,
            )  # fmt: skip
    elif SWAP:
        pm, pn = _tile_of(tl.program_id(0), nm, nn, GROUP)
        acc, _ = _span_tma(ad, bd, b2d, pm * BM, pn * BN, 0, K, BM, BN, 0, BK, A_K, B_K, True)
        row = (pm * BM + tl.arange(0, BM))[None, :]
        col = (pn * BN + tl.arange(0, BN))[:, None]
        inside = (row < M) & (col < N)
        x = finished(acc, add, row, col, inside, sdm, sdn, alpha, beta, HAS_ADD, SCALED)
        tl.store(c + row * N + col, rounded(x, DTYPE), mask=inside)
    else:
        pm, pn = _tile_of(tl.program_id(0), nm, nn, GROUP)
        m0 = pm * BM
        n0 = pn * (BN + BN2)
        acc, acc2 = _span_tma(ad, bd, b2d, m0, n0, 0, K, BM, BN, BN2, BK, A_K, B_K, False)
        _store_both(
            cd, c2d, acc, acc2, m0, n0, add, M, N, sdm, sdn, alpha, beta,
            BM, BN, BN2, HALVES, HAS_ADD, SCALED, DTYPE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def gemm_tma_chunked(
    ad, bd, b2d, cd, c2d, c, add, ws, count, M, N, K, chunk, sdm, sdn,
    alpha: tl.float32, beta: tl.float32,
    BM: tl.constexpr, BN: tl.constexpr, BN2: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, A_K: tl.constexpr, B_K: tl.constexpr,
    HALVES: tl.constexpr, SPLIT: tl.constexpr, FEW: tl.constexpr, SWAP: tl.constexpr,
    HAS_ADD: tl.constexpr, SCALED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Bulk copies, chunks of k. SPLIT: every program takes one chunk of one tile.

    Otherwise a few programs walk over all tiles, and each adds a tile's chunks itself.
    """
    take_turn(OVERLAP)
    nm = tl.cdiv(M, BM)
    nn = tl.cdiv(N, BN + BN2)
    DTYPE: tl.constexpr = c.dtype.element_ty
    if SPLIT:
        splits = tl.cdiv(K, chunk)
        unit = tl.program_id(0) // splits
        split = tl.program_id(0) % splits
        pm, pn = _tile_of(unit, nm, nn, GROUP)
        m0 = pm * BM
        n0 = pn * (BN + BN2)
        lo = split * chunk
        acc, acc2 = _span_tma(
            ad, bd, b2d, m0, n0, lo, min(lo + chunk, K), BM, BN, BN2, BK, A_K, B_K, SWAP
        )
        done, acc, acc2 = _folded(
            acc, acc2, ws, count, unit, split, splits,
            BN if SWAP else BM, BM if SWAP else BN, BN2, FEW,
        )  # fmt: skip
        if done:
            om = m0 + tl.arange(0, BM)
            on = n0 + tl.arange(0, BN)
            if SWAP:
                row = om[None, :]
                col = on[:, None]
            else:
                row = om[:, None]
                col = on[None, :]
            inside = (row < M) & (col < N)
            x = finished(acc, add, row, col, inside, sdm, sdn, alpha, beta, HAS_ADD, SCALED)
            tl.store(c + row * N + col, rounded(x, DTYPE), mask=inside)
            if BN2:
                col2 = (n0 + BN + tl.arange(0, BN2))[None, :]
                inside2 = (row < M) & (col2 < N)
                z = finished(acc2, add, row, col2, inside2, sdm, sdn, alpha, beta, HAS_ADD, SCALED)
                tl.store(c + row * N + col2, rounded(z, DTYPE), mask=inside2)
    else:
        for unit in tl.range(tl.program_id(0), nm * nn, tl.num_programs(0)):
            pm, pn = _tile_of(unit, nm, nn, GROUP)
            m0 = pm * BM
            n0 = pn * (BN + BN2)
            acc, acc2 = _span_tma(
                ad, bd, b2d, m0, n0, 0, min(chunk, K), BM, BN, BN2, BK, A_K, B_K, False
            )
            lo = chunk
            while lo < K:
                more, more2 = _span_tma(
                    ad, bd, b2d, m0, n0, lo, min(lo + chunk, K), BM, BN, BN2, BK, A_K, B_K, False
                )
                acc += more
                acc2 += more2
                lo += chunk
            _store_both(
                cd, c2d, acc, acc2, m0, n0, add, M, N, sdm, sdn, alpha, beta,
                BM, BN, BN2, HALVES, HAS_ADD, SCALED, DTYPE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["M", "whole"])
def gemm_fold(
    ws, c, add, M, N, K, chunk, whole, sdm, sdn, alpha: tl.float32, beta: tl.float32,
    BM: tl.constexpr, GROUPS: tl.constexpr, BN: tl.constexpr, BN2: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, FEW: tl.constexpr, OVERLAP: tl.constexpr,
    HAS_ADD: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Adds the chains of all chunks, ascending, for the tiles from `whole` on; ROWS rows a program.

    A tile has GROUPS parts of BM rows, as `gemm_hopper` and `gemm_single` leave them behind.
    """
    take_turn(OVERLAP)
    SIZE: tl.constexpr = BM * (BN + BN2)
    PIECES: tl.constexpr = BM // ROWS
    part = tl.program_id(0) // PIECES
    first = tl.program_id(0) % PIECES * ROWS
    splits = tl.cdiv(K, chunk)
    pm, pn = _tile_of(whole + part // GROUPS, tl.cdiv(M, BM * GROUPS), tl.cdiv(N, BN + BN2), GROUP)
    place = ws + part.to(tl.int64) * splits * SIZE
    lane = first + tl.arange(0, ROWS)[:, None]
    row = (pm * GROUPS + part % GROUPS) * BM + lane
    col = pn * (BN + BN2) + tl.arange(0, BN)[None, :]
    inside = (row < M) & (col < N)
    _fold_part(
        place + lane * BN + tl.arange(0, BN)[None, :], c, add, row, col, inside, N, splits,
        sdm, sdn, alpha, beta, SIZE, FEW, HAS_ADD, SCALED,
    )  # fmt: skip
    if BN2:
        col2 = pn * (BN + BN2) + BN + tl.arange(0, BN2)[None, :]
        inside2 = (row < M) & (col2 < N)
        _fold_part(
            place + BM * BN + lane * BN2 + tl.arange(0, BN2)[None, :], c, add, row, col2, inside2,
            N, splits, sdm, sdn, alpha, beta, SIZE, FEW, HAS_ADD, SCALED,
        )  # fmt: skip


@triton.jit
def _fold_part(
    at, c, add, row, col, inside, N, splits, sdm, sdn, alpha, beta,
    SIZE: tl.constexpr, FEW: tl.constexpr, HAS_ADD: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    acc = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
    if FEW:
        for i in tl.static_range(1, FEW):
            acc += tl.load(at + i * SIZE, mask=inside, other=0.0, cache_modifier=".cg")
    else:
        for i in range(1, splits):
            acc += tl.load(at + i * SIZE, mask=inside, other=0.0, cache_modifier=".cg")
    x = finished(acc, add, row, col, inside, sdm, sdn, alpha, beta, HAS_ADD, SCALED)
    tl.store(c + row.to(tl.int64) * N + col, rounded(x, c.dtype.element_ty), mask=inside)
