"""The machinery of the row operators: statistics over each row in `ROW_ORDER`, then a last step.

The order is that of core's `ops/row_order.py`: segments of 8192; inside one, lane i of 1024 starts
at +0.0 and adds elements i, i + 1024, ... one after another; the segments' lanes are added
ascending; the lanes are folded by halves. Here the folds below the width of a register are lane
rotations, after which every lane holds the same total. All of it is elementwise additions that the
program spells out, none is left to the compiler: so the order is the same at every number of rows,
every block and every length in memory, and a row may be as long as it likes.

Rows of one segment are read once and reduced in one step. Longer ones are read once for each
statistic and once for the result, a segment at a time, and have the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from batch_invariant_tpu.jax.blocks import LANE, round_up, row_block
from batch_invariant_tpu.jax.launch import Interpret, launch

LANES = 1024
SEGMENT = 8192

Tiles = Sequence[jax.Array]


@dataclass(frozen=True)
class Statistic:
    """A sum, a maximum or a product over each row.

    term: from the row tiles [bm, w] in fp32 and the statistics before, [bm, 1] each, the terms
        [bm, w]; a product among them must be `rounded`.
    finish: from the total [bm, 128], equal in every lane, the statistic.
    first: only over that many columns; None: over all.
    """

    term: Callable[[Tiles, Tiles], jax.Array]
    finish: Callable[[jax.Array], jax.Array] = lambda total: total
    kind: Literal["sum", "maximum", "product"] = "sum"
    first: int | None = None

    @property
    def identity(self) -> float:
        return {"sum": 0.0, "maximum": -jnp.inf, "product": 1.0}[self.kind]

    def combine(self, a: jax.Array, b: jax.Array) -> jax.Array:
        if self.kind == "sum":
            return a + b
        return jnp.maximum(a, b) if self.kind == "maximum" else a * b


@dataclass(frozen=True)
class RowProgram:
    """What is computed of each row. Equal programs share their compiled code.

    statistics: in order; each may use those before it.
    result: from the row tiles, the statistics and the tiles of the vectors [1, w], the outputs:
        [bm, w], or for a reduction [bm, 1] or [bm, 128].
    reduces: the outputs are one value a row.
    """

    name: str
    statistics: tuple[Statistic, ...]
    result: Callable[[Tiles, Tiles, Tiles], Tiles]
    reduces: bool = False


def rounded(product: jax.Array) -> jax.Array:
    """The product as a value of its own, rounded before anything is added to it.

    Compilers for CPUs fuse a product and a sum where they can; a comparison between them keeps
    them apart. A NaN stays one.
    """
    return jnp.where(product == product, product, jnp.nan)


def divided(total: jax.Array, n: int) -> jax.Array:
    """total / n, rounded once: XLA would multiply by the rounded 1 / n if it saw a constant."""
    return rounded(total / jnp.where(total == total, float(n), jnp.nan))


def canonical(total: jax.Array) -> jax.Array:
    """One NaN for all, whatever the order of operands gave, and +0.0 for either zero.

    A sum that starts at +0.0 is never -0.0; compilers leave that first addition out.
    """
    return jnp.where(jnp.isnan(total), jnp.nan, jnp.where(total == 0, 0.0, total))


def run(
    program: RowProgram,
    rows: Sequence[jax.Array],
    vectors: Sequence[jax.Array],
    dtypes: Sequence[Any],
    interpret: Interpret,
) -> list[jax.Array]:
    """The outputs of a program for rows [M, n] and vectors [n], in the dtypes asked for.

    Outputs are [M, n], or [M] where the program reduces.
    """
    m, n = rows[0].shape
    if m == 0:
        return [jnp.zeros((m,) if program.reduces else (m, n), d) for d in dtypes]
    width = max(LANE, 1 << (n - 1).bit_length()) if n <= LANES else round_up(n, LANES)
    width = width if width <= SEGMENT else round_up(n, SEGMENT)
    bm = row_block(min(width, SEGMENT))

    def wide(x: jax.Array, height: int) -> jax.Array:
        extra = (round_up(x.shape[0], height) - x.shape[0], width - n)
        return jnp.pad(x, [(0, extra[0]), (0, extra[1])]) if any(extra) else x

    outs = _call(
        program,
        tuple(wide(x, bm) for x in rows),
        tuple(wide(v.reshape(1, n), 1) for v in vectors),
        n,
        tuple(jnp.dtype(d).name for d in dtypes),
        interpret,
    )
    return [out[:m, 0] if program.reduces else out[:m, :n] for out in outs]


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _call(
    program: RowProgram,
    rows: tuple[jax.Array, ...],
    vectors: tuple[jax.Array, ...],
    n: int,
    dtypes: tuple[str, ...],
    interpret: Interpret,
) -> list[jax.Array]:
    m, width = rows[0].shape
    segment = min(width, SEGMENT)
    count = width // segment
    bm = row_block(segment)
    whole = count == 1
    phases = len(program.statistics) + (0 if program.reduces else 1)
    if whole:
        grid, semantics = (m // bm,), ("parallel",)
    else:
        grid, semantics = (m // bm, phases, count), ("parallel", "arbitrary", "arbitrary")
    last = phases - 1

    def out_index(i: Any, p: Any = 0, s: Any = 0) -> tuple[Any, Any]:
        # Until the last phase nothing is written: the block stays the first.
        return i, 0 if whole or program.reduces else lax.select(p == last, s, jnp.zeros_like(s))

    specs = [pl.BlockSpec((bm, segment), lambda i, p=0, s=0: (i, s)) for _ in rows]
    specs += [pl.BlockSpec((1, segment), lambda i, p=0, s=0: (0, s)) for _ in vectors]
    out_width = LANE if program.reduces else segment
    scratch = [pltpu.VMEM((bm, min(segment, LANES)), jnp.float32)]
    scratch += [pltpu.VMEM((bm, LANE), jnp.float32) for _ in program.statistics]
    return launch(
        functools.partial(
            _whole_kernel if whole else _segments_kernel, program, len(rows), len(vectors), n, count
        ),
        [*rows, *vectors],
        name=f"bi_{program.name}",
        grid=grid,
        semantics=semantics,
        in_specs=specs,
        out_specs=[pl.BlockSpec((bm, out_width), out_index) for _ in dtypes],
        out_shape=[
            jax.ShapeDtypeStruct((m, LANE if program.reduces else width), d) for d in dtypes
        ],
        scratch=() if whole else scratch,
        interpret=interpret,
    )


def _whole_kernel(
    program: RowProgram, rows: int, vectors: int, n: int, count: int, *refs: Any
) -> None:
    tiles = [ref[...].astype(jnp.float32) for ref in refs[:rows]]
    shared = [ref[...].astype(jnp.float32) for ref in refs[rows : rows + vectors]]
    found: list[jax.Array] = []
    totals: list[jax.Array] = []
    for statistic in program.statistics:
        lanes = _segment_lanes(statistic, tiles, found, n, 0)
        totals.append(statistic.finish(_folded(statistic, lanes)))
        found.append(totals[-1][:, :1])
    given = totals if program.reduces else found
    _store(refs[rows + vectors :], program.result(tiles, given, shared))


def _segments_kernel(
    program: RowProgram, rows: int, vectors: int, n: int, count: int, *refs: Any
) -> None:
    """One segment of one phase: a statistic's share, or the result of the segment."""
    phase, segment = pl.program_id(1), pl.program_id(2)
    inputs = rows + vectors
    statistics = len(program.statistics)
    outs = refs[inputs : len(refs) - statistics - 1]
    lanes_ref, *stat_refs = refs[len(refs) - statistics - 1 :]
    tiles = [ref[...].astype(jnp.float32) for ref in refs[:rows]]

    def statistic_phase(which: int, statistic: Statistic) -> None:
        @pl.when(segment == 0)
        def _() -> None:
            lanes_ref[...] = jnp.full(lanes_ref.shape, statistic.identity, jnp.float32)

        found = [ref[:, :1] for ref in stat_refs[:which]]
        share = _segment_lanes(statistic, tiles, found, n, segment * SEGMENT)
        lanes_ref[...] = statistic.combine(lanes_ref[...], share)

        @pl.when(segment == count - 1)
        def _() -> None:
            stat_refs[which][...] = statistic.finish(_folded(statistic, lanes_ref[...]))
            if program.reduces and which == statistics - 1:
                totals = [ref[...] for ref in stat_refs]
                _store(outs, program.result(tiles, totals, []))

    for which, statistic in enumerate(program.statistics):
        pl.when(phase == which)(functools.partial(statistic_phase, which, statistic))

    if not program.reduces:

        @pl.when(phase == statistics)
        def _() -> None:
            shared = [ref[...].astype(jnp.float32) for ref in refs[rows:inputs]]
            found = [ref[:, :1] for ref in stat_refs]
            _store(outs, program.result(tiles, found, shared))


def _segment_lanes(
    statistic: Statistic, tiles: Tiles, found: Tiles, n: int, begin: Any
) -> jax.Array:
    """The lanes of one segment, [bm, min(1024, w)]: serial additions from the identity."""
    terms = statistic.term(tiles, found)
    width = terms.shape[1]
    n = n if statistic.first is None else statistic.first
    inside = lax.broadcasted_iota(jnp.int32, terms.shape, 1) + begin < n
    terms = jnp.where(inside, terms, statistic.identity)
    lanes = min(width, LANES)
    total = jnp.full((terms.shape[0], lanes), statistic.identity, jnp.float32)
    for at in range(0, width, lanes):
        total = statistic.combine(total, terms[:, at : at + lanes])
    return total


def _folded(statistic: Statistic, lanes: jax.Array) -> jax.Array:
    total = fold(lanes, statistic.combine)
    if statistic.kind == "product":  # a product may be -0.0
        return jnp.where(jnp.isnan(total), jnp.nan, total)
    return canonical(total)


def fold(lanes: jax.Array, combine: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """[bm, L] folded by halves, L a power of two of at least 128; [bm, 128], equal in every lane.

    A rotation by half of what is left puts the partner of every lane beside it.
    """
    while lanes.shape[1] > LANE:
        half = lanes.shape[1] // 2
        lanes = combine(lanes[:, :half], lanes[:, half:])
    shift = LANE // 2
    while shift:
        lanes = combine(lanes, pltpu.roll(lanes, shift, 1))
        shift //= 2
    return lanes


def _store(refs: Sequence[Any], outs: Tiles) -> None:
    for ref, out in zip(refs, outs, strict=True):
        ref[...] = jnp.broadcast_to(out, ref.shape).astype(ref.dtype)
