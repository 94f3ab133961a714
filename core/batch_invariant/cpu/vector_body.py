"""Torch's elementwise kernels with every element in their vector body.

ATen computes whole vectors with one piece of code and what is left over, or is strided, with
another, and the two round differently. So arguments are made contiguous, and the elements that
fall into a scalar tail are computed once more inside whole vectors and written over.

Source: vectorized_loop in aten/src/ATen/native/cpu/Loops.h takes two vectors at a time and ends
with scalars; parallel_for in ATen/Parallel-inl.h and ParallelOpenMP.h cuts what is longer than a
grain into equal chunks, one a thread, so every chunk has a tail.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batch_invariant.cpu.overloads import is_native, schema, variants
from batch_invariant.stock import stock

_WHOLE = 64
"""Elements in the vectors that one step of a loop takes, at most: two of AVX-512 in bf16."""

_GRAIN = 32768
_VML_GRAIN = 2048
_GELU_PARALLEL_FROM = 16384

_VML = frozenset(
    """acos asin atan cos erf erfc erfinv exp expm1 i0 lgamma log log10 log1p log2 sin sqrt tan
    tanh""".split()
)

Function = Callable[..., Any]


@functools.lru_cache(maxsize=4096)
def tail_blocks(numel: int, threads: int, split: tuple[int, int]) -> tuple[Tensor, ...] | None:
    """Positions outside whole vectors, in blocks that are whole vectors themselves; or None.

    `split`: what has more elements than the first number is shared by the threads, in chunks of
    at least the second.
    """
    parallel_from, grain = split
    workers = min(threads, -(-numel // grain)) if numel > parallel_from else 1
    chunk = max(-(-numel // workers), 1)
    stops = [min(start + chunk, numel) for start in range(0, numel, chunk)]
    tails = [
        torch.arange(stop - (stop - start) % _WHOLE, stop)
        for start, stop in zip(range(0, numel, chunk), stops, strict=True)
    ]
    if not any(map(len, tails)):
        return None
    positions = torch.cat(tails)
    padding = positions[-1:].expand(-len(positions) % _WHOLE)
    blocks: tuple[Tensor, ...] = torch.cat([positions, padding]).split(_VML_GRAIN)
    return blocks


def split_of(name: str) -> tuple[int, int]:
    if name in _VML:
        return _VML_GRAIN, _VML_GRAIN
    if name.startswith("gelu"):
        return _GELU_PARALLEL_FROM, 1
    return _GRAIN, _GRAIN


def tensors_of(args: tuple[Any, ...]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]


def _replaced(args: tuple[Any, ...], tensors: list[Tensor]) -> list[Any]:
    """The arguments with these tensors in the places of its tensors."""
    given = iter(tensors)
    return [next(given) if isinstance(a, Tensor) else a for a in args]


def each(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _flat(tensors: list[Tensor]) -> bool:
    """Whether one flat loop runs over all: one shape, one dtype, contiguous."""
    first = tensors[0]
    if len(tensors) == 1:
        return first.is_contiguous()
    return all(
        t.is_contiguous() and t.dtype == first.dtype and t.shape == first.shape for t in tensors
    )


class VectorBody:
    """A functional overload: any layout, any shapes that broadcast, any dtypes that torch takes."""

    def __init__(
        self, kernel: Function, split: tuple[int, int], operands: tuple[int, ...] = ()
    ) -> None:
        self.kernel = kernel
        self.split = split
        self.operands = operands

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(self.operands) == 2:
            args = _without_numbers(self.operands, args)
        tensors = tensors_of(args)
        if not _flat(tensors):
            return self._rearranged(tensors, args, kwargs)
        blocks = self.blocks(tensors[0])
        if blocks is None:
            return self.kernel(*args, **kwargs)
        tails = self.tails(blocks, tensors, args, kwargs)
        result = self.kernel(*args, **kwargs)
        _overwrite(each(result), blocks, tails)
        return result

    def blocks(self, first: Tensor) -> tuple[Tensor, ...] | None:
        return tail_blocks(first.numel(), torch.get_num_threads(), self.split)

    def tails(
        self, blocks: tuple[Tensor, ...], tensors: list[Tensor], args: tuple[Any, ...], kwargs: Any
    ) -> list[tuple[Tensor, ...]]:
        """The results at the positions of each block, computed inside whole vectors."""
        rows = [t.view(-1) for t in tensors]
        return [
            each(self.kernel(*_replaced(args, [r.index_select(0, block) for r in rows]), **kwargs))
            for block in blocks
        ]

    def _rearranged(self, tensors: list[Tensor], args: tuple[Any, ...], kwargs: Any) -> Any:
        first = tensors[0]
        if all(t.shape == first.shape and t.dtype == first.dtype for t in tensors):
            # In memory order, so that the result has the strides that torch would give it.
            strides = torch.empty_like(first, device="meta").stride()
            order = sorted(range(first.dim()), key=lambda d: -strides[d])
            back = [order.index(d) for d in range(first.dim())]
            dense = [t.permute(order).contiguous() for t in tensors]
            results = [r.permute(back) for r in each(self(*_replaced(args, dense), **kwargs))]
            return results[0] if len(results) == 1 else tuple(results)
        # Torch's kernel decides shape, strides and dtype, and raises torch's errors.
        result = self.kernel(*args, **kwargs)
        shape, dtype = each(result)[0].shape, each(result)[0].dtype
        if dtype.is_floating_point or dtype.is_complex:
            full = [t.to(dtype).expand(shape).contiguous() for t in tensors]
            values = self(*_replaced(args, full), **kwargs)
            for r, value in zip(each(result), each(values), strict=True):
                r.copy_(value)
        return result


class Into:
    """An out= or in-place overload: torch's checks and resizing, the bits of the functional one."""

    def __init__(self, name: str, variant: str, writes: list[str]) -> None:
        self.function = body_of(name)
        self.kernel = stock(variant)
        self.writes = writes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        targets = [kwargs[name] for name in self.writes] or [args[0]]
        if len(self.function.operands) == 2:
            args = _without_numbers(self.function.operands, args, keep=not self.writes)
        tensors = tensors_of(args)
        inputs = {k: v for k, v in kwargs.items() if k not in self.writes}
        if not _flat([*tensors, *targets]):
            values = or_torchs_error(self.function, args, inputs, self.kernel, kwargs)
            result = self.kernel(*args, **kwargs)
            for target, value in zip(targets, each(values), strict=True):
                target.copy_(value)
            return result
        blocks = self.function.blocks(tensors[0])
        if blocks is None:
            return self.kernel(*args, **kwargs)
        tails = self.function.tails(blocks, tensors, args, inputs)
        result = self.kernel(*args, **kwargs)
        _overwrite(tuple(targets), blocks, tails)
        return result


def or_torchs_error(
    fn: Function, args: tuple[Any, ...], inputs: dict[str, Any], kernel: Function, kwargs: Any
) -> Any:
    """What `fn` returns; if it raises, the error that torch has for the overload comes first."""
    try:
        return fn(*args, **inputs)
    except RuntimeError:
        kernel(*args, **kwargs)
        raise


def _overwrite(
    results: tuple[Tensor, ...], blocks: tuple[Tensor, ...], tails: list[tuple[Tensor, ...]]
) -> None:
    """Puts what was computed inside whole vectors where a scalar tail left something else."""
    for block, values in zip(blocks, tails, strict=True):
        for result, value in zip(results, values, strict=True):
            result.view(-1).index_copy_(0, block, value)


def _without_numbers(
    operands: tuple[int, ...], args: tuple[Any, ...], keep: bool = False
) -> tuple[Any, ...]:
    """Two operands in their common dtype, if one is a number, which torch treats as the weaker.

    Torch hands over a number where the schema says Tensor, if the program wrote a number. With
    `keep`, the tensor is written to and stays what it is.
    """
    i, j = operands
    if isinstance(args[i], Tensor) and isinstance(args[j], Tensor):
        return args
    dtype = torch.result_type(args[i], args[j])
    replaced = list(args)
    for k in operands:
        if not isinstance(args[k], Tensor):
            replaced[k] = torch.scalar_tensor(args[k], dtype=dtype)
        elif not keep:
            replaced[k] = args[k].to(dtype)
    return tuple(replaced)


@functools.cache
def body_of(name: str) -> VectorBody:
    """The vector body of a functional overload."""
    operands = tuple(i for i, a in enumerate(schema(name).arguments) if str(a.type) == "Tensor")
    return VectorBody(_functional_kernel(name), split_of(name), operands)


def _functional_kernel(name: str) -> Function:
    """Torch's kernel of a functional overload, or its out= kernel where that does the work.

    A functional kernel that called its out= overload through the dispatcher would come back here.
    """
    if is_native(name) and name not in ("angle", "mse_loss_backward"):
        return stock(name)
    (variant, (out,)) = next(v for v in variants(name) if len(v[1]) == 1)
    kernel = stock(variant)

    def allocate(*args: Any, **kwargs: Any) -> Any:
        first = tensors_of(args)[0]
        dtype = first.dtype.to_real() if name in ("abs", "angle") else first.dtype
        if name == "angle" and not dtype.is_floating_point:
            dtype = torch.get_default_dtype()
        return kernel(*args, **kwargs, **{out: first.new_empty(0, dtype=dtype)})

    return allocate
