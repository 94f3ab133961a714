"""Stock torch, this library's mode and a peer's mode in one process, on the same tensors.

The peer is a context manager that overrides torch's operators, named as module:function, such as
thinking-machines-lab/batch_invariant_ops (f22b1fb) in a folder on PYTHONPATH:

    python backends/cuda/benchmarks/peer.py --peer batch_invariant_ops:set_batch_invariant_mode \
        --revision f22b1fb --out docs/benchmarks/cuda_peer.json
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import model
import torch
import triton

import batch_invariant as bi

SHAPES = ((4096, 6144), (8192, 1280), (14336, 4096), (4096, 28672))
ROWS = (1, 8, 64, 256, 1024, 4096)
COLUMNS = (4096, 151936)
Mode = Callable[[], AbstractContextManager[Any]]


def microseconds(calls: list[Callable[[], Any]]) -> float:
    """One of the calls, by replay of a CUDA graph that makes each of them twice."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls * 2:
            call()
    graph.replay()
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[2] * 1e3 / (2 * len(calls))


def operators() -> dict[str, list[Callable[[], Any]]]:
    """What is timed: calls over tensors that do not stay in the cache."""
    found: dict[str, list[Callable[[], Any]]] = {}
    for k, n in SHAPES:
        copies = max(2, min(16, 2**28 // (k * n * 2)))
        weights = [torch.randn(k, n, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        for rows in ROWS:
            left = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
            found[f"mm {rows} x {k} x {n}"] = [
                lambda left=left, w=w: torch.mm(left, w) for w in weights
            ]
    for rows in (1, 64, 1024):
        for columns in COLUMNS:
            x = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
            found[f"log_softmax {rows} x {columns}"] = [
                lambda x=x: torch.log_softmax(x, -1) for x in x
            ]
            found[f"mean {rows} x {columns}"] = [lambda x=x: torch.mean(x, -1) for x in x]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", metavar="MODULE:FUNCTION", help="default: no peer")
    parser.add_argument("--revision", default="", help="of the peer, for the report")
    parser.add_argument("--out", type=Path, help="write the report to this file")
    options = parser.parse_args()
    modes: dict[str, Mode] = {"stock": nullcontext, "batch_invariant": bi.enabled}
    if options.peer:
        module, _, function = options.peer.partition(":")
        modes["peer"] = getattr(importlib.import_module(module), function)
    torch.manual_seed(0)
    calls = operators()
    times: dict[str, dict[str, float]] = {name: {} for name in calls}
    for label, mode in modes.items():
        with torch.inference_mode(), mode():
            for name, each in calls.items():
                times[name][label] = round(microseconds(each), 2)
    calls.clear()
    network = model.model()
    whole = {}
    for label, mode in modes.items():
        with mode():
            whole[label] = model.measure(network)
    for name, line in times.items():
        ratios = {key: round(value / line["stock"], 2) for key, value in line.items()}
        print(f"{name:28} {ratios}")
    for key in whole["stock"]:
        print(f"{key:8}", *(found[key] for found in whole.values()))
    if options.out:
        report = {
            "command": "python backends/cuda/benchmarks/peer.py --peer "
            f"{options.peer} --revision {options.revision} --out docs/benchmarks/cuda_peer.json",
            "torch": torch.__version__,
            "triton": triton.__version__,
            "device": torch.cuda.get_device_name(),
            "method": "operators: us, CUDA-graph replay; model: ms per eager forward, and logits "
            "of row 0 that differ from those alone",
            "operators": times,
            "model": whole,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
