"""When attention goes to the kernels for Hopper, and how they are launched."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from batch_invariant_cuda.row_launch import multiprocessors

_STAGES = 2
SECTION = 64 << 20  # bytes of keys and values that stay in the cache while they are used
_SIZES = (64, 128)
_MANY = 64  # rows; fewer leave most of a tile empty
_MAPS_KEPT = 4096


@cache
def _hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def _fits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
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
    """Whether `many_rows` takes a call without a mask."""
    return q.size(2) >= _MANY and _fits(q, k, v)


def takes_few(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `few_rows` takes a call in which every row attends to all keys."""
    shared = q.size(2) * q.size(1) // max(k.size(1), 1)
    return shared <= 16 and _fits(q, k, v)


class _Described:
    """A tensor that is copied in boxes of so many rows."""

    def __init__(self, x: torch.Tensor, rows: int) -> None:
        self.x = x
        self.rows = rows
        self.shape = tuple(x.shape)
        steps = x.stride()
        self.strides = (*(steps[i] if x.size(i) > 1 else 8 for i in range(3)), 1)

    def descriptor(self) -> Any:
        """As Triton's public launcher takes it."""
        from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        box = [1, 1, self.rows, self.shape[3]]
        dtype = bfloat16 if self.x.dtype == torch.bfloat16 else float16
        layout = NVMMASharedLayout.get_default_for(box, dtype)
        return TensorDescriptor(self.x, [*self.shape], [*self.strides], box, layout)


class _Kernel:
    """A Gluon kernel whose parameters are descriptors, tensors, numbers, constexprs."""

    def __init__(self, fn: Any) -> None:
        self._fn = fn
        self._ready: dict[Any, Any] = {}
        self._maps: dict[Any, Any] = {}

    def __call__(
        self,
        programs: int,
        described: tuple[_Described, ...],
        tensors: tuple[torch.Tensor | None, ...],
        numbers: tuple[int | float, ...],
        static: tuple[Any, ...],
    ) -> None:
        first = described[0].x
        device = first.get_device()
        if device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                self(programs, described, tensors, numbers, static)
            return
        key = (device, first.dtype, static)
        if key not in self._ready:
            self._ready[key] = self._compile(programs, described, tensors, numbers, static)
        launch, head, metas = self._ready[key]
        if launch is None:
            given = (*(x.descriptor() for x in described), *tensors, *numbers, *static)
            self._fn[(programs,)](*given, num_warps=4, enable_fp_fusion=False)
            return
        flat: list[Any] = []
        for x, meta in zip(described, metas, strict=True):
            flat += [self._map(x, meta), *x.shape, *x.strides]
        flat += [None if x is None else x.data_ptr() for x in tensors]
        stream = torch._C._cuda_getCurrentRawStream(device)
        launch(programs, 1, 1, stream, *head, *flat, *numbers, *static)

    def _compile(
        self,
        programs: int,
        described: tuple[_Described, ...],
        tensors: tuple[torch.Tensor | None, ...],
        numbers: tuple[int | float, ...],
        static: tuple[Any, ...],
    ) -> tuple[Any, tuple[Any, ...], list[Any]]:
        from batch_invariant_cuda.plan import launcher

        compiled = self._fn.warmup(
            *(x.descriptor() for x in described), *tensors, *numbers, *static,
            num_warps=4, enable_fp_fusion=False, grid=(programs,),
        )  # fmt: skip
        runner = compiled.run
        head = (
            *(compiled.function, runner.launch_cooperative_grid, runner.launch_pdl, None, None),
            *(compiled.packed_metadata, None, None, None),
        )
        metas = list(getattr(compiled.metadata, "tensordesc_meta", None) or ())
        return launcher(runner), head, metas

    def _map(self, x: _Described, meta: dict[str, Any]) -> Any:
        key = (x.x.data_ptr(), x.x.dtype, x.rows, x.shape, x.strides)
        found = self._maps.get(key)
        if found is None:
            from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
            from triton.runtime import driver

            if len(self._maps) >= _MAPS_KEPT:
                self._maps.clear()
            found = driver.active.utils.fill_tma_descriptor(
                x.x.data_ptr(), meta["swizzle"], meta["elem_size"],
                TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]], meta["block_size"],
                list(x.shape), list(x.strides), 0,
            )  # fmt: skip
            self._maps[key] = found
        return found


@cache
def _kernels() -> tuple[_Kernel, _Kernel]:
    """For many rows, for few: compiled code is looked up once in a process."""
    from batch_invariant_cuda.attention_hopper import attention_ring
    from batch_invariant_cuda.attention_step import attention_step

    return _Kernel(attention_ring), _Kernel(attention_step)


def many_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    odd: torch.Tensor,
    is_causal: bool,
    factor: float,
) -> None:
    """Computes `out` and `lse`; `odd` marks results that are not finite, where causal."""
    from batch_invariant_cuda.attention_hopper import KEYS, ROWS

    batch, heads, rows, size = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads
    blocks = -(-rows // ROWS)
    units = batch * heads * blocks
    section = max(1, SECTION // (4 * keys * size)) * group
    _kernels()[0](
        min(units, multiprocessors(q.device.index)),
        (
            _Described(q, ROWS // 2), _Described(k, KEYS), _Described(v, KEYS),
            _Described(out, ROWS // 2),
        ),
        (lse, odd),
        (batch * heads, heads, group, rows, keys, 0, blocks, section, units, factor),
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
    factor: float,
) -> None:
    """Computes `out` and `lse`, or `parts` by runs of so many blocks of keys."""
    from batch_invariant_cuda.attention_hopper import KEYS

    batch, heads, rows, size = q.shape
    kv_heads, keys = k.shape[1:3]
    blocks = -(-keys // KEYS)
    runs = -(-blocks // run)
    steps = (step // 8 if n > 1 else 0 for n, step in zip(q.shape, q.stride()[:3], strict=False))
    _kernels()[1](
        batch * kv_heads * runs,
        (_Described(k, KEYS), _Described(v, KEYS)),
        (q, out, lse, parts),
        (heads, heads // kv_heads, rows, keys, blocks, run, runs, *steps, factor),
        (size, parts is not None),
    )
