"""What `verify` found about a function, for people, for programs and as an error."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from batch_invariant.errors import VarianceFound
from batch_invariant.ops.bits import Mismatch
from batch_invariant.proof.user.bisect import Fork, Operator


@dataclass(frozen=True)
class Break:
    """A variation of the batch that changed rows of a result.

    output: the path of the result, "" where the function returns one tensor. rows: those that
    differ, out of `compared`. mismatch: how the first of them differs, its indices within the row,
    whose batch dimension stays; None where `shapes` says that rows cannot be told apart.
    """

    transform: str
    label: str
    output: str
    rows: list[int]
    compared: int
    mismatch: Mismatch | None
    shapes: str = ""

    @property
    def row(self) -> int:
        """The first row that differs."""
        return self.rows[0]

    def __str__(self) -> str:
        if self.mismatch is None:
            name = self.output or "the result"
            return f"{self.label}: {name} has shape {self.shapes}, so rows cannot be told apart"
        where = f"{self.output}, row {self.row}" if self.output else f"row {self.row}"
        return (
            f"{self.label}, {len(self.rows)} of {self.compared} compared rows; "
            f"{where} differs in {self.mismatch}"
        )


@dataclass(frozen=True)
class Smallest:
    """The smallest batch found in which a row differs from itself alone.

    row: its index in the batch as given; position: in the smallest one. transform and label: the
    variation that the rows are from.
    """

    size: int
    row: int
    position: int
    transform: str
    label: str

    def __str__(self) -> str:
        origin = f" ({self.transform}: {self.label})" if self.label else ""
        return (
            f"The smallest batch found: {self.size} rows{origin}; row {self.row}, at position "
            f"{self.position}, is not what it is alone."
        )


@dataclass(frozen=True)
class Report:
    """What `verify` found; `str` is an account for people.

    arguments: the paths of the tensors that hold rows, and their batch dimensions. outputs: the
    paths of the results that were compared; ignored: those that were not, and why. variants: how
    many other batches were compared; calls: how often the function ran. not_deterministic: why two
    calls with one batch differ, or "". first: the first operator whose row differs, in the smallest
    batch; fork: where the sequence of operators depends on the batch; note: what could not be seen.
    """

    function: str
    mode: str
    batch_size: int
    arguments: dict[str, int]
    outputs: list[str]
    ignored: dict[str, str]
    variants: int
    calls: int
    not_deterministic: str
    breaks: list[Break]
    smallest: Smallest | None
    first: Operator | None
    fork: Fork | None
    note: str

    @property
    def ok(self) -> bool:
        """Every row had the same bits in every variation, and the function is deterministic."""
        return not self.breaks and not self.not_deterministic

    def raise_if_broken(self) -> None:
        """Raises `VarianceFound` with this account unless `ok`."""
        if not self.ok:
            raise VarianceFound(str(self))

    def as_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON; a difference that is not finite is null."""
        parts = {
            "first": self.first.as_dict() if self.first else None,
            "fork": self.fork.as_dict() if self.fork else None,
        }
        fields: dict[str, Any] = _plain({**asdict(self), **parts, "ok": self.ok})
        return fields

    def __str__(self) -> str:
        lines = [f"{self.function}: {self._verdict()}"]
        lines.append(
            f"  {self.batch_size} rows, {self.variants} variations of the batch, "
            f"{self.calls} calls, the mode is {self.mode}"
        )
        for path, why in self.ignored.items():
            lines.append(f"  not compared: {path or 'the result'}, {why}")
        if self.breaks:
            lines += ["", "Rows that differ from the batch as given:", *self._summary()]
        if self.smallest is not None:
            lines += ["", str(self.smallest)]
        if self.fork is not None:
            lines += ["", f"Control flow: {self.fork}"]
        if self.first is not None:
            lines += ["", f"First differing operator: {self.first}"]
        if self.note:
            lines += ["", self.note]
        return "\n".join(lines)

    def _summary(self) -> list[str]:
        """For each transform how many rows, and the first break in full."""
        lines = []
        for transform in dict.fromkeys(found.transform for found in self.breaks):
            breaks = [found for found in self.breaks if found.transform == transform]
            rows = {row for found in breaks for row in found.rows}
            labels = dict.fromkeys(found.label for found in breaks)
            lines.append(
                f"  {transform}: {len(rows)} row{'s' if len(rows) > 1 else ''} in {len(labels)} "
                f"variation{'s' if len(labels) > 1 else ''}; the first: {breaks[0]}"
            )
        return lines

    def _verdict(self) -> str:
        if self.not_deterministic:
            return f"not deterministic: {self.not_deterministic}; not compared further"
        if self.breaks:
            transforms = dict.fromkeys(found.transform for found in self.breaks)
            return f"NOT batch-invariant ({', '.join(transforms)})"
        return "batch-invariant: every row had the same bits in every variation"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
