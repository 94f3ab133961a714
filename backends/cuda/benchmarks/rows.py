"""Row operators beside stock torch, by CUDA-graph replay over rotating inputs.

python backends/cuda/benchmarks/rows.py --json docs/benchmarks/cuda_rows.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton

from batch_invariant_cuda import norm, reduce, scan, softmax

ROWS = (1, 8, 64, 1024, 16384)
COLUMNS = (1024, 4096, 14336, 151936)
ROTATED_BYTES = 256 << 20
WARM_UP_S = 0.025  # the first milliseconds after a pause were up to 12 % slower

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]


def _rms(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    return F.rms_norm(x, w.shape, w, 1e-6)


def _rms_residual(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    s = x + r
    return F.rms_norm(s, w.shape, w, 1e-6), s


_rms_norm = norm.KERNELS["rms_norm"].fn
_softmax, _log_softmax = softmax.KERNELS["softmax"].fn, softmax.KERNELS["log_softmax"].fn
_mean, _sum = reduce.KERNELS["mean"].fn, reduce.KERNELS["sum"].fn
_cumsum = scan.KERNELS["cumsum"].fn

OPS: dict[str, tuple[Function, Function]] = {
    "rms_norm": (_rms, lambda x, r, w: _rms_norm(x, w, 1e-6, None, None)),
    "rms_norm+residual": (_rms_residual, lambda x, r, w: _rms_norm(x, w, 1e-6, r, None)),
    "softmax": (lambda x, r, w: F.softmax(x, -1), lambda x, r, w: _softmax(x, -1, None)),
    "log_softmax": (
        lambda x, r, w: F.log_softmax(x, -1),
        lambda x, r, w: _log_softmax(x, -1, None),
    ),
    "log_softmax to fp32": (
        lambda x, r, w: F.log_softmax(x, -1, dtype=torch.float32),
        lambda x, r, w: _log_softmax(x, -1, torch.float32),
    ),
    "mean": (lambda x, r, w: x.mean(-1), lambda x, r, w: _mean(x, -1)),
    "sum": (lambda x, r, w: x.sum(-1), lambda x, r, w: _sum(x, -1)),
}


def replay_us(fn: Function, inputs: list[Inputs], calls: int) -> float:
    """Microseconds a call in a replayed graph of `calls` calls: the median of five replays.

    They follow on others, which warm the GPU up.
    """
    for x in inputs[:2]:
        fn(*x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            fn(*inputs[i % len(inputs)])
    begin = time.perf_counter()
    while time.perf_counter() - begin < WARM_UP_S:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(5):
        start, stop = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / calls)
    del graph
    return statistics.median(times)


def host_us(fn: Function, x: Inputs) -> float:
    """Microseconds that a call keeps the host busy, with an empty queue before each."""
    times = []
    for _ in range(300):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        fn(*x)
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)


def _inputs(rows: int, columns: int) -> list[Inputs]:
    size = rows * columns * 2
    count = max(1, min(16, ROTATED_BYTES // size))
    w = torch.randn(columns, device="cuda", dtype=torch.bfloat16)

    def draw() -> torch.Tensor:
        return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)

    return [(draw(), draw(), w) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    arguments = parser.parse_args()
    points = []
    for columns in COLUMNS:
        for rows in arguments.rows:
            inputs = _inputs(rows, columns)
            size = rows * columns * 2
            calls = max(3, min(64, (1 << 30) // size))
            copy = replay_us(lambda x, r, w: x.clone(), inputs, calls)
            for name, (stock, ours) in OPS.items():
                a, b = replay_us(stock, inputs, calls), replay_us(ours, inputs, calls)
                points.append(
                    {
                        "op": name, "rows": rows, "columns": columns,
                        "stock_us": round(a, 2), "us": round(b, 2), "ratio": round(b / a, 3),
                        "copy_us": round(copy, 2),
                    }
                )  # fmt: skip
            del inputs
            torch.cuda.empty_cache()
    small = _inputs(8, 4096)[0]
    host = {
        name: {"stock_us": round(host_us(stock, small), 2), "us": round(host_us(ours, small), 2)}
        for name, (stock, ours) in OPS.items()
    }
    chains = []
    for rows, columns in ((1, 4096), (64, 4096), (1024, 4096), (16384, 4096), (1, 151936)):
        inputs = _inputs(rows, columns)[:1]
        a = replay_us(lambda x, r, w: x.cumsum(-1), inputs, 3)
        b = replay_us(lambda x, r, w: _cumsum(x, -1), inputs, 3)
        chains.append(
            {"rows": rows, "columns": columns, "stock_us": round(a, 1), "us": round(b, 1)}
        )
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": "python backends/cuda/benchmarks/rows.py --json docs/benchmarks/cuda_rows.json",
        "points": points,
        "host": host,
        "cumsum": chains,
    }
    _print(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def _print(report: dict[str, Any]) -> None:
    points = report["points"]
    for name in OPS:
        own = [p for p in points if p["op"] == name]
        mean = math.exp(statistics.fmean(math.log(p["ratio"]) for p in own))
        print(f"{name}: geometric mean {mean:.3f}, worst {max(p['ratio'] for p in own):.2f}")
        for columns in COLUMNS:
            cells = [
                f"{p['rows']}: {p['us']:.1f}/{p['stock_us']:.1f}={p['ratio']:.2f}"
                for p in own
                if p["columns"] == columns
            ]
            print(f"  {columns:6d} ", "  ".join(cells))
    mean = math.exp(statistics.fmean(math.log(p["ratio"]) for p in points))
    print(f"all: geometric mean {mean:.3f}; host {report['host']}; cumsum {report['cumsum']}")


if __name__ == "__main__":
    main()
