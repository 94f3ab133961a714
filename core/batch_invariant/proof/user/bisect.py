"""The first operator at which a row in a batch parts from the same row alone.

Both calls are recorded operator by operator and the two sequences are aligned. Of every result the
digest of the row is kept, no tensor; the candidates alone are looked at again in full.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from batch_invariant.ops.bits import Mismatch, bits, mismatch
from batch_invariant.proof.user.record import Call, Place, Recorder, Spec
from batch_invariant.proof.user.rows import Batch, NoAxis, axis_between, plain, readable

Run = Callable[[Batch, Recorder], Any]

_CANDIDATES = 128
_AT_ONCE = 16
_UNSTEADY = "the operators that run are not the same from call to call, so they cannot be compared"


@dataclass(frozen=True)
class Operator:
    """An operator whose row differs: what, where, and in which shapes.

    index: its place among the `calls` operators of the call with the batch. in_batch and alone: the
    specs of its tensor arguments and of its results, as text. inputs_equal: the row's inputs have
    equal bits in both calls; None where the shapes do not tell which entries are the row's.
    mismatch: how the row's result in the batch differs from that alone.
    """

    op: str
    place: Place
    index: int
    calls: int
    in_batch: tuple[str, str]
    alone: tuple[str, str]
    inputs_equal: bool | None
    mismatch: Mismatch

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "place": self.place.as_dict()}

    def __str__(self) -> str:
        lines = [f"{self.op}{_within(self.place)}", f"  at {self.place}"]
        lines.append(f"  in the batch  {self.in_batch[0]} -> {self.in_batch[1]}")
        lines.append(f"  alone         {self.alone[0]} -> {self.alone[1]}")
        inputs = {
            True: "the row's inputs have equal bits, its result differs",
            False: "its inputs differ already, although no operator before it was seen to differ;"
            " the result differs",
            None: "its shapes do not tell the row's inputs; its result differs",
        }[self.inputs_equal]
        lines.append(f"  {inputs} in {self.mismatch}")
        lines.append(f"  operator {self.index + 1} of {self.calls}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Fork:
    """Where the sequence of operators depends on the batch: what runs in each call, and where.

    None: that call has nothing more to run.
    """

    index: int
    in_batch: tuple[str, Place] | None
    alone: tuple[str, Place] | None

    def as_dict(self) -> dict[str, Any]:
        def side(token: tuple[str, Place] | None) -> dict[str, Any] | None:
            return None if token is None else {"op": token[0], "place": token[1].as_dict()}

        return {"index": self.index, "in_batch": side(self.in_batch), "alone": side(self.alone)}

    def __str__(self) -> str:
        def side(token: tuple[str, Place] | None) -> str:
            if token is None:
                return "nothing more"
            return f"{token[0]}{_within(token[1])}\n    at {token[1]}"

        return (
            "the operators that run depend on the batch; the first that differ:\n"
            f"  in the batch  {side(self.in_batch)}\n  alone         {side(self.alone)}"
        )


@dataclass(frozen=True)
class Found:
    """What the comparison of two recorded calls showed; `note` says what it could not show."""

    first: Operator | None
    fork: Fork | None
    note: str = ""


def _within(place: Place) -> str:
    if not place.module_class:
        return ""
    return f" in {place.module or 'the module itself'} ({place.module_class})"


def first_difference(run: Run, batch: Batch, position: int, outputs: Collection[str]) -> Found:
    """Where the row at `position` of a batch first differs from the same row alone.

    run: calls the function with a batch inside a recorder; it is called seven times or a few more.
    outputs: the paths of its results that hold rows.
    """
    single = batch.take([position])
    there, here = Recorder(), Recorder()
    result = run(batch, there)
    run(single, here)
    leading = there.leading_to(result, outputs)
    pairs, fork = _align(there.calls, here.calls)

    one = _Side(batch, position, there.calls, here.calls, 1, dict(pairs))
    other = _Side(single, 0, here.calls, there.calls, batch.size, {j: i for i, j in pairs})
    in_batch, again, alone = (_record(run, side, None) for side in (one, one, other))
    if not (in_batch.repeated and again.repeated and alone.repeated):
        return Found(None, fork, _UNSTEADY)
    differ = [
        (i, j)
        for i, j in pairs
        if there.calls[i].computes
        and in_batch.outputs[i] == again.outputs[i]
        and False in _equal(in_batch.outputs[i], alone.outputs[j])
    ]
    # What the result does not depend on may well differ: a largest length, say.
    differ.sort(key=lambda pair: (pair[0] not in leading, pair[0]))
    seen: list[Operator] = []
    for start in range(0, min(len(differ), _CANDIDATES), _AT_ONCE):
        some = differ[start : start + _AT_ONCE]
        in_batch = _record(run, one, {i for i, _ in some})
        alone = _record(run, other, {j for _, j in some})
        if not (in_batch.repeated and alone.repeated):
            return Found(None, fork, _UNSTEADY)
        looked_at = [_operator(one, other, pair, in_batch, alone) for pair in some]
        seen += [operator for operator in looked_at if operator is not None]
        if any(operator.inputs_equal and there.calls[operator.index].inputs for operator in seen):
            break
    # Positions, made from no tensor, differ by right: they are blamed when nothing else explains.
    seen.sort(key=lambda operator: not there.calls[operator.index].inputs)
    for wanted in (True, None, False):
        for operator in seen:
            if operator.inputs_equal is wanted:
                return Found(operator, fork, _note(operator, fork))
    return Found(None, fork, _note(None, fork))


def _equal(one: Digests, other: Digests) -> list[bool | None]:
    """For each tensor of a call whether the row's bits agree; None where that is unclear."""
    if len(one) != len(other):
        return [None]
    return [bool(a & b) if a and b else None for a, b in zip(one, other, strict=True)]


def _operator(
    one: _Side, other: _Side, pair: tuple[int, int], in_batch: _Recording, alone: _Recording
) -> Operator | None:
    i, j = pair
    there, here = one.calls[i], other.calls[j]
    inputs = [
        *_equal(in_batch.inputs[i], alone.inputs[j]),
        there.numbers == here.numbers,
    ]
    outputs = _equal(in_batch.outputs[i], alone.outputs[j])
    if False not in outputs:  # it does not differ on every call
        return None
    which = outputs.index(False)
    (row,) = alone.values[j][which]
    ways = [found for way in in_batch.values[i][which] if (found := mismatch(row, way)) is not None]
    return Operator(
        op=there.op,
        place=there.place,
        index=i,
        calls=len(one.calls),
        in_batch=(_specs(there.inputs), _specs(there.outputs)),
        alone=(_specs(here.inputs), _specs(here.outputs)),
        inputs_equal=False if False in inputs else None if None in inputs else True,
        mismatch=min(ways, key=lambda found: found.count),
    )


def _specs(specs: Sequence[Spec]) -> str:
    return ", ".join(map(str, specs)) or "nothing"


def _note(operator: Operator | None, fork: Fork | None) -> str:
    if operator is not None and operator.inputs_equal:
        return ""
    if fork is not None:
        return "no operator that runs in both calls explains the difference: the fork does"
    return (
        "no operator that was dispatched explains the difference: it arises where operators are "
        "not seen (compiled code, other threads, other libraries), or goes away while recording"
    )


def _align(there: list[Call], here: list[Call]) -> tuple[list[tuple[int, int]], Fork | None]:
    """The pairs of calls that correspond, in order, and where the sequences first part."""
    left, right = [call.token for call in there], [call.token for call in here]
    same = 0
    while same < min(len(left), len(right)) and left[same] == right[same]:
        same += 1
    pairs = [(i, i) for i in range(same)]
    if same == len(left) == len(right):
        return pairs, None
    matcher = difflib.SequenceMatcher(None, left[same:], right[same:], autojunk=False)
    for block in matcher.get_matching_blocks():
        pairs += [(same + block.a + i, same + block.b + i) for i in range(block.size)]
    fork = Fork(
        same,
        left[same] if same < len(left) else None,
        right[same] if same < len(right) else None,
    )
    return pairs, fork


Digests = list[frozenset[bytes]]
"""For each tensor of a call the digests of the row, one for each way rows may lie; empty: unclear.
"""


@dataclass(frozen=True)
class _Side:
    """One of the two calls, and how the other one's tensors are shaped."""

    batch: Batch
    position: int
    calls: list[Call]
    other: list[Call]
    other_size: int
    partner: dict[int, int]

    def rows(self, value: torch.Tensor, other: Spec) -> list[torch.Tensor]:
        """The row's part of a tensor, once for each way in which the rows may lie.

        All of the tensor if its shape does not depend on the batch; nothing if it is unclear.
        """
        size = self.batch.size
        if not (plain(value) and other.readable and other.dtype == value.dtype):
            return []
        try:
            axis = axis_between(value.shape, size, other.shape, self.other_size)
        except NoAxis:
            return []
        if axis is None:
            return [value]
        ways = axis.ways() if size > 1 else [1]
        return [axis.row(value, size, self.position, outer) for outer in ways]

    def digests(self, tensors: list[torch.Tensor], other: Sequence[Spec]) -> Digests:
        if len(tensors) != len(other):
            return []
        return [
            frozenset(map(_digest, self.rows(value, theirs)))
            for value, theirs in zip(tensors, other, strict=True)
        ]


def _digest(value: torch.Tensor) -> bytes:
    data = bits(readable(value)).cpu().numpy().tobytes()
    return hashlib.blake2b(data, digest_size=16).digest()


def _record(run: Run, side: _Side, wanted: set[int] | None) -> _Recording:
    """Runs once more; keeps digests of every result, or all about the wanted calls."""
    kept = _Recording({}, {}, {})

    def before(index: int, tensors: list[torch.Tensor]) -> None:
        if wanted is not None and index in wanted:
            other = side.other[side.partner[index]].inputs
            kept.inputs[index] = side.digests(tensors, other)

    def after(index: int, tensors: list[torch.Tensor]) -> None:
        if index not in side.partner or (wanted is not None and index not in wanted):
            return
        other = side.other[side.partner[index]].outputs
        kept.outputs[index] = side.digests(tensors, other)
        if wanted is not None and len(tensors) == len(other):
            kept.values[index] = [
                [readable(row).clone() for row in side.rows(value, theirs)]
                for value, theirs in zip(tensors, other, strict=True)
            ]

    recorder = Recorder(before, after)
    run(side.batch, recorder)
    kept.repeated = [call.token for call in recorder.calls] == [call.token for call in side.calls]
    return kept


@dataclass
class _Recording:
    inputs: dict[int, Digests]
    outputs: dict[int, Digests]
    values: dict[int, list[list[torch.Tensor]]]
    repeated: bool = True
