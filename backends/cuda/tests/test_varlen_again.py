"""Attention over sequences: a kept call gives every kernel what the first did. Needs no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from batch_invariant_cuda import varlen_attention, varlen_ring, varlen_tiles

NAMES = ("sinks", "cu_seqlens_q", "cu_seqlens_k", "seq_lens", "left_pad", "block_table")
Given = dict[str, torch.Tensor]


class Launches:
    """Instead of the kernels: which were launched, with the addresses of their tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[tuple[str, tuple[int | None, ...]]] = []
        self.swapped = False
        for home, name in (
            (varlen_tiles, "sequences_in_blocks"),
            (varlen_tiles, "combine_sequences"),
            (varlen_ring, "plan_tiles"),
        ):
            monkeypatch.setattr(home, name, Kernel(name, self))
        kernels = Described("many", self), Described("few", self)
        monkeypatch.setattr(varlen_ring, "_kernels", lambda: kernels)
        monkeypatch.setattr(varlen_ring, "fits", lambda *_: True)
        monkeypatch.setattr(varlen_attention, "check_values", lambda *_: None)

    def start(self, name: str, count: int) -> Any:
        def start(*addresses: int | None) -> None:
            assert len(addresses) == count, name
            self.found.append((name, addresses[::-1] if self.swapped else addresses))

        return start


def _addresses(tensors: tuple[torch.Tensor | None, ...]) -> tuple[int | None, ...]:
    return tuple(None if x is None else x.data_ptr() for x in tensors)


class Kernel:
    """As `row_launch.RowKernel`."""

    def __init__(self, name: str, launches: Launches) -> None:
        self.name, self.launches = name, launches

    def __call__(self, programs: int, tensors: tuple[Any, ...], numbers: Any, *_: Any) -> None:
        assert max(numbers) < 2**31, "the kernels' numbers are int32"
        self.launches.found.append((self.name, _addresses(tensors)))

    def repeat(self, programs: int, tensors: tuple[Any, ...], *_: Any) -> Any:
        return self.launches.start(self.name, len(tensors))


class Described(Kernel):
    """As `attention_ring.DescribedKernel`."""

    def __call__(self, programs: int, described: Any, tensors: Any, numbers: Any, *_: Any) -> Any:  # type: ignore[override]
        assert max(numbers) < 2**31, "the kernels' numbers are int32"
        every = (*(x.base for x in described), *tensors)
        self.launches.found.append((self.name, _addresses(every)))
        return self.launches.start(self.name, len(every))


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


def _ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _roles(launches: Launches, given: Given, results: tuple[torch.Tensor, ...]) -> Any:
    """What was launched, with the names of tensors for addresses; others are the call's own."""
    names = {x.data_ptr(): name for name, x in given.items()}
    names |= {x.data_ptr(): name for x, name in zip(results, ("out", "lse"), strict=True)}
    found = [
        (name, [None if x is None else names.get(x, "own") for x in addresses])
        for name, addresses in launches.found
    ]
    launches.found.clear()
    return found


DENSE = {"key": _drawn(2, 200, 2, 64), "value": _drawn(2, 200, 2, 64)}
PAGES = {
    **{"key": _drawn(40, 16, 2, 64), "value": _drawn(40, 16, 2, 64)},
    **{"block_table": torch.zeros(2, 20, dtype=torch.int32), "seq_lens": _ints(9, 300)},
}
CASES: dict[str, tuple[Given, dict[str, Any], list[str]]] = {
    "padded": (
        {
            "query": _drawn(2, 100, 8, 64),
            **DENSE,
            "seq_lens": _ints(9, 200),
            "left_pad": _ints(0, 3),
        },
        {},
        ["plan_tiles", "many", "sequences_in_blocks"],
    ),
    "packed, in pages": (
        {"query": _drawn(100, 8, 64), **PAGES, "cu_seqlens_q": _ints(0, 7, 99), "sinks": _drawn(8)},
        {"window": 2**40},
        ["few", "plan_tiles", "many", "sequences_in_blocks"],
    ),
    "nothing is hidden": (
        {"query": _drawn(2, 100, 8, 64), **DENSE, "sinks": _drawn(8)},
        {"causal": False},
        ["plan_tiles", "many"],
    ),
    "a step": (
        {"query": _drawn(2, 1, 8, 64), **PAGES, "sinks": _drawn(8)},
        {"soft_cap": 2.0},
        ["few", "combine_sequences"],
    ),
    "a step in one run": ({"query": _drawn(2, 1, 8, 64), **PAGES}, {}, ["few"]),
}


@pytest.mark.parametrize("label", CASES)
def test_a_kept_call_passes_what_the_first_did(monkeypatch: pytest.MonkeyPatch, label: str) -> None:
    tensors, options, expected = CASES[label]
    launches = Launches(monkeypatch)
    runs = 1 if len(expected) == 1 else 2
    monkeypatch.setattr(varlen_attention, "runs_of", lambda *_: runs)
    options = {"causal": True, "scale": None, "window": None, "soft_cap": None} | options

    def roles() -> Any:
        given = {name: x.clone() for name, x in tensors.items()}
        results = varlen_attention.KERNELS["attention"].fn(
            given["query"], given["key"], given["value"], *map(given.get, NAMES), *options.values()
        )
        return _roles(launches, given, results)

    varlen_attention.forget()
    first = roles()
    assert [name for name, _ in first] == expected
    assert len(varlen_attention._calls._known) == 1
    assert roles() == first
    launches.swapped = True
    assert roles() != first
    varlen_attention.forget()
