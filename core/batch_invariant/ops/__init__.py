"""The operator contracts, registered as torch operators in the namespace `batch_invariant`.

Importing this package defines schema, fake and autograd of every operator; which kernels they
run is the selector's business.
"""

from __future__ import annotations

from batch_invariant.ops import (
    attention,
    elementwise,
    embedding,
    grouped,
    matmul,
    norm,
    reduce,
    sample,
    scan,
    select,
    softmax,
    varlen_attention,
)
from batch_invariant.ops.contract import Op
from batch_invariant.ops.register import define

FAMILIES = (
    *(matmul, grouped, softmax, reduce, scan, norm, attention, varlen_attention),
    *(embedding, select, elementwise, sample),
)

CONTRACTS: dict[str, Op] = {op.name: op for family in FAMILIES for op in family.OPS}
"""Every contract by operator name."""

define(CONTRACTS.values())
