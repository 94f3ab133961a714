"""attn_implementation="batch_invariant": a token's logits have the same bits however it got there.

Tiny models with random weights stand for the kinds of attention: dense, with norms of queries and
keys, sliding window, soft cap, sinks. The real one is SmolLM2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import batch_invariant as bi
from batch_invariant.cli import models
from batch_invariant.errors import OpNotSupported
from replay import same

transformers = pytest.importorskip("transformers", reason="the integration is with transformers")

from batch_invariant.integrations import transformers as integration  # noqa: E402

NAME = "batch_invariant"
LENGTH, WINDOW = 150, 16
_SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": WINDOW},
    "Gemma2": {**_MIXED, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "Gemma3": {**_MIXED, "query_pre_attn_scalar": 16},
    "GptOss": {**_MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
}
_CLASSES = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM")}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    integration.register_attention()
    with torch.no_grad():
        yield


def tiny(kind: str) -> Any:
    config, model = _CLASSES.get(kind, (f"{kind}Config", f"{kind}ForCausalLM"))
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**_SIZES, **KINDS[kind]))
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1 or "sinks" in name:
            parameter.normal_(std=0.3)
    made = made.eval()
    made.set_attn_implementation(NAME)
    if kind == "GptOss":  # one expert after the other; grouped products are refused by the mode
        made.set_experts_implementation("eager")
    return made


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    integration.register_attention()
    with torch.no_grad():
        return tiny(request.param)


def tokens(vocabulary: int, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, min(vocabulary, 30_000), (length,), generator=generator)


Ways = dict[str, Callable[[Any, torch.Tensor], torch.Tensor]]


def _chunked(model: Any, ids: torch.Tensor, size: int, cache: Any) -> torch.Tensor:
    pieces = [model(part[None], past_key_values=cache).logits[0] for part in ids.split(size)]
    return torch.cat(pieces)


def _dynamic(model: Any, size: int) -> Any:
    return transformers.DynamicCache(config=model.config)


def _static(model: Any, size: int) -> Any:
    return transformers.StaticCache(config=model.config, max_cache_len=size + 13)


def _padded(model: Any, ids: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """The last row of a batch whose others are shorter or longer, padded on the left."""
    rows = [tokens(model.config.vocab_size, n, seed=n) for n in lengths] + [ids]
    longest = max(map(len, rows))
    batch = torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(batch, attention_mask=mask, position_ids=positions).logits
    return out[-1, longest - len(ids) :]


def _padded_chunks(model: Any, ids: torch.Tensor, size: int, cache: Any) -> torch.Tensor:
    """The last row of a batch padded by 40, in chunks."""
    row = torch.cat([ids.new_zeros(40), ids])
    batch, mask = torch.stack([row.flip(0), row]), torch.ones(2, len(row), dtype=torch.long)
    mask[1, :40] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    pieces = [
        model(
            batch[:, i : i + size], attention_mask=mask[:, : i + size],
            position_ids=positions[:, i : i + size], past_key_values=cache,
        ).logits[1]
        for i in range(0, len(row), size)
    ]  # fmt: skip
    return torch.cat(pieces)[40:]


def _reused(model: Any, ids: torch.Tensor, make: Callable[[Any, int], Any]) -> torch.Tensor:
    """Behind a prefix that another continuation was computed on as well."""
    cut = 2 * len(ids) // 3
    cache = make(model, len(ids))
    first = model(ids[None, :cut], past_key_values=cache).logits[0]
    model(ids[None, :5], past_key_values=copy.deepcopy(cache))
    rest = [
        model(ids[None, i : i + 1], past_key_values=cache).logits[0] for i in range(cut, cut + 4)
    ]
    rest.append(model(ids[None, cut + 4 :], past_key_values=cache).logits[0])
    return torch.cat([first, *rest])


WAYS: Ways = {
    "in a batch": lambda m, ids: m(torch.stack([ids.flip(0), ids, ids])).logits[1],
    "padded by 1": lambda m, ids: _padded(m, ids, (len(ids) + 1, 3)),
    "padded by 40": lambda m, ids: _padded(m, ids, (len(ids) + 40, 17, 1)),
    **{
        f"chunks of {n}, {make.__name__[1:]} cache": lambda m, ids, n=n, make=make: _chunked(
            m, ids, n, make(m, len(ids))
        )
        for n in (7, 64)
        for make in (_dynamic, _static)
    },
    **{
        f"padded by 40, chunks of 33, {make.__name__[1:]} cache": lambda m, ids, make=make: (
            _padded_chunks(m, ids, 33, make(m, len(ids) + 40))
        )
        for make in (_dynamic, _static)
    },
    "reused prefix, dynamic cache": lambda m, ids: _reused(m, ids, _dynamic),
    "reused prefix, static cache": lambda m, ids: _reused(m, ids, _static),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_a_token_has_the_same_bits_in_every_way(model: Any, dtype: torch.dtype) -> None:
    other = copy.deepcopy(model)
    for parameter in other.parameters():  # `to` would round the rotary frequencies as well
        parameter.data = parameter.data.to(dtype)
    ids = tokens(other.config.vocab_size)
    with bi.enabled():
        want = other(ids[None]).logits[0]
        for way, run in WAYS.items():
            assert same(run(other, ids), want), way


def test_the_model_computes_what_its_eager_attention_computes(model: Any) -> None:
    """Invariant, but of what? Scale, window, soft cap and sinks are the model's."""
    ids = tokens(model.config.vocab_size)
    ours = model(ids[None]).logits
    try:
        model.set_attn_implementation("eager")
        eager = model(ids[None]).logits
    finally:
        model.set_attn_implementation(NAME)
    torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-3)


def test_stock_attention_differs_in_some_way() -> None:
    """Negative control: without the library these comparisons find differences."""
    found = tiny("Llama")
    found.set_attn_implementation("sdpa")
    ids = tokens(found.config.vocab_size)
    want = found(ids[None]).logits[0]
    assert any(not same(run(found, ids), want) for run in WAYS.values())


def test_generate_gives_a_prompt_the_same_logits(model: Any) -> None:
    """Alone and padded in a batch, with caches that grow and that have a fixed size."""
    prompts = [tokens(model.config.vocab_size, n, seed=n) for n in (9, 30, 21)]
    longest = max(map(len, prompts))
    padded = torch.stack([torch.cat([p.new_zeros(longest - len(p)), p]) for p in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - len(p) for p in prompts]).long()
    options = {
        "max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True,
        "output_logits": True, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    with bi.enabled():
        alone = [model.generate(p[None], **options) for p in prompts]
        for cache in ("dynamic", "static"):
            batch = model.generate(
                padded, attention_mask=mask, cache_implementation=cache, **options
            )
            for row, one in enumerate(alone):
                assert torch.equal(batch.sequences[row, -5:], one.sequences[0, -5:]), cache
                for step, logits in enumerate(batch.logits):
                    assert same(logits[row], one.logits[step][0]), (cache, row, step)


def test_masks_of_other_kinds_go_to_the_kernel_as_they_are() -> None:
    """Sequences packed by their positions; holes; a mask of the user's own."""
    found = tiny("Llama")
    a, b = tokens(97, 20, seed=3), tokens(97, 33, seed=4)
    positions = torch.cat([torch.arange(20), torch.arange(33)])[None]
    with bi.enabled():
        want = [found(x[None]).logits[0] for x in (a, b)]
        packed = found(torch.cat([a, b])[None], position_ids=positions, use_cache=False).logits[0]
        assert same(packed[:20], want[0])
        assert same(packed[20:], want[1])
        holes = torch.cat([a[:5], b[:4], a[5:]])
        mask = torch.cat([torch.ones(5), torch.zeros(4), torch.ones(15)]).long()
        places = torch.cat([torch.arange(5), torch.zeros(4, dtype=torch.long), torch.arange(5, 20)])
        out = found(holes[None], attention_mask=mask[None], position_ids=places[None]).logits[0]
        assert same(out[9:], want[0][5:])
        own = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
        assert same(found(a[None], attention_mask=own).logits[0], want[0])


def test_what_is_not_there_is_refused() -> None:
    capped, dense = tiny("Gemma2"), tiny("Llama")
    ids = tokens(97, 12)[None]
    own = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    with pytest.raises(OpNotSupported, match="soft cap or sinks takes causal and sliding masks"):
        capped(ids, attention_mask={"full_attention": own, "sliding_attention": own})
    with pytest.raises(OpNotSupported, match="output_attentions: the weights are never stored"):
        integration.attention_forward(
            dense, *(torch.zeros(1, 2, 3, 8),) * 3, None, output_attentions=True
        )
    with pytest.raises(OpNotSupported, match="dropout: draws from one random stream"):
        integration.attention_forward(dense, *(torch.zeros(1, 2, 3, 8),) * 3, None, dropout=0.1)
    q, k = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 7, 8)
    with pytest.raises(OpNotSupported, match="came without a mask"):
        integration.attention_forward(dense, q, k, k, None, is_causal=True)
    with pytest.raises(OpNotSupported, match="dropped 7 keys, and the first query, at 10, sees"):
        integration.sequences_mask(2, 1, 4, q_offset=10, kv_offset=7)
    mask = integration.sequences_mask(2, 3, 3)
    with pytest.raises(OpNotSupported, match="was cut or changed on its way"):
        integration.attention_forward(dense, *(torch.zeros(2, 2, 3, 8),) * 3, mask[:, :, :, :1])


def test_registering_can_be_undone() -> None:
    found = tiny("Llama")
    integration.unregister_attention()
    integration.unregister_attention()
    with pytest.raises(KeyError, match="batch_invariant"):
        found(tokens(97, 4)[None])
    integration.register_attention()
    assert found(tokens(97, 4)[None]).logits.isfinite().all()


def test_training_has_gradients() -> None:
    """A row of a padded batch gives the gradient of its embeddings that it gives alone."""
    found = tiny("Gemma3").train()
    ids = tokens(97, 20)
    with torch.enable_grad(), bi.enabled():
        grads = []
        for pad in (0, 9):
            embedded = found.get_input_embeddings()(ids)[None].detach().requires_grad_()
            filler = torch.zeros(1, pad, 64)
            mask = (torch.arange(pad + 20) >= pad).long()[None]
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            out = found(
                inputs_embeds=torch.cat([filler, embedded], 1), attention_mask=mask,
                position_ids=positions, use_cache=False,
            )  # fmt: skip
            out.logits[:, pad:].float().square().sum().backward()
            grads.append(embedded.grad)
    assert same(*grads)


@pytest.fixture(scope="module")
def real(request: pytest.FixtureRequest) -> Any:
    """A model with the weights that people use."""
    absent = [name for name in ("accelerate", "gguf") if find_spec(name) is None]
    if absent:
        pytest.skip(f"loading the real model needs {', '.join(absent)}")
    try:
        found, _ = models.load(models.locate(request.param), "bfloat16")
    except models.WeightsNotFound as error:
        pytest.skip(str(error))
    integration.register_attention()
    found.set_attn_implementation(NAME)
    return found


_GEMMA = pytest.param(models.GEMMA, marks=pytest.mark.slow)


@pytest.mark.parametrize("real", [models.DEFAULT, _GEMMA], indirect=True)
@pytest.mark.parametrize("way", WAYS)
def test_a_real_model(real: Any, way: str) -> None:
    ids = tokens(real.config.vocab_size, 70)
    with bi.enabled():
        assert same(WAYS[way](real, ids), real(ids[None]).logits[0])


LONG_WAYS: Ways = {
    f"chunks of {n}, {make.__name__[1:]} cache": lambda m, ids, n=n, make=make: _chunked(
        m, ids, n, make(m, len(ids))
    )
    for n in (64, 512)
    for make in (_dynamic, _static)
} | {name: WAYS[name] for name in ("padded by 40", "reused prefix, static cache")}


@pytest.mark.slow
@pytest.mark.parametrize("real", [models.DEFAULT, models.GEMMA], indirect=True)
@pytest.mark.parametrize("attention", [NAME, "sdpa"])
def test_a_long_prompt_in_a_real_model(real: Any, attention: str) -> None:
    """Beyond the window of Gemma 3's sliding layers, 512 tokens; stock torch is the control."""
    ids = tokens(real.config.vocab_size, 620)
    real.set_attn_implementation(attention)
    try:
        with bi.enabled():
            want = real(ids[None]).logits[0]
            wrong = [way for way, run in LONG_WAYS.items() if not same(run(real, ids), want)]
        assert not wrong
        real.set_attn_implementation("sdpa")
        stock = real(ids[None]).logits[0]
        assert not all(same(run(real, ids), stock) for run in LONG_WAYS.values())
    finally:
        real.set_attn_implementation(NAME)


def _continuously(model: Any, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Tokens and their log-probabilities from continuous batching."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    options = transformers.GenerationConfig(
        max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    config = ContinuousBatchingConfig(return_logprobs=True, num_blocks=16, max_batch_tokens=64)
    with models.quiet():
        found = model.generate_batch(
            inputs=prompts, generation_config=options, continuous_batching_config=config
        )
    return [
        (found[name].generated_tokens, found[name].logprobs)
        for name in sorted(found, key=lambda name: int(name.rpartition("_")[2]))
    ]


def test_continuous_batching_runs_its_own_attention_under_the_mode() -> None:
    """transformers takes no other implementation there than its own; the mode covers sdpa."""
    found = tiny("Llama")
    prompts = [tokens(97, n, seed=n).tolist() for n in (5, 30, 17)]
    with pytest.raises(ValueError, match="batch_invariant is not supported for continuous batch"):
        _continuously(found, prompts)
    found.set_attn_implementation("sdpa")
    with bi.enabled():
        together = _continuously(found, prompts)
        for prompt, (chosen, logprobs) in zip(prompts, together, strict=True):
            ((alone, logprobs_alone),) = _continuously(found, [prompt])
            assert chosen == alone
            assert logprobs == logprobs_alone
            assert len(logprobs) == 6


def test_a_compiled_model_reads_the_mask_at_every_call() -> None:
    """Padding on the left of either row, then a hole, through one compiled function."""
    found = tiny("Llama")
    ids = torch.stack([tokens(97, 20), tokens(97, 20, seed=2)])
    torch.compiler.reset()
    compiled = torch.compile(found, backend="aot_eager")
    for row, begin, end in ((1, 0, 7), (0, 0, 3), (1, 4, 9)):
        mask = torch.ones(2, 20, dtype=torch.long)
        mask[row, begin:end] = 0
        inputs = {
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "use_cache": False,
        }
        kept = mask.bool()
        with bi.enabled():
            want = found(ids, **inputs).logits[kept]
            assert same(compiled(ids, **inputs).logits[kept], want), (row, begin)
    torch.compiler.reset()
