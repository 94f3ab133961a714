"""Aten operators whose own CUDA kernels keep the promise, and those of core's list that do not."""

from __future__ import annotations

from batch_invariant.ops.elementwise import ATEN

ALONE = "one thread computes an element from its own operands, wherever it stands"
SORTED = "sorts by place, then adds: the same from run to run"
REPEATS = "copies; where indices repeat, which value stays is undefined, as torch says"
RANDOM = "draws from one random stream: a row's draw depends on its place, its result does not"
NO_ELEMENT = "state and metadata: no element is computed"

_FOREACH = """
    abs acos add addcdiv addcmul asin atan ceil clamp_max clamp_min copy cos cosh div erf erfc exp
    expm1 floor frac lerp lgamma log log10 log1p log2 maximum minimum mul neg pow reciprocal
    round rsqrt sigmoid sign sin sinh sqrt sub tan tanh trunc zero
"""

_REPEATING = "index_copy scatter.src scatter.src_out scatter_.src"

_BY_ATOMICS = """
    scatter.reduce scatter.reduce_out scatter_.reduce scatter.value_reduce scatter.value_reduce_out
    scatter_.value_reduce
"""

HARMLESS: dict[str, str | None] = {
    **dict.fromkeys(ATEN, ALONE),
    **{f"_foreach_{name}": ALONE for name in _FOREACH.split()},
    "_masked_scale": ALONE,
    "embedding_dense_backward": SORTED,
    **dict.fromkeys(_REPEATING.split(), REPEATS),
    "_fused_dropout": RANDOM,
    "record_stream": NO_ELEMENT,
    "_cudnn_init_dropout_state": NO_ELEMENT,
    # These add with atomics, in the order of timing.
    **dict.fromkeys(_BY_ATOMICS.split()),
    # On a CPU these are made of other operators; here they are reductions of their own.
    "_foreach_max": None,
    "_foreach_powsum": None,
}
"""By name, why; None where core calls an operator harmless and this device's kernel is not."""
