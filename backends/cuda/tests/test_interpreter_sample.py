"""sample's kernels in Triton's interpreter, on a CPU: words, indexing, masks, ties, refusals.

An interpreter tests wiring. It emulates FMA and division, so scores may differ in their last digit;
the draws of these rows have larger gaps. Bits of scores are compared on a GPU.
"""

from __future__ import annotations

import pytest

from interpreter import printed

pytest.importorskip("triton", reason="needs Triton: pip install 'batch-invariant-cuda[runtime]'")


_PROGRAM = """
import math, sys, torch, triton, triton.language as tl
import batch_invariant as bi
from batch_invariant.cpu import rows
from batch_invariant.ops.philox import column_words
from batch_invariant.ops.sample import kept
from batch_invariant_cuda import sample

@triton.jit
def words_kernel(seeds, positions, out, GROUPS: tl.constexpr):
    row = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    seed, position = tl.load(seeds + row), tl.load(positions + row)
    words = sample.column_words(seed, position, group)
    for word in tl.static_range(4):
        tl.store(out + row * 4 * GROUPS + 4 * group + word, words[word].to(tl.int64))

if len(sys.argv) > 1:  # the control: noise of the next column
    real = sample.column_words
    sample.column_words = triton.jit(lambda seed, position, group: real(seed, position, group + 1))
generator = torch.Generator().manual_seed(0)
failures = []

def check(label, good):
    if not good:
        failures.append(label)

seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63), 12345678901, 7])
positions = torch.tensor([0, 2**63 - 1, 2**32, 2**32 - 1, 5, 1])
words = torch.empty(6, 64, dtype=torch.int64)
words_kernel[(6,)](seeds, positions, words, 16)
check("words", torch.equal(words & 0xFFFFFFFF, column_words(seeds, positions, 64)))

def both(x, heat, top_k=None, top_p=None, min_p=None):
    want = bi.sample(
        x, seeds, positions, heat, *(d if t is None else t for t, d in
        ((top_k, 0), (top_p, 1.0), (min_p, 0.0))))
    keep = None
    if top_k is not None or top_p is not None:
        values, order = x.sort(dim=1, descending=True, stable=True)
        own, theirs = sample.weights(values, heat), rows.sample_weights(values, heat)
        check(f"weights {x.dtype}", bool(((own - theirs).abs() <= 2**18).all()))
        keep = torch.zeros(x.shape, dtype=torch.bool)
        keep.scatter_(1, order, kept(theirs, top_k, top_p, "CPU"))
    return want, sample.draw(x, seeds, positions, heat, top_k, top_p, min_p, keep)

cases = {1: torch.float32, 1023: torch.float16, 2050: torch.bfloat16, 2051: torch.float32}
for n, dtype in cases.items():
    x = torch.randn(6, n, generator=generator).to(dtype)
    heat = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 1e-4])
    check(f"plain {n} {dtype}", torch.equal(*both(x, heat)))
    k = torch.tensor([0, 1, 5, 50, 3, 9])
    p, least = torch.linspace(0.1, 1.0, 6), torch.linspace(0.0, 0.4, 6)
    check(f"filtered {n} {dtype}", torch.equal(*both(x, heat, k, p, least)))
if len(sys.argv) > 1:
    print("\\n".join(failures))
    sys.exit()
x = torch.randint(-3, 3, (6, 2051), generator=generator).float()
check("greedy ties", torch.equal(*both(x, torch.zeros(6))))
check("ties cut by top_k", torch.equal(*both(x, torch.ones(6), torch.full((6,), 700))))
x[0, 1500], x[1], x[3, :2000] = math.nan, -math.inf, -math.inf
x[2, 7], x[2, 2000] = math.inf, math.inf
want, got = both(x, torch.ones(6))
check("special values", torch.equal(want, got) and want[:2].tolist() == [-1, -1])
check("inf", want[2].item() in (7, 2000) and want[3].item() >= 2000)
heat = torch.tensor([-1.0, math.inf, math.nan, 1.0, 1.0, 1.0])
positions[3] = -1
x = torch.randn(6, 40, generator=generator)
got = sample.draw(x, seeds, positions, heat, None, None, torch.tensor([0, 0, 0, 0, 2.0, 0]), None)
check("refused rows", got[:5].eq(-1).all() and got[5] >= 0)
print("\\n".join(failures))
"""


def test_draws_are_those_of_the_reference_in_the_interpreter() -> None:
    assert printed(_PROGRAM) == []


def test_other_noise_is_seen_in_the_interpreter() -> None:
    found = printed(_PROGRAM, "broken")
    assert any(line.startswith("plain") for line in found)
