"""The list of tiles of sequences, in Triton's interpreter: integers alone, so these are real."""

from __future__ import annotations

import pytest

from interpreter import printed

pytest.importorskip("triton", reason="Triton is not installed")


_PROGRAM = r"""
import sys

import torch

from batch_invariant_cuda import varlen_plan


def cuts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def listed(queries, firsts, ends, begins, tokens, short, causal, packed):
    found, q_row = [], 0
    for b, count in enumerate([*queries, tokens - sum(queries)] if packed else queries):
        end = ends[b] if b < len(ends) else 0
        first = min(firsts[b], end) if b < len(ends) else 0
        for row in range(0, 0 if b < len(ends) and count <= short else count, 128):
            rows = min(count - row, 128)
            keys = end - first
            seen = min(keys, keys - count + row + 1) if causal else keys
            last = min(keys, keys - count + row + rows) if causal else keys
            at = begins[b] if b < len(ends) else 0
            found.append((
                *((0, q_row + row) if packed else (b, row)), rows,
                min(b, len(ends) - 1) if not packed else 0, at + first, seen,
                keys if b < len(ends) else -1,
                max(-(-last // 128), 1),
            ))
        q_row += count
    return found


for causal in (True, False):
    for short in (0, 4):
        queries, keys = [300, 1, 0, 128, 5, 129], [700, 90, 0, 128, 2, 1000]
        rows = sum(queries) + 7
        cu_q, cu_k = cuts(queries), cuts(keys)
        room = varlen_plan.room_for(6, 0, rows, True)
        plan = varlen_plan.empty_tiles(room, torch.device("cpu"))
        given = cu_q + 1 if "broken" in sys.argv else cu_q
        numbers = (6, 0, rows, 5000, short, room)
        varlen_plan.plan_tiles(7, (plan, given, cu_k, None, None), numbers, (causal, False), 4)
        want = listed(queries, [0] * 6, keys, cu_k.tolist(), rows, short, causal, True)
        got = [tuple(x) for x in plan.view(-1, 8)[1 : 1 + int(plan[0])].tolist()]
        if int(plan[1]) or got != want:
            print("packed", causal, short)
    firsts, ends = [3, 0, 999, 17], [700, 299, 500, 0]
    room = varlen_plan.room_for(4, 300, 0, False)
    plan = varlen_plan.empty_tiles(room, torch.device("cpu"))
    pads = torch.tensor(firsts) + ("broken" in sys.argv)
    lengths = (None, None, torch.tensor(ends), pads)
    varlen_plan.plan_tiles(4, (plan, *lengths), (4, 300, 0, 800, 0, room), (causal, True), 4)
    want = listed([300] * 4, firsts, ends, [0] * 4, 0, 0, causal, False)
    if [tuple(x) for x in plan.view(-1, 8)[1 : 1 + int(plan[0])].tolist()] != want:
        print("padded", causal)
"""


def test_tiles_of_sequences_are_listed() -> None:
    assert printed(_PROGRAM) == []


def test_lengths_that_are_off_by_one_are_seen_in_the_list() -> None:
    assert len(printed(_PROGRAM, "broken")) == 6
