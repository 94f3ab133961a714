"""What a query sees of a block and how its scores are capped, for the kernels written in Gluon."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from batch_invariant_cuda.attention_merge import BLOCK

_BLOCK = gl.constexpr(BLOCK)


@gluon.jit
def capped(s, scale, cap):
    """Scores in units of log 2; scale is that of the argument of tanh. As in `varlen_blocks`."""
    return (1.0 - 2.0 / (gl.exp2(s * scale) + 1.0)) * cap


@gluon.jit
def first_block(behind, window, end):
    """The first of `end` blocks that is seen by a row whose last key is in front of `behind`."""
    return gl.minimum(gl.maximum(behind - window, 0) // _BLOCK, end - 1)
