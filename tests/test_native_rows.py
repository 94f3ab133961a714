"""The native row operations: one order everywhere, no influence of the batch, accuracy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from batch_invariant.ops import row_order
from batch_invariant.ops.row_order import lane_prod, lane_sum
from native_rows import (
    CODE,
    EXP,
    LARGEST,
    LOG,
    LOG_SOFTMAX,
    MEAN,
    NORM0,
    NORM1,
    NORM2,
    NORM_INF,
    NORM_NEG_INF,
    PROD,
    SHORT_EXP,
    SMALLEST,
    SOFTMAX,
    SUM,
    Rows,
    bits,
    runnable,
    same,
)

Tensor = torch.Tensor
LIBRARIES = runnable()
LOW = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *LOW]
INF, NAN = math.inf, math.nan
KINDS = ["normal", "cancelling", "denormal"]


@pytest.fixture(params=LIBRARIES, ids=lambda rows: rows.name)
def rows(request: pytest.FixtureRequest) -> Rows:
    library: Rows = request.param
    return library


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def data(kind: str, count: int, n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + n)
    x = torch.randn(count, n, generator=generator)
    if kind == "denormal":
        x = x * (2.0**-22 if dtype is torch.float16 else 2.0**-132)
    if kind == "cancelling" and n >= 4:
        # What is added between a huge number and its negative is rounded to the huge one's unit,
        # so that the order of the additions shows in every sum, in low precision too.
        huge = 2.0**12 if dtype is torch.float16 else 2.0**20
        for row in range(count):
            first, second = torch.randperm(n, generator=generator)[:2]
            x[row, first], x[row, second] = huge, -huge
    return x.to(dtype)


# Every operation as a function of one matrix alone: other operands are made from its own rows.
def _other(x: Tensor) -> Tensor:
    return (x.flip(1) * 0.5).to(x.dtype)


def _weights(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(x.shape[1])
    weight, bias = torch.randn(2, x.shape[1], generator=generator)
    return weight.to(dtype or x.dtype), bias.to(dtype or x.dtype)


def _rms_norm(rows: Rows, x: Tensor) -> tuple[Tensor, ...]:
    return rows.rms_norm(x, _weights(x)[0], residual=_other(x), variance_size=(x.shape[1] + 1) // 2)


def _layer_norm(rows: Rows, x: Tensor) -> tuple[Tensor, ...]:
    return rows.layer_norm(x, *_weights(x, torch.float32))


def _group_norm(rows: Rows, x: Tensor) -> tuple[Tensor, ...]:
    return rows.layer_norm(x, *_weights(x), spatial=1, groups=1)


def _layer_norm_backward(rows: Rows, x: Tensor) -> Tensor:
    _, mean, rstd = rows.layer_norm(x)
    return rows.norm_backward(_other(x), x, mean, rstd, _weights(x)[0])


def _rms_norm_backward(rows: Rows, x: Tensor) -> Tensor:
    size = (x.shape[1] + 1) // 2
    _, _, rstd = rows.rms_norm(x, residual=_other(x), variance_size=size)
    return rows.norm_backward(
        _other(x), x, None, rstd, _weights(x)[0], residual=_other(x), variance_size=size
    )


Operation = Callable[[Rows, Tensor], Tensor | tuple[Tensor, ...]]
OPERATIONS: dict[str, Operation] = {
    "sum": lambda rows, x: rows.reduce(SUM, x),
    "sum in fp32": lambda rows, x: rows.reduce(SUM, x, torch.float32),
    "mean": lambda rows, x: rows.reduce(MEAN, x),
    "prod": lambda rows, x: rows.reduce(PROD, x),
    "norm 0": lambda rows, x: rows.reduce(NORM0, x),
    "norm 1": lambda rows, x: rows.reduce(NORM1, x),
    "norm 2": lambda rows, x: rows.reduce(NORM2, x),
    "norm inf": lambda rows, x: rows.reduce(NORM_INF, x),
    "norm -inf": lambda rows, x: rows.reduce(NORM_NEG_INF, x),
    "var": lambda rows, x: rows.var(x),
    "std": lambda rows, x: rows.var(x, root=True),
    "softmax": lambda rows, x: rows.softmax(SOFTMAX, x),
    "softmax in fp32": lambda rows, x: rows.softmax(SOFTMAX, x, torch.float32),
    "log_softmax": lambda rows, x: rows.softmax(LOG_SOFTMAX, x),
    "logsumexp": lambda rows, x: rows.logsumexp(x),
    "softmax_backward": lambda rows, x: rows.softmax_backward(SOFTMAX, x, _other(x)),
    "log_softmax_backward": lambda rows, x: rows.softmax_backward(LOG_SOFTMAX, x, _other(x)),
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "rms_norm_backward": _rms_norm_backward,
    "layer_norm_backward": _layer_norm_backward,
    "cumsum": lambda rows, x: rows.cumsum(x),
    "argmax": lambda rows, x: rows.argmax(LARGEST, x),
    "argmin": lambda rows, x: rows.argmax(SMALLEST, x),
    "topk": lambda rows, x: rows.topk(LARGEST, x, (x.shape[1] + 2) // 3),
    "topk smallest": lambda rows, x: rows.topk(SMALLEST, x, min(x.shape[1], 5)),
}


def results(operation: Operation, rows: Rows, x: Tensor) -> tuple[Tensor, ...]:
    out = operation(rows, x)
    return out if isinstance(out, tuple) else (out,)


def placed(x: Tensor, offset: int, gap: int) -> Tensor:
    """The same matrix at another alignment, with `gap` foreign elements between its rows."""
    count, n = x.shape
    buffer = torch.full((offset + count * (n + gap),), NAN, dtype=x.dtype)
    view = buffer[offset:].view(count, n + gap)[:, :n]
    view.copy_(x)
    return view


def dependence(operation: Operation, x: Tensor) -> str | None:
    """What the bits of a row depend on besides the row, or None."""
    want = results(operation, LIBRARIES[0], x)
    for library in LIBRARIES:
        for threads in (1, 2):
            got = results(operation, library.with_threads(threads), x)
            if not all(map(same, got, want)):
                return f"{library.name} with {threads} threads"
    for row in range(len(x)):
        alone = results(operation, LIBRARIES[-1], placed(x[row : row + 1], row + 1, 0))
        if not all(same(a[0], w[row]) for a, w in zip(alone, want, strict=True)):
            return f"the batch, at row {row}"
    for bad in (NAN, INF, -INF):
        spoilt = placed(x, 1, 3)
        spoilt[::2] = bad
        got = results(operation, LIBRARIES[-1].with_threads(2), spoilt)
        if not all(same(g[1::2], w[1::2]) for g, w in zip(got, want, strict=True)):
            return f"neighbours that hold {bad}"
    return None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_row_depends_on_nothing_else(name: str, dtype: torch.dtype) -> None:
    """Population, position, neighbours, alignment, threads and vector width, bit for bit."""
    for n in (1, 2, 15, 16, 33, 576, 1030, 8195):
        for kind in KINDS[:2]:
            x = data(kind, 5, n, dtype)
            found = dependence(OPERATIONS[name], x)
            assert found is None, f"{name} {dtype} n={n} {kind}: bits depend on {found}"


@pytest.mark.parametrize("name", ["sum", "mean", "prod", "norm 2", "var", "softmax", "cumsum"])
def test_long_rows_on_two_threads(name: str) -> None:
    """Few long rows are cut in segments between the threads: the same bits as on one."""
    x = data("cancelling", 1, 151_936, torch.float32)
    x = x * 0.01 + 1 if name == "prod" else x
    want = results(OPERATIONS[name], LIBRARIES[0], x)
    for library in LIBRARIES:
        got = results(OPERATIONS[name], library.with_threads(2), x)
        assert all(map(same, got, want)), f"{name} on two threads of {library.name}"


def test_a_dependence_on_the_batch_is_found() -> None:
    """Negative control: operations with a planted dependence do not pass the check above."""
    x = data("cancelling", 6, 1030, torch.float32)

    # Not a flip: folding by halves is the same tree when a row is reversed or rotated.
    shuffled = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))

    def by_population(rows: Rows, x: Tensor) -> Tensor:
        return rows.reduce(SUM, x if len(x) % 2 else x[:, shuffled])

    def by_neighbours(rows: Rows, x: Tensor) -> Tensor:
        return rows.reduce(SUM, x + 0 * x.roll(1, 0))

    def by_threads(rows: Rows, x: Tensor) -> Tensor:
        return rows.reduce(SUM, x if rows.threads == 1 else x[:, shuffled])

    assert dependence(by_population, x) == "the batch, at row 0"
    assert dependence(by_neighbours, x) == "neighbours that hold nan"
    assert "2 threads" in str(dependence(by_threads, x))
    assert dependence(OPERATIONS["sum"], x) is None


LENGTHS = [*range(71), *range(1000, 1031, 5), 1023, 1024, 2048, 4096, 8191, 8192, 8193, 20_000]


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_that_of_row_order(rows: Rows, kind: str) -> None:
    """Bit for bit the definition in plain torch, for sums and products of every length."""
    two = rows.with_threads(2)
    for n in [*LENGTHS, 151_936]:
        for dtype in DTYPES:
            x = data(kind, 1 if n > 100_000 else 3, n, dtype)
            got = [r.reduce(SUM, x, torch.float32) for r in (rows, two)]
            want = lane_sum(x)
            assert all(same(g, want) for g in got), f"sum of {n} {kind} {dtype}"
            assert same(rows.reduce(SUM, x), want.to(dtype)), f"rounded sum of {n} {kind} {dtype}"
            factors = (1 + x.float().clamp(-2, 2) / 64).to(dtype)
            assert same(rows.reduce(PROD, factors, torch.float32), lane_prod(factors)), (
                f"product of {n} {kind} {dtype}"
            )


def test_another_order_is_told_apart(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: half the lanes, half the segment, or torch's order have other bits."""
    x = data("cancelling", 64, 20_000, torch.float32)
    ours = rows.reduce(SUM, x)
    assert same(ours, lane_sum(x))

    def differing(other: Tensor) -> float:
        return (bits(ours) != bits(other)).float().mean().item()

    assert differing(x.sum(1)) > 0.5
    with monkeypatch.context() as patch:
        patch.setattr(row_order, "LANES", row_order.LANES // 2)
        assert differing(lane_sum(x)) > 0.5
    with monkeypatch.context() as patch:
        patch.setattr(row_order, "SEGMENT", row_order.SEGMENT // 2)
        assert differing(lane_sum(x)) > 0.5


def test_zeros_and_nan_of_sums(rows: Rows) -> None:
    """A sum of nothing or of negative zeros is +0.0; a NaN is the one NaN, whatever went in."""
    for n in (0, 1, 16, 17, 1024, 1025, 9000):
        assert same(rows.reduce(SUM, torch.full((2, n), -0.0)), torch.zeros(2))
    for n in (1, 40, 9000):
        x = torch.zeros(2, n)
        x[0, n // 2] = INF
        x[0, 0] = -INF if n > 1 else NAN
        x.view(torch.int32)[1, -1] = -1  # a negative NaN with every payload bit set
        canonical = torch.tensor([0x7FC00000], dtype=torch.int32)
        assert torch.equal(bits(rows.reduce(SUM, x)), canonical.expand(2))
        assert torch.equal(bits(lane_sum(x)), canonical.expand(2))


# The definitions of native/rows.h in plain torch, on fp32, with our own exp and log.
def _exp(x: Tensor) -> Tensor:
    return LIBRARIES[0].map(EXP, x)


def _short_exp(x: Tensor) -> Tensor:
    return LIBRARIES[0].map(SHORT_EXP, x)


def _log(x: Tensor) -> Tensor:
    return LIBRARIES[0].map(LOG, x)


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded, which torch's own fp32 sqrt is not everywhere."""
    return x.double().sqrt().float()


def _column(x: Tensor) -> Tensor:
    return x[:, None]


def _mean(x: Tensor) -> Tensor:
    return lane_sum(x) / x.shape[1]


def define_var(x: Tensor) -> Tensor:
    d = x - _column(_mean(x))
    return lane_sum(d * d) / (x.shape[1] - 1)


def define_softmax(x: Tensor, dtype: torch.dtype) -> Tensor:
    shifted = x - x.amax(1, keepdim=True)
    if dtype == torch.float32:
        e = _exp(shifted)
        return e / _column(lane_sum(e))
    e = _short_exp(shifted)
    return e * (1 / _column(lane_sum(e)))


def define_log_softmax(x: Tensor, dtype: torch.dtype) -> Tensor:
    shifted = x - x.amax(1, keepdim=True)
    e = _exp(shifted) if dtype == torch.float32 else _short_exp(shifted)
    return shifted - _column(_log(lane_sum(e)))


def define_logsumexp(x: Tensor) -> Tensor:
    top = x.amax(1)
    return top + _log(lane_sum(_exp(x - _column(top))))


def define_rms_norm(
    x: Tensor, weight: Tensor, other: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    s = x + other
    r = 1 / _sqrt(lane_sum(s[:, :size] * s[:, :size]) / size + 1e-5)
    return s * _column(r) * weight, s, r


def define_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = _mean(x)
    d = x - _column(mean)
    r = 1 / _sqrt(lane_sum(d * d) / x.shape[1] + 1e-5)
    return d * _column(r) * weight + bias, mean, r


def define_cumsum(x: Tensor) -> Tensor:
    total = torch.zeros(len(x))
    out = torch.empty(x.shape)
    for i in range(x.shape[1]):
        total = total + x[:, i]
        out[:, i] = total
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_the_definitions(rows: Rows, kind: str, dtype: torch.dtype) -> None:
    """Every operation equals its definition, written in plain torch, bit for bit."""
    for n in (2, 17, 1029, 8200):
        low = data(kind, 3, n, dtype)
        x = low.float()
        other, weight, bias = _other(low), *_weights(low)
        o, w, b = other.float(), weight.float(), bias.float()
        size = (n + 1) // 2
        mean = _mean(x)
        expected: list[tuple[str, Tensor, Tensor]] = [
            ("mean", rows.reduce(MEAN, low), mean),
            ("norm 0", rows.reduce(NORM0, low), lane_sum((x != 0).float())),
            ("norm 1", rows.reduce(NORM1, low), lane_sum(x.abs())),
            ("norm 2", rows.reduce(NORM2, low), _sqrt(lane_sum(x * x))),
            ("norm inf", rows.reduce(NORM_INF, low), x.abs().amax(1)),
            ("norm -inf", rows.reduce(NORM_NEG_INF, low), x.abs().amin(1)),
            ("var", rows.var(low)[0], define_var(x)),
            ("var's mean", rows.var(low)[1], mean),
            ("std", rows.var(low, root=True)[0], _sqrt(define_var(x))),
            ("softmax", rows.softmax(SOFTMAX, low), define_softmax(x, dtype)),
            ("log_softmax", rows.softmax(LOG_SOFTMAX, low), define_log_softmax(x, dtype)),
            ("logsumexp", rows.logsumexp(low), define_logsumexp(x)),
            (
                "softmax_backward",
                rows.softmax_backward(SOFTMAX, low, other),
                (x - _column(lane_sum(x * o))) * o,
            ),
            (
                "log_softmax_backward",
                rows.softmax_backward(LOG_SOFTMAX, low, other),
                x - _exp(o) * _column(lane_sum(x)),
            ),
        ]
        y, s, r = rows.rms_norm(low, weight, residual=other, variance_size=size)
        want_y, want_s, want_r = define_rms_norm(x, w, o, size)
        assert same(r, want_r)
        h, c = o * w, want_s * _column(want_r)
        projection = _column(lane_sum(h * c) / size)
        back = torch.cat([(h - c * projection)[:, :size], h[:, size:]], 1) * _column(want_r)
        expected += [
            ("rms_norm", y, want_y),
            ("rms_norm's residual", s, want_s),
            (
                "rms_norm_backward",
                rows.norm_backward(other, low, None, r, weight, residual=other, variance_size=size),
                back,
            ),
        ]
        y, m, r = rows.layer_norm(low, weight, bias)
        want_y, want_m, want_r = define_layer_norm(x, w, b)
        assert same(m, want_m)
        assert same(r, want_r)
        c = (x - _column(m)) * _column(r)
        back = (h - _column(_mean(h)) - c * _column(_mean(h * c))) * _column(r)
        expected += [
            ("layer_norm", y, want_y),
            ("layer_norm_backward", rows.norm_backward(other, low, m, r, weight), back),
        ]
        if n < 2000:
            expected.append(("cumsum", rows.cumsum(low), define_cumsum(x)))
        for name, got, want in expected:
            assert same(got, want.to(dtype)), f"{name} {dtype} n={n} {kind}"
        for op, define in ((SOFTMAX, define_softmax), (LOG_SOFTMAX, define_log_softmax)):
            assert same(rows.softmax(op, low, torch.float32), define(x, torch.float32))


def test_gradients_are_those_of_autograd(rows: Rows) -> None:
    """The backward formulas against torch's derivatives in float64."""
    for n in (7, 1030):
        low = data("normal", 4, n, torch.float32)
        g, other = data("normal", 4, n, torch.float32, seed=1), _other(low)
        weight, bias = _weights(low)
        size = (n + 1) // 2
        x = low.double().requires_grad_()
        w, b = weight.double(), bias.double()

        def check(got: Tensor, out: Tensor, g: Tensor = g, x: Tensor = x) -> None:
            (want,) = torch.autograd.grad(out, x, g.double())
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)

        for op, function in ((SOFTMAX, torch.softmax), (LOG_SOFTMAX, torch.log_softmax)):
            check(rows.softmax_backward(op, g, rows.softmax(op, low)), function(x, 1))
        _, mean, rstd = rows.layer_norm(low, weight, bias)
        out = torch.nn.functional.layer_norm(x, (n,), w, b)
        check(rows.norm_backward(g, low, mean, rstd, weight), out)
        _, _, rstd = rows.rms_norm(low, weight, residual=other, variance_size=size)
        total = x + other.double()
        out = total / (total[:, :size].square().mean(1, keepdim=True) + 1e-5).sqrt() * w
        got = rows.norm_backward(g, low, None, rstd, weight, residual=other, variance_size=size)
        check(got, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_norm_spreads_its_weights(rows: Rows, dtype: torch.dtype) -> None:
    """Each channel has one weight and bias over its positions, and groups have their own."""
    batch, groups, channels, spatial = 3, 4, 5, 7
    x = data("normal", batch * groups, channels * spatial, dtype)
    weight, bias = (p[: groups * channels] for p in _weights(torch.empty(1, 64, dtype=dtype)))
    got, _, _ = rows.layer_norm(x, weight, bias, spatial=spatial, groups=groups)

    def spread(p: Tensor) -> Tensor:
        return p.float().repeat_interleave(spatial).view(groups, -1).repeat(batch, 1)

    want, _, _ = define_layer_norm(x.float(), spread(weight), spread(bias))
    assert same(got, want.to(dtype))
    shaped = x.view(batch, groups * channels, spatial)
    torch.testing.assert_close(
        got.view(shaped.shape), torch.nn.functional.group_norm(shaped, groups, weight, bias)
    )


def test_results_are_accurate(rows: Rows) -> None:
    """Against float64, in units of 2^-24: the depth of the tree bounds the error of a sum."""
    unit = 2.0**-24
    for n in (100, 1024, 8192, 50_000):
        x = data("normal", 16, n, torch.float32)
        exact = x.double()
        depth = min(n, row_order.SEGMENT) / row_order.LANES + n / row_order.SEGMENT + 12

        def within(got: Tensor, want: Tensor, bound: Tensor, what: str, n: int = n) -> None:
            worst = ((got.double() - want).abs() / bound).max().item()
            assert worst <= 1, f"{what} n={n}: {worst} of the allowed error"

        magnitude = exact.abs().sum(1)
        within(rows.reduce(SUM, x), exact.sum(1), depth * unit * magnitude, "sum")
        within(rows.reduce(MEAN, x), exact.mean(1), (depth + 1) * unit * magnitude / n, "mean")
        norm = exact.square().sum(1).sqrt()
        within(rows.reduce(NORM2, x), norm, depth * unit * norm, "norm")
        variance = exact.var(1)
        within(rows.var(x)[0], variance, (depth + 3) * unit * variance, "var")
        soft = exact.softmax(1)
        within(rows.softmax(SOFTMAX, x), soft, (depth + 10) * unit * soft, "softmax")
        log_soft = exact.log_softmax(1)
        bound = (depth + 4) * unit * (1 + log_soft.abs())
        within(rows.softmax(LOG_SOFTMAX, x), log_soft, bound, "log_softmax")
        lse = exact.logsumexp(1)
        within(rows.logsumexp(x), lse, (depth + 4) * unit * (1 + lse.abs()), "logsumexp")
        normed = exact / (exact.square().mean(1, keepdim=True) + 1e-5).sqrt()
        within(rows.rms_norm(x)[0], normed, (depth + 5) * unit * normed.abs(), "rms_norm")
        deviation = (exact.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        centred = exact - exact.mean(1, keepdim=True)
        bound = (depth + 5) * unit * (1 + (centred / deviation).abs())
        within(rows.layer_norm(x)[0], centred / deviation, bound, "layer_norm")
        within(rows.cumsum(x), exact.cumsum(1), n * unit * exact.abs().cumsum(1), "cumsum")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_are_torchs(rows: Rows, dtype: torch.dtype) -> None:
    """Rows of infinities, NaN and nothing give what torch gives."""
    special = torch.tensor(
        [
            [-INF, -INF, -INF, -INF, -INF],
            [INF, 1, 2, 3, 4],
            [INF, INF, -INF, 0, 0],
            [-INF, 1, 2, -INF, 4],
            [NAN, 1, 2, 3, 4],
            [NAN, INF, -INF, 0, -0.0],
            [0, -0.0, 0, -0.0, 0],
            [65504, 65504, 3, 2, 1],
            [-1, -2, -3, -1, -2],
        ],
        dtype=dtype,
    )

    def check(got: Tensor, want: Tensor, what: str) -> None:
        # Torch's own fp16 log_softmax is off by 2 ulp.
        tolerances = {"rtol": 3e-3, "atol": 1e-3} if dtype is torch.float16 else {}
        torch.testing.assert_close(
            got, want, equal_nan=True, msg=lambda m: f"{what}: {m}", **tolerances
        )

    for x in (special, special.repeat(1, 30), special[:, :1], special[:, :0]):
        check(rows.reduce(SUM, x), x.sum(1), "sum")
        check(rows.reduce(PROD, x), x.prod(1), "prod")
        check(rows.softmax(SOFTMAX, x), x.softmax(1), "softmax")
        check(rows.softmax(LOG_SOFTMAX, x), x.log_softmax(1), "log_softmax")
        check(rows.logsumexp(x), x.logsumexp(1), "logsumexp")
        check(rows.reduce(NORM0, x), torch.linalg.vector_norm(x, 0, 1), "norm 0")
        check(rows.reduce(NORM1, x), torch.linalg.vector_norm(x, 1, 1), "norm 1")
        check(rows.cumsum(x), x.cumsum(1), "cumsum")
        check(rows.reduce(MEAN, x), x.mean(1), "mean")
        if x.shape[1]:
            check(rows.reduce(NORM_INF, x), torch.linalg.vector_norm(x, INF, 1), "norm inf")
            check(rows.reduce(NORM_NEG_INF, x), torch.linalg.vector_norm(x, -INF, 1), "norm -inf")
            assert torch.equal(rows.argmax(LARGEST, x), x.argmax(1))
            assert torch.equal(rows.argmax(SMALLEST, x), x.argmin(1))
        for correction in (0, 1, 2, 0.5, 7):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*degrees of freedom is <= 0")
                want = x.var(1, correction=correction)
            if dtype is torch.float16:
                # The squares of 65504 overflow on the way only for torch or only for us.
                check(rows.var(x, correction)[0][:7], want[:7], f"var {correction}")
            else:
                check(rows.var(x, correction)[0], want, f"var {correction}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_takes_the_lowest_index_first(rows: Rows, dtype: torch.dtype) -> None:
    """Against a stable sort by (value, index), with many ties, zeros of both signs and NaN."""
    generator = torch.Generator().manual_seed(3)
    pool = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 2.5, 1e-6, -3.0], dtype=dtype)
    for n in (1, 7, 40, 300, 1025):
        x = pool[torch.randint(len(pool), (4, n), generator=generator)]
        for op, descending in ((LARGEST, True), (SMALLEST, False)):
            want = x.sort(dim=1, descending=descending, stable=True)
            for k in {0, 1, n // 2, n}:
                values, indices = rows.topk(op, x, k)
                assert torch.equal(indices, want.indices[:, :k]), f"n={n} k={k} {descending}"
                # Gathered as integers: torch's gather rewrites NaNs of bf16.
                assert torch.equal(bits(values), bits(x).gather(1, indices)), f"values, n={n} k={k}"
        first_nan = torch.isnan(x).long().argmax(1)
        has_nan = torch.isnan(x).any(1)
        for op, descending in ((LARGEST, True), (SMALLEST, False)):
            sorted_first = x.sort(dim=1, descending=descending, stable=True).indices[:, 0]
            want_index = torch.where(has_nan, first_nan, sorted_first)
            assert torch.equal(rows.argmax(op, x), want_index), f"n={n} {descending}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_the_output_is_written(rows: Rows, dtype: torch.dtype) -> None:
    """Whatever the length of a row, memory before and after the output keeps its bits.

    Not an idle check: clang 22 compiled a masked store of one 16-bit lane to a store of four bytes.
    """
    for n in (*range(1, 35), 1030):
        x = data("normal", 3, n, dtype)
        for result, call in {
            (3,): lambda out, x=x, n=n: rows.call(
                "bi_row_reduce", SUM, CODE[dtype], CODE[dtype], 3, n, x.data_ptr(), n, out
            ),
            (3, n): lambda out, x=x, n=n: rows.call(
                "bi_row_softmax", SOFTMAX, CODE[dtype], CODE[dtype], 3, n, x.data_ptr(), n, out, n
            ),
        }.items():
            size = math.prod(result)
            memory = torch.full((size + 128,), -7.0, dtype=dtype)
            call(memory[64:].data_ptr())
            guard = torch.cat([memory[:64], memory[64 + size :]])
            assert (guard == -7).all(), f"n={n}: wrote outside of the output {result}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_have_the_bits_of_rows(rows: Rows, dtype: torch.dtype) -> None:
    """Over a middle dimension, at any width and stride, and on two threads."""
    reductions = (SUM, MEAN, PROD, NORM0, NORM1, NORM2, NORM_INF, NORM_NEG_INF)
    for n in (0, 1, 2, 3, 17, 64, 600, 1025, 8200, 17_000):
        outer, inner = (1, 33) if n > 2000 else (3, 85)
        matrix = data("cancelling", outer * inner, n, dtype)
        matrix[-1, n // 2 :] = NAN
        if n > 1:
            matrix[1, 0], matrix[2] = INF, -0.0
        # A view with foreign columns beside it, so that both strides are larger than the sizes.
        memory = torch.full((outer, n, inner + 5), NAN, dtype=dtype)
        x = memory[:, :, 2 : inner + 2]
        x.copy_(matrix.view(outer, inner, n).transpose(1, 2))
        for r in (rows, rows.with_threads(2)):
            for op in reductions:
                got, want = r.column_reduce(op, x), rows.reduce(op, matrix)
                assert same(got.flatten(), want), f"reduction {op} n={n}"
            for root in (False, True):
                pairs = zip(r.column_var(x, root=root), rows.var(matrix, root=root), strict=True)
                assert all(same(a.flatten(), b) for a, b in pairs), f"var n={n}"
            prefixes = r.column_cumsum(x).transpose(1, 2).reshape(matrix.shape)
            assert same(prefixes, rows.cumsum(matrix)), f"cumsum n={n}"
        first = rows.column_reduce(SUM, x[:, :, 3:4].contiguous())
        assert same(first, rows.column_reduce(SUM, x)[:, 3:4].contiguous()), "one column alone"


def test_in_place(rows: Rows) -> None:
    """An output may be its own input."""
    x = data("normal", 3, 1030, torch.float32)
    for op in (SOFTMAX, LOG_SOFTMAX):
        want, y = rows.softmax(op, x), x.clone()
        rows.call("bi_row_softmax", op, 0, 0, 3, 1030, y.data_ptr(), 1030, y.data_ptr(), 1030)
        assert same(y, want)
    want, y = rows.cumsum(x), x.clone()
    rows.call("bi_row_cumsum", 0, 0, 3, 1030, y.data_ptr(), 1030, y.data_ptr(), 1030)
    assert same(y, want)
    want, total, _ = rows.rms_norm(x, residual=_other(x))
    y, residual = x.clone(), _other(x)
    rows.call(
        "bi_rms_norm",
        0,
        0,
        0,
        3,
        1030,
        1030,
        y.data_ptr(),
        1030,
        residual.data_ptr(),
        1030,
        None,
        1e-5,
        y.data_ptr(),
        1030,
        residual.data_ptr(),
        1030,
        None,
    )
    assert same(y, want)
    assert same(residual, total)


def test_bad_calls_are_refused(rows: Rows) -> None:
    """A dtype, op or size that a kernel cannot do is a status, never a result."""
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="unsupported dtype"):
        rows.reduce(SUM, x.double())
    with pytest.raises(ValueError, match="unsupported dtype"):
        rows.softmax(SOFTMAX, x, torch.bfloat16)
    with pytest.raises(ValueError, match="unsupported dtype"):
        rows.rms_norm(x.bfloat16(), torch.ones(4, dtype=torch.float16))
    with pytest.raises(ValueError, match="invalid argument"):
        rows.reduce(99, x)
    with pytest.raises(ValueError, match="invalid argument"):
        rows.softmax(2, x)
    with pytest.raises(ValueError, match="invalid argument"):
        rows.topk(LARGEST, x, 5)
    with pytest.raises(ValueError, match="invalid argument"):
        rows.argmax(LARGEST, x[:, :0])
    with pytest.raises(ValueError, match="invalid argument"):
        rows.rms_norm(x, variance_size=5)
    with pytest.raises(ValueError, match="invalid argument"):
        rows.layer_norm(x, spatial=3, groups=1)
    with pytest.raises(ValueError, match="invalid argument"):
        rows.column_reduce(99, x[None])
    with pytest.raises(ValueError, match="expected a floating-point tensor of shape"):
        lane_sum(x.int())
