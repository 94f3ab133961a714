"""Measures schedules on this GPU: what `bi tune 4096x6144 8192x1280 ...` calls.

A schedule is admitted only if its bits equal the contract's on adversarial data, so a table can
make a product faster or slower and nothing else. `admit` checks a table that comes from elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from batch_invariant.errors import ConfigurationError
from batch_invariant_cuda import choice, launch, matmul, schedules
from batch_invariant_cuda.chunks import chunk_of
from batch_invariant_cuda.plan import Plan
from batch_invariant_cuda.problem import Problem
from batch_invariant_cuda.schedules import Schedule, Table, parse, read

ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def adversarial(
    rows: int, k: int, dtype: torch.dtype, seed: int = 0, special: bool = True
) -> torch.Tensor:
    """Rows in which every order of addition shows: huge pairs that cancel, denormals, inf, NaN.

    The kinds alternate from row to row; plain random rows are among them. special: denormals,
    inf and NaN too.
    """
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(rows, k, device="cuda", generator=generator)
    huge = 2.0**12 if dtype is torch.float16 else 2.0**20
    pair = torch.randint(0, k, (rows, 2), device="cuda", generator=generator)
    row = torch.arange(rows, device="cuda")
    cancelling = row % 4 != 3
    x[row[cancelling], pair[cancelling, 0]] = huge
    x[row[cancelling], pair[cancelling, 1]] = -huge
    if not special:
        return x.to(dtype)
    x[row % 16 == 7] *= torch.finfo(dtype).smallest_normal * 16
    x[row % 16 == 11, k // 2] = torch.inf
    x[row % 16 == 15, k // 3] = torch.nan
    return x.to(dtype)


def differing(p: Problem, s: Schedule, a: torch.Tensor, b: torch.Tensor) -> int:
    """How many values of the product differ in bits from the contract's."""
    expected = launch.run(p, choice.contract(p.dtype), a, b)
    found = launch.run(p, s, a, b, programs=_programs())
    bits = BITS[p.dtype.itemsize]
    return int((expected.view(bits) != found.view(bits)).sum())


def _programs() -> int:
    return matmul.programs(torch.device("cuda", torch.cuda.current_device()))


def refusal_of(p: Problem, s: Schedule, a: torch.Tensor, b: torch.Tensor) -> str | None:
    """Why a schedule must not be used for a product; None if it has the contract's bits."""
    if (reason := p.refuses(s)) is not None:
        return reason
    try:
        wrong = differing(p, s, a, b)
    except OutOfResources as error:
        return str(error)
    return f"{wrong} of {p.m * p.n} values differ from the contract's" if wrong else None


def refusal(dtype: torch.dtype, k: int, n: int, m: int, s: Schedule) -> str | None:
    """The same on data of its own."""
    a = adversarial(m, k, dtype)
    b = torch.randn(n, k, device="cuda").to(dtype).t()
    return refusal_of(matmul.problem(a, b, None, False), s, a, b)


def admit(table: Table) -> Iterator[tuple[str, str]]:
    """Every line of a table that must not be used, and why; nothing if all have the right bits."""
    for dtype, k, n, m, schedule in table:
        for rows in {max(1, m // 2 + 1), m}:
            reason = refusal(getattr(torch, dtype), k, n, rows, schedule)
            if reason is not None:
                yield f"{dtype} {k}x{n} M={rows}: {schedule}", reason


def use(path: str | Path) -> None:
    """Takes schedules from a table file in this process, after checking the bits of every line."""
    table = read(json.loads(Path(path).read_text()), str(path))
    bad = list(admit(table))
    if bad:
        raise ConfigurationError(
            f"{path}: {len(bad)} schedules change bits or cannot run here; the first is "
            f"{bad[0][0]}: {bad[0][1]}. "
            "Tune on this GPU instead: bi tune"
        )
    schedules.use(table)
    matmul.forget()


def candidates(m: int, chunked: bool, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """Schedules worth timing."""
    if dtype is torch.float32:
        return _single(m, chunked)
    found: list[str] = []
    splits = ("", " split") if chunked else ("",)
    if m <= 64:
        rows = 16 if m <= 16 else 32 if m <= 32 else 64
        tiles = ((64, 256, 5 if rows == 16 else 3), (64, 128, 6), (128, 128, 4), (128, 128, 5))
        for n, k, stages in tiles:
            if (rows + n) * k * 2 * stages <= 220_000:
                found += [f"tma {rows}x{n}x{k} w4 s{stages} swap{f}" for f in splits]
        for n, k, stages in ((32, 256, 4), (64, 128, 5), (128, 128, 3)):
            text = f"tile {rows}x{n}x{k} w4 s{stages}"
            found += [text + swap + f for swap in ("", " swap") for f in splits]
    if m >= 64:
        shapes = ["64x64x128 w4 s5", "64x64x128 w4 s6", "64x64x64 w4 s8", "64x64+32x64 w4 s8"]
        shapes += ["64x128x64 w4 s7"]
        if m <= 1024:
            shapes += ["64x128+32x64 w4 s6", "64x32x128 w4 s6"]
            shapes += ["64x64+16x128 w4 s5", "64x64+16x128 w4 s5 g4"]
        if m >= 128:
            shapes += ["128x64x64 w8 s7", "128x64+32x64 w8 s6", "128x128x64 w8 s6"]
            shapes += ["128x128+32x64 w8 s5", "128x128+64x64 w8 s4", "128x128x64 w8 s5 g4"]
        apart = (" split apart", " split apart early") if chunked else ()
        for shape in shapes:
            found += [f"ring {shape}{f}" for f in (*splits, *apart)]
    if m >= 128 and not chunked:
        found += [
            "ring 128x128+128x64 w8 s4",
            "ring 256x128x64 w8 s3",
            "tma 64x128x64 w4 s6",
            "tma 128x256x64 w8 s4 persistent halves",
            "tma 128x256x64 w8 s3 persistent halves",
            "tma 256x128x64 w8 s3 persistent halves",
        ]
    if m <= 256:
        found += [f"tma 64x64x128 w4 s5{f}" for f in splits]
        found += [f"tile 64x64x128 w4 s4{f}" for f in splits]
    return found


def _single(m: int, chunked: bool) -> list[str]:
    rows = 8 if m <= 8 else 16 if m <= 16 else 32
    if m <= 32:
        tiles = ("64x32 w4 s5 c3", "128x32 w4 s3 c3", "128x32 w4 s4 c2", "64x64 w4 s3 c2")
        tiles += () if rows == 32 else ("64x32 w4 s5 c4", "128x32 w4 s3 c4")
        shapes = [f"{rows}x{tile}" for tile in tiles]
    else:
        shapes = ["64x64x32 w4 s6 c2", "64x64x64 w4 s3 c2", "64x64x32 w4 s4 c3"]
        shapes += ["32x64x32 w4 s5 c3"] if m <= 128 else ["128x128x16 w8 s8"]
    ways = (" split", " split apart early", " hybrid apart early") if chunked else ()
    return [f"fma {shape}{way}" for shape in shapes for way in ("", *ways)]


def replayed(fn: Callable[[int], object], copies: int, repeats: int) -> float:
    """Microseconds of one call, by CUDA graph over `copies` inputs that are used in turn."""
    fn(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(repeats):
            fn(i % copies)
    graph.replay()
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / repeats)
    return sorted(times)[2]


def copies_of(k: int, n: int, dtype: torch.dtype) -> int:
    """How many weights are larger together than any cache."""
    return max(2, min(64, 300_000_000 // (dtype.itemsize * k * n)))


def repeats_of(m: int, n: int, k: int, copies: int) -> int:
    """Calls in one graph: enough to measure, not so many that it takes long."""
    estimate = max(2 * (k * n + m * k + m * n) / 4e12, 2 * m * n * k / 7e14) * 1e6
    return max(2, min(max(copies, 8), int(4000 / estimate) + 1))


def best(
    dtype: torch.dtype, k: int, n: int, m: int, among: Iterable[str]
) -> tuple[str, float] | None:
    """The fastest schedule with the contract's bits, and its microseconds."""
    copies = copies_of(k, n, dtype)
    a = adversarial(m, k, dtype)
    weights = [torch.randn(n, k, device="cuda").to(dtype).t() for _ in range(copies)]
    p = matmul.problem(a, weights[0], None, False)
    repeats = repeats_of(m, n, k, copies)
    found: tuple[str, float] | None = None

    def compete(text: str) -> None:
        nonlocal found
        s = parse(text)
        if refusal_of(p, s, a, weights[0]) is not None:
            return
        plan = Plan(p, s, a, weights[0], None, _programs())
        time = replayed(lambda i: plan(a, weights[i], None, 1.0, 1.0), copies, repeats)
        if found is None or time < found[1]:
            found = (text, time)

    for text in among:
        compete(text)
    if found is not None and launch.overlaps(a):
        compete(str(replace(parse(found[0]), ahead=True)))
    return found


class CudaTuner:
    """`batch_invariant.backend.Tuner` of this backend."""

    dtypes = schedules.DTYPES

    def tune(
        self,
        shapes: Sequence[tuple[int, int]],
        dtypes: Sequence[str],
        step: Callable[[str], None],
    ) -> dict[str, Any]:
        """A table for this GPU, as data."""
        entries: dict[str, dict[str, list[list[Any]]]] = {}
        for name in dtypes:
            dtype = getattr(torch, name)
            for k, n in shapes:
                lines = []
                for m in ROWS:
                    among = candidates(m, chunk_of(k, n, dtype) > 0, dtype)
                    winner = best(dtype, k, n, m, among)
                    if winner is not None:
                        lines.append([m, winner[0]])
                        step(f"{name} {k}x{n} M={m}: {winner[0]} {winner[1]:.1f} us")
                if lines:
                    entries.setdefault(name, {})[f"{k}x{n}"] = lines
        device = torch.cuda.get_device_name()
        about = f"Measured on {device}, torch {torch.__version__}, by bi tune."
        return {"about": about, "entries": entries}

    def refused(self, data: Any, source: str) -> list[str]:
        """The lines whose bits differ from the contract's here, or that cannot run."""
        return [f"{line}: {reason}" for line, reason in admit(read(data, source))]
