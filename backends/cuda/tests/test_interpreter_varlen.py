"""Attention over sequences in Triton's interpreter: lengths, pages, windows, not bits."""

from __future__ import annotations

import pytest

from interpreter import printed

pytest.importorskip("triton", reason="Triton is not installed")


_PROGRAM = r"""
import sys

import torch

from batch_invariant.ops import varlen_cases
from batch_invariant.ops.contract import Data, Draw
from batch_invariant.ops.varlen_definition import attend
from batch_invariant_cuda import attention, varlen_attention, varlen_tiles

if "broken" in sys.argv:  # nobody looks at the padding on the left

    def without(launch):
        return lambda programs, tensors, *rest: launch(
            programs, (*tensors[:7], None, *tensors[8:]), *rest
        )

    for name in ("sequences_in_blocks", "sequences_in_chains"):
        setattr(varlen_tiles, name, without(getattr(varlen_tiles, name)))

kernel = varlen_attention.KERNELS["attention"].fn
varlen_tiles.tile = attention.tile = lambda *_: attention.Tile(16, 4, 1)


def run(args, split=False):
    varlen_tiles.run_of = lambda tiles, blocks, _: 1 if split else blocks
    return kernel(**args)


def far(found, other, dtype):
    bound = 3e-5 if dtype == torch.float32 else 1e-2
    pairs = zip(found, other, strict=True)
    return any(not torch.allclose(f.double(), o.double(), bound, bound) for f, o in pairs)


for case in varlen_cases.CASES:
    for dtype in (torch.float16, torch.float32):
        args = case.args(Draw(dtype, Data.NORMAL, torch.Generator().manual_seed(1)), 2)
        wide = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x
                for n, x in args.items()}
        found = run(args)
        if far(found, attend(**wide), dtype):
            print(f"{case.label} {dtype} is not accurate")
        if dtype == torch.float16 and far(found, run(args, True), dtype):
            print(f"{case.label} split")
        for variant in varlen_cases.cuts(args, {}):
            if dtype == torch.float32 and "pages" not in variant.label:
                continue
            out = run(variant.args, split=variant.transform.startswith("T5"))
            out = out if variant.arranged is None else variant.arranged(out)
            rows, at = torch.tensor(variant.rows), torch.tensor(variant.at)
            whole = [f.index_select(axis, rows) for f, axis in zip(found, (1, 2), strict=True)]
            part = [o.index_select(axis, at) for o, axis in zip(out, (1, 2), strict=True)]
            if far(whole, part, dtype):
                print(f"{case.label} {dtype}: {variant.label}")
"""


def test_sequences_are_wired_in_the_interpreter() -> None:
    assert printed(_PROGRAM) == []


def test_padding_that_nobody_looks_at_is_seen_in_the_interpreter() -> None:
    found = printed(_PROGRAM, "broken")
    assert found
    assert all("padded" in line or "before" in line for line in found)
