"""embedding on TPU: rows of the table are copied."""

from __future__ import annotations

from typing import Any

import jax

from batch_invariant.guarantee import Guarantee
from batch_invariant.order import undeclared
from batch_invariant_tpu.adapter import adapted
from batch_invariant_tpu.jax import select


def _embedding(weight: jax.Array, indices: jax.Array, *, how: Any) -> jax.Array:
    return select.embedding(weight, indices)


KERNELS = {
    "embedding": adapted(
        "embedding", _embedding, undeclared("copies"), Guarantee.SCHEDULE, indices=(1,)
    )
}
