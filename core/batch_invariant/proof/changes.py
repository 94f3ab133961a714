"""What differs between two certificates: machines, versions, promises, orders, bits, verdicts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Change:
    """One difference. `numeric`: results or promises are not what they were."""

    where: str
    what: str
    numeric: bool

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


_OF_THE_SUITE = "any size"
"""The search for counterexamples, which `bi verify` does not make."""

_PROMISES = ("guarantee", "order", "portable")


def changes(
    old: Mapping[str, Any], new: Mapping[str, Any], only: Collection[str] = ()
) -> list[Change]:
    """Every difference from the old certificate to the new one, operators last.

    only: the operators that the new one is about; by default all of the old one's.
    """
    before = {op: found for op, found in old["ops"].items() if not only or op in only}
    return [*_surroundings(old, new), *_operators(before, new["ops"])]


def _surroundings(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    if old["backend"] != new["backend"]:
        yield Change("backend", f"{old['backend']} -> {new['backend']}", True)
    for part in ("machine", "versions"):
        for name in sorted(old[part].keys() | new[part].keys()):
            before, after = old[part].get(name), new[part].get(name)
            if before != after:
                yield Change(f"{part}, {name}", f"{before} -> {after}", False)


def _operators(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for op in [*old, *(name for name in new if name not in old)]:
        before, after = old.get(op, {}), new.get(op, {})
        dtypes = [name for name in {**before, **after} if name != "cases"]
        for dtype in dtypes:
            where = f"{op} {dtype}"
            if dtype not in before:
                yield Change(where, "was not checked before", False)
            elif dtype not in after:
                yield Change(where, "was checked before, and is not now", True)
            else:
                yield from _kernel(where, before[dtype], after[dtype])


def _kernel(where: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for name in (*_PROMISES, "fingerprint", "ulps"):
        if name in old and name in new and old[name] != new[name]:
            yield Change(where, f"{name} {old[name]} -> {new[name]}", name != "ulps")
    for check in {**old["checks"], **new["checks"]}:
        if check == _OF_THE_SUITE:
            continue
        if check not in old["checks"]:
            yield Change(where, f"{check} was not run before", False)
        elif check not in new["checks"]:
            yield Change(where, f"{check} was run before, and is not now", True)
        elif _broken(old, check) != _broken(new, check):
            text = "broke, and holds now" if _broken(old, check) else "held, and is broken now"
            yield Change(where, f"{check} {text}", True)
    before, after = old.get("results", {}), new.get("results", {})
    common = [case for case in before if case in after]
    altered = [case for case in common if before[case] != after[case]]
    if before and after and before.keys() != after.keys():
        text = f"of {len(before)} cases and {len(after)} now, {len(common)} are the same"
        yield Change(where, text, not common)
    if altered:
        some = "; ".join(altered[:3]) + (" ..." if len(altered) > 3 else "")
        yield Change(where, f"other bits in {len(altered)} of {len(common)} cases: {some}", True)


def _broken(entry: Mapping[str, Any], check: str) -> bool:
    return check in entry.get("broken", {})
