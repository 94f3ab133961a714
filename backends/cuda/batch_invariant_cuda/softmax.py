"""softmax, log_softmax and their derivatives on CUDA, in the order of `rows.py`.

The exact maximum, exp of the differences by `explog.py`, their lane sum, one division (for results
of 16 bits a product) or one logarithm, one rounding: the bits of the CPU reference. float64 runs
the same order in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

from batch_invariant.backend import Kernel
from batch_invariant.errors import OpNotSupported
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
from batch_invariant.ops.dims import from_rows_along, normalize, rows_along
from batch_invariant.ops.row_order import ROW_ORDER, lane_sum
from batch_invariant.ops.softmax import check_softmax_backward
from batch_invariant.stock import stock
from batch_invariant_cuda import segments, softmax_long, softmax_short
from batch_invariant_cuda.reduce import cast, finish
from batch_invariant_cuda.reduce_ops import EXP_SUM, LOG_EXP_SUM
from batch_invariant_cuda.row_launch import Calls, Plan, plan_of
from batch_invariant_cuda.rows import exponential
from batch_invariant_cuda.softmax_kernels import backward, held, segment, walked


def _split_rows(log: bool, x: torch.Tensor, out: torch.Tensor, shape: Plan) -> None:
    rows, n = x.shape
    top = segments.tops(x, shape)
    term = exponential(8 * out.element_size(), False)
    lanes = segments.lanes(x, top, segments.TOP_SHIFT.value, term, shape)
    op = LOG_EXP_SUM.value if log else EXP_SUM.value
    total = finish(lanes, None, op, float(n), 0.0, torch.float32)
    count, tops = segments.segments_of(n), top.size(2)
    segment(
        rows * count,
        (x, top, total, out),
        (n // shape.unit, count, tops),
        (log, triton.next_power_of_2(tops), shape.unit),
        8,
        shape.wide,
    )


def softmax_rows(log: bool, x: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """softmax or log_softmax of the rows of contiguous x [rows, n] in fp32, bf16 or fp16."""
    rows, n = x.shape
    out = torch.empty(rows, n, dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    shape = plan_of(x)
    found = _launch(log, x, out, shape)
    if found is None:
        _split_rows(log, x, out, shape)
        return out
    kernel, launch = found
    kernel(*launch)
    return out


def _launch(log: bool, x: torch.Tensor, out: torch.Tensor, shape: Plan) -> Any:
    """A kernel and its launch; None for rows that are split, which several launches handle."""
    rows, n = x.shape
    found = softmax_long.launch_of(log, x, out, shape)
    if found is None:
        found = softmax_short.launch_of(log, x, out, shape)
    if found is not None or shape.split:
        return found
    if not shape.tiles:
        tail = ((log, shape.unit), shape.warps, shape.wide)
        return walked, (rows, (x, out), (n // shape.unit,), *tail)
    static = (log, shape.width, shape.parts, shape.tiles, shape.full, shape.unit)
    return held, (rows, (x, out), (n // shape.unit,), static, shape.warps, shape.wide)


def _backward_rows(
    log: bool, g: torch.Tensor, y: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    rows, n = g.shape
    out = torch.empty(rows, n, dtype=out_dtype, device=g.device)
    if not out.numel():
        return out
    shape = plan_of(g, y)
    backward(
        rows,
        (g, y, out),
        (n // shape.unit,),
        (log, shape.width, shape.parts, shape.tiles, shape.full, shape.unit),
        shape.warps,
        shape.wide,
    )
    return out


def _repeat(
    log: bool, x: torch.Tensor, dim: int, dtype: Any, out: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The same call again as a launch and nothing else, where it is one launch on x as it lies."""
    if not x.is_cuda or x.dtype not in FLOATS or not x.numel() or not x.is_contiguous():
        return None
    if x.dim() == 0 or dim not in (-1, x.dim() - 1) or cast(x, dtype) is not x:
        return None
    matrix = x.view(-1, x.size(-1))
    shape = plan_of(matrix)
    made = _launch(log, matrix, out, shape)
    if made is None:
        return None
    kernel, launch = made
    start = kernel.repeat(*launch)
    size, result = out.shape, out.dtype

    def again(x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(size, dtype=result)
        start(x.data_ptr(), out.data_ptr())
        return out

    return None if start is None else again


_calls = Calls()


def _forward(log: bool) -> Callable[..., torch.Tensor]:
    def softmax(self: torch.Tensor, dim: int, dtype: Any = None) -> torch.Tensor:
        key = (
            *(log, self.shape, self.stride(), self.dtype, self.get_device()),
            *(self.data_ptr() & 15, dim, dtype),
        )
        call = _calls.find(key)
        if call is not None:
            found: torch.Tensor = call(self)
            return found
        out = first(self, dim, dtype)
        call = _repeat(log, self, dim, dtype, out)
        if call is not None:
            _calls.keep(key, call)
        return out

    def first(self: torch.Tensor, dim: int, dtype: Any) -> torch.Tensor:
        normalize(dim, self.dim())
        x = cast(self, dtype)
        if not x.dtype.is_floating_point:
            raise OpNotSupported(f"softmax: expected a floating point tensor, got {x.dtype}")
        matrix = rows_along(x, dim)
        if matrix.dtype == torch.float64:
            out = _float64(log, matrix)
        else:
            out = softmax_rows(log, matrix, dtype or x.dtype)
        return from_rows_along(out, x.shape, dim)

    return softmax


def _float64(log: bool, x: torch.Tensor) -> torch.Tensor:
    if x.numel() == 0:
        return x
    shifted = x - stock("amax", "CUDA")(x, [1], True)
    e = shifted.exp()
    total = lane_sum(e)[:, None]
    return shifted - total.log() if log else e / total


def _derivative(log: bool) -> Callable[..., torch.Tensor]:
    def softmax_backward(
        grad_output: torch.Tensor, output: torch.Tensor, dim: int, input_dtype: torch.dtype
    ) -> torch.Tensor:
        check_softmax_backward(grad_output, output, dim)
        g, y = rows_along(grad_output, dim), rows_along(output, dim)
        if g.dtype == torch.float64:
            total = lane_sum(g if log else g * y)[:, None]
            out = g - y.exp() * total if log else (g - total) * y
        elif input_dtype in (g.dtype, torch.float32):
            out = _backward_rows(log, g, y, input_dtype)
        else:
            out = _backward_rows(log, g, y, g.dtype).to(input_dtype)
        return from_rows_along(out, grad_output.shape, dim)

    return softmax_backward


def _kernel(fn: Callable[..., Any]) -> Kernel:
    return Kernel(
        fn=fn,
        guarantee=Guarantee.SCHEDULE,
        dtypes=frozenset((*FLOATS, torch.float64)),
        order=ROW_ORDER,
        portable=frozenset(FLOATS),
    )


KERNELS = {
    "softmax": _kernel(_forward(False)),
    "log_softmax": _kernel(_forward(True)),
    "softmax_backward": _kernel(_derivative(False)),
    "log_softmax_backward": _kernel(_derivative(True)),
}
