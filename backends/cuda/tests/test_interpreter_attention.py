"""Attention in Triton's interpreter: masks, blocks and chunks, not the bits of `tl.dot`."""

from __future__ import annotations

import pytest

from interpreter import printed

pytest.importorskip("triton", reason="Triton is not installed")


_PROGRAM = r"""
import math
import sys

import torch

from batch_invariant_cuda import attention, attention_blocks

if "broken" in sys.argv:  # blocks by place in memory, not from the first key of a row
    prepare = attention.prepare_mask

    def from_the_beginning(programs, tensors, *rest):
        prepare(programs, tensors, *rest)
        tensors[2].clamp_(max=0)

    attention.prepare_mask = from_the_beginning

attention.tile = lambda *_: attention.Tile(16, 4, 2)
generator = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=generator).half()


def attend(q, k, v, mask=None, causal=False, split=False):
    attention.run_of = lambda tiles, blocks, _: 1 if split else blocks
    kernel = attention.KERNELS["scaled_dot_product_attention"].fn
    return kernel(q, k, v, mask, 0.0, causal, enable_gqa=True)


def same(label, a, b):
    if not all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(a, b, strict=True)):
        print(label)


def close(label, q, k, v, mask=None, causal=False):
    out, lse = attend(q, k, v, mask, causal)
    q, k, v = q.double(), *(x.double().repeat_interleave(2, 1) for x in (k, v))
    if causal:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril()
    scores = q @ k.mT / math.sqrt(q.size(3))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    exact = scores.softmax(-1).nan_to_num(0) @ v
    errors = (out - exact).abs().max(), (lse - scores.logsumexp(-1)).nan_to_num(0).abs().max()
    if errors[0] > 5e-3 or errors[1] > 1e-3:
        print(f"{label} is not accurate")
    same(f"{label} split", (out, lse), attend(*given, split=True))


q, k, v = draw(1, 4, 5, 24), draw(1, 2, 600, 24), draw(1, 2, 600, 40)
mask = torch.rand(1, 1, 5, 600, generator=generator) > 0.4
mask[..., 3], mask[0, 0, 0], mask[0, 0, 2, :100] = False, False, False
low = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float16).min).half()
low[0, 0, 0] = -math.inf
given = (q, k, v)
close("attention", *given)
given = (q, k, v, mask)
close("masked attention", *given)
masked, plain = attend(q, k, v, mask), attend(q, k, v)
infinite = v.clone()
infinite[0, 0, 3] = math.inf
same("infinite values", masked, attend(q, k, infinite, mask))
same("lowest numbers", masked, attend(q, k, v, low))
large = torch.where(mask, 0.0, -1e9)
large[0, 0, 0] = -math.inf
same("lowest numbers, -1e9", masked, attend(q, k, v, large))
for pad in (1, 70):
    more_k, more_v = torch.cat([draw(1, 2, pad, 24), k], 2), torch.cat([draw(1, 2, pad, 40), v], 2)
    off = torch.zeros(1, 1, 5, pad, dtype=torch.bool)
    padded = torch.cat([off, mask], -1)
    same(f"{pad} keys before", masked, attend(q, more_k, more_v, padded))
    padded = torch.cat([torch.ones_like(mask), off], -1)
    behind = more_k.roll(-pad, 2), more_v.roll(-pad, 2)
    same(f"{pad} keys behind", plain, attend(q, *behind, padded))
given = (draw(1, 4, 70, 32), draw(1, 2, 70, 32), draw(1, 2, 70, 32), None, True)
close("causal attention", *given)
given[2][0, 1, 50, 3] = math.inf  # in wide tiles by a launch of its own, which a mark asks for
small = attend(*given)
attention.tile = lambda *_: attention.Tile(64, 4, 1)
wide = attend(*given)
attention.tile = lambda *_: attention.Tile(16, 4, 2)
if not torch.equal(small[0].isfinite(), wide[0].isfinite()) or wide[0][0, :2].isinf().any():
    print("infinite values reach other rows")
if not wide[0][0, 2:, 50:, 3].isinf().all() or wide[0].isinf().sum() != 40:
    print("infinite values do not reach their rows")
runs = torch.ones(3, 1, 150, 160, dtype=torch.bool).tril()
runs[1, ..., :40], runs[1, ..., 149:], runs[2, 0, 140, 7] = False, False, False
off = torch.zeros(runs.shape, dtype=torch.bfloat16)
for kind in (runs, off.masked_fill(~runs, -math.inf), off.masked_fill(~runs, -3.38e38)):
    plan = attention._prepared(kind, draw(3, 2, 150, 32), 160, True)[2][:, 0]
    ends = [[*range(1, 151)], [0] * 40 + [*range(41, 150)] + [149]]
    if plan[:, 0].tolist() != [0, 40, -1] or plan[:2, 5:].tolist() != ends:
        print("the plan of a mask", kind.dtype)
    if plan[:2, 1:5].tolist() != [[1, 128, 129, 150], [0, 128, 129, 149]]:
        print("the plan of a tile", kind.dtype)
q[0, 1, 3] = math.nan
lost = attend(q, k, v, mask)[0].isnan().any(-1)
if not lost[0, 1, 3] or int(lost.sum()) != 1:
    print("NaN in another place")
"""


def test_blocks_are_wired_in_the_interpreter() -> None:
    assert printed(_PROGRAM) == []


def test_blocks_from_the_beginning_are_seen_in_the_interpreter() -> None:
    found = printed(_PROGRAM, "broken")
    assert found
    assert all(any(word in line for word in ("keys before", "lowest", "plan")) for line in found)
