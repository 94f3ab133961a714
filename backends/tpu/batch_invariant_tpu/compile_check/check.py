"""The comparison: one program text and one set of trees for every size of the batch."""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from batch_invariant_tpu.compile_check.cases import Case, cases
from batch_invariant_tpu.compile_check.compiler import (
    Compiler,
    foreign_arithmetic,
    normalised,
)
from batch_invariant_tpu.compile_check.controls import controls

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


def check(
    generations: Sequence[str],
    dtypes: Sequence[str],
    batches: Sequence[int],
    dumps: Path,
    report: Report,
    *,
    full: bool = False,
    only: str = "",
) -> dict[str, Any]:
    """Compiles and compares; the findings as JSON values. `only`: cases whose name has this."""
    found: list[dict[str, Any]] = []
    for generation in generations:
        compiler = Compiler(generation, dumps)
        for dtype in dtypes:
            for case in cases(generation, dtype, full):
                if only in case.name:
                    entry = _case(compiler, case, batches)
                    found.append({"generation": generation, "dtype": dtype, **entry})
                    where = f"{generation:6} {dtype:9} {case.name}"
                    report(where, not entry["faults"], "; ".join(entry["faults"]))
            for name, plans in controls(compiler, dtype, batches) if not only else ():
                flagged = len(set(plans.values())) > 1
                found.append(
                    {
                        "generation": generation,
                        "dtype": dtype,
                        "control": name,
                        "by_batch": {str(m): plan for m, plan in plans.items()},
                        "faults": [] if flagged else ["does not vary: the comparison is blind"],
                    }
                )
                said = f"found to vary: {_groups(plans)}" if flagged else "NOT found to vary"
                report(f"{generation:6} {dtype:9} control: {name}", flagged, said)
    return {
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu")},
        "generations": list(generations),
        "batches": list(batches),
        "proves": PROVES,
        "does_not_prove": DOES_NOT_PROVE,
        "checks": found,
        "holds": bool(found) and not any(entry["faults"] for entry in found),
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
        if strange := foreign_arithmetic(made.hlo):
            faults.append(f"batch {m}: beside the kernel stands {', '.join(strange)}")
        if len(made.mosaic) != 1:
            faults.append(f"batch {m}: {len(made.mosaic)} kernel texts, and one is expected")
            continue
        text = normalised(made.mosaic[0], case.batch_axes)
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
