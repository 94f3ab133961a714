"""What `bi demo` prints, and its JSON."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest

from batch_invariant.cli import render
from batch_invariant.cli.demo import BATCH_SIZES
from batch_invariant.cli.demo.lines import as_lines
from batch_invariant.cli.demo.prompts import PROMPTS, read_prompts
from batch_invariant.cli.demo.report import (
    Column,
    Example,
    PathResult,
    Report,
    SizeResult,
    as_json,
)


def report(*, stock_differs: bool = True, invariant_differs: bool = False) -> Report:
    prompts = read_prompts(PROMPTS)
    n = len(prompts)

    def column(differs: bool) -> Column:
        count = n if differs else 0
        sizes = [
            SizeResult(size, 100, n, count, count // 3, 0.123456 * count, 1234.56)
            for size in BATCH_SIZES
        ]
        example = Example(max(prompts, key=len), 32, 31, 2, "日本" * 60, "[red]\n[/x]")
        paths = [
            PathResult(way, n, count, count, 1.5, 1234.56)
            for way in ("sampled, batches of 8", "prefill in chunks of 7")
        ]
        shown = example if differs else None
        return Column(12.3, sizes, count, count // 3, shown, paths)

    return Report(
        model="SmolLM2-135M-Instruct",
        dtype="bfloat16",
        parameters=134_515_008,
        prompts=n,
        prompt_tokens=(4, 51),
        max_new_tokens=8,
        machine={"processor": "A processor", "capability": "AVX2", "threads": 2, "system": "x"},
        versions={"torch": "2.13.0+cpu", "transformers": "5.23.0", "python": "3", "bi": "0"},
        backend="cpu",
        device="cpu",
        load_seconds=20.0,
        stock=column(stock_differs),
        invariant=column(invariant_differs),
    )


def test_in_a_pipe_the_report_is_plain_and_fits_80_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    render.emit(as_lines(report(invariant_differs=True)), stream)
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    assert max(render.cell_len(line) for line in text.splitlines()) <= 80
    assert "[red]\\n[/x]" in text  # a prompt is no markup
    words = " ".join(text.split())
    assert "batch_invariant FAILED: the batch changed the logits of 32 of 32 prompts, the" in words
    assert [line.split()[0] for line in text.splitlines() if "1234.6 s" in line] == [
        *(str(size) for size in BATCH_SIZES),
        *("sampled,", "prefill"),
    ]


def test_a_terminal_gets_the_same_words_in_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    render.emit(as_lines(report(invariant_differs=True)), stream)
    assert "\x1b[" in stream.getvalue()
    assert "FAILED" in stream.getvalue()


def test_a_stream_without_the_characters_gets_escapes() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    render.emit(as_lines(report()), stream)
    stream.flush()
    assert b"\\u65e5\\u672c" in raw.getvalue()


def test_no_difference_in_stock_torch_is_said_plainly() -> None:
    lines = [
        line if isinstance(line, str) else line[0] for line in as_lines(report(stock_differs=False))
    ]
    assert "stock torch: no difference on this machine for these prompts and batch sizes." in lines
    assert "batch_invariant: the same bits alone, in every batch and on every way." in lines
    assert not any("FAILED" in line for line in lines)


def test_the_library_alone_decides_whether_it_is_good() -> None:
    assert report().ok
    assert report(stock_differs=False).ok
    assert not report(invariant_differs=True).ok
    assert not dataclasses.replace(
        report(), invariant=dataclasses.replace(report().invariant, tokens_differ=1)
    ).ok


def test_json_is_one_object_with_every_figure() -> None:
    broken = report()
    infinite = dataclasses.replace(broken.stock.sizes[0], largest_difference=math.inf)
    broken.stock.sizes[0] = infinite
    found = json.loads(as_json(broken), parse_constant=pytest.fail)
    assert set(found) == {field.name for field in dataclasses.fields(Report)} | {"ok"}
    assert found["ok"] is True
    for side in ("stock", "invariant"):
        assert [s["batch_size"] for s in found[side]["sizes"]] == list(BATCH_SIZES)
        assert all(
            set(s) == {field.name for field in dataclasses.fields(SizeResult)}
            for s in found[side]["sizes"]
        )
        assert all(
            set(p) == {field.name for field in dataclasses.fields(PathResult)}
            for p in found[side]["paths"]
        )
    assert found["stock"]["sizes"][0]["largest_difference"] is None
    assert found["stock"]["example"]["text_in_batch"] == "[red]\n[/x]"
    assert found["invariant"]["example"] is None


def test_progress_in_a_pipe_is_a_line_for_each_label_or_nothing() -> None:
    stream = io.StringIO()
    with render.progress(3, stream) as step:
        for label in ("one", "one", "two"):
            step(label, 1)
    assert stream.getvalue() == "one\ntwo\n"
    stream = io.StringIO()
    with render.progress(3, stream, plain=False) as step:
        step("one", 1)
    assert stream.getvalue() == ""


def test_a_table_aligns_wide_characters_and_groups() -> None:
    lines = render.table(
        ["a", "b", "c"], [["1", "日本", "x"], ["", "2", "yy"]], [("G", 1), ("H", 2)]
    )
    assert lines == ["G    H", "a       b   c", "1    日本   x", "        2  yy"]


def test_clip_keeps_the_end() -> None:
    assert render.clip("short", 10) == "short"
    assert render.clip("0123456789", 8) == "...56789"
    assert render.cell_len(render.clip("日" * 20, 10)) <= 10


def test_a_way_that_differs_is_a_failure_by_name() -> None:
    whole = report()
    wrong = dataclasses.replace(whole.invariant.paths[1], logits_differ=3)
    whole.invariant.paths[1] = wrong
    assert not whole.ok
    text = " ".join(line if isinstance(line, str) else line[0] for line in as_lines(whole))
    assert "batch_invariant FAILED: something else changed: prefill in chunks of 7." in text
