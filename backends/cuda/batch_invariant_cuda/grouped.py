"""grouped_mm on NVIDIA GPUs: one launch for all groups, whose ends are read on the device.

Every group has the order of a product of its (K, N, dtype) in `matmul.py`, so a row has the bits of
`mm` with its group's matrix. Where columns are cut, N is that of all groups together. Schedules are
those of "tile", which takes any strides.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from batch_invariant.backend import Kernel
from batch_invariant.errors import OpNotSupported
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
from batch_invariant.ops.grouped import check_grouped
from batch_invariant_cuda import choice
from batch_invariant_cuda.chunks import DEPTHS, chunk_of, chunks_by_depth, tf32_asked
from batch_invariant_cuda.gemm import chain, rounded
from batch_invariant_cuda.matmul import KERNELS as PRODUCTS
from batch_invariant_cuda.matmul import PROVED, capability, product, programs
from batch_invariant_cuda.problem import cdiv
from batch_invariant_cuda.schedules import Schedule

_NARROW = 2**31 - 2**20  # offsets up to here fit 32 bits, with room for the tiles at the edges


@triton.jit
def _bounds(offs, group, groups, size):
    """Where groups begin and end, at most at size; those behind the last are empty, at 0."""
    there = group < groups
    end = tl.load(offs + group, mask=there, other=0).to(tl.int32)
    start = tl.load(offs + group - 1, mask=there & (group > 0), other=0).to(tl.int32)
    start = tl.minimum(tl.maximum(start, 0), size)
    return start, tl.maximum(tl.minimum(end, size), start)


@triton.jit(do_not_specialize=["M", "groups"])
def grouped_rows(
    a, b, c, offs, M, N, K, groups, chunk, sam, sak, sbg, sbk, sbn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUPS: tl.constexpr,
    EVEN_K: tl.constexpr, CHUNKED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of a [M, K] by groups, each group times its matrix of b [G, K, N].

    A tile has rows of one group. There are more programs than tiles, as nobody else knows how many
    tiles the groups make.
    """
    nn = tl.cdiv(N, BN)
    tile = tl.program_id(0) // nn
    start, end = _bounds(offs, tl.arange(0, GROUPS), groups, M)
    tiles = (end - start + BM - 1) // BM
    through = tl.cumsum(tiles, 0)
    group = tl.sum((through <= tile).to(tl.int32), 0)
    if group < groups:
        mine = tl.arange(0, GROUPS) == group
        first = tl.sum(tl.where(mine, start + (tile - through + tiles) * BM, 0), 0)
        last = tl.sum(tl.where(mine, end, 0), 0)
        om = first + tl.arange(0, BM)
        on = tl.program_id(0) % nn * BN + tl.arange(0, BN)
        ok = tl.arange(0, BK)
        if WIDE:
            om, on, ok = om.to(tl.int64), on.to(tl.int64), ok.to(tl.int64)
        rm = tl.where(om < last, om, first)
        rn = tl.where(on < N, on, 0)
        pa = a + rm[:, None] * sam + ok[None, :] * sak
        pb = b + group.to(tl.int64) * sbg + rn[:, None] * sbn + ok[None, :] * sbk
        acc = chain(
            pa, pb, sak, sbk, K, chunk, (om < last)[:, None], (on < N)[:, None],
            BM, BN, BK, False, EVEN_K, False, False, PRECISION, CHUNKED, WIDE,
        )  # fmt: skip
        inside = (om < last)[:, None] & (on < N)[None, :]
        at = om[:, None] * N + on[None, :]
        tl.store(c + at, rounded(acc, c.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["K", "groups"])
def grouped_depth(
    a, b, c, offs, M, N, K, groups, few, some, many, sam, sak, sbk, sbn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FROM: tl.constexpr, LONG: tl.constexpr,
    CHUNKED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The product [M, N] of the columns of a [M, K] and the rows of b [K, N] that each group has.

    few, some, many: the chunk of less than FROM terms, of less than LONG, and of more.
    """
    nm = tl.cdiv(M, BM)
    nn = tl.cdiv(N, BN)
    group = tl.program_id(0) // (nm * nn)
    start, end = _bounds(offs, group, groups, K)
    depth = end - start
    chunk = tl.where(depth < FROM, few, tl.where(depth < LONG, some, many))
    chunk = tl.where(chunk == 0, tl.maximum(depth, 1), chunk)
    om = tl.program_id(0) // nn % nm * BM + tl.arange(0, BM)
    on = tl.program_id(0) % nn * BN + tl.arange(0, BN)
    ok = start + tl.arange(0, BK)
    if WIDE:
        om, on, ok = om.to(tl.int64), on.to(tl.int64), ok.to(tl.int64)
    pa = a + tl.where(om < M, om, 0)[:, None] * sam + ok[None, :] * sak
    pb = b + tl.where(on < N, on, 0)[:, None] * sbn + ok[None, :] * sbk
    acc = chain(
        pa, pb, sak, sbk, depth, chunk, (om < M)[:, None], (on < N)[:, None],
        BM, BN, BK, False, False, False, False, PRECISION, CHUNKED, WIDE,
    )  # fmt: skip
    inside = (om < M)[:, None] & (on < N)[None, :]
    at = group.to(tl.int64) * M * N + om[:, None] * N + on[None, :]
    tl.store(c + at, rounded(acc, c.dtype.element_ty), mask=inside)


def by_rows(
    a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, s: Schedule, chunk: int, precision: str
) -> torch.Tensor:
    """[M, K] by [G, K, N]: rows are cut."""
    (m, k), n, groups = a.shape, b.size(2), len(offs)
    out = a.new_zeros(m, n)
    if 0 in (m, n, groups):
        return out
    # Every group may end in a tile that is not full.
    tiles = cdiv(m, s.bm) + min(groups, m)
    grouped_rows[(tiles * cdiv(n, s.bn),)](
        a, b, out, offs, m, n, k, groups, chunk, *a.stride(), *b.stride(),
        BM=s.bm, BN=s.bn, BK=s.bk, GROUPS=triton.next_power_of_2(groups),
        EVEN_K=k % s.bk == 0, CHUNKED=chunk > 0, WIDE=_wide(s, a, b[0], out),
        PRECISION=precision, num_warps=s.warps, num_stages=s.stages,
    )  # fmt: skip
    return out


def by_depth(
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor,
    s: Schedule,
    chunks: tuple[int, int, int],
    precision: str,
) -> torch.Tensor:
    """[M, K] by [K, N]: K is cut. chunks: `chunks_by_depth`."""
    (m, k), n, groups = a.shape, b.size(1), len(offs)
    out = a.new_empty(groups, m, n)
    if not out.numel():
        return out
    grouped_depth[(groups * cdiv(m, s.bm) * cdiv(n, s.bn),)](
        a, b, out, offs, m, n, k, groups, *chunks, *a.stride(), *b.stride(),
        BM=s.bm, BN=s.bn, BK=s.bk, FROM=DEPTHS[0], LONG=DEPTHS[1], CHUNKED=any(chunks),
        WIDE=_wide(s, a, b, out[0]), PRECISION=precision,
        num_warps=s.warps, num_stages=s.stages,
    )  # fmt: skip
    return out


def _wide(s: Schedule, *matrices: torch.Tensor) -> bool:
    """Whether some offset inside a matrix needs 64 bits; tiles may reach beyond its edges."""
    most = max(s.bm, s.bn, s.bk)
    return any(
        sum((size + most) * abs(step) for size, step in zip(x.shape, x.stride(), strict=True))
        > _NARROW
        for x in matrices
    )


def _schedule(m: int, n: int, k: int, dtype: torch.dtype, tf32: bool, device: Any) -> Schedule:
    """The one of a single product of that size, without bulk copies; it changes no bit."""
    proved = capability(device) == PROVED
    if tf32:
        return choice.tf32(max(m, 17), n) if proved else choice.contract(dtype)
    if not proved and dtype is not torch.float32:
        return choice.contract(dtype)
    return choice.default(m, n, k, dtype, bulk=False, chunk=0, programs=programs(device))


def _grouped_mm(
    self: torch.Tensor, mat2: torch.Tensor, offs: torch.Tensor | None = None
) -> torch.Tensor:
    check_grouped(self, mat2, offs)
    if (reason := _supports(self, mat2, offs)) is not None:
        raise OpNotSupported(reason)
    if offs is None:
        return product(self, mat2)
    for other in (mat2, offs):
        if other.device != self.device:
            raise RuntimeError(
                f"grouped_mm: expected all tensors on one device, found {self.device} and "
                f"{other.device}"
            )
    with torch.cuda.device(self.device):
        if mat2.dim() == 2 and self.dim() == 3:
            # The columns of one product are the rows of the transposed one: the same additions.
            return _product(mat2.mT, self.mT, offs, mat2.size(1)).mT.contiguous()
        return _product(self, mat2, offs, mat2.size(-1))


def _product(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, n: int) -> torch.Tensor:
    """n: the columns that decide about the order."""
    tf32 = a.dtype is torch.float32 and tf32_asked()
    precision = "tf32" if tf32 else "ieee"
    offs = offs.contiguous()
    m, columns, k = a.size(0), b.size(-1), a.size(1)
    if b.dim() == 2:
        chunks = (0, 0, 0) if tf32 else chunks_by_depth(n, a.dtype)
        s = _schedule(m, columns, k // max(len(offs), 1), a.dtype, tf32, a.device)
        try:
            return by_depth(a, b, offs, s, chunks, precision)
        except OutOfResources:  # a GPU with less shared memory: the same bits by smaller tiles
            return by_depth(a, b, offs, choice.contract(a.dtype), chunks, precision)
    chunk = 0 if tf32 else chunk_of(k, n, a.dtype)
    s = _schedule(cdiv(m, max(len(offs), 1)), columns, k, a.dtype, tf32, a.device)
    try:
        return by_rows(a, b, offs, s, chunk, precision)
    except OutOfResources:
        return by_rows(a, b, offs, choice.contract(a.dtype), chunk, precision)


def _supports(
    self: torch.Tensor, mat2: torch.Tensor, offs: torch.Tensor | None = None
) -> str | None:
    if self.dtype not in FLOATS:
        return (
            f"grouped_mm on CUDA takes {', '.join(map(str, FLOATS))}; got {self.dtype}. Convert "
            "the operands, or use mm for each group"
        )
    return None


KERNELS = {
    "grouped_mm": Kernel(
        fn=_grouped_mm,
        guarantee=Guarantee.BATCH,
        dtypes=frozenset(FLOATS),
        order=PRODUCTS["bmm"].order,
        portable=frozenset((torch.float32,)),
        supports=_supports,
    )
}
