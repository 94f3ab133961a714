"""Products beside stock torch: CUDA-graph replay over rotating weights, and the bits of both.

python backends/cuda/benchmarks/gemm.py --out docs/benchmarks/cuda_gemm.json
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from batch_invariant_cuda import matmul, tune

SHAPES = (
    *((1024, 1024), (4096, 1024), (4096, 4096), (4096, 6144), (14336, 4096)),
    *((4096, 28672), (8192, 1280), (8192, 10240), (3584, 8192), (4096, 151936)),
)
SINGLE = ((4096, 4096), (4096, 6144), (8192, 1280))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
FEW = (1, 16, 64, 256, 1024, 4096)


def measure(dtype: torch.dtype, k: int, n: int, rows: tuple[int, ...]) -> list[dict]:
    """One line for each M: microseconds of both, and rows that are not those of the largest M."""
    copies = tune.copies_of(k, n, dtype)
    weights = [torch.randn(n, k, device="cuda", dtype=dtype).t() for _ in range(copies)]
    a = tune.adversarial(rows[-1], k, dtype, special=False)
    whole, stock_whole = matmul.product(a, weights[0]), torch.mm(a, weights[0])
    found = []
    for m in rows:
        left = a[:m]
        repeats = tune.repeats_of(m, n, k, copies)
        both = {"stock": torch.mm, "ours": matmul.product}
        times: dict[str, list[float]] = {name: [] for name in both}
        for _ in range(2):
            for name, fn in both.items():
                call = functools.partial(replay, fn, left, weights)
                times[name].append(tune.replayed(call, copies, repeats))
        p = matmul.problem(left, weights[0], None, False)
        line = {
            "dtype": str(dtype).removeprefix("torch."),
            "k": k,
            "n": n,
            "m": m,
            "stock_us": round(min(times["stock"]), 2),
            "ours_us": round(min(times["ours"]), 2),
            "ours_rows_changed": changed(matmul.product(left, weights[0]), whole[:m]),
            "stock_rows_changed": changed(torch.mm(left, weights[0]), stock_whole[:m]),
            "schedule": str(matmul.schedule_for(p, a.device)),
        }
        line["ratio"] = round(line["ours_us"] / line["stock_us"], 3)
        found.append(line)
    return found


def replay(fn: Callable, left: torch.Tensor, weights: list[torch.Tensor], i: int) -> torch.Tensor:
    """One call, with the weights whose turn it is."""
    return fn(left, weights[i])


def changed(one: torch.Tensor, other: torch.Tensor) -> int:
    """Rows that differ in bits."""
    bits = tune.BITS[one.dtype.itemsize]
    return int((one.view(bits) != other.view(bits)).any(1).sum())


def host() -> dict[str, float]:
    """Microseconds of Python and launch for one eager call with an empty queue."""
    import batch_invariant as bi

    a = torch.randn(1, 1024, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)
    calls = {
        "torch.nn.functional.linear": lambda: torch.nn.functional.linear(a, w),
        "batch_invariant.linear": lambda: bi.linear(a, w),
        "the kernel alone": lambda: matmul.KERNELS["linear"].fn(a, w, None),
    }
    found = {}
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            for name, fn in calls.items():
                for _ in range(200):
                    fn()
                times = []
                for _ in range(100):
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    for _ in range(10):
                        fn()
                    times.append((time.perf_counter() - begin) * 1e5)
                found[f"{name}, {mode.__name__}"] = round(sorted(times)[50], 2)
    return found


def mean(lines: list[dict]) -> float:
    """The geometric mean of time / stock."""
    return round(math.exp(sum(math.log(line["ratio"]) for line in lines) / len(lines)), 4)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    lines: list[dict] = []
    for dtype, shapes, rows in (
        (torch.bfloat16, SHAPES, ROWS),
        (torch.float16, SHAPES, ROWS),
        (torch.float32, SINGLE, FEW),
    ):
        for k, n in shapes:
            new = measure(dtype, k, n, rows)
            lines += new
            torch.cuda.empty_cache()
            print(f"{dtype} {k}x{n}".ljust(28), *(f"{line['ratio']:5.2f}" for line in new))
    by_dtype = {
        name: {
            "geometric_mean": mean(some),
            "worst": max(line["ratio"] for line in some),
            "points_above_1.15": sum(line["ratio"] > 1.15 for line in some),
            "rows_changed": sum(line["ours_rows_changed"] for line in some),
            "stock_rows_changed": sum(line["stock_rows_changed"] for line in some),
        }
        for name in ("bfloat16", "float16", "float32")
        for some in [[line for line in lines if line["dtype"] == name]]
    }
    result = {
        "command": "python backends/cuda/benchmarks/gemm.py --out docs/benchmarks/cuda_gemm.json",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "method": "CUDA-graph replay over rotating weights; the lower of two medians of five",
        "host_us": host(),
        "summary": by_dtype,
        "lines": lines,
    }
    print(json.dumps({"host_us": result["host_us"], "summary": by_dtype}, indent=1))
    Path(given.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
