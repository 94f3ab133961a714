"""The tree of a sum from the answers where its terms meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from batch_invariant.order import Tree
from batch_invariant.proof.order.masks import Integers
from batch_invariant.proof.order.unseen import Unseen

Meet = Callable[[Integers, Integers, Sequence[Integers]], Integers]


@dataclass
class _Part:
    """Leaves that are known to be added together, before or while they meet leaf `outer`."""

    leaves: Integers
    outer: int | None
    pivot: int
    inner: list[_Part] = field(default_factory=list)
    # The pivot meets the last of `inner` in the same step in which it meets `outer`.
    shared: bool = False


def reveal(n: int, meet: Meet) -> Tree:
    """The tree over n leaves; `meet` answers as `masks.Meeting` does.

    From one leaf, the numbers of leaves below its meetings with all others sort these by where
    they join it. Those that join together form a part, which is taken apart the same way, with
    one leaf from outside: parts that meet it and each other in one step are terms of one n-ary
    addition. All parts of one depth are asked at once.

    Raises `Unseen` if the answers fit no tree.
    """
    if n < 1:
        raise Unseen("a sum of no terms has no order")
    choose = np.random.default_rng(0)
    root = _Part(np.arange(n), None, 0)
    order = [root]
    open_ = [root] if n > 1 else []
    while open_:
        groups = [
            part.leaves if part.outer is None else np.append(part.leaves, part.outer)
            for part in open_
        ]
        others = [part.leaves[part.leaves != part.pivot] for part in open_]
        group = np.repeat(np.arange(len(open_)), [len(o) for o in others])
        pivots = np.array([part.pivot for part in open_])[group]
        answers = meet(np.stack([pivots, np.concatenate(others)], 1), group, groups)
        following = []
        for which, part in enumerate(open_):
            _divide(part, others[which], answers[group == which], choose)
            order += part.inner
            following += [inner for inner in part.inner if len(inner.leaves) > 1]
        open_ = following
    return _assemble(order)


def _divide(part: _Part, others: Integers, answers: Integers, choose: np.random.Generator) -> None:
    below = 1
    for meeting in np.unique(answers):
        leaves = others[answers == meeting]
        below += len(leaves)
        part.shared = part.outer is not None and meeting == len(part.leaves) + 1
        if meeting != below + part.shared:
            raise Unseen(
                f"the answers fit no tree: {len(leaves)} terms meet term {part.pivot} where "
                f"{meeting} terms are together, but {below} are; either the accumulator is so wide "
                "that it holds the masks and the units at once, or this is no fixed sum"
            )
        # Every part is as deep as it is long if the first leaf is always the last one added.
        first = 0 if 4 * len(leaves) < 3 * len(part.leaves) else choose.integers(len(leaves))
        part.inner.append(_Part(leaves, part.pivot, int(leaves[first])))


def _assemble(order: Sequence[_Part]) -> Tree:
    """Parts stand before the parts they are made of, so the last ones are put together first."""
    trees: dict[int, Tree] = {}
    for part in reversed(order):
        tree: Tree = part.pivot
        for inner in part.inner:
            sub = trees.pop(id(inner))
            joined = sub if inner.shared and isinstance(sub, tuple) else (sub,)
            tree = (tree, *joined)
        trees[id(part)] = tree
    return trees[id(order[0])]
