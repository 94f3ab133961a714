"""`explog.near_div` at the quotients that it could round wrongly: all of them, found by arithmetic.

Scaled to [1, 2), what its last FMA rounds is within 2^-46 of the quotient. So only a quotient that
close to the middle of two fp32 numbers is at risk: x 2^k = m d + j for an odd m of 25 bits, a small
j, and k = 25 below 1, 24 from 1 on. Emulated in fp64, since this tests the method and no device.

`explog.share_div` rounds denormal quotients a second time; at risk are those close to the middle of
two of them.
"""

from __future__ import annotations

import torch

FIRST, LAST = 1 << 23, 1 << 24


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c of fp32 numbers, rounded once: the product is exact in fp64, the sum is mended."""
    product, c = a.double() * b.double(), c.double()
    total = product + c
    added = total - product
    lost = (product - (total - added)) + (c - added)
    middle = (total.view(torch.int64) & ((1 << 29) - 1)) == 1 << 28
    other = torch.nextafter(total, lost.sign() * torch.inf)
    return torch.where(middle & (lost != 0), other, total).float()


def inverse(odd: torch.Tensor, bits: int) -> torch.Tensor:
    """1 / odd modulo 2^bits."""
    x = odd
    for _ in range(5):
        x = (x * (2 - odd * x)) & ((1 << bits) - 1)
    return x


def hard(divisors: torch.Tensor, k: int, j: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dividends and divisors with x 2^k = m d + j, m odd and of 25 bits, below 1 if k is 25."""
    zeros = (j & -j).bit_length() - 1  # m is odd, so the divisor has as many
    d = divisors[(divisors & -divisors) == 1 << zeros]
    bits = k - zeros
    m = (-(j >> zeros) * inverse(d >> zeros, bits)) & ((1 << bits) - 1)
    start = 0 if bits == 25 else 1 << 24
    found = []
    for i in range(1 << max(0, 24 - bits)):
        whole = m + start + (i << bits)
        x = (whole * d + j) >> k
        below = x < d if k == 25 else x >= d
        there = (whole >= 1 << 24) & (x >= FIRST) & (x < LAST) & below
        found.append((x[there], d[there]))
    return torch.cat([x for x, _ in found]).float(), torch.cat([d for _, d in found]).float()


def wrong(divisors: torch.Tensor) -> tuple[int, int, int]:
    """Hard quotients tried, and how many are wrong with a correction and without."""
    tried = corrected = plain = 0
    for k in (24, 25):
        for j in (*range(-8, 0), *range(1, 9)):
            x, d = hard(divisors, k, j)
            exact = (x.double() / d.double()).float()
            reciprocal = (1 / d.double()).float()
            q = x * reciprocal
            tried += len(x)
            plain += int((q != exact).sum())
            corrected += int((fma(fma(-q, d, x), reciprocal, q) != exact).sum())
    return tried, corrected, plain


def test_one_correction_of_a_quotient_is_enough() -> None:
    for begin in range(FIRST, LAST, 1 << 20):
        tried, corrected, plain = wrong(torch.arange(begin, begin + (1 << 20)))
        assert corrected == 0
        assert plain > tried / 4 > 0  # the control: these are the hard ones


def near_div(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    reciprocal = (1 / d.double()).float()
    q = x * reciprocal
    return fma(fma(-q, d, x), reciprocal, q)


def share_div(x: torch.Tensor, d: torch.Tensor, mended: bool) -> torch.Tensor:
    tiny = x < 2.0**-60
    x = torch.where(tiny, x * 2.0**64, x)
    q = near_div(x, d)
    left = fma(-q, d, x)
    y = q * 2.0**-64
    off = q - y * 2.0**64
    step = ((off == 2.0**-86) & (left > 0)).int() - ((off == -(2.0**-86)) & (left < 0)).int()
    return torch.where(tiny, (y.view(torch.int32) + step * mended).view(torch.float32), q)


def test_tiny_quotients_are_rounded_once() -> None:
    made = torch.Generator().manual_seed(0)
    d = 1 + torch.rand(1 << 20, generator=made) * 2.0 ** torch.randint(0, 19, (1 << 20,))
    wrong = {True: 0, False: 0}
    for bits in (0, 1, 3, 10, 22, 23):
        grid = torch.randint(1 << bits >> 1, 1 << bits, d.shape, generator=made).double()
        near = ((grid + 0.5) * 2.0**-149 * d.double()).float().view(torch.int32)
        for ulp in range(-3, 4):
            x = (near + ulp).clamp(min=0).view(torch.float32)
            exact = (x.double() / d.double()).float()
            for mended in wrong:
                wrong[mended] += int((share_div(x, d, mended) != exact).sum())
    assert bool(share_div(torch.full_like(d, torch.nan), d, True).isnan().all())
    every = torch.arange(0, 0x3F800001, 1019, dtype=torch.int32).view(torch.float32)
    d = d[: len(every)]
    assert torch.equal(share_div(every, d, True), (every.double() / d.double()).float())
    assert wrong[True] == 0
    assert wrong[False] > 0  # the control
