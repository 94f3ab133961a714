"""Other ways to the same tokens: sampling in company, a prefill in chunks, a cached prefix."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from batch_invariant.cli.demo.batches import plan
from batch_invariant.cli.demo.comparing import Decoded, Difference, compare
from batch_invariant.cli.demo.generation import Generator
from batch_invariant.cli.demo.report import PathResult

SAMPLED = 8  # the size of the batches in which requests are sampled
ROUNDS = 2
CHUNK = 7


def batches_sampled(prompts: int) -> list[list[int]]:
    """The batches in which the prompts are sampled."""
    return plan(prompts, SAMPLED, ROUNDS)


def steps(prompts: int) -> int:
    """How many calls `measure` makes."""
    return 3 * prompts + len(batches_sampled(prompts))


def seed_of(prompt: int) -> int:
    """The seed of a request's own."""
    return 1000 + prompt


def measure(
    prompts: Sequence[str],
    alone: Sequence[Decoded],
    generator: Generator,
    keyed: bool,
    step: Callable[[str, int], None],
) -> list[PathResult]:
    """Every way, beside the prompt alone.

    alone: each prompt's greedy decoding. keyed: whether draws are keyed by the seeds.
    """

    def sampled(batch: Sequence[int]) -> list[Decoded]:
        seeds = [seed_of(index) for index in batch]
        return generator.sampled([prompts[index] for index in batch], seeds, keyed)

    def each(label: str, run: Callable[[int], Decoded]) -> list[Decoded]:
        found = []
        for index in range(len(prompts)):
            step(label, 0)
            found.append(run(index))
            step(label, 1)
        return found

    by_itself = each("each prompt sampled alone", lambda index: sampled([index])[0])
    results = []
    began = time.perf_counter()
    label = f"sampled, batches of {SAMPLED}"
    found: list[tuple[int, Difference]] = []
    for batch in batches_sampled(len(prompts)):
        step(label, 0)
        rows = sampled(batch)
        pairs = zip(batch, rows, strict=True)
        found += [(index, compare(by_itself[index], row)) for index, row in pairs]
        step(label, 1)
    results.append(_result(label, len(prompts), found, began))

    ways: dict[str, Callable[[int], Decoded]] = {
        f"prefill in chunks of {CHUNK}": lambda index: generator.chunked(prompts[index], CHUNK),
        "prefix from a cache": lambda index: generator.reused(
            prompts[index], prompts[(index + 1) % len(prompts)]
        ),
    }
    for label, run in ways.items():
        began = time.perf_counter()
        rows = each(label, run)
        found = [(i, compare(alone[i], row)) for i, row in enumerate(rows)]
        results.append(_result(label, len(prompts), found, began))
    return results


def _result(
    label: str, prompts: int, found: Sequence[tuple[int, Difference]], began: float
) -> PathResult:
    return PathResult(
        way=label,
        prompts=prompts,
        logits_differ=len({index for index, difference in found if difference.logits}),
        tokens_differ=len({i for i, difference in found if difference.token_step is not None}),
        largest_difference=max(difference.largest for _, difference in found),
        seconds=time.perf_counter() - began,
    )
