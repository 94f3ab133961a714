"""Matrix products on a GPU: transforms of the batch, schedules, strides, portability, host cost."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch

import batch_invariant as bi
from batch_invariant.proof import checks
from gpu import REASON, differing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=REASON)]

if not REASON:
    from batch_invariant.cpu import matmul as cpu
    from batch_invariant.errors import ConfigurationError, OpNotSupported
    from batch_invariant_cuda import choice, launch, matmul, schedules, tune
    from batch_invariant_cuda.chunks import chunk_of
    from batch_invariant_cuda.plan import Plan
    from batch_invariant_cuda.schedules import parse

NAMES = ("mm", "addmm", "bmm", "baddbmm", "linear")
LOW = (torch.bfloat16, torch.float16)
ALL = (*LOW, torch.float32, torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_conformance(name):
    """Transforms of the batch, accuracy, golden digests, orders, bad input, graph replay."""
    items = checks.plan("cuda", [name], full=False)
    assert {"T1 population", "T3 neighbours", "graph replay"} <= {item.check for item in items}
    wrong = [str(found) for found in map(checks.run, items) if not found.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("k_n", [(1024, 1024), (4096, 1024), (8192, 1280), (4096, 6144)], ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_every_population_gives_the_rows_of_the_largest(dtype, k_n):
    k, n = k_n
    a = tune.adversarial(1100, k, dtype)
    w = torch.randn(n, k, device="cuda").to(dtype)
    whole = matmul.product(a, w.t())
    for m in (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 63, 65, 100, 128, 129, 200, 255, 257, 511, 777):
        start = 1100 - m
        found = matmul.product(a[start:].contiguous(), w.t())
        assert differing(found, whole[start:]) == 0, m


def test_stock_changes_rows_where_ours_do_not():
    """The data can show a difference: torch's own product fails the same check."""
    a = tune.adversarial(1024, 8192, torch.bfloat16)
    w = torch.randn(1280, 8192, device="cuda").bfloat16()
    whole = torch.nn.functional.linear(a, w)
    assert any(differing(torch.nn.functional.linear(a[:m], w), whole[:m]) for m in (1, 8, 64, 256))


def test_every_line_of_the_shipped_tables_has_the_contracts_bits():
    table = schedules.table_for(torch.cuda.get_device_capability())
    lines = list(table)
    if torch.cuda.get_device_capability() == (9, 0):
        assert len(lines) >= 140
    assert list(tune.admit(table)) == []


def test_a_schedule_of_another_order_is_refused(tmp_path, monkeypatch):
    """Negative control: a table whose schedules add in another order is found out and not used."""
    path = tmp_path / "table.json"
    path.write_text(
        json.dumps({"entries": {"bfloat16": {"4096x1024": [[64, "tile 64x64x64 w4 s3"]]}}})
    )
    table = schedules.read(json.loads(path.read_text()), "table.json")
    assert list(tune.admit(table)) == []
    honest = launch.run

    def other_order(p, s, *args, **kwargs):
        from dataclasses import replace

        if kwargs:  # only the schedule under test, not the contract it is compared with
            p = replace(p, chunk=0)
        return honest(p, s, *args, **kwargs)

    monkeypatch.setattr(launch, "run", other_order)
    bad = list(tune.admit(table))
    assert bad
    assert "differ from the contract's" in bad[0][1]
    with pytest.raises(ConfigurationError, match="change bits"):
        tune.use(path)


def test_a_table_of_ones_own_decides_speed_and_no_bit(tmp_path):
    a = tune.adversarial(64, 4096, torch.bfloat16)
    w = torch.randn(1024, 4096, device="cuda").bfloat16()
    before = matmul.product(a, w.t())
    path = tmp_path / "table.json"
    path.write_text(
        json.dumps({"entries": {"bfloat16": {"4096x1024": [[64, "tile 32x64x128 w4 s3 split"]]}}})
    )
    try:
        tune.use(path)
        p = matmul.problem(a, w.t(), None, False)
        assert str(matmul.schedule_for(p, a.device)) == "tile 32x64x128 w4 s3 split"
        assert differing(matmul.product(a, w.t()), before) == 0
    finally:
        schedules.use(None)
        matmul.forget()


@pytest.mark.parametrize("dtype", [*LOW, torch.float32], ids=str)
@pytest.mark.parametrize(("k", "n"), [(4096, 1280), (2048, 2048), (8192, 640)])
def test_every_kind_of_schedule_gives_one_result(dtype, k, n):
    chunked = chunk_of(k, n, dtype) > 0
    tails = ["", " apart", " apart early"] * chunked
    extra = [f"ring 128x128x64 w8 s5 hybrid{tail}" for tail in tails]
    extra += [f"fma 128x128x16 w8 s8 hybrid{tail}" for tail in tails]
    extra += ["fma 16x32x128 w4 s4", "fma 128x64x32 w8 s5 g2", "ring 64x64x64 w4 s4 c3"]
    for m in (5, 77, 200, 600):
        a = tune.adversarial(m, k, dtype)
        b = torch.randn(n, k, device="cuda").to(dtype).t()
        a[0] = -0.0  # times positive weights, in half of the columns: the sign of a sum of -0
        b[:, ::2].abs_()
        p = matmul.problem(a, b, None, False)
        for text in [*tune.candidates(m, chunked, dtype), *extra]:
            if p.refuses(parse(text)) is None:
                assert tune.differing(p, parse(text), a, b) == 0, (m, text)


@pytest.mark.parametrize("dtype", [*LOW, torch.float32], ids=str)
@pytest.mark.parametrize("way", ["split", "hybrid", "split apart", "hybrid apart early"])
def test_an_addend_meets_the_sum_of_the_chunks(dtype, way):
    m, n, k = 600, 1288, 4096
    a = tune.adversarial(m, k, dtype)
    b = torch.randn(n, k, device="cuda").to(dtype).t()
    addend = torch.randn(n, device="cuda").to(dtype).expand(m, n)
    p = matmul.problem(a, b, addend, True)
    kernel = "fma 64x64x32 w4 s6" if dtype is torch.float32 else "ring 64x64+32x64 w4 s8"
    expected = launch.run(p, choice.contract(dtype), a, b, addend, 1.5, 0.5)
    found = launch.run(p, parse(f"{kernel} {way}"), a, b, addend, 1.5, 0.5)
    assert differing(found, expected) == 0


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("m", [1, 40, 300])
def test_layouts_and_offsets_change_no_bit(dtype, m):
    k, n = (1032, 264) if dtype is not torch.float64 else (520, 40)
    a = tune.adversarial(m, k, dtype)
    w = torch.randn(n, k, device="cuda").to(dtype)
    addend = torch.randn(m, n, device="cuda").to(dtype)
    base = matmul.product(a, w.t(), addend, 0.5, 1.5)

    def wide(x):
        room = torch.zeros(x.size(0), 2 * x.size(1) + 3, dtype=dtype, device="cuda")
        room[:, 1 : 2 * x.size(1) + 1 : 2] = x
        return room[:, 1 : 2 * x.size(1) + 1 : 2]

    def columns(x):
        return x.t().contiguous().t()

    for left in (a, columns(a), wide(a)):
        for right in (w.t(), w.t().contiguous(), wide(w).t()):
            for plus in (addend, columns(addend), wide(addend)):
                assert differing(matmul.product(left, right, plus, 0.5, 1.5), base) == 0


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_gradients_have_the_bits_of_their_rows(dtype):
    """Backward through bi.linear: a row of dX does not depend on how many rows there are.

    The data can show a difference: the gradient of the weight, a sum over the rows, changes.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    x = tune.adversarial(1100, 1024, dtype, special=False)
    w = torch.randn(4096, 1024, device="cuda", generator=generator).to(dtype).requires_grad_()
    g = tune.adversarial(1100, 4096, dtype, seed=1)

    def gradients(rows):
        part = x[:rows].clone().requires_grad_()
        return torch.autograd.grad(bi.linear(part, w), (part, w), g[:rows])

    dx, dw = gradients(1100)
    for rows in (1, 3, 17, 64, 255, 1024):
        part, of_fewer = gradients(rows)
        assert differing(part, dx[:rows]) == 0, rows
        assert differing(of_fewer, dw) > 0


@pytest.mark.parametrize("dtype", [*LOW, torch.float32], ids=str)
@pytest.mark.parametrize("odd_first", [False, True])
def test_one_operand_is_aligned_and_the_other_not(dtype, odd_first):
    """A kernel compiled for one alignment of the two addresses must not serve the other."""
    m, k, n = 33, 1024, 264
    a = tune.adversarial(m, k, dtype)
    w = torch.randn(n, k, device="cuda").to(dtype)

    def odd(x):
        room = torch.empty(x.numel() + 1, dtype=dtype, device="cuda")
        return room[1:].view(x.shape).copy_(x)

    expected = matmul.product(a, w.t())
    pairs = [(a, odd(w)), (odd(a), w)]
    matmul.forget()
    for left, right in pairs[::-1] if odd_first else pairs:
        assert differing(matmul.product(left, right.t()), expected) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 512), (33, 100, 1031), (70, 96, 4096)], ids=str)
def test_portable_products_equal_the_cpu(dtype, shape):
    m, n, k = shape
    for seed in range(2):
        a = tune.adversarial(m, k, torch.float32, seed).to(dtype).cpu()
        b = torch.randn(n, k, dtype=dtype)
        if seed:
            b = torch.exp2(torch.randint(-1, 2, (n, 1)).to(dtype)).expand(n, k).contiguous()
        d = torch.randn(n, dtype=dtype).expand(m, n)
        moved = (a.cuda(), b.cuda().t(), d.cuda())
        assert differing(matmul.product(*moved[:2]).cpu(), cpu.product(a, b.t())) == 0
        ours = matmul.product(*moved, 0.7, 1.3).cpu()
        assert differing(ours, cpu.product(a, b.t(), d, 0.7, 1.3)) == 0


def _by_allow_tf32(on):
    torch.backends.cuda.matmul.allow_tf32 = on


def _by_precision(on):
    torch.set_float32_matmul_precision("high" if on else "highest")


@pytest.mark.parametrize("switch", [_by_allow_tf32, _by_precision])
@pytest.mark.parametrize(("k", "n"), [(4096, 512), (1031, 129)])
def test_tf32_only_when_asked(switch, k, n):
    """One result in all schedules and populations while asked for, the portable bits otherwise."""
    a = tune.adversarial(300, k, torch.float32)
    plain = torch.randn(300, k, device="cuda")
    w = torch.randn(n, k, device="cuda")
    before = matmul.product(a, w.t())
    try:
        switch(True)
        whole = matmul.product(a, w.t())
        assert differing(whole, before) > 0
        for m in (1, 3, 16, 17, 40, 129):
            assert (
                differing(matmul.product(a[300 - m :].contiguous(), w.t()), whole[300 - m :]) == 0
            )
        p = matmul.problem(a, w.t(), None, False)
        assert p.tf32
        for text in ("tile 128x128x32 w8 s3", "tile 64x64x32 w4 s4", "tile 16x64x32 w4 s4 swap"):
            assert tune.differing(p, parse(text), a, w.t()) == 0
        assert "TF32" in p.refuses(parse("fma 64x64x32 w4 s6"))
        exact = plain.double() @ w.t().double()
        error = (matmul.product(plain, w.t()).double() - exact).abs()
        assert (error <= 2.0**-9 * (plain.abs() @ w.t().abs())).all()
        assert "TF32" in str(matmul.KERNELS["mm"].order_of(torch.float32))
    finally:
        switch(False)
    assert differing(matmul.product(a, w.t()), before) == 0


def test_tuning_writes_a_table_that_holds(tmp_path, monkeypatch, capsys):
    from batch_invariant.cli import main

    monkeypatch.setattr(tune, "ROWS", (1, 64))
    few = ["tile 16x64x128 w4 s3 split", "tma 16x64x128 w4 s5 swap split", "fma 16x32x64 w4 s4"]
    monkeypatch.setattr(tune, "candidates", lambda *_: few)
    path = tmp_path / "table.json"
    assert main(["tune", "4096x1024", "--out", str(path)]) == 0
    lines = json.loads(path.read_text())["entries"]["bfloat16"]["4096x1024"]
    assert [m for m, _ in lines] == [1, 64]
    assert all(text.removesuffix(" ahead") in few[:2] for _, text in lines)
    assert main(["tune", "--check", str(path)]) == 0
    assert "every line holds" in capsys.readouterr().out
    path.write_text(
        json.dumps({"entries": {"bfloat16": {"4096x1024": [[64, "tile 256x256x128 w8 s5"]]}}})
    )
    assert main(["tune", "--check", str(path)]) == 1
    assert "shared memory" in capsys.readouterr().out


def test_empty_and_odd_calls():
    bf16 = torch.bfloat16
    for m, k, n in ((0, 64, 64), (4, 64, 0), (3, 0, 5)):
        a, b = torch.ones(m, k, device="cuda").to(bf16), torch.ones(k, n, device="cuda").to(bf16)
        out = matmul.KERNELS["mm"].fn(a, b)
        assert out.shape == (m, n)
        assert not out.any()
    nan = torch.full((5,), float("nan"), device="cuda", dtype=bf16)
    a, b = torch.ones(3, 4, device="cuda").to(bf16), torch.ones(4, 5, device="cuda").to(bf16)
    assert (matmul.KERNELS["addmm"].fn(nan, a, b, beta=0) == 4).all()
    assert (matmul.KERNELS["addmm"].fn(nan[:0].sum(), a, b, alpha=0.5, beta=2) == 2).all()
    one = matmul.KERNELS["linear"].fn(a, b[:, 0].contiguous(), torch.tensor(1.0).to(bf16).cuda())
    assert one.shape == (3,)
    assert (one == 5).all()


def test_what_cannot_be_done_is_said():
    whole = torch.ones(4, 4, device="cuda", dtype=torch.int32)
    with pytest.raises(OpNotSupported, match=r"got torch\.int32"):
        matmul.KERNELS["mm"].fn(whole, whole)
    x = torch.ones(4, 4, device="cuda")
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        matmul.KERNELS["mm"].fn(x, x[:3])
    with pytest.raises(RuntimeError, match="one device"):
        matmul.KERNELS["mm"].fn(x, x.cpu())


def test_offsets_beyond_32_bits():
    n = 70_000
    a = torch.randn(32_000, 64, device="cuda").bfloat16()
    w = torch.randn(n, 64, device="cuda").bfloat16()
    whole = matmul.product(a, w.t())
    assert whole.numel() > 2**31
    assert differing(whole[-40:], matmul.product(a[-40:], w.t())) == 0
    del whole
    tall = torch.randn(2, 33_000, 33_000, device="cuda").bfloat16()  # the second is beyond 2^30
    b = torch.randn(2, 33_000, 16, device="cuda").bfloat16()
    both = matmul.product(tall, b)
    assert differing(both[1], matmul.product(tall[1], b[1])) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(8, 1280, 8192), (256, 1280, 8192), (300, 6144, 4096)], ids=str)
def test_graphs_streams_and_threads(shape, dtype):
    m, n, k = shape
    a = tune.adversarial(m, k, dtype)
    w = torch.randn(n, k, device="cuda").to(dtype)
    expected = matmul.product(a, w.t())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = matmul.product(a, w.t())
        second = matmul.product(a, w.t())
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    found: list[torch.Tensor] = []

    def work(stream):
        with torch.cuda.stream(stream):
            found.extend(matmul.product(a, w.t()) for _ in range(20))

    threads = [threading.Thread(target=work, args=(s,)) for s in streams]
    for thread in threads:
        thread.start()
    for _ in range(20):
        graph.replay()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(found) == 60
    for out in (first, second, *found):
        assert differing(out, expected) == 0


@pytest.mark.parametrize(
    ("dtype", "text"),
    [
        (torch.bfloat16, "tile 64x64x128 w4 s3 split ahead"),
        (torch.bfloat16, "tma 64x64x128 w4 s4 ahead"),
        (torch.bfloat16, "tma 16x64x256 w4 s4 swap split ahead"),
        (torch.bfloat16, "ring 64x64x128 w4 s5 ahead"),
        (torch.bfloat16, "ring 64x64x128 w4 s5 split ahead"),
        (torch.bfloat16, "ring 64x128x64 w4 s7 split apart ahead"),
        (torch.bfloat16, "ring 64x128x64 w4 s7 split apart early ahead"),
        (torch.float32, "fma 64x64x32 w4 s4 split apart early ahead c2"),
        (torch.float32, "fma 16x64x32 w4 s4 split ahead c4"),
    ],
    ids=str,
)
def test_what_is_launched_ahead_waits(dtype, text):
    """Each product reads what the one before it wrote, without a break between them."""
    m, k, rounds = 40, 2048, 24
    weights = [torch.randn(k, k, device="cuda").mul(k**-0.5).to(dtype).t() for _ in range(3)]
    first = torch.randn(m, k, device="cuda").to(dtype)
    chunk = 0 if text == "tma 64x64x128 w4 s4 ahead" else 512
    p = matmul.problem(first, weights[0], None, False, chunk)
    expected = first
    for i in range(rounds):
        expected = launch.run(p, choice.contract(dtype), expected, weights[i % 3])
        torch.cuda.synchronize()
    plan = Plan(p, parse(text), first, weights[0], None, matmul.programs(first.device))

    def chained():
        x = first
        for i in range(rounds):
            x = plan(x, weights[i % 3], None, 1.0, 1.0)
        return x

    eager = chained()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chained()
    assert differing(eager, expected) == 0
    for _ in range(20):
        graph.replay()
    assert differing(found, expected) == 0


def test_host_cost_of_a_call():
    """An eager call adds at most 10 us over F.linear, with an empty queue."""
    a = torch.randn(1, 1024, device="cuda").bfloat16()
    w = torch.randn(1024, 1024, device="cuda").bfloat16()

    def host(fn):
        for _ in range(100):
            fn()
        times = []
        for _ in range(50):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(10):
                fn()
            times.append((time.perf_counter() - begin) / 10)
        return sorted(times)[25] * 1e6

    with torch.inference_mode():
        stock = host(lambda: torch.nn.functional.linear(a, w))
        ours = host(lambda: matmul.KERNELS["linear"].fn(a, w, None))
    assert ours <= stock + 10, f"{ours:.1f} us beside {stock:.1f}"


def test_the_rule_for_untuned_shapes_names_schedules_that_run():
    for m in (1, 20, 50, 90, 300, 2000):
        for k, n in ((3072, 3072), (2560, 9728), (12288, 768)):
            a = tune.adversarial(m, k, torch.bfloat16)
            b = torch.randn(n, k, device="cuda").bfloat16().t()
            p = matmul.problem(a, b, None, False)
            chosen = choice.default(m, n, k, p.dtype, bulk=p.bulk(), chunk=p.chunk, programs=132)
            assert p.refuses(chosen) is None
            assert tune.differing(p, chosen, a, b) == 0


def test_a_schedule_too_large_for_the_gpu_is_refused():
    reason = tune.refusal(torch.bfloat16, 4096, 4096, 256, parse("tile 256x256x128 w8 s5"))
    assert reason is not None
    assert "shared memory" in reason


def test_tables_ship_with_the_package():
    folder = Path(schedules.__file__).parent / "schedules"
    for path in folder.glob("*.json"):
        schedules.read(json.loads(path.read_text()), path.name)
