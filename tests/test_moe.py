"""Mixtures of experts: a token does not see who shares its expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import batch_invariant as bi
from batch_invariant.errors import OpNotSupported
from batch_invariant.ops.bits import mismatch
from batch_invariant.ops.contract import Data, Draw

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Where the groups end: empty ones, one row, many, rows that no group has.
ENDS = ([0, 1, 8, 8, 40], [40, 40, 40, 40, 40], [5, 5, 6, 30, 37], [0, 0, 0, 0, 0])


def operands(dtype: torch.dtype, k: int = 1031, n: int = 67) -> tuple[torch.Tensor, torch.Tensor]:
    draw = Draw(dtype, Data.CANCELLING, torch.Generator().manual_seed(0))
    return draw.rows(40, k), draw.shared(5 * k, n).view(5, k, n)


def offsets(ends: list[int]) -> torch.Tensor:
    return torch.tensor(ends, dtype=torch.int32)


@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_has_the_bits_of_mm_with_its_matrix(dtype: torch.dtype, ends: list[int]) -> None:
    x, w = operands(dtype)
    for weights in (w, w.mT.contiguous().mT):
        out = bi.grouped_mm(x, weights, offsets(ends))
        with bi.enabled():
            by_torch = torch._grouped_mm(x, weights, offs=offsets(ends))
        assert mismatch(out, by_torch) is None
        for row in range(40):
            group = next((g for g, end in enumerate(ends) if row < end), None)
            at = slice(row, row + 1)
            want = (
                torch.zeros(1, 67, dtype=dtype) if group is None else bi.mm(x[at], weights[group])
            )
            assert mismatch(want, out[at]) is None, row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_other_forms(dtype: torch.dtype) -> None:
    x, w = operands(dtype)
    ends = offsets([0, 20, 33, 33, 38])
    parts = [slice(0, 0), slice(0, 20), slice(20, 33), slice(33, 33), slice(33, 38)]
    assert mismatch(bi.grouped_mm(w.mT, w, None), bi.bmm(w.mT, w)) is None
    grad = bi.grouped_mm(x.mT, x[:, :50], ends)
    columns = bi.grouped_mm(w.mT, x.mT, ends)
    for group, part in enumerate(parts):
        assert mismatch(grad[group], bi.mm(x.mT[:, part], x[part, :50])) is None
        assert mismatch(columns[:, part], bi.mm(w[group].mT, x.mT[:, part])) is None
    assert columns[:, 38:].eq(0).all()


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    ends = offsets([2, 2, 5, 6])
    forms: list[tuple[Any, ...]] = [
        (leaf(7, 3), leaf(4, 3, 5), ends),
        (leaf(4, 5, 3), leaf(3, 7), ends),
        (leaf(5, 7), leaf(7, 3), ends),
        (leaf(4, 2, 3), leaf(4, 3, 5), None),
    ]
    for a, b, offs in forms:
        assert torch.autograd.gradcheck(lambda a, b, offs=offs: bi.grouped_mm(a, b, offs), (a, b))
    a, b, offs = forms[0]
    want = torch.autograd.grad(bi.grouped_mm(a, b, offs).square().sum(), (a, b))
    with bi.enabled():
        got = torch.autograd.grad(torch._grouped_mm(a, b, offs).square().sum(), (a, b))
    assert all(mismatch(x, y) is None for x, y in zip(want, got, strict=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(4, 3), torch.ones(2, 3, 5)), "need offs"),
        ((torch.ones(2, 4, 3), torch.ones(2, 3, 5), offsets([1, 2])), "take no offs"),
        ((torch.ones(4, 3), torch.ones(2, 4, 5), offsets([1, 2])), "cannot be multiplied"),
        ((torch.ones(4, 3), torch.ones(2, 3, 5), offsets([1, 2, 3])), "number of groups"),
        ((torch.ones(4, 3), torch.ones(2, 3, 5), offsets([3, 2])), "ascending and at most 4"),
        ((torch.ones(4, 3), torch.ones(2, 3, 5), offsets([3, 5])), "ascending and at most 4"),
        ((torch.ones(4, 3), torch.ones(2, 3, 5), torch.ones(2)), "int32"),
        ((torch.ones(4, 3), torch.ones(2, 3, 5).double(), offsets([1, 2])), "one dtype"),
        ((torch.ones(3), torch.ones(2, 3, 5), offsets([1, 2])), "2-D or 3-D"),
    ],
)
def test_bad_input_is_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        bi.grouped_mm(*arguments)


def test_what_torch_offers_beyond_is_refused() -> None:
    x, w, ends = torch.ones(4, 3), torch.ones(2, 3, 5), offsets([1, 4])
    with bi.enabled():
        with pytest.raises(OpNotSupported, match="no bias"):
            torch._grouped_mm(x, w, ends, bias=torch.ones(2, 5))
        with pytest.raises(OpNotSupported, match="not torch"):
            torch._grouped_mm(x, w, ends, out_dtype=torch.float64)


def tiny(family: str, experts: str, dtype: torch.dtype) -> Any:
    transformers = pytest.importorskip("transformers", reason="the models need transformers")
    sizes = {
        **{"vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
        **{"num_local_experts": 6, "num_experts_per_tok": 3, "max_position_embeddings": 64},
    }
    kind, config = {
        "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig(**sizes)),
        "gpt_oss": (transformers.GptOssForCausalLM, transformers.GptOssConfig(**sizes)),
    }[family]
    config._experts_implementation = experts
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert model.config._experts_implementation == experts
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_models_give_the_same_logits_in_every_batch(
    family: str, experts: str, dtype: torch.dtype
) -> None:
    model = tiny(family, experts, dtype)
    tokens = torch.randint(0, 97, (8, 21), generator=torch.Generator().manual_seed(2))

    def logits(size: int) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model(tokens[i : i + size]).logits for i in range(0, 8, size)])

    with bi.enabled():
        alone = logits(1)
        for size in (2, 3, 8):
            assert mismatch(alone, logits(size)) is None, size
    assert len(alone.unique()) > 1000


def test_stock_torch_shows_a_difference_so_the_test_above_can_fail() -> None:
    model = tiny("mixtral", "grouped_mm", torch.float32)
    tokens = torch.randint(0, 97, (8, 21), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        alone = torch.cat([model(row[None]).logits for row in tokens])
        assert mismatch(alone, model(tokens).logits) is not None


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_routers_with_ties_choose_the_lowest_experts(family: str, experts: str) -> None:
    """Equal router logits: every token goes to experts 0, 1 and 2, in every batch."""
    model = tiny(family, experts, torch.float32)
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        router = layer.mlp.gate if family == "mixtral" else layer.mlp.router
        for parameter in router.parameters():
            torch.nn.init.zeros_(parameter)
        router.register_forward_hook(lambda _, __, out: chosen.append(out[2]))
    tokens = torch.randint(0, 97, (5, 11), generator=torch.Generator().manual_seed(3))
    with bi.enabled(), torch.no_grad():
        whole = model(tokens).logits
        alone = torch.cat([model(row[None]).logits for row in tokens])
    assert mismatch(whole, alone) is None
    assert all(indices.eq(torch.arange(3)).all() for indices in chosen)
    assert chosen


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_gradients_of_a_sequence_do_not_depend_on_the_batch(experts: str) -> None:
    model = tiny("mixtral", experts, torch.float32)
    embedded = torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(4))

    def gradient(rows: torch.Tensor) -> torch.Tensor:
        leaf = rows.clone().requires_grad_()
        with bi.enabled():
            (found,) = torch.autograd.grad(model(inputs_embeds=leaf).logits.square().sum(), leaf)
        return found

    whole = gradient(embedded)
    for row in range(3):
        assert mismatch(whole[row], gradient(embedded[row : row + 1])[0]) is None
