"""What `bi demo` found, as data."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SizeResult:
    """One batch size: how many of the prompts differed in any of their batches."""

    batch_size: int
    batches: int
    prompts: int
    logits_differ: int
    tokens_differ: int
    largest_difference: float
    seconds: float


@dataclass(frozen=True)
class PathResult:
    """One other way to the same tokens: how many of the prompts differed on it."""

    way: str
    prompts: int
    logits_differ: int
    tokens_differ: int
    largest_difference: float
    seconds: float


@dataclass(frozen=True)
class Example:
    """One prompt whose text the batch changed."""

    prompt: str
    batch_size: int
    position: int
    token_step: int
    text_alone: str
    text_in_batch: str


@dataclass(frozen=True)
class Column:
    """Stock torch, or the library: every batch size, and the prompts that differed at any size."""

    alone_seconds: float
    sizes: list[SizeResult]
    logits_differ: int
    tokens_differ: int
    example: Example | None
    paths: list[PathResult] = field(default_factory=list)

    @property
    def same_in_batches(self) -> bool:
        return self.logits_differ == 0 and self.tokens_differ == 0

    @property
    def same(self) -> bool:
        """In batches, and on every other way."""
        paths = self.paths
        return self.same_in_batches and not any(p.logits_differ or p.tokens_differ for p in paths)


@dataclass(frozen=True)
class Report:
    """Everything `bi demo` found; `--json` prints these fields."""

    model: str
    dtype: str
    parameters: int
    prompts: int
    prompt_tokens: tuple[int, int]  # the shortest and the longest prompt
    max_new_tokens: int
    machine: dict[str, Any]
    versions: dict[str, str]
    backend: str
    device: str
    load_seconds: float
    stock: Column
    invariant: Column

    @property
    def ok(self) -> bool:
        return self.invariant.same


def as_json(report: Report) -> str:
    """The report as one JSON object; a difference that is not finite is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({**plain(dataclasses.asdict(report)), "ok": report.ok}, indent=2)
