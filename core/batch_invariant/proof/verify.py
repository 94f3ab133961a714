"""`bi verify`: every operator, dtype and case of a backend under the transforms of the batch.

The same transforms are applied to plain torch on the same machine, so that a reader sees what the
library changes. A check that finds nothing wrong with stock torch either says so.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from batch_invariant import mode, registry, selector
from batch_invariant.backend import Backend, Kernel
from batch_invariant.errors import ConfigurationError
from batch_invariant.ops import CONTRACTS
from batch_invariant.ops.bits import mismatch
from batch_invariant.ops.contract import Case, Data, Draw, Op
from batch_invariant.proof.transforms import ROWS, Variant, variants


@dataclass(frozen=True)
class Break:
    """A row whose bits changed, or whose value is out of its bound."""

    case: str
    data: str
    transform: str
    detail: str


@dataclass(frozen=True)
class Result:
    """What was found for one operator in one dtype."""

    op: str
    dtype: str
    guarantee: str
    order: str
    portable: bool
    checks: int
    breaks: list[Break]
    stock: list[str]
    """the transforms and labels under which plain torch changed bits on this machine"""
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.breaks

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def verify(
    backend: str | None = None,
    ops: Iterable[str] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Result]:
    """Results one by one, for the selected or the named backend."""
    wanted = list(ops) or list(CONTRACTS)
    if unknown := sorted(set(wanted) - set(CONTRACTS)):
        raise ConfigurationError(
            f"unknown operator {', '.join(unknown)}; known: {', '.join(CONTRACTS)}"
        )
    with selector.use_backend(backend) if backend else nullcontext():
        chosen = selector.current_backend(_device(backend) if backend else "cpu")
        table = selector.kernels(chosen.device_type)
        for name in wanted:
            if name not in table:
                continue
            for dtype in CONTRACTS[name].dtypes:
                if dtype in table[name].dtypes:
                    progress(f"{name} {dtype}")
                    yield _check(CONTRACTS[name], chosen, table[name], dtype)


def _device(backend: str) -> str:
    return registry.load(backend).device_type


def _check(op: Op, backend: Backend, kernel: Kernel, dtype: torch.dtype) -> Result:
    started = time.perf_counter()
    breaks: list[Break] = []
    stock: list[str] = []
    checks = 0

    def run(args: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        native = {
            name: backend.to_native(value) if isinstance(value, torch.Tensor) else value
            for name, value in args.items()
        }
        return tuple(backend.to_torch(out) for out in op.call(kernel.fn, native))

    def plain(args: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        return op.call(op.reference, args)

    for case in op.cases:
        for data in Data:
            args = draw(op, case, dtype, data)
            checks_made, found = _transforms(op, case, data, args, run)
            checks += checks_made
            breaks += found
            if (wrong := accuracy(op, args, dtype, run)) is not None:
                breaks.append(Break(case.label, data, "accuracy", wrong))
            checks += op.error_bound is not None
            if not mode.is_enabled():
                stock += [
                    f"{b.transform}: {b.detail.split(':')[0]}"
                    for b in _transforms(op, case, data, args, plain)[1]
                ]
    return Result(
        op=op.name,
        dtype=str(dtype).removeprefix("torch."),
        guarantee=str(kernel.guarantee),
        order=str(kernel.order_of(dtype)),
        portable=dtype in kernel.portable,
        checks=checks,
        breaks=breaks,
        stock=sorted(set(stock)),
        seconds=time.perf_counter() - started,
    )


def draw(op: Op, case: Case, dtype: torch.dtype, data: Data, rows: int = ROWS) -> dict[str, Any]:
    """The arguments of a case, the same in every process."""
    seed = zlib.crc32(f"{op.name} {case.label} {dtype} {data}".encode())
    return case.args(Draw(dtype, data, torch.Generator().manual_seed(seed)), rows)


def _transforms(
    op: Op,
    case: Case,
    data: Data,
    args: dict[str, Any],
    run: Callable[[dict[str, Any]], tuple[torch.Tensor, ...]],
) -> tuple[int, list[Break]]:
    axes = case.batch_axes or op.batch_axes
    out_axes = case.out_axes or op.out_axes
    base = run(args)
    checks = 0
    breaks = []
    for variant in variants(args, axes):
        checks += 1
        found = compare(base, run(variant.args), out_axes, variant)
        if found is not None:
            breaks.append(Break(case.label, data, variant.transform, f"{variant.label}: {found}"))
    return checks, breaks


def compare(
    base: tuple[torch.Tensor, ...],
    changed: tuple[torch.Tensor, ...],
    out_axes: tuple[int, ...],
    variant: Variant,
) -> str | None:
    """None if the rows that both batches hold have the same bits, else what differs."""
    for which, axis in enumerate(out_axes):
        before = base[which].index_select(axis, torch.tensor(variant.rows))
        after = changed[which].index_select(axis, torch.tensor(variant.at))
        if (found := mismatch(before, after)) is not None:
            row = variant.rows[found.first[axis]]
            return f"row {row} changed in {found}"
    return None


def accuracy(
    op: Op,
    args: dict[str, Any],
    dtype: torch.dtype,
    run: Callable[[dict[str, Any]], tuple[torch.Tensor, ...]],
) -> str | None:
    """None if every value is within the contract's bound of the float64 reference."""
    if op.error_bound is None:
        return None
    exact_args = {
        name: value.double()
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point
        else (None if isinstance(value, torch.dtype) else value)
        for name, value in args.items()
    }
    out = run(args)[0]
    exact = op.call(op.reference, exact_args)[0]
    bound = op.error_bound(**{**exact_args, "dtype": out.dtype})
    error = (out.double() - exact).abs()
    # A result beyond the dtype's range is rightly infinite.
    overflow = exact.abs() > torch.finfo(out.dtype).max
    wrong = ~(error <= bound) & ~(overflow & out.isinf())
    if not bool(wrong.any()):
        return None
    worst = (error / bound)[wrong].max()
    return f"{int(wrong.sum())} of {out.numel()} values beyond the bound, worst {float(worst):.3g}x"
