"""`attn_implementation="batch_invariant"` for Hugging Face transformers.

    from batch_invariant.integrations.transformers import register_attention

    register_attention()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="batch_invariant")
    with bi.enabled():  # everything that is not attention
        model.generate(...)

Masks that say where sequences begin and end become lengths, so that nothing of the size of a mask
is made: causal, sliding window, padding on the left, caches that grow or have a fixed size. Other
masks (packed by positions, in chunks, a 4-D mask of the user's) go to the kernel as they are.

The cache of a sliding window drops keys. Blocks of keys are counted from a sequence's first key, so
zeros that no query sees are put in front of what is left, until blocks begin where they did.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

# Calling an operator needs the selector, which registers what runs it.
import batch_invariant.selector  # noqa: F401
from batch_invariant.errors import OpNotSupported
from batch_invariant.ops.attention import KEY_BLOCK, scaled_dot_product_attention
from batch_invariant.ops.varlen_attention import attention

NAME = "batch_invariant"


def register_attention() -> None:
    """Makes `attn_implementation="batch_invariant"` known to transformers; idempotent."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sequences_mask)


def unregister_attention() -> None:
    """Undoes `register_attention`; models that use it cannot run any more."""
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop(NAME, None)
    ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(NAME, None)


class Sequences(torch.Tensor):
    """What attention needs of a mask: int32 [batch, 1, 1, 2], where keys begin and where they end.

    A tensor of four dimensions, because transformers hands only those on as they are. `causal`,
    `window` and `filler`, how many keys are put in front of those that are there, stay with it
    through functions that keep the rows whole.
    """

    causal: bool
    window: int | None
    filler: int

    @staticmethod
    def of(
        first: torch.Tensor, end: torch.Tensor, gone: int, causal: bool, window: int | None
    ) -> Sequences:
        """From the first key of each sequence and the one behind its last, [batch] each.

        gone: how many keys are not there any more; `first` and `end` count from the first of them.
        """
        dropped = (gone - first).clamp(min=0) % KEY_BLOCK
        filler = min(gone, KEY_BLOCK - 1)
        begin = torch.where(first < gone, -dropped, first - gone) + filler
        found = torch.stack([begin, end - gone + filler], 1)[:, None, None].int()
        found = found.as_subclass(Sequences)
        found.causal, found.window, found.filler = causal, window, filler
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As of any tensor; rows that are still whole keep what is known of them."""
        out = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if isinstance(out, Sequences) and out.shape[1:] == (1, 1, 2):
            origin = next((x for x in args if isinstance(x, Sequences)), None)
            if origin is not None and hasattr(origin, "causal"):
                out.causal, out.window = origin.causal, origin.window
                out.filler = origin.filler
        return out

    def arguments(self) -> dict[str, Any]:
        """The arguments of `batch_invariant.attention`."""
        if not hasattr(self, "causal"):
            raise OpNotSupported(
                f"the mask of attn_implementation={NAME!r} was cut or changed on its way to "
                f"attention, to shape {list(self.shape)}; pass it on as it is"
            )
        first, end = self.as_subclass(torch.Tensor)[:, 0, 0].unbind(1)
        return {"causal": self.causal, "window": self.window, "left_pad": first, "seq_lens": end}


def sequences_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor:
    """A mask in the form that `attention_forward` reads; arguments as transformers passes them.

    The values of a padding mask are read, once per forward. q_offset: int, or a tensor of one.
    """
    kind = _kind(mask_function)
    if kind is not None:
        causal, window = kind
        # The last query stands at key `end` - 1. What lies behind is room of a cache.
        end = int(q_offset) + q_length if causal else kv_offset + kv_length
        found = _lengths(attention_mask, batch_size, end, causal, torch.device(device))
        if found is not None and kv_offset <= end <= kv_offset + kv_length:
            if kv_offset and (window is None or int(q_offset) - window + 1 < kv_offset):
                raise OpNotSupported(
                    f"attn_implementation={NAME!r}: the cache has dropped {kv_offset} keys, and "
                    f"the first query, at {int(q_offset)}, sees some of them with window={window}; "
                    "use a cache that keeps them"
                )
            return Sequences.of(*found, kv_offset, causal, window)
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = masking_utils.sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
        device=device, **kwargs,
    )  # fmt: skip
    assert isinstance(mask, torch.Tensor)  # by the two switches above
    return mask


def _kind(mask_function: Callable[..., Any]) -> tuple[bool, int | None] | None:
    """Whether a mask function is causal, and its window; None for any other function."""
    if mask_function is masking_utils.causal_mask_function:
        return True, None
    if mask_function is masking_utils.bidirectional_mask_function:
        return False, None
    if _maker(mask_function) != "and_masks":
        return None
    joined = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    windows = [f for f in joined if _maker(f) == "sliding_window_overlay"]
    others = [f for f in joined if f not in windows]
    if len(windows) != 1 or others != [masking_utils.causal_mask_function]:
        return None
    window = inspect.getclosurevars(windows[0]).nonlocals.get("sliding_window")
    return (True, window) if isinstance(window, int) else None


def _maker(function: Callable[..., Any]) -> str:
    """The function of transformers' that made this one; empty for all others."""
    name = getattr(function, "__qualname__", "")
    known = getattr(function, "__module__", "") == masking_utils.__name__
    return name.partition(".<locals>.")[0] if known else ""


def _lengths(
    padding: torch.Tensor | None, batch: int, end: int, causal: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Where the keys of each sequence begin and end; None if they have holes.

    Causal keys behind the last one that is not padding are only seen by queries that are padding
    too, so they need no end of their own.
    """
    ends = torch.full((batch,), end, device=device)
    if padding is None:
        return torch.zeros_like(ends), ends
    kept = padding[:, :end]
    if kept.size(1) < end:
        return None
    at = torch.arange(end, device=kept.device)
    first = torch.where(kept, at, end).amin(1) if end else at.new_zeros(batch)
    last = torch.where(kept, at, -1).amax(1) if end else first - 1
    whole = (at >= first[:, None]) & (at <= last[:, None])
    if not torch.equal(whole, kept):
        return None
    return first.expand(batch), ends if causal else (last + 1).expand(batch)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What a model's attention layers call: [B, H, L, E] and [B, Hkv, S, E] to [B, L, H, Ev].

    Raises `OpNotSupported` for what would not be invariant or is not there.
    """
    _refuse(dropout, kwargs)
    if isinstance(attention_mask, Sequences):
        options = attention_mask.arguments()
        if attention_mask.filler:
            in_front = (0, 0, attention_mask.filler, 0)
            key, value = (torch.nn.functional.pad(x, in_front) for x in (key, value))
    elif attention_mask is not None:
        if softcap is not None or s_aux is not None:
            raise OpNotSupported(
                "attention with a soft cap or sinks takes causal and sliding masks with padding on "
                "the left; this call has another mask, of shape "
                f"{list(attention_mask.shape)} (packed or padded inside a row, or the user's own)"
            )
        out = scaled_dot_product_attention(
            query, key, value, attention_mask, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None
    else:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if causal and query.size(2) not in (1, key.size(2)):
            raise OpNotSupported(
                f"attention of {query.size(2)} queries over {key.size(2)} keys came without a "
                "mask, so where the queries stand is not known; give the model an attention_mask"
            )
        options = {"causal": causal}
    found = attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
        scale=scaling, soft_cap=softcap, sinks=s_aux, **options,
    )  # fmt: skip
    assert isinstance(found, torch.Tensor)  # without return_lse
    return found, None


def _refuse(dropout: float, kwargs: dict[str, Any]) -> None:
    reasons = {
        "dropout": dropout and "draws from one random stream for the whole batch; use model.eval()",
        "position_bias": kwargs.get("position_bias") is not None and "is not supported",
        "cache": kwargs.get("cache") is not None
        and "the cache of continuous batching is not supported; use attn_implementation='sdpa' "
        "with the mode on",
        "output_attentions": kwargs.get("output_attentions")
        and "the weights are never stored; use attn_implementation='eager'",
    }
    for name, reason in reasons.items():
        if reason:
            raise OpNotSupported(f"attn_implementation={NAME!r}: {name}: {reason}")
