"""Matrix products on NVIDIA GPUs: mm, addmm, bmm, baddbmm, linear.

Order: `chunks.chunk_of(K, N, dtype)`; one rounding at the end. fp32 and float64 are chains of fused
multiply-adds over ascending k, with the bits of the CPU reference, unless torch's own switches ask
for TF32. Schedules differ with M and change no bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from batch_invariant.backend import Kernel
from batch_invariant.errors import OpNotSupported
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
from batch_invariant.ops.matmul import check_addend, check_bmm, check_linear, check_mm
from batch_invariant.order import Order
from batch_invariant_cuda import choice
from batch_invariant_cuda.chunks import chunk_of, order_of, tf32_asked
from batch_invariant_cuda.plan import Plan
from batch_invariant_cuda.problem import Problem
from batch_invariant_cuda.schedules import Schedule, parse, table_for

DTYPES = (*FLOATS, torch.float64)

PROVED = (9, 0)
"""The compute capability on which the matrix units were seen to give one result in all schedules.

It stands for every GPU that has it; the one that was tested is an H200. Elsewhere bf16 and fp16
keep to one schedule, unless a table was admitted on that GPU.
"""

_plans: dict[Any, Plan] = {}
_PLANS_KEPT = 8192


def _key(call: str, a: torch.Tensor, b: torch.Tensor) -> tuple[Any, ...]:
    """All that a plan depends on, for two operands; what was checked once holds for the key.

    Each address by itself: a kernel is compiled for those of its pointers that are aligned.
    """
    return (
        *(call, a.shape, a.stride(), a.dtype, b.shape, b.stride(), b.dtype),
        *(a.get_device(), b.get_device(), a.data_ptr() & 15, b.data_ptr() & 15),
        a.dtype is torch.float32 and tf32_asked(),
    )


def _key_of(addend: torch.Tensor, alpha: float, beta: float) -> tuple[Any, ...]:
    """The same for an addend and the numbers."""
    return (
        *(addend.shape, addend.stride(), addend.dtype, addend.get_device()),
        *(addend.data_ptr() & 15, alpha == 1, beta == 1, beta == 0),
    )


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    addend: torch.Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> torch.Tensor:
    """`alpha * (a @ b) + beta * addend` for [B, M, K] and [B, K, N], or matrices; one rounding.

    addend: of the shape of the product; not read if beta is 0.
    """
    key = _key("product", a, b)
    if addend is not None:
        key += _key_of(addend, alpha, beta)
    elif alpha != 1:
        key += (alpha == 1,)
    plan = _plans.get(key)
    if plan is None:
        return _first(key, a, b, addend, alpha, beta, None)
    return plan(a, b, addend, alpha, beta)


def _first(
    key: tuple[Any, ...],
    a: torch.Tensor,
    b: torch.Tensor,
    addend: torch.Tensor | None,
    alpha: float,
    beta: float,
    shape: tuple[int, ...] | None,
) -> torch.Tensor:
    """A call of a kind that was not seen before: makes its plan, and keeps it under the key.

    shape: the result's, where it is not [M, N] or [B, M, N].
    """
    if a.dtype not in DTYPES:
        raise OpNotSupported(
            f"matrix products on CUDA take {', '.join(map(str, DTYPES))}; got {a.dtype}. "
            "Convert the operands, or multiply on the CPU"
        )
    for other in (b, addend):
        if other is not None and other.device != a.device:
            raise RuntimeError(
                f"expected all tensors on one device, found {a.device} and {other.device}"
            )
    if beta == 0:
        addend = None
    p = problem(a, b, addend, alpha != 1 or (addend is not None and beta != 1))
    shape = shape or p.shape(a.dim())
    if 0 in (p.batch, p.m, p.n):
        return a.new_empty(shape)
    with torch.cuda.device(a.device):
        plan = _plan(p, a, b, addend, shape)
    if len(_plans) >= _PLANS_KEPT:
        _plans.clear()
    _plans[key] = plan
    return plan(a, b, addend, alpha, beta)


def forget() -> None:
    """Drops all plans, so that the next calls choose their schedules anew."""
    _plans.clear()


def problem(
    a: torch.Tensor,
    b: torch.Tensor,
    addend: torch.Tensor | None,
    scaled: bool,
    chunk: int | None = None,
) -> Problem:
    """What a plan depends on."""

    def strides(x: torch.Tensor) -> tuple[int, int, int]:
        rows, columns = x.stride()[-2:]
        return (0 if x.dim() == 2 else x.stride(0), rows, columns)

    k, n = b.shape[-2:]
    tf32 = a.dtype is torch.float32 and tf32_asked()
    if chunk is None:
        chunk = 0 if tf32 else chunk_of(k, n, a.dtype)
    return Problem(
        dtype=a.dtype,
        batch=a.size(0) if a.dim() == 3 else 1,
        m=a.size(-2),
        n=n,
        k=k,
        a=strides(a),
        b=strides(b),
        addend=None if addend is None else strides(addend),
        scaled=scaled,
        chunk=chunk,
        aligned=(a.data_ptr() | b.data_ptr()) % 16 == 0,
        tf32=tf32,
    )


@cache
def programs(device: torch.device) -> int:
    """How many multiprocessors that GPU has."""
    found: int = torch.cuda.get_device_properties(device).multi_processor_count
    return found


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of that GPU, as (major, minor)."""
    return torch.cuda.get_device_capability(device)


def schedule_for(p: Problem, device: torch.device) -> Schedule:
    """The measured schedule of this shape, or the rule's, if it can run here."""
    if p.dtype is torch.float64:
        return parse("tile 32x32x16 w4 s1")
    gpu = capability(device)
    if p.tf32:
        return choice.tf32(p.m * p.batch, p.n) if gpu == PROVED else choice.contract(p.dtype)
    name = str(p.dtype).removeprefix("torch.")
    found = table_for(gpu).find(name, p.k, p.n, p.m) if p.batch == 1 else None
    if found is not None and p.refuses(found) is None:
        return found
    if gpu != PROVED and p.dtype is not torch.float32:
        return choice.contract(p.dtype)
    by_rule = choice.default(
        p.m,
        p.n * p.batch,
        p.k,
        p.dtype,
        bulk=p.bulk() and gpu == PROVED,
        chunk=p.chunk if p.batch == 1 and not p.wide() else 0,
        programs=programs(device),
    )
    return by_rule if p.refuses(by_rule) is None else choice.contract(p.dtype)


def _plan(
    p: Problem,
    a: torch.Tensor,
    b: torch.Tensor,
    addend: torch.Tensor | None,
    shape: tuple[int, ...],
) -> Plan:
    count = programs(a.device)
    try:
        return Plan(p, schedule_for(p, a.device), a, b, addend, count, shape)
    except OutOfResources:  # a GPU with less shared memory: the same bits by smaller tiles
        return Plan(p, choice.contract(p.dtype), a, b, addend, count, shape)


def _mm(self: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
    key = _key("mm", self, mat2)
    plan = _plans.get(key)
    if plan is not None:
        return plan(self, mat2, None, 1.0, 1.0)
    check_mm(self, mat2)
    return _first(key, self, mat2, None, 1.0, 1.0, None)


def _bmm(self: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
    key = _key("bmm", self, mat2)
    plan = _plans.get(key)
    if plan is not None:
        return plan(self, mat2, None, 1.0, 1.0)
    check_bmm(self, mat2)
    return _first(key, self, mat2, None, 1.0, 1.0, None)


def _addmm(
    self: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, *, beta: Any = 1, alpha: Any = 1
) -> torch.Tensor:
    key = _key("addmm", mat1, mat2) + _key_of(self, alpha, beta)
    plan = _plans.get(key)
    if plan is not None:
        return plan(mat1, mat2, self, float(alpha), float(beta))
    check_mm(mat1, mat2, self)
    addend = check_addend("addmm", self, (mat1.size(0), mat2.size(1)))
    return _first(key, mat1, mat2, addend, float(alpha), float(beta), None)


def _baddbmm(
    self: torch.Tensor,
    batch1: torch.Tensor,
    batch2: torch.Tensor,
    *,
    beta: Any = 1,
    alpha: Any = 1,
) -> torch.Tensor:
    key = _key("baddbmm", batch1, batch2) + _key_of(self, alpha, beta)
    plan = _plans.get(key)
    if plan is not None:
        return plan(batch1, batch2, self, float(alpha), float(beta))
    check_bmm(batch1, batch2, self)
    addend = check_addend("baddbmm", self, (*batch1.shape[:2], batch2.size(2)))
    return _first(key, batch1, batch2, addend, float(alpha), float(beta), None)


def _linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    key = _key("linear", input, weight)
    if bias is not None:
        key += _key_of(bias, 1, 1)
    plan = _plans.get(key)
    if plan is not None:
        return plan(input, weight, bias, 1.0, 1.0)
    check_linear(input, weight, bias)
    matrix = weight if weight.dim() == 2 else weight.unsqueeze(0)
    rows = input.reshape(input.shape[:-1].numel(), input.size(-1))
    addend = None if bias is None else bias.expand(rows.size(0), matrix.size(0))
    shape = (*input.shape[:-1], *weight.shape[:-1])
    if rows.data_ptr() != input.data_ptr():
        # A plan takes addresses: one for an input that is copied into rows belongs to the copy.
        return product(rows, matrix.t(), addend).view(shape)
    return _first(key, rows, matrix.t(), addend, 1.0, 1.0, shape)


class _Order(Mapping[torch.dtype, Order]):
    """The order by dtype, as reports print it."""

    def __getitem__(self, dtype: torch.dtype) -> Order:
        return order_of(dtype)

    def __iter__(self) -> Any:
        return iter(DTYPES)

    def __len__(self) -> int:
        return len(DTYPES)


def _kernel(fn: Any, guarantee: Guarantee) -> Kernel:
    return Kernel(
        fn=fn,
        guarantee=guarantee,
        dtypes=frozenset(DTYPES),
        order=_Order(),
        portable=frozenset((torch.float32, torch.float64)),
    )


KERNELS = {
    "mm": _kernel(_mm, Guarantee.SCHEDULE),
    "addmm": _kernel(_addmm, Guarantee.SCHEDULE),
    "bmm": _kernel(_bmm, Guarantee.BATCH),
    "baddbmm": _kernel(_baddbmm, Guarantee.BATCH),
    "linear": _kernel(_linear, Guarantee.SCHEDULE),
}
