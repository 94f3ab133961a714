"""What a contract is made of: `Op`, its `Case`s, and the data that the cases draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch

from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.probe import Probe
from batch_invariant.ops.variant import Variant

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Data(StrEnum):
    """Kinds of values. Normal values alone hide most differences of order in low precision."""

    NORMAL = "normal"
    CANCELLING = "cancelling"


@dataclass(frozen=True)
class Draw:
    """Seeded tensors for one case.

    `rows(*shape)` are values of the batch, its last dimension being the one that is reduced;
    `shared(*shape)` are weights, equal for every row.
    """

    dtype: torch.dtype
    data: Data
    generator: torch.Generator

    def rows(self, *shape: int) -> torch.Tensor:
        x = self.normal(*shape)
        if self.data is Data.CANCELLING and shape[-1] >= 4:
            # One huge +- pair a row at random places: what is added between the two is rounded
            # to the unit of the huge value, so the order of the additions shows in every result.
            n = shape[-1]
            flat = x.view(-1, n)
            first = torch.randint(0, n, (len(flat),), generator=self.generator)
            second = (first + torch.randint(1, n, (len(flat),), generator=self.generator)) % n
            each = torch.arange(len(flat))
            huge = 2.0**12 if self.dtype is torch.float16 else 2.0**20
            flat[each, first] = huge
            flat[each, second] = -huge
        return x.to(self.dtype)

    def shared(self, *shape: int) -> torch.Tensor:
        if self.data is Data.CANCELLING:
            # Signed powers of two keep the pairs cancelling exactly.
            each = torch.randint(
                0, 3, (shape[0], *(1,) * (len(shape) - 1)), generator=self.generator
            )
            return torch.tensor((0.5, 1.0, 2.0))[each].expand(shape).to(self.dtype).contiguous()
        return self.normal(*shape).to(self.dtype)

    def normal(self, *shape: int) -> torch.Tensor:
        """fp32 values of mean 0 and deviation 1, the same bits on every machine.

        The sum of three uniform 20-bit integers, which is close to a normal distribution and
        exact; `torch.randn` takes logarithms and cosines of the vendor's library.
        """
        whole = torch.randint(0, 2**60, shape, generator=self.generator)
        fields = (whole & 0xFFFFF) + (whole >> 20 & 0xFFFFF) + (whole >> 40)
        return (fields - 3 * 2**19).float() / 2**19


@dataclass(frozen=True)
class Case:
    """One call of an operator on a batch of any size.

    label: shape in words, for ids and reports.
    args: from a `Draw` and the number of rows, the arguments by name; tensors named in the
        contract's `batch_axes` have that many rows.
    batch_axes, out_axes: where they differ from the contract's.
    differentiable: whether it has gradients; if not, backward must refuse.
    """

    label: str
    args: Callable[[Draw, int], dict[str, Any]]
    batch_axes: Mapping[str, int] | None = None
    out_axes: tuple[int, ...] | None = None
    differentiable: bool = True


@dataclass(frozen=True, kw_only=True)
class Op:
    """The contract of one operator.

    name, schema: as registered in the torch namespace `batch_invariant`.
    fake: shapes and dtypes of the result from the arguments, without values.
    reference: the definition in plain torch; called with float64 tensors it is the yardstick
        of accuracy.
    batch_axes: for every argument that has rows, the axis along which they lie.
    out_axes: the same for each output.
    schedule: from the arguments and the batch axes, other ways to compute the same rows when their
        sequence is cut: what a kernel of level `schedule` must keep. None: no sequence.
    any_size: a case of any size; its parameters are sizes, with the largest to be tried as
        defaults. Counterexamples are searched, and made small, with it.
    probe: how the order of its additions is measured; None: nothing is added across elements, or
        the sum cannot be seen from outside.
    error_bound: from float64 arguments and the input dtype, the largest allowed absolute error
        of the first output, elementwise: the accuracy half of the contract. A tuple bounds the
        first outputs.
    aten: the aten overloads that the mode sends to this operator. The value adapts the overload's
        arguments: it takes the kernel, then the arguments; None passes them on as they are.
    composite: aten overloads that torch decomposes above the backend. They are overridden at
        the autograd key too, by the differentiable `batch_invariant` operator.
    backward: `(ctx, *grads) -> grads of the arguments`, with `setup_context`; None for an
        operator that is itself a derivative or has none.
    """

    name: str
    schema: str
    fake: Callable[..., Any]
    reference: Callable[..., Any]
    cases: tuple[Case, ...]
    batch_axes: Mapping[str, int]
    out_axes: tuple[int, ...] = (0,)
    schedule: Callable[[Mapping[str, Any], Mapping[str, int]], Iterator[Variant]] | None = None
    any_size: Callable[..., Case] | None = None
    probe: Probe | None = None
    error_bound: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]] | None = None
    level: Guarantee = Guarantee.BATCH
    dtypes: tuple[torch.dtype, ...] = FLOATS
    aten: Mapping[str, Callable[..., Any] | None] = field(default_factory=dict)
    composite: Mapping[str, Callable[..., Any] | None] = field(default_factory=dict)
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None

    @property
    def overload(self) -> Any:
        """The registered operator, ready to call."""
        return getattr(torch.ops.batch_invariant, self.name).default

    def call(self, fn: Callable[..., Any], args: Mapping[str, Any]) -> tuple[Any, ...]:
        """Calls `fn` with the arguments as the schema passes them; the outputs as a tuple."""
        positional = []
        keywords = {}
        for argument in self.overload._schema.arguments:
            if not argument.kwarg_only:
                positional.append(args[argument.name])
            elif argument.name in args:
                keywords[argument.name] = args[argument.name]
        out = fn(*positional, **keywords)
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)
