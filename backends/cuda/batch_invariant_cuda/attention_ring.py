"""When attention goes to the kernels for Hopper, and how they are launched."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

from batch_invariant_cuda.attention_alone import attention_alone, slots_of
from batch_invariant_cuda.attention_hopper import KEYS, ROWS, attention_ring
from batch_invariant_cuda.attention_step import SLOTS, attention_step, rows_of_tile
from batch_invariant_cuda.launch import DTYPES
from batch_invariant_cuda.plan import Maps, launcher
from batch_invariant_cuda.row_launch import multiprocessors

_STAGES = 2
SECTION = 64 << 20  # bytes of keys and values that stay in the cache while they are used
_SIZES = (64, 128)
_MANY = 64  # rows; fewer leave most of a tile empty


@cache
def _hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def fits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether sizes and addresses suit bulk copies."""
    size = q.size(3)
    if not q.is_cuda or size != v.size(3) or size not in _SIZES or 0 in (*q.shape, *k.shape):
        return False
    return _hopper(q.device.index) and all(
        x.data_ptr() % 16 == 0
        and all(
            n == 1 or (0 < step < 2**31 and step % 8 == 0)
            for n, step in zip(x.shape[:3], x.stride()[:3], strict=True)
        )
        for x in (q, k, v)
    )


def takes_many(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `many_rows` takes a call, masked rows aside that have no plan."""
    return q.size(2) >= _MANY and fits(q, k, v)


def takes_few(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `few_rows` takes a call in which every row attends to all keys."""
    shared = q.size(2) * q.size(1) // max(k.size(1), 1)
    return shared <= 16 and fits(q, k, v)


def boxed(x: torch.Tensor, rows: int, columns: int = 0) -> GluonDescriptor:
    """A tensor of rank 4 that is copied in boxes of so many rows (and columns) of one head."""
    box = [1, 1, rows, columns or x.size(3)]
    layout = NVMMASharedLayout.get_default_for(box, DTYPES[x.dtype])
    strides = [step if n > 1 else 8 for n, step in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return GluonDescriptor(x, [*x.shape], [*strides, 1], box, layout)


Start = Callable[..., None]


class DescribedKernel:
    """A Gluon kernel whose parameters are descriptors, tensors, numbers, constexprs.

    overlaps: it is launched before the kernel in front of it has ended, for which it waits.
    """

    def __init__(self, fn: Any, overlaps: bool = False) -> None:
        self._fn = fn
        self._options = {"num_warps": 4, "enable_fp_fusion": False, "launch_pdl": overlaps}
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self,
        programs: int,
        described: tuple[GluonDescriptor, ...],
        tensors: tuple[torch.Tensor | None, ...],
        numbers: tuple[int | float, ...],
        static: tuple[Any, ...],
    ) -> Start | None:
        """Launches; and how to do so again, called with the addresses of described and tensors.

        None where Triton's launcher is not built as this code knows it: then its public, slower
        door is used.
        """
        device = described[0].base.get_device()
        with torch.cuda.device(device):
            kinds = tuple(None if x is None else (x.dtype, x.data_ptr() % 16) for x in tensors)
            key = (device, described[0].base.dtype, kinds, static)
            found = self._compiled.get(key)
            if found is None:
                kernel = self._fn.warmup(
                    *described, *tensors, *numbers, *static, **self._options, grid=(programs,)
                )
                found = self._compiled[key] = kernel, kernel.run, launcher(kernel.run)
            kernel, runner, launch = found
            if launch is None:
                given = (*described, *tensors, *numbers, *static)
                self._fn[(programs,)](*given, **self._options)
                return None
        head = (
            *(kernel.function, runner.launch_cooperative_grid, runner.launch_pdl, None, None),
            *(kernel.packed_metadata, None, None, None),
        )
        metas = getattr(kernel.metadata, "tensordesc_meta", None) or ()
        copies = [
            (Maps(x, meta), (*x.shape, *x.strides))
            for x, meta in zip(described, metas, strict=True)
        ]
        tail = (*numbers, *static)
        current, stream = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream

        def start(*addresses: Any) -> None:
            if current() != device:
                with torch.cuda.device(device):
                    start(*addresses)
                return
            flat: list[Any] = []
            for (maps, numbers), address in zip(copies, addresses, strict=False):
                flat.append(maps.known.get(address) or maps(address))
                flat += numbers
            rest = addresses[len(copies) :]
            launch(programs, 1, 1, stream(device), *head, *flat, *rest, *tail)

        start(
            *(x.base.data_ptr() for x in described),
            *(None if x is None else x.data_ptr() for x in tensors),
        )
        return start


@cache
def _kernels() -> tuple[DescribedKernel, DescribedKernel, DescribedKernel]:
    """For many rows, for few, for few alone: compiled code is looked up once in a process."""
    few = (DescribedKernel(fn, overlaps=True) for fn in (attention_step, attention_alone))
    return DescribedKernel(attention_ring), *few


def _programs(q: torch.Tensor) -> int:
    """Of `many_rows`: each takes several tiles."""
    tiles = q.size(0) * q.size(1) * -(-q.size(2) // ROWS)
    return min(tiles, multiprocessors(q.device.index))


def marks(q: torch.Tensor) -> int:
    """How many marks `many_rows` makes: one for each group of warps that computes."""
    return 2 * _programs(q)


def many_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    odd: torch.Tensor | None,
    plan: torch.Tensor | None,
    is_causal: bool,
    factor: float,
) -> Start | None:
    """Computes `out` and `lse`; sets `odd`, of `marks`, where a result is not finite.

    plan: [batch or 1, heads or 1, ...] of a mask, see `attention_plan`.
    And how to do it again, called with the addresses of q, k, v, out, lse, odd and plan.
    """
    batch, heads, rows, size = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads
    blocks = -(-rows // ROWS)
    units = batch * heads * blocks
    section = max(1, SECTION // (4 * keys * size)) * group
    of_mask = (0, 0)
    if plan is not None:
        of_mask = plan.size(1) if plan.size(0) > 1 else 0, int(plan.size(1) > 1)
    return _kernels()[0](
        _programs(q),
        (
            boxed(q, ROWS // 2), boxed(k, KEYS), boxed(v, KEYS),
            boxed(out, ROWS // 2),
        ),
        (lse, odd, plan),
        (batch * heads, heads, group, rows, keys, blocks, section, units, *of_mask, factor),
        (size, _STAGES, is_causal),
    )  # fmt: skip


def few_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    parts: torch.Tensor | None,
    run: int,
    alone: bool,
    factor: float,
) -> Start | None:
    """Computes `out` and `lse`, or `parts` by runs of so many blocks of keys.

    alone: no two programs share a multiprocessor, and there are no runs. And how to do it again,
    called with the addresses of k, v, q, out, lse and, unless alone, parts.
    """
    batch, heads, rows, size = q.shape
    kv_heads, keys = k.shape[1:3]
    blocks = -(-keys // KEYS)
    runs = -(-blocks // run)
    strides = (step // 8 if n > 1 else 0 for n, step in zip(q.shape, q.stride()[:3], strict=False))
    tile = rows_of_tile(rows * heads // kv_heads)
    described, sizes = (boxed(k, KEYS), boxed(v, KEYS)), (heads, heads // kv_heads, rows, keys)
    if alone:
        return _kernels()[2](
            batch * kv_heads, described, (q, out, lse), (*sizes, *strides, factor),
            (size, tile, slots_of(size)),
        )  # fmt: skip
    return _kernels()[1](
        batch * kv_heads * runs, described, (q, out, lse, parts),
        (*sizes, blocks, run, runs, *strides, factor), (size, tile, parts is not None, SLOTS),
    )  # fmt: skip
