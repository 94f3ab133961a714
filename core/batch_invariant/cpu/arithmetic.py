"""Operations that round once: torch's two bodies agree on them, so its kernels stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batch_invariant.cpu.overloads import parts
from batch_invariant.cpu.vector_body import Function
from batch_invariant.errors import UncoveredOpError
from batch_invariant.stock import stock

_WIDEST = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}


def has_alpha(operands: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("alpha", 1) != 1)


def has_complex(operands: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(t.is_complex() for t in operands)


class Arithmetic:
    """One correctly rounded operation, straight to torch's kernel; what is not, to `fn`.

    A number among the operands becomes a tensor of no dimensions in double precision. That is
    what torch computes with, except for its dtype rules: there such a tensor counts for more.
    """

    def __init__(
        self,
        fn: Function,
        variant: str,
        writes: list[str],
        inexact: Callable[[tuple[Any, ...], dict[str, Any]], bool],
    ) -> None:
        self.fn = fn
        self.kernel = stock(variant)
        self.writes = writes
        self.in_place = parts(variant)[0].endswith("_")
        self.subtracts = variant.startswith("sub")
        self.inexact = inexact

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for i, operand in enumerate(args):
            if not isinstance(operand, Tensor):
                return self._with_number(i, args, kwargs)
        if self.inexact(args, kwargs):
            return self.fn(*args, **kwargs)
        return self.kernel(*args, **kwargs)

    def _with_number(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operands = list(args)
        number, tensor = operands[i], operands[1 - i]
        weaker = tensor.is_floating_point() or tensor.is_complex() or isinstance(number, int)
        if tensor.dim() and (weaker or self.in_place):
            operands[i] = torch.scalar_tensor(number, dtype=_WIDEST[type(number)])
            return self(*operands, **kwargs)
        if self.in_place:
            operands[1 - i] = tensor.view(1)
            self(*operands, **kwargs)
            return tensor
        if tensor.dtype is torch.bool and self.subtracts:
            operands[i] = torch.scalar_tensor(number, dtype=_WIDEST[type(number)])
            return self.kernel(*operands, **kwargs)  # raises: torch subtracts no bools
        # Converted first, and with a dimension, so that the number no longer matters for dtypes.
        operands[1 - i] = tensor.to(torch.result_type(tensor, number))
        if not tensor.dim():
            operands[1 - i] = operands[1 - i].view(1)
        if not self.writes:
            return self(*operands, **kwargs).view(tensor.shape)
        (name,) = self.writes
        result = self(*operands, **kwargs | {name: kwargs[name].new_empty(0)})
        return kwargs[name].resize_(tensor.shape).copy_(result.view(tensor.shape))


class IndexAdd:
    """Slices are added elementwise: with alpha, the product is rounded before it is added."""

    def __init__(self, variant: str) -> None:
        self.kernel = stock(variant)
        self.scale = stock("mul.Tensor")

    def __call__(
        self, self_: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: Any = 1, **out: Any
    ) -> Any:
        if alpha != 1:
            refuse_complex("index_add", source)
            source = self.scale(source, torch.scalar_tensor(alpha, dtype=source.dtype))
        return self.kernel(self_, dim, index, source, **out)


def refuse_complex(name: str, *tensors: Tensor) -> None:
    if any(t.is_complex() for t in tensors):
        raise UncoveredOpError(
            f"aten::{name}",
            ", ".join(f"{t.dtype}{list(t.shape)}" for t in tensors),
            "for complex numbers torch chooses a formula for a whole vector at a time",
        )
