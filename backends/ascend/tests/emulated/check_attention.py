"""npu_fused_infer_attention_score on the emulated device: layouts, pages, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_npu

import batch_invariant as bi
import fakes
from batch_invariant_ascend.admission import same_bits

HEADS, KV_HEADS, SIZE, PAGE = 4, 2, 16, 8
LENGTHS, KEYS = [1, 5, 1, 3], [9, 5, 20, 11]
SCALE = SIZE**-0.5
_generator = torch.Generator().manual_seed(5)
Q = torch.randn(sum(LENGTHS), HEADS, SIZE, generator=_generator)
K = torch.randn(sum(KEYS), KV_HEADS, SIZE, generator=_generator)
V = torch.randn(sum(KEYS), KV_HEADS, SIZE, generator=_generator)
pytestmark = pytest.mark.usefixtures("mode")


def _ends(lengths: list[int]) -> list[int]:
    return torch.tensor(lengths).cumsum(0).tolist()


def _call(q: Any, k: Any, v: Any, lengths: Any, keys: Any, **more: Any) -> Any:
    words = {
        "num_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "scale": SCALE,
        "sparse_mode": 3,
        "actual_seq_lengths": lengths,
        "actual_seq_lengths_kv": keys,
        "input_layout": "TND",
        **more,
    }
    return torch_npu.npu_fused_infer_attention_score(q.npu(), k.npu(), v.npu(), **words)


def _whole(**more: Any) -> torch.Tensor:
    out: torch.Tensor = _call(Q, K, V, _ends(LENGTHS), _ends(KEYS), **more)[0].cpu()
    return out


def _sequence(i: int) -> tuple[slice, slice]:
    rows, keys = [0, *_ends(LENGTHS)], [0, *_ends(KEYS)]
    return slice(rows[i], rows[i + 1]), slice(keys[i], keys[i + 1])


def _pages() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The keys and values in pages of eight, at places that are shuffled, as [pages, page, H]."""
    needed = [-(-n // PAGE) for n in KEYS]
    order = torch.randperm(sum(needed) + 2, generator=_generator)
    table = torch.zeros(len(KEYS), max(needed), dtype=torch.int32)
    caches = [torch.full((len(order), PAGE, KV_HEADS * SIZE), torch.nan) for _ in range(2)]
    at = 0
    for i, count in enumerate(needed):
        _, keys = _sequence(i)
        for page in range(count):
            table[i, page] = order[at]
            for cache, x in zip(caches, (K[keys], V[keys]), strict=True):
                part = x[page * PAGE : (page + 1) * PAGE].flatten(1)
                cache[order[at], : len(part)] = part
            at += 1
    return caches[0], caches[1], table


def test_it_is_attention() -> None:
    out = _whole()
    for i in range(len(LENGTHS)):
        rows, keys = _sequence(i)
        q, k, v = (t.transpose(0, 1).double() for t in (Q[rows], K[keys], V[keys]))
        mask = torch.ones(LENGTHS[i], KEYS[i], dtype=torch.bool).tril(KEYS[i] - LENGTHS[i])
        exact = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], mask, enable_gqa=True
        )[0].transpose(0, 1)
        torch.testing.assert_close(out[rows].double(), exact, rtol=1e-5, atol=1e-5)
    assert "npu_fused_infer_attention_score" not in fakes.called


def test_a_sequence_is_alone_in_any_company() -> None:
    out = _whole()
    for i in range(len(LENGTHS)):
        rows, keys = _sequence(i)
        alone = _call(Q[rows], K[keys], V[keys], [LENGTHS[i]], [KEYS[i]])[0]
        assert same_bits(alone.cpu(), out[rows])


def test_pages_change_nothing() -> None:
    k, v, table = _pages()
    paged = _call(Q, k, v, _ends(LENGTHS), KEYS, block_table=table.npu(), block_size=PAGE)[0]
    assert same_bits(paged.cpu(), _whole())
    four = [c.view(-1, PAGE, KV_HEADS, SIZE).transpose(1, 2).contiguous() for c in (k, v)]
    paged = _call(Q, *four, _ends(LENGTHS), KEYS, block_table=table.npu(), block_size=PAGE)[0]
    assert same_bits(paged.cpu(), _whole())


def test_decode_has_the_bits_of_prefill() -> None:
    rows, keys = _sequence(1)
    whole = _whole()[rows]
    for i in range(LENGTHS[1]):
        one = _call(Q[rows][i : i + 1], K[keys][: i + 1], V[keys][: i + 1], [1], [i + 1])[0]
        assert same_bits(one.cpu(), whole[i : i + 1])


@pytest.mark.parametrize("layout", ["BSND", "BNSD", "BSH"])
def test_batched_layouts(layout: str) -> None:
    rows, keys = _sequence(1)
    q, k, v = (t[None] for t in (Q[rows], K[keys], V[keys]))
    if layout == "BNSD":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if layout == "BSH":
        q, k, v = (t.flatten(2) for t in (q, k, v))
    twice = [torch.cat([t, t]) for t in (q, k, v)]
    out, lse = _call(*twice, None, None, input_layout=layout, softmax_lse_flag=True)
    assert out.shape == twice[0].shape
    assert lse.shape == (2, HEADS, LENGTHS[1], 1)
    assert lse.dtype is torch.float32
    one = out[1].cpu()
    one = one.transpose(0, 1) if layout == "BNSD" else one.reshape(LENGTHS[1], HEADS, SIZE)
    assert same_bits(one, _whole()[rows])


def test_out_and_v2() -> None:
    expected = _whole()
    out, lse = torch.empty_like(Q).npu(), torch.empty(0).npu()
    words = {
        "num_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "scale": SCALE,
        "sparse_mode": 3,
        "input_layout": "TND",
    }
    torch.ops.npu.npu_fused_infer_attention_score.out(
        Q.npu(),
        K.npu(),
        V.npu(),
        actual_seq_lengths=_ends(LENGTHS),
        actual_seq_lengths_kv=_ends(KEYS),
        out=[out, lse],
        **words,
    )
    assert same_bits(out.cpu(), expected)
    found, sums = torch_npu.npu_fused_infer_attention_score_v2(
        Q.npu(),
        K.npu(),
        V.npu(),
        actual_seq_qlen=_ends(LENGTHS),
        actual_seq_kvlen=_ends(KEYS),
        num_query_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        softmax_scale=SCALE,
        sparse_mode=3,
        input_layout="TND",
        return_softmax_lse=True,
    )
    assert same_bits(found.cpu(), expected)
    assert sums.shape == (len(Q), HEADS, 1)
    assert not [name for name in fakes.called if "attention" in name]


def test_a_mask_given_as_a_tensor() -> None:
    rows, keys = _sequence(3)
    mask = ~torch.ones(LENGTHS[3], KEYS[3], dtype=torch.bool).tril(KEYS[3] - LENGTHS[3])
    out = _call(
        Q[rows], K[keys], V[keys], [LENGTHS[3]], [KEYS[3]], sparse_mode=0, atten_mask=mask.npu()
    )[0]
    assert same_bits(out.cpu(), _whole()[rows])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"pse_shift": torch.zeros(1)}, "with pse_shift has no invariant implementation"),
        ({"query_rope": torch.zeros(1)}, "with query_rope"),
        ({"sparse_mode": 4}, "sparse_mode=4"),
        ({"sparse_mode": 0, "pre_tokens": 5}, "pre_tokens=5"),
        ({"input_layout": "NSD"}, "input_layout='NSD'"),
        ({"actual_seq_lengths": None}, "TND needs actual_seq_lengths"),
        ({"actual_seq_lengths_kv": [1]}, "actual_seq_lengths_kv for 4 sequences"),
    ],
)
def test_what_is_not_understood_is_refused(words: dict[str, Any], message: str) -> None:
    words = {k: v.npu() if isinstance(v, torch.Tensor) else v for k, v in words.items()}
    call = {
        "actual_seq_lengths": _ends(LENGTHS),
        "actual_seq_lengths_kv": _ends(KEYS),
        "input_layout": "TND",
        "num_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "sparse_mode": 3,
    }
    with pytest.raises(bi.OpNotSupported, match=message):
        torch_npu.npu_fused_infer_attention_score(Q.npu(), K.npu(), V.npu(), **{**call, **words})
    with pytest.raises(bi.OpNotSupported, match=r"got torch.float64"):
        torch_npu.npu_fused_infer_attention_score(*(t.double().npu() for t in (Q, K, V)), **call)
