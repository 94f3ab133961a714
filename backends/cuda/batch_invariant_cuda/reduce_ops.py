"""The reductions as data for kernels: what each adds up, and what becomes of the total."""

from __future__ import annotations

import triton
import triton.language as tl

from batch_invariant_cuda.explog import log
from batch_invariant_cuda.rows import (
    EXPONENTIAL,
    FACTOR,
    MAGNITUDE,
    NONZERO,
    POSITIVE_EXPONENTIAL,
    SQUARE,
    SQUARED_DIFFERENCE,
    VALUE,
)

SUM = tl.constexpr(0)
MEAN = tl.constexpr(1)
PROD = tl.constexpr(2)
NORM0 = tl.constexpr(3)
NORM1 = tl.constexpr(4)
NORM2 = tl.constexpr(5)
VAR = tl.constexpr(6)
STD = tl.constexpr(7)
LOGSUMEXP = tl.constexpr(8)
RSTD = tl.constexpr(9)  # of a normalisation: 1 / sqrt(total / size + divisor)
CENTRED_RSTD = tl.constexpr(10)
EXP_SUM = tl.constexpr(11)
LOG_EXP_SUM = tl.constexpr(12)
MEAN_SQUARE = tl.constexpr(13)

TERM_OF = {
    SUM.value: VALUE.value,
    MEAN.value: VALUE.value,
    PROD.value: FACTOR.value,
    NORM0.value: NONZERO.value,
    NORM1.value: MAGNITUDE.value,
    NORM2.value: SQUARE.value,
    VAR.value: SQUARED_DIFFERENCE.value,
    STD.value: SQUARED_DIFFERENCE.value,
    LOGSUMEXP.value: POSITIVE_EXPONENTIAL.value,
    RSTD.value: SQUARE.value,
    CENTRED_RSTD.value: SQUARED_DIFFERENCE.value,
    EXP_SUM.value: EXPONENTIAL.value,
    LOG_EXP_SUM.value: EXPONENTIAL.value,
    MEAN_SQUARE.value: SQUARE.value,
}
"""The terms of the (last) sum of each reduction."""


@triton.constexpr_function
def last_term(op):
    """`TERM_OF` inside a kernel."""
    return TERM_OF[op]


@triton.constexpr_function
def first_term(op):
    """The terms of the sum that gives the mean."""
    return VALUE.value


@triton.constexpr_function
def needs_mean(op):
    """Whether the terms are differences from the mean."""
    return TERM_OF[op] == SQUARED_DIFFERENCE.value


@triton.jit
def finished(total, top, size, divisor, OP: tl.constexpr):
    """The result of a reduction from its total, in fp32; size is the number of elements."""
    y = total
    if OP == MEAN or OP == MEAN_SQUARE:  # noqa: SIM109  (Triton has no `in`)
        y = tl.div_rn(total, size)
    elif OP == NORM2:
        y = tl.sqrt_rn(total)
    elif OP == VAR:
        y = tl.div_rn(total, divisor)
    elif OP == STD:
        y = tl.sqrt_rn(tl.div_rn(total, divisor))
    elif OP == LOGSUMEXP:
        y = top + log(total)
    elif OP == RSTD or OP == CENTRED_RSTD:  # noqa: SIM109  (Triton has no `in`)
        mean = tl.div_rn(total, size)
        y = tl.div_rn(1.0, tl.sqrt_rn(mean + divisor))
    elif OP == LOG_EXP_SUM:
        y = log(total)
    return y
