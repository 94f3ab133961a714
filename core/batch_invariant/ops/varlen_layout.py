"""Where the sequences of a batch lie: dense, packed end to end, or their keys in pages of a cache.

A sequence is six numbers, its `Span`; kernels and the definition of attention read nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

NAME = "attention"


class Layout(NamedTuple):
    """The arguments of attention that say where sequences lie; None where a form is not used."""

    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    seq_lens: torch.Tensor | None = None
    left_pad: torch.Tensor | None = None
    block_table: torch.Tensor | None = None


class Span(NamedTuple):
    """One sequence.

    Its queries are rows `q_row` to `q_row + queries` of their storage, its keys `first` to `end`,
    counted from row `k_row` or from its first page. The first query stands at key `position`.
    """

    q_row: int
    queries: int
    position: int
    k_row: int
    first: int
    end: int


def batch_of(query: torch.Tensor, layout: Layout) -> int:
    """The number of sequences."""
    cuts = layout.cu_seqlens_q
    return query.size(0) if cuts is None else cuts.size(0) - 1


def capacity(key: torch.Tensor, layout: Layout) -> int:
    """How many keys a sequence has room for."""
    if layout.block_table is not None:
        return layout.block_table.size(1) * key.size(1)
    return key.size(-3)


def check_layout(query: torch.Tensor, key: torch.Tensor, layout: Layout) -> None:
    """Raises unless the shapes and dtypes of the layout fit the tensors."""
    shapes = f"query {list(query.shape)}, key {list(key.shape)}"
    for name, lengths in layout._asdict().items():
        if lengths is None:
            continue
        if lengths.dtype not in (torch.int32, torch.int64):
            raise RuntimeError(f"{NAME}: {name} must be int32 or int64, got {lengths.dtype}")
        rank = 2 if name == "block_table" else 1
        if lengths.dim() != rank or (name.startswith("cu_") and lengths.size(0) < 1):
            raise RuntimeError(
                f"{NAME}: {name} must be {rank}-D"
                f"{' with one entry more than sequences' if name.startswith('cu_') else ''}, got "
                f"{list(lengths.shape)}"
            )
    packed_q, packed_k = layout.cu_seqlens_q is not None, layout.cu_seqlens_k is not None
    for what, x, packed in (("query", query, packed_q), ("key", key, packed_k)):
        if x.dim() != (3 if packed else 4):
            raise RuntimeError(
                f"{NAME}: {what} must be [batch, length, heads, size], or [tokens, heads, size] "
                f"with cu_seqlens_{what[0]}; got {list(x.shape)} "
                f"{'with' if packed else 'without'} it"
            )
    paged = layout.block_table is not None
    if packed_k and (paged or layout.seq_lens is not None or layout.left_pad is not None):
        raise RuntimeError(
            f"{NAME}: cu_seqlens_k says where keys begin and end; seq_lens, left_pad and "
            "block_table belong to dense or paged keys"
        )
    if paged and layout.seq_lens is None:
        raise RuntimeError(f"{NAME}: block_table needs seq_lens, the number of keys of a sequence")
    if paged and key.size(1) < 1:
        raise RuntimeError(f"{NAME}: the page size, key.size(1), must be at least 1: {shapes}")
    batch = batch_of(query, layout)
    sizes = {
        name: x.size(0) - name.startswith("cu_")
        for name, x in layout._asdict().items()
        if x is not None
    }
    if not packed_k and not paged:
        sizes["key"] = key.size(0)
    wrong = {name: size for name, size in sizes.items() if size != batch}
    if wrong:
        found = ", ".join(f"{name} of {size}" for name, size in wrong.items())
        raise RuntimeError(f"{NAME}: expected {batch} sequences as the query has, got {found}")


def check_values(query: torch.Tensor, key: torch.Tensor, layout: Layout) -> None:
    """Raises unless every length and page is in range; the tensors of the layout are on the CPU."""
    for name, x in (("cu_seqlens_q", query), ("cu_seqlens_k", key)):
        cuts = getattr(layout, name)
        if cuts is None:
            continue
        values = cuts.tolist()
        falls = [i for i in range(1, len(values)) if values[i] < values[i - 1]]
        if values[0] != 0 or falls or values[-1] > x.size(0):
            at = falls[0] if falls else 0 if values[0] != 0 else len(values) - 1
            raise RuntimeError(
                f"{NAME}: {name} must begin with 0, not descend, and end at or before the "
                f"{x.size(0)} tokens; {name}[{at}] is {values[at]}"
            )
    most = capacity(key, layout)
    for name in ("seq_lens", "left_pad"):
        lengths = getattr(layout, name)
        for at, length in enumerate([] if lengths is None else lengths.tolist()):
            if not 0 <= length <= most:
                raise RuntimeError(
                    f"{NAME}: {name}[{at}] is {length}; expected 0 to {most}, the keys that a "
                    "sequence has room for"
                )
    table, lengths = layout.block_table, layout.seq_lens
    if table is not None and lengths is not None:
        used = torch.arange(table.size(1)) * key.size(1) < lengths[:, None]
        outside = used & ((table < 0) | (table >= key.size(0)))
        if bool(outside.any()):
            b, page = outside.nonzero()[0].tolist()
            raise RuntimeError(
                f"{NAME}: block_table[{b}, {page}] is {int(table[b, page])}, and sequence {b} of "
                f"{int(lengths[b])} keys uses it; expected a page from 0 to {key.size(0) - 1}"
            )


def spans(query: torch.Tensor, key: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The `Span` of every sequence, as int64 [batch, 6] where the layout is."""
    given = [x for x in layout if x is not None]
    device = given[0].device if given else torch.device("cpu")
    batch = batch_of(query, layout)

    def constant(value: int) -> torch.Tensor:
        return torch.full((batch,), value, dtype=torch.int64, device=device)

    q_row, queries = constant(0), constant(query.size(-3))
    k_row, first, end = constant(0), constant(0), constant(key.size(-3))
    if layout.cu_seqlens_q is not None:
        cuts = layout.cu_seqlens_q.long()
        q_row, queries = cuts[:-1], cuts[1:] - cuts[:-1]
    if layout.cu_seqlens_k is not None:
        cuts = layout.cu_seqlens_k.long()
        k_row, end = cuts[:-1], cuts[1:] - cuts[:-1]
    if layout.seq_lens is not None:
        end = layout.seq_lens.long()
    if layout.left_pad is not None:
        first = layout.left_pad.long().clamp(max=end)
    return torch.stack([q_row, queries, end - queries, k_row, first, end], 1)


def queries_of(x: torch.Tensor, span: Span, b: int) -> torch.Tensor:
    """The rows of sequence b in the query, or in a tensor laid out like it."""
    return x[b] if x.dim() == 4 else x[span.q_row : span.q_row + span.queries]


def keys_of(x: torch.Tensor, span: Span, b: int, layout: Layout) -> torch.Tensor:
    """The keys (or values) of sequence b, [keys, heads, size]; a view unless they lie in pages."""
    if layout.block_table is not None:
        at = torch.arange(span.first, span.end, device=x.device)
        pages = layout.block_table[b].to(x.device).long()
        return x[pages[at // x.size(1)], at % x.size(1)]
    rows = x[b] if x.dim() == 4 else x[span.k_row :]
    return rows[span.first : span.end]
