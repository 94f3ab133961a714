"""What the commands print: aligned tables, styled lines and progress. The only importer of rich.

A terminal gets colour and a moving bar; a pipe gets the same words as plain lines, without control
codes. Colour never carries meaning alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Line = str | tuple[str, str]  # a line, or a line and its rich style


def emit(lines: Iterable[Line], stream: TextIO | None = None) -> None:
    """Print the lines to `stream` (standard output by default), never wrapped."""
    console = _console(stream or sys.stdout)
    for line in lines:
        text, style = (line, "") if isinstance(line, str) else line
        # A stream that cannot say a character gets its escape, not a UnicodeEncodeError.
        text = text.encode(console.encoding, "backslashreplace").decode(console.encoding)
        console.print(Text(text, style=style), soft_wrap=True)


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    groups: Sequence[tuple[str, int]] = (),
) -> list[str]:
    """The rows as right-aligned columns under `headers`, one string per line.

    `groups` puts a title over each run of columns: (title, number of columns), left to right.
    """
    widths = [max(cell_len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]
    gaps = [0] + [2] * (len(headers) - 1)
    first = 0
    over = ""
    for title, count in groups:
        if first:
            gaps[first] = 4
        over += " " * gaps[first]
        span = sum(widths[first : first + count]) + sum(gaps[first + 1 : first + count])
        over += set_cell_size(title, span)
        first += count
    lines = [over.rstrip()] if groups else []
    for row in (headers, *rows):
        cells = (
            " " * (gap + width - cell_len(cell)) + cell
            for cell, width, gap in zip(row, widths, gaps, strict=True)
        )
        lines.append("".join(cells))
    return lines


def clip(text: str, width: int) -> str:
    """`text`, or its last part behind three dots where it needs more than `width` columns."""
    if cell_len(text) <= width:
        return text
    tail = text
    while cell_len(tail) > width - 3:
        tail = tail[1:]
    return "..." + tail


@contextmanager
def progress(
    total: int, stream: TextIO | None = None, *, plain: bool = True
) -> Iterator[Callable[[str, int], None]]:
    """A function `step(label, done)`: what is being worked on, and how much more is finished.

    A bar on a terminal; elsewhere one line for each new label, or nothing if `plain` is false.
    """
    stream = stream or sys.stderr
    if stream.isatty():
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=_console(stream), transient=True) as bar:
            task = bar.add_task("", total=total)

            def step(label: str, done: int) -> None:
                bar.update(task, description=label, advance=done)

            yield step
        return

    last = ""

    def say(label: str, done: int) -> None:
        nonlocal last
        if plain and label != last:
            print(label, file=stream, flush=True)
        last = label

    yield say


def _console(stream: TextIO) -> Console:
    # force_terminal: rich would let FORCE_COLOR put control codes into a pipe.
    return Console(
        file=stream,
        force_terminal=stream.isatty(),
        highlight=False,
        markup=False,
        emoji=False,
    )
