"""Elementwise functions on CPU: torch's own kernels, with every element in their vector body.

ATen computes whole vectors with one piece of code and what is left over, or is strided, with
another, and the two round differently. So arguments are made contiguous, and the elements that
fall into a scalar tail are computed once more inside whole vectors and written over. Nothing is
added across elements: a result has the bits of the vector body at any length, position, stride
and number of threads. Which payload a NaN carries is not promised.

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
from batch_invariant.errors import UncoveredOpError
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
from batch_invariant.order import undeclared
from batch_invariant.stock import stock

_WHOLE = 64
"""Elements in the vectors that one step of a loop takes, at most: two of AVX-512 in bf16."""

_GRAIN = 32768
_VML_GRAIN = 2048
_GELU_PARALLEL_FROM = 16384

VECTOR_LIBRARY = "the vector body calls a vector math library, the scalar tail libm"
SEVERAL_ROUNDINGS = "several roundings, which a compiler may fuse in one body and not in the other"
SPECIAL_VALUES = "the two bodies differ in NaN or in the sign of a zero"
COMPLEX = "exact for real numbers; complex ones take several roundings"
ALPHA = "exact with alpha=1; any other multiplies first, rounded in between or not"

COVERED: dict[str, str] = {
    name: reason
    for reason, names in {
        VECTOR_LIBRARY: """
            acos acosh angle asin asinh atan atan2 atanh cos cosh digamma elu elu_backward erf erfc
            erfinv exp exp2 expm1 gelu gelu_backward hypot i0 igamma igammac lgamma log log10 log1p
            log2 log_sigmoid_backward log_sigmoid_forward logaddexp logaddexp2 logit mish
            mish_backward polygamma pow.Tensor_Scalar pow.Tensor_Tensor rsqrt sigmoid silu
            silu_backward sin sinc sinh softplus softplus_backward special_airy_ai
            special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1 special_entr
            special_erfcx special_i0e special_i1 special_i1e special_log_ndtr
            special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0
            special_modified_bessel_k1 special_ndtri special_scaled_modified_bessel_k0
            special_scaled_modified_bessel_k1 special_spherical_bessel_j0 special_xlog1py
            special_zeta sqrt tan tanh xlogy.Tensor
        """,
        SEVERAL_ROUNDINGS: """
            addcdiv addcmul div.Tensor_mode floor_divide fmod.Tensor frac
            hardsigmoid hardsigmoid_backward hardswish hardswish_backward lerp.Scalar lerp.Tensor
            logit_backward reciprocal remainder.Tensor round.decimals sgn sigmoid_backward
            tanh_backward
        """,
        SPECIAL_VALUES: """
            clamp.Tensor clamp_max.Tensor clamp_min.Tensor fmax fmin hardshrink hardshrink_backward
            hardtanh_backward maximum minimum softshrink softshrink_backward
        """,
        COMPLEX: "abs div.Tensor mul.Tensor neg",
        ALPHA: "add.Tensor sub.Tensor",
    }.items()
    for name in names.split()
}
"""Why each functional overload is covered; its out= and in-place overloads are, too."""

LOSSES = ("binary_cross_entropy", "huber_loss", "mse_loss", "smooth_l1_loss")
"""Elementwise losses, and their derivatives: a reduction is left to the dispatcher."""

GATED_UNITS = ("glu", "glu_backward")
"""Elementwise in the two halves of one argument."""

SELECTIONS = ("amax", "amin", "aminmax", "max", "min")
"""Reductions that return an element, and either of +0 and -0 where both are extreme: here +0."""

_VML = frozenset(
    """acos asin atan cos erf erfc erfinv exp expm1 i0 lgamma log log10 log1p log2 sin sqrt tan
    tanh""".split()
)

Function = Callable[..., Any]


@functools.cache
def overrides() -> dict[str, Function]:
    """The aten overloads that change on CPU, by name; each callable takes the keyset first.

    The kernels of torch are captured by the first call, which comes before any is overridden.
    """
    found: dict[str, Function] = {}
    for name, reason in COVERED.items():
        if not _has_kernel(name):
            continue
        for variant, writes in _variants(name):
            fn: Function = _function(name) if variant == name else _Into(name, variant, writes)
            if reason in (ALPHA, COMPLEX):
                inexact = _has_alpha if reason == ALPHA else _has_complex
                fn = _Arithmetic(fn, variant, writes, inexact)
            if name.startswith("lerp"):
                fn = _Real(variant, fn)
            found[variant] = functools.partial(_without_keyset, fn)
    for name in LOSSES:
        backward = f"{name}_backward"
        found |= _with_variants(name, functools.partial(_loss, _function(name), name))
        found |= _with_variants(
            backward, functools.partial(_loss_backward, _function(backward), backward)
        )
    for variant, _ in _variants("index_add"):
        found[variant] = functools.partial(_without_keyset, _IndexAdd(variant))
    found |= _with_variants("glu", _glu)
    found |= _with_variants("glu_backward", _glu_backward)
    for name in SELECTIONS:
        for variant, _ in _variants(name):
            found[variant] = functools.partial(_without_keyset, _PositiveZero(variant))
    return found


def _without_keyset(fn: Function, _keyset: Any, *args: Any, **kwargs: Any) -> Any:
    return fn(*args, **kwargs)


@functools.lru_cache(maxsize=4096)
def _tails(numel: int, threads: int, split: tuple[int, int]) -> tuple[Tensor, ...] | None:
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


def _split(name: str) -> tuple[int, int]:
    if name in _VML:
        return _VML_GRAIN, _VML_GRAIN
    if name.startswith("gelu"):
        return _GELU_PARALLEL_FROM, 1
    return _GRAIN, _GRAIN


def _tensors(args: tuple[Any, ...]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]


def _replaced(args: tuple[Any, ...], tensors: list[Tensor]) -> list[Any]:
    """The arguments with these tensors in the places of its tensors."""
    given = iter(tensors)
    return [next(given) if isinstance(a, Tensor) else a for a in args]


def _each(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _flat(tensors: list[Tensor]) -> bool:
    """Whether one flat loop runs over all: one shape, one dtype, contiguous."""
    first = tensors[0]
    if len(tensors) == 1:
        return first.is_contiguous()
    return all(
        t.is_contiguous() and t.dtype == first.dtype and t.shape == first.shape for t in tensors
    )


class _Function:
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
        tensors = _tensors(args)
        if not _flat(tensors):
            return self._rearranged(tensors, args, kwargs)
        blocks = self.blocks(tensors[0])
        if blocks is None:
            return self.kernel(*args, **kwargs)
        tails = self.tails(blocks, tensors, args, kwargs)
        result = self.kernel(*args, **kwargs)
        _overwrite(_each(result), blocks, tails)
        return result

    def blocks(self, first: Tensor) -> tuple[Tensor, ...] | None:
        return _tails(first.numel(), torch.get_num_threads(), self.split)

    def tails(
        self, blocks: tuple[Tensor, ...], tensors: list[Tensor], args: tuple[Any, ...], kwargs: Any
    ) -> list[tuple[Tensor, ...]]:
        """The results at the positions of each block, computed inside whole vectors."""
        rows = [t.view(-1) for t in tensors]
        return [
            _each(self.kernel(*_replaced(args, [r.index_select(0, block) for r in rows]), **kwargs))
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
            results = [r.permute(back) for r in _each(self(*_replaced(args, dense), **kwargs))]
            return results[0] if len(results) == 1 else tuple(results)
        # Torch's kernel decides shape, strides and dtype, and raises torch's errors.
        result = self.kernel(*args, **kwargs)
        shape, dtype = _each(result)[0].shape, _each(result)[0].dtype
        if dtype.is_floating_point or dtype.is_complex:
            full = [t.to(dtype).expand(shape).contiguous() for t in tensors]
            values = self(*_replaced(args, full), **kwargs)
            for r, value in zip(_each(result), _each(values), strict=True):
                r.copy_(value)
        return result


class _Into:
    """An out= or in-place overload: torch's checks and resizing, the bits of the functional one."""

    def __init__(self, name: str, variant: str, writes: list[str]) -> None:
        self.function = _function(name)
        self.kernel = stock(variant)
        self.writes = writes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        targets = [kwargs[name] for name in self.writes] or [args[0]]
        if len(self.function.operands) == 2:
            args = _without_numbers(self.function.operands, args, keep=not self.writes)
        tensors = _tensors(args)
        inputs = {k: v for k, v in kwargs.items() if k not in self.writes}
        if not _flat([*tensors, *targets]):
            values = _or_torchs_error(self.function, args, inputs, self.kernel, kwargs)
            result = self.kernel(*args, **kwargs)
            for target, value in zip(targets, _each(values), strict=True):
                target.copy_(value)
            return result
        blocks = self.function.blocks(tensors[0])
        if blocks is None:
            return self.kernel(*args, **kwargs)
        tails = self.function.tails(blocks, tensors, args, inputs)
        result = self.kernel(*args, **kwargs)
        _overwrite(tuple(targets), blocks, tails)
        return result


def _or_torchs_error(
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


def _has_alpha(operands: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("alpha", 1) != 1)


def _has_complex(operands: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(t.is_complex() for t in operands)


class _Arithmetic:
    """One correctly rounded operation, straight to torch's kernel; what is not, to `fn`.

    A number among the operands becomes a tensor of no dimensions in double precision. That is
    what torch computes with, except for its dtype rules: there such a tensor counts for more.
    """

    def __init__(
        self,
        fn: Function,
        variant: str,
        writes: list[str],
        inexact: Callable[[tuple[Any, ...], dict[str, Any]], bool],
    ) -> None:
        self.fn = fn
        self.kernel = stock(variant)
        self.writes = writes
        self.in_place = _parts(variant)[0].endswith("_")
        self.subtracts = variant.startswith("sub")
        self.inexact = inexact

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for i, operand in enumerate(args):
            if not isinstance(operand, Tensor):
                return self._with_number(i, args, kwargs)
        if self.inexact(args, kwargs):
            return self.fn(*args, **kwargs)
        return self.kernel(*args, **kwargs)

    def _with_number(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operands = list(args)
        number, tensor = operands[i], operands[1 - i]
        weaker = tensor.is_floating_point() or tensor.is_complex() or isinstance(number, int)
        if tensor.dim() and (weaker or self.in_place):
            operands[i] = torch.scalar_tensor(number, dtype=_WIDEST[type(number)])
            return self(*operands, **kwargs)
        if self.in_place:
            operands[1 - i] = tensor.view(1)
            self(*operands, **kwargs)
            return tensor
        if tensor.dtype is torch.bool and self.subtracts:
            operands[i] = torch.scalar_tensor(number, dtype=_WIDEST[type(number)])
            return self.kernel(*operands, **kwargs)  # raises: torch subtracts no bools
        # Converted first, and with a dimension, so that the number no longer matters for dtypes.
        operands[1 - i] = tensor.to(torch.result_type(tensor, number))
        if not tensor.dim():
            operands[1 - i] = operands[1 - i].view(1)
        if not self.writes:
            return self(*operands, **kwargs).view(tensor.shape)
        (name,) = self.writes
        result = self(*operands, **kwargs | {name: kwargs[name].new_empty(0)})
        return kwargs[name].resize_(tensor.shape).copy_(result.view(tensor.shape))


_WIDEST = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}


class _IndexAdd:
    """Slices are added elementwise: with alpha, the product is rounded before it is added."""

    def __init__(self, variant: str) -> None:
        self.kernel = stock(variant)
        self.scale = stock("mul.Tensor")

    def __call__(
        self, self_: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: Any = 1, **out: Any
    ) -> Any:
        if alpha != 1:
            _refuse_complex("index_add", source)
            source = self.scale(source, torch.scalar_tensor(alpha, dtype=source.dtype))
        return self.kernel(self_, dim, index, source, **out)


def _refuse_complex(name: str, *tensors: Tensor) -> None:
    if any(t.is_complex() for t in tensors):
        raise UncoveredOpError(
            f"aten::{name}",
            ", ".join(f"{t.dtype}{list(t.shape)}" for t in tensors),
            "for complex numbers torch chooses a formula for a whole vector at a time",
        )


class _Real:
    """A function that is covered for real numbers alone."""

    def __init__(self, name: str, fn: Function) -> None:
        self.name = name
        self.fn = fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _refuse_complex(self.name, *_tensors(args))
        return self.fn(*args, **kwargs)


class _PositiveZero:
    """A reduction that selects, with +0 for either zero: which of a tie it meets first varies."""

    def __init__(self, variant: str) -> None:
        self.kernel = stock(variant)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.kernel(*args, **kwargs)
        for extreme in _each(result):
            if extreme.is_floating_point():
                stock("add_.Tensor")(extreme, torch.zeros((), dtype=extreme.dtype))
        return result


@functools.cache
def _function(name: str) -> _Function:
    base, overload = _parts(name)
    arguments = getattr(getattr(torch.ops.aten, base), overload)._schema.arguments
    operands = tuple(i for i, a in enumerate(arguments) if str(a.type) == "Tensor")
    return _Function(_functional_kernel(name), _split(name), operands)


def _functional_kernel(name: str) -> Function:
    """Torch's kernel of a functional overload, or its out= kernel where that does the work.

    A functional kernel that called its out= overload through the dispatcher would come back here.
    """
    if _is_native(name) and name not in ("angle", "mse_loss_backward"):
        return stock(name)
    (variant, (out,)) = next(v for v in _variants(name) if len(v[1]) == 1)
    kernel = stock(variant)

    def allocate(*args: Any, **kwargs: Any) -> Any:
        first = _tensors(args)[0]
        dtype = first.dtype.to_real() if name in ("abs", "angle") else first.dtype
        if name == "angle" and not dtype.is_floating_point:
            dtype = torch.get_default_dtype()
        return kernel(*args, **kwargs, **{out: first.new_empty(0, dtype=dtype)})

    return allocate


def _parts(name: str) -> tuple[str, str]:
    base, _, overload = name.partition(".")
    return base, overload or "default"


def _has_kernel(name: str) -> bool:
    return bool(torch._C._dispatch_has_kernel(f"aten::{name}"))


def _is_native(name: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CPU"))


def _variants(name: str) -> Iterator[tuple[str, list[str]]]:
    """The native overloads that compute what a functional one does, with the names of their outs.

    An in-place overload writes its first argument and has no outs.
    """
    base, overload = _parts(name)
    own = getattr(getattr(torch.ops.aten, base), overload)._schema
    wanted = [str(a.type) for a in own.arguments]
    for packet in (base, f"{base}_"):
        if not hasattr(torch.ops.aten, packet):
            continue
        for found in getattr(torch.ops.aten, packet).overloads():
            full = packet if found == "default" else f"{packet}.{found}"
            schema = getattr(getattr(torch.ops.aten, packet), found)._schema
            outs = [a.name for a in schema.arguments if a.is_out]
            inputs = [str(a.type) for a in schema.arguments if not a.is_out]
            functional = packet == base and not outs
            if inputs == wanted and _is_native(full) and (full == name or not functional):
                yield full, outs


def _with_variants(name: str, fn: Function) -> dict[str, Function]:
    """Overrides of a functional overload by `fn`, and of its out= overloads by `fn` and a copy."""
    found: dict[str, Function] = {}
    for variant, writes in _variants(name):
        kernel = stock(variant)
        if writes:
            found[variant] = functools.partial(_copy_into, fn, kernel, writes)
        else:
            found[variant] = functools.partial(_without_keyset, fn)
    return found


def _copy_into(
    fn: Function, kernel: Function, writes: list[str], _keyset: Any, *args: Any, **kwargs: Any
) -> Any:
    inputs = {k: v for k, v in kwargs.items() if k not in writes}
    values = _or_torchs_error(fn, args, inputs, kernel, kwargs)
    result = kernel(*args, **kwargs)
    for name, value in zip(writes, _each(values), strict=True):
        kwargs[name].resize_(value.shape).copy_(value)
    return result


def _bound(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every argument by name, with the schema's defaults."""
    base, overload = _parts(name)
    arguments = getattr(getattr(torch.ops.aten, base), overload)._schema.arguments
    given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
    return {a.name: given.get(a.name, a.default_value) for a in arguments}


_MEAN, _SUM = 1, 2


def _loss(function: _Function, name: str, *args: Any, **kwargs: Any) -> Any:
    """The loss of every element, then torch's own mean or sum, which has its override."""
    bound = _bound(name, args, kwargs)
    reduction = bound["reduction"]
    losses = function(*(bound | {"reduction": 0}).values())
    if reduction == _MEAN:
        return losses.mean()
    return losses.sum() if reduction == _SUM else losses


def _loss_backward(function: _Function, name: str, *args: Any, **kwargs: Any) -> Any:
    """The derivative for a sum; that of a mean is divided by the number of elements."""
    bound = _bound(name, args, kwargs)
    if bound["reduction"] != _MEAN:
        return function(*bound.values())
    return function(*(bound | {"reduction": _SUM}).values()).div_(bound["self"].numel())


def _glu(self: Tensor, dim: int = -1) -> Tensor:
    """glu on the halves, side by side in one flat tensor."""
    odd = self.dim() == 0 or self.size(dim) % 2
    out: Tensor = stock("glu")(self, dim) if odd else _halves(*self.chunk(2, dim))
    return out


def _glu_backward(grad_output: Tensor, self: Tensor, dim: int) -> Tensor:
    if self.dim() == 0 or self.size(dim) % 2:
        raised: Tensor = stock("glu_backward")(grad_output, self, dim)
        return raised
    return torch.cat(_halves_backward(grad_output, *self.chunk(2, dim)), dim)


def _paired(a: Tensor, b: Tensor) -> Tensor:
    out: Tensor = stock("glu")(torch.cat([a.view(-1), b.view(-1)]), 0)
    return out.view(a.shape)


def _paired_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    pair = torch.cat([a.view(-1), b.view(-1)])
    into_a, into_b = stock("glu_backward")(grad.view(-1), pair, 0).chunk(2)
    return into_a.view(a.shape), into_b.view(b.shape)


_halves = _Function(_paired, _split("glu"))
_halves_backward = _Function(_paired_backward, _split("glu_backward"))


def _kernel(overload: str, *more: torch.dtype) -> Kernel:
    def fn(*args: Any, **kwargs: Any) -> Any:
        return _function(overload)(*args, **kwargs)

    return Kernel(
        fn=fn,
        guarantee=Guarantee.PARALLEL,
        dtypes=frozenset((*FLOATS, torch.float64, *more)),
        order=undeclared("nothing is added across elements"),
    )


_COMPLEX = (torch.complex64, torch.complex128)
KERNELS = {
    **{
        name: _kernel(name, *_COMPLEX) for name in "exp log rsqrt sin cos tanh sigmoid silu".split()
    },
    "erf": _kernel("erf"),
    "gelu": _kernel("gelu"),
    "pow": _kernel("pow.Tensor_Scalar", *_COMPLEX),
}
