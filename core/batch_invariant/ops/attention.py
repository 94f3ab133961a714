"""Contract of scaled_dot_product_attention.

Order, for every query row on its own: scores as fp32 sums over chunks of 16 of the head dimension,
each a serial chain; the exact maximum; exp; the denominator and the weighted sum of values over
blocks of 128 keys, ascending, in each a serial chain; one division; one rounding. Keys that are
masked add nothing, whatever they hold, and blocks are counted from the first key that the mask lets
a row see. Of additive masks that is the first key whose addend is not more than 1e4 below the row's
largest. So the result does not depend on left or right padding, nor on how many query rows are
computed together. A masked key between others keeps its place: taking it out may change bits. In
float64 every sum is one chain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import Case, Draw, Op
from batch_invariant.ops.matmul import matmul
from batch_invariant.ops.probe import Probe, Site
from batch_invariant.ops.reduce import sum
from batch_invariant.ops.reduce_cases import sum_bound
from batch_invariant.ops.variant import Args, Axes, Variant

KEY_BLOCK = 128  # keys of a block, as in cpu/native/attention.cpp


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """softmax(query @ key.mT * scale + mask) @ value, as `torch.nn.functional` spells it.

    query: [..., H, L, E], key: [..., Hkv, S, E], value: [..., Hkv, S, Ev]; attn_mask: bool (True
    takes part) or additive, broadcastable to [..., H, L, S]; is_causal masks above the diagonal
    that starts top left. With `enable_gqa`, H is a multiple of Hkv. Dropout draws one random
    stream for the whole batch and is refused.

    Source: Vaswani et al., Attention Is All You Need, 2017.
    """
    out: torch.Tensor = torch.ops.batch_invariant.scaled_dot_product_attention.default(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]
    return out


def check_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    """Raises unless the arguments fit together as torch requires."""
    name = "scaled_dot_product_attention"
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise RuntimeError(f"{name}: expected at least 2-D tensors, got {shapes}")
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(
            f"{name}: expected one dtype, got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if query.size(-1) != key.size(-1) or key.size(-2) != value.size(-2):
        raise RuntimeError(f"{name}: head or key sizes differ: {shapes}")
    if dropout_p:
        raise RuntimeError(
            f"{name}: dropout_p={dropout_p}; dropout draws from one random stream for the whole "
            "batch, so a row's result would depend on its neighbours; use dropout_p=0"
        )
    if is_causal and attn_mask is not None:
        raise RuntimeError(f"{name}: give either attn_mask or is_causal=True, not both")
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(
            f"{name}: expected attn_mask of dtype bool, float32 or {query.dtype}, got "
            f"{attn_mask.dtype}"
        )
    if enable_gqa and (
        query.dim() < 3
        or key.size(-3) != value.size(-3)
        or not key.size(-3)
        or query.size(-3) % key.size(-3)
    ):
        raise RuntimeError(
            f"{name}: enable_gqa needs query heads that are a multiple of the key heads: {shapes}"
        )


def expanded_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [..., Hkv, S, E] with one head for each head of the query."""
    if query.dim() < 3 or query.size(-3) == key.size(-3):
        return key, value
    repeat = query.size(-3) // key.size(-3)
    return key.repeat_interleave(repeat, -3), value.repeat_interleave(repeat, -3)


def scores_of(
    query: torch.Tensor,
    key: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    product: Any,
) -> torch.Tensor:
    """Scaled and masked scores, [..., L, S]; -inf where a key takes no part."""
    scores: torch.Tensor = product(query, key.mT)
    scores = scores * (1 / math.sqrt(query.size(-1)) if scale is None else scale)
    if is_causal:
        shape = scores.shape[-2:]
        attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return torch.where(attn_mask, scores, -torch.inf)
    return scores + attn_mask


def _reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    if enable_gqa:
        key, value = expanded_heads(query, key, value)
    scores = scores_of(query, key, attn_mask, is_causal, scale, torch.matmul)
    lse = scores.logsumexp(-1)
    weights = torch.where(lse.isinf()[..., None], 0, (scores - lse[..., None]).exp())
    return weights @ value, lse


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_attention(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch = torch.broadcast_shapes(
        query.shape[:-2], *(() if enable_gqa else (key.shape[:-2], value.shape[:-2]))
    )
    shape = (*batch, query.size(-2))
    if not batch:
        return query.new_empty(*shape, value.size(-1)), query.new_empty(shape, dtype=wide)
    # In memory [..., L, H, Ev], so that a model's next reshape copies nothing.
    out = query.new_empty(*batch[:-1], shape[-1], batch[-1], value.size(-1)).transpose(-2, -3)
    return out, query.new_empty(shape, dtype=wide)


def _save(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.is_causal = inputs[5]
    ctx.keywords = keyword_only_inputs
    ctx.mark_non_differentiable(output[1])


def _sum_to(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    lead = grad.dim() - like.dim()
    dims = [d for d in range(grad.dim()) if d < lead or (like.size(d - lead) == 1 != grad.size(d))]
    return sum(grad, dims, True).view(like.shape) if dims else grad


def _back(
    ctx: Any, grad: torch.Tensor, grad_lse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    query, key, value, attn_mask, out, lse = ctx.saved_tensors
    scale, gqa = ctx.keywords["scale"], ctx.keywords["enable_gqa"]
    factor = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    wide = lse.dtype
    k, v = expanded_heads(query, key, value) if gqa else (key, value)
    q, k, v, g = (t.to(wide) for t in (query, k, v, grad))
    mask = attn_mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(wide)
    scores = scores_of(q, k, mask, ctx.is_causal, scale, matmul)
    weights = torch.where(lse.isinf()[..., None], 0, (scores - lse[..., None]).exp())
    g_value = matmul(weights.mT, g)
    g_weights = matmul(g, v.mT)
    delta = sum(g * out.to(wide), -1, True)
    g_scores = weights * (g_weights - delta)
    g_query = matmul(g_scores, k) * factor
    g_key = matmul(g_scores.mT, q) * factor
    if gqa and query.size(-3) != key.size(-3):
        groups = (key.size(-3), query.size(-3) // key.size(-3))
        g_key = sum(g_key.unflatten(-3, groups), -3)
        g_value = sum(g_value.unflatten(-3, groups), -3)
    g_mask = None
    if ctx.needs_input_grad[3]:
        g_mask = _sum_to(g_scores, attn_mask).to(attn_mask.dtype)
    return (
        _sum_to(g_query, query).to(query.dtype),
        _sum_to(g_key, key).to(key.dtype),
        _sum_to(g_value, value).to(value.dtype),
        g_mask,
        None,
        None,
    )


def _first(
    kernel: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **keywords: Any,
) -> torch.Tensor:
    out: torch.Tensor = kernel(query, key, value, attn_mask, dropout_p, is_causal, **keywords)[0]
    return out


def _flash_for_cpu(
    kernel: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> Any:
    return kernel(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)


def _bound(dtype: torch.dtype, **args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """An error of d in a score is a factor of exp(d) in a weight; then the chains over keys.

    A weight may be rounded to the dtype of the input, as the units that multiply it take it, and
    so may the terms of the denominator: the log-sum-exp is that of what was divided by.
    """
    exact, lse = _reference(**args)
    query, key, value = args["query"], args["key"], args["value"]
    if args["enable_gqa"]:
        key, value = expanded_heads(query, key, value)
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    magnitude = query.abs() @ key.abs().mT / math.sqrt(query.size(-1))
    error = unit * (query.size(-1) + 4) * magnitude.amax(-1, keepdim=True)
    largest = value.abs().amax().expand_as(exact)
    chains = sum_bound(largest, exact, key.size(-2) + 16, dtype)
    weights = torch.finfo(dtype).eps / 2
    scores: torch.Tensor = 2 * largest * (torch.expm1(2 * error) + weights)
    keys = unit * (key.size(-2) + 16)
    return scores + chains, error[..., 0] + weights + keys + unit * lse.abs()


def _case(heads: int, kv_heads: int, length: int, keys: int, size: int, mask: str = "") -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        attn_mask = None
        if mask in ("bool", "additive"):
            keep = draw.normal(rows, 1, length, keys) > -0.5
            keep[..., 0] = True
            attn_mask = keep
            if mask == "additive":
                attn_mask = torch.zeros(keep.shape).masked_fill(~keep, -torch.inf).to(draw.dtype)
        return {
            "query": draw.rows(rows, heads, length, size) / 8,
            "key": draw.rows(rows, kv_heads, keys, size) / 8,
            "value": draw.rows(rows, kv_heads, keys, size),
            "attn_mask": attn_mask,
            "dropout_p": 0.0,
            "is_causal": mask == "causal",
            "enable_gqa": heads != kv_heads,
        }

    return Case(f"{heads}/{kv_heads} heads x {size}, {length} of {keys} {mask}".rstrip(), args)


def _cuts(args: Args, axes: Axes) -> Iterator[Variant]:
    """Fewer queries with the same keys, more keys that are masked, and a beginning of both."""
    query, key, value = args["query"], args["key"], args["value"]
    length, keys = query.size(-2), key.size(-2)
    mask = args["attn_mask"]
    if args["is_causal"]:
        mask = torch.ones(length, keys, dtype=torch.bool).tril()
    open_ = {**args, "is_causal": False}
    for begin, end in ((0, length // 2), (length // 2, length), (length - 1, length)):
        piece = {**open_, "query": query[..., begin:end, :]}
        if mask is not None:
            piece["attn_mask"] = mask[..., begin:end, :]
        rows, at = range(begin, end), range(end - begin)
        if rows:
            label = f"queries {begin} to {end} of {length}"
            yield Variant("T5 schedule", label, piece, rows, at, axes=(-2, -1))
    if mask is None or mask.dtype == torch.bool:
        seen = torch.ones(length, keys, dtype=torch.bool) if mask is None else mask
        longer = {
            **open_,
            "key": torch.cat([key, key.flip(-2)], -2),
            "value": torch.cat([value, value.flip(-2)], -2),
            "attn_mask": torch.cat([seen, torch.zeros_like(seen)], -1),
        }
        everything = range(length)
        label = f"{keys} masked keys behind the {keys}"
        yield Variant("T6 packing", label, longer, everything, everything, axes=(-2, -1))
        before = min(keys, 29)
        shifted = {
            **open_,
            "key": torch.cat([key[..., -before:, :].flip(-2), key], -2),
            "value": torch.cat([value[..., -before:, :].flip(-2), value], -2),
            "attn_mask": torch.cat([seen.new_zeros(*seen.shape[:-1], before), seen], -1),
        }
        label = f"{before} masked keys before the {keys}"
        yield Variant("T6 packing", label, shifted, everything, everything, axes=(-2, -1))
    if args["is_causal"]:
        first = range(min(length, keys) // 2 + 1)
        shorter = {
            **args,
            **{name: args[name][..., : len(first), :] for name in ("query", "key", "value")},
        }
        label = f"the first {len(first)} of {length} tokens"
        yield Variant("T7 prefix", label, shorter, first, first, axes=(-2, -1))


_WIDTH = 64


def _probed(values: torch.Tensor, site: Site) -> dict[str, Any]:
    """A query of zeros weighs all keys alike, so a column of `value` is what is added."""
    row, n = site.at.start, values.size(1)
    query = site.noise(site.rows, 1, 1, _WIDTH)
    key = site.noise(site.rows, 1, n, _WIDTH)
    value = site.noise(1, site.rows, n, _WIDTH).movedim(0, 1)  # another shape: another noise
    query[row] = 0
    value[row, 0] = values.mT
    return {
        "query": query,
        "key": key,
        "value": value.contiguous(),
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
    }


def _stock(*args: Any, **keywords: Any) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*args, **keywords)


OPS = (
    Op(
        name="scaled_dot_product_attention",
        schema=(
            "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p,"
            " bool is_causal, *, float? scale=None,"
            " bool enable_gqa=False) -> (Tensor, Tensor)"
        ),
        fake=_fake,
        reference=_reference,
        cases=(
            _case(3, 1, 17, 33, 64, "causal"),
            _case(2, 2, 1, 1029, 64),
            _case(4, 2, 5, 257, 40, "bool"),
            _case(2, 1, 3, 130, 64, "additive"),
        ),
        batch_axes={"query": 0, "key": 0, "value": 0, "attn_mask": 0},
        out_axes=(0, 0),
        level=Guarantee.BATCH,
        schedule=_cuts,
        any_size=lambda length=9, keys=300, size=64: _case(2, 1, length, keys, size, "causal"),
        error_bound=_bound,
        probe=Probe(
            args=_probed,
            read=lambda outputs, values, site: outputs[0][site.at.start, 0, 0],
            slots=_WIDTH,
            terms=512,
            most_rows=64,
            divided=True,
            stock=_stock,
            sum_of="the weighted values",
            limits=(
                "the weights are equal: what a growing maximum does to the sum is not seen",
                "the sums over the head size and in the denominator are not probed",
            ),
        ),
        aten={"_scaled_dot_product_flash_attention_for_cpu": _flash_for_cpu},
        composite={"scaled_dot_product_attention": _first},
        setup_context=_save,
        backward=_back,
    ),
)
