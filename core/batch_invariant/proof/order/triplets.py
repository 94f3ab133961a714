"""The tree of a sum of terms that cannot be negative, where no -M can take +M away again.

The query is one of rounding. Leaf i holds a float B, leaves j and k hold 0.4 units of B's last
place, all others nothing. Either of the two alone is lost when it is added to B; together they are
0.8 units, which rounds up to one. So the result is above B exactly if j and k meet each other
before they meet i. Of any three leaves two meet first, and who they are for all three fixes the
tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from batch_invariant.order import Tree
from batch_invariant.proof.order.masks import Integers, Sums
from batch_invariant.proof.order.unseen import Unseen

Together = Callable[[Integers], NDArray[np.bool_]]


class Rounding:
    """Answers for triples (i, j, k), [queries, 3], whether j and k meet before i does.

    sums: results for the values of the terms, [probes, n] -> [probes]. value, bases: as in
    `ops.probe.Probe`.

    Raises `Unseen` if the result does not show the last place of the sum.
    """

    def __init__(
        self,
        sums: Sums,
        n: int,
        dtype: torch.dtype,
        value: Callable[[torch.Tensor], torch.Tensor],
        bases: Sequence[float],
    ):
        self.sums, self.n, self.dtype, self.value = sums, n, dtype, value
        if n < 3:
            return
        for self.base in bases:
            self.place = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(self.base))
            terms = np.zeros((2, n))
            terms[:, 0] = self.base
            terms[1, 1] = self.place
            self.down, self.up = self._results(terms)
            if self.down != self.up:
                return
        raise Unseen(
            f"the result is the same for the sum {self.base} and for the next float, so the last "
            f"place of the sum does not show in {dtype}"
        )

    def _results(self, terms: NDArray[np.float64]) -> NDArray[np.float64]:
        values = self.value(torch.from_numpy(terms)).to(self.dtype)
        found: NDArray[np.float64] = self.sums(values).double().numpy()
        return found

    def __call__(self, triples: Integers) -> NDArray[np.bool_]:
        """One bool for each triple."""
        answers = np.zeros(len(triples), bool)
        step = max(1, 2**22 // self.n)
        for begin in range(0, len(triples), step):
            part = triples[begin : begin + step]
            each = np.arange(len(part))
            terms = np.zeros((len(part), self.n))
            terms[each, part[:, 0]] = self.base
            terms[each, part[:, 1]] = terms[each, part[:, 2]] = 0.4 * self.place
            found = self._results(terms)
            up = found == self.up
            if not (up | (found == self.down)).all():
                raise Unseen(
                    f"the sum of {self.base} and two terms of 0.4 units of its last place is "
                    "neither that nor the next float; this is no plain sum of these terms"
                )
            answers[begin : begin + step] = up
        return answers


@dataclass
class _Node:
    """A leaf, or an addition in the making."""

    leaf: int | None = None
    parts: list[_Node] = field(default_factory=list)


@dataclass(frozen=True)
class _Task:
    leaves: list[int]
    stand_for: dict[int, _Node]
    """leaves that stand for a finished part, all of whose leaves answer alike"""
    into: _Node


def reveal_positive(n: int, together: Together) -> Tree:
    """The tree over n leaves; `together` answers as `Rounding` does.

    Two leaves i and j part the others: those that meet i first, those that meet j first, and
    those that meet the two when they are together, for which i stands from then on. All parts of
    one depth are asked at once.

    Raises `Unseen` if the answers fit no tree.
    """
    if n < 1:
        raise Unseen("a sum of no terms has no order")
    choose = np.random.default_rng(0)
    root = _Node()
    open_ = [_Task(list(range(n)), {}, root)]
    while open_:
        picked = [choose.permutation(len(task.leaves)) for task in open_]
        asked = []
        for task, order in zip(open_, picked, strict=True):
            if len(task.leaves) > 2:
                i, j, *others = (task.leaves[at] for at in order)
                asked += [t for k in others for t in ((j, i, k), (i, j, k), (k, i, j))]
        answers = together(np.array(asked)).reshape(-1, 3) if asked else np.zeros((0, 3), bool)
        following: list[_Task] = []
        for task, order in zip(open_, picked, strict=True):
            count = max(0, len(order) - 2)
            _part(task, [task.leaves[at] for at in order], answers[:count], following)
            answers = answers[count:]
        open_ = following
    return _assemble(root)


def _part(
    task: _Task, leaves: list[int], answers: NDArray[np.bool_], following: list[_Task]
) -> None:
    def part(members: list[int], stand_for: dict[int, _Node], into: _Node | None = None) -> _Node:
        if len(members) == 1 and into is None:
            return stand_for.get(members[0]) or _Node(leaf=members[0])
        into = into or _Node()
        following.append(_Task(members, stand_for, into))
        return into

    if len(leaves) == 1:
        task.into.parts = [task.stand_for.get(leaves[0]) or _Node(leaf=leaves[0])]
        return
    i, j, *others = leaves
    yes = answers.sum(1)
    if (yes != 1).any():
        at = int(np.argmax(yes != 1))
        raise Unseen(
            f"of the terms {i}, {j} and {others[at]} "
            + (
                "more than one pair seems to meet first: the accumulator is wider than the result"
                if yes[at]
                else "no pair seems to meet first: a step adds more than two terms, or truncates"
            )
        )
    with_i, with_j, later = (
        [k for k, first in zip(others, answers.argmax(1), strict=True) if first == which]
        for which in range(3)
    )
    both = _Node(parts=[part([i, *with_i], task.stand_for), part([j, *with_j], task.stand_for)])
    if later:
        part([i, *later], {**task.stand_for, i: both}, task.into)
    else:
        task.into.parts = [both]


def _assemble(root: _Node) -> Tree:
    order = [root]
    for node in order:
        order += node.parts
    trees: dict[int, Tree] = {}
    for node in reversed(order):
        if node.leaf is not None:
            trees[id(node)] = node.leaf
            continue
        parts = tuple(trees[id(inner)] for inner in node.parts)
        trees[id(node)] = parts[0] if len(parts) == 1 else parts
    return trees[id(root)]
