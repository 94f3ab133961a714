"""The one order in which a row is added up, in plain torch.

A row of n elements is cut into segments of `SEGMENT`. Inside a segment, lane i (of `LANES`) starts
at +0.0 and adds elements i, i + LANES, i + 2 * LANES, ... one after another. The segments' lanes
are added lane by lane in ascending order of the segments. Then the lanes are folded by halves,
first half + second half, until one is left. Missing elements are +0.0.

The order is a function of n alone and made of elementwise additions only, so every device that
rounds them as IEEE 754 says has the same bits, at any tile, vector width or number of threads. A
lane is never -0.0 (it starts at +0.0, and x + -x is +0.0), so adding a missing +0.0 changes
nothing: a kernel may skip it, and may use the next power of two as the number of lanes of a row
shorter than `LANES`.

This is the definition; kernels must equal it bit for bit. It is also what float64 inputs use.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from batch_invariant.order import lanes

LANES = 1024
SEGMENT = 8192
ROW_ORDER = lanes(LANES, SEGMENT)


def _fold(x: Tensor, identity: float, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(
            f"expected a floating-point tensor of shape [rows, n], got {x.dtype} {list(x.shape)}"
        )
    if x.dtype != torch.float64:
        x = x.float()
    rows, n = x.shape
    lanes = x.new_full((rows, LANES), identity)
    for begin in range(0, n, SEGMENT):
        segment = x[:, begin : begin + SEGMENT]
        partial = x.new_full((rows, LANES), identity)
        for column in range(0, segment.shape[1], LANES):
            terms = segment[:, column : column + LANES]
            partial[:, : terms.shape[1]] = combine(partial[:, : terms.shape[1]], terms)
        lanes = combine(lanes, partial)
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = combine(lanes[:, :half], lanes[:, half:])
    total = lanes[:, 0]
    # Sign and payload of a NaN depend on the CPU and on the order of operands: one for all.
    return total.masked_fill(total.isnan(), torch.nan)


def lane_sum(x: Tensor) -> Tensor:
    """The sum of each row of x, in the order of this module.

    Args:
        x: [rows, n], any floating dtype and strides.

    Returns:
        [rows], unrounded: float64 for float64 input, else float32. NaN is the positive quiet NaN
        without payload (0x7fc00000 in float32).

    Raises:
        ValueError: x is no floating-point matrix.
    """
    return _fold(x, 0.0, torch.add)


def lane_prod(x: Tensor) -> Tensor:
    """The product of each row of x: `lane_sum` with * and 1.0 in place of + and 0.0."""
    return _fold(x, 1.0, torch.mul)
