"""Launches of row kernels at little cost: what a launch needs is worked out once per shape.

Triton's own launch path binds and hashes every argument in Python at each call. Here the compiled
kernel is looked up under what its specialisation depends on, and started directly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from triton import knobs

from batch_invariant_cuda.rows import LANES, SEGMENT

_INT32 = 2**31
_CALLS_KEPT = 8192


class RowKernel:
    """A Triton kernel whose parameters are tensors, then numbers, then constexprs.

    The numbers are declared `do_not_specialize`. Contraction of a product and a sum is off: an
    FMA happens only where a kernel asks for one.

    overlaps: with up to that many programs it is launched before the kernel in front of it has
    ended, and starts by `rows.take_turn` of that number, which waits for it.
    registers: how many a thread may use, by the number of warps, so that more programs fit.
    cluster: so many programs are started for each that a call asks for, as a cluster, and no more
    clusters than the GPU runs at a time; the kernel finds its work by their number.
    """

    def __init__(
        self,
        fn: Any,
        overlaps: int = 0,
        registers: Mapping[int, int] | None = None,
        cluster: int = 1,
    ) -> None:
        self._fn = self._anywhere = fn
        self._overlaps = overlaps
        self._registers = registers or {}
        self._cluster = cluster
        self._most: dict[Any, int] = {}
        self._compiled: dict[Any, Any] = {}
        self._direct = isinstance(fn, triton.JITFunction)
        if self._direct:
            self._anywhere = triton.JITFunction(
                fn.fn,
                do_not_specialize=fn.do_not_specialize,
                do_not_specialize_on_alignment=[p.name for p in fn.params if not p.is_constexpr],
            )

    def __call__(
        self,
        programs: int,
        tensors: Sequence[torch.Tensor | None],
        numbers: Sequence[int | float],
        static: tuple[Any, ...],
        warps: int,
        wide: bool = True,
    ) -> None:
        """Starts `programs` programs on the current stream of the first tensor's device.

        wide: whether loads and stores of many bytes are possible. Without it the alignment of the
        tensors does not matter, so that there are fewer kernels to compile.
        """
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
            self._launch(device, programs, tensors, numbers, static, warps, wide)
        else:
            with torch.cuda.device(device):
                self._launch(device, programs, tensors, numbers, static, warps, wide)

    def _key(
        self,
        device: int,
        tensors: Sequence[torch.Tensor | None],
        numbers: Sequence[int | float],
        static: tuple[Any, ...],
        warps: int,
        wide: bool,
        overlaps: bool,
    ) -> tuple[Any, ...]:
        return (
            *(device, warps, wide, overlaps, static),
            tuple(None if t is None else (t.dtype, wide and t.data_ptr() % 16) for t in tensors),
            tuple(isinstance(v, float) or -_INT32 <= v < _INT32 for v in numbers),
        )

    def _launch(
        self,
        device: int,
        programs: int,
        tensors: Sequence[torch.Tensor | None],
        numbers: Sequence[int | float],
        static: tuple[Any, ...],
        warps: int,
        wide: bool,
    ) -> None:
        overlaps = programs <= self._overlaps
        key = self._key(device, tensors, numbers, static, warps, wide, overlaps)
        kernel = self._compiled.get(key)
        if kernel is None or knobs.runtime.launch_enter_hook.calls:
            fn = self._fn if wide else self._anywhere
            options = {
                "num_warps": warps,
                "enable_fp_fusion": False,
                "maxnreg": self._registers.get(warps),
                "launch_pdl": overlaps and torch.cuda.get_device_capability(device) >= (9, 0),
            }
            if self._cluster > 1:
                made = fn.warmup(*tensors, *numbers, *static, grid=(1,), **options)
                about = made.metadata
                made.packed_metadata = (about.num_warps, self._cluster, about.shared)
                programs = self._at_a_time(made, programs)
            self._compiled[key] = fn[(programs,)](*tensors, *numbers, *static, **options)
            return
        programs = self._at_a_time(kernel, programs)
        kernel.run(
            programs, 1, 1, torch._C._cuda_getCurrentRawStream(device), kernel.function,
            kernel.packed_metadata, None, None, None, *tensors, *numbers, *static,
        )  # fmt: skip

    def _at_a_time(self, kernel: Any, programs: int) -> int:
        """So many clusters, or as many as a GPU runs at a time."""
        if self._cluster == 1:
            return programs
        most = self._most.get(kernel)
        if most is None:
            kernel._init_handles()
            count = triton.runtime.driver.active.utils.cuOccupancyMaxActiveClusters
            most = count(kernel.function, kernel.metadata.shared, self._cluster)
            if most < 1:  # a launch of none would leave the results as they are
                raise RuntimeError(
                    f"{self._fn.__name__} needs clusters of {self._cluster} programs with "
                    f"{kernel.metadata.shared} bytes of shared memory each, and this GPU runs none"
                )
            self._most[kernel] = most
        return min(programs, most)

    def repeat(
        self,
        programs: int,
        tensors: Sequence[torch.Tensor | None],
        numbers: Sequence[int | float],
        static: tuple[Any, ...],
        warps: int,
        wide: bool = True,
    ) -> Callable[..., None] | None:
        """The launch that was just made, for other addresses: called with one for each tensor.

        None where there is no compiled kernel, or it needs more than a launch.
        """
        first = tensors[0]
        if not self._direct or programs == 0 or first is None:
            return None
        device = first.get_device()
        key = (device, tensors, numbers, static, warps, wide, programs <= self._overlaps)
        kernel = self._compiled.get(self._key(*key))
        if kernel is None:
            return None
        runner = kernel.run
        if runner.global_scratch_size or runner.profile_scratch_size:
            return None
        launch, function = runner.launch, kernel.function
        programs = self._at_a_time(kernel, programs)
        middle = (
            *(runner.launch_cooperative_grid, runner.launch_pdl, None, None),
            *(kernel.packed_metadata, None, None, None),
        )
        tail = (*numbers, *static)
        current, stream = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream

        def start(*pointers: int | None) -> None:
            if current() == device:
                launch(programs, 1, 1, stream(device), function, *middle, *pointers, *tail)
            else:
                with torch.cuda.device(device):
                    launch(programs, 1, 1, stream(device), function, *middle, *pointers, *tail)

        return start


def kind_of(x: torch.Tensor | None) -> Any:
    """All of a tensor that a launch depends on."""
    if x is None:
        return None
    return x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() & 15


class Calls:
    """What to do for calls of a kind that was seen before, by all that their launch depends on."""

    def __init__(self, most: int = _CALLS_KEPT) -> None:
        self._most = most
        self._known: dict[Any, Callable[..., Any]] = {}

    def find(self, key: Any) -> Callable[..., Any] | None:
        """What was kept under a key; nothing while somebody listens to Triton's launches."""
        return None if knobs.runtime.launch_enter_hook.calls else self._known.get(key)

    def keep(self, key: Any, call: Callable[..., Any]) -> None:
        if len(self._known) >= self._most:
            self._known.clear()
        self._known[key] = call

    def forget(self) -> None:
        """Drops all, so that the next calls are planned anew."""
        self._known.clear()


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

    @property
    def wide(self) -> bool:
        """Whether all rows begin at multiples of 16 bytes."""
        return self.unit > 1


HELD = 16  # terms; more would not fit the registers of one program


@cache
def multiprocessors(device: int) -> int:
    """How many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def shared_memory(device: int) -> int:
    """How many bytes of shared memory a program may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def unit_of(n: int, aligned: bool = True) -> int:
    """16 if rows of that length are aligned and a multiple of it, for wide loads, else 1.

    A kernel gets n // unit and multiplies again: 1 from 2^31 on, where n must arrive in 64 bits.
    """
    return 16 if aligned and n % 16 == 0 and n < _INT32 else 1


@cache
def plan(rows: int, n: int, processors: int, single_pass: bool, aligned: bool = True) -> Plan:
    """The plan for `rows` rows of n elements; single_pass: each element is used once.

    Of many short rows each has one warp, which folds without shared memory; the fewer the rows,
    the more warps share one. What is kept for a second pass needs registers, so more warps.
    Rows that allow no wide loads have few plans, for few kernels to compile.
    """
    unit = unit_of(n, aligned)
    terms = -(-n // LANES)
    if terms > (1 if unit == 1 else HELD):
        split = rows < 2 * processors and n > SEGMENT
        return Plan(0, LANES, 1, False, unit, 8, split)
    if unit > 1:
        lanes = min(LANES, max(128, triton.next_power_of_2(n)))
    else:
        lanes = 128 if n <= 128 else LANES
    if rows <= 4 * processors:
        warps = 16 if terms > 2 else 1
    elif single_pass:
        warps = 1 if terms <= 4 else 2
    else:
        warps = 1 if terms <= 2 else 2 if terms <= 4 else 8
    width = min(lanes, 256 * warps)
    warps = max(1, min(warps, width // 64))
    full = unit > 1 and n == terms * lanes
    return Plan(terms, width, lanes // width, full, unit, warps, False)


_LONG = 16 * SEGMENT
LONG_WARPS = 16


def is_long(n: int, shape: Plan) -> bool:
    """Whether rows that are walked are so long that some kernels are faster on LONG_WARPS warps."""
    return shape.wide and not shape.tiles and n >= _LONG


def aligned(*tensors: torch.Tensor | None) -> bool:
    """Whether all begin at multiples of 16 bytes."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def plan_of(x: torch.Tensor, *others: torch.Tensor | None, single_pass: bool = False) -> Plan:
    """The plan for the rows of x [rows, n], and of others that are read beside it."""
    rows, n = x.shape
    processors = multiprocessors(x.device.index) if x.is_cuda else 1
    return plan(rows, n, processors, single_pass, aligned(x, *others))
