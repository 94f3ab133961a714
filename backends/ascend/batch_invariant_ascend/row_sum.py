"""The sum of each row, of which every reduction and norm is made, by tier.

`row_sum(x)` takes fp32 [rows, n] and returns fp32 [rows]. C and D add in the order of
`ops/row_order.py`; A and B in the vendor's, compared with itself on this device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from batch_invariant.ops.row_order import ROW_ORDER, lane_sum
from batch_invariant.order import Order, undeclared
from batch_invariant.stock import stock
from batch_invariant_ascend import admission
from batch_invariant_ascend.switches import check_level_3
from batch_invariant_ascend.tiers import (
    Candidate,
    Choice,
    Tier,
    ascendc,
    choose,
    need_level_3,
    need_triton,
)

RowSum = Callable[[torch.Tensor], torch.Tensor]


def row_sum(x: torch.Tensor) -> torch.Tensor:
    """See the module."""
    if not x.numel():
        return x.new_zeros(len(x))
    return choice().fn(x.contiguous())


@cache
def choice() -> Choice:
    """The tier of row sums here."""
    return choose(
        "sums of rows",
        (
            Candidate(Tier.A, _native, _varies),
            Candidate(Tier.B, _ascendc, _varies),
            Candidate(Tier.C, _triton, _varies),
            Candidate(Tier.D, lambda: lane_sum),
        ),
    )


def order() -> Order:
    """The order of the chosen tier."""
    return {
        Tier.A: undeclared("CANN's own, batch consistent"),
        Tier.B: undeclared("AscendC's own"),
        Tier.C: ROW_ORDER,
        Tier.D: ROW_ORDER,
    }[choice().tier]


def _native() -> RowSum:
    need_level_3()
    add = stock("sum.dim_IntList", "PrivateUse1")

    def native(x: torch.Tensor) -> torch.Tensor:
        check_level_3()
        out: torch.Tensor = add(x, [1], False)
        return out

    return native


def _ascendc() -> RowSum:
    add = ascendc("npu_reduce_sum_batch_invariant")
    # The last dimension only, as a non-negative number: see docs/ascend.md.
    return lambda x: add(x, 1, False)


def _triton() -> RowSum:
    need_triton()
    from batch_invariant_ascend.row_kernels import row_sum as lanes

    return lanes


def _varies(fn: Callable[..., torch.Tensor]) -> str | None:
    for n in (1100, 4099, 20011):
        x = admission.values(admission.ROWS, n, dtype=torch.float32).npu()
        if (found := admission.rows_agree(fn, x)) is not None:
            return f"sums of {n}: {found}"
    return None
