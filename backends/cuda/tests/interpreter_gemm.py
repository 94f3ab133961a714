"""Run by test_interpreter_gemm.py: schedules in Triton's interpreter, on the CPU.

The kinds are "tile" and "tma". "ring" and "fma" are written in Gluon, which the interpreter does
not run: only a GPU tests them. The kernel that adds what they leave apart is run here by itself.

The interpreter tests indexing, masks, strides and who adds which chunk; its `tl.dot` is NumPy's, so
it says nothing about the bits inside one chain. It prints one JSON object.
"""

from __future__ import annotations

import json
import sys

import torch
import triton.runtime.interpreter as interpreter

_patch = interpreter._patch_lang_tensor


def _patched(tensor, scope):
    """NumPy 2.4 refuses int() of an array with one element, which Triton 3.6 asks for."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patched

from batch_invariant.ops.grouped import by_groups  # noqa: E402
from batch_invariant_cuda import grouped, launch, matmul, problem  # noqa: E402
from batch_invariant_cuda.schedules import parse  # noqa: E402

F32, F16, F64 = torch.float32, torch.float16, torch.float64
PROGRAMS = 5

CASES = [
    # schedule, m, n, k, dtype, chunk, options
    ("tile 32x32x32 w4 s2", 37, 45, 100, F32, 0, ""),
    ("tile 16x32x32 w4 s2 swap", 37, 45, 100, F32, 0, "add scale"),
    ("tile 16x32x32 w4 s2", 5, 45, 100, F32, 0, "left right batch add"),
    ("tile 16x32x16 w4 s2", 37, 45, 128, F16, 48, ""),
    ("tile 16x32x16 w4 s2 split", 37, 45, 129, F16, 48, ""),
    ("tile 16x32x16 w4 s2 split swap", 37, 45, 129, F16, 48, "add"),
    ("tile 16x32x16 w4 s2", 37, 45, 129, F16, 48, "odd right"),
    ("tile 32x32x16 w4 s1", 37, 45, 129, F64, 0, "add scale odd"),
    ("tile 32x32x32 w4 s2", 3, 4, 0, F32, 0, "add"),
    ("tma 16x32x16 w4 s2", 37, 40, 136, F16, 0, ""),
    ("tma 16x32+16x16 w4 s2 persistent", 37, 40, 136, F16, 0, "add"),
    ("tma 16x32x16 w4 s2 persistent halves", 37, 40, 136, F16, 0, ""),
    ("tma 16x32x16 w4 s2 swap", 37, 40, 136, F16, 0, "add scale"),
    ("tma 16x32x16 w4 s2", 40, 40, 136, F16, 0, "left right"),
    ("tma 16x32x16 w4 s2 split", 37, 40, 136, F16, 48, ""),
    ("tma 16x32+16x16 w4 s2 split", 37, 40, 136, F16, 48, "add"),
    ("tma 16x32x16 w4 s2 split swap", 37, 40, 136, F16, 48, ""),
    ("tma 16x32+16x16 w4 s2", 37, 40, 136, F16, 48, ""),
]
ORDERS = ["tile 16x32x16 w4 s2", "tile 16x32x16 w4 s2 split", "tile 16x32x16 w4 s2 split swap"]


def make(rows: int, columns: int, dtype: torch.dtype, batch: int, how: str) -> torch.Tensor:
    """A matrix, or a batch, stored row by row, column by column, or with gaps."""
    lead = (batch,) if batch else ()
    if how == "columns":
        return torch.randn(*lead, columns, rows).to(dtype).mT
    if how == "gaps":
        return torch.randn(*lead, rows, 2 * columns + 1).to(dtype)[..., 1::2]
    return torch.randn(*lead, rows, columns).to(dtype)


def error(case: tuple) -> float:
    """The largest error of one case, as a part of its bound; not finite if a value is missing."""
    text, m, n, k, dtype, chunk, options = case
    batch = 3 if "batch" in options else 0
    a = make(
        m, k, dtype, batch, "columns" if "left" in options else "gaps" if "odd" in options else ""
    )
    b = make(k, n, dtype, batch, "" if "right" in options else "columns")
    addend = torch.randn(n).to(dtype).expand(*a.shape[:-1], n) if "add" in options else None
    alpha, beta = (0.5, 2.0) if "scale" in options else (1.0, 1.0)
    p = matmul.problem(a, b, addend, alpha != 1, chunk)
    s = parse(text)
    if (reason := p.refuses(s)) is not None:
        raise RuntimeError(f"{text}: {reason}")
    out = launch.run(p, s, a, b, addend, alpha, beta, programs=PROGRAMS)
    exact = alpha * (a.double() @ b.double())
    if addend is not None:
        exact = exact + beta * addend.double()
    unit = torch.finfo(dtype if dtype is not F64 else F64).eps
    bound = unit * (k + 4) * (1 + exact.abs().max())
    return float((out.double() - exact).abs().max() / bound)


def order(text: str) -> tuple[bool, bool]:
    """Whether chunks are added ascending; and whether another order would have shown.

    Each chunk's own sum is exact here, so only the additions of chunks are rounded.
    """
    m, n, k, chunk = 20, 33, 256, 32
    a = torch.zeros(m, k)
    a[:, ::chunk] = torch.randint(1, 2**12, (m, k // chunk)).float()
    b = torch.zeros(k, n)
    b[::chunk] = (
        torch.randint(-(2**12), 2**12, (k // chunk, n)).float()
        * 2.0 ** torch.arange(0, 24, 3)[:, None]
    )
    p = matmul.problem(a, b, None, False, chunk)
    out = launch.run(p, parse(text), a, b)
    parts = [a[:, i : i + chunk] @ b[i : i + chunk] for i in range(0, k, chunk)]
    up, down = parts[0].clone(), parts[-1].clone()
    for part in parts[1:]:
        up += part
    for part in parts[-2::-1]:
        down += part
    return bool((out == up).all()), bool((up != down).any())


def fold(text: str, extra: str) -> tuple[int, int]:
    """The second kernel alone, on chunks that are laid out by hand as the Gluon kernels leave them.

    How many values differ from chunks added ascending, and from chunks added descending.
    """
    m, n, k, chunk = 150, 90, 160, 32
    s = parse(text)
    addend = torch.randn(n).expand(m, n) if "add" in extra else None
    alpha, beta = (0.5, 2.0) if "scale" in extra else (1.0, 1.0)
    p = matmul.problem(torch.empty(m, k), torch.empty(k, n), addend, alpha != 1, chunk)
    count, groups = k // chunk, s.warps // 4
    rows, wide = s.bm // groups, s.bn + s.bn2
    down, across = problem.cdiv(m, s.bm), problem.cdiv(n, wide)
    chains = torch.randn(count, down * s.bm, across * wide) * 2.0 ** torch.randint(
        -9, 9, (count, 1, 1)
    )
    tiles = [
        (row, column)
        for top in range(0, down, s.group)
        for column in range(across)
        for row in range(top, min(top + s.group, down))
    ]
    whole = problem.whole_tiles(p, s, PROGRAMS)
    parts = []
    for row, column in tiles[whole:]:
        for group in range(groups):
            top, left = row * s.bm + group * rows, column * wide
            for chain in chains:
                tile = chain[top : top + rows, left : left + wide]
                parts += [tile[:, : s.bn].flatten(), tile[:, s.bn :].flatten()]
    workspace = torch.cat(parts)
    assert workspace.numel() == problem.workspace_size(p, s, PROGRAMS)
    untouched = -7.0
    out = torch.full((m, n), untouched)
    given = {
        **{"ws": workspace, "add": out if addend is None else addend, "M": m, "N": n, "K": k},
        **{"chunk": chunk, "whole": whole, "sdm": 0, "sdn": 1, "alpha": alpha, "beta": beta},
        **{"BM": rows, "GROUPS": groups, "BN": s.bn, "GROUP": s.group},
        **{"HAS_ADD": addend is not None, "SCALED": p.scaled},
    }
    kernel, grid, arguments, options = launch._fold(p, s, out, given, PROGRAMS)
    kernel[(grid,)](**arguments, **options)

    def expected(order: torch.Tensor) -> torch.Tensor:
        total = order[0].clone()
        for chain in order[1:]:
            total += chain
        total = total[:m, :n] * alpha
        if addend is not None:
            total = (beta * addend.double() + total.double()).float()
        for row, column in tiles[:whole]:
            place = slice(row * s.bm, (row + 1) * s.bm), slice(column * wide, (column + 1) * wide)
            total[place] = untouched
        return total

    return (
        int((out != expected(chains)).sum()),
        int((out != expected(chains.flip(0))).sum()),
    )


FOLDS = [
    ("ring 64x32+16x16 w4 s2 split apart", ""),
    ("ring 128x32x16 w8 s2 split apart", "add"),
    ("ring 128x32x16 w8 s2 hybrid apart g1", "add scale"),
    ("fma 16x32x16 w4 s2 split apart g2", "scale"),
    ("fma 64x16x16 w4 s2 hybrid apart", "add scale"),
]


ENDS = (
    [0, 5, 5, 37, 40],
    [40, 40, 40, 40, 40],
    [3, 3, 3, 3, 3],
    [0, 0, 0, 0, 0],
    [1, 2, 3, 39, 99],
)


def groups(ends: list[int]) -> tuple[int, int]:
    """Whole numbers, so every order is exact: how many values are wrong by rows, and by depth.

    The last of `ends` reaches beyond the rows, which a kernel has to survive.
    """
    offs, inside = torch.tensor(ends, dtype=torch.int32), torch.tensor(ends).clamp(max=40)
    a = torch.randint(-9, 9, (40, 70)).float()
    b = torch.randint(-9, 9, (5, 70, 45)).float()
    s = parse("tile 16x32x16 w4 s2")
    wrong = 0
    for x, w in ((a, b), (a.mT.contiguous().mT, b.mT.contiguous().mT)):
        for chunk in (0, 48):
            got = grouped.by_rows(x, w, offs, s, chunk, "ieee")
            wrong += int((got != by_groups(torch.mm, a, b, inside)).sum())
    deep, right = a.mT, torch.randint(-9, 9, (40, 33)).float()
    want = by_groups(torch.mm, deep, right, inside)
    got = grouped.by_depth(deep, right, offs, s, (0, 0, 0), "ieee")
    chunked = grouped.by_depth(deep, right, offs, s, (16, 16, 16), "ieee")
    return wrong, int((got != want).sum()) + int((chunked != want).sum())


def group_order() -> tuple[int, int]:
    """As `order`, of the chunks of groups: how many values differ, ascending and descending."""
    k, chunk, offs = 256, 32, torch.tensor([7, 20], dtype=torch.int32)
    a = torch.zeros(20, k)
    a[:, ::chunk] = torch.randint(1, 2**12, (20, k // chunk)).float()
    b = torch.zeros(2, k, 33)
    b[:, ::chunk] = (
        torch.randint(-(2**12), 2**12, (2, k // chunk, 33)).float()
        * 2.0 ** torch.arange(0, 24, 3)[:, None]
    )
    out = grouped.by_rows(a, b, offs, parse("tile 16x32x16 w4 s2"), chunk, "ieee")
    parts = [
        by_groups(torch.mm, a[:, i : i + chunk], b[:, i : i + chunk], offs)
        for i in range(0, k, chunk)
    ]
    up, down = parts[0].clone(), parts[-1].clone()
    for part in parts[1:]:
        up += part
    for part in parts[-2::-1]:
        down += part
    return int((out != up).sum()), int((out != down).sum())


def main() -> None:
    torch.manual_seed(0)
    json.dump(
        {
            "errors": {f"{c[0]} {c[4]} {c[6]}": error(c) for c in CASES},
            "orders": {text: order(text) for text in ORDERS},
            "folds": {f"{text} {extra}": fold(text, extra) for text, extra in FOLDS},
            "groups": {str(ends): groups(ends) for ends in ENDS},
            "group order": group_order(),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
