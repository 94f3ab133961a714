"""sample on CPU: native noise, scores and weights; the filters rank by a selection or a sort."""

from __future__ import annotations

import torch

from batch_invariant.backend import Kernel
from batch_invariant.cpu import rows
from batch_invariant.errors import OpNotSupported
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
from batch_invariant.ops.dims import rows_along
from batch_invariant.ops.sample import check_sample, drawable, kept
from batch_invariant.order import undeclared
from batch_invariant.stock import stock


def _sample(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    most: int | None,
) -> torch.Tensor:
    shape = check_sample(logits, seeds, positions, temperature, top_k, top_p, min_p)
    if logits.dtype not in FLOATS:
        raise OpNotSupported(
            f"sample takes logits in {', '.join(map(str, FLOATS))}; got {logits.dtype}. "
            "Convert them with logits.float()"
        )
    x = rows_along(logits, -1)
    flat = [None if t is None else t.reshape(-1) for t in (top_k, top_p, min_p)]
    heat = temperature.reshape(-1)
    keep = None
    if flat[0] is not None or flat[1] is not None:
        values, order = _ranked(x, most)
        remain = kept(rows.sample_weights(values, heat), flat[0], flat[1], "CPU")
        keep = torch.zeros(x.shape, dtype=torch.bool).scatter_(1, order, remain)
    out = rows.sample(x, seeds.reshape(-1), positions.reshape(-1), heat, flat[2], keep)
    good = drawable(positions.reshape(-1), heat, *flat)
    return out.masked_fill_(~good, -1).view(shape)


def _ranked(x: torch.Tensor, most: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The first columns of every row by rank: their logits and where they are."""
    if most is not None and most <= x.size(1) // 16:
        return rows.topk(x, most, True)
    values, order = stock("sort.stable")(x, stable=True, dim=1, descending=True)
    return values.contiguous(), order


KERNELS = {
    "sample": Kernel(
        fn=_sample,
        guarantee=Guarantee.SCHEDULE,
        dtypes=frozenset(FLOATS),
        order=undeclared("largest score with noise of (seed, position, column), lowest first"),
        portable=frozenset(FLOATS),
    )
}
