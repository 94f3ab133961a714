"""Contract of the running sum: cumsum.

Order: serial from the first element, in fp32 (float64 for float64); every prefix is rounded on
its own. Integers are exact in any order and use torch's kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from batch_invariant.ops.contract import Case, Draw, Op
from batch_invariant.ops.probe import of_rows, row_probe
from batch_invariant.ops.reduce import result_dtype
from batch_invariant.ops.reduce_cases import sum_bound
from batch_invariant.ops.variant import Args, Axes, Variant


def cumsum(self: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The running sum along `dim`, as `torch.cumsum`; shape of the input."""
    out: torch.Tensor = torch.ops.batch_invariant.cumsum.default(self, dim, dtype=dtype)
    return out


def _fake(self: torch.Tensor, dim: int, *, dtype: Any = None) -> torch.Tensor:
    return self.new_empty(self.shape, dtype=result_dtype(self, dtype))


def _save(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: torch.Tensor
) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.dim = inputs[1]


def _back(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    if grad.dim() == 0:
        return grad.to(ctx.dtype), None
    flipped = cumsum(grad.flip(ctx.dim), ctx.dim).flip(ctx.dim)
    return flipped.to(ctx.dtype), None


def _case(n: int) -> Case:
    return Case(f"{n}", lambda draw, rows: {"self": draw.rows(rows, n), "dim": -1})


def _case_columns(n: int) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        return {"self": draw.rows(rows, n).mT.contiguous(), "dim": 0}

    return Case(f"{n} over dim 0", args, batch_axes={"self": 1}, out_axes=(1,))


def _prefixes(args: Args, axes: Axes) -> Iterator[Variant]:
    """A running sum of the first elements alone."""
    dim, x = args["dim"], args["self"]
    for part in (x.size(dim) // 3, x.size(dim) - 1):
        beginning = range(part)
        shorter = {**args, "self": x.narrow(dim, 0, part)}
        label = f"the first {part} of {x.size(dim)} elements"
        yield Variant("T7 prefix", label, shorter, beginning, beginning, axes=(dim,))


OPS = (
    Op(
        name="cumsum",
        schema="(Tensor self, int dim, *, ScalarType? dtype=None) -> Tensor",
        fake=_fake,
        reference=torch.cumsum,
        cases=(_case(1024), _case(4099), _case_columns(1030)),
        batch_axes={"self": 0},
        schedule=_prefixes,
        any_size=lambda n=2100: _case(n),
        error_bound=lambda self, dim, dtype: sum_bound(
            self.abs().cumsum(dim), self.cumsum(dim), self.size(dim), dtype
        ),
        probe=row_probe(
            arguments={"dim": -1},
            wide={"dtype": torch.float32},
            read=lambda outputs, values, site: of_rows(outputs[0], site)[:, -1],
            prefix=lambda outputs, k, site: of_rows(outputs[0], site)[:, k - 1],
        ),
        aten={"cumsum": None},
        setup_context=_save,
        backward=_back,
    ),
)
