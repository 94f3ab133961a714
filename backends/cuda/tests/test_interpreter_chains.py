"""fp32 attention in Triton's interpreter, whose dot is made a chain of FMAs: the order of the CPU.

What a GPU's dot adds is seen on a GPU alone (`test_gpu_attention.py`, `test_gpu_varlen.py`).
"""

from __future__ import annotations

import pytest

from interpreter import printed

pytest.importorskip("triton", reason="Triton is not installed")


_PROGRAM = r"""
import itertools
import math
import sys

import numpy as np
import torch
from triton import language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from batch_invariant import cpu
from batch_invariant.ops import varlen_cases
from batch_invariant.ops.bits import mismatch
from batch_invariant.ops.contract import Data, Draw
from batch_invariant_cuda import (
    attention, attention_chains, attention_plan, varlen_attention, varlen_chains,
)


def fma(x, y, z):  # rounded twice, which these numbers do not show
    with np.errstate(all="ignore"):
        return (x.astype(np.float64) * y + z).astype(np.float32)


def chains(self, a, b, c, *_):
    found = c.data
    for k in range(a.data.shape[1]):
        found = fma(a.data[:, k, None], b.data[None, k], found)
    return TensorHandle(found, c.dtype.scalar)


InterpreterBuilder.create_dot = chains
InterpreterBuilder.create_fma = lambda self, x, y, z: TensorHandle(
    fma(x.data, y.data, z.data), z.dtype.scalar
)
KINDS, CASES = ("all", "causal", "late", "left", "bool", "additive", "far"), varlen_cases.CASES
if "blocks" in sys.argv:
    attention_chains._BLOCK = varlen_chains._BLOCK = tl.constexpr(64)
    KINDS, CASES = KINDS[:3], CASES[:2]
if "masks" in sys.argv:
    attention_plan._FAR = tl.constexpr(math.inf)
    KINDS, CASES = KINDS[-2:], ()
ON_CPU = cpu.CpuBackend().kernels()
generator = torch.Generator().manual_seed(3)


def compare(label, name, kernels, *args, **options):
    for on_cpu, found in zip(
        ON_CPU[name].fn(*args, **options), kernels[name].fn(*args, **options), strict=True
    ):
        if mismatch(on_cpu, found) is not None:
            print(label)


def draw(*shape):
    return torch.randn(*shape, generator=generator)


for kind, (heads, kv_heads, rows, keys, size) in itertools.product(
    KINDS,
    ((4, 2, 1, 300, 40), (2, 2, 17, 33, 64), (2, 1, 5, 257, 24), (1, 1, 150, 150, 16)),
):
    q, k, v = draw(2, heads, rows, size), *(draw(2, kv_heads, keys, size) for _ in "kv")
    mask = None
    if kind == "late":  # the blocks of every row begin at another key
        mask = torch.arange(keys) >= (torch.arange(rows) * 37 % keys)[:, None]
    elif kind == "left":  # of every row at the same, which is no multiple of a tile
        mask = (torch.arange(keys) >= 21).expand(rows, keys)
    elif kind == "far":  # at the first -9e3
        mask, ends = torch.zeros(rows, keys), (100 + torch.arange(rows)[:, None] * 37) % keys
        for part, low in ((4, -9e3), (3, -1.1e4), (2, -1e9), (1, torch.finfo(torch.float32).min)):
            mask = mask.masked_fill(torch.arange(keys) < ends * part // 4, low)
    elif kind in ("bool", "additive"):
        mask = torch.rand(2, 1, rows, keys, generator=generator) > 0.3
        mask[0, 0, -1], mask[0, 0, :, 3] = False, False
        k[0, 0, 3], v[0, 0, 3, 1] = math.nan, math.inf
        if kind == "additive":
            mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    compare(
        f"{kind}: {rows} of {keys}", "scaled_dot_product_attention", attention.KERNELS,
        q, k, v, mask, 0.0, kind == "causal", enable_gqa=heads != kv_heads,
    )
for case in CASES:
    args = case.args(Draw(torch.float32, Data.NORMAL, torch.Generator().manual_seed(1)), 2)
    if args["soft_cap"] is None:  # whose tanh is not the CPU's
        compare(case.label, "attention", varlen_attention.KERNELS, **args)
"""


def test_fp32_has_the_order_of_the_cpu() -> None:
    assert printed(_PROGRAM) == []


def test_other_blocks_are_seen() -> None:
    """Negative control: blocks of 64 keys. They show wherever a row sees more than 64."""
    found = printed(_PROGRAM, "blocks")
    assert {"all: 1 of 300", "causal: 150 of 150", "late: 5 of 257"} <= set(found)
    assert "2/2 heads x 64, 1 of 1029" in found
    assert not any("of 33" in line for line in found)


def test_blocks_from_a_key_of_no_weight_are_seen() -> None:
    """Negative control: blocks that begin at any addend but -inf."""
    found = printed(_PROGRAM, "masks")
    assert {"far: 1 of 300", "far: 5 of 257", "far: 150 of 150"} <= set(found)
    assert all("far" in line for line in found)
