"""rms_norm: a lane sum of rounded squares, correctly rounded division and root, two products."""

from __future__ import annotations

import torch

from batch_invariant.backend import Kernel
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.norm import check_rms_norm
from batch_invariant.ops.row_order import ROW_ORDER, lane_sum
from batch_invariant.stock import stock
from batch_invariant_sample.dtypes import DTYPES, check_dtype


def _rms_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float | None,
    residual: torch.Tensor | None,
    variance_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_rms_norm(input, weight, residual, variance_size)
    check_dtype("rms_norm", input, weight, residual)
    n = input.size(-1)
    s = input.float() if residual is None else input.float() + residual.float()
    rows = s.reshape(-1 if n else input.numel(), n)
    size = n if variance_size is None else variance_size
    head = rows[:, :size]
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    # The root of an fp32 number, taken in float64 and rounded, is the correctly rounded one. That
    # of torch in fp32 is not always: it differs from machine to machine, and is not portable.
    # While the mode is on, it guards torch.sqrt; `stock` is torch's own kernel all the same.
    root = stock("sqrt")((lane_sum(head * head) / size + eps).double()).float()
    r = torch.ones_like(root) / root  # 1 / root would be a reciprocal, which the mode refuses
    out = rows * r[:, None]
    out = out if weight is None else out * weight.float()
    # The second output is the rounded sum with the residual; without one it is empty.
    total = input.new_empty(0) if residual is None else s.to(input.dtype)
    return out.to(input.dtype).view(input.shape), total


KERNELS = {
    "rms_norm": Kernel(
        fn=_rms_norm, guarantee=Guarantee.SCHEDULE, dtypes=DTYPES, order=ROW_ORDER, portable=DTYPES
    )
}
