"""The layouts of npu_fused_infer_attention_score: which rows and keys belong to which sequence.

TND lists sequences one after another, with running ends in `actual_seq_lengths`; BSH, BSND and BNSD
have one batch entry for each. Keys lie in the same layout, or in pages named by `block_table`: then
`actual_seq_lengths_kv` has the length of each sequence, not running ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from batch_invariant.errors import OpNotSupported

Tensor = torch.Tensor
_BATCHED = ("BSH", "BSND", "BNSD")


def together(lengths: Sequence[int]) -> list[int]:
    """Running ends of lengths."""
    total, ends = 0, []
    for length in lengths:
        total += int(length)
        ends.append(total)
    return ends


@dataclass(frozen=True)
class Layout:
    """One call, taken apart into sequences.

    queries: [N, L, D] of each sequence; keys, values: [Nkv, S, D].
    """

    name: str
    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    like: Tensor

    def sequences(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Query, key and value of each sequence."""
        return zip(self.queries, self.keys, self.values, strict=True)

    def put_together(self, outs: list[Tensor]) -> Tensor:
        """[N, L, D] of each sequence, as the call returns it; rows of no sequence are zero."""
        heads, size = outs[0].size(0), outs[0].size(2)
        if self.name == "TND":
            out = self.like.new_zeros(self.like.size(0), heads, size)
            at = 0
            for part in outs:
                out[at : at + part.size(1)] = part.transpose(0, 1)
                at += part.size(1)
            return out
        length = self.like.size(2 if self.name == "BNSD" else 1)
        out = self.like.new_zeros(len(outs), heads, length, size)
        for index, part in enumerate(outs):
            out[index, :, : part.size(1)] = part
        if self.name == "BNSD":
            return out
        out = out.transpose(1, 2).contiguous()
        return out if self.name == "BSND" else out.flatten(2)

    def log_sums(self, lses: list[Tensor], wanted: bool) -> Tensor:
        """[N, L] of each sequence as torch_npu returns them: [T, N, 1] or [B, N, L, 1]."""
        if not wanted:
            return self.like.new_empty(0, dtype=torch.float32)
        joined = self.put_together_sums(lses)
        return joined[..., None]

    def put_together_sums(self, lses: list[Tensor]) -> Tensor:
        """The sums without their last dimension of one."""
        if self.name == "TND":
            out = self.like.new_zeros(self.like.size(0), lses[0].size(0), dtype=torch.float32)
            at = 0
            for part in lses:
                out[at : at + part.size(1)] = part.mT
                at += part.size(1)
            return out
        length = self.like.size(2 if self.name == "BNSD" else 1)
        out = self.like.new_zeros(len(lses), lses[0].size(0), length, dtype=torch.float32)
        for index, part in enumerate(lses):
            out[index, :, : part.size(1)] = part
        return out


def sequences_of(query: Tensor, key: Tensor, value: Tensor, kw: dict[str, Any]) -> Layout:
    """Takes a call apart; `OpNotSupported` for layouts and sizes that are not understood."""
    name = str(kw.get("input_layout", "BSH"))
    heads = int(kw.get("num_heads", 1))
    kv_heads = int(kw.get("num_key_value_heads", 0)) or heads
    if name not in (*_BATCHED, "TND"):
        raise OpNotSupported(
            f"input_layout={name!r}: composed attention takes TND, {', '.join(_BATCHED)}; "
            "transpose, or install AscendC batch_invariant_ops"
        )
    if name == "TND":
        ends = [0, *map(int, kw.get("actual_seq_lengths") or ())]
        if len(ends) < 2 or ends[-1] > query.size(0):
            raise OpNotSupported(
                f"TND needs actual_seq_lengths, running ends up to {query.size(0)}; got {ends[1:]}"
            )
        queries = [query[begin:end].transpose(0, 1) for begin, end in pairwise(ends)]
    else:
        batch = _batched(query, name, heads)
        lengths = kw.get("actual_seq_lengths")
        queries = [
            q if lengths is None else q[:, : int(_at(lengths, i))] for i, q in enumerate(batch)
        ]
    if kw.get("block_table") is not None:
        keys, values = (_paged(cache, kw, kv_heads, len(queries)) for cache in (key, value))
    elif name == "TND":
        ends = [0, *map(int, kw.get("actual_seq_lengths_kv") or ())]
        if len(ends) != len(queries) + 1:
            raise OpNotSupported(
                f"TND needs actual_seq_lengths_kv for {len(queries)} sequences; got {ends[1:]}"
            )
        keys, values = (
            [t[begin:end].transpose(0, 1) for begin, end in pairwise(ends)] for t in (key, value)
        )
    else:
        lengths = kw.get("actual_seq_lengths_kv")
        keys, values = (
            [
                t if lengths is None else t[:, : int(_at(lengths, i))]
                for i, t in enumerate(_batched(whole, name, kv_heads))
            ]
            for whole in (key, value)
        )
    return Layout(name, queries, keys, values, query)


def _at(lengths: Sequence[int], index: int) -> int:
    """One length may stand for all sequences."""
    return lengths[index] if len(lengths) > 1 else lengths[0]


def _batched(x: Tensor, name: str, heads: int) -> list[Tensor]:
    """[N, L, D] of each batch entry."""
    if name == "BSH":
        x = x.unflatten(-1, (heads, -1))
    return list((x if name == "BNSD" else x.transpose(1, 2)).unbind(0))


def _paged(cache: Tensor, kw: dict[str, Any], kv_heads: int, count: int) -> list[Tensor]:
    """[Nkv, S, D] of each sequence, gathered from its pages."""
    table, lengths = kw["block_table"], kw.get("actual_seq_lengths_kv")
    if lengths is None:
        raise OpNotSupported("block_table needs actual_seq_lengths_kv, a length for each sequence")
    if cache.dim() == 3:  # [pages, page, Nkv * D]
        pages = cache.unflatten(-1, (kv_heads, -1)).transpose(1, 2)
    elif cache.dim() == 4:  # [pages, Nkv, page, D]
        pages = cache
    else:
        raise OpNotSupported(
            f"a paged cache of shape {list(cache.shape)}: expected [pages, page, heads * size] or "
            "[pages, heads, page, size]"
        )
    size = pages.size(2)
    found = []
    for index in range(count):
        length = int(_at(lengths, index))
        used = table[index, : -(-length // size)].long()
        rows = pages.index_select(0, used).transpose(0, 1).flatten(1, 2)
        found.append(rows[:, :length])
    return found


def split(
    call: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kw: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Calls once for the sequences of one new token and once for the longer ones.

    Only TND mixes them: elsewhere every sequence has the same number of rows.
    """
    ends = [0, *map(int, kw.get("actual_seq_lengths") or ())]
    lengths = [end - begin for begin, end in pairwise(ends)]
    kinds = [[i for i, n in enumerate(lengths) if (n == 1) == decode] for decode in (True, False)]
    if kw.get("input_layout") != "TND" or not all(kinds):
        return call(query, key, value, **kw)
    out = query.new_zeros(query.shape[:-1] + value.shape[-1:] if value.dim() == 3 else query.shape)
    sums: Tensor | None = None
    for chosen in kinds:
        rows = _places(ends, chosen, query.device)
        part_kw = {**kw, "actual_seq_lengths": together([lengths[i] for i in chosen])}
        k, v = key, value
        kv = list(map(int, kw.get("actual_seq_lengths_kv") or ()))
        if kw.get("block_table") is not None:
            where = torch.tensor(chosen, device=query.device)
            part_kw["block_table"] = kw["block_table"].index_select(0, where)
            part_kw["actual_seq_lengths_kv"] = [kv[i] for i in chosen]
        else:
            kv_ends = [0, *kv]
            columns = _places(kv_ends, chosen, query.device)
            k, v = key.index_select(0, columns), value.index_select(0, columns)
            part_kw["actual_seq_lengths_kv"] = together(
                [kv_ends[i + 1] - kv_ends[i] for i in chosen]
            )
        found, lse = call(query.index_select(0, rows), k, v, **part_kw)
        if out.shape[1:] != found.shape[1:]:
            out = out.new_zeros(len(query), *found.shape[1:])
        out[rows] = found
        if lse.numel():
            if sums is None:
                sums = lse.new_zeros(len(query), *lse.shape[1:])
            sums[rows] = lse
    return out, query.new_empty(0, dtype=torch.float32) if sums is None else sums


def _places(ends: list[int], chosen: list[int], device: torch.device) -> Tensor:
    """The rows of the chosen sequences."""
    rows = [row for i in chosen for row in range(ends[i], ends[i + 1])]
    return torch.tensor(rows, device=device)
