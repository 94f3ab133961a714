"""`verify`: does a user's function give a row the same bits whatever else is in its batch?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from batch_invariant import mode
from batch_invariant.errors import ConfigurationError
from batch_invariant.ops.bits import Mismatch, mismatch
from batch_invariant.proof.user import bisect
from batch_invariant.proof.user.report import Break, Report, Smallest
from batch_invariant.proof.user.rows import Axis, Batch, BatchDim, NoAxis, axis_between, find_rows
from batch_invariant.proof.user.runner import Outputs, Runner, random_state_kept
from batch_invariant.proof.user.variations import NEIGHBOURS, Variation, variations

_FAILING_ROWS = 4


def verify(
    fn: Callable[..., Any],
    inputs: Any,
    batch_dim: BatchDim = 0,
    *,
    neighbours: Iterable[str] = tuple(NEIGHBOURS),
    seed: int = 0,
    no_grad: bool = True,
    locate: bool = True,
) -> Report:
    """Whether each row of what `fn` returns has the same bits whatever else is in the batch.

    fn: any callable or nn.Module. It is called as it is, mode on or off: to ask about the library's
    operators, call `verify` inside `with bi.enabled()`. inputs: a tensor, a tuple of positional
    arguments or a dict of named ones; lists, tuples and dicts inside are searched for tensors.

    batch_dim: the dimension that the rows lie along. The first tensor that has this dimension
    gives the batch size; every other tensor of that size along it holds rows too, and all others
    are passed as they are. Where a size agrees by chance, or dimensions differ, name the arguments:
    `{"input_ids": 0, "weight": None}`, or `{0: 1}` for positional ones; arguments that are not
    named are passed as they are. In results, the rows are where the shape follows the batch size.

    Each row runs alone, in sub-batches, in other orders, with other neighbours (whole other rows;
    shuffled ids; for floating point those named in `neighbours`) and with rows appended, and is
    compared bit for bit with itself in the batch as given. Results whose shape does not depend on
    the batch, and objects such as a KV cache, are not compared: the report lists them.

    Every call starts from the same random state (`seed`), which is restored in the end, and from
    the same buffers; a function whose result depends on the seed or on the call is reported as not
    deterministic, and not compared further. no_grad: run without autograd. locate: look for the
    smallest batch that shows a break, and in it for the first operator whose row differs.

    Raises `ConfigurationError` for inputs without rows, and what `fn` raises. Never raises for a
    break: see `Report.raise_if_broken`.
    """
    chosen = tuple(neighbours)
    if unknown := [name for name in chosen if name not in NEIGHBOURS]:
        raise ConfigurationError(
            f"neighbours: {unknown[0]!r} is unknown; there are: {', '.join(NEIGHBOURS)}"
        )
    batch = find_rows(inputs, batch_dim)
    with random_state_kept():
        return _Check(Runner(fn, seed, no_grad), batch, chosen, _name(fn)).report(locate)


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__qualname__", None) or type(fn).__name__


class _Check:
    """One verification: the batch as given against its variants."""

    def __init__(self, run: Runner, batch: Batch, neighbours: tuple[str, ...], name: str) -> None:
        self._run, self._batch, self._neighbours, self._name = run, batch, neighbours, name
        self._base: Outputs = {}
        self._axes: dict[str, Axis] = {}

    def report(self, locate: bool) -> Report:
        self._base = self._run(self._batch)
        breaks: list[Break] = []
        variants = 0
        smallest: Smallest | None = None
        found = bisect.Found(None, None)
        unsteady = self._run.why_not_deterministic(self._batch, self._base)
        if not unsteady:
            breaks = self._find_axes()
            broken: list[tuple[Variation, list[Break]]] = []
            for variant in variations(self._batch, self._neighbours):
                variants += 1
                more = self._compare(variant)
                breaks += more
                if more:
                    broken.append((variant, more))
            if broken and locate:
                smallest, found = self._locate(broken)
        return Report(
            function=self._name,
            mode="on" if mode.is_enabled() else "off",
            batch_size=self._batch.size,
            arguments=dict(self._batch.dims),
            outputs=sorted(self._axes),
            ignored=dict(self._run.ignored),
            variants=variants,
            calls=self._run.calls,
            not_deterministic=unsteady,
            breaks=breaks,
            smallest=smallest,
            first=found.first,
            fork=found.fork,
            note=found.note,
        )

    def _find_axes(self) -> list[Break]:
        """Where the rows of every result are, from calls at two batch sizes; results where no one
        dimension holds them are breaks."""
        breaks: list[Break] = []
        size = self._batch.size
        other = self._batch.take([0] if size > 1 else [0, 0])
        seen = self._changed(other, f"{other.size} row{'s' if other.size > 1 else ''}")
        if not self._base:
            raise ConfigurationError(
                "the function returns no tensor, so there is nothing to compare"
            )
        for path, value in self._base.items():
            try:
                if path not in seen:
                    raise NoAxis
                axis = axis_between(value.shape, size, seen[path].shape, other.size)
            except NoAxis:
                got = list(seen[path].shape) if path in seen else "missing"
                shapes = f"{list(value.shape)} for {size} rows and {got} for {other.size}"
                rows = list(range(size))
                breaks.append(Break("shape", "every row", path, rows, size, None, shapes))
                continue
            if axis is None:
                self._run.ignored[path] = (
                    f"its shape {list(value.shape)} does not depend on the batch"
                )
            else:
                self._axes[path] = axis
        if not self._axes and not breaks:
            why = "; ".join(f"{path or 'it'}: {why}" for path, why in self._run.ignored.items())
            raise ConfigurationError(f"no result holds rows, so there is nothing to compare: {why}")
        return breaks

    def _changed(self, batch: Batch, label: str) -> Outputs:
        try:
            return self._run(batch)
        except Exception as error:
            error.add_note(f"raised while verifying, with the batch changed ({label})")
            raise

    def _compare(self, variant: Variation) -> list[Break]:
        changed = self._changed(variant.batch, f"{variant.transform}: {variant.label}")
        breaks = []
        for path, axis in self._axes.items():
            broken: list[tuple[int, Mismatch | None]] = []
            shapes = ""
            if path not in changed or not _fits(
                self._base[path], changed[path], axis, variant.batch.size
            ):
                got = list(changed[path].shape) if path in changed else "missing"
                shapes = f"{list(self._base[path].shape)} in the batch as given, now {got}"
                broken = [(row, None) for row in variant.rows]
            else:
                for row, at in zip(variant.rows, variant.at, strict=True):
                    found = _row_differs(
                        axis,
                        self._base[path],
                        self._batch.size,
                        row,
                        changed[path],
                        variant.batch.size,
                        at,
                    )
                    if found is not None:
                        broken.append((row, found))
            if broken:
                breaks.append(
                    Break(
                        variant.transform,
                        variant.label,
                        path,
                        [row for row, _ in broken],
                        len(variant.rows),
                        broken[0][1],
                        shapes,
                    )
                )
        return breaks

    def _locate(
        self, broken: list[tuple[Variation, list[Break]]]
    ) -> tuple[Smallest | None, bisect.Found]:
        """The smallest batch in which a row is not what it is alone, and where it parts."""
        # A row that differs between two batches differs from itself alone in one of them: in the
        # batch as given, which comes first, or in the variation.
        everything = list(range(self._batch.size))
        whole = Variation("as given", "", self._batch, everything, everything)
        alone = [found for variant, more in broken if variant.batch.size == 1 for found in more]
        for variant, breaks in ((whole, alone), *broken):
            rows = dict.fromkeys(row for found in breaks for row in found.rows)
            at = [variant.at[variant.rows.index(row)] for row in rows][:_FAILING_ROWS]
            smallest = self._shrink(variant, at)
            if smallest is not None:
                chosen, batch, position = smallest
                run, paths = self._run.recorded, list(self._axes)
                return chosen, bisect.first_difference(run, batch, position, paths)
        return None, bisect.Found(None, None, "no row differs from itself alone")

    def _shrink(self, variant: Variation, at: list[int]) -> tuple[Smallest, Batch, int] | None:
        """The fewest rows, by doubling and halving, in which one of those `at` a place differs."""
        size = variant.batch.size
        if size == 1 or not at:
            return None
        alone = {position: self._run(variant.batch.take([position])) for position in at}

        def first_of(count: int) -> tuple[list[int], int] | None:
            """A batch of `count` rows, the failing row at its start, and that row's position."""
            for position in at:
                order = [(position + step) % size for step in range(size)][:count]
                if self._differs(variant.batch.take(order), 0, alone[position]):
                    return order, 0
            return None

        low, high = 1, 2
        while (best := first_of(min(high, size))) is None and high < size:
            low, high = high, 2 * high
        if best is None:
            # The place in the batch matters, not the number of rows alone.
            for position in at:
                if self._differs(variant.batch, position, alone[position]):
                    best = list(range(size)), position
                    break
            else:
                return None
        else:
            high = len(best[0])
            while high - low > 1:
                middle = (low + high) // 2
                if (found := first_of(middle)) is not None:
                    best, high = found, middle
                else:
                    low = middle
        rows, position = best
        origin = {place: row for row, place in zip(variant.rows, variant.at, strict=True)}
        smallest = Smallest(
            len(rows), origin[rows[position]], position, variant.transform, variant.label
        )
        return smallest, variant.batch.take(rows), position

    def _differs(self, batch: Batch, position: int, alone: Outputs) -> bool:
        outputs = self._run(batch)
        for path, axis in self._axes.items():
            if path not in outputs or path not in alone:
                return True
            try:
                seen = axis_between(outputs[path].shape, batch.size, alone[path].shape, 1)
            except NoAxis:
                return True
            if seen != axis:
                return True
            if _row_differs(axis, alone[path], 1, 0, outputs[path], batch.size, position):
                return True
        return False


def _row_differs(
    axis: Axis,
    one: torch.Tensor,
    one_size: int,
    one_position: int,
    other: torch.Tensor,
    other_size: int,
    other_position: int,
) -> Mismatch | None:
    """How a row differs between two results; None if it has the same bits in some reading."""
    found = []
    for outer in axis.ways():
        differs = mismatch(
            axis.row(one, one_size, one_position, outer),
            axis.row(other, other_size, other_position, outer),
        )
        if differs is None:
            return None
        found.append(differs)
    return min(found, key=lambda differs: differs.count)


def _fits(base: torch.Tensor, changed: torch.Tensor, axis: Axis, size: int) -> bool:
    """Whether a result has the shape that its rows ask for."""
    wanted = list(base.shape)
    wanted[axis.dim] = size * axis.each
    return wanted == list(changed.shape) and base.dtype == changed.dtype
