"""Compact names for the trees that probing finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from batch_invariant.ops.row_order import ROW_ORDER
from batch_invariant.order import Order, Tree, digest, fold, fused, lanes, reversed_groups, serial

_SHORT = 60
_LEVELS = 3


@dataclass(frozen=True, eq=False, repr=False)
class _Node:
    """A part of a tree, its own parts by their first leaf; a leaf has no parts."""

    parts: tuple[_Node, ...]
    first: int
    last: int
    size: int
    depth: int
    tree: Tree

    @property
    def contiguous(self) -> bool:
        return self.last - self.first + 1 == self.size


def describe(tree: Tree) -> str:
    """A name such as `serial(4096)`, or depth, arities and the beginning of the tree."""
    if tree == ():
        return "nothing"
    root = _annotate(tree)
    if root.size == 1:
        return "one term"
    word = str(ROW_ORDER) if _is_row_order(root) else _word(root)
    if word is None:
        arity = ", ".join(f"{count} of {k}" for k, count in sorted(_arities(root).items()))
        return f"depth {root.depth}, steps {arity}: {short(tree)}"
    return f"{word}({root.size})" if word in ("serial", "pairwise") else word


def short(tree: Tree, limit: int = _SHORT) -> str:
    """The beginning of the tree, `+` from left to right; `{a b c}` are added in one step."""
    text = ""
    for piece in _pieces(_annotate(tree)):
        if len(text) + len(piece) > limit:
            return text.rstrip() + " ..."
        text += piece
    return text


def _annotate(tree: Tree) -> _Node:
    def leaf(i: int) -> _Node:
        return _Node((), i, i, 1, 0, i)

    def node(parts: list[_Node]) -> _Node:
        parts.sort(key=lambda part: part.first)
        return _Node(
            tuple(parts),
            parts[0].first,
            max(part.last for part in parts),
            sum(part.size for part in parts),
            1 + max(part.depth for part in parts),
            tuple(part.tree for part in parts),
        )

    return fold(tree, leaf, node)


def _word(root: _Node, levels: int = _LEVELS) -> str | None:
    """The name without the number of terms, which are a range that starts anywhere.

    levels: how many chunks within chunks are looked for.
    """
    base, n = root.first, root.size
    spine = list(_spine(root))
    name = _relative(root)

    def is_(order: Order) -> bool:
        tree = order.tree(n)
        return tree is not None and digest(tree) == name

    widest = max(_arities(root), default=2)
    if widest > 2:
        width = widest if root.depth == 1 else widest - 1
        return f"fused({width})" if is_(fused(width)) else _chunked(root, levels)
    stride = spine[-1].parts[1].first - base
    if len(spine) == n - 1 and is_(serial()):
        return "serial"
    if root.depth == n - 1:
        if is_(reversed_groups(2)):
            return str(reversed_groups(2))
        listed = " ".join(str(i - base) for i in _chain(root)[:12])
        return f"chain({listed} ...)" if n > 12 else f"chain({listed})"
    for pairs in (_pairs_of_neighbours, _halves_low, _halves_high):
        if stride == 1 and digest(pairs(range(n))) == name:
            return "pairwise"
    if 1 < stride < n:
        if stride & (stride - 1) == 0 and is_(lanes(stride, n)):
            return f"{stride}-lane strided"
        chains = [_chain_of(range(lane, n, stride)) for lane in range(stride)]
        if digest(_chain_of(chains)) == name:
            return f"{stride}-lane strided, lanes one by one"
        if digest(_pairs_of_neighbours(chains)) == name:
            return f"{stride}-lane strided, neighbouring lanes in pairs"
    return _chunked(root, levels)


def _is_row_order(root: _Node) -> bool:
    """Whether the whole is what `ops.row_order` does and no plainer name fits."""
    tree = ROW_ORDER.tree(root.size)
    return root.size > 3 and tree is not None and digest(tree) == digest(root.tree)


def _chunked(root: _Node, levels: int) -> str | None:
    """Blocks of consecutive terms that are added one after another, all but the last alike."""
    if len(root.parts) != 2 or not levels:
        return None
    for size in sorted({part.size for part in (*root.parts, *root.parts[0].parts[1:])}):
        blocks: list[_Node] = []
        node = root
        while node.size > size and len(node.parts) == 2 and node.parts[1].contiguous:
            wanted = size if blocks else (node.size - 1) % size + 1
            if node.parts[1].size != wanted:
                break
            blocks.append(node.parts[1])
            node = node.parts[0]
        if size < 2 or node.size != size or not blocks or blocks[0].size < 2 == len(blocks) + 1:
            continue
        full = [node, *(block for block in reversed(blocks) if block.size == size)]
        shifted = {_relative(block) for block in full}
        word = _word(node, levels - 1) if len(shifted) == 1 else None
        if word is not None:
            rest = f" + {blocks[0].size}" if blocks[0].size < size else ""
            return f"chunked({len(full)} x {size}{rest}, {word})"
    return None


def _relative(node: _Node) -> str:
    base = node.first

    def leaf(i: int) -> Tree:
        return i - base

    def step(parts: list[Tree]) -> Tree:
        return tuple(parts)

    return digest(fold(node.tree, leaf, step))


def _spine(root: _Node) -> Iterator[_Node]:
    """From the root down, the additions that hold the first leaf."""
    while root.parts:
        yield root
        root = root.parts[0]


def _chain(root: _Node) -> list[int]:
    """The leaves of a tree as deep as can be, in the order in which they are added."""
    leaves: list[int] = []
    node = root
    while node.parts:
        node, leaf = sorted(node.parts, key=lambda part: (-part.size, part.first))
        leaves.append(leaf.first)
    return [node.first, *reversed(leaves)]


def _arities(root: _Node) -> Counter[int]:
    counts: Counter[int] = Counter()
    stack = [root]
    while stack:
        node = stack.pop()
        if node.parts:
            counts[len(node.parts)] += 1
            stack += node.parts
    return counts


def _pieces(root: _Node) -> Iterator[str]:
    stack: list[_Node | str] = [root]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif not item.parts:
            yield str(item.first)
        elif len(item.parts) > 2:
            yield "{"
            stack.append("}")
            for part in reversed(item.parts):
                stack += [part, " "]
            stack.pop()
        else:
            left, right = item.parts
            stack += [")", right, "+("] if right.parts else [right, "+"]
            stack.append(left)


def _chain_of(parts: Sequence[Tree]) -> Tree:
    done = parts[0]
    for part in parts[1:]:
        done = (done, part)
    return done


def _pairs_of_neighbours(parts: Sequence[Tree]) -> Tree:
    level = list(parts)
    while len(level) > 1:
        odd = level[len(level) // 2 * 2 :]
        level = [*zip(level[::2], level[1::2], strict=False), *odd]
    return level[0]


def _halves_low(parts: Sequence[int]) -> Tree:
    """Halves, the first the smaller; as deep as the logarithm."""
    middle = len(parts) // 2
    return parts[0] if not middle else (_halves_low(parts[:middle]), _halves_low(parts[middle:]))


def _halves_high(parts: Sequence[int]) -> Tree:
    middle = (len(parts) + 1) // 2
    return (
        parts[0]
        if len(parts) == 1
        else (_halves_high(parts[:middle]), _halves_high(parts[middle:]))
    )
