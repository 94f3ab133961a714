"""`bi demo` as a whole, on a model made here: seconds, but every step of the way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import batch_invariant as bi
from batch_invariant.cli import demo, models
from batch_invariant.cli.demo.comparing import Decoded
from batch_invariant.cli.demo.generation import Generator
from demo_parts import flip_bit, parse
from plugin_source import Install


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
    ways = ["sampled, batches of 8", "prefill in chunks of 7", "prefix from a cache"]
    for side in ("stock", "invariant"):
        assert [p["way"] for p in found[side]["paths"]] == ways
    assert [p["logits_differ"] for p in found["invariant"]["paths"]] == [0, 0, 0]
    assert [p["tokens_differ"] for p in found["invariant"]["paths"]] == [0, 0, 0]
    # The control: draws from one stream are those of the batch.
    assert found["stock"]["paths"][0]["tokens_differ"] > 0
    assert not bi.is_enabled()


def test_the_command_prints_a_table_on_stdout_and_progress_on_stderr(
    toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_toy(toy_model, tmp_path) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "batch_invariant: the same bits alone, in every batch and on every way." in captured.out
    assert captured.err.splitlines()[:2] == [
        f"loading {toy_model.name}",
        "stock torch: each prompt alone",
    ]
    assert captured.err.splitlines()[-1] == "batch_invariant: prefix from a cache"


def test_the_command_fails_if_the_batch_shows_through_the_library(
    toy_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The negative control: one bit of one logit, in one batch, under the library only."""
    real = Generator.greedy
    planted = []

    def one_bit(self: Generator, prompts: Sequence[str]) -> list[Decoded]:
        rows = real(self, prompts)
        if bi.is_enabled() and len(rows) == 3 and not planted:
            planted.append(True)
            flip_bit(rows[2].logits, (0, 17), 0)
        return rows

    monkeypatch.setattr(Generator, "greedy", one_bit)
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


def test_a_device_that_is_not_there_is_named_before_anything_is_loaded(
    toy_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("a model was loaded"))
    assert run_toy(toy_model, tmp_path, "--device", "cuda") == 1
    assert "cuda" in capsys.readouterr().err
