"""Calls of attention over sequences for the proof kit: cases, other ways to cut them, the bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from batch_invariant.ops.contract import Case, Draw
from batch_invariant.ops.probe import Probe, Site
from batch_invariant.ops.reduce_cases import sum_bound
from batch_invariant.ops.variant import Args, Axes, Variant
from batch_invariant.ops.varlen_definition import Part, attend, factor, parts
from batch_invariant.ops.varlen_layout import Layout, batch_of

_NOTHING: dict[str, Any] = {
    **dict.fromkeys(("sinks", *Layout._fields, "scale", "window", "soft_cap")),
    "causal": False,
}
BATCH_AXES = dict.fromkeys(("query", "key", "value", "seq_lens", "left_pad", "block_table"), 0)
_ALONG = (1, 2)  # the axes of output and lse along which queries lie


def _layout(args: Args) -> Layout:
    return Layout(*(args[name] for name in Layout._fields))


def _case(
    heads: int, kv_heads: int, length: int, keys: int, sizes: tuple[int, int], label: str = "",
    *, padded: bool = False, sinks: bool = False, page_size: int | None = None, **options: Any,
) -> Case:  # fmt: skip
    """`padded`: the sequences have lengths of their own; `page_size`: their keys lie in pages."""

    def args(draw: Draw, rows: int) -> dict[str, Any]:
        batch = (rows, keys)
        found = {**_NOTHING, **options}
        if page_size is not None:
            pages = keys // page_size
            batch = (3 * pages, page_size)
            drawn = torch.randint(0, batch[0], (rows, pages), generator=draw.generator)
            found["block_table"] = drawn.int()
        if padded or page_size is not None:
            drawn = torch.randint(length, keys + 1, (rows,), generator=draw.generator)
            found["seq_lens"] = drawn.int()
        if padded:
            drawn = torch.randint(0, keys // 2, (rows,), generator=draw.generator)
            found["left_pad"] = drawn.minimum(found["seq_lens"] - length).int()
        if sinks:
            found["sinks"] = draw.normal(heads)
        return {
            "query": draw.rows(rows, length, heads, sizes[0]) / 8,
            "key": draw.rows(*batch, kv_heads, sizes[0]) / 8,
            "value": draw.rows(*batch, kv_heads, sizes[1]),
            **found,
        }

    shape = f"{heads}/{kv_heads} heads x {'/'.join(map(str, dict.fromkeys(sizes)))}"
    paged = page_size is not None
    shared = ("key", "value") if paged else ()
    axes = {name: axis for name, axis in BATCH_AXES.items() if name not in shared}
    label = f"{shape}, {length} of {keys} {label}".rstrip()
    return Case(label, args, axes, differentiable=not paged)


CASES = (
    _case(3, 1, 17, 33, (64, 64), "causal", causal=True),
    _case(2, 2, 1, 1029, (64, 64)),
    _case(4, 2, 5, 130, (40, 40), "padded, window, sinks",
          padded=True, causal=True, window=40, sinks=True),
    _case(2, 1, 9, 70, (192, 128), "causal, soft cap", causal=True, soft_cap=3.0),
    _case(4, 2, 3, 160, (96, 96), "in pages of 16", page_size=16, causal=True),
)  # fmt: skip


def any_size(length: int = 9, keys: int = 300, size: int = 64) -> Case:
    """A case of any size."""
    return _case(2, 1, length, keys, (size, size), "causal", causal=True)


def cuts(args: Args, axes: Axes) -> Iterator[Variant]:
    """Chunks of the queries; other storage with NaN beside the keys; a beginning of the sequence.

    In all of them a query keeps its place among the keys that it sees.
    """
    length = args["query"].size(1)
    batch = batch_of(args["query"], _layout(args))
    ends = args["seq_lens"]
    if ends is None:
        ends = torch.full((batch,), args["key"].size(1), dtype=torch.int32)
    steps = {(begin, min(begin + 7, length)) for begin in range(0, length, 7)}
    steps |= {(at, at + 1) for at in {0, length // 2, length - 1}}
    for begin, end in sorted(steps - {(0, length)}):
        known = (ends - (length - end)).clamp(min=0) if args["causal"] else ends
        piece = {**args, "query": args["query"][:, begin:end], "seq_lens": known}
        label = f"queries {begin} to {end} of {length}"
        rows, at = range(begin, end), range(end - begin)
        yield Variant("T5 schedule", label, piece, rows, at, axes=_ALONG)
    everything = range(length)
    given = list(parts(args["query"], args["key"], args["value"], _layout(args)))
    if not given:
        return
    for label, change in _STORAGES.items():
        moved = {**args, **dict.fromkeys(Layout._fields), **change(given)}
        arranged = None if args["query"].dim() == moved["query"].dim() else _unpacked(len(given))
        yield Variant(
            "T6 packing", label, moved, everything, everything, axes=_ALONG, arranged=arranged
        )
    if args["causal"] and length > 1:
        first = range(length // 2 + 1)
        # NaN stands in the place of what comes later.
        earlier = [
            part._replace(
                key=part.key[:, : max(part.offset + len(first), 0)],
                value=part.value[:, : max(part.offset + len(first), 0)],
            )
            for part in given
        ]
        shorter = {**args, **dict.fromkeys(Layout._fields), **_dense(earlier, 0, 5)}
        shorter["query"] = args["query"][:, : len(first)]
        label = f"the first {len(first)} of {length} tokens"
        yield Variant("T7 prefix", label, shorter, first, first, axes=_ALONG)


def _dense(given: list[Part], before: int, behind: int) -> dict[str, Any]:
    """Keys as rows of one length, with NaN in the room before and behind them."""
    counts = [part.key.size(1) for part in given]
    room = before + max(counts) + behind
    found: dict[str, Any] = {"query": torch.stack([part.query.transpose(0, 1) for part in given])}
    for name in ("key", "value"):
        like = getattr(given[0], name)
        found[name] = like.new_full((len(given), room, like.size(0), like.size(2)), torch.nan)
        for row, part in zip(found[name], given, strict=True):
            x = getattr(part, name).transpose(0, 1)
            row[before : before + len(x)] = x
    found["left_pad"] = torch.full((len(given),), before, dtype=torch.int32)
    found["seq_lens"] = before + torch.tensor(counts, dtype=torch.int32)
    return found


def _packed(given: list[Part]) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: torch.cat([getattr(part, name).transpose(0, 1) for part in given])
        for name in ("query", "key", "value")
    }
    for name, along in (("cu_seqlens_q", "query"), ("cu_seqlens_k", "key")):
        lengths = [0, *(getattr(part, along).size(1) for part in given)]
        found[name] = torch.tensor(lengths).cumsum(0).int()
    return found


def _paged(given: list[Part], page_size: int) -> dict[str, Any]:
    """Pages in a shuffled order; NaN in the rest of the last ones and in those that nobody uses."""
    counts = [part.key.size(1) for part in given]
    columns = -(-max(counts) // page_size) + 1
    places = torch.randperm(len(given) * columns, generator=torch.Generator().manual_seed(0))
    table = places.view(len(given), columns)
    found: dict[str, Any] = {"query": torch.stack([part.query.transpose(0, 1) for part in given])}
    for name in ("key", "value"):
        like = getattr(given[0], name)
        shape = (len(places), page_size, like.size(0), like.size(2))
        found[name] = like.new_full(shape, torch.nan)
        for part, pages in zip(given, table, strict=True):
            x = getattr(part, name).transpose(0, 1)
            at = torch.arange(len(x))
            found[name][pages[at // page_size], at % page_size] = x
    found["block_table"] = table.int()
    found["seq_lens"] = torch.tensor(counts, dtype=torch.int32)
    return found


def _unpacked(batch: int) -> Callable[[tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    """[B L, H, E] and [H, B L] as [B, L, H, E] and [B, H, L]."""
    return lambda out: (
        out[0].unflatten(0, (batch, -1)),
        out[1].unflatten(1, (batch, -1)).movedim(1, 0),
    )


_STORAGES: dict[str, Callable[[list[Part]], dict[str, Any]]] = {
    "packed": _packed,
    "29 keys of NaN before, 70 behind": lambda given: _dense(given, 29, 70),
    **{f"pages of {n}": lambda given, n=n: _paged(given, n) for n in (16, 24, 64, 256)},  # type: ignore[misc]
}


def error_bound(dtype: torch.dtype, **args: Any) -> torch.Tensor:
    """An error of d in a score is a factor of exp(d) in a weight; then the chains over keys.

    A weight may be rounded to the dtype of the input, as the units that multiply it take it.
    """
    exact = attend(**args)[0]
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    weight = torch.finfo(dtype).eps / 2
    bounds = []
    given = parts(args["query"], args["key"], args["value"], _layout(args))
    for part, out in zip(given, exact, strict=True):
        repeat = part.query.size(0) // part.key.size(0)
        key = part.key.abs().repeat_interleave(repeat, 0)
        magnitude = part.query.abs() @ key.mT * abs(factor(part.query, args["scale"]))
        largest = magnitude.amax(-1).mT[..., None]  # [L, H, 1]
        error = unit * ((part.query.size(-1) + 4) * largest + 4 * (args["soft_cap"] or 0.0))
        size = part.value.abs().amax().expand_as(out)
        chains = sum_bound(size, out, part.key.size(1) + 16, dtype)
        bounds.append(2 * size * (torch.expm1(2 * error) + weight) + chains)
    return torch.stack(bounds)


_WIDTH = 64


def _probed(values: torch.Tensor, site: Site) -> dict[str, Any]:
    """A query of zeros weighs all keys alike, so a column of `value` is what is added."""
    row, n = site.at.start, values.size(1)
    query = site.noise(site.rows, 1, 1, _WIDTH)
    key = site.noise(site.rows, n, 1, _WIDTH)
    value = site.noise(1, site.rows, n, _WIDTH).movedim(0, 2)  # another shape: another noise
    query[row] = 0
    value[row, :, 0] = values.mT
    return {**_NOTHING, "query": query, "key": key, "value": value.contiguous()}


PROBE = Probe(
    args=_probed,
    read=lambda outputs, values, site: outputs[0][site.at.start, 0, 0],
    slots=_WIDTH,
    terms=512,
    most_rows=64,
    divided=True,
    sum_of="the weighted values",
    limits=(
        "the weights are equal: what a growing maximum does to the sum is not seen",
        "the sums over the head size and in the denominator are not probed",
    ),
)
