"""The order in which a sum adds its terms, as data: what a kernel declares and a probe measures.

A tree is nested tuples of leaves 0..n-1; the parts of one tuple are added in one step, rounded
once. Addition is commutative, so trees that differ only in the order of a tuple's parts are one
order and have one `digest`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, Union

Tree = Union[int, "tuple[Tree, ...]"]
T = TypeVar("T")


@dataclass(frozen=True)
class Order:
    """The order of the additions of one kernel.

    text: the name, as reports print it.
    build: the tree over a sequence of leaves; None where nothing is added across elements, or
        where the order is fixed but not known.
    """

    text: str
    build: Callable[[Sequence[int]], Tree] | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.text

    def tree(self, n: int) -> Tree | None:
        """The tree of n terms; None if there is none to declare."""
        return None if self.build is None else self.build(range(n))


def serial() -> Order:
    """One chain: ((0 + 1) + 2) + 3 ..."""
    return Order("serial", _chain)


def reversed_groups(size: int) -> Order:
    """One chain over groups of `size` terms, ascending, each group from its last to its first."""

    def build(leaves: Sequence[int]) -> Tree:
        starts = range(0, len(leaves), size)
        return _chain(leaf for begin in starts for leaf in leaves[begin : begin + size][::-1])

    return Order(f"serial, groups of {size} reversed", build)


def fused(width: int) -> Order:
    """A chain of steps, each adding the next `width` terms and what is accumulated at once."""

    def build(leaves: Sequence[int]) -> Tree:
        done: Tree = ()
        for begin in range(0, len(leaves), width):
            terms = tuple(leaves[begin : begin + width])
            parts = terms if done == () else (done, *terms)
            done = parts[0] if len(parts) == 1 else parts
        return done

    return Order(f"fused({width})", build)


def chunked(size: int, inner: Order) -> Order:
    """Chunks of `size` terms, each added in the order `inner`, then one after another."""
    within = _builder(inner)

    def build(leaves: Sequence[int]) -> Tree:
        starts = range(0, len(leaves), size)
        return _chain(within(leaves[begin : begin + size]) for begin in starts)

    return Order(f"chunked({size}, {inner})", build)


def by_size(limit: int, fewer: Order, others: Order) -> Order:
    """`fewer` for sums of less than `limit` terms, `others` from there on."""
    short, long = _builder(fewer), _builder(others)

    def build(leaves: Sequence[int]) -> Tree:
        return (short if len(leaves) < limit else long)(leaves)

    return Order(f"{fewer}, from {limit} terms on {others}", build)


def lanes(count: int, segment: int) -> Order:
    """`ops.row_order`: in each segment `count` lanes add serially; the lanes are folded by halves.

    count: a power of two. segment: elements; the lanes of the segments are added ascending.
    """
    if count < 1 or count & (count - 1):
        raise ValueError(f"lanes are folded by halves: their count is a power of two, not {count}")

    def build(leaves: Sequence[int]) -> Tree:
        starts = range(0, len(leaves), segment)
        folded = [
            _chain(_chain(leaves[begin : begin + segment][lane::count]) for begin in starts)
            for lane in range(count)
        ]
        while len(folded) > 1:
            half = len(folded) // 2
            folded = [_chain(pair) for pair in zip(folded[:half], folded[half:], strict=True)]
        return folded[0]

    return Order(f"lanes({count}, {segment})", build)


def undeclared(text: str) -> Order:
    """No tree: `text` says that nothing is added, or whose fixed but unknown order it is."""
    return Order(text)


def digest(tree: Tree) -> str:
    """A short name of the order: equal for two trees exactly if they add the same way."""

    def node(parts: list[tuple[int, bytes]]) -> tuple[int, bytes]:
        parts.sort()
        content = b"".join(name for _, name in parts)
        return parts[0][0], hashlib.sha256(content).digest()

    if tree == ():
        return "empty"
    _, name = fold(tree, lambda i: (i, hashlib.sha256(b"%d" % i).digest()), node)
    return name.hex()[:12]


def fold(tree: Tree, leaf: Callable[[int], T], node: Callable[[list[T]], T]) -> T:
    """Evaluates a tree from its leaves up, without recursion: a chain is as deep as it is long."""
    results: list[list[T]] = [[]]
    stack: list[Iterator[Tree]] = [iter((tree,))]
    while True:
        part = next(stack[-1], None)
        if part is None:
            stack.pop()
            finished = results.pop()
            if not stack:
                return finished[0]
            results[-1].append(node(finished))
        elif isinstance(part, int):
            results[-1].append(leaf(part))
        else:
            stack.append(iter(part))
            results.append([])


def _builder(inner: Order) -> Callable[[Sequence[int]], Tree]:
    if inner.build is None:
        raise ValueError(f"an order made of others needs their trees; {inner} declares none")
    return inner.build


def _chain(parts: Iterable[Tree]) -> Tree:
    """The parts added one after another; `()` is no term at all."""
    done: Tree = ()
    for part in parts:
        if done == ():
            done = part
        elif part != ():
            done = (done, part)
    return done
