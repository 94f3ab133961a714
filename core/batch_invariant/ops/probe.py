"""How the sum inside an operator is given chosen terms, and read back.

A contract that carries a `Probe` can have its order of additions measured from outside
(`proof.order`), whatever device or library computes it. The probe builds the arguments of one call
in which the sums at chosen places, its slots, add given terms; everything else in the batch is
noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Site:
    """Where in a batch of `rows` rows the probed sums stand: the rows `at`, or columns of row
    `at[0]`. A sum of products has `factors` [n] beside its terms, or ones."""

    rows: int
    at: range
    dtype: torch.dtype
    factors: torch.Tensor | None = None
    _noise: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def noise(self, *shape: int) -> torch.Tensor:
        """Seeded normal values, the same tensor at every call: write only where you always do."""
        if shape not in self._noise:
            generator = torch.Generator().manual_seed(len(self._noise) + 1)
            self._noise[shape] = torch.randn(shape, generator=generator).to(self.dtype)
        return self._noise[shape]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """How to be probed.

    args: from the values of the terms, [slots, n] in the input dtype, and the site, the arguments
        of a call, as CPU tensors. Their shapes may depend on n and the site alone.
    read: from the outputs, the values and the site, the results of the sums, [slots].
    slots: how many sums of one call can be given their own terms; None: one for each row probed.
    terms: n, where nobody asks for another.
    most_rows: a larger batch would make a call slow; reports leave it out.
    divided: the result is the sum divided by n.
    value: for a sum of terms that cannot be negative, the value whose term is t. The result then
        is any function of the sum that tells one of `bases` from the next larger float. None: the
        terms are the values, and the result is the sum.
    bases: terms whose values are exact, the first that the function tells apart being used.
    products: the terms are multiplied by `Site.factors`.
    prefix: the same result, with `read` for the sum of the first k terms; for running sums.
    wide: arguments with which the result of 16-bit inputs is in fp32, so that more can be counted
        at once. The tree is then replayed without them.
    result: from the input dtype, that of the result.
    stock: plain torch's own function, where the contract's `reference` spells out the definition.
    layouts: the same sums of data that lie otherwise in memory, by name.
    sum_of: what is added, in words.
    limits: what of the operator this probe does not see, in sentences.
    """

    args: Callable[[torch.Tensor, Site], Mapping[str, Any]]
    read: Callable[[tuple[torch.Tensor, ...], torch.Tensor, Site], torch.Tensor]
    slots: int | None = None
    terms: int = 1100
    most_rows: int | None = None
    divided: bool = False
    value: Callable[[torch.Tensor], torch.Tensor] | None = None
    bases: tuple[float, ...] = (1.0,)
    products: bool = False
    prefix: Callable[[tuple[torch.Tensor, ...], int, Site], torch.Tensor] | None = None
    wide: Mapping[str, Any] | None = None
    result: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype
    stock: Callable[..., Any] | None = None
    layouts: Mapping[str, Probe] = field(default_factory=dict)
    sum_of: str = "the elements of a row"
    limits: tuple[str, ...] = ()


def in_rows(values: torch.Tensor, site: Site) -> torch.Tensor:
    """Noise of shape [rows, n] with the values in the rows that are probed."""
    x = site.noise(site.rows, values.size(1))
    x[site.at.start : site.at.stop] = values
    return x


def in_columns(values: torch.Tensor, site: Site) -> torch.Tensor:
    """The transpose of `in_rows`, contiguous."""
    x = site.noise(values.size(1), site.rows)
    x[:, site.at.start : site.at.stop] = values.mT
    return x


def of_rows(out: torch.Tensor, site: Site) -> torch.Tensor:
    """What stands in the rows that are probed."""
    return out[site.at.start : site.at.stop]


def row_probe(**how: Any) -> Probe:
    """The sum of each row of an argument `self` [rows, n] over dim 1, whose result is [rows]."""
    arguments = how.pop("arguments", {"dim": -1, "keepdim": False})
    return Probe(
        args=lambda values, site: {"self": in_rows(values, site), **arguments},
        read=how.pop("read", lambda outputs, values, site: of_rows(outputs[0], site)),
        **how,
    )


def column_sums(**how: Any) -> dict[str, Probe]:
    """A layout for `row_probe`: `self` is [n, rows], and the sum runs over dim 0."""
    return {
        "over dim 0": Probe(
            args=lambda values, site: {
                "self": in_columns(values, site),
                "dim": 0,
                "keepdim": False,
            },
            read=lambda outputs, values, site: of_rows(outputs[0], site),
            sum_of="the elements of a column",
            **how,
        )
    }


def at_base(out: torch.Tensor, values: torch.Tensor, site: Site) -> torch.Tensor:
    """Of a result as wide as the row, the element that stands at each row's largest value."""
    largest = values.argmax(1, keepdim=True)
    return of_rows(out, site).gather(1, largest).squeeze(1)


def column_probe(left: str, right: str, *, transposed: bool, batched: bool, **how: Any) -> Probe:
    """The columns of one row of a product `left @ right`: the row holds ones, the columns terms.

    transposed: `right` is [N, K] rather than [K, N]. batched: both lead with the batch dimension.
    """
    extra = how.pop("arguments", {})

    def args(values: torch.Tensor, site: Site) -> dict[str, Any]:
        row, n = site.at.start, values.size(1)
        matrix = values if transposed else values.mT.contiguous()
        if batched:
            a, b = site.noise(site.rows, 3, n), site.noise(site.rows, *matrix.shape)
            b[row] = matrix
        else:
            a, b = site.noise(site.rows, n), matrix
        a[row] = 1 if site.factors is None else site.factors
        return {left: a, right: b, **{name: make(values) for name, make in extra.items()}}

    def read(outputs: tuple[torch.Tensor, ...], values: torch.Tensor, site: Site) -> torch.Tensor:
        row = outputs[0][site.at.start]
        return row[0] if batched else row

    return Probe(
        args=args,
        read=read,
        slots=64 if batched else 256,
        sum_of="the products",
        products=True,
        **how,
    )


EXPONENTIALS: dict[str, Any] = {"value": torch.log, "bases": (1.0,), "terms": 96}
"""A sum of exp(x), with the largest x taken off first, as its logarithm or as a denominator."""

SQUARES: dict[str, Any] = {
    "value": torch.sqrt,
    "bases": (2.25, 2.06640625, 2.44140625, 2.84765625),
    "terms": 64,
}
"""A sum of squares, as its root: the roots of a base and of the next float are two floats, if the
root is correctly rounded; one that is not may tell other bases apart. With 64 terms the mean of the
squares is exact too."""
