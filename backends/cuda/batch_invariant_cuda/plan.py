"""Plans, which make a repeated call cheap.

A plan is made once for the shapes, strides, dtype and alignment of a call and holds the compiled
kernel. Calling it computes nothing that could be kept: an output is allocated and the kernel
launched on the current stream, without synchronising.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from batch_invariant_cuda.launch import Launch, launches, run, views
from batch_invariant_cuda.problem import Problem, counter_count, workspace_size
from batch_invariant_cuda.schedules import Schedule
from batch_invariant_cuda.workspace import counters


class Plan:
    """A product made ready: calling it launches the kernel and returns the result."""

    def __init__(
        self,
        p: Problem,
        s: Schedule,
        a: torch.Tensor,
        b: torch.Tensor,
        addend: torch.Tensor | None,
        programs: int,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        self._problem, self._schedule, self._programs = p, s, programs
        self._device = a.device
        self._index = a.get_device()
        self._shape = shape or p.shape(a.dim())
        self._room = workspace_size(p, s, programs)
        self._tiles = counter_count(p, s, programs)
        ready = self._specialise(a, b, addend)
        self._fast = ready[0] if ready else None
        self._fold = ready[1] if ready and len(ready) > 1 else None

    def __call__(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        addend: torch.Tensor | None,
        alpha: float,
        beta: float,
    ) -> torch.Tensor:
        if torch._C._cuda_getDevice() != self._index:
            with torch.cuda.device(self._index):
                return self(a, b, addend, alpha, beta)
        if self._fast is None:
            return run(
                *(self._problem, self._schedule, a, b, addend, alpha, beta),
                *(self._programs, self._shape),
            )
        out = a.new_empty(self._shape)
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        workspace = count = 0
        if self._room:
            room = torch.empty(self._room, dtype=torch.float32, device=self._device)
            workspace = room.data_ptr()
            if self._tiles:
                held = counters(self._tiles, self._device, stream)  # until the launch is queued
                count = held.data_ptr()
        where = out.data_ptr()
        plus = where if addend is None else addend.data_ptr()
        given = (stream, a.data_ptr(), b.data_ptr(), where, plus, workspace, count, alpha, beta)
        self._fast(*given)
        if self._fold is not None:
            self._fold(*given)
        return out

    def _specialise(
        self, a: torch.Tensor, b: torch.Tensor, addend: torch.Tensor | None
    ) -> list[Callable[..., None]] | None:
        """Functions that launch the compiled kernels with new addresses and numbers.

        None where Triton's launcher is not built as this code knows it: then its public, slower
        door is used.
        """
        p, s = self._problem, self._schedule
        out = torch.empty(p.shape(2 if p.batch == 1 else 3), dtype=p.dtype, device=self._device)
        few = torch.empty(4, dtype=torch.float32, device=self._device)
        left, right, plus = views(p, a, b, addend)
        every = launches(p, s, left, right, out, plus, few, few.view(torch.int32), self._programs)
        found = [_ready(one) for one in every if one[1]]
        ready = [fn for fn in found if fn is not None]
        return ready if len(ready) == len(found) else None


def _ready(one: Launch) -> Callable[..., None] | None:
    """Compiles a kernel; a function that launches it, None where the launcher is not known."""
    kernel, grid, arguments, options = one
    compiled = kernel.warmup(**arguments, **options, grid=(grid,))
    runner = compiled.run
    launch = launcher(runner)
    if launch is None:
        return None
    names = [*inspect.signature(kernel.fn).parameters]
    values = [arguments[name] for name in names]
    meta = list(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    head = (
        *(grid, 1, 1),
        compiled.function,
        runner.launch_cooperative_grid,
        runner.launch_pdl,
        *(None, None, compiled.packed_metadata, None, None, None),
    )
    return _call_of(launch, head, names, values, meta)


_SLOTS = {"a": 0, "b": 1, "c": 2, "add": 3, "ws": 4, "count": 5, "alpha": 6, "beta": 7}
_SOURCE = {"ad": 0, "bd": 1, "b2d": 1, "cd": 2, "c2d": 2}


def _call_of(
    launch: Callable[..., Any],
    head: tuple[Any, ...],
    names: list[str],
    values: list[Any],
    meta: list[dict[str, Any]],
) -> Callable[..., None]:
    """Builds the argument tuple of a launch as one expression, so that a call runs no loop."""
    scope: dict[str, Any] = {"launch": launch}
    parts = []
    described = iter(meta)
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        if name in _SOURCE:
            encode = Maps(value, next(described))
            scope[f"map{index}"] = encode
            scope[f"known{index}"] = encode.known
            key = f"x{_SOURCE[name]}"
            parts.append(f"known{index}.get({key}) or map{index}({key})")
            parts += [repr(number) for number in (*value.shape, *value.strides)]
        elif name in _SLOTS:
            parts.append(f"x{_SLOTS[name]}")
        else:
            scope[f"v{index}"] = value
            parts.append(f"v{index}")
    for index, value in enumerate(head):
        scope[f"h{index}"] = value
    fixed = [f"h{index}" for index in range(len(head))]
    first = ", ".join([*fixed[:3], "stream", *fixed[3:]])
    inputs = ", ".join(f"x{index}" for index in range(len(_SLOTS)))
    source = f"def call(stream, {inputs}):\n    launch({first}, {', '.join(parts)})\n"
    exec(source, scope)
    found: Callable[..., None] = scope["call"]
    return found


class Maps:
    """Encoded tensor maps of one operand by address; allocators hand out the same ones again."""

    def __init__(
        self, descriptor: TensorDescriptor | GluonDescriptor, meta: dict[str, Any]
    ) -> None:
        from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
        from triton.runtime import driver

        self.known: dict[int, Any] = {}
        self._fill = driver.active.utils.fill_tma_descriptor
        self._before = (
            meta["swizzle"],
            meta["elem_size"],
            TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]],
            meta["block_size"],
            list(descriptor.shape),
            list(descriptor.strides),
            0,
        )

    def __call__(self, address: int) -> Any:
        if len(self.known) >= 4096:
            self.known.clear()
        encoded = self._fill(address, *self._before)
        self.known[address] = encoded
        return encoded


@cache
def _known_triton() -> bool:
    import triton

    return str(triton.__version__).startswith("3.6.")


def launcher(runner: Any) -> Callable[..., Any] | None:
    """The compiled launch function inside Triton's launcher, which parses descriptors itself."""
    if not _known_triton() or runner.global_scratch_size or runner.profile_scratch_size:
        return None
    launch: Callable[..., Any] = runner.launch
    if inspect.isfunction(launch):
        launch = inspect.getclosurevars(launch).nonlocals.get("launcher", launch)
    return launch
