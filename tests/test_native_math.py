"""exp and log of native/math.h: their accuracy, their special values, and their every step.

Exhaustively, over all 2^32 floats and both x86-64 libraries (run once, outside of this suite): the
largest error is 0.8763 ulp for exp and 0.9229 ulp for log, no special value is wrong, and the two
libraries and a scalar compilation give the same bits for every input. Here a sample is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from native_rows import EXP, LOG, SHORT_EXP, Rows, bits, runnable, same

Tensor = torch.Tensor
LIBRARIES = runnable()
INF, NAN = torch.inf, torch.nan


@pytest.fixture(params=LIBRARIES, ids=lambda rows: rows.name)
def rows(request: pytest.FixtureRequest) -> Rows:
    library: Rows = request.param
    return library


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Long elementwise chains on a busy machine are slower on two threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sample() -> Tensor:
    """A million floats from all over the range, each exponent and sign, and some near edges."""
    spread = torch.arange(-(2**31), 2**31, 4099, dtype=torch.int64).to(torch.int32)
    edges = [0.0, 1.0, -1.0, 88.72284, -87.33655, -103.97208, 0.70710677, 1.1754944e-38, 0.34657359]
    near = torch.tensor(edges).view(torch.int32)[:, None] + torch.arange(-300, 300)
    return torch.cat([spread, near.flatten().to(torch.int32)]).view(torch.float32)


def errors(got: Tensor, exact: Tensor) -> Tensor:
    """|got - exact| in units in the last place of fp32 at `exact`, where both are finite."""
    finite = got.isfinite() & exact.isfinite() & (exact.abs() < 2.0**128)
    got, exact = got[finite].double(), exact[finite]
    exponent = torch.frexp(exact).exponent.clamp(min=-125)
    return (got - exact).abs() / torch.ldexp(torch.ones_like(exact), exponent - 24)


def test_exp_is_accurate(rows: Rows) -> None:
    """Below 0.88 ulp, results that are denormal numbers included."""
    x = sample()
    worst = errors(rows.map(EXP, x), x.double().exp()).max().item()
    assert 0.5 < worst < 0.88


def test_short_exp_is_accurate(rows: Rows) -> None:
    """Below 4.1e-6 of results that are normal numbers, of x that is not above 0."""
    x = sample()
    x = x[(x <= 0) & (x >= -87)]
    exact = x.double().exp()
    worst = ((rows.map(SHORT_EXP, x).double() - exact).abs() / exact).max().item()
    assert 2e-6 < worst < 4.1e-6


def test_log_is_accurate(rows: Rows) -> None:
    """Below 0.93 ulp, denormal inputs included."""
    x = sample()
    x = x[x > 0]
    worst = errors(rows.map(LOG, x), x.double().log()).max().item()
    assert 0.5 < worst < 0.93


def test_the_measure_of_errors_sees_one_ulp() -> None:
    """Negative control: results moved by one ulp are outside of the bounds above."""
    x = torch.linspace(-80, 80, 10_000)
    moved = (bits(x.double().exp().float()) + 1).view(torch.float32)
    assert errors(moved, x.double().exp()).max() > 1.4


def test_special_values(rows: Rows) -> None:
    """Overflow, underflow, zeros, infinities and NaN."""
    x = torch.tensor([0.0, -0.0, INF, -INF, 88.73, -104.0, -1e30, 3e38, -103.9])
    want = torch.tensor([1.0, 1.0, INF, 0.0, INF, 0.0, 0.0, INF, 2.0**-149])
    assert same(rows.map(EXP, x), want)
    x = torch.tensor([1.0, 0.0, -0.0, INF])
    assert same(rows.map(LOG, x), torch.tensor([0.0, -INF, -INF, INF]))
    assert rows.map(LOG, torch.tensor([-1.0, -INF, NAN, -1e-45])).isnan().all()
    assert rows.map(EXP, torch.tensor([NAN, -NAN])).isnan().all()
    x = torch.tensor([0.0, -0.0, -INF, -104.0, -1e30, -103.9])
    assert same(rows.map(SHORT_EXP, x), torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 2.0**-149]))
    assert rows.map(SHORT_EXP, torch.tensor([NAN, -NAN])).isnan().all()
    # The largest argument with a finite exponential, and the first that overflows.
    last = torch.tensor([0x42B17217, 0x42B17218], dtype=torch.int32).view(torch.float32)
    assert rows.map(EXP, last).isfinite().tolist() == [True, False]


def test_every_library_and_position_agrees() -> None:
    """The same bits at both vector widths, at any place in a vector, and on two threads."""
    whole = sample()
    for op in (EXP, LOG, SHORT_EXP):
        x = whole.clamp(max=0) if op == SHORT_EXP else whole
        finite = ~x.isnan()
        want = LIBRARIES[0].map(op, x)
        for library in LIBRARIES:
            for threads in (1, 2):
                got = library.with_threads(threads).map(op, x)
                agree = (bits(got) == bits(want)) | (got.isnan() & want.isnan())
                assert agree.all(), f"{library.name} {threads} threads"
                assert got[finite & (x > 0)].isnan().sum() == 0
            for start in range(1, 17):
                part = library.map(op, x[start : start + 33])
                w = want[start : start + 33]
                assert (bits(part)[~w.isnan()] == bits(w)[~w.isnan()]).all()


# The steps of math.h once more, in float64 arithmetic that rounds exactly as fp32 would.
def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """fp32 fused multiply-add.

    The product is exact in float64. The sum is rounded to odd there, so that rounding it again to
    fp32 gives what rounding once would.
    """
    product = a.double() * torch.as_tensor(b).double()
    addend = torch.as_tensor(c).double().expand(product.shape)
    total = product + addend
    kept = total - product
    lost = (product - (total - kept)) + (addend - kept)
    inexact = (lost != 0) & total.isfinite() & (total.view(torch.int64) % 2 == 0)
    # Towards the lost part: up in magnitude if it has the sign of the total, else down.
    step = torch.where((lost > 0) == (total > 0), 1, -1)
    odd = (total.view(torch.int64) + torch.where(inexact, step, 0)).view(torch.float64)
    return odd.float()


EXP_COEFFICIENTS = "0x1.6a241ap-10 0x1.1239ccp-7 0x1.5558d2p-5 0x1.555492p-3 0x1.fffffcp-2".split()
SHORT_EXP_COEFFICIENTS = "0x1.3a02c0p-7 0x1.c9fc80p-5 0x1.ec0376p-3 0x1.62e12cp-1 1".split()
LOG_COEFFICIENTS = (
    "-0x1.38b512p-4 0x1.0565aep-3 -0x1.0d8a60p-3 0x1.22d95cp-3 "
    "-0x1.5471cep-3 0x1.99a010p-3 -0x1.000228p-2 0x1.555554p-2"
).split()


def horner(x: Tensor, coefficients: list[str]) -> Tensor:
    total = torch.full_like(x, float.fromhex(coefficients[0]))
    for c in coefficients[1:]:
        total = fma(total, x, float.fromhex(c))
    return total


def exp_by_steps(x: Tensor, coefficients: list[str] = EXP_COEFFICIENTS) -> Tensor:
    x = x.clamp(-104, 89)
    n = fma(x, float.fromhex("0x1.715476p+0"), 12582912.0) - 12582912.0
    high = fma(n, -float.fromhex("0x1.62e430p-1"), x)
    low = n * float.fromhex("0x1.05c610p-29")
    r = high + low
    power = high + fma(r * r, horner(r, coefficients), low) + 1
    return torch.ldexp(power.double(), n.int()).float()


def short_exp_by_steps(x: Tensor, coefficients: list[str] = SHORT_EXP_COEFFICIENTS) -> Tensor:
    x = x.clamp(min=-104)
    log2_e = float.fromhex("0x1.715476p+0")
    n = fma(x, log2_e, 12582912.0) - 12582912.0
    power = horner(fma(x, log2_e, -n), coefficients)
    return torch.ldexp(power.double(), n.int()).float()


def log_by_steps(x: Tensor, coefficients: list[str] = LOG_COEFFICIENTS) -> Tensor:
    tiny = x < 2.0**-126
    whole = torch.where(tiny, x * 2.0**23, x).view(torch.int32)
    exponent = (whole - 0x3F3504F3) >> 23
    f = (whole - (exponent << 23)).view(torch.float32) - 1
    k = torch.where(tiny, exponent - 23, exponent).float()
    rest = f * f * fma(horner(f, coefficients), f, -0.5)
    low = f + fma(k, float.fromhex("0x1.7f7d1cp-20"), rest)
    return fma(k, float.fromhex("0x1.62e4p-1"), low)


STEPS = pytest.mark.parametrize(
    ("op", "by_steps", "coefficients"),
    [
        (EXP, exp_by_steps, EXP_COEFFICIENTS),
        (LOG, log_by_steps, LOG_COEFFICIENTS),
        (SHORT_EXP, short_exp_by_steps, SHORT_EXP_COEFFICIENTS),
    ],
    ids=["exp", "log", "short_exp"],
)


def arguments(op: int) -> Tensor:
    x = sample()
    domain = {LOG: x > 0, SHORT_EXP: x <= 0}.get(op, x == x)
    return x[x.isfinite() & domain]


@STEPS
def test_the_steps_give_the_bits(
    rows: Rows, op: int, by_steps: Callable[..., Tensor], coefficients: list[str]
) -> None:
    """What math.h says is what it does."""
    x = arguments(op)
    assert same(rows.map(op, x), by_steps(x, coefficients))


@STEPS
def test_another_polynomial_is_told_apart(
    op: int, by_steps: Callable[..., Tensor], coefficients: list[str]
) -> None:
    """Negative control: a coefficient that is off by a thousandth shows in the bits."""
    x = arguments(op)[::8]
    want = LIBRARIES[0].map(op, x)
    for i, c in enumerate(coefficients):
        moved = (float.fromhex(c) * (1 + 2.0**-10)).hex()
        changed = by_steps(x, [*coefficients[:i], moved, *coefficients[i + 1 :]])
        assert not same(want, changed), f"coefficient {i}"


def test_fma_rounds_once() -> None:
    """The float64 emulation above is not a product and a sum, rounded twice."""
    one = torch.tensor([1 + 2.0**-12])
    assert fma(one, one, -1 - 2.0**-11).item() == 2.0**-24
    # Exactly between two floats but for 2^-70: float64 alone would round it to even.
    between = torch.tensor([1 + 2.0**-24], dtype=torch.float64)
    assert fma(torch.tensor([2.0**-35]), 2.0**-35, between).item() == 1 + 2.0**-23
