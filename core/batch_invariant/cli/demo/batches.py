"""Which prompts share a batch, and what that changes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import torch

from batch_invariant.cli.demo.comparing import Decoded, compare
from batch_invariant.cli.demo.report import Column, Example, PathResult, SizeResult

PLACES = 4  # at how many positions of the batch each prompt is seen, where a batch has so many


def plan(prompts: int, batch_size: int, places: int = PLACES) -> list[list[int]]:
    """Which prompts go into which batch: lists of exactly `batch_size` indices below `prompts`.

    There are min(batch_size, places) rounds. A round holds every prompt; from round to round a
    prompt moves to another position and meets other neighbours, so it is padded otherwise too.
    Positions left over in a round's last batch are filled with more of the prompts.
    """
    rounds = min(batch_size, places)
    batches = []
    for turn in range(rounds):
        shift = turn * (batch_size // rounds)
        queues: list[list[int]] = [[] for _ in range(batch_size)]  # one for each position
        for prompt in range(prompts):
            queues[(prompt + shift) % batch_size].append(prompt)
        shuffle = random.Random(batch_size * places + turn).shuffle  # the same on every run
        for queue in queues:
            shuffle(queue)
        while any(queues):
            batch = [queue.pop() if queue else -1 for queue in queues]
            others = [prompt for prompt in range(prompts) if prompt not in batch]
            shuffle(others)
            for position, prompt in enumerate(batch):
                if prompt < 0:
                    batch[position] = others.pop() if others else position % prompts
            batches.append(batch)
    return batches


def measure(
    prompts: Sequence[str],
    batch_sizes: Sequence[int],
    decode_batch: Callable[[Sequence[str]], list[Decoded]],
    text: Callable[[torch.Tensor], str],
    step: Callable[[str, int], None],
    ways: Callable[[list[Decoded]], list[PathResult]] = lambda alone: [],
) -> Column:
    """Every prompt alone, then in the batches of `plan` at every size, each against itself alone.

    decode_batch: prompts to one `Decoded` each; text: tokens to text; step: told what is being
    worked on and how many more batches are done; ways: from each prompt alone, what other ways to
    the same tokens gave. Only `decode_batch` is timed.
    """
    clock = 0.0

    def timed(batch: Sequence[str]) -> list[Decoded]:
        nonlocal clock
        began = time.perf_counter()
        rows = decode_batch(batch)
        clock += time.perf_counter() - began
        return rows

    alone = []
    for prompt in prompts:
        step("each prompt alone", 0)
        alone += timed([prompt])
        step("each prompt alone", 1)
    alone_seconds = clock

    sizes = []
    any_logits: set[int] = set()
    any_tokens: set[int] = set()
    example: Example | None = None
    for size in batch_sizes:
        clock = 0.0
        largest = 0.0
        logits: set[int] = set()
        tokens: set[int] = set()
        batches = plan(len(prompts), size)
        for batch in batches:
            step(f"batches of {size}", 0)
            rows = timed([prompts[index] for index in batch])
            for position, (index, row) in enumerate(zip(batch, rows, strict=True)):
                found = compare(alone[index], row)
                largest = max(largest, found.largest)
                if found.logits:
                    logits.add(index)
                if found.token_step is None:
                    continue
                tokens.add(index)
                if example is None or found.token_step < example.token_step:
                    example = Example(
                        prompt=prompts[index],
                        batch_size=size,
                        position=position,
                        token_step=found.token_step,
                        text_alone=text(alone[index].tokens),
                        text_in_batch=text(row.tokens),
                    )
            step(f"batches of {size}", 1)
        any_logits |= logits
        any_tokens |= tokens
        sizes.append(
            SizeResult(size, len(batches), len(prompts), len(logits), len(tokens), largest, clock)
        )
    return Column(alone_seconds, sizes, len(any_logits), len(any_tokens), example, ways(alone))
