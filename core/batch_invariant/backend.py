"""What a vendor package implements: one `Backend` class, found by its entry point's name."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from batch_invariant.guarantee import Guarantee
from batch_invariant.order import Order

API_VERSION = 1
"""Raised whenever a backend written for the previous number would not work any more."""


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here; if not, why, and what the user can do about it."""

    ok: bool
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One operator of one backend.

    fn: takes the arguments of the contract's schema, in its order, and returns new tensors.
    guarantee: what the rows' bits do not depend on.
    dtypes: input dtypes for which the guarantee holds.
    order: the order of the additions, by dtype where it differs. One that has a tree is compared
        with the tree that probing finds.
    portable: dtypes with the same bits as the CPU reference on any device with IEEE fp32 FMA.
    supports: takes what `fn` takes; None, or the reason why `fn` will refuse this very call. It
        narrows `dtypes` where shapes or options matter; `fn` raises for what it refuses.
    source: where the kernel comes from, if the backend chooses among several; by dtype where it
        differs.
    better: why each better source was not taken, such as what would have to be installed. Both are
        shown by `bi doctor`.
    """

    fn: Callable[..., Any]
    guarantee: Guarantee
    dtypes: frozenset[torch.dtype]
    order: Order | Mapping[torch.dtype, Order]
    portable: frozenset[torch.dtype] = frozenset()
    supports: Callable[..., str | None] | None = None
    source: str | Mapping[torch.dtype, str] = ""
    better: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.order, (Order, Mapping)):
            raise TypeError(
                f"the order of a kernel is an Order of batch_invariant.order, such as serial(), or "
                f"a mapping from dtypes to Orders; got {self.order!r}"
            )
        if not isinstance(self.guarantee, Guarantee):
            raise TypeError(f"the guarantee of a kernel is a Guarantee; got {self.guarantee!r}")

    def order_of(self, dtype: torch.dtype) -> Order:
        """The order of the additions for inputs of this dtype."""
        return self.order if isinstance(self.order, Order) else self.order[dtype]

    def source_of(self, dtype: torch.dtype) -> str:
        """Where the kernel for inputs of this dtype comes from."""
        return self.source if isinstance(self.source, str) else self.source[dtype]


@dataclass(frozen=True)
class Evidence:
    """What a backend can show beside the results of its kernels, such as compiled programs.

    holds: whether it shows what it should. lines: for a reader, among them what it does not show.
    details: for the certificate, JSON values.
    """

    holds: bool
    lines: Sequence[str]
    details: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Something that a backend does not keep yet, and says so.

    The proof kit expects the named checks to fail, and fails where they hold after all.

    reason: why, for whoever reads the report; compulsory.
    op, dtype, check: what is affected; None stands for all. `check` is a name of
        `batch_invariant.proof.checks`, such as "T3 neighbours" or "kernel" (there is none).
    """

    reason: str
    op: str | None = None
    dtype: torch.dtype | None = None
    check: str | None = None

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise ValueError("a gap without a reason: say why the backend does not keep this yet")


class Tuner(Protocol):
    """How `bi tune` finds schedules for the machine at hand. A schedule decides speed alone.

    dtypes: names of those that have schedules, the default first.
    """

    dtypes: Sequence[str]

    def tune(
        self,
        shapes: Sequence[tuple[int, int]],
        dtypes: Sequence[str],
        step: Callable[[str], None],
    ) -> Mapping[str, Any]:
        """A table for products of these (K, N), as data for JSON; `step` hears of each result.

        Only schedules with the bits of the contract are timed.
        """

    def refused(self, data: Any, source: str) -> Sequence[str]:
        """The lines of a table that must not be used here, each with its reason.

        ConfigurationError where `data`, which comes from `source`, is no table.
        """


class Backend(abc.ABC):
    """A vendor's kernels for one torch device type.

    Constructing a backend must be cheap and must not need the vendor's SDK to work: `probe` says
    whether it does.
    """

    name: ClassVar[str]
    device_type: ClassVar[str]
    api_version: ClassVar[int]
    vendor_namespaces: ClassVar[tuple[str, ...]] = ()
    """Namespaces of the vendor's own operators, which the mode guards as it guards aten's."""

    @abc.abstractmethod
    def probe(self) -> Availability:
        """Whether the kernels can run here, without raising."""

    @abc.abstractmethod
    def kernels(self) -> Mapping[str, Kernel]:
        """The kernels by operator name; asked only when `probe` says ok."""

    def aten_overrides(self) -> Mapping[str, Callable[..., Any]]:
        """More aten overloads that must change on this device while the mode is on.

        For operators that need no contract of their own, such as elementwise functions whose
        stock kernel is position-dependent here. Each callable takes the dispatch keyset first.
        """
        return {}

    def aten_harmless(self) -> Mapping[str, str | None]:
        """Aten operators whose own kernels keep the promise on this device, by name, and why.

        Beside those that core calls harmless everywhere; None takes one of those back. A name
        stands for all its overloads, or for one (`add.Tensor`).
        """
        return {}

    def fused_kernels(self) -> Mapping[str, Callable[..., Any]]:
        """Kernels for operators that compiled code finds in a row, with the bits of the row.

        `mean_square(x, dim, keepdim)`: the mean of the rounded squares of x, widened to fp32.
        """
        return {}

    def vendor_overrides(self) -> Mapping[str, Callable[..., Any] | None]:
        """Operators of `vendor_namespaces` that the mode replaces, by qualified name.

        None where an operator's own kernel keeps the promise. Those that are not named are refused
        while the mode is on.
        """
        return {}

    def gaps(self) -> Sequence[Gap]:
        """What this backend is known not to keep; everything else is checked and must hold."""
        return ()

    def notes(self) -> Sequence[str]:
        """More lines for `bi doctor`, such as what a vendor's own operators are replaced by.

        Asked if `probe` says ok.
        """
        return ()

    def tuner(self) -> Tuner | None:
        """What `bi tune` calls; None where there is nothing to tune. Asked if `probe` says ok."""
        return None

    def evidence(self, full: bool) -> Evidence | None:
        """Further evidence, which `bi verify` asks for after the checks of the whole backend.

        full: as much as there is, rather than what takes minutes.
        """
        return None

    def activate(self) -> None:
        """Sets vendor switches (determinism levels, fused features off) when it is selected."""

    def deactivate(self) -> None:
        """Undoes `activate` exactly."""

    def to_native(self, tensor: torch.Tensor) -> Any:
        """A CPU tensor as this backend's kernels take it."""
        return tensor.to(self.device_type)

    def to_torch(self, array: Any) -> torch.Tensor:
        """A kernel's result as a CPU tensor."""
        tensor: torch.Tensor = array.cpu()
        return tensor
