"""Elementwise functions on CPU: torch's own kernels, with every element in their vector body.

ATen computes whole vectors with one piece of code and what is left over, or is strided, with
another, and the two round differently. So arguments are made contiguous, and the elements that
fall into a scalar tail are computed once more inside whole vectors and written over. Nothing is
added across elements: a result has the bits of the vector body at any length, position, stride
and number of threads.

Source: vectorized_loop in aten/src/ATen/native/cpu/Loops.h takes two vectors at a time and ends
with scalars; parallel_for in ATen/Parallel-inl.h and ParallelOpenMP.h cuts what is longer than a
grain into equal chunks, one a thread, so every chunk has a tail. What varies on one machine is in
docs/benchmarks/elementwise_variance.json; the table holds more, because other CPUs differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from batch_invariant.backend import Kernel
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
from batch_invariant.stock import stock

_WHOLE = 64
"""Elements in the vectors that one step of a loop takes, at most: two of AVX-512 in bf16."""

_GRAIN = 32768
_VML_GRAIN = 2048
_GELU_PARALLEL_FROM = 16384

VECTOR_LIBRARY = "the vector body calls a vector math library, the scalar tail libm"
SEVERAL_ROUNDINGS = "several roundings, which the compiler may fuse in one body and not the other"
SPECIAL_VALUES = "NaN or the sign of a zero comes out differently of the two bodies"
COMPLEX = "exact for real numbers; complex ones take several roundings"
ALPHA = "exact with alpha=1; any other multiplies first, in another precision or a fused step"

COVERED: dict[str, str] = {
    name: reason
    for reason, names in {
        VECTOR_LIBRARY: """
            acos acosh angle asin asinh atan atan2 atanh cos cosh digamma elu elu_backward erf erfc
            erfinv exp exp2 expm1 gelu gelu_backward hypot i0 igamma igammac lgamma log log10 log1p
            log2 log_sigmoid_backward log_sigmoid_forward logaddexp logaddexp2 logit mish
            mish_backward polar polygamma pow.Tensor_Scalar pow.Tensor_Tensor rsqrt sigmoid silu
            silu_backward sin sinc sinh softplus softplus_backward special_airy_ai
            special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1 special_entr
            special_erfcx special_i0e special_i1 special_i1e special_log_ndtr
            special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0
            special_modified_bessel_k1 special_ndtri special_scaled_modified_bessel_k0
            special_scaled_modified_bessel_k1 special_spherical_bessel_j0 special_xlog1py
            special_zeta sqrt tan tanh xlogy.Tensor
        """,
        SEVERAL_ROUNDINGS: """
            _add_relu.Tensor addcdiv addcmul div.Tensor_mode floor_divide fmod.Tensor frac
            hardsigmoid hardsigmoid_backward hardswish hardswish_backward lerp.Scalar lerp.Tensor
            logit_backward reciprocal remainder.Tensor round.decimals sgn sigmoid_backward
            tanh_backward
        """,
        SPECIAL_VALUES: """
            clamp.Tensor clamp_max.Tensor clamp_min.Tensor fmax fmin hardshrink hardshrink_backward
            hardtanh_backward heaviside leaky_relu leaky_relu_backward maximum minimum softshrink
            softshrink_backward
        """,
        COMPLEX: "abs div.Tensor mul.Tensor neg",
        ALPHA: "add.Tensor sub.Tensor",
    }.items()
    for name in names.split()
}
"""Why each functional overload is covered. Its out= and in-place overloads are, too."""

LOSSES = "binary_cross_entropy huber_loss mse_loss smooth_l1_loss".split()
"""Elementwise losses with a reduction: the mean or sum is left to the dispatcher."""

SIGN_OF_ZERO = "amax amin aminmax max min".split()
"""Reductions that select an element, and either zero when +0 and -0 tie: here always +0."""

_VML = frozenset(
    """acos asin atan cos erf erfc erfinv exp expm1 i0 lgamma log log10 log1p log2 sin sqrt tan
    tanh""".split()
)


@functools.lru_cache(maxsize=4096)
def _tails(
    numel: int, threads: int, parallel_from: int, grain: int
) -> tuple[Tensor, ...] | None:
    """Positions outside whole vectors, in blocks that are whole vectors themselves; or None.

    `threads` share what has more than `parallel_from` elements, each at least `grain` of them.
    """
    workers = min(threads, -(-numel // grain)) if numel > parallel_from else 1
    chunk = -(-numel // max(workers, 1))
    tails = []
    for start in range(0, numel, max(chunk, 1)):
        stop = min(start + chunk, numel)
        tails.append(torch.arange(stop - (stop - start) % _WHOLE, stop))
    positions = torch.cat(tails) if tails else torch.empty(0, dtype=torch.int64)
    if not len(positions):
        return None
    padded = positions[-1].repeat(-len(positions) % _WHOLE)
    return torch.cat([positions, padded]).split(_VML_GRAIN)


def _split_of(name: str) -> tuple[int, int]:
    """The smallest tensor that is shared between threads, and the smallest share."""
    if name in _VML:
        return _VML_GRAIN, _VML_GRAIN
    if name.startswith("gelu"):
        return _GELU_PARALLEL_FROM, 1
    return _GRAIN, _GRAIN


def _tensors(args: tuple[Any, ...]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]


def _alike(tensors: list[Tensor]) -> bool:
    """Whether all have one shape and dtype and are contiguous: one flat loop covers them."""
    first = tensors[0]
    if len(tensors) == 1:
        return first.is_contiguous()
    return all(
        t.is_contiguous() and t.shape == first.shape and t.dtype == first.dtype for t in tensors
    )


def _replaced(args: tuple[Any, ...], tensors: list[Tensor]) -> list[Any]:
    """The arguments with other tensors in the places of the tensors."""
    given = iter(tensors)
    return [next(given) if isinstance(a, Tensor) else a for a in args]


def _each(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


class _Function:
    """One functional overload: any layout, any shapes that broadcast, any dtypes torch takes."""

    def __init__(self, name: str, kernel: Callable[..., Any] | None = None) -> None:
        self.kernel = stock(name) if kernel is None else kernel
        self.split = _split_of(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = _tensors(args)
        if not _alike(tensors):
            return self._rearranged(tensors, args, kwargs)
        blocks = _tails(tensors[0].numel(), torch.get_num_threads(), *self.split)
        if blocks is None:
            return self.kernel(*args, **kwargs)
        tails = self.tails(blocks, tensors, args, kwargs)
        result = self.kernel(*args, **kwargs)
        overwrite(blocks, _each(result), tails)
        return result

    def tails(
        self, blocks: tuple[Tensor, ...], tensors: list[Tensor], args: tuple[Any, ...], kwargs: Any
    ) -> list[tuple[Tensor, ...]]:
        """The results at the positions of each block, computed inside whole vectors."""
        flat = [t.view(-1) for t in tensors]
        return [
            _each(self.kernel(*_replaced(args, [t[block] for t in flat]), **kwargs))
            for block in blocks
        ]

    def _rearranged(self, tensors: list[Tensor], args: tuple[Any, ...], kwargs: Any) -> Any:
        first = tensors[0]
        if all(t.shape == first.shape and t.dtype == first.dtype for t in tensors):
            # In the memory order of the result, which is the one that torch would give it.
            strides = torch.empty_like(first, device="meta").stride()
            order = sorted(range(first.dim()), key=lambda d: -strides[d])
            dense = [t.permute(order).contiguous() for t in tensors]
            back = [order.index(d) for d in range(first.dim())]
            results = [r.permute(back) for r in _each(self(*_replaced(args, dense), **kwargs))]
            return results[0] if len(results) == 1 else tuple(results)
        # Torch decides shape, strides and dtype, and raises its own errors.
        result = self.kernel(*args, **kwargs)
        shaped = _each(result)[0]
        if shaped.dtype.is_floating_point or shaped.dtype.is_complex:
            common = functools.reduce(torch.promote_types, (shaped.dtype, *_part(tensors)))
            full = [t.to(common).expand(shaped.shape).contiguous() for t in tensors]
            for r, value in zip(
                _each(result), _each(self(*_replaced(args, full), **kwargs)), strict=True
            ):
                r.copy_(value)
        return result


def _part(tensors: list[Tensor]) -> Iterator[torch.dtype]:
    """Dtypes that a result can be a part of: polar and abs go between real and complex."""
    return (t.dtype.to_real() for t in tensors if not t.dtype.is_complex and t.dim() and False)


def overwrite(
    blocks: tuple[Tensor, ...], results: tuple[Tensor, ...], tails: list[tuple[Tensor, ...]]
) -> None:
    """Writes what was computed inside whole vectors over what a scalar tail left."""
    for block, values in zip(blocks, tails, strict=True):
        for result, value in zip(results, values, strict=True):
            result.view(-1)[block] = value.to(result.dtype)
