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

from batch_invariant_cuda import launch, matmul, problem  # noqa: E402
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


def main() -> None:
    torch.manual_seed(0)
    json.dump(
        {
            "errors": {f"{c[0]} {c[4]} {c[6]}": error(c) for c in CASES},
            "orders": {text: order(text) for text in ORDERS},
            "folds": {f"{text} {extra}": fold(text, extra) for text, extra in FOLDS},
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
