"""bi.attention: one query has the same bits however its sequence is cut, stored and accompanied."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import batch_invariant as bi
from batch_invariant.ops.varlen_definition import attend
from native_rows import TANH, Rows, runnable
from replay import replay_chunks, replay_weighted, same
from test_native_attention import draw, exp32

INF = torch.inf
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": 33},
    "soft cap": {"causal": True, "soft_cap": 2.0, "scale": 0.3},
    "sinks": {"causal": True, "sinks": draw(4, dtype=torch.float32)},
    "full": {},
}
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def drawn(
    length: int, keys: int, dtype: torch.dtype, seed: int = 0, size: int = 64, v_size: int = 64
) -> tuple[torch.Tensor, ...]:
    """One sequence, [L, 4, E], [S, 2, E] and [S, 2, Ev].

    Two keys are equal and their values huge and opposite: what is added between them is rounded to
    the unit of the huge one, so that a changed order shows in 16-bit results too.
    """
    shapes = ((length, 4, size), (keys, 2, size), (keys, 2, v_size))
    q, k, v = (draw(*shape, dtype=dtype, seed=seed + i) for i, shape in enumerate(shapes))
    if keys > 3:
        first, second = keys // 5, keys - 1 - keys // 6
        k[second] = k[first]
        v[first] = 2.0**15 if dtype == torch.float16 else 2.0**20
        v[second] = -v[first]
    return q, k, v


def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """Output [L, H, Ev] and lse [H, L] of one sequence in one call."""
    return [x[0] for x in bi.attention(q[None], k[None], v[None], return_lse=True, **options)]


def pages_of(
    sequences: list[tuple[torch.Tensor, torch.Tensor]], page_size: int
) -> dict[str, torch.Tensor]:
    """Keys and values in pages that lie in a shuffled order, with NaN wherever no key is."""
    columns = max(-(-len(k) // page_size) for k, _ in sequences) + 2
    places = torch.randperm(len(sequences) * columns + 3)[: len(sequences) * columns]
    table = places.view(len(sequences), columns).int()
    found = {"block_table": table, "seq_lens": torch.tensor([len(k) for k, _ in sequences])}
    for at, name in enumerate(("key", "value")):
        like = sequences[0][at]
        pool = like.new_full((len(sequences) * columns + 3, page_size, *like.shape[1:]), math.nan)
        for row, sequence in zip(table.long(), sequences, strict=True):
            rows = torch.arange(len(sequence[at]))
            pool[row[rows // page_size], rows % page_size] = sequence[at]
        found[name] = pool
    return found


@every_dtype
@every_option
def test_chunked_prefill_and_decode_have_the_bits_of_prefill(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Chunks of 1, 7, 64 and 512 queries over pages of 16 to 256 keys, in every combination."""
    length = 150
    q, k, v = drawn(length, length, dtype)
    want, lse = alone(q, k, v, **options)
    for chunk in (1, 7, 64, 512):
        for page_size in (16, 40, 256):
            paged = pages_of([(k, v)], page_size)
            for begin in range(0, length, chunk):
                end = min(begin + chunk, length)
                if chunk == 1 and begin % 37 and begin != length - 1:
                    continue
                if options.get("causal"):
                    paged["seq_lens"] = torch.tensor([end])
                got, got_lse = bi.attention(q[None, begin:end], **paged, **options, return_lse=True)
                assert same(got[0], want[begin:end]), (chunk, page_size, begin)
                assert same(got_lse[0], lse[:, begin:end]), (chunk, page_size, begin)


@every_dtype
@every_option
def test_neighbours_and_storage_change_nothing(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Sequences of very different lengths: alone, packed, in pages, padded on either side."""
    lengths = ((1, 1), (17, 40), (1, 300), (64, 64), (5, 129))
    given = [drawn(*n, dtype, seed) for seed, n in enumerate(lengths)]
    want = [alone(*x, **options) for x in given]
    queries = torch.tensor([0, *(n for n, _ in lengths)]).cumsum(0)
    keys = torch.tensor([0, *(n for _, n in lengths)]).cumsum(0)
    q = torch.cat([x[0] for x in given] + [given[0][0].new_full((3, 4, 64), math.nan)])
    storages: dict[str, dict[str, Any]] = {
        "packed": {
            "key": torch.cat([x[1] for x in given]),
            "value": torch.cat([x[2] for x in given]),
            "cu_seqlens_k": keys.int(),
        },
        **{f"pages of {n}": pages_of([x[1:] for x in given], n) for n in (16, 32, 48, 256)},
    }
    pad = torch.tensor([3, 0, 31, 64, 1])
    padded = {name: given[0][1].new_full((5, 400, 2, 64), math.nan) for name in ("key", "value")}
    for row, (_, k, v) in enumerate(given):
        padded["key"][row, pad[row] : pad[row] + len(k)] = k
        padded["value"][row, pad[row] : pad[row] + len(k)] = v
    storages["padded"] = {**padded, "left_pad": pad, "seq_lens": pad + keys.diff()}
    for label, storage in storages.items():
        out, lse = bi.attention(q, cu_seqlens_q=queries, **storage, **options, return_lse=True)
        for b, (begin, end) in enumerate(itertools.pairwise(queries)):
            assert same(out[begin:end], want[b][0]), (label, b)
            assert same(lse[:, begin:end], want[b][1]), (label, b)
        assert not out[-3:].any(), "tokens of no sequence give zeros"
        assert (lse[:, -3:] == -INF).all()


def test_a_shared_prefix_and_its_copy_agree() -> None:
    """Two sequences whose first pages are the same pages, as after a prefix-cache hit."""
    q, k, v = drawn(100, 100, torch.bfloat16)
    want = alone(q, k, v, causal=True)[0][64:]
    paged = pages_of([(k, v), (k.flip(0), v)], 16)
    paged["block_table"][1, :4] = paged["block_table"][0, :4]
    for at in (4, 5, 6):
        for name in ("key", "value"):
            pages = paged["block_table"][:, at].long()
            paged[name][pages[1]] = paged[name][pages[0]]
    out = bi.attention(q[64:].expand(2, -1, -1, -1), **paged, causal=True)
    assert same(out[0], want)
    assert same(out[1], want)


@every_dtype
def test_a_page_in_the_wrong_place_is_seen(dtype: torch.dtype) -> None:
    """Negative control: the comparisons above fail if two pages change places."""
    q, k, v = drawn(20, 100, dtype)
    paged = pages_of([(k, v)], 16)
    assert same(bi.attention(q[None], **paged)[0], alone(q, k, v)[0])
    paged["block_table"][0, :2] = paged["block_table"][0, :2].flip(0)
    assert not same(bi.attention(q[None], **paged)[0], alone(q, k, v)[0])


def test_stock_attention_differs_between_prefill_and_decode() -> None:
    """Negative control: torch's own kernel does not have what is tested here."""
    q, k, v = (x.transpose(0, 1)[None] for x in drawn(300, 300, torch.bfloat16))
    whole = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    differ = [
        not same(
            F.scaled_dot_product_attention(
                q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], enable_gqa=True
            )[0, :, 0],
            whole[0, :, i],
        )
        for i in range(299)
    ]
    assert any(differ)


@every_dtype
def test_without_new_options_it_is_scaled_dot_product_attention(dtype: torch.dtype) -> None:
    q, k, v = (x[None] for x in drawn(33, 290, dtype))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    want = bi.scaled_dot_product_attention(*heads_first, enable_gqa=True).transpose(1, 2)
    assert same(bi.attention(q, k, v), want)
    keep = torch.ones(33, 290, dtype=torch.bool).tril(290 - 33)
    want = bi.scaled_dot_product_attention(*heads_first, keep, enable_gqa=True).transpose(1, 2)
    assert same(bi.attention(q, k, v, causal=True), want)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert same(bi.attention(*strided, causal=True), want)
    with bi.enabled():
        assert same(bi.attention(q, k, v, causal=True), want)


def test_bits_are_those_of_the_declared_order() -> None:
    """Soft cap, window and sink by the steps that the native source states, in numpy."""
    length, keys, cap, window = 9, 290, 1.5, 200
    q, k, v = drawn(length, keys, torch.float32)
    sinks = torch.tensor([0.7, -INF, 40.0, -3.0])
    got, lse = alone(q, k, v, causal=True, window=window, soft_cap=cap, sinks=sinks, scale=0.17)
    rows = runnable()[-1]
    position = np.arange(length)[:, None] + keys - length
    takes_part = (np.arange(keys) <= position) & (np.arange(keys) > position - window)
    for h in range(4):
        score = replay_chunks(q[:, h], k[:, h // 2], 16).numpy() * np.float32(0.17)
        bent = rows.map(TANH, torch.from_numpy(score / np.float32(cap))).numpy()
        score = np.where(takes_part, bent * np.float32(cap), np.float32(-np.inf))
        sink = np.float32(sinks[h])
        top = np.maximum(score.max(1, keepdims=True), sink)
        weight = exp32(score - top)
        first = np.zeros(length, int)  # of the sequence, not of the window
        total, acc = replay_weighted(weight, v[:, h // 2].numpy(), takes_part, first, 128)
        total = total + exp32(sink - top)
        assert same(got[:, h], torch.from_numpy(acc / total + np.float32(0)))
        exact = np.log(total.astype(np.float64)) + top
        torch.testing.assert_close(lse[h].double(), torch.from_numpy(exact[:, 0]))


@every_dtype
@pytest.mark.parametrize("sizes", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_head_sizes_are_accurate(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    """Against the definition in float64, every option at once; heads 4/2, 4/4 and 4/1."""
    for kv_heads in (1, 2, 4):
        q, _, _ = drawn(7, 1, dtype, size=sizes[0])
        k = draw(90, kv_heads, sizes[0], dtype=dtype, seed=5) / 4
        v = draw(90, kv_heads, sizes[1], dtype=dtype, seed=6)
        sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
        found = alone(q, k, v, causal=True, window=50, soft_cap=20.0, sinks=sinks)
        wide = [x[None].double() for x in (q, k, v)]
        lengths = (None,) * 5
        want = attend(*wide, sinks.double(), *lengths, True, None, 50, 20.0)
        eps = torch.finfo(dtype).eps
        tolerance = float(v.abs().max()) * (eps + 3e-6)
        torch.testing.assert_close(found[0].double(), want[0][0], rtol=eps, atol=tolerance)
        torch.testing.assert_close(found[1].double(), want[1][0], rtol=1e-5, atol=1e-5)


def test_a_query_that_sees_nothing() -> None:
    q, k, v = (x[None] for x in drawn(5, 3, torch.float32))
    out, lse = bi.attention(q, k, v, causal=True, return_lse=True)
    assert not out[0, :2].any()
    assert (lse[0, :, :2] == -INF).all()
    assert out[0, 2:].abs().amin() > 0
    sinks = torch.tensor([1.0, 2.0, 3.0, -INF])
    empty = {"seq_lens": torch.tensor([0])}
    out, lse = bi.attention(q, k, v, sinks=sinks, return_lse=True, **empty)
    assert not out.any()
    assert torch.equal(lse[0], sinks[:, None].expand(4, 5))
    nobody = bi.attention(q[:0], k[:0], v[:0], seq_lens=torch.zeros(0, dtype=torch.int32))
    assert nobody.shape == (0, 5, 4, 64)


def test_nan_that_takes_part_is_not_hidden() -> None:
    q, k, v = drawn(3, 40, torch.float32)
    v[38, 0, 5] = math.nan
    out = alone(q, k, v, causal=True)[0]
    assert out[0].isfinite().all()
    assert out[1:, :2, 5].isnan().all()
    assert out[1:, 2:].isfinite().all()
    sinks = torch.tensor([0.0, math.nan, 0.0, 0.0])
    assert alone(q[:, :, :], k, v, causal=True, sinks=sinks)[0][:, 1].isnan().all()


def _good() -> dict[str, Any]:
    q, k, v = (x[None] for x in drawn(3, 8, torch.float32))
    return {"query": q, "key": k, "value": v}


def _packed() -> dict[str, Any]:
    q, k, v = drawn(3, 8, torch.float32)
    cuts = {"cu_seqlens_q": torch.tensor([0, 1, 3]), "cu_seqlens_k": torch.tensor([0, 4, 8])}
    return {"query": q, "key": k, "value": v, **cuts}


def _paged() -> dict[str, Any]:
    q, k, v = drawn(3, 8, torch.float32)
    return {"query": q[None], **pages_of([(k, v)], 4)}


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], dict[str, Any], str]] = {
    "page out of range": (
        _paged,
        {"block_table": torch.tensor([[0, 7]])},
        r"block_table\[0, 1\] is 7, and sequence 0 of 8 keys uses it; expected a page from 0 to 6",
    ),
    "negative page": (_paged, {"block_table": torch.tensor([[-1, 0]])}, r"block_table\[0, 0\]"),
    "too few pages": (
        _paged,
        {"block_table": torch.tensor([[0]])},
        r"seq_lens\[0\] is 8; expected 0 to 4",
    ),
    "pages without lengths": (_paged, {"seq_lens": None}, "block_table needs seq_lens"),
    "empty pages": (
        _paged,
        {"key": torch.zeros(7, 0, 2, 64), "value": torch.zeros(7, 0, 2, 64)},
        r"page size, key.size\(1\), must be at least 1",
    ),
    "negative length": (_good, {"seq_lens": torch.tensor([-1])}, r"seq_lens\[0\] is -1"),
    "too long": (_good, {"seq_lens": torch.tensor([9])}, r"seq_lens\[0\] is 9; expected 0 to 8"),
    "length of a float": (_good, {"seq_lens": torch.tensor([3.0])}, "must be int32 or int64"),
    "lengths of another batch": (_good, {"seq_lens": torch.tensor([3, 3])}, "seq_lens of 2"),
    "lengths of two dimensions": (_good, {"seq_lens": torch.tensor([[3]])}, "seq_lens must be 1-D"),
    "negative padding": (_good, {"left_pad": torch.tensor([-2])}, r"left_pad\[0\] is -2"),
    "descending": (_packed, {"cu_seqlens_q": torch.tensor([0, 2, 1])}, r"cu_seqlens_q\[2\] is 1"),
    "not from zero": (
        _packed,
        {"cu_seqlens_k": torch.tensor([1, 4, 8])},
        r"cu_seqlens_k\[0\] is 1",
    ),
    "beyond the tokens": (_packed, {"cu_seqlens_k": torch.tensor([0, 4, 9])}, r"the 8 tokens"),
    "other cuts": (_packed, {"cu_seqlens_k": torch.tensor([0, 8])}, "cu_seqlens_k of 1"),
    "no cuts": (_packed, {"cu_seqlens_q": None}, r"query must be \[batch, length, heads, size\]"),
    "cuts and lengths": (_packed, {"seq_lens": torch.tensor([4, 4])}, "cu_seqlens_k says where"),
    "heads": (_good, {"query": torch.zeros(1, 3, 3, 64)}, "multiple of the key heads"),
    "head sizes": (_good, {"query": torch.zeros(1, 3, 4, 32)}, "head or key sizes differ"),
    "dtypes": (_good, {"value": torch.zeros(1, 8, 2, 64).half()}, "expected one dtype"),
    "batches": (_good, {"query": torch.zeros(2, 3, 4, 64)}, "expected 2 sequences"),
    "window of 0": (_good, {"window": 0, "causal": True}, "it must be at least 1"),
    "window of both sides": (_good, {"window": 5}, "needs causal=True"),
    "soft cap": (_good, {"soft_cap": 0.0}, "soft_cap must be positive"),
    "sinks": (_good, {"sinks": torch.zeros(2)}, r"sinks must be \[4\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused(name: str) -> None:
    make, change, message = REFUSED[name]
    args = make()
    bi.attention(**args)
    with pytest.raises(RuntimeError, match=message):
        bi.attention(**{**args, **change})


def _leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [draw(*s, dtype=dtype, seed=i).requires_grad_() for i, s in enumerate(shapes)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "window": 3},
        {"causal": True, "soft_cap": 1.5, "scale": 0.4},
        {"causal": True, "seq_lens": torch.tensor([5, 4]), "left_pad": torch.tensor([0, 2])},
    ],
    ids=["full", "window", "soft cap", "padded"],
)
def test_gradients_against_finite_differences(options: dict[str, Any]) -> None:
    with torch.enable_grad():
        leaves = _leaves((2, 3, 4, 6), (2, 5, 2, 6), (2, 5, 2, 3), (4,))
        assert torch.autograd.gradcheck(
            lambda q, k, v, s: bi.attention(q, k, v, sinks=s, **options), leaves
        )
        assert torch.autograd.gradcheck(
            lambda q, k, v, s: bi.attention(q, k, v, sinks=s, return_lse=True, **options), leaves
        )
        assert torch.autograd.gradcheck(
            lambda q, k, s: bi.attention(q, k, k, sinks=s, return_lse=True, **options)[1],
            (*leaves[:2], leaves[3]),
        )
        packed = _leaves((5, 2, 4), (7, 1, 4), (7, 1, 4))
        cuts = {"cu_seqlens_q": torch.tensor([0, 2, 4]), "cu_seqlens_k": torch.tensor([0, 3, 7])}
        assert torch.autograd.gradcheck(
            lambda q, k, v: bi.attention(q, k, v, causal=True, **cuts), packed
        )


def test_what_becomes_of_the_lse_of_a_query_that_sees_nothing_changes_no_gradient() -> None:
    """logaddexp of two of them has NaN as its gradient."""
    grads = []
    for rest in (0.0, math.nan):
        with torch.enable_grad():
            leaves = _leaves((1, 3, 2, 4), (1, 2, 2, 4), (1, 2, 2, 4), (2,))
            sinks = leaves.pop()
            out, lse = bi.attention(*leaves, causal=True, return_lse=True)
            _, other = bi.attention(*leaves, sinks=sinks, return_lse=True)
            weight = torch.tensor([rest, 1.0, 1.0], dtype=lse.dtype)
            upstream = (torch.ones_like(out), weight.expand_as(lse), torch.ones_like(other))
            given = (*leaves, sinks)
            grads.append(torch.autograd.grad((out, lse, other), given, upstream))
    assert all(same(a, b) for a, b in zip(*grads, strict=True))


@every_dtype
@every_option
def test_gradients_of_a_sequence_are_its_own(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Packed beside others and padded, against the sequence alone."""
    given = [drawn(*n, dtype, seed) for seed, n in enumerate(((12, 12), (33, 70), (40, 40)))]
    grads = [draw(len(x[0]), 4, 64, dtype=dtype, seed=9) for x in given]

    def gradients(*leaves: torch.Tensor, grad: torch.Tensor, **layout: Any) -> Any:
        with torch.enable_grad():
            leaves = tuple(x.detach().clone().requires_grad_() for x in leaves)
            out, lse = bi.attention(*leaves, **layout, **options, return_lse=True)
            return torch.autograd.grad((out, lse), leaves, (grad, grad[..., 0].mT.to(lse.dtype)))

    want = [
        gradients(*(t[None] for t in x), grad=g[None]) for x, g in zip(given, grads, strict=True)
    ]
    cuts = [torch.tensor([0, *(len(x[at]) for x in given)]).cumsum(0) for at in (0, 1)]
    together = gradients(
        *(torch.cat(parts) for parts in zip(*given, strict=True)),
        grad=torch.cat(grads),
        cu_seqlens_q=cuts[0],
        cu_seqlens_k=cuts[1],
    )
    for b, alone_ in enumerate(want):
        for which, got in enumerate(together):
            cut = cuts[min(which, 1)]
            assert same(got[cut[b] : cut[b + 1]], alone_[which][0]), (b, which)
    q, k, v = given[1]
    pad = (0, 0, 0, 0, 29, 5)
    padded = gradients(
        q[None], F.pad(k, pad)[None], F.pad(v, pad)[None], grad=grads[1][None],
        left_pad=torch.tensor([29]), seq_lens=torch.tensor([29 + len(k)]),
    )  # fmt: skip
    for which, got in enumerate(padded):
        got = got[0] if which == 0 else got[0, 29 : 29 + len(k)]
        assert same(got, want[1][which][0]), which
    assert not padded[1][0, :29].any()


def test_a_compiled_training_step_reads_the_lengths_at_every_call() -> None:
    q, k, v = (draw(2, n, h, 16, dtype=torch.float32) for n, h in ((3, 4), (32, 2), (32, 2)))

    def step(*leaves: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return bi.attention(*leaves, causal=True, seq_lens=lengths).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    with torch.enable_grad():
        for lengths in ([32, 32], [20, 7], [5, 31]):
            grads = []
            for function in (step, compiled):
                leaves = [x.clone().requires_grad_() for x in (q, k, v)]
                out = function(*leaves, lengths=torch.tensor(lengths))
                grads.append(torch.autograd.grad(out, leaves))
            assert all(same(a, b) for a, b in zip(*grads, strict=True)), lengths
        with bi.enabled():
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            report = bi.audit(lambda: bi.sum(bi.attention(*leaves, causal=True)).backward())
    report.raise_if_uncovered()
    torch.compiler.reset()


def test_gradients_through_pages_are_refused() -> None:
    args = _paged()
    with torch.enable_grad():
        out = bi.attention(args.pop("query").requires_grad_(), **args)
        with pytest.raises(RuntimeError, match="no gradients through a paged cache"):
            out.sum().backward()


@pytest.mark.parametrize("rows", runnable(), ids=lambda rows: rows.name)
def test_tanh_of_the_soft_cap_is_accurate(rows: Rows) -> None:
    spread = torch.arange(-(2**31), 2**31, 4099, dtype=torch.int64).to(torch.int32)
    x = torch.cat([spread.view(torch.float32), torch.linspace(-2, 2, 400_001)])
    x = x[~x.isnan()]
    got, exact = rows.map(TANH, x), x.double().tanh()
    unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent.clamp(min=-125) - 24)
    worst = float(((got.double() - exact).abs() / unit).max())
    assert 0.5 < worst < 1.7
    special = rows.map(TANH, torch.tensor([0.0, -0.0, INF, -INF]))
    assert same(special, torch.tensor([0.0, -0.0, 1.0, -1.0]))
    assert rows.map(TANH, torch.tensor([math.nan])).isnan().all()
    for library in runnable():
        assert same(library.map(TANH, x), got)
        assert same(library.map(TANH, x[5:40]), got[5:40])
