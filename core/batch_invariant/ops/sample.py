"""Contract of sample: one draw for each row, keyed by the request and not by the row.

Gumbel-max: the column with the largest score + noise. The noise of a column is a function of
(seed, position, column) alone, so a row's draw knows nothing of the batch.

Order, all in fp32 with each operation rounded, by the portable exp and log:
- `z = (x - top) / temperature`, with the row's exact maximum `top`; 0 where x equals it;
- `noise = -log(-log(1 - v))`, `v = (w + 1/2) 2^-31`, at most 1 - 2^-24, with the upper 31 bits w of
  the column's Philox word (`ops/philox.py`);
- the draw is the column with the largest `z + noise`, the lowest one in a tie.

Filters apply to z, so after the temperature. Columns are ranked by their logits, the lower column
first among equals. top_k keeps the first k. top_p keeps, of those, each one whose predecessors
weigh less than top_p of all of them; weights are exp(z) in whole units of 2^-40, cut off, so that
their sums are exact and have no order. min_p keeps what has exp(z) >= min_p. The first is always
kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from batch_invariant.ops.contract import Case, Draw, Op
from batch_invariant.ops.philox import column_words
from batch_invariant.ops.variant import tokens
from batch_invariant.stock import stock

PerRow = torch.Tensor | int | float
"""One value for every row, or a tensor of one for each."""

UNIT = 2.0**40
"""Weights are counted in units of 1 / UNIT; 2^22 of them fit an int64."""


def sample(
    logits: torch.Tensor,
    seeds: torch.Tensor | int,
    positions: torch.Tensor | int,
    temperature: PerRow = 1.0,
    top_k: torch.Tensor | int = 0,
    top_p: PerRow = 1.0,
    min_p: PerRow = 0.0,
) -> torch.Tensor:
    """Draws one column of every row of logits; a row's draw depends on its own arguments alone.

    logits: [..., V] in fp32, bf16 or fp16, on any device: equal logits give equal draws. All others
    are numbers, or tensors that broadcast to [...]. Returns int64 [...].

    seeds, positions: integers; the request's own seed, and how many tokens it has already. Equal
    pairs draw with equal noise, so no position of a request may be drawn twice.
    temperature: divides the logits; 0 takes the largest, the lowest column in a tie.
    top_k: 0 is off. Of equal logits the lower columns are kept: exactly k remain.
    top_p: in [0, 1], 1 is off; of what top_k leaves, as few of the largest as weigh that much.
    min_p: in [0, 1], 0 is off; what is at least that likely, in relation to the likeliest.

    A logit of -inf is never drawn. Where some are inf, one of those is. The draw is -1 where there
    is nothing to draw from: a NaN among the logits, or none above -inf.

    Raises ValueError for parameters out of range, as far as they are numbers or CPU tensors; values
    on a device cannot be read without waiting for it, and there such rows draw -1.
    """
    shape = logits.shape[:-1]

    def rows(name: str, value: PerRow, dtype: torch.dtype) -> torch.Tensor:
        return _per_row(name, value, shape, dtype, logits.device)

    if logits.dim() == 0 or logits.size(-1) == 0:
        raise ValueError(f"sample: logits of shape {list(logits.shape)} have no columns")
    for name, value in {"seeds": seeds, "positions": positions, "top_k": top_k}.items():
        _check_whole(name, value)
    _check_range("positions", positions, 0, 2**63 - 1)
    _check_range("temperature", temperature, 0, torch.finfo(torch.float32).max)
    _check_range("top_k", top_k, 0, 2**63 - 1)
    _check_range("top_p", top_p, 0, 1)
    _check_range("min_p", min_p, 0, 1)
    out: torch.Tensor = torch.ops.batch_invariant.sample.default(
        logits,
        rows("seeds", seeds, torch.int64),
        rows("positions", positions, torch.int64),
        rows("temperature", temperature, torch.float32),
        None if _is(top_k, 0) else rows("top_k", top_k, torch.int64),
        None if _is(top_p, 1) else rows("top_p", top_p, torch.float32),
        None if _is(min_p, 0) else rows("min_p", min_p, torch.float32),
        _most(top_k, logits.size(-1)),
    )
    return out


def _is(value: PerRow, number: int) -> bool:
    return not isinstance(value, torch.Tensor) and value == number


def _readable(value: torch.Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_whole(name: str, value: PerRow) -> None:
    whole = (
        not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        if isinstance(value, torch.Tensor)
        else isinstance(value, int) and not isinstance(value, bool)
    )
    if not whole:
        kind = value.dtype if isinstance(value, torch.Tensor) else repr(value)
        raise TypeError(f"sample: {name} must be an integer or a tensor of integers, got {kind}")


def _check_range(name: str, value: PerRow, least: float, most: float) -> None:
    if isinstance(value, torch.Tensor):
        if not _readable(value):
            return
        wrong = value[~((value >= least) & (value <= most))].flatten()
        if not len(wrong):
            return
        value = wrong[0].item()
    if not least <= value <= most:
        allowed = f"from {least:g} to {most:g}" if most <= 1 else f"finite, {least:g} or more"
        raise ValueError(f"sample: {name} must be {allowed}, got {value}")


def _per_row(
    name: str, value: PerRow, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        try:
            return torch.full(shape, value, dtype=dtype, device=device)
        except (RuntimeError, OverflowError):
            raise ValueError(f"sample: {name} must fit {dtype}, got {value}") from None
    try:
        return value.to(device, dtype).expand(shape)
    except RuntimeError:
        raise ValueError(
            f"sample: {name} has shape {list(value.shape)}; it must be one number, or one for each "
            f"of the rows {list(shape)}"
        ) from None


def _most(top_k: torch.Tensor | int, columns: int) -> int | None:
    """How many columns can remain in any row; None if nobody knows without asking a device."""
    if not isinstance(top_k, torch.Tensor):
        return min(top_k, columns) or None
    if not _readable(top_k) or not top_k.numel():
        return None
    least, most = top_k.aminmax()
    return min(int(most), columns) if least > 0 else None


def check_sample(logits: torch.Tensor, *per_row: torch.Tensor | None) -> torch.Size:
    """The shape of the result; raises unless every argument has it."""
    if logits.dim() == 0 or logits.size(-1) == 0:
        raise RuntimeError(f"sample: logits of shape {list(logits.shape)} have no columns")
    shape = logits.shape[:-1]
    for tensor in per_row:
        if tensor is not None and tensor.shape != shape:
            raise RuntimeError(
                f"sample: expected one value for each of the rows {list(shape)}, got a tensor of "
                f"shape {list(tensor.shape)}; batch_invariant.sample broadcasts"
            )
    return shape


def kept(
    weights: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None, key: str
) -> torch.Tensor:
    """Which of the ranked columns [rows, m] remain, by their weights in whole units.

    key: the dispatch key of the device, whose own kernel adds integers: they have no order.
    """
    rank = torch.arange(weights.size(1), device=weights.device)[None, :]
    within = torch.ones_like(weights, dtype=torch.bool)
    if top_k is not None:
        k = top_k[:, None]
        within = (rank < k) | (k <= 0)
    if top_p is None:
        return within
    weights = weights.masked_fill(~within, 0)
    sums = stock("cumsum", key)(weights, 1)
    p = top_p[:, None].double()
    light: torch.Tensor = (sums - weights).double() < p * sums[:, -1:].double()
    return within & (light | (p >= 1) | (rank == 0))


def drawable(
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """Which rows have parameters in their ranges; the others draw -1."""
    good = (positions >= 0) & (temperature >= 0) & temperature.isfinite()
    if top_k is not None:
        good &= top_k >= 0
    for share in (top_p, min_p):
        if share is not None:
            good &= (share >= 0) & (share <= 1)
    return good


def _fake(logits: torch.Tensor, *per_row: Any) -> torch.Tensor:
    return logits.new_empty(check_sample(logits, *per_row[:-1]), dtype=torch.int64)


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, n: int) -> torch.Tensor:
    """The noise [rows, n] in float64: its definition, and close to what is used."""
    w = column_words(seeds, positions, n) >> 1
    v = ((w.float() + 0.5) * 2.0**-31).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-v.double()))


def reference(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    most: int | None,
) -> torch.Tensor:
    """The definition in plain torch; its scores are in float64."""
    x = logits.flatten(0, -2).float() if logits.dim() > 1 else logits.float()[None]
    seeds, positions, temperature = seeds.flatten(), positions.flatten(), temperature.flatten()
    top_k, top_p, min_p = (None if t is None else t.flatten() for t in (top_k, top_p, min_p))
    top = x.amax(1, keepdim=True)
    greedy = temperature[:, None] == 0
    z = torch.where(x == top, 0.0, x - top) / torch.where(greedy, 1.0, temperature[:, None])
    score = torch.where(greedy, x.double(), z + gumbel(seeds, positions, x.size(1)))
    order = x.sort(dim=1, descending=True, stable=True).indices
    weights = (z.exp().nan_to_num(nan=0.0) * UNIT).long()
    remain = torch.empty_like(x, dtype=torch.bool)
    remain.scatter_(1, order, kept(weights.gather(1, order), top_k, top_p, "CPU"))
    if min_p is not None:
        remain &= z.exp() >= min_p[:, None]
    draws = score.masked_fill(~remain & ~greedy, -torch.inf).argmax(1)
    good = drawable(positions, temperature, top_k, top_p, min_p) & (top[:, 0] > -torch.inf)
    return draws.masked_fill(~good, -1).view(logits.shape[:-1])


Filters = Callable[[Draw, int], dict[str, Any]]


def _case(label: str, n: int, filters: Filters) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        def whole(most: int) -> torch.Tensor:
            return torch.randint(0, most, (rows,), generator=draw.generator)

        x = draw.rows(rows, n)
        return {
            "logits": x,
            "seeds": whole(2**62) - 2**61,
            "positions": whole(2**40),
            "temperature": whole(5) / 2,  # 0 in some rows
            **{"top_k": None, "top_p": None, "min_p": None, "most": None},
            **filters(draw, rows),
        }

    return Case(f"{n} {label}", args)


def _whole(draw: Draw, rows: int, least: int, most: int) -> torch.Tensor:
    return torch.randint(least, most, (rows,), generator=draw.generator)


def _all_filters(draw: Draw, rows: int) -> dict[str, Any]:
    return {
        "top_k": _whole(draw, rows, 0, 40),
        "top_p": _whole(draw, rows, 1, 17) / 16,
        "min_p": _whole(draw, rows, 0, 9) / 64,
    }


_TOP_K = _case("top_k", 4099, lambda draw, rows: {"top_k": _whole(draw, rows, 1, 51), "most": 50})

OPS = (
    Op(
        name="sample",
        schema=(
            "(Tensor logits, Tensor seeds, Tensor positions, Tensor temperature, Tensor? top_k, "
            "Tensor? top_p, Tensor? min_p, int? most) -> Tensor"
        ),
        fake=_fake,
        reference=reference,
        cases=(
            _case("top_k, top_p and min_p", 1027, _all_filters),
            _TOP_K,
            _case("plain", 20011, lambda draw, rows: {}),
        ),
        batch_axes=dict.fromkeys(
            ("logits", "seeds", "positions", "temperature", "top_k", "top_p", "min_p"), 0
        ),
        schedule=tokens,
        any_size=lambda n=2100: _case("top_k, top_p and min_p", n, _all_filters),
    ),
)
