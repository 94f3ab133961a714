"""The product of matrices that every operator of `matmul` and attention is made of, by tier.

`product(a, b, dtype)` takes [M, K] and [K, N], or [B, M, K] and [B, K, N], of one dtype, and
returns the product rounded once to `dtype`, which is that of the operands or float32.

Order over K: D one chain of rounded products, `serial()`; C a chain of fixed tiles, inside which
the cube unit adds; A and B the vendor's, compared with itself on this device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from batch_invariant.errors import OpNotSupported
from batch_invariant.order import Order, serial, undeclared
from batch_invariant.stock import stock
from batch_invariant_ascend import admission
from batch_invariant_ascend.switches import check_level_3, torch_npu
from batch_invariant_ascend.tiers import (
    Candidate,
    Choice,
    Tier,
    ascendc,
    choose,
    need_level_3,
    need_triton,
)

Product = Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]

FRACTAL_NZ = 29
"""The format of CANN in which a matrix is stored as a grid of tiles."""


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See the module. Raises `OpNotSupported` for weights in the NZ format."""
    check_format(a, b)
    if 0 in (*a.shape, *b.shape):
        return a.new_zeros(*a.shape[:-1], b.size(-1), dtype=dtype)
    return choice().fn(a, b, dtype)


@cache
def choice() -> Choice:
    """The tier of products here."""
    return choose(
        "products of matrices",
        (
            Candidate(Tier.A, _native, _varies),
            Candidate(Tier.B, _ascendc, _varies),
            Candidate(Tier.C, _triton, _varies),
            Candidate(Tier.D, lambda: _serial),
        ),
    )


def order() -> Order:
    """The order over K of the chosen tier."""
    return {
        Tier.A: undeclared("CANN's own, batch consistent"),
        Tier.B: undeclared("AscendC's own"),
        Tier.C: undeclared("tiles of 64 terms ascending, each by the cube unit"),
        Tier.D: serial(),
    }[choice().tier]


def check_format(*tensors: torch.Tensor) -> None:
    """Raises unless the tensors are stored plainly: NZ weights take another kernel."""
    for tensor in tensors:
        if torch_npu().get_npu_format(tensor) == FRACTAL_NZ:
            raise OpNotSupported(
                f"a matrix of shape {list(tensor.shape)} is stored in the format FRACTAL_NZ, whose "
                "products take another kernel; load the model with the backend selected, or "
                "with VLLM_ASCEND_ENABLE_NZ=0 (newer vllm-ascend: weight_nz_mode=0), or convert "
                "it with torch_npu.npu_format_cast(weight, 2)"
            )


def _native() -> Product:
    need_level_3()
    two, three = stock("mm", "PrivateUse1"), stock("bmm", "PrivateUse1")

    def native(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        check_level_3()
        out: torch.Tensor = (two if a.dim() == 2 else three)(a.to(dtype), b.to(dtype))
        return out

    return native


def _ascendc() -> Product:
    two, three = ascendc("npu_mm_batch_invariant"), ascendc("npu_matmul_batch_invariant")

    def batch_invariant(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # AscendC has no addend: for a bias the fp32 product is wanted, of operands widened exactly.
        out: torch.Tensor = (two if a.dim() == 2 else three)(a.to(dtype), b.to(dtype))
        return out

    return batch_invariant


def _triton() -> Product:
    need_triton()
    from batch_invariant_ascend.gemm import product as tiled

    return tiled


def _serial(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    a, b = a.float(), b.float()
    out = a.new_zeros(*a.shape[:-1], b.size(-1))
    for k in range(a.size(-1)):
        # A product and a sum, rounded each: addcmul might fuse them on one chip and not another.
        out += a[..., k : k + 1] * b[..., k : k + 1, :]
    return out.to(dtype)


def _varies(fn: Callable[..., torch.Tensor]) -> str | None:
    for dtype in admission.dtypes():
        x = admission.values(admission.ROWS, 1100, dtype=dtype).npu()
        w = admission.values(130, 1100, dtype=dtype, cancelling=False).npu().mT
        for out in {dtype, torch.float32}:
            found = admission.rows_agree(lambda part, w=w, out=out: fn(part, w, out), x)
            found = found or admission.rows_agree(
                lambda part, w=w, out=out: fn(part[:, None], w.expand(len(part), *w.shape), out), x
            )
            if found is not None:
                return f"products: {found}"
    return None
