"""float64 products: a plain kernel of fused multiply-adds over ascending k."""

from __future__ import annotations

import triton
import triton.language as tl

from batch_invariant_cuda.gemm import finished, rounded

_EVERYTHING = "a b c add M N K sam sak sbk sbn sab sbb sdm sdn sdb".split()
"""Nothing is loaded in vectors, so that nothing is gained by compiling for aligned numbers."""


@triton.jit(do_not_specialize=_EVERYTHING)
def gemm_double(
    a, b, c, add, M, N, K, sam, sak, sbk, sbn, sab, sbb, sdm, sdn, sdb,
    alpha: tl.float64, beta: tl.float64,
    BM: tl.constexpr, BN: tl.constexpr, HAS_ADD: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """float64: one chain of fused multiply-adds over ascending k, 64-bit offsets."""
    pid = tl.program_id(0).to(tl.int64)
    nm = tl.cdiv(M, BM)
    nn = tl.cdiv(N, BN)
    batch = pid // (nm * nn)
    om = (pid // nn) % nm * BM + tl.arange(0, BM)
    on = pid % nn * BN + tl.arange(0, BN)
    pa = a + batch * sab + om * sam
    pb = b + batch * sbb + on * sbn
    acc = tl.zeros((BM, BN), tl.float64)
    for _ in range(K):
        x = tl.load(pa, mask=om < M, other=0.0)
        y = tl.load(pb, mask=on < N, other=0.0)
        acc = tl.fma(
            tl.broadcast_to(x[:, None], (BM, BN)), tl.broadcast_to(y[None, :], (BM, BN)), acc
        )
        pa += sak
        pb += sbk
    row = om[:, None]
    col = on[None, :]
    inside = (row < M) & (col < N)
    x = finished(acc, add + batch * sdb, row, col, inside, sdm, sdn, alpha, beta, HAS_ADD, SCALED)
    tl.store(c + batch * M * N + row * N + col, rounded(x, tl.float64), mask=inside)
