"""Aten operators whose own CPU kernels keep the promise, where those of other devices need not."""

from __future__ import annotations

IN_ORDER = "adds what meets in one place one after another, in the order of the index"
WHOLE_BATCH = "reduces over the batch by definition, one after another"
COUNTS = "counts, or sums with weights, in the order of the input"
SELECTS = "returns elements of the input: exact"
SCALAR_LOOP = "one scalar loop computes every element, wherever it stands"

HARMLESS = {
    name: reason
    for reason, names in {
        IN_ORDER: "embedding_dense_backward scatter_add",
        SCALAR_LOOP: "linalg_cross polar",
        WHOLE_BATCH: "nll_loss2d_forward nll_loss2d_backward",
        COUNTS: "bincount",
        SELECTS: "kthvalue median mode nanmedian",
    }.items()
    for name in names.split()
}
"""By name, why."""
