"""The product of matrices for triton-ascend: one chain of fixed tiles over K, in fp32.

Tiles are the same at every M: nobody has shown that the cube unit's result does not depend on them,
so they are part of the order. An output adds its tiles of `_BK` terms in ascending k to an fp32
accumulator, whatever the operands' dtype, and is rounded once. Rows beyond M are loaded as zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BM, _BN, _BK = 128, 128, 64


@triton.jit
def gemm_kernel(
    a,
    b,
    c,
    M,
    N,
    K,
    a_batch,
    a_row,
    b_batch,
    b_row,
    c_batch,
    TRANSPOSED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """c[M, N] = a[M, K] @ b[K, N] for each of a batch; TRANSPOSED: b lies in memory as [N, K]."""
    tiles = tl.cdiv(N, BN)
    tile = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    rows = (tile // tiles) * BM + tl.arange(0, BM)
    columns = (tile % tiles) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    a += batch * a_batch
    b += batch * b_batch
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        at = k + inner
        left = tl.load(
            a + rows[:, None].to(tl.int64) * a_row + at[None, :],
            mask=(rows[:, None] < M) & (at[None, :] < K),
            other=0.0,
        )
        if TRANSPOSED:
            turned = tl.load(
                b + columns[:, None].to(tl.int64) * b_row + at[None, :],
                mask=(columns[:, None] < N) & (at[None, :] < K),
                other=0.0,
            )
            right = tl.trans(turned)
        else:
            right = tl.load(
                b + at[:, None].to(tl.int64) * b_row + columns[None, :],
                mask=(at[:, None] < K) & (columns[None, :] < N),
                other=0.0,
            )
        total = tl.dot(left, right, total, input_precision="ieee")
    tl.store(
        c + batch * c_batch + rows[:, None].to(tl.int64) * N + columns[None, :],
        total.to(c.dtype.element_ty),
        mask=(rows[:, None] < M) & (columns[None, :] < N),
    )


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `batch_invariant_ascend.product`: [M, K] and [K, N], or batches of both."""
    left, right = (t if t.dim() == 3 else t[None] for t in (a, b))
    left = left if left.stride(2) == 1 else left.contiguous()
    transposed = right.stride(2) != 1 and right.stride(1) == 1
    if right.stride(2) != 1 and not transposed:
        right = right.contiguous()
    batch, m, k = left.shape
    n = right.size(2)
    out = torch.empty(batch, m, n, dtype=dtype, device=a.device)
    grid = (triton.cdiv(m, _BM) * triton.cdiv(n, _BN), batch)
    gemm_kernel[grid](
        left,
        right,
        out,
        m,
        n,
        k,
        left.stride(0),
        left.stride(1),
        right.stride(0),
        right.stride(2) if transposed else right.stride(1),
        out.stride(0),
        TRANSPOSED=transposed,
        BM=_BM,
        BN=_BN,
        BK=_BK,
    )
    return out if a.dim() == 3 else out[0]
