"""The Triton kernels in Triton's interpreter on a CPU: indexing, masks and order, not a chip's
bits.

Run by test_interpreter.py in a process of its own, since TRITON_INTERPRET is read at import. bf16
is left out: the interpreter multiplies it wrongly.
"""

from __future__ import annotations

import torch

from batch_invariant.ops.row_order import lane_sum
from batch_invariant_ascend import gemm, row_kernels

_generator = torch.Generator().manual_seed(9)


def _whole(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Small whole numbers: their sums are exact in any order, here NumPy's."""
    return torch.randint(-8, 8, shape, generator=_generator).to(dtype)


def products() -> None:
    """Every output has all of its terms, and only those, at any size, layout and company."""
    for dtype in (torch.float32, torch.float16):
        for k, n, transposed in ((130, 70, True), (64, 129, False), (1, 1, False), (200, 3, True)):
            a, w = _whole(131, k, dtype=dtype), _whole(n, k, dtype=dtype)
            b = w.mT if transposed else w.mT.contiguous()
            exact = (a.double() @ b.double()).float()
            assert torch.equal(gemm.product(a, b, torch.float32), exact), (dtype, k, n)
            assert torch.equal(gemm.product(a, b, dtype), exact.to(dtype)), (dtype, k, n)
            for first, last in ((0, 1), (127, 131), (40, 73)):
                part = gemm.product(a[first:last], b, torch.float32)
                assert torch.equal(part, exact[first:last]), (dtype, k, n, first)
            spoilt = a.clone()
            spoilt[1:] = torch.nan
            assert torch.equal(gemm.product(spoilt, b, torch.float32)[0], exact[0])
            strided = a.mT.contiguous().mT
            assert torch.equal(gemm.product(strided, b, torch.float32), exact)
    left, right = _whole(3, 5, 66, dtype=torch.float32), _whole(3, 66, 7, dtype=torch.float32)
    assert torch.equal(gemm.product(left, right, torch.float32), left @ right)
    # 4096 and then ones: a sum in fp16 would stay at 4096, since its unit there is 4.
    x = torch.ones(2, 600, dtype=torch.float16)
    x[:, 0] = 64
    assert gemm.product(x, x.mT, torch.float32).tolist() == [[4695.0] * 2] * 2


def rows() -> None:
    """The order is that of `row_order`, bit for bit; rows do not see each other."""
    row_kernels._PROGRAMS = 2  # each walks several rows
    for n in (1, 7, 1024, 1025, 8193):
        x = torch.randn(5, n, generator=_generator) * 2.0 ** torch.randint(
            -20, 20, (5, n), generator=_generator
        )
        found = row_kernels.row_sum(x)
        assert torch.equal(found, lane_sum(x)), n
        assert torch.equal(row_kernels.row_sum(x[3:4].contiguous()), found[3:4])
    spoilt = x.clone()
    spoilt[0, 0] = torch.nan
    assert torch.equal(row_kernels.row_sum(spoilt)[1:], found[1:])
    assert row_kernels.row_sum(spoilt)[0].isnan()
    for n in (1, 1000, 2049):
        x = torch.randn(5, n, generator=_generator)
        w = torch.randn(n, generator=_generator)
        for weight in (None, w):
            y, rstd = row_kernels.rms_norm(x, weight, 1e-5)
            exact = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-5).sqrt()
            exact = exact if weight is None else exact * weight
            torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)
            one, one_rstd = row_kernels.rms_norm(x[4:].contiguous(), weight, 1e-5)
            assert torch.equal(one, y[4:])
            assert torch.equal(one_rstd, rstd[4:])
        y = row_kernels.softmax(x)
        torch.testing.assert_close(y.double(), x.double().softmax(1), rtol=1e-5, atol=1e-9)
        assert torch.equal(row_kernels.softmax(x[4:].contiguous()), y[4:])
    x[0, 0] = torch.nan
    assert row_kernels.softmax(x)[0].isnan().all()
    assert not row_kernels.softmax(x)[1:].isnan().any()


if __name__ == "__main__":
    products()
    rows()
    print("the interpreter agrees")
