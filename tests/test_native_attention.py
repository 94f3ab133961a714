"""Native attention has the bits of its declared order, whatever surrounds a query."""

from __future__ import annotations

import ctypes
import math
import struct
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from batch_invariant.cpu import native
from replay import replay_chunks, replay_weighted, same

PACK = struct.Struct("=8qQ3qQ3qQ3q2qQ4qQ3qQ3q2qd").pack
CODE = {getattr(torch, name): code for name, code in native.DTYPES.items()}
EXP = 0  # of bi_map
INF = float("inf")

LIBRARY = native.library()
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    threads: int = 1,
    library: Any = LIBRARY,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, H, L, Ev] and lse [B, H, L] of q [B, H, L, E], k and v [B, Hkv, S, ..]."""
    batch, heads, length, size = q.shape
    kv_heads, keys = k.shape[1:3]
    out = torch.empty(batch, length, heads, v.size(3), dtype=q.dtype).transpose(1, 2)
    lse = torch.empty(batch, heads, length)
    masks: tuple[int, ...] = (0,) * 7
    if mask is not None:
        full = mask.expand(batch, heads, length, keys)
        kind = 1 if mask.dtype == torch.bool else 2
        masks = (kind, CODE.get(mask.dtype, 0), full.data_ptr(), *full.stride())
    status = library.bi_attention(
        PACK(
            CODE[q.dtype], batch, heads, kv_heads, length, keys, size, v.size(3),
            q.data_ptr(), *q.stride()[:3],
            k.data_ptr(), *k.stride()[:3],
            v.data_ptr(), *v.stride()[:3],
            *masks,
            out.data_ptr(), *out.stride()[:3],
            lse.data_ptr(), *lse.stride(),
            int(causal), threads, size**-0.5 if scale is None else scale,
        )
    )  # fmt: skip
    assert status == 0, native.STATUS[status]
    return out, lse


def exp32(x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x, np.float32)
    out = np.empty_like(x)
    address = ctypes.c_void_p
    LIBRARY.bi_map(EXP, ctypes.c_int64(x.size), address(x.ctypes.data), address(out.ctypes.data), 1)
    return out


def replay_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """The order that attention.cpp states, for q [L, E], k [S, E], v [S, Ev] and mask [L, S]."""
    score = (replay_chunks(q, k, 16) * torch.tensor(scale, dtype=torch.float32)).numpy()
    first = np.zeros(len(score), int)
    if mask is not None:
        added = mask.float().log().numpy() if mask.dtype == torch.bool else mask.float().numpy()
        score = np.where(added == -np.inf, added, score + added)
        far = added < added.max(1, keepdims=True) - np.float32(1e4)
        first = ((added != -np.inf) & ~far).argmax(1)
    present = score != -np.inf
    top = score.max(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        weight = exp32(score - top)
    total, acc = replay_weighted(weight, v.float().numpy(), present, first, 128)
    with np.errstate(invalid="ignore"):
        out = np.where(present.any(1, keepdims=True), acc / total + np.float32(0), np.float32(0))
    return torch.from_numpy(out).to(q.dtype)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Values of mixed size and sign, so that a changed order of the keys shows."""
    g = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=g) * torch.randn(*shape, generator=g).exp()).to(dtype)


@every_dtype
@pytest.mark.parametrize("kind", ["", "causal", "bool", "late", "far", "additive", "float32"])
def test_bits_are_those_of_the_declared_order(dtype: torch.dtype, kind: str) -> None:
    for heads, length, keys, size, v_size in (
        (3, 1, 1, 1, 1), (1, 1, 300, 64, 64), (2, 5, 7, 24, 20), (1, 40, 33, 64, 80),
        (2, 3, 530, 300, 5), (4, 17, 40, 16, 96), (2, 9, 400, 4, 16),
    ):  # fmt: skip
        q = draw(1, heads, length, size, dtype=dtype)
        k, v = draw(1, 1, keys, size, dtype=dtype), draw(1, 1, keys, v_size, dtype=dtype)
        mask = None
        g = torch.Generator().manual_seed(keys)
        if kind == "bool":
            mask = torch.rand(1, heads, length, keys, generator=g) > 0.4
        elif kind == "late":  # the blocks of every row begin at another key
            begins = torch.arange(length)[:, None] * 37 % keys
            mask = (torch.arange(keys) >= begins).expand(1, heads, length, keys)
        elif kind == "far":  # the blocks of every row begin at its first -9e3
            mask, ends = torch.zeros(length, keys), torch.arange(length)[:, None] * 37 % keys
            for part, low in ((4, -9e3), (3, -1.1e4), (2, -1e9), (1, torch.finfo(dtype).min)):
                mask = mask.masked_fill(torch.arange(keys) < ends * part // 4, low)
            mask = mask.to(dtype).expand(1, heads, length, keys)
        elif kind in ("additive", "float32"):
            mask = torch.randn(1, heads, length, keys, generator=g)
            mask = mask.masked_fill(mask > 0.8, -INF)
            mask = mask.to(dtype) if kind == "additive" else mask
        out, _ = attention(q, k, v, mask, causal=kind == "causal", scale=0.17)
        whole = torch.ones(length, keys, dtype=torch.bool).tril() if kind == "causal" else None
        for h in range(heads):
            row_mask = whole if mask is None else mask[0, h]
            want = replay_attention(q[0, h], k[0, 0], v[0, 0], row_mask, 0.17)
            assert same(out[0, h], want), (heads, length, keys)


def test_the_replay_tells_orders_apart() -> None:
    """Negative control: the same comparison fails when the keys come in another order."""
    q, k = draw(1, 1, 9, 64, dtype=torch.float32), draw(1, 1, 200, 64, dtype=torch.float32)
    v = draw(1, 1, 200, 64, dtype=torch.float32, seed=1)
    out, _ = attention(q, k, v)
    q, k, v, out = q[0, 0], k[0, 0], v[0, 0], out[0, 0]
    assert same(out, replay_attention(q, k, v, None, 0.125))
    assert not same(out, replay_attention(q, k.flip(0), v.flip(0), None, 0.125))


@every_dtype
def test_a_query_does_not_see_the_others(dtype: torch.dtype) -> None:
    """One query of one head of one sequence alone, against all of them at once."""
    batch, heads, kv_heads, length, keys, size = 3, 6, 2, 130, 290, 64
    q = draw(batch, heads, length, size, dtype=dtype)
    k = draw(batch, kv_heads, keys, size, dtype=dtype, seed=1)
    v = draw(batch, kv_heads, keys, 40, dtype=dtype, seed=2)
    out, lse = attention(q, k, v)
    for threads in (1, 2):
        again, lse_again = attention(q, k, v, threads=threads)
        assert same(again, out)
        assert same(lse_again, lse)
    for b, h, rows in ((0, 0, slice(0, 1)), (1, 3, slice(5, 12)), (2, 5, slice(40, 130))):
        kv = h // (heads // kv_heads)
        one = q[b, h, rows], k[b, kv], v[b, kv]
        alone, lse_alone = attention(*(t.clone()[None, None] for t in one))
        assert same(alone[0, 0], out[b, h, rows])
        assert same(lse_alone[0, 0], lse[b, h, rows])
    for count in range(1, 70):
        assert same(attention(q[:1, :1, :count], k[:1, :1], v[:1, :1])[0][0, 0], out[0, 0, :count])


@every_dtype
def test_prefill_chunks_and_decode_agree(dtype: torch.dtype) -> None:
    length, size = 150, 64
    q = draw(1, 3, length, size, dtype=dtype)
    k, v = (draw(1, 1, length, size, dtype=dtype, seed=seed) for seed in (1, 2))
    whole, lse = attention(q, k, v, causal=True)
    for i in (0, 1, 31, 32, 33, 100, 149):
        step, lse_step = attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1])
        assert same(step[0, :, 0], whole[0, :, i])
        assert same(lse_step[0, :, 0], lse[0, :, i])
    for start, end in ((0, 40), (40, 41), (41, 150)):
        keep = torch.ones(end - start, end, dtype=torch.bool).tril(start)
        chunk, _ = attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], keep)
        assert same(chunk, whole[:, :, start:end])


@every_dtype
@pytest.mark.parametrize("kind", ["bool", "-inf", "-1e9", "lowest"])
def test_padding_on_either_side_does_not_matter(dtype: torch.dtype, kind: str) -> None:
    length, size = 150, 64
    q = draw(1, 3, length, size, dtype=dtype)
    k, v = (draw(1, 1, length, size, dtype=dtype, seed=seed) for seed in (1, 2))
    want, lse = attention(q, k, v, causal=True)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for left, right, fill in ((1, 0, 7.0), (5, 300, 1.0), (31, 2, INF), (290, 1, math.nan)):
        if kind in ("-1e9", "lowest"):  # these keys take part, with a weight of zero
            fill = fill if math.isfinite(fill) else -3.0
        keys = left + length + right
        padded_k = torch.full((1, 1, keys, size), fill, dtype=dtype)
        padded_v = torch.full((1, 1, keys, size), fill, dtype=dtype)
        inside = slice(left, left + length)
        padded_k[:, :, inside], padded_v[:, :, inside] = k, v
        mask = torch.zeros(length, keys, dtype=torch.bool)
        mask[:, inside] = causal
        if kind != "bool":
            low = torch.finfo(dtype).min if kind == "lowest" else float(kind)
            mask = torch.zeros(mask.shape).masked_fill(~mask, low)
            mask = mask if kind == "-1e9" else mask.to(dtype)  # in fp16 it is an infinity
        for shape in ((length, keys), (1, 1, length, keys)):
            out, got_lse = attention(q, padded_k, padded_v, mask.view(shape))
            assert same(out, want)
            assert same(got_lse, lse)


def test_infinity_that_takes_part_is_not_hidden() -> None:
    """The care for masked keys must not swallow a NaN that belongs in the result."""
    q, k = torch.randn(1, 1, 4, 32), torch.randn(1, 1, 9, 32)
    v = torch.randn(1, 1, 9, 32)
    v[0, 0, 2, 3], v[0, 0, 8, 5] = math.nan, INF
    out, _ = attention(q, k, v, causal=True)
    assert out.isfinite()[0, 0, :2].all()
    assert out.isnan()[0, 0, 2:, 3].all()
    assert out.isfinite()[0, 0, :, 5].all()  # key 8 is beyond every query
    keep = torch.ones(4, 9, dtype=torch.bool)
    assert (attention(q, k, v, keep)[0][0, 0, :, 5] == INF).all()
    k[0, 0, 1] = math.nan
    out, lse = attention(q, k, v, causal=True)
    assert same(out[0, 0, 1:], torch.full((3, 32), math.nan))
    assert lse[0, 0].isnan().tolist() == [False, True, True, True]


def test_a_query_without_keys_gives_zeros() -> None:
    q, k = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 5, 16)
    v = torch.full((2, 2, 5, 16), math.nan)
    v[1] = 1.0
    keep = torch.ones(2, 1, 3, 5, dtype=torch.bool)
    keep[:, :, 1] = False
    stock = F.scaled_dot_product_attention(q, k, v, keep)
    for mask in (keep, torch.zeros(keep.shape).masked_fill(~keep, -INF)):
        out, lse = attention(q, k, v, mask)
        assert same(out[:, :, 1], torch.zeros(2, 2, 16))
        assert same(stock[1, :, 1], torch.zeros(2, 16))
        assert (lse[:, :, 1] == -INF).all()
        assert out[0, :, ::2].isnan().all()
    out, lse = attention(q, k[:, :, :0], v[:, :, :0])
    assert same(out, torch.zeros(2, 2, 3, 16))
    assert (lse == -INF).all()


@every_dtype
def test_strides_and_mask_shapes(dtype: torch.dtype) -> None:
    batch, heads, length, keys, size = 2, 4, 9, 45, 64
    g = torch.Generator().manual_seed(0)
    q, k = draw(batch, heads, length, size, dtype=dtype), draw(batch, 2, keys, size, dtype=dtype)
    v = draw(batch, 2, keys, size, dtype=dtype, seed=3)
    for shape in (
        (batch, 1, 1, keys), (1, heads, length, 1), (length, keys), (keys,),
        (batch, 1, length, keys),
    ):  # fmt: skip
        mask = torch.rand(shape, generator=g) > 0.2
        full = mask.expand(batch, heads, length, keys).contiguous()
        want, _ = attention(q, k, v, full)
        assert same(attention(q, k, v, mask)[0], want)
        added = torch.zeros(full.shape).masked_fill(~full, -INF)
        assert same(attention(q, k, v, added.to(dtype))[0], want)
        assert same(attention(q, k, v, added.transpose(2, 3).contiguous().transpose(2, 3))[0], want)
        wide = torch.zeros(batch, length, 3 * heads * size + 1, dtype=dtype)
        moved = wide[..., 1 : 1 + heads * size].view(batch, length, heads, size).transpose(1, 2)
        moved.copy_(q)
        moved_v = torch.zeros(batch, keys, 2, size + 3, dtype=dtype).transpose(1, 2)[..., 3:]
        moved_v.copy_(v)
        assert same(attention(moved, k, moved_v, full)[0], want)


@every_dtype
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_accuracy(dtype: torch.dtype, spread: float) -> None:
    """Within the bound of a serial fp32 sum, against float64."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 260, 64, generator=g) for _ in range(3))
    q, k, v = (q * spread).to(dtype), k.to(dtype), v.to(dtype)
    out, lse = attention(q, k, v, causal=True)
    score = (q.double() @ k.double().mT) / 8
    score = score.masked_fill(~torch.ones(260, 260, dtype=torch.bool).tril(), -INF)
    exact = score.softmax(-1) @ v.double()
    unit = 2.0**-24
    error_of_score = unit * (65 * (q.double().abs() @ k.double().abs().mT).amax() / 8 + 8)
    bound = (2 * error_of_score + 600 * unit) * v.double().abs().amax()
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() + 2.0**-25
    assert ((out.double() - exact).abs() <= bound + rounding).all()
    exact_lse = score.logsumexp(-1)
    bound = error_of_score + unit * (300 + exact_lse.abs())
    assert ((lse.double() - exact_lse).abs() <= bound).all()


@every_dtype
@pytest.mark.parametrize(
    ("rows", "keys", "size", "causal"),
    [(300, 300, 64, True), (300, 300, 128, True), (17, 1000, 96, False), (1, 4096, 128, False)],
)
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_is_closer_to_float64_than_stock(
    dtype: torch.dtype, rows: int, keys: int, size: int, causal: bool, spread: float
) -> None:
    """By the root mean square of the errors."""
    g = torch.Generator().manual_seed(0)
    q = (torch.randn(2, 8, rows, size, generator=g) * spread).to(dtype)
    k, v = (torch.randn(2, 2, keys, size, generator=g).to(dtype) for _ in "kv")
    wide = (q.double(), *(x.double().repeat_interleave(4, 1) for x in (k, v)))
    exact = F.scaled_dot_product_attention(*wide, is_causal=causal)

    def error(found: torch.Tensor) -> float:
        return float((found.double() - exact).square().mean().sqrt())

    stock = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    assert error(attention(q, k, v, causal=causal)[0]) <= error(stock)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for Linux libraries")
def test_instruction_sets_agree() -> None:
    path = native._path("x86_64_v3")
    if LIBRARY._name == str(path) or not path.exists():
        pytest.skip("this machine runs one instruction set")
    other = ctypes.CDLL(str(path))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q = draw(2, 3, 70, 72, dtype=dtype)
        k, v = draw(2, 1, 290, 72, dtype=dtype), draw(2, 1, 290, 50, dtype=dtype)
        for rows in (1, 70):
            want, lse = attention(q[:, :, :rows], k, v)
            out, got_lse = attention(q[:, :, :rows], k, v, library=other)
            assert same(out, want)
            assert same(got_lse, lse)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ((1, 1, 1, 1, 1, 1, 1, 1), "unsupported dtype"),
        ((0, 1, 3, 2, 1, 1, 1, 1), "invalid argument"),
        ((0, 1, 1, 1, 1, -1, 1, 1), "invalid argument"),
    ],
)
def test_what_cannot_be_computed_is_refused(fields: tuple[int, ...], reason: str) -> None:
    assert native.STATUS[LIBRARY.bi_attention(PACK(*fields, *(0,) * 29, 1.0))] == reason
