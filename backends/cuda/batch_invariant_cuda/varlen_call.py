"""One call of attention over sequences, as the kernels for it take it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from batch_invariant.ops.varlen_layout import Layout, batch_of, capacity
from batch_invariant_cuda.attention_merge import BLOCK


class Call(NamedTuple):
    """Tensors whose last dimension is dense, a layout on their device, and a positive factor."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sinks: torch.Tensor | None
    layout: Layout
    out: torch.Tensor
    lse: torch.Tensor
    causal: bool
    factor: float
    window: int | None
    soft_cap: float | None

    @property
    def packed(self) -> bool:
        return self.layout.cu_seqlens_q is not None

    @property
    def paged(self) -> bool:
        return self.layout.block_table is not None

    @property
    def sequences(self) -> int:
        return batch_of(self.q, self.layout)

    @property
    def queries(self) -> int:
        """Of each sequence in storage; 0 where they are packed."""
        return 0 if self.packed else self.q.size(1)

    @property
    def tokens(self) -> int:
        """Queries of all packed sequences; 0 where they are not packed."""
        return self.q.size(0) if self.packed else 0

    @property
    def rows(self) -> int:
        """Queries of all sequences in storage."""
        return self.tokens or self.sequences * self.queries

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.q.size(-2) // self.k.size(-2)

    @property
    def room(self) -> int:
        """Keys that a sequence has at most."""
        return capacity(self.k, self.layout)

    @property
    def blocks(self) -> int:
        """Blocks of keys that a sequence has at most."""
        return -(-self.room // BLOCK)

    @property
    def pages(self) -> tuple[int, int, int]:
        """Columns of the page table, keys of a page, pages; of no use where there are none."""
        table = self.layout.block_table
        return (0, 1, 1) if table is None else (table.size(1), self.k.size(1), self.k.size(0))

    @property
    def strides(self) -> tuple[int, ...]:
        """Of a batch, a head and a row of the query; of a batch, a page, a head and a row of the
        key, and of the value; 0 where there is none."""
        q, found = self.q, []
        for x in (self.k, self.v):
            first = x.stride(0) if x.dim() == 4 else 0
            found += [0 if self.paged else first, first if self.paged else 0]
            found += [x.stride(-2), x.stride(-3)]
        return (0 if self.packed else q.stride(0), q.stride(-2), q.stride(-3), *found)

    @property
    def lse_strides(self) -> tuple[int, int]:
        return (0 if self.packed else self.lse.stride(0)), self.lse.stride(-2)

    @property
    def limits(self) -> tuple[bool, bool]:
        """Whether there are a window and a soft cap."""
        return self.window is not None, self.soft_cap is not None

    @property
    def factors(self) -> tuple[float, float]:
        """Of the scores in units of log 2; with a soft cap, of twice the argument of tanh and of
        tanh."""
        log2_e = math.log2(math.e)
        if self.soft_cap is None:
            return self.factor * log2_e, 0.0
        return 2 * log2_e * self.factor / self.soft_cap, self.soft_cap * log2_e

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """All that the kernels for any GPU take, in their order."""
        return (self.q, self.k, self.v, self.sinks, *self.layout, self.out, self.lse)
