"""Launches of row kernels at little cost: what a launch needs is worked out once per shape.

Triton's own launch path binds and hashes every argument in Python at each call. Here the compiled
kernel is looked up under what its specialisation depends on, and started directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from triton import knobs

from batch_invariant_cuda.rows import LANES, SEGMENT

_INT32 = 2**31


class RowKernel:
    """A Triton kernel whose parameters are tensors, then numbers, then constexprs.

    The numbers are declared `do_not_specialize`. Contraction of a product and a sum is off: an
    FMA happens only where a kernel asks for one.
    """

    def __init__(self, fn: Any) -> None:
        self._fn = fn
        self._compiled: dict[Any, Any] = {}
        self._direct = isinstance(fn, triton.JITFunction)

    def __call__(
        self,
        programs: int,
        tensors: Sequence[torch.Tensor | None],
        numbers: Sequence[int | float],
        static: tuple[Any, ...],
        warps: int,
    ) -> None:
        """Starts `programs` programs on the current stream of the first tensor's device."""
        if programs == 0:
            return
        first: torch.Tensor = tensors[0]  # type: ignore[assignment]
        device = first.get_device()
        for t in tensors:
            if t is not None and t.get_device() != device:
                raise RuntimeError(
                    f"expected all tensors on one device, found {first.device} and {t.device}"
                )
        if not self._direct:
            self._fn[(programs,)](*tensors, *numbers, *static)
            return
        if device == torch._C._cuda_getDevice():
            self._launch(device, programs, tensors, numbers, static, warps)
        else:
            with torch.cuda.device(device):
                self._launch(device, programs, tensors, numbers, static, warps)

    def _launch(
        self,
        device: int,
        programs: int,
        tensors: Sequence[torch.Tensor | None],
        numbers: Sequence[int | float],
        static: tuple[Any, ...],
        warps: int,
    ) -> None:
        key = (
            device,
            warps,
            static,
            tuple(None if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors),
            tuple(isinstance(v, float) or -_INT32 <= v < _INT32 for v in numbers),
        )
        kernel = self._compiled.get(key)
        if kernel is None or knobs.runtime.launch_enter_hook.calls:
            self._compiled[key] = self._fn[(programs,)](
                *tensors, *numbers, *static, num_warps=warps, enable_fp_fusion=False
            )
            return
        kernel.run(
            programs, 1, 1, torch._C._cuda_getCurrentRawStream(device), kernel.function,
            kernel.packed_metadata, None, None, None, *tensors, *numbers, *static,
        )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How rows of a length are handled: any plan gives the same bits.

    tiles: terms of a lane that are held in registers; 0 for rows that are walked.
    width, parts: lanes of a tile, and tiles that make up the lanes.
    full: no tile reaches beyond the row's end. unit: see `unit_of`.
    split: segments of a row are spread over programs.
    """

    tiles: int
    width: int
    parts: int
    full: bool
    unit: int
    warps: int
    split: bool


HELD = 16  # terms; more would not fit the registers of one program


@cache
def multiprocessors(device: int) -> int:
    """How many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def unit_of(n: int) -> int:
    """16 if a length is a multiple of it, so that the compiler may use wide loads, else 1.

    A kernel gets n // unit and multiplies again: 1 from 2^31 on, where n must arrive in 64 bits.
    """
    return 16 if n % 16 == 0 and n < _INT32 else 1


@cache
def plan(rows: int, n: int, processors: int, single_pass: bool) -> Plan:
    """The plan for `rows` rows of n elements; single_pass: each element is used once.

    Of many short rows each has one warp, which folds without shared memory; the fewer the rows,
    the more warps share one. What is kept for a second pass needs registers, so more warps.
    """
    unit = unit_of(n)
    terms = -(-n // LANES)
    if terms > HELD:
        return Plan(0, LANES, 1, False, unit, 8, rows < 2 * processors and n > SEGMENT)
    lanes = min(LANES, triton.next_power_of_2(n))
    if rows <= 4 * processors:
        warps = 16 if terms > 2 else 1
    elif single_pass:
        warps = 1 if terms <= 4 else 2
    else:
        warps = 1 if terms <= 2 else 2 if terms <= 4 else 8
    width = min(lanes, 256 * warps)
    warps = max(1, min(warps, width // 64))
    return Plan(terms, width, lanes // width, n == terms * lanes, unit, warps, False)


def plan_of(x: torch.Tensor, single_pass: bool = False) -> Plan:
    """The plan for the rows of x [rows, n]."""
    rows, n = x.shape
    return plan(rows, n, multiprocessors(x.device.index) if x.is_cuda else 1, single_pass)
