"""What an audit found, for people, for programs and as an error."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from batch_invariant.auditing.verdict import COVERED, HARMLESS, UNCOVERED, Verdict
from batch_invariant.errors import UncoveredOpError

EAGER, COMPILED, GENERATED = "eager", "compiled call", "generated"


@dataclass(frozen=True)
class Ran:
    """An operator or a generated kernel that ran at one place.

    how: "eager", "compiled call" (by a compiled graph) or "generated" (code that Inductor wrote).
    place: the line of user code, as far as it is known. origins: the operators of the graph that a
    generated loop was made of.
    """

    op: str
    how: str
    verdict: Verdict
    place: str
    origins: tuple[str, ...] = ()

    def error(self) -> UncoveredOpError:
        """What `strict` raises."""
        where = f" at {self.place}" if self.place else ""
        return UncoveredOpError(
            " ".join(self.origins) or self.op, self.how + where, self.verdict.why
        )


@dataclass(frozen=True)
class Report:
    """What `audit` found; `str` is an account for people.

    mode: "on" or "off", with the backends. ran: what ran, with how often; graphs: how many graphs
    were compiled, of how many kernels. result: what the function returned.
    """

    function: str
    mode: str
    ran: dict[Ran, int]
    graphs: int
    result: Any = field(repr=False)

    @property
    def ok(self) -> bool:
        """Nothing uncovered ran."""
        return not self.of(UNCOVERED)

    def of(self, kind: str) -> list[Ran]:
        """What ran of one kind: "covered", "harmless" or "uncovered"."""
        return [ran for ran in self.ran if ran.verdict.kind == kind]

    def raise_if_uncovered(self) -> None:
        """Raises `UncoveredOpError` for the first thing that is not covered."""
        for ran in self.of(UNCOVERED):
            raise ran.error()

    def as_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON, without the result."""
        return {
            "function": self.function,
            "mode": self.mode,
            "ok": self.ok,
            "graphs": self.graphs,
            "ran": [{**asdict(ran), "count": count} for ran, count in self.ran.items()],
        }

    def summary(self) -> str:
        """One line: how many operators of each kind, and the verdict."""
        counts = ", ".join(
            f"{len({ran.op for ran in self.of(kind)})} {kind}"
            for kind in (COVERED, HARMLESS, UNCOVERED)
        )
        calls = sum(self.ran.values())
        return (
            f"{counts}; {calls} calls, {self.graphs} compiled "
            f"graph{'' if self.graphs == 1 else 's'}, the mode is {self.mode}"
        )

    def rows(self) -> list[tuple[str, str, str, str, str, list[str]]]:
        """Kind, calls, how, operator, what is known of it and places; the uncovered first."""
        grouped: dict[tuple[str, str, str, str], list[tuple[str, int]]] = {}
        for kind in (UNCOVERED, COVERED, HARMLESS):
            for ran in self.of(kind):
                key = (kind, ran.how, ran.op, str(ran.verdict))
                grouped.setdefault(key, []).append((ran.place, self.ran[ran]))
        return [
            (
                kind,
                str(sum(count for _, count in places)),
                how,
                op,
                known,
                list(dict.fromkeys(place for place, _ in places if place)),
            )
            for (kind, how, op, known), places in grouped.items()
        ]

    def __str__(self) -> str:
        lines = [f"{self.function}: {'covered' if self.ok else 'NOT covered'}"]
        lines.append(f"  {self.summary()}")
        for kind, count, how, op, known, places in self.rows():
            lines.append(f"  {kind:9} {count:>5}x  {how:13}  {op}: {known}")
            if kind == UNCOVERED:
                lines += [f"{'':32}{place}" for place in places]
        return "\n".join(lines)
