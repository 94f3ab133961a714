"""From a product and a schedule to a launch: which kernel, its grid, its arguments."""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16, float32
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from batch_invariant_cuda import gemm, gemm_double, gemm_hopper, gemm_single
from batch_invariant_cuda.problem import (
    Problem,
    cdiv,
    counter_count,
    few_chunks,
    units,
    whole_tiles,
    workspace_size,
)
from batch_invariant_cuda.schedules import Schedule

DTYPES = {torch.bfloat16: bfloat16, torch.float16: float16, torch.float32: float32}


Launch = tuple[Any, int, dict[str, Any], dict[str, Any]]


def overlaps(x: torch.Tensor) -> bool:
    """Whether a launch on that tensor's device can begin while the one before it still runs."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)


def launches(
    p: Problem,
    s: Schedule,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    addend: torch.Tensor | None,
    workspace: torch.Tensor,
    count: torch.Tensor,
    programs: int,
) -> list[Launch]:
    """What is launched, one after another: the product, and the sum of chunks that stand apart."""
    first = _product(p, s, a, b, out, addend, workspace, count, programs)
    return [first, _fold(p, s, out, first[2], programs)] if s.apart else [first]


def _fold(
    p: Problem, s: Schedule, out: torch.Tensor, given: dict[str, Any], programs: int
) -> Launch:
    """`gemm.gemm_fold`, from the arguments of the kernel that leaves the chunks behind."""
    groups = s.warps // 4
    spread = units(p, s) - whole_tiles(p, s, programs)
    for warps in (4, 8, 16):
        rows = min(256 * warps // s.bn, s.bm // groups)
        grid = spread * s.bm // rows
        if grid <= programs:
            break
    same = "ws add M N K chunk whole sdm sdn alpha beta BM GROUPS BN GROUP HAS_ADD SCALED".split()
    arguments = {name: given[name] for name in same}
    arguments |= {"c": out, "BN2": s.bn2, "ROWS": rows, "FEW": few_chunks(p, s)}
    arguments["OVERLAP"] = (s.ahead or s.early) and overlaps(out)
    return gemm.gemm_fold, grid, arguments, {"num_warps": warps, "launch_pdl": s.early}


def _product(
    p: Problem,
    s: Schedule,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    addend: torch.Tensor | None,
    workspace: torch.Tensor,
    count: torch.Tensor,
    programs: int,
) -> Launch:
    """The kernel of the product, its grid, its arguments and its compile options."""
    add_strides = p.addend or (0, 0, 0)
    common: dict[str, Any] = {
        "add": out if addend is None else addend,
        "M": p.m,
        "N": p.n,
        "K": p.k,
        "sdm": add_strides[1],
        "sdn": add_strides[2],
        "alpha": 1.0,
        "beta": 1.0,
        "HAS_ADD": p.addend is not None,
        "SCALED": p.scaled,
        "BM": s.bm,
        "BN": s.bn,
    }
    ahead = s.ahead and overlaps(out)
    options: dict[str, Any] = {"launch_pdl": ahead}
    tiles = units(p, s)
    grid = tiles * (cdiv(p.k, p.chunk) if s.split else 1)
    if p.dtype is torch.float64:
        return (
            gemm_double.gemm_double,
            grid,
            {**_pointers(p, a, b, out), **common},
            {"num_warps": 4},
        )
    common["OVERLAP"] = ahead or (s.early and overlaps(out))
    if s.kernel in ("tile", "tma"):
        options |= {"num_warps": s.warps, "num_stages": s.stages}
    else:
        options |= _shared(s)
    if s.kernel == "tile":
        arguments = {
            **_pointers(p, a, b, out),
            **common,
            "ws": workspace,
            "count": count,
            "chunk": p.chunk,
            "BK": s.bk,
            "GROUP": s.group,
            "SWAP": s.swap,
            "EVEN_K": p.k % s.bk == 0,
            "MASK_M": not p.a_along_k,
            "MASK_N": not p.b_along_k,
            "CHUNKED": p.chunk > 0,
            "SPLIT": s.split,
            "FEW": few_chunks(p, s),
            "BATCHED": p.batch > 1,
            "WIDE": p.wide(),
            "PRECISION": "tf32" if p.tf32 else "ieee",
        }
        return gemm.gemm_tile, grid, arguments, options
    if s.persistent or (p.chunk and not s.split):
        grid = min(grid, programs)
    if s.kernel == "fma":
        common |= {"ws": workspace, "count": count}
        grid, arguments = _fma(p, s, a, b, out, common, programs)
        return gemm_single.gemm_fma, grid, arguments, options
    if s.kernel == "ring":
        common |= {"ws": workspace, "count": count}
        grid, arguments = _ring(p, s, a, b, out, common, programs)
        return gemm_hopper.gemm_ring, grid, arguments, options
    a_box = [s.bm, s.bk] if p.a_along_k else [s.bk, s.bm]
    half = s.bn // 2 if s.halves else s.bn
    wide = s.bn2 or s.bn
    arguments = {
        "ad": TensorDescriptor.from_tensor(a if p.a_along_k else a.mT, a_box),
        "bd": _right(p, b, s.bn, s.bk),
        "b2d": _right(p, b, wide, s.bk),
        "cd": TensorDescriptor.from_tensor(out, [s.bm, half]),
        "c2d": TensorDescriptor.from_tensor(out, [s.bm, s.bn2 or half]),
        "c": out,
        **common,
        "BN2": s.bn2,
        "BK": s.bk,
        "GROUP": s.group,
        "PERSISTENT": s.persistent,
        "A_K": p.a_along_k,
        "B_K": p.b_along_k,
        "HALVES": s.halves,
        "SWAP": s.swap,
    }
    if not p.chunk:
        return gemm.gemm_tma, grid, arguments, options
    arguments |= {
        "ws": workspace,
        "count": count,
        "chunk": p.chunk,
        "SPLIT": s.split,
        "FEW": few_chunks(p, s),
    }
    del arguments["PERSISTENT"]
    return gemm.gemm_tma_chunked, grid, arguments, options


def _described(x: torch.Tensor, box: list[int]) -> GluonDescriptor:
    layout = NVMMASharedLayout.get_default_for(box, DTYPES[x.dtype])
    return GluonDescriptor.from_tensor(x, box, layout)


def _shared(s: Schedule) -> dict[str, Any]:
    """Options of a kernel with warps of their own for copies: registers for `beside` programs."""
    if s.beside == 1:
        return {"num_warps": 4}
    threads = 32 * (s.warps + 4)  # the copying warp counts as a group of four
    return {"num_warps": 4, "maxnreg": 2**16 // (s.beside * threads) // 8 * 8}


def _fma(
    p: Problem,
    s: Schedule,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    common: dict[str, Any],
    programs: int,
) -> tuple[int, dict[str, Any]]:
    """Grid and arguments of `gemm_single.gemm_fma`."""
    groups = s.warps // 4
    rows = s.bm // groups
    tiles = units(p, s)
    whole = whole_tiles(p, s, programs)
    chunk = p.chunk or p.k
    left = _described(a, [rows, 16]) if p.a_along_k else _described(a.mT, [16, rows])
    right = _described(b.mT, [s.bn, 16]) if p.b_along_k else _described(b, [16, s.bn])
    count = cdiv(p.k, chunk)  # unrolled where a thread has registers for all chunks' values
    return whole + (tiles - whole) * count, {
        **common,
        "ad": left,
        "bd": right,
        "c": out,
        "chunk": chunk,
        "whole": whole,
        "BM": rows,
        "GROUPS": groups,
        "SLICES": s.bk // 16,
        "STAGES": s.stages,
        "GROUP": s.group,
        "A_K": p.a_along_k,
        "B_K": p.b_along_k,
        "ROW_WARPS": 1 if rows <= 32 else 2,
        "CHUNKED": p.chunk > 0,
        "SPLIT": s.split,
        "FEW": count if rows * s.bn * count <= 2**14 else 0,
        "APART": s.apart,
    }


def _ring(
    p: Problem,
    s: Schedule,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    common: dict[str, Any],
    programs: int,
) -> tuple[int, dict[str, Any]]:
    """Grid and arguments of `gemm_hopper.gemm_ring`."""
    groups = s.warps // 4
    rows = s.bm // groups
    tiles = units(p, s)
    splits = cdiv(p.k, p.chunk) if p.chunk else 1
    whole = whole_tiles(p, s, programs)
    a_box = [rows, s.bk] if p.a_along_k else [s.bk, rows]

    def right(width: int) -> GluonDescriptor:
        if p.b_along_k:
            return _described(b.mT, [width, s.bk])
        return _described(b, [s.bk, width])

    return min(whole + (tiles - whole) * splits, programs * s.beside), {
        **common,
        "ad": _described(a if p.a_along_k else a.mT, a_box),
        "bd": right(s.bn),
        "b2d": right(s.bn2 or s.bn),
        "cd": _described(out, [rows, s.bn]),
        "c2d": _described(out, [rows, s.bn2 or s.bn]),
        "chunk": p.chunk or p.k,
        "whole": whole,
        "BM": rows,
        "GROUPS": groups,
        "BN2": s.bn2,
        "BK": s.bk,
        "STAGES": s.stages,
        "GROUP": s.group,
        "A_K": p.a_along_k,
        "B_K": p.b_along_k,
        "CHUNKED": p.chunk > 0,
        "FEW": few_chunks(p, s),
        "APART": s.apart,
    }


def _pointers(p: Problem, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> dict[str, Any]:
    return {
        "a": a,
        "b": b,
        "c": out,
        "sab": p.a[0],
        "sam": p.a[1],
        "sak": p.a[2],
        "sbb": p.b[0],
        "sbk": p.b[1],
        "sbn": p.b[2],
        "sdb": p.addend[0] if p.addend else 0,
    }


def _right(p: Problem, b: torch.Tensor, width: int, depth: int) -> TensorDescriptor:
    if p.b_along_k:
        return TensorDescriptor.from_tensor(b.mT, [width, depth])
    return TensorDescriptor.from_tensor(b, [depth, width])


def views(
    p: Problem, a: torch.Tensor, b: torch.Tensor, addend: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The operands as the problem has them, whatever shape the caller's tensors have."""

    def view(x: torch.Tensor, rows: int, columns: int, strides: tuple[int, ...]) -> torch.Tensor:
        if p.batch == 1:
            return x.as_strided((rows, columns), strides[1:])
        return x.as_strided((p.batch, rows, columns), strides)

    plus = None
    if addend is not None and p.addend is not None:
        plus = view(addend, p.m, p.n, p.addend)
    return view(a, p.m, p.k, p.a), view(b, p.k, p.n, p.b), plus


def run(
    p: Problem,
    s: Schedule,
    a: torch.Tensor,
    b: torch.Tensor,
    addend: torch.Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    programs: int = 132,
    shape: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Computes the product with a given schedule through Triton's public launcher."""
    out = torch.empty(p.shape(2 if p.batch == 1 else 3), dtype=p.dtype, device=a.device)
    workspace = torch.empty(workspace_size(p, s, programs), dtype=torch.float32, device=a.device)
    count = torch.zeros(counter_count(p, s, programs), dtype=torch.int32, device=a.device)
    left, right, plus = views(p, a, b, addend)
    every = launches(p, s, left, right, out, plus, workspace, count, programs)
    for kernel, grid, arguments, options in every:
        if grid:
            kernel[(grid,)](**{**arguments, "alpha": alpha, "beta": beta}, **options)
    return out.view(shape or p.shape(a.dim()))
