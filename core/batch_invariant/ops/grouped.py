"""Contract of grouped_mm: every group of rows times a matrix of its own, as experts need it.

Order: that of `mm` for each group. A row's bits are those of `mm` with its group's matrix, whatever
rows share its group and however many groups there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from batch_invariant.errors import OpNotSupported
from batch_invariant.ops.contract import Case, Draw, Op
from batch_invariant.ops.matmul_cases import product_bound


def grouped_mm(
    self: torch.Tensor, mat2: torch.Tensor, offs: torch.Tensor | None = None
) -> torch.Tensor:
    """The products of the groups of two operands, as `torch.nn.functional.grouped_mm`.

    offs: int32 [G], ascending; `offs[g]` is where group g ends, along what is cut:
    - self [M, K], mat2 [G, K, N]: rows; returns [M, N]. Rows behind the last group are 0.
    - self [G, M, K], mat2 [K, N]: columns of mat2; returns [M, N], with 0 behind the last group.
    - self [M, K], mat2 [K, N]: K; returns [G, M, N], 0 for an empty group.
    - self [G, M, K], mat2 [G, K, N]: nothing is cut, offs is None; as `bmm`.

    One floating dtype. On a device offs is read by the kernel and not checked: ends are taken as
    at most the size of what is cut.
    """
    out: torch.Tensor = torch.ops.batch_invariant.grouped_mm.default(self, mat2, offs)
    return out


def check_grouped(
    self: torch.Tensor, mat2: torch.Tensor, offs: torch.Tensor | None
) -> tuple[int, ...]:
    """The result's shape; raises unless the operands and offs fit together."""
    shapes = f"{list(self.shape)} and {list(mat2.shape)}"
    if self.dim() not in (2, 3) or mat2.dim() not in (2, 3):
        raise RuntimeError(f"grouped_mm: expected two 2-D or 3-D tensors, got {shapes}")
    torch._check(
        self.size(-1) == mat2.size(-2),
        lambda: f"grouped_mm: shapes {shapes} cannot be multiplied",
    )
    if self.dtype != mat2.dtype:
        raise RuntimeError(
            f"grouped_mm: expected tensors of one dtype, got {self.dtype} and {mat2.dtype}"
        )
    both = self.dim() == mat2.dim() == 3
    if both != (offs is None):
        raise RuntimeError(
            f"grouped_mm: {shapes} " + ("take no offs" if both else "need offs, the groups' ends")
        )
    groups = [t.size(0) for t in (self, mat2) if t.dim() == 3]
    if offs is not None:
        if offs.dim() != 1 or offs.dtype not in (torch.int32, torch.int64):
            raise RuntimeError(
                f"grouped_mm: offs must be int32 [G], got {offs.dtype}{list(offs.shape)}"
            )
        groups.append(offs.size(0))
    torch._check(
        all(count == groups[0] for count in groups),
        lambda: f"grouped_mm: {shapes} and offs differ in the number of groups: {groups}",
    )
    if self.dim() == mat2.dim():
        return (groups[0], self.size(-2), mat2.size(-1))
    return (self.size(-2), mat2.size(-1))


def groups_of(ends: list[int], size: int) -> Iterator[tuple[int, slice]]:
    """The groups that are not empty, and their parts of what is cut; raises for senseless ends."""
    start = 0
    for group, end in enumerate(ends):
        if not start <= end <= size:
            raise RuntimeError(
                f"grouped_mm: offs must be ascending and at most {size}; group {group} is "
                f"{start} to {end}"
            )
        if start < end:
            yield group, slice(start, end)
        start = end


def by_groups(multiply: Any, self: torch.Tensor, mat2: torch.Tensor, offs: torch.Tensor) -> Any:
    """The result, one product after another by `multiply`, for the three forms that are cut."""
    out = self.new_zeros(check_grouped(self, mat2, offs))
    cut = self.size(-2) if mat2.dim() == 3 else mat2.size(-1)
    if self.dim() == mat2.dim():
        cut = self.size(-1)
    for group, part in groups_of(offs.tolist(), cut):
        if self.dim() == mat2.dim():
            out[group] = multiply(self[:, part], mat2[part])
        elif mat2.dim() == 3:
            out[part] = multiply(self[part], mat2[group])
        else:
            out[:, part] = multiply(self[group], mat2[:, part])
    return out


def _fake(self: torch.Tensor, mat2: torch.Tensor, offs: torch.Tensor | None) -> torch.Tensor:
    return self.new_empty(check_grouped(self, mat2, offs))


def _reference(self: torch.Tensor, mat2: torch.Tensor, offs: torch.Tensor | None) -> Any:
    return torch.bmm(self, mat2) if offs is None else by_groups(torch.mm, self, mat2, offs)


def _aten(
    kernel: Any,
    self: torch.Tensor,
    mat2: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    if bias is not None:
        raise OpNotSupported("grouped_mm takes no bias, nor does torch's; add it to the result")
    if out_dtype not in (None, self.dtype):
        raise OpNotSupported(
            f"grouped_mm of {self.dtype} gives {self.dtype}, not {out_dtype}; convert the operands"
        )
    out: torch.Tensor = kernel(self, mat2, offs)
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _back(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    self, mat2, offs = ctx.saved_tensors
    return (
        grouped_mm(grad, mat2.mT, offs) if ctx.needs_input_grad[0] else None,
        grouped_mm(self.mT, grad, offs) if ctx.needs_input_grad[1] else None,
        None,
    )


def _case(groups: int, k: int, n: int) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        # Every group has all rows: what is cut by offs has no rows that can be taken out alone.
        return {
            "self": draw.rows(groups, rows, k),
            "mat2": draw.shared(groups * n, k).view(groups, n, k).mT,
            "offs": None,
        }

    return Case(f"{groups} of {k}x{n}", args)


OPS = (
    Op(
        name="grouped_mm",
        schema="(Tensor self, Tensor mat2, Tensor? offs) -> Tensor",
        fake=_fake,
        reference=_reference,
        cases=(_case(3, 1024, 65), _case(2, 1031, 33)),
        batch_axes={"self": 1},
        out_axes=(1,),
        any_size=lambda groups=2, k=1100, n=40: _case(groups, k, n),
        error_bound=lambda self, mat2, offs, dtype: product_bound(self, mat2, None, dtype),
        aten={"_grouped_mm": _aten},
        setup_context=_save,
        backward=_back,
    ),
)
