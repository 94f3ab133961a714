"""Batch-invariant operators for TPUs as functions of `jax.Array`s; no torch.

    from batch_invariant_tpu import jax as bi

    y = bi.rms_norm(bi.linear(x, weight), scale)

They work under jit, vmap, grad and shard_map. A row's result has the same bits whatever else is in
the batch. What adds across elements is a Pallas kernel, compiled for the TPU; `interpret=True`
computes on the CPU, which tests the wiring and says nothing about the bits of a TPU.
"""

from batch_invariant_tpu.requirements import require_jax

require_jax()

from batch_invariant_tpu.jax.attention import attention  # noqa: E402
from batch_invariant_tpu.jax.elementwise import elementwise, pow  # noqa: E402
from batch_invariant_tpu.jax.matmul import linear, matmul  # noqa: E402
from batch_invariant_tpu.jax.norm import (  # noqa: E402
    group_norm,
    layer_norm,
    layer_norm_statistics,
    rms_norm,
)
from batch_invariant_tpu.jax.parallel import row_parallel_matmul  # noqa: E402
from batch_invariant_tpu.jax.reduce import logsumexp, mean, sum  # noqa: E402
from batch_invariant_tpu.jax.reduce_forward import norm, prod, std, var  # noqa: E402
from batch_invariant_tpu.jax.scan import cumsum  # noqa: E402
from batch_invariant_tpu.jax.select import argmax, embedding, topk  # noqa: E402
from batch_invariant_tpu.jax.softmax import (  # noqa: E402
    log_softmax,
    log_softmax_backward,
    softmax,
    softmax_backward,
)

__all__ = [
    "argmax",
    "attention",
    "cumsum",
    "elementwise",
    "embedding",
    "group_norm",
    "layer_norm",
    "layer_norm_statistics",
    "linear",
    "log_softmax",
    "log_softmax_backward",
    "logsumexp",
    "matmul",
    "mean",
    "norm",
    "pow",
    "prod",
    "rms_norm",
    "row_parallel_matmul",
    "softmax",
    "softmax_backward",
    "std",
    "sum",
    "topk",
    "var",
]
