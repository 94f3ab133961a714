"""What a check writes down while it looks: how much it compared, what it measured, what broke."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from batch_invariant.ops.contract import Case, Data


@dataclass(frozen=True)
class Break:
    """Something that does not hold: on which case and data, and what was seen."""

    case: str
    data: str
    detail: str

    def __str__(self) -> str:
        where = " ".join(part for part in (self.case, self.data) if part)
        return f"[{where}] {self.detail}" if where else self.detail


@dataclass
class Log:
    """Filled by one check of one subject.

    looked_at: comparisons made; a check that compares nothing proves nothing.
    figures: measured values by name.
    """

    looked_at: int = 0
    breaks: list[Break] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def broken(self, detail: str, case: Case | None = None, data: Data | str = "") -> None:
        """Writes down that something does not hold."""
        self.breaks.append(Break(case.label if case else "", str(data), detail))

    def compare(
        self, found: object | None, what: str, case: Case | None = None, data: Data | str = ""
    ) -> None:
        """Counts one comparison; `found` is None where it holds, else what differs."""
        self.looked_at += 1
        if found is not None:
            self.broken(f"{what}: {found}", case, data)

    def worst(self, name: str, value: float) -> None:
        """Keeps the largest value seen under a name."""
        self.figures[name] = max(value, self.figures.get(name, value))


def shapes(args: Mapping[str, Any]) -> str:
    """The tensors of a call in words: `self [64, 1024], mat2 [1024, 512]`."""
    return ", ".join(
        f"{name} {list(value.shape)}"
        for name, value in args.items()
        if isinstance(value, torch.Tensor)
    )
