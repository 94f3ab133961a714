"""What is checked: one operator of one backend in one dtype, callable with CPU tensors."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from batch_invariant.backend import Backend, Kernel
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops import CONTRACTS
from batch_invariant.ops.contract import Case, Data, Draw, Op
from batch_invariant.proof.transforms import LEVELS, ROWS

Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Subject:
    """One operator of one backend in one dtype.

    level: up to which guarantee it is checked; the one that the kernel declares, unless the user
        asks for another.
    full: all cases and data, rather than the few that take seconds.
    """

    backend: Backend
    op: Op
    dtype: torch.dtype
    kernel: Kernel | None
    level: Guarantee
    full: bool = True

    @property
    def label(self) -> str:
        return f"{self.op.name} {short(self.dtype)}"

    @property
    def contracted(self) -> bool:
        """Whether the dtype is the contract's, with bounds and cases made for it."""
        return self.dtype in self.op.dtypes

    @property
    def thorough(self) -> bool:
        """Whether the checks that take long and need torch tensors apply."""
        return self.full and self.contracted and self.on_torch

    @property
    def on_torch(self) -> bool:
        """Whether the backend computes on torch tensors, so that torch's own tools apply."""
        return isinstance(self.backend.to_native(torch.zeros(1)), torch.Tensor)

    def transforms(self) -> frozenset[str]:
        """Those that the contract has: of a batch, and of a sequence where its rows know one."""
        return _transforms(self.op.name)

    def cases(self) -> tuple[Case, ...]:
        """All cases of the contract, or the first."""
        return self.op.cases if self.full else self.op.cases[:1]

    def inputs(
        self, kinds: Iterable[Data] | None = None
    ) -> Iterator[tuple[Case, Data, dict[str, Any]]]:
        """Every case with every kind of data, drawn the same in every process.

        kinds: of data; by default both, or where not all is asked the one that shows most.
        """
        for case in self.cases():
            for data in kinds or (Data if self.full else (Data.CANCELLING,)):
                yield case, data, draw(self.op, case, self.dtype, data)

    def run(self, args: Mapping[str, Any]) -> Outputs:
        """The kernel's outputs as CPU tensors; raises what the kernel raises."""
        assert self.kernel is not None
        out = self.op.call(self.kernel.fn, self.native(args))
        return tuple(self.backend.to_torch(array) for array in out)

    def native(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as the backend takes them."""
        return {
            name: self._native(value) if isinstance(value, torch.Tensor) else value
            for name, value in args.items()
        }

    def _native(self, value: torch.Tensor) -> Any:
        native = self.backend.to_native(value)
        if isinstance(native, torch.Tensor) and native.storage_offset() != value.storage_offset():
            # Copying to a device aligns; a tensor that starts off a boundary must do so there too.
            offset = value.storage_offset()
            room = native.new_empty(offset + native.untyped_storage().nbytes())
            moved = room.as_strided(native.shape, native.stride(), offset)
            native = moved.copy_(native)
        return native


def draw(op: Op, case: Case, dtype: torch.dtype, data: Data, rows: int = ROWS) -> dict[str, Any]:
    """The arguments of a case, the same in every process and on every machine."""
    seed = zlib.crc32(f"{op.name} {case.label} {dtype} {data}".encode())
    return case.args(Draw(dtype, data, torch.Generator().manual_seed(seed)), rows)


def widened(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in float64, for the definition as a yardstick; requested dtypes are dropped."""
    return {
        name: value.double()
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point
        else (None if isinstance(value, torch.dtype) else value)
        for name, value in args.items()
    }


@functools.cache
def _transforms(name: str) -> frozenset[str]:
    op = CONTRACTS[name]
    found = {name for name, level in LEVELS.items() if level is Guarantee.BATCH}
    if op.schedule is not None:
        case = op.cases[0]
        args = draw(op, case, op.dtypes[0], Data.NORMAL, rows=8)
        found |= {v.transform for v in op.schedule(args, case.batch_axes or op.batch_axes)}
    return frozenset(found)


def short(dtype: torch.dtype) -> str:
    """`torch.float32` -> `float32`."""
    return str(dtype).removeprefix("torch.")
