"""Does generated elementwise code depend on the batch, and what does it cost that it does not?

Programs of elementwise operations are compiled for each number of rows (static), and once for all
of them (dynamic), by stock torch and with the mode on. Counted are the values of the rows that all
have in common whose bits differ from those of the dynamic graph at the largest number of rows, and
those that differ from eager code. Then the time of the programs is measured with each of Inductor's
switches that the mode sets, alone and all together, without the mode: at 512 rows on a CPU, at
16384 on a GPU (--device cuda).

    python benchmarks/specialised.py --json docs/benchmarks/specialised.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cpu import processor
from torch import Tensor
from torch.utils.benchmark import Timer

import batch_invariant as bi
from batch_invariant.inductor.compile_fx import EXACT
from batch_invariant.ops.bits import bits

N = 1024
ROWS = (513, 129, 64, 17, 3, 2, 1)
Program = Callable[[Tensor, Tensor, Tensor], Tensor]


def rotation(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Rotary embedding: halves, a negation, a concatenation."""
    half = torch.cat((-x[:, N // 2 :], x[:, : N // 2]), -1)
    return x * y + half * z


PROGRAMS: dict[str, Program] = {
    "products and sums": lambda x, y, z: (x * y + z - x * z * 3.0) * 0.3 + y,
    "divisions": lambda x, y, z: x / (y * y + 1) + z / 3.0,
    "gate": lambda x, y, z: F.silu(x) * y + z,
    "gelu gate": lambda x, y, z: F.gelu(x, approximate="tanh") * y,
    "rotation": rotation,
    "casts": lambda x, y, z: ((x.float() * 1.5).to(x.dtype) + y).float().mul(0.1).to(x.dtype) * z,
    "transposed": lambda x, y, z: (x.t() * y.t() + z.t()).contiguous().t(),
    "powers": lambda x, y, z: (x * x + 1).rsqrt() * y + z.abs().sqrt(),
    "exponentials": lambda x, y, z: torch.exp(x - y.abs()) * torch.tanh(z) + torch.sigmoid(x),
}


def every(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """All of them, compiled as one function, whose loops Inductor fuses as it likes."""
    return tuple(program(x, y, z) for program in PROGRAMS.values())


def _inputs(rows: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    return [t[:rows].clone() for t in torch.randn(3, max(ROWS), N, device=device).to(dtype)]


def survey(variant: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """By program: values that depend on the batch, of all, and values that eager code has not."""
    with torch.no_grad(), bi.enabled() if variant == "mode" else torch.no_grad():
        torch.compiler.reset()
        dynamic = torch.compile(every, dynamic=True)
        moved = {rows: dynamic(*_inputs(rows, dtype, device)) for rows in ROWS}
        reference = moved[max(ROWS)]
        eager = every(*_inputs(max(ROWS), dtype, device))
        found = {
            name: {"values": 0, "by_rows": 0, "by_specialisation": 0, "unlike_eager": _unlike(a, b)}
            for name, a, b in zip(PROGRAMS, reference, eager, strict=True)
        }
        for rows in ROWS:
            torch.compiler.reset()  # else a graph that is there and fits would run
            static = torch.compile(every, dynamic=False)(*_inputs(rows, dtype, device))
            for i, of in enumerate(found.values()):
                of["values"] += static[i].numel()
                of["by_rows"] += _unlike(moved[rows][i], reference[i][:rows])
                of["by_specialisation"] += _unlike(static[i], moved[rows][i])
    return found


def _unlike(a: Tensor, b: Tensor) -> int:
    return int((bits(a) != bits(b)).sum())


def costs(dtype: torch.dtype, device: str, rows: int) -> dict[str, dict[str, float]]:
    """Microseconds of each program under each switch."""
    from torch._inductor import config

    known = config.get_config_copy()
    switches: dict[str, Any] = {k: v for k, v in EXACT.items() if k in known}
    settings = {"none": {}, **{k: {k: v} for k, v in switches.items()}, "all": switches}
    given = [torch.randn(rows, N, device=device).to(dtype) for _ in range(3)]
    found: dict[str, dict[str, float]] = {name: {} for name in PROGRAMS}
    for setting, patches in settings.items():
        torch.compiler.reset()
        for name, program in PROGRAMS.items():
            compiled = torch.compile(program, dynamic=False, options=patches)
            with torch.no_grad():
                compiled(*given)
                found[name][setting] = _microseconds(lambda run=compiled: run(*given), device)
    return found


def _microseconds(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        from triton.testing import do_bench_cudagraph

        return round(1000 * do_bench_cudagraph(run, rep=10), 2)
    return round(1e6 * Timer("run()", globals={"run": run}).blocked_autorange().median, 1)


def main() -> None:
    """Prints the JSON, and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the report to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()
    cuda = given.device == "cuda"
    device = torch.cuda.get_device_name() if cuda else processor()
    result: dict[str, Any] = {
        "device": device,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": ROWS,
        "columns": N,
    }
    parts = [(v, d) for v in ("stock", "mode") for d in (torch.float32, torch.bfloat16)]
    with ProcessPoolExecutor(len(parts), mp_context=get_context("spawn")) as pool:
        running = {
            f"{v}, {str(d).removeprefix('torch.')}": pool.submit(survey, v, d, given.device)
            for v, d in parts
        }
        result["survey"] = {name: future.result() for name, future in running.items()}
    rows = 16384 if cuda else 512
    result[f"microseconds of {rows} rows, bfloat16"] = costs(torch.bfloat16, given.device, rows)
    text = json.dumps(result, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
