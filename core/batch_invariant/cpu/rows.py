"""Calls of the native row operations on tensors; native/rows.h states what each computes."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

from batch_invariant.cpu import native
from batch_invariant.errors import OpNotSupported

SUM, MEAN, PROD, NORM0, NORM1, NORM2, NORM_INF, NORM_NEG_INF = range(8)
SOFTMAX, LOG_SOFTMAX = range(2)
LARGEST, SMALLEST = range(2)

_CODE = {getattr(torch, name): code for name, code in native.DTYPES.items()}

_TYPES = {"i": ctypes.c_int32, "l": ctypes.c_int64, "p": ctypes.c_void_p, "d": ctypes.c_double}
_SIGNATURES = {
    "bi_row_reduce": "iiillplpi",
    "bi_row_var": "iiillpldppi",
    "bi_row_softmax": "iiillplpli",
    "bi_row_logsumexp": "iillplpi",
    "bi_row_softmax_backward": "iiillplplpli",
    "bi_rms_norm": "iiilllplplpdplplpi",
    "bi_layer_norm": "iiillllplppdplppi",
    "bi_row_cumsum": "iillplpli",
    "bi_row_topk": "iilllplppi",
    "bi_row_argmax": "iillplpi",
    "bi_row_sample": "illpppppppi",
    "bi_sample_weights": "illpppi",
    "bi_column_reduce": "iiilllpllpi",
    "bi_column_var": "iiilllplldppi",
    "bi_column_cumsum": "iilllpllpi",
}
"""Argument types of the entry points, a letter each, in the order of native/rows.h."""


@cache
def _entry(name: str) -> Any:
    entry = getattr(native.library(), name)
    entry.argtypes = [_TYPES[letter] for letter in _SIGNATURES[name]]
    entry.restype = ctypes.c_int32
    return entry


def _code(dtype: torch.dtype) -> int:
    try:
        return _CODE[dtype]
    except KeyError:
        raise OpNotSupported(
            f"the CPU kernels take {', '.join(map(str, _CODE))}; got {dtype}"
        ) from None


def _call(name: str, *args: Any) -> None:
    status = _entry(name)(*args, torch.get_num_threads())
    if status:
        raise OpNotSupported(f"the native kernel {name} refused the call: {native.STATUS[status]}")


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def reduce(op: int, x: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """One of SUM ... NORM_NEG_INF of contiguous data.

    Over the rows of [rows, n], returns [rows]; or over the middle of [outer, n, inner], with the
    same bits, returns [outer * inner].
    """
    codes = (op, _code(x.dtype), _code(out_dtype))
    out = torch.empty(_results(x), dtype=out_dtype)
    if x.dim() == 2:
        rows, n = x.shape
        _call("bi_row_reduce", *codes, rows, n, x.data_ptr(), n, out.data_ptr())
    else:
        _call("bi_column_reduce", *codes, *x.shape, x.data_ptr(), *x.stride()[:2], out.data_ptr())
    return out


def variance(x: torch.Tensor, correction: float, root: bool) -> torch.Tensor:
    """Variance, or its root, of contiguous data, laid out as for `reduce`."""
    code = _code(x.dtype)
    out = torch.empty(_results(x), dtype=x.dtype)
    if x.dim() == 2:
        rows, n = x.shape
        where = (rows, n, x.data_ptr(), n)
        _call("bi_row_var", root, code, code, *where, correction, out.data_ptr(), None)
    else:
        where = (*x.shape, x.data_ptr(), *x.stride()[:2])
        _call("bi_column_var", root, code, code, *where, correction, out.data_ptr(), None)
    return out


def _results(x: torch.Tensor) -> int:
    return x.size(0) if x.dim() == 2 else x.size(0) * x.size(2)


def softmax(op: int, x: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """SOFTMAX or LOG_SOFTMAX of the rows of a contiguous matrix."""
    rows, n = x.shape
    out = torch.empty(rows, n, dtype=out_dtype)
    _call(
        "bi_row_softmax",
        op,
        _code(x.dtype),
        _code(out_dtype),
        rows,
        n,
        x.data_ptr(),
        n,
        out.data_ptr(),
        n,
    )
    return out


def softmax_backward(
    op: int, grad: torch.Tensor, output: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """The gradient of the input of SOFTMAX or LOG_SOFTMAX, for contiguous matrices."""
    rows, n = grad.shape
    out = torch.empty(rows, n, dtype=out_dtype)
    _call(
        "bi_row_softmax_backward",
        op,
        _code(grad.dtype),
        _code(out_dtype),
        rows,
        n,
        grad.data_ptr(),
        n,
        output.data_ptr(),
        n,
        out.data_ptr(),
        n,
    )
    return out


def logsumexp(x: torch.Tensor) -> torch.Tensor:
    """log(sum(exp)) of the rows of a contiguous matrix; returns [rows]."""
    rows, n = x.shape
    out = torch.empty(rows, dtype=x.dtype)
    code = _code(x.dtype)
    _call("bi_row_logsumexp", code, code, rows, n, x.data_ptr(), n, out.data_ptr())
    return out


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    variance_size: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """rms_norm of the rows of a contiguous matrix, and the rounded sum with the residual."""
    rows, n = x.shape
    out = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    code = _code(x.dtype)
    weight_code = code if weight is None else _code(weight.dtype)
    _call(
        "bi_rms_norm",
        code,
        weight_code,
        code,
        rows,
        n,
        variance_size,
        x.data_ptr(),
        n,
        _address(residual),
        n,
        _address(weight),
        eps,
        out.data_ptr(),
        n,
        _address(total),
        n,
        None,
    )
    return out, total


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    spatial: int = 0,
    groups: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """layer_norm of the rows of a contiguous matrix, with mean and reciprocal deviation [rows]."""
    rows, n = x.shape
    out = torch.empty_like(x)
    mean, rstd = torch.empty(rows), torch.empty(rows)
    code = _code(x.dtype)
    parameter = weight if weight is not None else bias
    parameter_code = code if parameter is None else _code(parameter.dtype)
    _call(
        "bi_layer_norm",
        code,
        parameter_code,
        code,
        rows,
        n,
        spatial,
        groups,
        x.data_ptr(),
        n,
        _address(weight),
        _address(bias),
        eps,
        out.data_ptr(),
        n,
        mean.data_ptr(),
        rstd.data_ptr(),
    )
    return out, mean, rstd


def cumsum(x: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Running sums of contiguous data along [rows, n], or along the middle of [outer, n, inner]."""
    codes = (_code(x.dtype), _code(out_dtype))
    out = torch.empty(x.shape, dtype=out_dtype)
    if x.dim() == 2:
        rows, n = x.shape
        _call("bi_row_cumsum", *codes, rows, n, x.data_ptr(), n, out.data_ptr(), n)
    else:
        _call("bi_column_cumsum", *codes, *x.shape, x.data_ptr(), *x.stride()[:2], out.data_ptr())
    return out


def topk(x: torch.Tensor, k: int, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The first k values and indices of the rows of a contiguous matrix."""
    rows, n = x.shape
    values = torch.empty(rows, k, dtype=x.dtype)
    indices = torch.empty(rows, k, dtype=torch.int64)
    _call(
        "bi_row_topk",
        LARGEST if largest else SMALLEST,
        _code(x.dtype),
        rows,
        n,
        k,
        x.data_ptr(),
        n,
        values.data_ptr(),
        indices.data_ptr(),
    )
    return values, indices


def argmax(x: torch.Tensor) -> torch.Tensor:
    """The index of the largest element of the rows of a contiguous matrix."""
    rows, n = x.shape
    out = torch.empty(rows, dtype=torch.int64)
    _call("bi_row_argmax", LARGEST, _code(x.dtype), rows, n, x.data_ptr(), n, out.data_ptr())
    return out


def sample(
    x: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor | None,
    keep: torch.Tensor | None,
) -> torch.Tensor:
    """The column that each row of a contiguous matrix draws; keep: [rows, n] of bool."""
    rows, n = x.shape
    out = torch.empty(rows, dtype=torch.int64)
    # Held by name: the addresses are those of copies where the rows are not dense.
    dense = [t.contiguous() for t in (seeds, positions, temperature)]
    least = None if min_p is None else min_p.contiguous()
    where = (*(t.data_ptr() for t in dense), _address(least), _address(keep))
    _call("bi_row_sample", _code(x.dtype), rows, n, x.data_ptr(), *where, out.data_ptr())
    return out


def sample_weights(x: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """exp((x - first) / temperature) in units of 2^-40 for rows whose first element is the top."""
    rows, n = x.shape
    out = torch.empty(rows, n, dtype=torch.int64)
    heat = temperature.contiguous()
    where = (x.data_ptr(), heat.data_ptr(), out.data_ptr())
    _call("bi_sample_weights", _code(x.dtype), rows, n, *where)
    return out
