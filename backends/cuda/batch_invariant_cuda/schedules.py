"""Which schedule a product runs with, where one was measured: a table for each architecture.

A schedule decides speed only. Tables are data (`schedules/*.json`): for a dtype and a K x N, pairs
of the largest M and the schedule up to it. A line that does not parse is an error that names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from batch_invariant.errors import ConfigurationError

_TEXT = re.compile(
    r"(?P<kernel>tile|tma|ring|fma) (?P<bm>\d+)x(?P<bn>\d+)(?:\+(?P<bn2>\d+))?x(?P<bk>\d+)"
    r" w(?P<warps>\d+) s(?P<stages>\d+)"
    r"(?P<flags>(?: swap| split| hybrid| apart| early| ahead| persistent| halves| g\d+| c\d)*)"
)

_FLAGS = ("swap", "split", "hybrid", "apart", "early", "ahead", "persistent", "halves")

DTYPES = ("bfloat16", "float16", "float32")
"""What tables are made for."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the tiles of a product are computed; none of it may change a bit.

    kernel: "tile" (pointer loads, any strides), "tma" (bulk copies) or "ring" (bulk copies by a
        warp of their own); "fma" is "ring" for fp32. All but the first need Hopper.
    bm, bn, bk: the tile; bn2 more columns by a second accumulator, for widths such as 96 or 160.
    swap: the right operand goes first, for few rows. split: one program for each chunk of k.
    hybrid: whole tiles first, the last wave of them split. apart: the chunks of split tiles are
        added by a second kernel, not by the program that comes last. early: that kernel is
        launched while the first still runs, and waits for its end.
    ahead: the kernel itself is launched while the one in front of it still runs, and waits.
    persistent: as many programs as multiprocessors. halves: the tile is stored in two parts.
    beside: programs that share a multiprocessor, and so its registers and shared memory.
    """

    kernel: str
    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    bn2: int = 0
    swap: bool = False
    split: bool = False
    hybrid: bool = False
    apart: bool = False
    early: bool = False
    ahead: bool = False
    persistent: bool = False
    halves: bool = False
    group: int = 8
    beside: int = 1

    def __str__(self) -> str:
        flags = [
            name for name in _FLAGS if getattr(self, name) and not (name == "split" and self.hybrid)
        ]
        if self.group != 8:
            flags.append(f"g{self.group}")
        if self.beside != 1:
            flags.append(f"c{self.beside}")
        width = f"{self.bn}+{self.bn2}" if self.bn2 else str(self.bn)
        return " ".join(
            [
                f"{self.kernel} {self.bm}x{width}x{self.bk} w{self.warps} s{self.stages}",
                *flags,
            ]
        )


@cache
def parse(text: str) -> Schedule:
    """The schedule that `str` of it gives back; an error that says what is wrong with the text."""
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ConfigurationError(
            f"schedule {text!r}: expected e.g. 'tma 128x128+32x64 w8 s4 persistent', that is "
            "kernel, rows x columns[+columns] x depth, warps, stages, and any of swap, split, "
            "hybrid, apart, early, ahead, persistent, halves, gN, cN"
        )
    flags = found["flags"].split()
    number = {name: int(found[name] or 0) for name in ("bm", "bn", "bn2", "bk", "warps", "stages")}
    for name in ("bm", "bn", "bk", "warps"):
        if number[name] & (number[name] - 1) or not 1 <= number[name] <= 512:
            raise ConfigurationError(f"schedule {text!r}: {name}={number[name]} is no power of two")
    if number["bn2"] & (number["bn2"] - 1):
        raise ConfigurationError(f"schedule {text!r}: {number['bn2']} columns is no power of two")
    least = 8 if found["kernel"] == "fma" else 16
    if number["bk"] < 16 or number["bm"] < least or number["bn"] < 16 or number["stages"] < 1:
        raise ConfigurationError(
            f"schedule {text!r}: tiles have at least {least} rows, 16 columns and a depth of 16, "
            "and one stage"
        )
    swap = "swap" in flags
    if number["bn2"] and (swap or found["kernel"] == "tile"):
        raise ConfigurationError(f"schedule {text!r}: two widths need bulk copies without swap")
    if found["kernel"] == "fma" and number["bn2"]:
        raise ConfigurationError(f"schedule {text!r}: 'fma' has one width")
    if found["kernel"] == "fma" and number["warps"] not in (4, 8):
        raise ConfigurationError(f"schedule {text!r}: 'fma' has 4 or 8 warps that multiply")
    few_rows = number["bm"] < 16 * number["warps"]
    if found["kernel"] == "ring" and (number["warps"] not in (4, 8) or few_rows):
        raise ConfigurationError(
            f"schedule {text!r}: 'ring' has 4 or 8 warps that multiply, 64 rows for each 4"
        )
    if found["kernel"] in ("ring", "fma"):
        if set(flags) & {"swap", "persistent", "halves"}:
            raise ConfigurationError(
                f"schedule {text!r}: {found['kernel']!r} takes only split, hybrid, apart, early, "
                "ahead, gN and cN"
            )
        if "apart" in flags and not {"split", "hybrid"} & set(flags):
            raise ConfigurationError(f"schedule {text!r}: only split chunks are added apart")
        if "early" in flags and "apart" not in flags:
            raise ConfigurationError(f"schedule {text!r}: only what is apart can be early")
    elif {"hybrid", "apart", "early"} & set(flags) or any(flag[0] == "c" for flag in flags):
        raise ConfigurationError(
            f"schedule {text!r}: only 'ring' and 'fma' take hybrid, apart and cN"
        )
    group = next((int(flag[1:]) for flag in flags if flag[0] == "g"), 8)
    beside = next((int(flag[1:]) for flag in flags if flag[0] == "c"), 1)
    if group < 1 or not 1 <= beside <= 4:
        raise ConfigurationError(
            f"schedule {text!r}: a group has at least one row of tiles, and a multiprocessor 1 to "
            "4 programs"
        )
    return Schedule(
        kernel=found["kernel"],
        swap=swap,
        split="split" in flags or "hybrid" in flags,
        hybrid="hybrid" in flags,
        apart="apart" in flags,
        early="early" in flags,
        ahead="ahead" in flags,
        persistent="persistent" in flags,
        halves="halves" in flags,
        group=group,
        beside=beside,
        **number,
    )


@dataclass(frozen=True)
class Table:
    """The measured schedules of one architecture: dtype -> (K, N) -> ascending (M, schedule)."""

    source: str
    entries: Mapping[str, Mapping[tuple[int, int], tuple[tuple[int, Schedule], ...]]]

    def find(self, dtype: str, k: int, n: int, m: int) -> Schedule | None:
        """The schedule measured for this K x N and the least M at or above this one."""
        rows = self.entries.get(dtype, {}).get((k, n))
        if rows is None:
            return None
        for most, schedule in rows:
            if m <= most:
                return schedule
        return rows[-1][1]

    def __iter__(self) -> Iterator[tuple[str, int, int, int, Schedule]]:
        """Every line: dtype, K, N, M, schedule."""
        for dtype, shapes in self.entries.items():
            for (k, n), rows in shapes.items():
                for m, schedule in rows:
                    yield dtype, k, n, m, schedule


def _is_line(row: Any) -> bool:
    """Whether it is a pair of a number of rows and a text."""
    if not isinstance(row, list) or len(row) != 2:
        return False
    m, text = row
    return type(m) is int and m >= 1 and isinstance(text, str)


def read(data: Any, source: str) -> Table:
    """A table from decoded JSON; every entry is checked."""
    entries: dict[str, dict[tuple[int, int], tuple[tuple[int, Schedule], ...]]] = {}
    if not isinstance(data, dict) or not isinstance(data.get("entries"), dict):
        raise ConfigurationError(f"{source}: expected an object with 'entries'")
    for dtype, shapes in data["entries"].items():
        found = entries.setdefault(dtype, {})
        if dtype not in DTYPES:
            raise ConfigurationError(
                f"{source}: {dtype!r} has no schedules; expected one of {', '.join(DTYPES)}"
            )
        if not isinstance(shapes, dict):
            raise ConfigurationError(f"{source}: {dtype}: expected an object of shapes KxN")
        for shape, rows in shapes.items():
            match = re.fullmatch(r"(\d+)x(\d+)", shape)
            if match is None or "0" in match.groups():
                raise ConfigurationError(f"{source}: {shape!r} is no shape KxN")
            if not isinstance(rows, list) or not all(map(_is_line, rows)):
                raise ConfigurationError(
                    f"{source}: {dtype} {shape}: expected pairs [M, schedule] with M >= 1, "
                    f"got {rows!r}"
                )
            bounds = [m for m, _ in rows]
            if bounds != sorted(set(bounds)) or not bounds:
                raise ConfigurationError(f"{source}: {dtype} {shape}: M must ascend, got {bounds}")
            found[int(match[1]), int(match[2])] = tuple((m, parse(text)) for m, text in rows)
    return Table(source, entries)


@cache
def table(name: str) -> Table:
    """A table that this package carries, such as "sm90"."""
    path = Path(__file__).parent / "schedules" / f"{name}.json"
    return read(json.loads(path.read_text()), path.name)


_used: list[Table] = []


def use(chosen: Table | None) -> None:
    """Makes later choices from this table, whose bits `tune.admit` has checked; None undoes."""
    _used[:] = [] if chosen is None else [chosen]


def table_for(capability: tuple[int, int]) -> Table:
    """The table of an architecture; the empty default where nothing was measured."""
    if _used:
        return _used[-1]
    name = f"sm{capability[0]}{capability[1]}"
    known = (Path(__file__).parent / "schedules" / f"{name}.json").exists()
    return table(name if known else "default")
