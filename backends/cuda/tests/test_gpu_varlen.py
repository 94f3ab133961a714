"""Attention over sequences on a GPU: a query has its bits in any cut, storage, tile and split."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from batch_invariant.ops.bits import mismatch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA GPU", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from batch_invariant.cpu import _kernels as cpu_kernels  # noqa: E402
from batch_invariant.ops.varlen_definition import attend  # noqa: E402
from batch_invariant_cuda import attention, varlen_attention, varlen_tiles  # noqa: E402

CPU = cpu_kernels()["attention"].fn
GPU = varlen_attention.KERNELS["attention"].fn
NAMES = (
    *("sinks", "cu_seqlens_q", "cu_seqlens_k", "seq_lens", "left_pad", "block_table"),
    *("causal", "scale", "window", "soft_cap"),
)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 200},
    "sinks": {"causal": True, "sinks": True},
    "all": {"causal": True, "window": 300, "soft_cap": 4.0, "sinks": True},
}
SIZES = [(64, 64), (128, 128), (96, 96), (192, 128)]
LENGTHS = (1300, 1, 700, 513, 128)
QUERIES = (600, 1, 700, 13, 128)
Pair = tuple[torch.Tensor, torch.Tensor]


def call(kernel: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Pair:
    """A call that is planned anew."""
    varlen_attention.forget()
    return once_more(kernel, q, k, v, **options)


def once_more(
    kernel: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> Pair:
    given = dict.fromkeys(NAMES) | {"causal": False} | options
    found: Pair = kernel(q, k, v, *(given[name] for name in NAMES))
    return found


def ints(*values: int, device: str = "cuda") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def cuts(lengths: tuple[int, ...], device: str = "cuda") -> torch.Tensor:
    return torch.tensor((0, *lengths), device=device).cumsum(0).int()


class Sequences:
    """Sequences of LENGTHS keys and QUERIES queries, 8 heads that share 2; some values are huge."""

    def __init__(self, dtype: torch.dtype, sizes: tuple[int, int], options: dict[str, Any]) -> None:
        generator = torch.Generator("cuda").manual_seed(sum(sizes))

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda", generator=generator).to(dtype)

        self.options = {**options, "sinks": draw(8) if "sinks" in options else None}
        self.q = [draw(n, 8, sizes[0]) for n in QUERIES]
        self.k = [draw(n, 2, sizes[0]) for n in LENGTHS]
        self.v = [draw(n, 2, sizes[1]) for n in LENGTHS]
        for v in self.v:
            v[:, :, ::2] *= 300

    def alone(self, b: int, rows: slice = slice(None), device: str = "cuda") -> Pair:
        """Queries of one sequence by themselves, as many keys as they see."""
        end = len(self.k[b])
        if self.options.get("causal"):
            end -= len(self.q[b]) - len(range(*rows.indices(len(self.q[b])))) - (rows.start or 0)
        tensors = (self.q[b][rows], self.k[b][:end], self.v[b][:end])
        options = {n: x.to(device) if torch.is_tensor(x) else x for n, x in self.options.items()}
        kernel = GPU if device == "cuda" else CPU
        return call(kernel, *(x[None].to(device) for x in tensors), **options)

    def packed(self) -> Pair:
        """All of them end to end, and 5 rows that belong to none."""
        rest = self.q[0][:5] + math.nan
        return call(
            GPU, torch.cat([*self.q, rest]), torch.cat(self.k), torch.cat(self.v),
            cu_seqlens_q=cuts(QUERIES), cu_seqlens_k=cuts(LENGTHS), **self.options,
        )  # fmt: skip

    def paged(self, size: int) -> Pair:
        """Keys in shuffled pages; NaN in what nobody uses."""
        columns = max(-(-n // size) for n in LENGTHS) + 1
        order = torch.randperm(len(LENGTHS) * columns, generator=torch.Generator().manual_seed(1))
        table = order.view(len(LENGTHS), columns)
        stores = []
        for parts in (self.k, self.v):
            store = parts[0].new_full((len(order), size, *parts[0].shape[1:]), math.nan)
            for part, pages in zip(parts, table, strict=True):
                at = torch.arange(len(part))
                store[pages[at // size].cuda(), (at % size).cuda()] = part
            stores.append(store)
        return call(
            GPU, torch.cat(self.q), *stores, cu_seqlens_q=cuts(QUERIES),
            block_table=table.int().cuda(), seq_lens=ints(*LENGTHS), **self.options,
        )  # fmt: skip

    def dense(self, b: int, before: int, behind: int) -> Pair:
        """One sequence beside a copy of itself, with NaN before and behind its keys."""
        room = [
            torch.nn.functional.pad(x[b], (0, 0, 0, 0, before, behind), value=math.nan)
            for x in (self.k, self.v)
        ]
        end = before + LENGTHS[b]
        return call(
            GPU, *(torch.stack([x, x]) for x in (self.q[b], *room)),
            left_pad=ints(before, before), seq_lens=ints(end, end), **self.options,
        )  # fmt: skip


def same(a: Pair, b: Pair, rows: slice = slice(None)) -> bool:
    """Rows of packed results [T, H, E] and [H, T] have the bits of [1, L, H, E] and [1, H, L]."""
    return mismatch(a[0][rows], b[0][0]) is None and mismatch(a[1][:, rows], b[1][0]) is None


@pytest.fixture(params=OPTIONS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(OPTIONS[request.param])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_storage_and_neighbours_change_no_bit(
    dtype: torch.dtype, sizes: tuple[int, int], options: dict[str, Any]
) -> None:
    given = Sequences(dtype, sizes, options)
    packed = given.packed()
    places = cuts(QUERIES).tolist()
    for size in (16, 24, 256):
        for a, b in zip(given.paged(size), packed, strict=True):
            axis = 0 if a.dim() == 3 else 1
            assert mismatch(a, b.narrow(axis, 0, places[-1])) is None, size
    assert (packed[0][places[-1] :] == 0).all()
    assert (packed[1][:, places[-1] :] == -math.inf).all()
    for b in range(len(LENGTHS)):
        assert same(packed, given.alone(b), slice(places[b], places[b + 1])), b
    out, lse = given.dense(3, 70, 29)
    rows = slice(places[3], places[4])
    assert same(packed, (out[1:], lse[1:]), rows)


@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cuts_tiles_and_splits_change_no_bit(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    options: dict[str, Any],
) -> None:
    given = Sequences(dtype, sizes, options)
    whole = given.alone(0)
    for begin, end in ((0, 1), (299, 300), (599, 600), (100, 230), (7, 600)):
        part = given.alone(0, slice(begin, end))
        assert mismatch(whole[0][:, begin:end], part[0]) is None, (begin, end)
        assert mismatch(whole[1][:, :, begin:end], part[1]) is None, (begin, end)
    usual = given.packed()
    monkeypatch.setattr(varlen_attention, "takes_few", lambda _: False)
    monkeypatch.setattr(varlen_attention, "takes_many", lambda _: False)
    for shape in ((16, 4, 1), (64, 4, 1), (64, 8, 2)):
        for run in (1, 3, 99):
            monkeypatch.setattr(varlen_tiles, "tile", lambda *_, s=shape: attention.Tile(*s))
            monkeypatch.setattr(varlen_tiles, "run_of", lambda *_, run=run: run)
            for a, b in zip(usual, given.packed(), strict=True):
                assert mismatch(a, b) is None, (shape, run)


class Routes:
    """Which kernels are asked for calls, and calls that only `varlen_blocks` gets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[str] = []
        self.closed = self.kept = False
        for name in ("is_square", "takes_few", "takes_many"):
            monkeypatch.setattr(varlen_attention, name, self._asked(name))

    def _asked(self, name: str) -> Any:
        chosen = getattr(varlen_attention, name)

        def ask(*args: Any) -> bool:
            found = not self.closed and chosen(*args)
            if found:
                self.taken.append(name)
            return found

        return ask

    def differ(self, expected: str, *tensors: torch.Tensor, **options: Any) -> bool:
        """Whether a call has other bits by the route that it must take than by `varlen_blocks`."""
        self.taken.clear()
        found = call(GPU, *tensors, **options)
        assert self.taken == [expected]
        # A call that was kept asks nobody for its route; it must not read the tensors of the first.
        copies = [x.clone() for x in tensors]
        for x in tensors:
            x.neg_()
        again = once_more(
            GPU, *copies, **{n: x.clone() if torch.is_tensor(x) else x for n, x in options.items()}
        )
        self.kept = self.taken == [expected]
        for x in tensors:
            x.neg_()
        self.closed = True
        other = call(GPU, *tensors, **options)
        self.closed = False
        return any(
            mismatch(a, b) is not None
            for some in (found, again)
            for a, b in zip(some, other, strict=True)
        )


hopper = pytest.mark.skipif(
    torch.cuda.get_device_capability() != (9, 0), reason="these kernels are for Hopper alone"
)


@hopper
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 128), (torch.float16, 64)], ids=str)
def test_many_rows_have_one_result_on_every_route(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int, options: dict[str, Any]
) -> None:
    routes = Routes(monkeypatch)
    given = Sequences(dtype, (size, size), options)
    q, k, v = (torch.cat(x) for x in (given.q, given.k, given.v))
    packed = {"cu_seqlens_q": cuts(QUERIES), "cu_seqlens_k": cuts(LENGTHS), **given.options}
    assert not routes.differ("takes_many", q, k, v, **packed)
    assert routes.kept
    # Values that some rows do not see; control: the marks of such rows are looked at.
    v[700], v[LENGTHS[0]] = math.inf, math.nan
    assert not routes.differ("takes_many", q, k, v, **packed)
    many = varlen_attention.many_rows
    monkeypatch.setattr(varlen_attention, "many_rows", lambda given: (many(given)[0].zero_(), None))
    assert routes.differ("takes_many", q, k, v, **packed)
    monkeypatch.setattr(varlen_attention, "many_rows", many)
    three = [torch.stack([x[:300], x[300:600]]) for x in (q, k, v)]
    three[2].nan_to_num_(0, 0, 0)
    route = "is_square" if options.keys() <= {"causal"} else "takes_many"
    assert not routes.differ(route, *three, **given.options)
    three[2][0, 200:] = math.nan
    padded = {"seq_lens": ints(200, 299), "left_pad": ints(3, 130), **given.options}
    assert not routes.differ("takes_many", *three, **padded)
    short = [three[0][:, :100], *three[1:]]
    assert not routes.differ("takes_many", *short, **padded)


@hopper
@pytest.mark.parametrize(
    ("size", "queries", "page_size"),
    [(128, 100, 16), (64, 100, 8), (64, 100, 256), (128, 1, 16), (64, 1, 256), (128, 5, 48)],
)
def test_pages_have_one_result_on_every_route(
    monkeypatch: pytest.MonkeyPatch, size: int, queries: int, page_size: int
) -> None:
    routes = Routes(monkeypatch)
    lengths = (700, 3, 1290, 128, 0)
    columns = -(-max(lengths) // page_size) + 1
    generator = torch.Generator("cuda").manual_seed(size)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator).bfloat16()

    count = len(lengths) * columns
    table = torch.randperm(count, device="cuda", generator=generator).view(-1, columns)
    q, k, v = draw(5, queries, 8, size), *(draw(count, page_size, 2, size) for _ in "kv")
    for b, n in enumerate(lengths):  # nobody sees what lies behind the last key
        if n:
            v[table[b, n // page_size], n % page_size :] = math.nan
    given = {"block_table": table, "seq_lens": ints(*lengths), "causal": True}
    name = "takes_many" if queries == 100 else "takes_few"
    usual = varlen_attention.runs_of
    for runs in (usual, lambda *_: 1, lambda *_: 3):
        monkeypatch.setattr(varlen_attention, "runs_of", runs)
        assert not routes.differ(name, q, k, v, **given)
        assert routes.kept
    # In front of what a window of 5 shows of its block.
    hidden = v.clone()
    hidden[table[0, 650 // page_size], 650 % page_size] = math.inf
    for more in ({"window": 130}, {"soft_cap": 1.5}, {"window": 5, "soft_cap": 2.0}):
        sinks = draw(8) if "window" in more else None
        assert not routes.differ(name, q, k, hidden, sinks=sinks, **more, **given)
    packed = {**given, "cu_seqlens_q": cuts((queries - 1, queries, queries, 0, queries))}
    if queries != 5:
        assert not routes.differ(name, q.flatten(0, 1), k, v, **packed)
    # Control: with a page of another sequence the bits are others.
    before = call(GPU, q, k, v, **given)
    table[0, 0] = table[2, 0]
    assert mismatch(before[0][0], call(GPU, q, k, v, **given)[0][0]) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_is_accurate(dtype: torch.dtype, options: dict[str, Any]) -> None:
    for sizes in SIZES:
        given = Sequences(dtype, sizes, options)
        for b in (0, 2, 3):
            found = given.alone(b)
            filled = dict.fromkeys(NAMES) | {"causal": False} | given.options
            if filled["sinks"] is not None:
                filled["sinks"] = filled["sinks"].double()
            tensors = (x[b][None].double() for x in (given.q, given.k, given.v))
            out, lse = attend(*tensors, *(filled[name] for name in NAMES))
            bound = 2.5 * max(torch.finfo(dtype).eps, 1e-5) * given.v[b].abs().max().double()
            assert ((found[0].double() - out).abs() <= bound).all()
            assert ((found[1] - lse).abs() < 1e-3).all()


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "all"])
def test_fp32_has_the_bits_of_the_cpu(name: str) -> None:
    given = Sequences(torch.float32, (64, 64), dict(OPTIONS[name]))
    for b in (1, 3, 4):
        for c, g in zip(given.alone(b, device="cpu"), given.alone(b), strict=True):
            assert mismatch(c, g.cpu()) is None, b


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_later_keys_and_other_sequences_stay_out(dtype: torch.dtype) -> None:
    given = Sequences(dtype, (64, 64), {"causal": True})
    before = given.packed()
    given.k[2][500:], given.v[2][500:] = math.nan, math.inf
    after = given.packed()
    begin = sum(QUERIES[:2])
    rows = [*range(begin + 500), *range(begin + 700, sum(QUERIES))]
    assert mismatch(before[0][rows], after[0][rows]) is None
    assert after[0][begin + 500 : begin + 700].isnan().all()


def test_lengths_that_lie_stay_within_the_tensors() -> None:
    q, k = (torch.randn(7, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in "qk")
    pages = torch.randn(3, 16, 2, 64, device="cuda", dtype=torch.bfloat16)
    wild = ints(0, -5, 10**9, 3)
    call(GPU, q, k, k, cu_seqlens_q=wild, cu_seqlens_k=wild.flip(0), causal=True)
    table = ints(-1, 10**9, 2, 7, 1, -(2**31)).view(3, 2)
    call(
        GPU, q[:3, None], pages, pages, block_table=table, seq_lens=ints(-1, 10**9, 40),
        left_pad=ints(2, -7, 50), causal=True, window=3,
    )  # fmt: skip
    torch.cuda.synchronize()


def test_lengths_on_the_cpu_are_checked_and_others_are_not_waited_for() -> None:
    q = torch.randn(2, 1, 2, 64, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(2, 9, 2, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"seq_lens\[1\] is 10"):
        call(GPU, q, k, k, seq_lens=ints(3, 10, device="cpu"))
    with pytest.raises(RuntimeError, match="all be on cuda"):
        call(GPU, q, k, k, seq_lens=ints(3, 4), left_pad=ints(0, 1, device="cpu"))
    found = call(GPU, q, k, k, seq_lens=ints(3, 9, device="cpu"))
    lengths = ints(3, 9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(GPU, q, k, k, seq_lens=lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    assert mismatch(found[0], captured[0]) is None
    lengths[0] = 5
    graph.replay()
    assert mismatch(captured[0], call(GPU, q, k, k, seq_lens=ints(5, 9))[0]) is None
