"""Matrix products on CPU by the native GEMM.

fp32: `ops.matmul.PORTABLE`. fp16 and float64: one serial FMA chain over k. bf16: the order of
this CPU's matrix instructions (`native.bf16_order`), one order per machine. Bits do not depend on
M, N, threads or memory layout.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.cpu import native
from batch_invariant.errors import OpNotSupported
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
from batch_invariant.ops.matmul import (
    PORTABLE,
    check_addend,
    check_bmm,
    check_linear,
    check_mm,
    portable_chunk,
)
from batch_invariant.order import Order, chunked, lanes, reversed_groups, serial
from batch_invariant.stock import stock

_CODE = {getattr(torch, name): code for name, code in native.DTYPES.items()}
_pack = struct.Struct("=7qQ2qQ3qQ3qQ4q2d").pack


@cache
def _gemm() -> Any:
    return native.library().bi_gemm


def _matrix(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A batch of matrices with unit stride in the last dimension, and its row stride."""
    if x.stride(-1) != 1 and x.size(-1) != 1:
        x = x.contiguous()
    return x, x.stride(-2)


def _right(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """The right operand [..., K, N], its layout (1: unit stride in k) and its row stride."""
    if x.stride(-1) == 1 or x.size(-1) == 1:
        return x, 0, x.stride(-2)
    if x.stride(-2) == 1 or x.size(-2) == 1:
        return x, 1, x.stride(-1)
    x = x.contiguous()
    return x, 0, x.stride(-2)


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    addend: torch.Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> torch.Tensor:
    """`alpha * (a @ b) + beta * addend` for [B, M, K] and [B, K, N], or matrices; one rounding."""
    dtype = a.dtype
    code = _CODE.get(dtype)
    if code is None:
        raise OpNotSupported(
            f"matrix products on CPU take {', '.join(map(str, _CODE))} and integers; got {dtype}"
        )
    a, a_row = _matrix(a)
    b, layout, b_row = _right(b)
    if a.dim() == 2:
        (m, k), n, batch = a.shape, b.size(-1), 1
        out = torch.empty(m, n, dtype=dtype)
        a_batch = b_batch = c_batch = add_batch = 0
    else:
        (batch, m, k), n = a.shape, b.size(-1)
        out = torch.empty(batch, m, n, dtype=dtype)
        a_batch, b_batch, c_batch = a.stride(0), b.stride(0), m * n
        add_batch = 0 if addend is None else addend.stride(0)
    if addend is None:
        where, add_row, add_col = 0, 0, 0
    else:
        if addend.dtype != dtype:
            addend = addend.to(dtype)
        where, add_row, add_col = addend.data_ptr(), addend.stride(-2), addend.stride(-1)
        add_batch = addend.stride(0) if addend.dim() == 3 else 0
    status = _gemm()(
        _pack(
            code,
            code,
            m,
            n,
            k,
            batch,
            portable_chunk(k) if dtype == torch.float32 else 0,
            a.data_ptr(),
            a_row,
            a_batch,
            b.data_ptr(),
            layout,
            b_row,
            b_batch,
            where,
            add_row,
            add_col,
            add_batch,
            out.data_ptr(),
            n,
            c_batch,
            torch.get_num_threads(),
            -1,
            float(alpha),
            float(beta),
        )
    )
    if status:
        raise OpNotSupported(f"the native GEMM refused the call: {native.STATUS[status]}")
    return out


def _exact(x: torch.Tensor) -> bool:
    """Integers: every order adds alike."""
    return not x.dtype.is_floating_point and not x.dtype.is_complex


def _mm(self: torch.Tensor, mat2: torch.Tensor) -> Any:
    check_mm(self, mat2)
    if _exact(self):
        return stock("mm")(self, mat2)
    return product(self, mat2)


def _bmm(self: torch.Tensor, mat2: torch.Tensor) -> Any:
    check_bmm(self, mat2)
    if _exact(self):
        return stock("bmm")(self, mat2)
    return product(self, mat2)


def _addmm(
    self: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, *, beta: Any = 1, alpha: Any = 1
) -> Any:
    check_mm(mat1, mat2, self)
    addend = check_addend("addmm", self, (mat1.size(0), mat2.size(1)))
    if _exact(mat1):
        return stock("addmm")(self, mat1, mat2, beta=beta, alpha=alpha)
    return product(mat1, mat2, addend, beta, alpha)


def _baddbmm(
    self: torch.Tensor,
    batch1: torch.Tensor,
    batch2: torch.Tensor,
    *,
    beta: Any = 1,
    alpha: Any = 1,
) -> Any:
    check_bmm(batch1, batch2, self)
    addend = check_addend("baddbmm", self, (*batch1.shape[:2], batch2.size(2)))
    if _exact(batch1):
        return stock("baddbmm")(self, batch1, batch2, beta=beta, alpha=alpha)
    return product(batch1, batch2, addend, beta, alpha)


def _linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    check_linear(input, weight, bias)
    k = input.size(-1)
    matrix = weight if weight.dim() == 2 else weight.unsqueeze(0)
    n = matrix.size(0)
    rows = input.reshape(input.shape[:-1].numel(), k)
    if _exact(input):
        out = stock("mm")(rows, matrix.mT)
        out = out if bias is None else out + bias
    else:
        addend = None if bias is None else bias.expand(rows.size(0), n)
        out = product(rows, matrix.mT, addend)
    shaped: torch.Tensor = out.view(*input.shape[:-1], *weight.shape[:-1])
    return shaped


_BF16 = {
    # TDPBF16PS adds 16 pairs: the even and the odd terms in two chains, then the two, to the tile.
    "amx": chunked(32, lanes(2, 32)),
    # VDPBF16PS adds the products of a pair one after the other, the second first.
    "vdpbf16ps": reversed_groups(2),
    "serial": serial(),
}


class _Order(Mapping[torch.dtype, Order]):
    """The order by dtype; that of bf16 is asked of the machine when somebody wants to know."""

    def __getitem__(self, dtype: torch.dtype) -> Order:
        if dtype == torch.bfloat16:
            return _BF16[native.BF16_ORDERS[native.library().bi_bf16_order()]]
        return PORTABLE if dtype == torch.float32 else serial()

    def __iter__(self) -> Any:
        return iter((*FLOATS, torch.float64))

    def __len__(self) -> int:
        return len(FLOATS) + 1


def _kernel(fn: Any, guarantee: Guarantee) -> Kernel:
    return Kernel(
        fn=fn,
        guarantee=guarantee,
        dtypes=frozenset((*FLOATS, torch.float64)),
        order=_Order(),
        portable=frozenset((torch.float32, torch.float16, torch.float64)),
    )


KERNELS = {
    "mm": _kernel(_mm, Guarantee.SCHEDULE),
    "addmm": _kernel(_addmm, Guarantee.SCHEDULE),
    "bmm": _kernel(_bmm, Guarantee.BATCH),
    "baddbmm": _kernel(_baddbmm, Guarantee.BATCH),
    "linear": _kernel(_linear, Guarantee.SCHEDULE),
}
