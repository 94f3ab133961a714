"""Row kernels in Triton's interpreter, on a CPU: indexing, masks and the fixed order.

An interpreter tests wiring. It emulates FMA, exp and division, so bits are compared only where a
kernel adds, subtracts and multiplies; the rest is compared loosely here and in bits on a GPU.
"""

from __future__ import annotations

import pytest

from interpreter import printed

pytest.importorskip("triton", reason="needs Triton: pip install 'batch-invariant-cuda[runtime]'")


_PROGRAM = """
import sys, torch
from batch_invariant.cpu import _kernels
from batch_invariant.ops.bits import mismatch
from batch_invariant_cuda import attention, norm, reduce, row_launch, scan, softmax

cpu = _kernels()
gpu = {k: v for f in (attention, norm, reduce, scan, softmax) for k, v in f.KERNELS.items()}
broken = len(sys.argv) > 1
if broken:  # the control: segments of half the length are another order
    from batch_invariant_cuda import columns, rows
    columns._SEGMENT = rows.tl.constexpr(4096)
    columns._DEPTH = rows.tl.constexpr(4)
generator = torch.Generator().manual_seed(0)
failures = []

def draw(*shape):
    x = torch.randn(shape, generator=generator)
    scale = torch.randint(-12, 13, shape, generator=generator)
    return x * torch.exp2(scale.float())

def outputs(name, *args, **kwargs):
    both = []
    for table in (cpu, gpu):
        out = table[name].fn(*args, **kwargs)
        both.append(out if isinstance(out, tuple) else (out,))
    return zip(*both, strict=True)

def bits(label, name, *args):
    for a, b in outputs(name, *args):
        if (found := mismatch(a, b)) is not None:
            failures.append(f"{label}: {found}")

def close(label, name, *args, **kwargs):
    for a, b in outputs(name, *args, **kwargs):
        if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True):
            failures.append(label)

real, unit = row_launch.plan.__wrapped__, row_launch.unit_of
def walked(split):
    return lambda rows, n, *_: row_launch.Plan(0, 1024, 1, False, unit(n), 8, split)

plans = {
    "held": real,
    "held by one warp": lambda rows, n, *how: real(10**6, n, *how),
    "walked": walked(False), "split": walked(True),
}
for how, plan in () if broken else plans.items():
    row_launch.plan = plan
    for n in (1, 65, 1025, 9001) if how != "split" else (9001, 16384):
        x, y, w = draw(2, n), draw(2, n), draw(n)
        for name in ("sum", "mean", "prod", "var"):
            bits(f"{name} {n} {how}", name, x, -1)
        bits(f"norm {n} {how}", "norm", x, 2, -1)
        bits(f"sum {n} {how} fp16", "sum", x.clamp(-60, 60).half(), -1)
        bits(f"rms_norm {n} {how}", "rms_norm", x, w, 1e-6, y, max(1, n // 2))
        bits(f"layer_norm {n} {how}", "layer_norm", x, [n], w, w, 1e-5)
        bits(f"softmax_backward {n} {how}", "softmax_backward", x, y, -1, torch.float32)
        z = x.clamp(-4, 4)
        close(f"softmax {n} {how}", "softmax", z, -1)
        close(f"log_softmax {n} {how}", "log_softmax", x, -1)
        close(f"logsumexp {n} {how}", "logsumexp", x, [-1])
        close(f"log_softmax_backward {n}", "log_softmax_backward", z, z, -1, torch.float32)
if not broken:
    long = row_launch._LONG
    row_launch.plan, row_launch._LONG = walked(False), 1
    x = draw(2, 24592)
    for name in ("sum", "prod"):
        bits(f"{name} in twos", name, x, -1)
    bits("rms_norm on more warps", "rms_norm", x, x[0], 1e-6, x, None)
    row_launch._LONG = long
row_launch.plan = real
bits("group_norm", "group_norm", draw(2, 6, 40), 3, draw(6), draw(6), 1e-5)
bits("columns", "sum", draw(9000, 16), 0)
bits("short columns", "var", draw(2, 37, 20), 1)
bits("cumsum", "cumsum", draw(3, 70), -1)
bits("cumsum of columns", "cumsum", draw(70, 33), 0)
q, k = torch.randn(2, 4, 5, 24, generator=generator), torch.randn(2, 2, 37, 24, generator=generator)
v = torch.randn(2, 2, 37, 24, generator=generator)
mask = torch.rand(2, 1, 5, 37, generator=generator) > 0.4
mask[:, :, :, 3], mask[0, 0, 0] = False, False
v[0, 0, 3] = float("inf")
attend = "scaled_dot_product_attention"
close("attention", attend, q, k, v, mask, 0.0, False, enable_gqa=True)
q[1, 0, 2], q[0, 3, 4, 5] = float("nan"), float("nan")  # two rows whose scores are all NaN
for how, given in {"": None, " and a mask": mask}.items():
    both = list(outputs(attend, q, k, v, given, 0.0, False, enable_gqa=True))
    if not all(torch.equal(a.isnan(), b.isnan()) and bool(a.isnan().any()) for a, b in both):
        failures.append(f"NaN in another place: attention of NaN queries{how}")
    close(f"attention of NaN queries{how}", attend, q, k, v, given, 0.0, False, enable_gqa=True)
q = q.nan_to_num()
close("causal attention", attend, q, k, v[..., :16], None, 0.0, True, enable_gqa=True)
print("\\n".join(failures))
"""


def test_kernels_equal_the_reference_in_the_interpreter() -> None:
    assert printed(_PROGRAM) == []


def test_another_order_is_seen_in_the_interpreter() -> None:
    found = printed(_PROGRAM, "broken")
    assert found
    assert all(line.startswith("columns") for line in found)
