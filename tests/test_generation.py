"""SeededSampling inside generate() of transformers, with a real model."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

import batch_invariant as bi
from batch_invariant.cli import models
from batch_invariant.cli.demo.prompts import PROMPTS, read_prompts

SEEDS = [11, 12, 2**40, 7, -3]
NEW = 8
FILTERS: dict[str, Any] = {"temperature": 0.9, "top_k": 50, "top_p": 0.95}


@pytest.fixture(scope="module")
def real() -> Any:
    absent = [name for name in ("transformers", "accelerate", "gguf") if find_spec(name) is None]
    if absent:
        pytest.skip(f"loading the real model needs {', '.join(absent)}")
    try:
        weights = models.locate(models.DEFAULT)
    except models.WeightsNotFound as error:
        pytest.skip(str(error))
    return models.load(weights, "bfloat16")


def generate(real: Any, prompts: list[str], processor: Any, new: int = NEW) -> list[list[int]]:
    model, tokenizer = real
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    options = {
        **{"max_new_tokens": new, "min_new_tokens": new},  # so that no row ends in padding
        **{"do_sample": False, "pad_token_id": tokenizer.eos_token_id},
    }
    with models.quiet():
        out = model.generate(**inputs, **options, logits_processor=[processor(inputs)])
    return [row[inputs.input_ids.size(1) :].tolist() for row in out]


def seeded(seeds: list[int]) -> Any:
    return lambda inputs: bi.SeededSampling(seeds, inputs.attention_mask, **FILTERS)


def test_a_request_has_the_same_text_alone_and_among_others(real: Any) -> None:
    prompts = read_prompts(PROMPTS)[: len(SEEDS)]
    with bi.enabled():
        together = generate(real, prompts, seeded(SEEDS))
        for row, (prompt, seed) in enumerate(zip(prompts, SEEDS, strict=True)):
            assert generate(real, [prompt], seeded([seed])) == [together[row]]
        pair = generate(real, [prompts[3], prompts[1]], seeded([SEEDS[3], SEEDS[1]]))
        assert pair == [together[3], together[1]]
        other = generate(real, prompts, seeded([seed + 1 for seed in SEEDS]))
        greedy = generate(real, prompts, lambda inputs: lambda ids, scores: scores)
    assert all(a != b for a, b in zip(together, other, strict=True))
    assert sum(a != b for a, b in zip(together, greedy, strict=True)) >= 3


def test_positions_that_count_the_padding_are_seen(real: Any) -> None:
    """The control: without the mask a padded request draws elsewhere."""
    prompts = read_prompts(PROMPTS)[: len(SEEDS)]
    with bi.enabled():
        right = generate(real, prompts, seeded(SEEDS), 4)
        wrong = generate(real, prompts, lambda _: bi.SeededSampling(SEEDS, **FILTERS), 4)
    assert right != wrong


def test_a_request_can_be_taken_up_again(real: Any) -> None:
    """The draws after some tokens are those of the uninterrupted request."""
    model, tokenizer = real
    prompt = tokenizer(read_prompts(PROMPTS)[:1], return_tensors="pt").input_ids
    options = {"do_sample": False, "pad_token_id": tokenizer.eos_token_id}

    def go_on(ids: torch.Tensor, new: int) -> torch.Tensor:
        processor = bi.SeededSampling([5], **FILTERS)
        out: torch.Tensor = model.generate(
            ids, **options, max_new_tokens=new, logits_processor=[processor]
        )
        return out

    with bi.enabled(), models.quiet():
        whole = go_on(prompt, 6)
        assert go_on(go_on(prompt, 3), 3).equal(whole)


def test_what_does_not_fit_is_refused() -> None:
    ids, scores = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="3 seeds, and generate\\(\\) asks for 2 rows"):
        bi.SeededSampling([1, 2, 3])(ids, scores)
    for mask in ([[1, 1, 0], [1, 1, 1]], [[1, 0, 1], [1, 1, 1]]):
        with pytest.raises(ValueError, match="padding_side = 'left'"):
            bi.SeededSampling([1, 2], torch.tensor(mask))
    with pytest.raises(ValueError, match="one row for each seed"):
        bi.SeededSampling([1, 2], torch.ones(3, 3))
    with pytest.raises(ValueError, match="one seed a row"):
        bi.SeededSampling(5)  # type: ignore[arg-type]
    scores[1] = -torch.inf
    with pytest.raises(bi.BatchInvariantError, match="row 1 has nothing to draw from"):
        bi.SeededSampling([1, 2])(ids, scores)


def test_one_column_remains() -> None:
    ids = torch.zeros(3, 5, dtype=torch.int64)
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    out = bi.SeededSampling([1, 2, 3])(ids, scores)
    assert out.argmax(1).equal(bi.sample(scores, torch.tensor([1, 2, 3]), 5))
    assert (out == 0).sum(1).eq(1).all()
    assert (out == -torch.inf).sum(1).eq(49).all()
