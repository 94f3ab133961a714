"""The CPU backend against stock torch, side by side in one run: medians of interleaved calls.

    python benchmarks/cpu.py --threads 2 --json docs/benchmarks/cpu.json

Ratios above 1 mean that the invariant kernel is slower. Figures belong to the machine that the JSON
names. `--skip-model` leaves out the generation of SmolLM2.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import batch_invariant as bi
from batch_invariant.cpu import native

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def processor() -> str:
    """The CPU's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def compare(call: Callable[[], Any], budget: float = 0.4) -> tuple[float, float]:
    """Median milliseconds of a call in stock torch and in the mode, in blocks that take turns.

    A block starts with calls that are not counted: what is measured is the steady state, in which
    caches are warm and the allocator has the blocks that the call needs.
    """
    call()
    started = time.perf_counter()
    call()
    once = time.perf_counter() - started
    group = max(1, int(1e-3 / once))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        for which in (0, 1):
            if which:
                bi.enable()
            try:
                for _ in range(3 if once < 0.1 else 1):
                    call()
                deadline = time.perf_counter() + budget / 6
                while not times[which] or time.perf_counter() < deadline:
                    started = time.perf_counter()
                    for _ in range(group):
                        call()
                    times[which].append((time.perf_counter() - started) / group)
            finally:
                bi.disable()
    return statistics.median(times[0]) * 1e3, statistics.median(times[1]) * 1e3


def row(what: str, dtype: str, shape: str, pair: tuple[float, float], bar: float) -> dict[str, Any]:
    """One line of the report."""
    stock, ours = pair
    entry = {
        "what": what,
        "dtype": dtype,
        "shape": shape,
        "stock_ms": round(stock, 4),
        "invariant_ms": round(ours, 4),
        "ratio": round(ours / stock, 3),
        "bar": bar,
        "met": ours / stock <= bar,
    }
    print(
        f"{what:14} {dtype:9} {shape:22} {stock:10.3f} {ours:10.3f} {ours / stock:7.2f}"
        f"   bar {bar}{'' if entry['met'] else '  MISSED'}",
        flush=True,
    )
    return entry


def linear() -> list[dict[str, Any]]:
    """`F.linear` at K = N = 4096 and at the widths of SmolLM2."""
    rows = []
    for name, dtype in DTYPES.items():
        for k, n in ((4096, 4096), (576, 1536), (1536, 576), (576, 49152)):
            w = torch.randn(n, k).to(dtype)
            for m in (1, 8, 64, 256, 1024):
                if n > 40000 and m > 64:
                    continue
                x = torch.randn(m, k).to(dtype)
                bar = 1.5 if m <= 8 else 2.5
                pair = compare(lambda x=x, w=w: F.linear(x, w))
                rows.append(row("linear", name, f"{m} x {k} -> {n}", pair, bar))
    return rows


def reductions() -> list[dict[str, Any]]:
    """Reductions and normalisations over the last dimension."""
    calls: dict[str, Callable[[torch.Tensor], Any]] = {
        "sum": lambda x: x.sum(-1),
        "mean": lambda x: x.mean(-1),
        "var": lambda x: x.var(-1),
        "norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
        "softmax": lambda x: x.softmax(-1),
        "log_softmax": lambda x: x.log_softmax(-1),
        "logsumexp": lambda x: x.logsumexp(-1),
        "cumsum": lambda x: x.cumsum(-1),
        "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6),
        "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
        "silu": F.silu,
        "gelu": F.gelu,
    }
    rows = []
    for name, dtype in DTYPES.items():
        for what, call in calls.items():
            for m, n in ((1, 576), (8, 576), (64, 4096), (1024, 4096), (1, 49152), (64, 49152)):
                x = torch.randn(m, n).to(dtype)
                pair = compare(lambda x=x, call=call: call(x), 0.2)
                rows.append(row(what, name, f"{m} x {n}", pair, 1.5))
        for batch, queries, keys in ((1, 1, 512), (8, 1, 512), (1, 512, 512), (8, 128, 128)):
            q = torch.randn(batch, 9, queries, 64).to(dtype)
            k, v = torch.randn(2, batch, 3, keys, 64).to(dtype)
            pair = compare(
                lambda q=q, k=k, v=v, c=queries > 1: F.scaled_dot_product_attention(
                    q, k, v, is_causal=c, enable_gqa=True
                ),
                0.3,
            )
            rows.append(row("attention", name, f"{batch} x 9/3 x {queries} of {keys}", pair, 2.0))
    return rows


def generation() -> list[dict[str, Any]]:
    """Greedy generation of SmolLM2-135M-Instruct, 24 tokens, by `model.generate`."""
    from batch_invariant.cli import models

    rows = []
    for name in DTYPES:
        with models.quiet():
            model, tokenizer = models.load(models.locate(models.DEFAULT), name)
        tokenizer.padding_side = "left"
        for batch in (1, 8):
            prompts = [f"Write {i + 2} sentences about the sea and the wind." for i in range(batch)]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True)

            def call(inputs: Any = inputs, model: Any = model) -> None:
                with models.quiet():
                    model.generate(**inputs, max_new_tokens=24, min_new_tokens=24, do_sample=False)

            rows.append(row("SmolLM2", name, f"batch {batch}, 24 tokens", compare(call, 6.0), 1.5))
    return rows


def main() -> None:
    """Runs everything and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--skip-model", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    orders = native.BF16_ORDERS[native.library().bi_bf16_order()]
    rows = linear() + reductions() + ([] if args.skip_model else generation())
    report = {
        "command": "python " + " ".join(sys.argv),
        "cpu": processor(),
        "threads": args.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "bf16_order": orders,
        "missed": [r for r in rows if not r["met"]],
        "rows": rows,
    }
    print(f"{sum(r['met'] for r in rows)} of {len(rows)} within their bars")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
