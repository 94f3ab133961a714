"""exp, from elementwise multiplications and additions alone.

Nothing is added across elements, and yet a vendor's exp may use other instructions for the end of
a tensor than for its body. Additions and multiplications are rounded alike in both.
"""

from __future__ import annotations

import math

import torch

from batch_invariant.backend import Kernel
from batch_invariant.guarantee import Guarantee
from batch_invariant.order import undeclared
from batch_invariant_sample.dtypes import DTYPES, check_dtype

# ln 2 in two parts: a multiple of the first, which has few bits, is exact in fp32.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4


def exp_fp32(x: torch.Tensor) -> torch.Tensor:
    """e to the power of every element of an fp32 tensor.

    x = k ln 2 + r with |r| <= ln(2) / 2; exp(r) is its Taylor polynomial of degree 7, whose error
    is far below an fp32 rounding there; exp(x) = 2^k exp(r).
    """
    x = x.clamp(-110, 90)  # beyond, the result is 0 or inf anyway
    k = (x * math.log2(math.e)).round()
    r = x - k * _LN2_HIGH
    r = r - k * _LN2_LOW
    e = torch.full_like(r, 1 / math.factorial(7))
    for degree in reversed(range(7)):
        e = e * r + 1 / math.factorial(degree)
    half = (k * 0.5).floor()  # 2^k alone may be out of range where the result is not
    return e * _power_of_two(half) * _power_of_two(k - half)


def _power_of_two(k: torch.Tensor) -> torch.Tensor:
    """2^k for whole numbers of normal range, by their bits."""
    return ((k.to(torch.int32) + 127) << 23).view(torch.float32)


def _exp(self: torch.Tensor) -> torch.Tensor:
    check_dtype("exp", self)
    return exp_fp32(self.float()).to(self.dtype)


KERNELS = {
    "exp": Kernel(
        fn=_exp,
        guarantee=Guarantee.SCHEDULE,
        dtypes=DTYPES,
        order=undeclared("elementwise"),
    )
}
