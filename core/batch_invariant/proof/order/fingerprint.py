"""The order in which an operator adds, measured from outside: its accumulation-order fingerprint.

Works on any device and library, because it only calls the operator with chosen values. Two calls
whose trees have one digest add alike; a batch-invariant kernel has one digest at every number of
rows.

Source: Xie et al., FPRev: Revealing the Order of Floating-Point Summation, 2024, arXiv 2411.00442,
for sums of signed terms. Sums of non-negative terms use `triplets`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from batch_invariant.backend import Backend, Kernel
from batch_invariant.ops.contract import Op
from batch_invariant.ops.probe import Probe, Site
from batch_invariant.order import Tree, digest
from batch_invariant.proof.order.describe import describe
from batch_invariant.proof.order.masks import Meeting, masks
from batch_invariant.proof.order.replay import Replay, first_terms, replay, rounds_products, spread
from batch_invariant.proof.order.reveal import reveal
from batch_invariant.proof.order.triplets import Rounding, reveal_positive
from batch_invariant.proof.order.unseen import OutOfReach, Unseen
from batch_invariant.proof.subject import short

__all__ = [
    "Fingerprint",
    "OutOfReach",
    "Replay",
    "Unseen",
    "fingerprint",
    "kernel_run",
    "order_of",
    "stock_run",
]

_ALIKE = 8  # trials that must agree before two slots of a call count as one

Run = Callable[[Mapping[str, Any]], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Fingerprint:
    """What was measured of one operator in one dtype at one size of the batch.

    tree: the order of the additions; `order.digest` of it is `digest`, and `text` names it.
    row: the row that was probed; None: every row took part.
    calls: how often the operator was called.
    replay: the tree replayed on random data; None where the result does not show the sum itself.
    products: for sums of fp32 products, what happens to these before they are added.
    faults: what an invariant kernel must not do, in sentences.
    notes: what else was found beside the order.
    limits: what was not seen, in sentences.
    """

    op: str
    dtype: str
    terms: int
    rows: int
    row: int | None
    tree: Tree = field(repr=False, compare=False)
    digest: str
    text: str
    calls: int
    replay: Replay | None
    products: str | None
    faults: tuple[str, ...]
    notes: tuple[str, ...]
    limits: tuple[str, ...]

    @property
    def bits(self) -> tuple[str, str | None, str | None]:
        """What must be the same for the same terms to have a sum of the same bits."""
        accumulator = None if self.replay is None else self.replay.accumulator
        return self.digest, accumulator, self.products

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the digest stands for the tree."""
        return {
            "op": self.op,
            "dtype": self.dtype,
            "terms": self.terms,
            "rows": self.rows,
            "row": self.row,
            "digest": self.digest,
            "text": self.text,
            "calls": self.calls,
            "replay": None if self.replay is None else self.replay.as_dict(),
            "products": self.products,
            "faults": list(self.faults),
            "notes": list(self.notes),
            "limits": list(self.limits),
        }


def fingerprint(
    op: Op,
    run: Run,
    dtype: torch.dtype,
    n: int | None = None,
    rows: int = 1,
    row: int | None = 0,
    layout: str | None = None,
) -> Fingerprint:
    """Measures the order in which `op` adds n terms, in a batch of `rows` rows.

    run: calls the implementation with CPU tensors by name and returns CPU tensors; see
    `kernel_run` and `stock_run`. n: None for a number that shows the structure in little time.
    row: the row that is probed while the others hold noise. None lets every row be probed where
        that saves calls; rows that do not add as most do are left out, and a note says so.
    layout: one of the probe's `layouts`; None: rows that are contiguous.

    Raises `OutOfReach` where nothing could be seen of any implementation (no probe, a sum of
    non-negative terms in 16 bits, too many terms), and `Unseen` where nothing can be seen of this.
    """
    probe = probe_of(op, layout)
    n = default_terms(probe, dtype) if n is None else n
    if not n >= 1 or rows < 1 or (row is not None and not 0 <= row < rows):
        raise ValueError(f"no row {row} of {rows} with {n} terms")
    if probe.value is not None and torch.finfo(dtype).bits < 32:
        raise OutOfReach(
            f"{op.name} in {short(dtype)}: its terms cannot be negative, so their order shows "
            "only in the last place of an fp32 sum, which a result of 16 bits rounds off"
        )
    if probe.value is None and probe.wide is None:
        masks(dtype, probe.result(dtype), n, probe.divided)  # refuses before anything is called
    everywhere = row is None and probe.slots is None
    site = Site(rows, range(rows) if everywhere else range(row or 0, (row or 0) + 1), dtype)
    sums = _Sums(probe, run, n, site)
    faults: list[str] = []
    notes: list[str] = []
    limits = list(probe.limits)
    if differing := sums.keep_alike():
        where = "rows" if everywhere else "columns"
        (faults if everywhere else notes).append(
            f"{differing} of {sums.slots} {where} of one call do not add as the others do; this "
            "is the order of the others"
        )
    if probe.value is None:
        tree, replayed = _signed(sums, dtype, notes)
        faults += sums.prefixes(tree, replayed)
        if replayed.several:
            limits.append("how a step of several terms rounds is not seen")
        elif replayed.accumulator is None:
            limits.append(
                "the tree does not reproduce the bits: the steps round in a way of their own, in "
                "a dtype of their own, or do more than add"
            )
    else:
        tree = reveal_positive(n, Rounding(sums, n, dtype, probe.value, probe.bases))
        replayed = None
        limits.append("not replayed: the result is a function of the sum, not the sum")
    return Fingerprint(
        op=op.name,
        dtype=short(dtype),
        terms=n,
        rows=rows,
        row=None if everywhere else site.at.start,
        tree=tree,
        digest=digest(tree),
        text=describe(tree),
        calls=sums.calls,
        replay=replayed,
        products=None if replayed is None else sums.products(tree, replayed),
        faults=tuple(faults),
        notes=tuple(notes),
        limits=tuple(limits),
    )


def _signed(sums: _Sums, dtype: torch.dtype, notes: list[str]) -> tuple[Tree, Replay]:
    """The tree by masks, and its replay; what else is found is appended to the notes."""
    probe, n, result = sums.probe, sums.n, sums.probe.result(dtype)

    def measured(counted: torch.dtype) -> Tree:
        values = masks(dtype, counted, n, probe.divided)
        return reveal(n, Meeting(sums, n, values, probe.divided, dtype))

    if probe.wide is not None and torch.finfo(result).bits < 32:
        sums.extra = probe.wide
        try:
            tree = measured(torch.float32)
        except Unseen:
            pass  # the plain call may still be a sum in fp32
        else:
            sums.extra = {}
            replayed = replay(tree, sums, n, dtype, result, probe.divided)
            if replayed.accumulator is not None:
                named = ", ".join(f"{name}={value}" for name, value in probe.wide.items())
                notes.append(f"found with {named}; the replay confirms it for the plain call")
                notes += _wider(replayed)
                return tree, replayed
        sums.extra = {}
    tree = measured(result)
    replayed = replay(tree, sums, n, dtype, result, probe.divided)
    notes += _wider(replayed)
    return tree, replayed


def order_of(
    op: Op,
    run: Run,
    dtype: torch.dtype,
    rows: Iterable[int] = (1, 3, 64),
    n: int | None = None,
) -> list[Fingerprint]:
    """Fingerprints at several sizes of the batch; equal digests are one order.

    Raises `OutOfReach` or `Unseen` with the reason, as `fingerprint` does.
    """
    return [fingerprint(op, run, dtype, n, m, row=None) for m in rows]


def probe_of(op: Op, layout: str | None = None) -> Probe:
    """The operator's probe for a layout; raises `OutOfReach` if it has none."""
    if op.probe is None:
        raise OutOfReach(
            f"{op.name} has no probe: nothing is added across elements, or every term depends on "
            "all elements, so that terms cannot be chosen one by one"
        )
    if layout is None:
        return op.probe
    if layout not in op.probe.layouts:
        raise OutOfReach(
            f"{op.name} has no probe for the layout {layout!r}; it has "
            f"{', '.join(map(repr, op.probe.layouts)) or 'none but rows'}"
        )
    return op.probe.layouts[layout]


def default_terms(probe: Probe, dtype: torch.dtype) -> int:
    """How many terms are probed where nobody asks for a number."""
    if probe.divided and probe.wide is None and dtype == torch.float16 == probe.result(dtype):
        # Few units can be counted at once, so that a long sum would take long.
        return min(probe.terms, 128)
    return probe.terms


def kernel_run(op: Op, backend: Backend, kernel: Kernel) -> Run:
    """The calls of a backend's kernel, as `fingerprint` makes them."""

    def run(args: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
        native = {
            name: backend.to_native(value) if isinstance(value, torch.Tensor) else value
            for name, value in args.items()
        }
        return tuple(backend.to_torch(out) for out in op.call(kernel.fn, native))

    return run


def stock_run(op: Op, device: str = "cpu") -> Run:
    """The calls of plain torch on a device."""
    fn = probe_of(op).stock or op.reference

    def run(args: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
        there = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in args.items()
        }
        return tuple(out.cpu() for out in op.call(fn, there))

    return run


class _Sums:
    """The sum as a function [probes, n] -> [probes], as many probes a call as fit."""

    def __init__(self, probe: Probe, run: Run, n: int, site: Site):
        self.probe, self.run, self.n, self.site = probe, run, n, site
        self.calls = 0
        self.extra: Mapping[str, Any] = {}
        self.slots = len(site.at) if probe.slots is None else probe.slots
        self.used = torch.arange(self.slots)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        found = []
        width = len(self.used)
        for begin in range(0, len(values), width):
            part = values[begin : begin + width]
            filled = part
            if len(part) < self.slots:
                filled = part[-1:].repeat(self.slots, 1)
                filled[self.used[: len(part)]] = part
            outputs = self._call(filled)
            read = self.probe.read(outputs, filled, self.site)
            found.append(read if len(part) == self.slots else read[self.used[: len(part)]])
        return torch.cat(found)

    def _call(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.calls += 1
        return self.run({**self.probe.args(values, self.site), **self.extra})

    def keep_alike(self) -> int:
        """Uses only the slots that give the same terms the same sum, bit for bit, as most do.

        Returns how many others there are.
        """
        if self.slots == 1:
            return 0
        found = []
        for terms in spread(_ALIKE, self.n, self.site.dtype):
            values = terms.repeat(self.slots, 1)
            if self.probe.value is not None:
                values = self.probe.value(values.abs())
            found.append(self.probe.read(self._call(values), values, self.site))
        _, kind, count = torch.unique(
            torch.stack(found).double(), dim=1, return_inverse=True, return_counts=True
        )
        self.used = (kind == count.argmax()).nonzero().flatten()
        return self.slots - len(self.used)

    def products(self, tree: Tree, whole: Replay) -> str | None:
        """What happens to fp32 products; those of 16 bits are exact in fp32."""
        seen = self.probe.products and self.site.dtype == torch.float32
        if not seen or whole.several or whole.accumulator != "float32":
            return None
        self.site.factors = 1 + torch.rand(self.n, generator=torch.Generator().manual_seed(2))
        rounded = rounds_products(tree, self, self.n, self.site.factors)
        self.site.factors = None
        return {True: "products rounded", False: "FMA", None: "products not seen"}[rounded]

    def prefixes(self, tree: Tree, whole: Replay) -> list[str]:
        """A sentence if the sums of the first k terms are not made in the order of the whole."""
        prefix = self.probe.prefix
        if prefix is None or whole.accumulator is None:
            return []
        dtype = self.site.dtype
        for k in sorted({1, 2, self.n // 3, self.n // 2, self.n - 1} & set(range(1, self.n))):

            def sums(values: torch.Tensor, k: int = k) -> torch.Tensor:
                padded = torch.zeros(len(values), self.n, dtype=dtype)
                padded[:, :k] = values
                calls = (self._call(terms.repeat(self.slots, 1)) for terms in padded)
                return torch.stack([prefix(outputs, k, self.site)[0] for outputs in calls])

            found = replay(first_terms(tree, k), sums, k, dtype, self.probe.result(dtype), False)
            # Short sums are exact, and so have the bits of the narrower accumulator too.
            if found.accumulator not in (whole.accumulator, "float32"):
                return [f"the sum of the first {k} terms is not made in the order of the whole sum"]
        return []


def _wider(replayed: Replay) -> list[str]:
    return [f"it adds in {replayed.accumulator}, wider than fp32"] if replayed.wider else []
