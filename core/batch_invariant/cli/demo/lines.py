"""The report for people."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING

from batch_invariant.cli.demo.report import Column, Example, PathResult, Report, SizeResult

if TYPE_CHECKING:
    from batch_invariant.cli.render import Line


def as_lines(report: Report) -> list[Line]:
    """The report for people, in 80 columns where names and figures are not unusually long."""
    machine, versions = report.machine, report.versions
    threads = machine["threads"]
    shortest, longest = report.prompt_tokens
    lines: list[Line] = [
        (
            f"bi demo  {report.model}, {report.parameters / 1e6:.1f} M parameters, {report.dtype}",
            "bold",
        ),
        f"torch {versions['torch']}, transformers {versions['transformers']}, "
        f"backend {report.backend}, {threads} thread{'s' if threads > 1 else ''}",
        f"{machine['processor']} ({machine['capability']})",
        f"{report.prompts} prompts of {shortest} to {longest} tokens, "
        f"{report.max_new_tokens} new tokens each, greedy, left padding",
        "",
        "Prompts whose logits (bit for bit) or tokens in a batch are not those they get",
        "alone, and the largest |difference| of two logits:",
        "",
    ]
    from batch_invariant.cli import render

    def cells(result: SizeResult) -> list[str]:
        return [
            f"{result.logits_differ}/{result.prompts}",
            f"{result.tokens_differ}/{result.prompts}",
            f"{result.largest_difference:.2g}",
            f"{result.seconds:.1f} s",
        ]

    alone = [f"{column.alone_seconds:.1f} s" for column in (report.stock, report.invariant)]
    rows = [["alone", "", "", "", alone[0], "", "", "", alone[1]]]
    for stock, invariant in zip(report.stock.sizes, report.invariant.sizes, strict=True):
        rows.append([str(stock.batch_size), *cells(stock), *cells(invariant)])
    figures = ["logits", "tokens", "largest", "time"]
    lines += render.table(
        ["batch", *figures, *figures],
        rows,
        [("", 1), ("stock torch", 4), ("batch_invariant", 4)],
    )
    if report.invariant.paths:
        lines += ["", *_paths(report)]
    lines += ["", *_verdict(report)]
    return lines


def _paths(report: Report) -> list[Line]:
    from batch_invariant.cli import render

    def cells(result: PathResult) -> list[str]:
        return [
            f"{result.logits_differ}/{result.prompts}",
            f"{result.tokens_differ}/{result.prompts}",
            f"{result.seconds:.1f} s",
        ]

    rows = [
        [stock.way, *cells(stock), *cells(invariant)]
        for stock, invariant in zip(report.stock.paths, report.invariant.paths, strict=True)
    ]
    figures = ["logits", "tokens", "time"]
    return [
        "The same prompts in other ways, compared with the prompt alone. Stock torch",
        "draws from one random stream, batch_invariant by a seed for each prompt.",
        "",
        *render.table(
            ["", *figures, *figures], rows, [("", 1), ("stock torch", 3), ("batch_invariant", 3)]
        ),
    ]


def _verdict(report: Report) -> list[Line]:
    def changed(column: Column) -> str:
        others = [path.way for path in column.paths if path.logits_differ or path.tokens_differ]
        if column.same_in_batches:
            return f"something else changed: {', '.join(others)}."
        return (
            f"the batch changed the logits of {column.logits_differ} of {report.prompts} prompts, "
            f"the text of {column.tokens_differ}."
        )

    stock, invariant = report.stock, report.invariant
    lines: list[Line] = []
    if stock.same:
        lines.append(
            "stock torch: no difference on this machine for these prompts and batch sizes."
        )
    else:
        lines += textwrap.wrap(f"stock torch: {changed(stock)}", 80)
        lines += _show(stock.example)
    if invariant.same:
        also = " and on every way" if invariant.paths else ""
        said = f"batch_invariant: the same bits alone, in every batch{also}."
        lines.append((said, "bold green"))
    else:
        failure = textwrap.wrap(f"batch_invariant FAILED: {changed(invariant)}", 80)
        lines += [(line, "bold red") for line in failure]
        lines += _show(invariant.example)
    return lines


def _show(example: Example | None) -> list[Line]:
    if example is None:
        return []
    from batch_invariant.cli import render

    where = f"in a batch of {example.batch_size}"
    parts = {
        "prompt": example.prompt,
        "alone": example.text_alone,
        where: example.text_in_batch,
    }
    width = max(map(len, parts))
    return [
        f"  {name:{width}}  {render.clip(json.dumps(text, ensure_ascii=False), 74 - width)}"
        for name, text in parts.items()
    ]
