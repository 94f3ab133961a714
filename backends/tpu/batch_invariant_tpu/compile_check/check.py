"""The comparison: one program text and one set of trees for every size of the batch."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata as metadata
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_invariant_tpu.compile_check.cases import Case, cases
from batch_invariant_tpu.compile_check.compiler import (
    Compiler,
    dump_folder,
    foreign_arithmetic,
    normalised,
)
from batch_invariant_tpu.compile_check.controls import controls
from batch_invariant_tpu.processes import spread

BATCHES = (1, 8, 256, 1024)
QUICK = ("v5e", "v6e", "tpu7x")
FULL = ("v4", "v5e", "v5p", "v6e", "tpu7x")
DTYPES = ("bfloat16", "float32")

PROVES = (
    "for every kernel, generation and dtype listed, the TPU compiler makes one and the same "
    "program for every size of the batch that was compiled, and the additions in it have one "
    "order; no other arithmetic stands beside the kernel; its memory fits"
)
DOES_NOT_PROVE = (
    "any bit on a TPU: no program was run. That the matrix unit treats every row of a tile alike, "
    "and that equal programs give equal bits, is taken from the hardware's description. Programs "
    "around the kernels, other shapes, other versions of libtpu"
)

Report = Callable[[str, bool, str], None]

_dumps = Path()
"""Of this process; `_start` sets it."""


@dataclass(frozen=True)
class Unit:
    """One case, or one control, of one generation and dtype: what a process compiles at a time."""

    generation: str
    dtype: str
    name: str
    control: bool
    full: bool

    @property
    def label(self) -> str:
        what = f"control: {self.name}" if self.control else self.name
        return f"{self.generation:6} {self.dtype:9} {what}"


def units(
    generations: Sequence[str], dtypes: Sequence[str], full: bool, only: str = ""
) -> list[Unit]:
    """All that is compiled; with `only` the cases whose name has this, and no control."""
    return [
        Unit(generation, dtype, name, control, full)
        for generation in generations
        for dtype in dtypes
        for control, names in (
            (False, [case.name for case in cases(generation, dtype, full)]),
            (True, [] if only else controls(generation)),
        )
        for name in names
        if only in name
    ]


def check(
    generations: Sequence[str],
    dtypes: Sequence[str],
    batches: Sequence[int],
    report: Report,
    *,
    full: bool = False,
    only: str = "",
    jobs: int = 1,
) -> dict[str, Any]:
    """Compiles and compares, in so many processes; the findings as JSON values."""
    todo = units(generations, dtypes, full, only)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = functools.partial(_found, batches=tuple(batches))
        each = spread(work, todo, jobs, functools.partial(_start, scratch))
        for unit, entry in zip(todo, each, strict=True):
            found.append(entry)
            said = entry["faults"] or entry.get("said", [])
            report(unit.label, not entry["faults"], "; ".join(said))
    return {
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu")},
        "generations": list(generations),
        "batches": list(batches),
        "proves": PROVES,
        "does_not_prove": DOES_NOT_PROVE,
        "checks": found,
        "holds": bool(found) and not any(entry["faults"] for entry in found),
    }


def _start(scratch: str) -> None:
    """Sets what libtpu reads when it is loaded, which is later than this, and only in here."""
    global _dumps
    _dumps = dump_folder(Path(tempfile.mkdtemp(dir=scratch)))


@functools.cache
def _compiler(generation: str) -> Compiler:
    return Compiler(generation, _dumps)


def _found(unit: Unit, batches: Sequence[int]) -> dict[str, Any]:
    where = {"generation": unit.generation, "dtype": unit.dtype}
    compiler = _compiler(unit.generation)
    if not unit.control:
        every = cases(unit.generation, unit.dtype, unit.full)
        (case,) = (case for case in every if case.name == unit.name)
        return where | _case(compiler, case, batches)
    plans = controls(unit.generation)[unit.name](compiler, unit.dtype, batches)
    flagged = len(set(plans.values())) > 1
    return where | {
        "control": unit.name,
        "by_batch": {str(m): plan for m, plan in plans.items()},
        "faults": [] if flagged else ["does not vary: the comparison is blind"],
        "said": [f"found to vary: {_groups(plans)}"] if flagged else [],
    }


def _case(compiler: Compiler, case: Case, batches: Sequence[int]) -> dict[str, Any]:
    texts: dict[int, str] = {}
    trees: dict[int, str] = {}
    faults = []
    for m in batches:
        try:
            made = compiler.compile(case.fn, case.shapes(m))
        except Exception as error:  # whatever the compiler says, a kernel must compile
            first = " ".join(str(error).split())[:300]
            faults.append(f"batch {m}: does not compile: {type(error).__name__}: {first}")
            continue
        if strange := foreign_arithmetic(made.hlo, case.kernels):
            faults.append(f"batch {m}: beside the kernel stands {', '.join(strange)}")
        if len(made.mosaic) != case.kernels:
            found = len(made.mosaic)
            faults.append(f"batch {m}: {found} kernel texts, and {case.kernels} expected")
            continue
        text = "".join(sorted(normalised(text, case.batch_axes) for text in made.mosaic))
        texts[m] = hashlib.sha256(text.encode()).hexdigest()[:12]
        trees[m] = made.trees
    if len(set(texts.values())) > 1:
        faults.append(f"the program's text varies: {_groups(texts)}")
    if len(set(trees.values())) > 1:
        faults.append(f"the addition trees vary: {_groups(trees)}")
    return {
        "case": case.name,
        "text": next(iter(texts.values()), None),
        "trees": next(iter(trees.values()), None),
        "compared": len(texts),
        "faults": faults,
    }


def _groups(by_batch: dict[int, str]) -> str:
    """`{1: a, 8: b, 256: b}` -> `M 1: a; M 8 256: b`."""
    groups: dict[str, list[int]] = {}
    for m, value in by_batch.items():
        groups.setdefault(value, []).append(m)
    return "; ".join(f"M {' '.join(map(str, ms))}: {value}" for value, ms in groups.items())
