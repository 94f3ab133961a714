"""What the mode needs beyond the contracts: aten overloads with kernels of their own on an NPU.

torch_npu registers `matmul` and its derivative, products with an output dtype, and `softmax.int`,
for its device; on other devices torch takes them apart. `matmul` reaches neither mm nor bmm there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from batch_invariant.errors import OpNotSupported
from batch_invariant.ops import matmul as contract
from batch_invariant.ops.reduce import sum as sum_of
from batch_invariant_ascend import elementwise
from batch_invariant_ascend.dtypes import check_dtype
from batch_invariant_ascend.product import product

_KEY = "PrivateUse1"
_DECOMPOSED = "is made of operators that the mode covers"
_COPIES = "copies elements, or moves state: nothing is computed"


def overrides() -> dict[str, Callable[..., Any]]:
    """The aten overloads that exist here, by name; each callable takes the keyset first."""
    wanted = {
        "matmul": _matmul,
        "matmul.out": _out(_matmul),
        "matmul_backward": _matmul_backward,
        "mm.dtype": _with_dtype(2),
        "mm.dtype_out": _out(_with_dtype(2)),
        "bmm.dtype": _with_dtype(3),
        "bmm.dtype_out": _out(_with_dtype(3)),
        "addmm.dtype": _added_with_dtype,
        "addmm.dtype_out": _out(_added_with_dtype),
        "baddbmm.dtype": _added_with_dtype,
        "baddbmm.dtype_out": _out(_added_with_dtype),
        "addbmm": _addbmm,
        "addbmm.out": _out(_addbmm),
        "addbmm_": _addbmm_in_place,
        "softmax.int": _softmax,
    }
    return {
        name: fn
        for name, fn in wanted.items()
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", _KEY)
    }


def harmless() -> dict[str, str | None]:
    """Aten operators whose kernels keep the promise on this device, and why."""
    return {
        **elementwise.harmless(),
        **dict.fromkeys("record_stream contiguous one".split(), _COPIES),
        **dict.fromkeys("one_hot isfinite isclose".split(), _DECOMPOSED),
    }


def _matmul(_keyset: Any, self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return contract.matmul(self, other)


def _matmul_backward(
    _keyset: Any,
    grad: torch.Tensor,
    self: torch.Tensor,
    other: torch.Tensor,
    mask: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    left = self[None] if self.dim() == 1 else self
    right = other[:, None] if other.dim() == 1 else other
    g = grad if self.dim() > 1 else grad.unsqueeze(-1 if other.dim() == 1 else -2)
    g = g.unsqueeze(-1) if other.dim() == 1 else g
    g_left = g_right = None
    if mask[0]:
        g_left = _summed_to(contract.matmul(g, right.mT), left).view(self.shape)
    if mask[1] and right.dim() == 2:
        # One matrix for every row: the rows of all batches are the sum's terms.
        rows = (left.reshape(-1, left.size(-1)), g.reshape(-1, g.size(-1)))
        g_right = contract.mm(rows[0].mT, rows[1]).view(other.shape)
    elif mask[1]:
        g_right = _summed_to(contract.matmul(left.mT, g), right).view(other.shape)
    return g_left, g_right


def _summed_to(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The gradient of an operand that was broadcast."""
    lead = grad.dim() - like.dim()
    dims = [d for d in range(grad.dim()) if d < lead or (like.size(d - lead) == 1 != grad.size(d))]
    return sum_of(grad, dims, True).reshape(like.shape) if dims else grad


def _with_dtype(rank: int) -> Callable[..., torch.Tensor]:
    check = contract.check_mm if rank == 2 else contract.check_bmm

    def products(
        _keyset: Any, self: torch.Tensor, mat2: torch.Tensor, out_dtype: torch.dtype
    ) -> torch.Tensor:
        check(self, mat2)
        check_dtype("mm", self)
        _check_out_dtype(self, out_dtype)
        return product(self, mat2, out_dtype)

    return products


def _added_with_dtype(
    _keyset: Any,
    self: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    out_dtype: torch.dtype,
    *,
    beta: Any = 1,
    alpha: Any = 1,
) -> torch.Tensor:
    check = contract.check_mm if a.dim() == 2 else contract.check_bmm
    check(a, b)
    check_dtype("addmm", a)
    _check_out_dtype(a, out_dtype)
    total = product(a, b, torch.float32) * alpha
    if beta != 0:
        total = total + contract.check_addend("addmm", self, tuple(total.shape)).float() * beta
    return total.to(out_dtype)


def _check_out_dtype(x: torch.Tensor, out_dtype: torch.dtype) -> None:
    if out_dtype not in (x.dtype, torch.float32):
        raise OpNotSupported(
            f"a product of {x.dtype} with out_dtype={out_dtype}: the Ascend backend rounds to the "
            "operands' dtype or to float32; cast the result"
        )


def _addbmm(
    _keyset: Any,
    self: torch.Tensor,
    batch1: torch.Tensor,
    batch2: torch.Tensor,
    *,
    beta: Any = 1,
    alpha: Any = 1,
) -> torch.Tensor:
    contract.check_bmm(batch1, batch2)
    # The batch is part of the sum: one product whose k runs over the matrices.
    a = batch1.transpose(0, 1).reshape(batch1.size(1), -1)
    return contract.addmm(self, a, batch2.flatten(0, 1), beta=beta, alpha=alpha)


def _addbmm_in_place(
    keyset: Any, self: torch.Tensor, *args: torch.Tensor, **numbers: Any
) -> torch.Tensor:
    return self.copy_(_addbmm(keyset, self, *args, **numbers))


def _softmax(
    _keyset: Any, self: torch.Tensor, dim: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    out: torch.Tensor = torch.ops.batch_invariant.softmax.default(self, dim, dtype)
    return out


def _out(fn: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def write(*args: Any, out: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        result = fn(*args, **kwargs)
        if out.shape != result.shape:
            out.resize_(result.shape)
        return out.copy_(result)

    return write
