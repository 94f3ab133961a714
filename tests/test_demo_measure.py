"""Batches, comparisons and counts of `bi demo`, with decoders made here."""

from __future__ import annotations

import argparse
import math
import struct
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_invariant.cli.demo import BATCH_SIZES, paths
from batch_invariant.cli.demo.batches import measure, plan
from batch_invariant.cli.demo.comparing import Decoded, Difference, compare
from batch_invariant.cli.demo.generation import Generator
from batch_invariant.cli.demo.report import Column
from demo_parts import decoded, flip_bit


@settings(deadline=None)
@given(prompts=st.integers(1, 40), batch_size=st.integers(1, 40), places=st.integers(1, 5))
def test_every_prompt_is_at_several_positions_of_every_batch_size(
    prompts: int, batch_size: int, places: int
) -> None:
    batches = plan(prompts, batch_size, places)
    assert batches == plan(prompts, batch_size, places)
    assert {len(batch) for batch in batches} == {batch_size}
    positions: dict[int, set[int]] = {}
    for batch in batches:
        for position, prompt in enumerate(batch):
            positions.setdefault(prompt, set()).add(position)
    assert set(positions) == set(range(prompts))
    assert min(map(len, positions.values())) >= min(batch_size, places)


@pytest.mark.parametrize("batch_size", [2, 3, 7, 8, 16])
def test_neighbours_change_from_round_to_round(batch_size: int) -> None:
    prompts = 32
    neighbours: dict[int, set[int]] = {prompt: set() for prompt in range(prompts)}
    for batch in plan(prompts, batch_size):
        assert len(set(batch)) == batch_size
        for prompt in batch:
            neighbours[prompt] |= set(batch) - {prompt}
    more = [prompt for prompt in range(prompts) if len(neighbours[prompt]) > batch_size - 1]
    assert len(more) >= 0.8 * prompts


def test_the_default_run_stays_small() -> None:
    rows = sum(len(batch) for size in BATCH_SIZES for batch in plan(32, size))
    assert rows <= 32 * (1 + 2 + 3 + 4 * 4) * 1.2


def test_equal_decodings_are_equal() -> None:
    assert compare(decoded([1, 2, 3]), decoded([1, 2, 3])) == Difference(False, None, 0.0)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_one_flipped_bit_is_a_difference(step: int) -> None:
    other = decoded([1, 2, 3])
    flip_bit(other.logits, (step, 4), 0)
    found = compare(decoded([1, 2, 3]), other)
    assert found.logits
    assert found.token_step is None
    assert 0.0 < found.largest < 1e-2


def test_signed_zero_and_nan_payload_are_differences_and_equal_nans_are_none() -> None:
    zero, minus = decoded([1]), decoded([1])
    zero.logits[0, 0], minus.logits[0, 0] = 0.0, -0.0
    assert compare(zero, minus) == Difference(True, None, 0.0)
    nan = decoded([1])
    nan.logits[0, 0] = math.nan
    assert compare(nan, nan) == Difference(False, None, 0.0)
    payload = Decoded(nan.tokens, nan.logits.clone())
    flip_bit(payload.logits, (0, 0), 3)
    assert compare(nan, payload) == Difference(True, None, math.inf)
    assert compare(zero, nan) == Difference(True, None, math.inf)


def test_after_another_token_the_logits_count_no_more() -> None:
    other = decoded([1, 7, 3])
    other.logits[2] += 1000.0
    assert compare(decoded([1, 2, 3]), other) == Difference(True, 1, 0.0)
    other.logits[1, 0] += 8.0  # the step that chose the other token still counts
    assert compare(decoded([1, 2, 3]), other).largest == 8.0


def test_another_length_is_another_text() -> None:
    longer = decoded([1, 2, 3])
    shorter = Decoded(longer.tokens[:2], longer.logits[:2])
    assert compare(longer, shorter) == Difference(True, 2, 0.0)
    assert compare(shorter, longer) == Difference(True, 2, 0.0)


def test_flip_bit_flips_the_bit_that_the_tests_mean() -> None:
    tensor = torch.tensor([1.0])
    flip_bit(tensor, (0,), 0)
    assert struct.pack("<f", tensor.item()) == bytes([1, 0, 0x80, 0x3F])


def test_end_of_text_ends_a_row_and_not_its_neighbours() -> None:
    """What `decode` keeps of a batch in which one row ends early and is padded by generate."""

    class Config:
        eos_token_id = (7, 9)

        def __init__(self, **options: object) -> None:
            assert not options or options["do_sample"] is False
            assert not options or options["eos_token_id"] == [7, 9]

    class Model:
        generation_config = Config()

        def generate(self, input_ids: torch.Tensor, **_: object) -> argparse.Namespace:
            new = torch.tensor([[1, 9, 9, 9], [1, 2, 3, 4]])
            return argparse.Namespace(
                sequences=torch.cat([input_ids, new], dim=1),
                logits=tuple(torch.full((2, 10), float(step)) for step in range(4)),
            )

    class Tokenizer:
        pad_token_id = 9
        eos_token_id = 9

        def __call__(self, texts: list[str], **_: object) -> dict[str, torch.Tensor]:
            shape = (len(texts), 3)
            return {
                "input_ids": torch.zeros(shape, dtype=torch.int64),
                "attention_mask": torch.ones(shape),
            }

    first, second = Generator(Model(), Tokenizer(), 4).greedy(["a", "b"])
    assert first.tokens.tolist() == [1, 9]
    assert first.logits.shape == (2, 10)
    assert second.tokens.tolist() == [1, 2, 3, 4]
    assert second.logits[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]


PROMPTS = [f"prompt {number}" for number in range(6)]


def steady(prompts: Sequence[str]) -> list[Decoded]:
    return [decoded([1, 2, 3], seed=PROMPTS.index(prompt)) for prompt in prompts]


def as_text(tokens: torch.Tensor) -> str:
    return str(tokens.tolist())


def ignore(label: str, done: int) -> None:
    pass


def test_a_decoder_that_ignores_the_batch_measures_as_equal() -> None:
    steps: list[tuple[str, int]] = []
    column = measure(
        PROMPTS, [1, 2, 4], steady, as_text, lambda label, done: steps.append((label, done))
    )
    assert column.same
    assert column.example is None
    assert [(s.batch_size, s.batches) for s in column.sizes] == [(1, 6), (2, 6), (4, 8)]
    assert sum(done for _, done in steps) == 6 + 6 + 6 + 8
    assert all(s.prompts == 6 and s.largest_difference == 0.0 for s in column.sizes)


def test_a_planted_bit_is_found_at_its_batch_size_only() -> None:
    def planted(prompts: Sequence[str]) -> list[Decoded]:
        rows = steady(prompts)
        if len(prompts) == 4 and prompts[3] == PROMPTS[2]:
            flip_bit(rows[3].logits, (1, 0), 0)
        return rows

    column = measure(PROMPTS, [1, 2, 4], planted, as_text, ignore)
    assert not column.same
    assert [s.logits_differ for s in column.sizes] == [0, 0, 1]
    assert [s.tokens_differ for s in column.sizes] == [0, 0, 0]
    assert (column.logits_differ, column.tokens_differ) == (1, 0)


def test_the_example_is_the_earliest_change_of_a_token() -> None:
    def planted(prompts: Sequence[str]) -> list[Decoded]:
        rows = steady(prompts)
        if len(prompts) == 2:
            rows[1].tokens[2] = 9
        if len(prompts) == 4:
            rows[3].tokens[1] = 8
        return rows

    column = measure(PROMPTS, [1, 2, 4], planted, as_text, ignore)
    assert [s.tokens_differ for s in column.sizes] == [0, 6, 6]
    example = column.example
    assert example is not None
    assert (example.batch_size, example.position, example.token_step) == (4, 3, 1)
    assert (example.text_alone, example.text_in_batch) == ("[1, 2, 3]", "[1, 8, 3]")


class Ways(Generator):
    """Decodings that nothing changes, but for a bit that is planted in one way."""

    planted: str

    def __init__(self, planted: str) -> None:
        super().__init__(None, None, 3)
        object.__setattr__(self, "planted", planted)

    def _rows(self, prompts: Sequence[str], way: str) -> list[Decoded]:
        rows = steady(prompts)
        if way == self.planted and PROMPTS[2] in prompts:
            flip_bit(rows[list(prompts).index(PROMPTS[2])].logits, (1, 0), 0)
        return rows

    def sampled(self, prompts: Sequence[str], seeds: Sequence[int], keyed: bool) -> list[Decoded]:
        assert list(seeds) == [paths.seed_of(PROMPTS.index(prompt)) for prompt in prompts]
        return self._rows(prompts, "sampled" if len(prompts) > 1 else "alone")

    def chunked(self, prompt: str, chunk: int) -> Decoded:
        return self._rows([prompt], "chunked")[0]

    def reused(self, prompt: str, other: str) -> Decoded:
        assert other != prompt
        return self._rows([prompt], "reused")[0]


@pytest.mark.parametrize("planted", ["", "sampled", "chunked", "reused"])
def test_a_planted_bit_is_found_on_its_way_only(planted: str) -> None:
    calls: list[int] = []
    found = paths.measure(
        PROMPTS, steady(PROMPTS), Ways(planted), True, lambda label, done: calls.append(done)
    )
    assert sum(calls) == paths.steps(len(PROMPTS))
    wrong = [way == planted for way in ("sampled", "chunked", "reused")]
    assert [result.logits_differ for result in found] == [int(w) for w in wrong]
    assert all(result.tokens_differ == 0 and result.prompts == 6 for result in found)
    column = Column(0.0, [], 0, 0, None, found)
    assert column.same_in_batches
    assert column.same == (planted == "")
