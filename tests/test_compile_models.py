"""Compiled language models of transformers, tiny and random: no logit depends on the batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch._inductor import compile_fx as inductor
from torch._inductor.compile_fx import make_boxed_func

import batch_invariant as bi
from batch_invariant.ops.bits import mismatch
from compiler import needs_compiler

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
EXPERTS: dict[str, Any] = {
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "experts_implementation": "eager",
}
WINDOW: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention"]}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, **WINDOW}),
    "mixtral": ("MixtralConfig", EXPERTS),
    "gpt_oss": ("GptOssConfig", {"head_dim": 16, **EXPERTS, **WINDOW}),
}
GROUPED = {
    f"{name}, grouped": (
        CONFIGS[name][0],
        CONFIGS[name][1] | {"experts_implementation": "grouped_mm"},
    )
    for name in ("mixtral", "gpt_oss")
}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def model_of(name: str) -> torch.nn.Module:
    kind, more = (CONFIGS | GROUPED)[name]
    config = getattr(transformers, kind)(**SIZES, **more)
    attention = "eager" if name.startswith("gpt_oss") else "sdpa"  # as transformers requires
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention
    )
    return model.eval()


def as_graph(graph: Any, inputs: Any, *, seen: set[str]) -> Callable[..., Any]:
    """Inductor up to where it would write code: the traced graph is run as it is.

    What Inductor then does is tested with one of the models; here it would cost a minute a model.
    """

    def run(graph: Any, inputs: Any, **kwargs: Any) -> Any:
        seen.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    compiled: Callable[..., Any] = inductor.compile_fx(graph, inputs, inner_compile=run)
    return compiled


def logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", [*CONFIGS, *GROUPED])
def test_no_logit_depends_on_the_batch(name: str) -> None:
    model, seen = model_of(name), set[str]()
    compiled = torch.compile(model, backend=functools.partial(as_graph, seen=seen), dynamic=True)
    with bi.enabled(), torch.no_grad():
        ids = torch.randint(0, 320, (4, 9))
        whole = logits(compiled, ids)
        assert mismatch(whole, logits(model, ids)) is None
        # One row is traced anew, which takes long where experts break the graph.
        for rows in (2, 3) if "num_local_experts" in (CONFIGS | GROUPED)[name][1] else (1, 2, 3):
            assert mismatch(logits(compiled, ids[:rows].clone()), whole[:rows]) is None
    assert "batch_invariant.linear.default" in seen
    assert not seen & {"aten.mm.default", "aten.mean.dim", "aten._softmax.default"}


@needs_compiler
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_inductor_compiles(name: str) -> None:
    model = model_of(name)
    compiled = torch.compile(model, dynamic=True)
    ids = torch.randint(0, 320, (8, 1))
    with torch.no_grad():
        with bi.enabled():
            whole = logits(compiled, ids)
            assert mismatch(whole, logits(model, ids)) is None
            for rows in (2, 3):
                assert mismatch(logits(compiled, ids[:rows].clone()), whole[:rows]) is None
        # The control: without the mode, a request alone is not what it is among others.
        stock = logits(model, ids)
        assert any(mismatch(logits(model, ids[i : i + 1]), stock[i : i + 1]) for i in range(8))


@needs_compiler
def test_a_llama_is_trained() -> None:
    model = model_of("llama")
    ids = torch.randint(0, 320, (6, 13))

    def losses(ids: Tensor) -> Tensor:
        """Of every sequence by itself."""
        scores = logits(model, ids)[:, :-1].flatten(0, 1)
        each = F.cross_entropy(scores, ids[:, 1:].flatten(), reduction="none")
        return each.view(len(ids), -1).mean(-1)

    def step(fn: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        found = fn(ids)
        found.mean().backward()
        return [found.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    compiled = torch.compile(losses, dynamic=True)
    with bi.enabled():
        first = step(compiled)
        assert len(first) > 10
        for other in (step(compiled), step(losses)):
            assert all(mismatch(a, b) is None for a, b in zip(first, other, strict=True))
        assert mismatch(compiled(ids[:2].clone()).detach(), first[0][:2]) is None


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONFIGS, *GROUPED])
def test_every_size_of_a_batch(name: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_of(name).to(device)
    config = torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=1024)
    seen: dict[int, Tensor] = {}
    with torch.no_grad(), config:
        with bi.enabled():
            compiled = torch.compile(model, dynamic=True)
            for tokens in (1, 17, 256):
                ids = torch.randint(0, 320, (64, tokens)).to(device)
                seen[tokens] = ids
                whole = logits(compiled, ids)
                for rows in (32, 8, 3, 2, 1):
                    got = logits(compiled, ids[:rows].clone())
                    assert mismatch(got, whole[:rows]) is None, (tokens, rows)
        torch._dynamo.reset()
        compiled = torch.compile(model, dynamic=True)
        stock = logits(compiled, seen[1])
        # The control: without the mode, one row is not what it is among others.
        assert mismatch(logits(compiled, seen[1][:1].clone()), stock[:1]) is not None
