"""The report of a benchmark of attention: one line for each shape, and what measured it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import triton


def make(
    name: str,
    doc: str | None,
    lines: Mapping[str, Callable[[], Any]],
    unit: str = "us, CUDA-graph replay",
    **more: Callable[[], Any],
) -> None:
    """Measures every line, then `more`, and writes all of it to the file that --out names."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="write the report to this file")
    options = parser.parse_args()
    found = {}
    for label, measure in lines.items():
        found[label] = measure()
        print(f"{label:24} {found[label]}", flush=True)
        torch.cuda.empty_cache()
    report = {
        "command": f"python backends/cuda/benchmarks/{name}.py "
        f"--out docs/benchmarks/cuda_{name}.json",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": torch.cuda.get_device_name(),
        "unit": unit,
        "lines": found,
        **{key: measure() for key, measure in more.items()},
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
