"""Attention on a GPU: fp32 has the bits of the CPU; bf16 and fp16 those of any tile and any cut."""

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
from batch_invariant_cuda import attention, attention_ring  # noqa: E402

NAME = "scaled_dot_product_attention"
CPU = cpu_kernels()[NAME].fn
GPU = attention.KERNELS[NAME].fn
Pair = tuple[torch.Tensor, ...]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, **how: Any
) -> Pair:
    """A call that is planned anew, and where it can be repeated without a plan, that too."""
    attention.forget()
    found = GPU(q, k, v, mask, 0.0, how.get("causal", False), enable_gqa=True)
    if mask is None:
        assert same(found, GPU(q, k, v, None, 0.0, how.get("causal", False), enable_gqa=True))
    return found


def same(a: Pair, b: Pair, rows: slice = slice(None)) -> bool:
    """Results and log-sum-exps have equal bits: `rows` of the first, all rows of the second."""
    return all(mismatch(x[:, :, rows], y) is None for x, y in zip(a, b, strict=True))


class Draw:
    """Batches of 2, 8 heads that share 2; every other value is large and takes away precision."""

    def __init__(self, dtype: torch.dtype, size: int) -> None:
        self.generator = torch.Generator("cuda").manual_seed(size)
        self.dtype, self.size = dtype, size

    def heads(self, count: int, length: int) -> torch.Tensor:
        shape = (2, count, length, self.size)
        x = torch.randn(shape, device="cuda", generator=self.generator)
        return x.to(self.dtype)

    def values(self, length: int, count: int = 2) -> torch.Tensor:
        x = self.heads(count, length)
        x[:, :, ::2] *= 300
        return x

    def mask(self, rows: int, keys: int) -> torch.Tensor:
        """Rows that begin at different keys, and one that attends to nothing."""
        shape = (2, 1, rows, keys)
        keep = torch.rand(shape, device="cuda", generator=self.generator) > 0.4
        keep[0, 0, 0], keep[1, 0, 5, : keys // 2] = False, False
        return keep


def added(mask: torch.Tensor, dtype: torch.dtype, low: float = -math.inf) -> torch.Tensor:
    return torch.zeros(mask.shape, device="cuda").masked_fill(~mask, low).to(dtype)


@pytest.mark.parametrize("mask", ["", "bool", "-inf", "-1e9", "lowest", "causal"])
def test_fp32_has_the_bits_of_the_cpu(mask: str) -> None:
    generator = torch.Generator().manual_seed(3)
    for heads, kv_heads, rows, keys, size in (
        (4, 2, 1, 1029, 64), (2, 2, 17, 33, 40), (8, 1, 40, 40, 128), (2, 1, 5, 257, 256),
    ):  # fmt: skip
        q = torch.randn(2, heads, rows, size, generator=generator)
        k, v = (torch.randn(2, kv_heads, keys, size, generator=generator) for _ in "kv")
        attn_mask = None
        if mask not in ("", "causal"):
            keep = torch.rand(2, 1, rows, keys, generator=generator) > 0.3
            keep[..., : keys // 3], keep[0, 0, :, keys // 2], keep[0, 0, 0] = False, False, False
            if mask in ("bool", "-inf"):  # what is masked by a finite number takes part
                v[0, 0, keys // 2, 1] = math.inf
                k[0, 0, keys // 2] = math.nan
            attn_mask = keep
            if mask != "bool":
                low = torch.finfo(torch.float32).min if mask == "lowest" else float(mask)
                attn_mask = torch.zeros(keep.shape).masked_fill(~keep, low)
        args = (q, k, v, attn_mask)
        on_cpu = CPU(*args, 0.0, mask == "causal", enable_gqa=heads != kv_heads)
        gpu = [a if a is None else a.cuda() for a in args]
        on_gpu = GPU(*gpu, 0.0, mask == "causal", enable_gqa=heads != kv_heads)
        for c, g in zip(on_cpu, on_gpu, strict=True):
            assert (found := mismatch(c, g.cpu())) is None, (heads, rows, keys, size, str(found))


def test_fp32_of_nan_queries_is_nan() -> None:
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, 2, 37, 64, generator=generator) for _ in "qkv")
    q[0, 0, 2], q[1, 1, 36, 3] = math.nan, math.nan
    for causal in (False, True):
        on_cpu = CPU(q, k, v, None, 0.0, causal)
        on_gpu = GPU(q.cuda(), k.cuda(), v.cuda(), None, 0.0, causal)
        assert on_gpu[0][0, 0, 2].isnan().all()
        for c, g in zip(on_cpu, on_gpu, strict=True):
            assert mismatch(c, g.cpu()) is None


def one_run(mask: torch.Tensor) -> bool:
    """Whether the keys of every row of a mask are one run, from the same key for all rows."""
    keys = [row.nonzero().flatten().tolist() for row in mask if row.any()]
    return len({k[0] for k in keys}) < 2 and all(k[-1] - k[0] + 1 == len(k) for k in keys)


def general(patch: pytest.MonkeyPatch) -> None:
    """No call goes to the kernels for Hopper any more."""
    patch.setattr(attention, "takes_many", lambda *_: False)
    patch.setattr(attention, "takes_few", lambda *_: False)


@pytest.mark.parametrize("size", [40, 64, 128])
@pytest.mark.parametrize(
    ("rows", "keys", "causal"),
    [
        *((1, 5000, False), (4, 300, False), (3, 9, True), (17, 17, True), (17, 900, False)),
        *((2, 4000, True), (60, 60, True), (300, 300, True), (300, 700, False)),
    ],
)
def test_a_kept_call_has_the_bits_of_a_first(
    monkeypatch: pytest.MonkeyPatch, size: int, rows: int, keys: int, causal: bool
) -> None:
    draw = Draw(torch.bfloat16, size)
    attend(draw.heads(8, rows), draw.heads(2, keys), draw.values(keys), causal=causal)
    q, k, v = draw.heads(8, rows), draw.heads(2, keys), draw.values(keys)
    k[1, 0, -1], v[0, 1, -1] = math.nan, -math.inf
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_blocks", None)
        kept = GPU(q, k, v, None, 0.0, causal, enable_gqa=True)
    assert same(kept, attend(q, k, v, causal=causal))


@pytest.mark.parametrize("tile", [(16, 4, 2), (64, 8, 1), (128, 8, 2)], ids=str)
@pytest.mark.parametrize("kind", ["", "bool", "additive", "causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_tile_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    kind: str,
    tile: tuple[int, int, int],
) -> None:
    draw = Draw(dtype, 64)
    q, k, v = draw.heads(8, 75), draw.heads(2, 1500), draw.values(1500)
    mask = None
    if kind in ("bool", "additive"):
        mask = draw.mask(75, 1500)
        mask[..., 7] = False
        v[0, 0, 7], v[1, 1, 7] = math.inf, math.nan
        mask = mask if kind == "bool" else added(mask, dtype)
    if kind == "causal":
        q = draw.heads(8, 1500)
        v[0, 1, 1400], v[1, 0, 1401] = math.inf, math.nan
    usual = attend(q, k, v, mask, causal=kind == "causal")
    general(monkeypatch)
    monkeypatch.setattr(attention, "tile", lambda *_: attention.Tile(*tile))
    for run in (1, 3, 99):
        monkeypatch.setattr(attention, "run_of", lambda *_, run=run: run)
        assert same(usual, attend(q, k, v, mask, causal=kind == "causal")), run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [64, 128])
class TestHopper:
    @pytest.fixture(autouse=True)
    def _needs_hopper(self) -> None:
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("these kernels are for compute capability 9.0")

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("lengths", [(64, 64), (200, 1), (129, 385), (1300, 1300)], ids=str)
    def test_many_rows_have_the_bits_of_the_general_kernel(
        self,
        monkeypatch: pytest.MonkeyPatch,
        dtype: torch.dtype,
        size: int,
        causal: bool,
        lengths: tuple[int, int],
    ) -> None:
        draw = Draw(dtype, size)
        q, k, v = draw.heads(8, lengths[0]), draw.heads(2, lengths[1]), draw.values(lengths[1])
        k[1, 0, -1], v[0, 1, -1] = math.nan, -math.inf
        assert attention.takes_many(q, k, v)
        found = attend(q, k, v, causal=causal)
        general(monkeypatch)
        assert same(found, attend(q, k, v, causal=causal))

    @pytest.mark.parametrize("lengths", [(64, 64), (200, 1), (300, 300), (129, 700)], ids=str)
    @pytest.mark.parametrize("kind", ["bool", "infinite", "lowest", "heads"])
    def test_masked_rows_have_the_bits_of_the_general_kernel(
        self,
        monkeypatch: pytest.MonkeyPatch,
        dtype: torch.dtype,
        size: int,
        kind: str,
        lengths: tuple[int, int],
    ) -> None:
        rows, keys = lengths
        draw = Draw(dtype, size)
        q, k, v = draw.heads(8, rows), draw.heads(2, keys), draw.values(keys)
        columns = torch.arange(keys, device="cuda")
        causal = columns <= torch.arange(rows, device="cuda")[:, None] + keys - rows
        # A batch padded on the left and one on the right; rows without keys in both.
        mask = torch.stack([causal & (columns >= keys // 3), causal & (columns < keys // 2)])[
            :, None
        ]
        if kind == "heads":  # of which only some have a plan
            mask = mask.repeat(1, 8, 1, 1)
            mask[0, 3] &= columns != keys // 2
            mask[1, 5] &= columns > torch.arange(rows, device="cuda")[:, None] - 20
        v[0, 0, 0], v[1, 1, -1], k[0, 1, 0] = math.inf, math.nan, math.nan
        if kind in ("infinite", "lowest"):
            mask = added(mask, dtype, -math.inf if kind == "infinite" else torch.finfo(dtype).min)
        seen: list[torch.Tensor] = []
        many_rows = attention.many_rows
        monkeypatch.setattr(
            attention, "many_rows", lambda *a: (seen.append(a[-3]), many_rows(*a))[1]
        )
        found = attend(q, k, v, mask)
        (plan,) = seen
        on = mask if mask.dtype == torch.bool else mask == 0
        planned = [[one_run(head) for head in heads] for heads in on.cpu()]
        if (kind, dtype) == ("lowest", torch.float16):  # -65504 is a score like others
            planned = [[False], [False]]
        assert (plan[..., 0] >= 0).tolist() == planned
        general(monkeypatch)
        assert same(found, attend(q, k, v, mask))
        if kind == "infinite":
            assert same(found, attend(q, k, v, mask == 0))

    @pytest.mark.parametrize("rows", [1, 4])
    @pytest.mark.parametrize("keys", [1, 127, 128, 129, 1025, 5000])
    def test_few_rows_have_the_bits_of_the_general_kernel(
        self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int, rows: int, keys: int
    ) -> None:
        draw = Draw(dtype, size)
        q, k, v = draw.heads(8, rows), draw.heads(2, keys), draw.values(keys)
        k[1, 0, -1], v[0, 1, -1] = math.nan, -math.inf
        assert attention.takes_few(q, k, v)
        found = attend(q, k, v)
        # A part that no program leaves must not be there from an earlier call.
        parts = attention._parts
        monkeypatch.setattr(attention, "_parts", lambda *a: parts(*a).fill_(math.nan))
        for run in (1, 2, 3, 7, 99):
            monkeypatch.setattr(attention, "run_of", lambda *_, run=run: run)
            assert same(found, attend(q, k, v)), run
        general(monkeypatch)
        assert same(found, attend(q, k, v))

    @pytest.mark.parametrize(
        ("heads", "rows"), [(8, 1), (8, 2), (8, 4), (6, 1), (6, 3), (10, 3), (14, 1), (14, 2)]
    )
    @pytest.mark.parametrize("keys", [1, 127, 129, 300, 513, 896, 1669, 3969, 4096])
    def test_a_multiprocessor_for_each_tile_changes_no_bit(
        self,
        monkeypatch: pytest.MonkeyPatch,
        dtype: torch.dtype,
        size: int,
        heads: int,
        rows: int,
        keys: int,
    ) -> None:
        draw = Draw(dtype, size)
        q, k, v = draw.heads(heads, rows), draw.heads(2, keys), draw.values(keys)
        k[1, 0, -1], v[0, 1, -1] = math.nan, -math.inf
        went: list[bool] = []
        few_rows = attention.few_rows
        monkeypatch.setattr(attention, "few_rows", lambda *a: (went.append(a[-2]), few_rows(*a))[1])
        found = []
        for alone in (True, False):
            monkeypatch.setattr(attention, "goes_alone", lambda *_, alone=alone: alone)
            found.append(attend(q, k, v))
        assert went == [True, False]
        assert same(*found)
        general(monkeypatch)
        assert same(found[0], attend(q, k, v))

    def test_programs_take_several_tiles(
        self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int
    ) -> None:
        draw = Draw(dtype, size)
        q, k, v = draw.heads(32, 900), draw.heads(8, 900), draw.values(900, 8)
        usual = attend(q, k, v, causal=True)
        for processors in (1, 7, 64):
            monkeypatch.setattr(attention_ring, "multiprocessors", lambda _, n=processors: n)
            monkeypatch.setattr(attention_ring, "SECTION", processors << 20)
            assert same(usual, attend(q, k, v, causal=True))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.bfloat16, 128), (torch.float16, 64), (torch.bfloat16, 40), (torch.bfloat16, 256)],
    ids=str,
)
class TestLowPrecision:
    def test_is_accurate(self, dtype: torch.dtype, size: int) -> None:
        draw = Draw(dtype, size)
        q, k, v = draw.heads(8, 75), draw.heads(2, 1500), draw.heads(2, 1500)
        mask = draw.mask(75, 1500)
        out, lse = attend(q, k, v, mask)
        wide = [x.double().repeat_interleave(4, 1) if x is not q else q.double() for x in (q, k, v)]
        scores = (wide[0] @ wide[1].mT / math.sqrt(size)).masked_fill(~mask, -math.inf)
        exact = scores.softmax(-1).nan_to_num(0) @ wide[2]
        bound = 2.5 * torch.finfo(dtype).eps * v.abs().max().double()
        assert ((out.double() - exact).abs() <= bound).all()
        assert ((lse - scores.logsumexp(-1)).nan_to_num(0, 0, 0).abs() < 1e-3).all()
        assert (lse[0, :, 0] == -math.inf).all()
        assert (out[0, :, 0] == 0).all()

    @pytest.mark.parametrize("rows", [1, 75])
    @pytest.mark.parametrize("masked", [False, True])
    def test_scores_of_any_magnitude_keep_their_order(
        self, dtype: torch.dtype, size: int, rows: int, masked: bool
    ) -> None:
        draw = Draw(dtype, size)
        q, k, v = draw.heads(8, rows), draw.heads(2, 1500), draw.values(1500)
        mask = torch.ones(2, 1, rows, 1500, dtype=torch.bool, device="cuda") if masked else None
        out, lse = GPU(q, k, v, mask, 0.0, False, scale=1e12, enable_gqa=True)
        scores = q.double() @ k.double().repeat_interleave(4, 1).mT * 1e12
        largest, at = scores.max(-1)
        index = at[..., None].expand(*at.shape, size)
        assert torch.equal(out, v.repeat_interleave(4, 1).gather(2, index))
        assert ((lse.double() / largest - 1).abs() < 1e-5).all()

    @pytest.mark.parametrize("pad", [1, 64, 700])
    def test_ignores_masked_keys_before_and_behind(
        self, dtype: torch.dtype, size: int, pad: int
    ) -> None:
        draw = Draw(dtype, size)
        q, k, v = draw.heads(8, 75), draw.heads(2, 1500), draw.values(1500)
        mask = draw.mask(75, 1500)
        plain, masked = attend(q, k, v), attend(q, k, v, mask)
        assert same(masked, attend(q, k, v, added(mask, dtype)))
        more_k = torch.cat([draw.heads(2, pad), k], 2)
        more_v = torch.cat([draw.values(pad), v], 2)
        off = torch.zeros(2, 1, 75, pad, dtype=torch.bool, device="cuda")
        on = torch.ones(2, 1, 75, 1500, dtype=torch.bool, device="cuda")
        padded = torch.cat([off, mask], -1)
        low = added(padded, dtype, torch.finfo(dtype).min)
        low[0, 0, 0] = -math.inf
        assert same(masked, attend(q, more_k, more_v, low))
        more_v[:, :, 0] = math.nan
        assert same(masked, attend(q, more_k, more_v, padded))
        assert same(masked, attend(q, more_k, more_v, added(padded, dtype)))
        assert same(plain, attend(q, more_k, more_v, torch.cat([off, on], -1)))
        behind = (more_k.roll(-pad, 2), more_v.roll(-pad, 2), torch.cat([on, off], -1))
        assert same(plain, attend(q, *behind))

    def test_ignores_how_a_sequence_is_cut(self, dtype: torch.dtype, size: int) -> None:
        draw = Draw(dtype, size)
        q, k, v = draw.heads(8, 1300), draw.heads(2, 1300), draw.values(1300)
        whole = attend(q, k, v, causal=True)
        causal = torch.ones(1300, 1300, dtype=torch.bool, device="cuda").tril()
        assert same(whole, attend(q, k, v, causal))
        for at in (0, 63, 511, 512, 1299):  # a decode step with its cache
            step = attend(q[:, :, at : at + 1], k[:, :, : at + 1], v[:, :, : at + 1])
            assert same(whole, step, slice(at, at + 1))
        first = attend(q[:, :, :700], k[:, :, :700], v[:, :, :700], causal=True)
        assert same(whole, first, slice(0, 700))
        assert same(whole, attend(q[:, :, 700:], k, v, causal[700:]), slice(700, None))
        alone = attend(q[1:, 4:5], k[1:, 1:], v[1:, 1:], causal=True)
        assert same(tuple(x[1:, 4:5] for x in whole), alone)
        packed = torch.block_diag(causal[:600, :600].int(), causal[:700, :700].int()).bool()
        second = attend(q[:, :, 600:], k[:, :, 600:], v[:, :, 600:], causal=True)
        assert same(attend(q, k, v, packed), second, slice(600, None))
        window = causal & ~torch.ones_like(causal).tril(-200)
        step = attend(q[:, :, 1000:1001], k[:, :, 801:1001], v[:, :, 801:1001])
        assert same(attend(q, k, v, window), step, slice(1000, 1001))

    def test_keeps_later_tokens_and_other_rows_out(self, dtype: torch.dtype, size: int) -> None:
        draw = Draw(dtype, size)
        q, k, v = draw.heads(8, 300), draw.heads(2, 300), draw.values(300)
        whole = attend(q, k, v, causal=True)
        later_k, later_v = k.clone(), v.clone()
        later_k[:, :, 170:], later_v[:, :, 170:] = math.nan, math.inf
        spoilt = attend(q, later_k, later_v, causal=True)
        assert same(tuple(x[:, :, :170] for x in whole), tuple(x[:, :, :170] for x in spoilt))
        assert spoilt[0][:, :, 170:].isnan().all()
        other = q.clone()
        other[0, 3, 5] = math.nan
        out = attend(other, k, v, causal=True)[0]
        assert out[0, 3, 5].isnan().all()
        assert int(out.isnan().any(-1).sum()) == 1

    def test_takes_any_strides_and_scales(self, dtype: torch.dtype, size: int) -> None:
        draw = Draw(dtype, size)
        q, k, v = draw.heads(8, 75), draw.heads(2, 300), draw.values(300)
        plain = attend(q, k, v)
        odd = torch.empty(2, 2, 300, size + 1, dtype=dtype, device="cuda")[..., 1:].copy_(k)
        assert same(plain, attend(q.transpose(1, 2).contiguous().transpose(1, 2), odd, v))
        negated = GPU(-q, k, v, None, 0.0, False, scale=-1 / math.sqrt(size), enable_gqa=True)
        assert same(plain, negated)
        level = GPU(q, k, v, None, 0.0, False, scale=0.0, enable_gqa=True)[0].double()
        mean = v.double().mean(2, True).repeat_interleave(4, 1)
        assert ((level - mean).abs() <= 300 * torch.finfo(dtype).eps * 3).all()
