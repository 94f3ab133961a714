"""Which elementwise functions have other bits compiled than in eager code, with the mode on.

Without `eager_bits` compiled code on a GPU keeps the promise and may differ from eager code, since
Inductor writes elementwise functions in Triton. For each function and dtype: how many of all values
differ, by how many units of the last place at most; and what differs with `eager_bits`: nothing.

    python backends/cuda/benchmarks/eager_bits.py --out docs/benchmarks/cuda_eager_bits.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import batch_invariant as bi
from batch_invariant.ops.bits import bits

FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "exp": lambda x, y: x.exp(),
    "log": lambda x, y: x.abs().log(),
    "sin": lambda x, y: x.sin(),
    "cos": lambda x, y: x.cos(),
    "tanh": lambda x, y: x.tanh(),
    "erf": lambda x, y: x.erf(),
    "sigmoid": lambda x, y: x.sigmoid(),
    "silu": lambda x, y: F.silu(x),
    "gelu": lambda x, y: F.gelu(x),
    "gelu tanh": lambda x, y: F.gelu(x, approximate="tanh"),
    "softplus": lambda x, y: F.softplus(x),
    "sqrt": lambda x, y: x.abs().sqrt(),
    "rsqrt": lambda x, y: x.abs().rsqrt(),
    "reciprocal": lambda x, y: x.reciprocal(),
    "pow 2": lambda x, y: x.pow(2),
    "pow 3": lambda x, y: x.pow(3),
    "pow 0.3": lambda x, y: x.abs().pow(0.3),
    "x / y": lambda x, y: x / y,
    "x / 3": lambda x, y: x / 3,
    "x / 0.1": lambda x, y: x / 0.1,
    "x * y + x": lambda x, y: x * y + x,
    "x + 0.1 * y": lambda x, y: torch.add(x, y, alpha=0.1),
    "addcmul": lambda x, y: x.addcmul(x, y, value=0.3),
    "addcdiv": lambda x, y: x.addcdiv(x, y, value=0.3),
    "lerp": lambda x, y: x.lerp(y, 0.7),
    "silu(x) * y": lambda x, y: F.silu(x) * y,
    "rotation": lambda x, y: x * y.cos() + x.roll(1, -1) * y.sin(),
}


def every(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """All of them, compiled as one function."""
    return {name: function(x, y) for name, function in FUNCTIONS.items()}


def compare(dtype: torch.dtype, device: str, eager_bits: bool) -> dict[str, dict[str, Any]]:
    """By function: values that differ, of all, and the largest difference in the last place."""
    torch.manual_seed(0)
    x, y = ((torch.randn(2, 512, 1024, device=device) * 3).to(dtype)).unbind()
    torch._dynamo.reset()
    found = {}
    with torch.no_grad(), bi.enabled(eager_bits=eager_bits):
        compiled = torch.compile(every)(x, y)
        for name, expected in every(x, y).items():
            a, b = bits(compiled[name]).long(), bits(expected).long()
            both_nan = compiled[name].isnan() & expected.isnan()
            apart = (a - b).abs().masked_fill(both_nan, 0)
            found[name] = {"differ": int((apart > 0).sum()), "last_places": int(apart.max())}
    return found


def main() -> None:
    """Prints the JSON, and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write the JSON there")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    result: dict[str, Any] = {"torch": torch.__version__, "values": 512 * 1024}
    if given.device == "cuda":
        result["device"] = torch.cuda.get_device_name()
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        result[name] = compare(dtype, given.device, eager_bits=False)
        exact = compare(dtype, given.device, eager_bits=True)
        result[f"{name}, eager_bits"] = {k: v for k, v in exact.items() if v["differ"]}
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        Path(given.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
