"""The orders of a backend's operators over the sizes of the batch, beside plain torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from batch_invariant import registry, selector
from batch_invariant.backend import Backend, Kernel
from batch_invariant.errors import ConfigurationError, OpNotSupported
from batch_invariant.ops import CONTRACTS
from batch_invariant.ops.contract import Op
from batch_invariant.order import digest
from batch_invariant.proof.order.fingerprint import (
    Fingerprint,
    OutOfReach,
    Run,
    Unseen,
    default_terms,
    fingerprint,
    kernel_run,
    probe_of,
    stock_run,
)
from batch_invariant.proof.subject import short

Step = Callable[[str, int], None]


@dataclass(frozen=True)
class Side:
    """The fingerprints of one implementation.

    unseen: why there are none. reachable: whether there could have been any.
    """

    prints: tuple[Fingerprint, ...]
    unseen: str | None = None
    reachable: bool = True

    def groups(self) -> list[list[Fingerprint]]:
        """The fingerprints that are alike, by the smallest batch."""
        found: dict[tuple[str, str | None, str | None], list[Fingerprint]] = {}
        for each in self.prints:
            found.setdefault(each.bits, []).append(each)
        return list(found.values())

    def lines(self) -> list[tuple[str, list[int], str]]:
        """Digest, sizes of the batch and name of each order."""
        return [
            (group[0].digest, [each.rows for each in group], _named(group[0]))
            for group in self.groups()
        ]

    def notes(self) -> list[str]:
        """What was found beside the order, faults first."""
        found = [fault for each in self.prints for fault in each.faults]
        return list(dict.fromkeys([*found, *(note for each in self.prints for note in each.notes)]))

    @property
    def faulty(self) -> bool:
        """Whether rows of one call, or parts of one running sum, are added in different orders."""
        return any(each.faults for each in self.prints)

    def limits(self) -> list[str]:
        """What was not seen."""
        return list(dict.fromkeys(limit for each in self.prints for limit in each.limits))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "unseen": self.unseen,
            "orders": len(self.groups()),
            "fingerprints": [each.as_dict() for each in self.prints],
        }


@dataclass(frozen=True)
class Orders:
    """What was found for one operator of one backend in one dtype.

    layout: how the data lie, where not as contiguous rows.
    declared: the order that the kernel declares, and the digest of its tree if it has one.
    """

    op: str
    layout: str | None
    dtype: str
    backend: str
    terms: int
    sum_of: str
    stock: Side
    here: Side
    declared: str
    declared_digest: str | None

    @property
    def matches(self) -> bool | None:
        """Whether every fingerprint is the declared order; None if none is declared."""
        if self.declared_digest is None:
            return None
        return all(each.digest == self.declared_digest for each in self.here.prints)

    @property
    def refuted(self) -> bool:
        """Whether the order does not give the bits, so that something else happens too."""
        return any(each.replay is not None and each.replay.refuted for each in self.here.prints)

    @property
    def ok(self) -> bool:
        """One order at every size and row, which gives the bits and is the declared one."""
        one = len(self.here.groups()) == 1 and not self.here.faulty
        return one and self.matches is not False and not self.refuted

    @property
    def verdict(self) -> str:
        """The declared order, and whether it is the one found."""
        if self.declared_digest is None:
            return f"no tree: {self.declared}"
        if not self.here.prints:
            return f"{self.declared}, nothing to compare it with"
        verdict = "the same" if self.matches else "NOT what is found"
        if self.matches and self.refuted:
            verdict = "the same tree, but it does NOT give the bits"
        elif self.here.faulty:
            verdict += ", but not everywhere"
        return f"{self.declared_digest}  {self.declared}: {verdict}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "op": self.op,
            "layout": self.layout,
            "dtype": self.dtype,
            "backend": self.backend,
            "terms": self.terms,
            "ok": self.ok,
            "declared": {
                "order": self.declared,
                "digest": self.declared_digest,
                "matches": self.matches,
            },
            "here": self.here.as_dict(),
            "stock": self.stock.as_dict(),
        }


def orders(
    backend: str | None,
    ops: Sequence[str],
    dtype: str,
    rows: Sequence[int],
    terms: int | None = None,
    step: Step = lambda label, done: None,
) -> Iterator[Orders]:
    """One operator after another, of the selected or the named backend.

    Raises `ConfigurationError` for names that mean nothing, and `OpNotSupported` where the backend
    has no kernel for a named operator and dtype.
    """
    if unknown := sorted(set(ops) - set(CONTRACTS)):
        raise ConfigurationError(
            f"unknown operator {', '.join(unknown)}; known: {', '.join(CONTRACTS)}"
        )
    wanted = getattr(torch, dtype, None)
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise ConfigurationError(
            f"unknown dtype {dtype!r}; known: float32, bfloat16, float16, float64"
        )
    with torch.no_grad(), selector.use_backend(backend) if backend else nullcontext():
        device = registry.load(backend).device_type if backend else "cpu"
        chosen = selector.current_backend(device)
        table = selector.kernels(chosen.device_type)
        for name in ops:
            op = CONTRACTS[name]
            if name not in table or wanted not in table[name].dtypes:
                raise OpNotSupported(f"the backend {chosen.name!r} has no {name} in {dtype}")
            for layout in (None, *(op.probe.layouts if op.probe else ())):
                yield _orders(op, layout, chosen, table[name], wanted, rows, terms, step)


def _orders(
    op: Op,
    layout: str | None,
    backend: Backend,
    kernel: Kernel,
    dtype: torch.dtype,
    rows: Sequence[int],
    terms: int | None,
    step: Step,
) -> Orders:
    probe = probe_of(op, layout) if op.probe else None
    count = 0 if probe is None else terms or default_terms(probe, dtype)
    most = max(rows) if probe is None or probe.most_rows is None else probe.most_rows
    sizes = sorted({m for m in rows if m <= most}) or [most]

    def side(run: Callable[[], Run]) -> Side:
        prints = []
        try:
            probe_of(op, layout)
            call = run()
            for m in sizes:
                step(f"{op.name} {short(dtype)} M {m}", 1)
                prints.append(fingerprint(op, call, dtype, count, m, row=None, layout=layout))
        except Unseen as reason:
            return Side((), str(reason), not isinstance(reason, OutOfReach))
        return Side(tuple(prints))

    stock = side(lambda: stock_run(op, backend.device_type))
    here = side(lambda: kernel_run(op, backend, kernel))
    declared = kernel.order_of(dtype)
    tree = declared.tree(count) if count else None
    return Orders(
        op=op.name,
        layout=layout,
        dtype=short(dtype),
        backend=backend.name,
        terms=count,
        sum_of=probe.sum_of if probe else "no sum",
        stock=stock,
        here=here,
        declared=str(declared),
        declared_digest=None if tree is None else digest(tree),
    )


def _named(found: Fingerprint) -> str:
    text = found.text if found.replay is None else f"{found.text}  replay {found.replay}"
    return text if found.products is None else f"{text}, {found.products}"
